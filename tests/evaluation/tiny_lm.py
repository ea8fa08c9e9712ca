"""Small language models for the tests of evaluations."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from fairseq.data.dictionary import dummy_dictionary
from fairseq.models import build_model
from fairseq.registry import ARCHITECTURES

VOCABULARY = 60


class Task:
    """As much of a task as a model is built from."""

    def __init__(self, size: int) -> None:
        self.source_dictionary = self.target_dictionary = dummy_dictionary(size - 4)


def tiny_lm(method: str = "alibi", size: int = VOCABULARY, **given: Any) -> Any:
    """Returns an untrained model of two layers and four heads, its weights larger than at first."""
    settings = {
        "decoder_layers": 2,
        "decoder_embed_dim": 32,
        "decoder_ffn_embed_dim": 64,
        "decoder_attention_heads": 4,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "tokens_per_sample": 32,
        "position_method": method,
        **given,
    }
    args = argparse.Namespace(arch="transformer_lm_gpt", **settings)
    ARCHITECTURES.preset_of(args.arch)(args)
    torch.manual_seed(0)
    model = build_model(args, Task(size))
    with torch.no_grad():
        for layer in model.decoder.layers:
            layer.self_attn.q_proj.weight.mul_(3)
            layer.self_attn.k_proj.weight.mul_(3)
    return model.eval()


def some_tokens(*shape: int, seed: int = 0, size: int = VOCABULARY) -> torch.Tensor:
    """Returns random ids without special ones."""
    return torch.randint(4, size, shape, generator=torch.Generator().manual_seed(seed))
