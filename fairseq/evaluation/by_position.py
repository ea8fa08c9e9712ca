"""Loss against the position in the window.

Position n is that of a token predicted from the n tokens before it in its window. The first
positions of a window have little to go by: the early token curse.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fairseq.sequence_scorer import Scores

__all__ = ["LossByPosition", "PositionBin"]

# Where bins end: 1, 2, ... one by one, then four to an octave, so that windows of 2 ** n tokens end
# with a whole bin. They do not depend on the length of the window.
_ENDS = np.unique(np.round(2 ** (np.arange(160) / 4)).astype(np.int64))


@dataclass(frozen=True)
class PositionBin:
    """Mean loss over the positions `first` to `last`.

    Attributes:
        tokens: how many were scored.
        position: mean position of these.
        bits: their mean loss.
        std_error: standard error of that mean in bits, as of independent tokens; None for one.
    """

    first: int
    last: int
    tokens: int
    position: float
    bits: float
    std_error: float | None


class LossByPosition:
    """Sums losses by the position in the window, in bins even on a logarithmic axis.

    Args:
        unscored: id of a target that is left out, as `<s>` at the start of rows is of the mean.
    """

    def __init__(self, unscored: int | None = None) -> None:
        self._unscored = unscored
        # For each bin: tokens, sum of positions, of losses in nats, of squared losses.
        self._sums = np.zeros((4, 0))

    def add(self, sample: Mapping[str, Any], scores: Scores) -> None:
        """Adds a batch. Tokens of probability 0 are left out, as they are of the mean loss."""
        is_scored = scores.is_scored.cpu()
        positions = is_scored.nonzero()[:, 1].numpy() + 1
        losses = -scores.values.cpu().numpy().astype(np.float64)
        is_counted = np.isfinite(losses)
        if self._unscored is not None:
            is_counted &= sample["target"].cpu()[is_scored].numpy() != self._unscored
        self.add_losses(positions[is_counted], losses[is_counted])

    def add_losses(self, positions: np.ndarray, losses: np.ndarray) -> None:
        """Adds losses in nats at positions from 1."""
        if not len(positions):
            return
        bins = np.searchsorted(_ENDS, positions)
        size = max(int(bins.max()) + 1, self._sums.shape[1])
        added = [np.bincount(bins, w, size) for w in (None, positions, losses, losses**2)]
        self._sums = np.pad(self._sums, ((0, 0), (0, size - self._sums.shape[1]))) + added

    def bins(self, window: int) -> Iterator[PositionBin]:
        """Yields the bins that hold tokens.

        Args:
            window: length of the window, where the last bin ends.
        """
        for index, (count, places, total, squares) in enumerate(self._sums.T):
            if count == 0:
                continue
            mean = total / count
            std_error = None
            if count > 1:
                variance = max(squares - count * mean**2, 0.0) / (count - 1)
                std_error = math.sqrt(variance / count) / math.log(2)
            first = int(_ENDS[index - 1]) + 1 if index else 1
            last = min(int(_ENDS[index]), window)
            bits = mean / math.log(2)
            yield PositionBin(first, last, int(count), places / count, bits, std_error)

    @property
    def mean_bits(self) -> float:
        """Mean loss over all tokens."""
        return float(self._sums[2].sum() / self._sums[0].sum() / math.log(2))

    def to_lists(self) -> list[list[float]]:
        """Returns the sums as lists, for JSON."""
        sums: list[list[float]] = self._sums.tolist()
        return sums

    @classmethod
    def from_lists(cls, *sums: Sequence[Sequence[float]]) -> LossByPosition:
        """Makes one of what `to_lists` returned; several are added up."""
        total = cls()
        size = max((len(lists[0]) for lists in sums), default=0)
        total._sums = np.zeros((4, size))
        for lists in sums:
            total._sums[:, : len(lists[0])] += np.asarray(lists)
        return total
