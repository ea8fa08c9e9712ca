"""Which columns of a sequence each process of a group holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fairseq.attention import Positions

__all__ = ["LAYOUTS", "SequenceLayout"]

LAYOUTS = ("contiguous", "zigzag")


@dataclass(frozen=True)
class SequenceLayout:
    """A sequence cut into equal parts, one for each of `size` processes.

    * `contiguous`: process r holds part r of `size` parts. In causal attention the last process
      computes nearly twice the mean of all, because its queries see nearly every key.
    * `zigzag`: process r holds parts r and 2 size - 1 - r of 2 size parts, an early one and a late
      one, so that all processes see equally many keys.

    Attributes:
        size: number of processes, 1 or more.
        kind: one of `LAYOUTS`.

    Raises:
        ValueError: the kind is unknown, or the size is not positive.
    """

    size: int
    kind: str = "contiguous"

    def __post_init__(self) -> None:
        if self.kind not in LAYOUTS:
            raise ValueError(f"layout is {self.kind!r}; it must be one of {', '.join(LAYOUTS)}")
        if self.size < 1:
            raise ValueError(f"a sequence is to be cut into {self.size} parts; give 1 or more")

    @property
    def num_segments(self) -> int:
        """Runs of successive columns that a process holds."""
        return 1 if self.kind == "contiguous" else 2

    def padded(self, length: int) -> int:
        """Returns the next length that can be cut evenly."""
        unit = self.size * self.num_segments
        return -(-length // unit) * unit

    def segments(self, rank: int, length: int) -> list[range]:
        """Returns the runs of columns of a process, in the order in which it holds them.

        Raises:
            ValueError: the length cannot be cut evenly.
        """
        if length != self.padded(length):
            raise ValueError(
                f"a sequence of {length} columns cannot be cut for {self.size} processes "
                f"({self.kind}); pad it to {self.padded(length)}"
            )
        each = length // (self.size * self.num_segments)
        firsts = [rank] if self.kind == "contiguous" else [rank, 2 * self.size - 1 - rank]
        return [range(first * each, (first + 1) * each) for first in firsts]

    def columns(self, rank: int, length: int) -> Positions:
        """Returns the columns of a process: a range if they follow each other, else (T,)."""
        segments = self.segments(rank, length)
        return segments[0] if len(segments) == 1 else _joined(segments)

    def order(self, length: int) -> torch.Tensor:
        """Returns the columns of all processes, one process after the other, (size * T,)."""
        ranks = range(self.size)
        return _joined([each for rank in ranks for each in self.segments(rank, length)])


def _joined(segments: list[range]) -> torch.Tensor:
    return torch.cat([torch.arange(each.start, each.stop) for each in segments])
