"""How far back each head has to look, with a bound on what is lost.

Let U_i be the largest score that query i could have, |q_i| max|k| * scale, and L_i a lower bound of
the logarithm of the sum of its weights before they are normalised. A term that falls by m a step
leaves to all keys further than w steps at most

    sum over d > w of exp(U_i - m d - L_i) = exp(U_i - L_i - m (w + 1)) / (1 - exp(-m)) = eps

of the weight, so that leaving them out moves the output by at most 2 eps max|v|. Two lower bounds
are at hand, and the better of them counts:

* a query sees its own key: L_i is the score of the two;
* of n = 4 g keys just before it, at a mean distance below 3 g, by Jensen's inequality:
  L_i = log(n) - 3 g m + (score of the mean of these keys). With g = 1 / (3 m) this is about
  log(1 / m) - 0.7, for gentle slopes much more than the first.

Gradients: with weights off by 2 eps in sum, those of queries, keys and values are off by no more
than 6 eps of the largest that there could be, scale max|q or k| max|v| max|gradient of the output|.
Shapes: `B` rows, `H` heads, `T` queries, `S` keys, `K` head width, `C` chunks of keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fairseq.attention.bias import AttentionBias, Slopes

__all__ = [
    "TOLERANCE",
    "Scores",
    "Windows",
    "find_windows",
    "measure_scores",
    "measure_windows",
]

TOLERANCE = 1e-6
"""How far leaving out keys may move an output, at most."""

_MANY_KEYS = 4096
"""With as many keys the better bound is worth what it costs: it shortens windows by a sixth."""
_LONG_WINDOW = 512
"""Shorter ones are as good as they are."""

_CHUNK = 512


@dataclass(frozen=True)
class Scores:
    """How large the scores of a call can be.

    Attributes:
        highest: U, a bound of each query's scores, (B, H, T).
        gaps: U less the score of a query and its own key, (B, H, T).
        largest_value: max|v| of an element, (H,).
    """

    highest: torch.Tensor
    gaps: torch.Tensor
    largest_value: torch.Tensor

    @property
    def largest(self) -> torch.Tensor:
        """R, which no score of a head exceeds in size: max|q| max|k| * scale, (H,)."""
        return self.highest.amax((0, 2))


@dataclass(frozen=True)
class Windows:
    """How many steps each head looks to either side, and what that may cost.

    Attributes:
        left: steps back that are seen, int64 (H,); the number of keys where none may be left out.
        right: steps ahead.
        error: bound of the change of an output element if exactly these are seen, (H,).
        scores: what they were found from.
    """

    left: torch.Tensor
    right: torch.Tensor
    error: torch.Tensor
    scores: Scores


def measure_windows(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: AttentionBias,
    *,
    tolerance: float = TOLERANCE,
    scale: float | None = None,
) -> Windows:
    """Finds the windows of causal attention whose last query stands at the last key.

    For diagnosis; the backend `windowed` finds its own.

    Args:
        q: queries, (B, H, T, K).
        k: keys, (B, H, S, K) with S >= T.
        v: values, (B, H, S, K).
        bias: what is added to the scores.
        tolerance: how far an element of the output may move, at most.
        scale: factor of the scores; None is 1 / sqrt(K).

    Raises:
        ValueError: the bias does not say how it falls, or there are more queries than keys.
    """
    slopes = bias.decay()
    if slopes is None:
        raise ValueError(
            f"{type(bias).__name__} does not say how steeply it falls with distance, so no window "
            "can be proved; LinearBias does"
        )
    shift = k.size(2) - q.size(2)
    if shift < 0:
        raise ValueError(f"{q.size(2)} queries for {k.size(2)} keys; each needs a key of its own")
    seen = Slopes(slopes.left, torch.full_like(slopes.right, torch.inf))
    scale = q.size(-1) ** -0.5 if scale is None else scale
    scores = measure_scores(q, k, v, shift, scale)
    return find_windows(q, k, scores, seen, shift, scale, tolerance=tolerance, may_average=True)


@torch.no_grad()
def measure_scores(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shift: int, scale: float
) -> Scores:
    """Bounds the scores; every query must have a key at its own position.

    Args:
        q: queries, (B, H, T, K).
        k: keys, (B, H, S, K).
        v: values, (B, H, S, K).
        shift: position of query 0 among the keys.
        scale: factor of the scores.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    rows, heads, num_queries, _ = q.shape
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, T, H, K), which is how they often lie
    size, own = q.new_empty(2, rows, num_queries, heads, dtype=dtype)
    key_size, value = q.new_zeros(2, heads, dtype=dtype)
    for start in range(0, num_queries, _CHUNK):  # so that no large tensor comes and goes
        mine = q[:, start : start + _CHUNK]
        theirs = k[:, shift + start : shift + start + mine.size(1)]
        size[:, start : start + _CHUNK] = torch.linalg.vector_norm(mine, dim=-1, dtype=dtype)
        own[:, start : start + _CHUNK] = (mine.to(dtype) * theirs).sum(-1)
    for start in range(0, k.size(1), _CHUNK):
        norms = torch.linalg.vector_norm(k[:, start : start + _CHUNK], dim=-1, dtype=dtype)
        key_size = torch.maximum(key_size, norms.amax((0, 1)))
        values = v[:, start : start + _CHUNK]
        value = torch.maximum(
            value, torch.maximum(values.amax((0, 1)), -values.amin((0, 1))).amax(-1)
        )
    highest = size.mul_(key_size * abs(scale)).transpose(1, 2)
    return Scores(highest, highest - own.mul_(scale).transpose(1, 2), value)


