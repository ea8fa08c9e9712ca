"""What hypotheses begin with, laid out so that it is read in one pass.

Shapes: `B` sentences, `P` columns of the prompts, `F` columns of forced tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

__all__ = ["Prompt"]


@dataclass
class Prompt:
    """The first tokens of hypotheses; prompts of unequal length end in the same column.

    Attributes:
        tokens: the start symbol and the tokens after it, padded on the left, int64 (B, P).
        skipped: columns of padding before each start symbol.
        forced: token that has to come in each column after the start symbol's; padding where any
            may. int64 (B, F); None if there are none beyond those read.
    """

    tokens: torch.Tensor
    skipped: list[int]
    forced: torch.Tensor | None = None

    @classmethod
    def of(
        cls,
        prefix: torch.Tensor,
        start: int,
        most: Sequence[int],
        *,
        pad: int,
        eos: int,
        is_aligned: bool,
    ) -> Prompt:
        """Divides prefixes into what is read at once and what comes after.

        Args:
            prefix: ids, int64 (B, any), padded on either side.
            start: the start symbol.
            most: tokens of each prefix that count.
            pad: id of padding; a row is free from where it is.
            eos: id of the end of sentence, which is never read.
            is_aligned: let shorter prompts begin later; otherwise all are cut to the shortest.
        """
        rows = [
            _until(_from_first_token(row, pad), pad)[:count]
            for row, count in zip(prefix.tolist(), most, strict=True)
        ]
        counts = [len(_until(row, eos)) for row in rows]
        if not is_aligned:
            counts = [min(counts)] * len(rows)
        skipped = [max(counts) - count for count in counts]
        read = [
            [pad] * skip + [start] + row[:count]
            for row, skip, count in zip(rows, skipped, counts, strict=True)
        ]
        found = cls(torch.tensor(read, device=prefix.device), skipped)
        if any(len(row) > count for row, count in zip(rows, counts, strict=True)):
            later = [[pad] * skip + row for row, skip in zip(rows, skipped, strict=True)]
            width = max(map(len, later))
            found.forced = torch.tensor(
                [row + [pad] * (width - len(row)) for row in later], device=prefix.device
            )
        return found


def _from_first_token(row: list[int], pad: int) -> list[int]:
    start = next((i for i, token in enumerate(row) if token != pad), len(row))
    return row[start:]


def _until(row: list[int], token: int) -> list[int]:
    return row[: row.index(token)] if token in row else row
