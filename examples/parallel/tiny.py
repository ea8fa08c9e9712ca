"""A small ALiBi language model and made-up batches, for the examples of this folder."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from fairseq.data import Dictionary
from fairseq.models.transformer_lm import TransformerLanguageModel


def meet_others(number: int) -> None:
    """Joins the processes that torchrun has started.

    Args:
        number: of processes, to name in the command if torchrun has not started this one.
    """
    if "RANK" not in os.environ:
        program = sys.argv[0]
        raise SystemExit(f"start it with: torchrun --nproc-per-node {number} {program}")
    dist.init_process_group("gloo")


def tiny_model() -> nn.Module:
    """Returns a model of two layers, the same in every process."""
    dictionary = Dictionary()
    for number in range(96):
        dictionary.add_symbol(f"word{number}")
    task = SimpleNamespace(source_dictionary=dictionary, target_dictionary=dictionary)
    settings = Namespace(
        decoder_layers=2,
        decoder_embed_dim=64,
        decoder_input_dim=64,
        decoder_output_dim=64,
        decoder_ffn_embed_dim=256,
        decoder_attention_heads=4,
        decoder_normalize_before=True,
        share_decoder_input_output_embed=True,
        no_token_positional_embeddings=True,
        tokens_per_sample=32,
        dropout=0.0,
    )
    torch.manual_seed(0)
    return TransformerLanguageModel.build_model(settings, task)


def rows(step: int) -> torch.Tensor:
    """Returns the four rows of 33 tokens that all processes together train on."""
    starts = torch.arange(4).view(-1, 1) * 7 + step
    return (starts + 3 * torch.arange(33)) % 96 + 4


def loss_of(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Returns the mean loss of the next tokens, in nats."""
    logits = model(tokens[:, :-1])[0]
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
