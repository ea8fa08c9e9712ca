"""Small encoder-decoder models for tests, a small language pair, commands run in this process."""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path
from typing import Any

import torch

from fairseq.models import build_model
from fairseq.registry import ARCHITECTURES

SIZE = {
    f"{side}_{name}": value
    for side in ("encoder", "decoder")
    for name, value in (
        ("layers", 2),
        ("embed_dim", 32),
        ("ffn_embed_dim", 48),
        ("attention_heads", 4),
    )
}


class Words:
    """As much of a dictionary as a model needs."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Words) and other.size == self.size

    __hash__ = None  # type: ignore[assignment]

    def unk(self) -> int:
        return 3

    def pad(self) -> int:
        return 1

    def eos(self) -> int:
        return 2


def settings(arch: str = "transformer", **given: Any) -> argparse.Namespace:
    """Returns what the command line makes of an arch and explicit options."""
    args = argparse.Namespace(arch=arch, **given)
    ARCHITECTURES.preset_of(arch)(args)
    return args


def tiny_transformer(sizes: tuple[int, int] = (40, 50), **given: Any) -> Any:
    """Returns a model of 2 + 2 layers with weights that are not those of a start.

    Args:
        sizes: words of source and target.
        **given: settings.
    """
    torch.manual_seed(0)
    task = argparse.Namespace(source_dictionary=Words(sizes[0]), target_dictionary=Words(sizes[1]))
    limits = {"max_source_positions": 64, "max_target_positions": 64}
    model = build_model(settings(**{**SIZE, **limits, **given}), task)
    generator = torch.Generator().manual_seed(1)
    for param in model.parameters():
        param.data += 0.1 * torch.randn(param.shape, generator=generator)
    return model.eval()


def tokens_of(*shape: int, seed: int = 0, size: int = 40) -> torch.Tensor:
    """Returns random ids without special ones."""
    return torch.randint(4, size, shape, generator=torch.Generator().manual_seed(seed))


def write_pairs(
    folder: Path,
    counts: dict[str, int],
    lengths: dict[str, tuple[int, int]],
    *,
    words: int = 12,
    is_reversed: bool = False,
) -> None:
    """Writes `<split>.src` and `<split>.tgt`: random sentences, and their words mapped one by one.

    Args:
        folder: where.
        counts: sentences of each split.
        lengths: fewest and most words of a sentence of each split.
        words: size of the vocabulary.
        is_reversed: the last word comes first in the target.
    """
    draw = random.Random(0)
    folder.mkdir(exist_ok=True)
    for split, count in counts.items():
        lines = [
            [draw.randrange(words) for _ in range(draw.randint(*lengths[split]))]
            for _ in range(count)
        ]
        sources = [" ".join(f"s{n}" for n in line) for line in lines]
        targets = [
            " ".join(f"t{n}" for n in (reversed(line) if is_reversed else line)) for line in lines
        ]
        (folder / f"{split}.src").write_text("".join(f"{line}\n" for line in sources))
        (folder / f"{split}.tgt").write_text("".join(f"{line}\n" for line in targets))


def run_command(monkeypatch: Any, module: Any, *arguments: object) -> int:
    """Runs a command with the given words as its command line; returns its exit code."""
    words = [str(word) for argument in arguments for word in str(argument).split()]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["fairseq", *words])
        try:
            module.cli_main()
        except SystemExit as leaving:
            return int(leaving.code or 0)
    return 0
