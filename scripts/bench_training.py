#!/usr/bin/env python3
"""Updates per second of training, against the same model written plainly.

Both forms train on the same batch in one process, update by update in turn: `Trainer.train_step`
of this project, and `plain_form.py`, which computes what the original computes as the original
does. Medians; the last line is JSON.

    scripts/bench_training.py --lengths 128,512,2048
    scripts/bench_training.py --only peak       # fraction of the speed of matrix products
    scripts/bench_training.py --only gpt2       # against GPT-2 of torch's own modules
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench_tools import (
    build_trainer,
    first_batch,
    model_flags,
    ratio,
    report,
    seconds_of,
    write_data,
)
from plain_form import PlainModel, PlainNAG
from torch import nn

from fairseq import utils

VOCABULARY = 6424
CUTOFFS = "1000,3000"
DROPOUTS = {
    "dropout": 0.3,
    "attention_dropout": 0.1,
    "activation_dropout": 0.1,
    "softmax_dropout": 0.2,
}
TOKENS = {128: 1024, 512: 2048}
"""Tokens in a batch by length, as in the original's timings; one row for longer ones."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", default="128,512,2048", help="tokens per row")
    parser.add_argument("--runs", type=int, default=7, help="updates of each form that count")
    parser.add_argument("--no-dropout", action="store_true", help="all dropouts 0")
    parser.add_argument("--no-baseline", action="store_true", help="measure this project alone")
    parser.add_argument("--rows", type=int, default=8, help="rows of a batch, with --only peak")
    parser.add_argument("--update-freq", type=int, default=1, help="batches, with --only peak")
    parser.add_argument("--flags", default="", help="further flags of the model")
    parser.add_argument("--only", choices=["plain", "peak", "gpt2"], default="plain")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        write_data(data, words=VOCABULARY, tokens=60_000)
        measure = {"plain": against_plain, "peak": against_peak, "gpt2": against_gpt2}
        report(f"training_{options.only}", list(measure[options.only](data, options)))