@torch.no_grad()
def find_windows(
    q: torch.Tensor,
    k: torch.Tensor,
    scores: Scores,
    slopes: Slopes,
    shift: int,
    scale: float,
    *,
    tolerance: float = TOLERANCE,
    may_average: bool,
) -> Windows:
    """Finds how far each head has to look; every query must see a key at its own position.

    Args:
        q: queries, (B, H, T, K).
        k: keys, (B, H, S, K).
        scores: of these.
        slopes: how a term falls; infinite on a side that is not seen.
        shift: position of query 0 among the keys.
        scale: factor of the scores.
        tolerance: how far an element of the output may move, at most.
        may_average: whether queries see all keys before them and none after, so that the second
            bound holds.
    """
    most = shift + q.size(2) + k.size(2)
    found = []
    for head, (gap, value, left, right) in enumerate(
        zip(
            scores.gaps.amax((0, 2)).tolist(),
            scores.largest_value.tolist(),
            slopes.left.tolist(),
            slopes.right.tolist(),
            strict=True,
        )
    ):
        num_sides = max(1, math.isfinite(left) + math.isfinite(right))
        budget = tolerance / (2 * max(value, 1e-30) * num_sides)  # eps of a side
        is_worth_it = may_average and k.size(2) >= _MANY_KEYS
        if is_worth_it and _LONG_WINDOW < _steps(gap, left, budget) < math.inf:
            gap = min(gap, float(_gap_of_averages(q, k, scores, head, shift, left, scale)))
        pairs = [(slope, _steps(gap, slope, budget)) for slope in (left, right)]
        lost = sum(_tail(gap, slope, steps) for slope, steps in pairs)
        found.append((*(min(steps, most) for _, steps in pairs), 2 * value * lost))
    left, right, error = zip(*found, strict=True)
    return Windows(torch.tensor(left), torch.tensor(right), torch.tensor(error), scores)


def _steps(gap: float, slope: float, budget: float) -> float:
    """Returns the fewest steps beyond which less than the budget lies."""
    if not 0 < slope < math.inf:
        return 0 if slope > 0 else math.inf
    needed = (gap - math.log(budget) - math.log(-math.expm1(-slope))) / slope
    return max(0, math.ceil(needed) - 1) if needed < math.inf else math.inf


def _tail(gap: float, slope: float, steps: float) -> float:
    """Returns the largest share of weight beyond so many steps."""
    if not 0 < slope < math.inf:
        return 0.0
    exponent = min(gap - slope * (steps + 1), 700.0)
    return math.exp(exponent) / -math.expm1(-slope)


def _gap_of_averages(
    q: torch.Tensor,
    k: torch.Tensor,
    scores: Scores,
    head: int,
    shift: int,
    slope: float,
    scale: float,
) -> torch.Tensor:
    """Returns the gap of one head with the better of both lower bounds, query by query.

    Queries with fewer than n keys before them are left out: no window is as short as that.
    """
    size = max(1, round(1 / (3 * slope)))  # g
    num_chunks = k.size(2) // size
    first = max(0, 4 * size - shift)  # the first query with four chunks before its own
    gaps = scores.gaps[:, head]
    if num_chunks < 4 or first >= q.size(2):
        return gaps.amax()
    chunks = k[:, head, : num_chunks * size].unflatten(1, (num_chunks, size))
    means = chunks.mean(2, dtype=gaps.dtype)  # (B, C, K)
    near = (means[:, :-3] + means[:, 1:-2] + means[:, 2:-1] + means[:, 3:]) / 4
    places = torch.arange(first + shift, shift + q.size(2), device=q.device)
    near = near.index_select(1, places.div_(size, rounding_mode="floor") - 4)  # (B, T - first, K)
    average = (q[:, head, first:] * near).sum(-1) * scale
    bonus = math.log(4 * size) - 3 * size * slope
    better = scores.highest[:, head, first:] - average - bonus
    return torch.minimum(gaps[:, first:], better).amax()
