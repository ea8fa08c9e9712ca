"""OPT of transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from fairseq.model_parallel.policy import Layer, Policy

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["OPTPolicy"]


def _layer(name: str) -> Layer:
    return Layer(weight=f"{name}.weight", bias=f"{name}.bias")


class OPTPolicy(Policy):
    """For `OPTModel` and the models built on it."""

    @staticmethod
    def original_layer_class() -> type[nn.Module]:
        from transformers.models.opt.modeling_opt import OPTDecoderLayer

        return OPTDecoderLayer

    @staticmethod
    def heads(config: Any) -> Mapping[str, int]:
        return {"heads (num_attention_heads)": config.num_attention_heads}

    @staticmethod
    def replace_arguments(config: Any, world_size: int) -> dict[str, Any]:
        return {"self_attn.num_heads": config.num_attention_heads // world_size}

    @staticmethod
    def attn_qkv() -> list[Layer]:
        return [_layer(f"self_attn.{name}") for name in ("q_proj", "k_proj", "v_proj")]

    @staticmethod
    def attn_out() -> list[Layer]:
        return [_layer("self_attn.out_proj")]

    @staticmethod
    def mlp_in() -> list[Layer]:
        return [_layer("fc1")]

    @staticmethod
    def mlp_out() -> list[Layer]:
        return [_layer("fc2")]
