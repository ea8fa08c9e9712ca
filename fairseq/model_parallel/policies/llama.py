"""Llama of transformers: gated, and with fewer heads of keys and values than of queries."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from fairseq.model_parallel.policy import Layer, Policy

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["LlamaPolicy"]


def _layer(name: str) -> Layer:
    return Layer(weight=f"{name}.weight", bias=f"{name}.bias")


class LlamaPolicy(Policy):
    """For `LlamaModel` and the models built on it.

    Each process takes whole groups, the heads of queries with their head of keys and values. The
    layer counts no heads itself, so no number is replaced.
    """

    @staticmethod
    def original_layer_class() -> type[nn.Module]:
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer

        return LlamaDecoderLayer

    @staticmethod
    def heads(config: Any) -> Mapping[str, int]:
        return {
            "heads (num_attention_heads)": config.num_attention_heads,
            "heads of keys and values (num_key_value_heads)": config.num_key_value_heads,
        }

    @staticmethod
    def attn_qkv() -> list[Layer]:
        return [_layer(f"self_attn.{name}") for name in ("q_proj", "k_proj", "v_proj")]

    @staticmethod
    def attn_out() -> list[Layer]:
        return [_layer("self_attn.o_proj")]

    @staticmethod
    def mlp_in() -> list[Layer]:
        return [_layer("mlp.gate_proj"), _layer("mlp.up_proj")]

    @staticmethod
    def mlp_out() -> list[Layer]:
        return [_layer("mlp.down_proj")]
