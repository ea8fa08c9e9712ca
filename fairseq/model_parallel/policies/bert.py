"""BERT and RoBERTa of transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from fairseq.model_parallel.policy import Layer, Policy

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["BertPolicy", "RobertaPolicy"]


def _layer(name: str) -> Layer:
    return Layer(weight=f"{name}.weight", bias=f"{name}.bias")


class BertPolicy(Policy):
    """For `BertModel` and the models built on it, without cross attention."""

    @staticmethod
    def original_layer_class() -> type[nn.Module]:
        from transformers.models.bert.modeling_bert import BertLayer

        return BertLayer

    @staticmethod
    def heads(config: Any) -> Mapping[str, int]:
        return {"heads (num_attention_heads)": config.num_attention_heads}

    @staticmethod
    def replace_arguments(config: Any, world_size: int) -> dict[str, Any]:
        return {
            "attention.self.num_attention_heads": config.num_attention_heads // world_size,
            "attention.self.all_head_size": config.hidden_size // world_size,
        }

    @staticmethod
    def attn_qkv() -> list[Layer]:
        return [_layer(f"attention.self.{name}") for name in ("query", "key", "value")]

    @staticmethod
    def attn_out() -> list[Layer]:
        return [_layer("attention.output.dense")]

    @staticmethod
    def mlp_in() -> list[Layer]:
        return [_layer("intermediate.dense")]

    @staticmethod
    def mlp_out() -> list[Layer]:
        return [_layer("output.dense")]


class RobertaPolicy(BertPolicy):
    """For `RobertaModel` and the models built on it, without cross attention."""

    @staticmethod
    def original_layer_class() -> type[nn.Module]:
        from transformers.models.roberta.modeling_roberta import RobertaLayer

        return RobertaLayer
