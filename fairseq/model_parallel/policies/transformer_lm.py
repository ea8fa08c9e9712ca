"""The policy of this project's language models, with plain or adaptive inputs and outputs."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from torch import nn

from fairseq.model_parallel.policy import Layer, Policy
from fairseq.modules import TransformerDecoderLayer
from fairseq.modules.adaptive_softmax import TiedLinear

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fairseq.attention.head_share import HeadShare

__all__ = ["TransformerLMPolicy"]

_EMBEDDINGS = re.compile(r"(.*\.)?embed_tokens(\.embeddings\.\d+\.0)?")
_OUTPUTS = re.compile(r"(.*\.)?(output_projection|adaptive_softmax\.(head|tail)\..*)")
_HEAD = re.compile(r"(.*\.)?adaptive_softmax\.head")


class TransformerLMPolicy(Policy):
    """Cuts layers, tables of input embeddings, and the words of output layers.

    Of an adaptive softmax the words of head and tails are cut, not the narrow projections in front
    of them. The bias of a position method is told which heads to make.
    """

    @staticmethod
    def original_layer_class() -> type[nn.Module]:
        return TransformerDecoderLayer

    @staticmethod
    def config(model: nn.Module) -> Any:
        layers = [m for m in model.modules() if isinstance(m, TransformerDecoderLayer)]
        return SimpleNamespace(num_heads=layers[0].self_attn.num_heads)

    @staticmethod
    def heads(config: Any) -> Mapping[str, int]:
        return {"--decoder-attention-heads": config.num_heads}

    @staticmethod
    def replace_arguments(config: Any, world_size: int) -> dict[str, Any]:
        return {"self_attn.num_heads": config.num_heads // world_size}

    @staticmethod
    def attn_qkv() -> list[Layer]:
        names = ("q_proj", "k_proj", "v_proj")
        return [Layer(weight=f"self_attn.{n}.weight", bias=f"self_attn.{n}.bias") for n in names]

    @staticmethod
    def attn_out() -> list[Layer]:
        return [Layer(weight="self_attn.out_proj.weight", bias="self_attn.out_proj.bias")]

    @staticmethod
    def mlp_in() -> list[Layer]:
        return [Layer(weight="fc1.weight", bias="fc1.bias")]

    @staticmethod
    def mlp_out() -> list[Layer]:
        return [Layer(weight="fc2.weight", bias="fc2.bias")]

    @staticmethod
    def embeddings(model: nn.Module) -> list[str]:
        return [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Embedding) and _EMBEDDINGS.fullmatch(name)
        ]

    @staticmethod
    def outputs(model: nn.Module) -> list[str]:
        return [name for name, module in model.named_modules() if _scores_words(name, module)]

    @staticmethod
    def install(model: nn.Module, share: HeadShare | None) -> None:
        decoder: Any
        for decoder in model.modules():
            if hasattr(decoder, "head_share"):
                decoder.head_share = share


def _scores_words(name: str, module: nn.Module) -> bool:
    if isinstance(module, TiedLinear):
        return not module.transpose and _OUTPUTS.fullmatch(name) is not None
    if not isinstance(module, nn.Linear):
        return False
    # In a tail, the narrow projection is the first of three.
    is_tail = re.fullmatch(r"(.*\.)?adaptive_softmax\.tail\.\d+\.2", name) is not None
    return is_tail or name.endswith("output_projection") or _HEAD.fullmatch(name) is not None
