"""MPT of transformers: queries, keys and values fused part by part, ALiBi."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from fairseq.model_parallel.policy import HeadState, Layer, Policy

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["MptPolicy"]


class MptPolicy(Policy):
    """For `MptModel` and the models built on it.

    The model makes the bias of all heads, (H, 1, S); each layer takes that of its own.
    """

    @staticmethod
    def original_layer_class() -> type[nn.Module]:
        from transformers.models.mpt.modeling_mpt import MptBlock

        return MptBlock

    @staticmethod
    def heads(config: Any) -> Mapping[str, int]:
        return {"heads (n_heads)": config.n_heads}

    @staticmethod
    def replace_arguments(config: Any, world_size: int) -> dict[str, Any]:
        return {"attn.n_heads": config.n_heads // world_size}

    @staticmethod
    def attn_qkv() -> list[Layer]:
        return [Layer(weight="attn.Wqkv.weight", n_fused=3)]

    @staticmethod
    def attn_out() -> list[Layer]:
        return [Layer(weight="attn.out_proj.weight")]

    @staticmethod
    def mlp_in() -> list[Layer]:
        return [Layer(weight="ffn.up_proj.weight")]

    @staticmethod
    def mlp_out() -> list[Layer]:
        return [Layer(weight="ffn.down_proj.weight")]

    @staticmethod
    def head_state() -> list[HeadState]:
        return [HeadState(argument="position_bias", dim=0)]
