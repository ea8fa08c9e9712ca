"""Which backend `auto` takes over a grid of calls on a CPU, against all that it might have taken.

Used by `bench_attention.py --auto`. Shapes: `B` rows, `H` heads, `T` tokens, `K` head width.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch

from fairseq.attention import LinearBias, attend, get_backend
from fairseq.positions import alibi_slopes

__all__ = ["measure_grid"]

SHAPES = [(4, 128), (8, 64), (16, 16)]
"""Heads and their width."""
ROWS = [1, 8]
VARIANTS = ["plain", "dropout", "padding", "documents"]
MOST_SCORES = 1 << 26
"""Cells with more scores than this are left out: `reference` would take gigabytes."""


@dataclass(frozen=True)
class Cell:
    """One kind of call."""

    length: int
    rows: int
    heads: int
    width: int
    has_gradients: bool
    variant: str

    @property
    def num_scores(self) -> int:
        """Returns B * H * T * T."""
        return self.rows * self.heads * self.length**2


def measure_grid(lengths: list[int], runs: int) -> list[dict[str, Any]]:
    """Measures all cells of some lengths; prints them, and then those in which `auto` loses."""
    cells = [
        Cell(length, rows, heads, width, has_gradients, variant)
        for length, rows, (heads, width), variant, has_gradients in itertools.product(
            lengths, ROWS, SHAPES, VARIANTS, [False, True]
        )
    ]
    found = [measure(cell, runs) for cell in cells if cell.num_scores <= MOST_SCORES]
    slower = [each for each in found if each["of reference"] > 1.0]
    print(f"{len(found)} cells; slower than reference in {len(slower)}:")
    for each in sorted(slower, key=lambda each: -each["of reference"]):
        print("  ", each)
    missed = [each for each in found if each["of best"] > 1.1]
    print(f"another backend is faster by more than a tenth in {len(missed)}")
    return found


def measure(cell: Cell, runs: int) -> dict[str, Any]:
    """Returns milliseconds of the backends in one cell, and what `auto` chose."""
    options, dropout_p = options_of(cell)
    generator = torch.Generator().manual_seed(cell.length)
    shape = (cell.rows, cell.length, cell.heads, cell.width)
    q, k, v = (torch.randn(shape, generator=generator).transpose(1, 2) for _ in range(3))
    bound = q.norm(dim=-1).amax() * k.norm(dim=-1).amax() / math.sqrt(cell.width)
    factor = (7 / bound).sqrt()
    tensors = (q * factor, k * factor, v)
    given = torch.randn_like(v)
    names = ["reference", "triangular", "windowed"] + ["sdpa"] * (dropout_p == 0)
    with torch.set_grad_enabled(cell.has_gradients):
        prepared = {
            name: get_backend(name).prepare(
                LinearBias(alibi_slopes(cell.heads)),
                range(cell.length),
                range(cell.length),
                dropout_p=dropout_p,
                dtype=q.dtype,
                device=q.device,
                **options,
            )
            for name in ["auto", *names]
        }
        auto: Any = prepared.pop("auto")
        q, k, _ = (x.detach().requires_grad_(cell.has_gradients) for x in tensors)
        chosen = auto.backend.name_for(q, k, auto, dropout_p)
    times: dict[str, list[float]] = {name: [] for name in names}
    for run in range(runs + 1):
        for name in names:
            start = time.perf_counter()
            if cell.has_gradients:
                leaves = [x.detach().requires_grad_() for x in tensors]
                attend(*leaves, prepared[name], dropout_p=dropout_p).backward(given)
            else:
                with torch.no_grad():
                    attend(*tensors, prepared[name], dropout_p=dropout_p)
            if run > 0:
                times[name].append(time.perf_counter() - start)
    ms = {name: 1e3 * statistics.median(each) for name, each in times.items()}
    row = {
        **vars(cell),
        "chosen": chosen,
        "of reference": round(ms[chosen] / ms["reference"], 3),
        "of best": round(ms[chosen] / min(ms.values()), 3),
        "ms": {name: round(each, 3) for name, each in ms.items()},
    }
    print(row, flush=True)
    return row


def options_of(cell: Cell) -> tuple[dict[str, Any], float]:
    """Returns what `prepare` is given beside, and the rate of dropout."""
    if cell.variant == "padding":
        is_padding = torch.zeros(cell.rows, cell.length, dtype=torch.bool)
        is_padding[-1, -cell.length // 4 :] = True
        return {"key_is_padding": is_padding}, 0.0
    if cell.variant == "documents":
        documents = (torch.arange(cell.length) // max(1, cell.length // 3)).expand(cell.rows, -1)
        return {"query_documents": documents, "key_documents": documents}, 0.0
    return {}, 0.1 if cell.variant == "dropout" else 0.0
