"""Scores of words that processes share out, and losses from them without putting them together.

Where an output layer is cut by words, each process scores its own words. The log-probability of a
target needs of the others one number for each token: the logarithm of a sum. So nothing of the size
of tokens times words is sent, and no process holds the scores of all words (Shoeybi et al. 2019,
Megatron-LM, arXiv:1909.08053, section 3).

Whoever can use scores in parts says so with `scores_in_parts()`; everybody else gets whole ones.
Shapes: `N` tokens, `V` words, `V_own` of them this process's, `M` columns that every process has.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["ScoresInParts", "are_parts_wanted", "scores_in_parts"]

_MOST_SCORES = 1 << 22
"""Scores that are looked at together, so that temporaries stay small."""

_wanted = contextvars.ContextVar("scores_in_parts", default=False)


@contextlib.contextmanager
def scores_in_parts() -> Iterator[None]:
    """Within it, output layers that are cut by words return `ScoresInParts`."""
    token = _wanted.set(True)
    try:
        yield
    finally:
        _wanted.reset(token)


def are_parts_wanted() -> bool:
    """Tells whether the caller is within `scores_in_parts()`."""
    return _wanted.get()


class ScoresInParts(NamedTuple):
    """What one process has of the scores (..., V). A tuple, so that hooks find the tensors.

    Attributes:
        own: scores of its words, (..., V_own); as many rows on every process.
        group: the processes.
        first: id of its first word.
        num_cut: words that are shared out.
        shared: scores behind these, (..., M), alike on every process; None if there are none.
    """

    own: torch.Tensor
    group: ProcessGroup
    first: int
    num_cut: int
    shared: torch.Tensor | None = None

    @property
    def num_words(self) -> int:
        """V, of all processes."""
        return self.num_cut + (0 if self.shared is None else self.shared.size(-1))

    def with_shared(self, shared: torch.Tensor) -> ScoresInParts:
        """Returns these scores with columns behind them that every process has."""
        return self._replace(shared=shared)

    def of_columns(self, which: torch.Tensor) -> ScoresInParts:
        """Returns the scores (B, n, V) of some columns of (B, T, V)."""
        shared = None if self.shared is None else self.shared[:, which]
        return self._replace(own=self.own[:, which], shared=shared)

    def log_probs(self, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns log softmax at the targets, and summed over all words.

        Args:
            target: N ids in any shape, each in [0, V).

        Returns:
            Two of (N,) in nats, computed in float32 or better; alike on every process.
        """
        shared = None if self.shared is None else _flat(self.shared)
        found: tuple[torch.Tensor, torch.Tensor] = _LogProbs.apply(
            _flat(self.own), shared, target.reshape(-1), self
        )
        return found

    @torch.no_grad()
    def best(self) -> torch.Tensor:
        """Returns the word with the largest score, int64 (N,); the first of equals."""
        own = _flat(self.own)
        value = own.new_full((len(own),), -torch.inf)
        word = torch.full_like(value, self.num_words, dtype=torch.int64)
        if own.size(1):
            value, word = own.max(dim=1)
            word = word + self.first
        largest = value.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        word = word.where(value == largest, self.num_words)
        dist.all_reduce(word, dist.ReduceOp.MIN, group=self.group)
        if self.shared is not None:
            value, behind = _flat(self.shared).max(dim=1)
            word = word.where(value <= largest, behind + self.num_cut)
        return word


def _flat(scores: torch.Tensor) -> torch.Tensor:
    return scores.flatten(0, -2)


class _LogProbs(torch.autograd.Function):
    """See `ScoresInParts.log_probs`; the backward pass sends nothing."""

    @staticmethod
    def forward(
        ctx: Any,
        own: torch.Tensor,
        shared: torch.Tensor | None,
        target: torch.Tensor,
        scores: ScoresInParts,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        log_sum, total = _log_sum_and_total(own)
        largest = log_sum.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=scores.group)
        at_target = _pick(own, target - scores.first, log_sum.dtype)
        sums = torch.stack([(log_sum - largest).exp(), at_target, total])
        dist.all_reduce(sums, group=scores.group)
        log_sum, at_target, total = largest + sums[0].log(), sums[1], sums[2]
        if shared is not None:
            log_sum_shared, total_shared = _log_sum_and_total(shared)
            log_sum = torch.logaddexp(log_sum, log_sum_shared)
            at_target = at_target + _pick(shared, target - scores.num_cut, log_sum.dtype)
            total = total + total_shared
        ctx.save_for_backward(own, shared, target, log_sum)
        ctx.starts, ctx.num_words = (scores.first, scores.num_cut), scores.num_words
        return at_target - log_sum, total - scores.num_words * log_sum

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, of_target: torch.Tensor, of_total: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        own, shared, target, log_sum = ctx.saved_tensors
        grads = [
            None
            if part is None
            else _gradient(part, target - start, log_sum, of_target, of_total, ctx.num_words)
            for part, start in zip((own, shared), ctx.starts, strict=True)
        ]
        return grads[0], grads[1], None, None


def _computed_in(scores: torch.Tensor) -> torch.dtype:
    return torch.promote_types(scores.dtype, torch.float32)


def _rows_at_once(scores: torch.Tensor) -> int:
    return max(1, _MOST_SCORES // max(1, scores.size(1)))


def _log_sum_and_total(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the logarithm of the sum of exponentials, and the sum, of scores (N, n) each."""
    dtype = _computed_in(scores)
    parts = [part.to(dtype) for part in scores.split(_rows_at_once(scores))]
    log_sum = torch.cat([part.logsumexp(dim=1) for part in parts])
    return log_sum, torch.cat([part.sum(dim=1) for part in parts])


def _is_in(scores: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    return (column >= 0) & (column < scores.size(1))


def _pick(scores: torch.Tensor, column: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns the score in a column of each row (N,), 0 where the column is elsewhere."""
    if scores.size(1) == 0:
        return scores.new_zeros(len(scores), dtype=dtype)
    is_in = _is_in(scores, column)
    found = scores.gather(1, column.where(is_in, 0).unsqueeze(1)).squeeze(1)
    return found.to(dtype) * is_in


def _gradient(
    scores: torch.Tensor,
    column: torch.Tensor,
    log_sum: torch.Tensor,
    of_target: torch.Tensor,
    of_total: torch.Tensor,
    num_words: int,
) -> torch.Tensor:
    """Returns the gradient (N, n): that of the targets is one-hot minus p, of the sum 1 - V p."""
    grad = torch.empty_like(scores)
    if scores.size(1) == 0:
        return grad
    is_in = _is_in(scores, column)
    at = column.where(is_in, 0).unsqueeze(1)
    weight = -(of_target + num_words * of_total)
    size = _rows_at_once(scores)
    for start in range(0, len(scores), size):
        rows = slice(start, start + size)
        p = (scores[rows].to(log_sum.dtype) - log_sum[rows, None]).exp_()
        p.mul_(weight[rows, None]).add_(of_total[rows, None])
        p.scatter_add_(1, at[rows], (of_target * is_in)[rows, None])
        grad[rows] = p
    return grad
