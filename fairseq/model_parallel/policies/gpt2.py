"""GPT-2 of transformers: weights (in, out), queries, keys and values fused part by part."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from fairseq.model_parallel.policy import Layer, Policy

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["GPT2Policy"]


class GPT2Policy(Policy):
    """For `GPT2Model` and the models built on it, without cross attention."""

    @staticmethod
    def original_layer_class() -> type[nn.Module]:
        from transformers.models.gpt2.modeling_gpt2 import GPT2Block

        return GPT2Block

    @staticmethod
    def heads(config: Any) -> Mapping[str, int]:
        return {"heads (n_head)": config.n_head}

    @staticmethod
    def replace_arguments(config: Any, world_size: int) -> dict[str, Any]:
        return {
            "attn.num_heads": config.n_head // world_size,
            "attn.split_size": config.n_embd // world_size,
        }

    @staticmethod
    def attn_qkv() -> list[Layer]:
        return [
            Layer(weight="attn.c_attn.weight", bias="attn.c_attn.bias", n_fused=3, reversed=True)
        ]

    @staticmethod
    def attn_out() -> list[Layer]:
        return [Layer(weight="attn.c_proj.weight", bias="attn.c_proj.bias", reversed=True)]

    @staticmethod
    def mlp_in() -> list[Layer]:
        return [Layer(weight="mlp.c_fc.weight", bias="mlp.c_fc.bias", reversed=True)]

    @staticmethod
    def mlp_out() -> list[Layer]:
        return [Layer(weight="mlp.c_proj.weight", bias="mlp.c_proj.bias", reversed=True)]