def against_plain(data: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures the shape of the original's timings: 4 layers of 256."""
    rows = []
    for length in map(int, options.lengths.split(",")):
        tokens = TOKENS.get(length, length)
        flags = [*model_flags(4, 256, CUTOFFS), *options.flags.split()]
        rates = {} if options.no_dropout else DROPOUTS
        flags += dropout_flags(rates)
        trainer = build_trainer(data, flags, length=length, tokens=tokens)
        batch = first_batch(trainer, length)
        forms: dict[str, Callable[[], object]] = {"ours": partial(trainer.train_step, [batch])}
        if not options.no_baseline:
            plain = PlainModel(trainer.get_model(), length, tokens // length, **rates)
            forms["plain"] = plain_update(plain, batch)
        seconds = seconds_of(forms, options.runs)
        row: dict[str, Any] = {"length": length, "tokens": tokens, "dropout": bool(rates)}
        row |= {f"{name} tok/s": tokens / s for name, s in seconds.items()}
        if "plain" in seconds:
            row["times as fast"] = ratio(seconds, "plain", "ours")
        rows.append(row)
    return rows


def dropout_flags(rates: dict[str, float]) -> list[str]:
    """Returns the flags of the four dropouts; those without a rate get 0."""
    names = {name: f"--{name.replace('_', '-')}" for name in DROPOUTS}
    names["softmax_dropout"] = "--adaptive-softmax-dropout"
    return [f"{flag}={rates.get(name, 0.0)}" for name, flag in names.items()]


def plain_update(plain: PlainModel, batch: dict[str, Any]) -> Callable[[], object]:
    """Returns what does one update of the plain form on a batch."""
    optimizer = PlainNAG(list(plain.weights.values()), lr=0.01, momentum=0.99, clip_norm=0.1)
    plain.training = True

    def update() -> None:
        loss = plain.loss(batch["net_input"]["src_tokens"], batch["target"], pad=1)
        loss.backward()
        optimizer.step(batch["ntokens"])
        loss.item()

    return update


def against_peak(data: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures the useful floating-point operations per second at widths 512 and 1024."""
    utils.keep_freed_memory()  # as fairseq-train does; above it would help the plain form too
    rows = []
    length = 512
    for width in (512, 1024):
        flags = [*model_flags(4, width, CUTOFFS), *options.flags.split()]
        flags += dropout_flags({} if options.no_dropout else DROPOUTS)
        trainer = build_trainer(data, flags, length=length, tokens=options.rows * length)
        batch = first_batch(trainer, length)
        batches = [batch] * options.update_freq
        forms = {"ours": partial(trainer.train_step, batches), "products": products}
        medians = seconds_of(forms, options.runs)
        seconds, peak = medians["ours"], PRODUCT_FLOPS / medians["products"]
        flops = len(batches) * useful_flops(trainer.get_model().decoder, batch)
        rows.append({"width": width, "dropout": not options.no_dropout, "rows": options.rows})
        rows[-1] |= {"batches": options.update_freq}
        rows[-1] |= {"peak GFLOP/s": peak / 1e9, "ours GFLOP/s": flops / seconds / 1e9}
        rows[-1]["of peak"] = flops / seconds / peak
    return rows


PRODUCT_FLOPS = 20 * 2 * 1024**3


def products() -> None:
    """Computes 20 products of matrices of 1024 x 1024."""
    a, b, out = (torch.ones(1024, 1024) for _ in range(3))
    for _ in range(20):
        torch.mm(a, b, out=out)


def useful_flops(decoder: Any, batch: dict[str, Any]) -> float:
    """Returns the operations of one update: 6 for each weight and token that meet in a product.

    Attention counts the keys that a causal model sees; tails count the targets that are in them.
    """
    target = batch["target"]
    num_tokens, length = target.numel(), target.size(1)
    width = decoder.layers[0].embed_dim
    flops = 0.0
    for layer in decoder.layers:
        weights = sum(p.numel() for p in layer.parameters() if p.dim() == 2)
        flops += 6 * num_tokens * (weights + 2 * width * (length + 1) / 2)
    softmax = decoder.adaptive_softmax
    flops += 6 * num_tokens * width * (softmax.cutoff[0] + softmax.num_tails)
    starts = [0, *softmax.cutoff[:-1]]
    source = batch["net_input"]["src_tokens"]
    for band, (start, end) in enumerate(zip(starts, softmax.cutoff, strict=True)):
        table, projection = decoder.embed_tokens.weights_for_band(band)
        inputs = int(((source >= start) & (source < end)).sum())
        outputs = int(((target >= start) & (target < end)).sum()) if band else 0
        flops += 6 * (inputs + outputs) * projection.numel() + 6 * outputs * table.numel()
    return flops


def against_gpt2(data: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures a GPT-2 of torch's modules, and this project with the same sizes and AdamW."""
    rows = []
    for length in map(int, options.lengths.split(",")):
        tokens = TOKENS.get(length, length)
        dropout = 0.0 if options.no_dropout else 0.1
        flags = (
            "--arch transformer_lm_gpt --decoder-layers 4 --decoder-embed-dim 256 "
            "--decoder-ffn-embed-dim 1024 --decoder-attention-heads 8 "
            f"--dropout {dropout} --attention-dropout {dropout} {options.flags}"
        )
        recipe = (
            "--optimizer adam --lr 0.0003 --weight-decay 0.1 --clip-norm 1.0 "
            "--criterion cross_entropy --lr-scheduler fixed"
        )
        trainer = build_trainer(data, flags.split(), length=length, tokens=tokens, recipe=recipe)
        batch = first_batch(trainer, length)
        gpt2 = GPT2(VOCABULARY, length, layers=4, width=256, heads=8, dropout=dropout)
        optimizer = torch.optim.AdamW(gpt2.parameters(), lr=3e-4, weight_decay=0.1)
        forms: dict[str, Callable[[], object]] = {
            "ours": partial(trainer.train_step, [batch]),
            "gpt2": gpt2_update(gpt2, optimizer, batch),
        }
        seconds = seconds_of(forms, options.runs)
        rows.append({"length": length, "tokens": tokens, "dropout": dropout})
        rows[-1] |= {f"{name} tok/s": tokens / s for name, s in seconds.items()}
        rows[-1]["times as fast"] = ratio(seconds, "gpt2", "ours")
    return rows


class GPT2(nn.Module):
    """GPT-2 of torch's modules: learned positions, fused causal attention, one table of words.

    Args:
        words: size of the vocabulary.
        length: most positions.
        layers: number of layers.
        width: of the model.
        heads: of the attention.
        dropout: probability of every dropout.
    """

    def __init__(
        self, words: int, length: int, *, layers: int, width: int, heads: int, dropout: float
    ) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(length, width)
        self.drop = nn.Dropout(dropout)
        self.layers = nn.ModuleList(GPT2Layer(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.drop(self.words(tokens) + self.places.weight[: tokens.size(1)])
        for layer in self.layers:
            x = layer(x)
        return F.linear(self.norm(x), self.words.weight)


class GPT2Layer(nn.Module):
    """Causal self-attention and a feed-forward net, layer norm before each."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(rows, length, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        rate = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=rate, is_causal=True)
        x = x + self.drop(self.out(y.transpose(1, 2).reshape(rows, length, width)))
        return x + self.drop(self.down(F.gelu(self.up(self.norm2(x)))))


def gpt2_update(
    model: GPT2, optimizer: torch.optim.Optimizer, batch: dict[str, Any]
) -> Callable[[], object]:
    """Returns what does one update of GPT-2 on a batch."""

    def update() -> None:
        optimizer.zero_grad()
        logits = model(batch["net_input"]["src_tokens"])
        loss = F.cross_entropy(logits.flatten(0, 1), batch["target"].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss.item()

    return update


if __name__ == "__main__":
    main()
