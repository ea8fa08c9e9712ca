"""BLOOM of transformers: queries, keys and values fused head by head, ALiBi."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from fairseq.model_parallel.policy import HeadState, Layer, Policy

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["BloomPolicy"]


class BloomPolicy(Policy):
    """For `BloomModel` and the models built on it.

    The model makes the bias of all heads, (B * H, 1, S); each layer takes that of its own.
    """

    @staticmethod
    def original_layer_class() -> type[nn.Module]:
        from transformers.models.bloom.modeling_bloom import BloomBlock

        return BloomBlock

    @staticmethod
    def heads(config: Any) -> Mapping[str, int]:
        return {"heads (n_head)": config.n_head}

    @staticmethod
    def replace_arguments(config: Any, world_size: int) -> dict[str, Any]:
        return {"self_attention.num_heads": config.n_head // world_size}

    @staticmethod
    def attn_qkv() -> list[Layer]:
        name = "self_attention.query_key_value"
        return [Layer(weight=f"{name}.weight", bias=f"{name}.bias", n_fused=3, layout="heads")]

    @staticmethod
    def attn_out() -> list[Layer]:
        return [Layer(weight="self_attention.dense.weight", bias="self_attention.dense.bias")]

    @staticmethod
    def mlp_in() -> list[Layer]:
        return [Layer(weight="mlp.dense_h_to_4h.weight", bias="mlp.dense_h_to_4h.bias")]

    @staticmethod
    def mlp_out() -> list[Layer]:
        return [Layer(weight="mlp.dense_4h_to_h.weight", bias="mlp.dense_4h_to_h.bias")]

    @staticmethod
    def head_state() -> list[HeadState]:
        return [HeadState(argument="alibi", dim=0)]
