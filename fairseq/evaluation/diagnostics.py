"""What each attention head of a model looks at, measured on text.

ALiBi's steep heads forget within a few tokens, and far weights round to exactly zero, so that a
head is blind beyond some distance ("When Attention Goes Blind", arXiv 2608.03994); other heads
collapse to the first token (arXiv 2603.09616). Both show in the figures made here.

Shapes: `B` rows, `H` heads, `N` queries of a block, `S` keys, `D` distances.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from fairseq import utils
from fairseq.attention.backends.base import AttentionBackend
from fairseq.attention.backends.recording import Observation, RecordingBackend
from fairseq.attention.bias import position_tensor

__all__ = ["Diagnosis", "HeadFigures", "HeadObserver", "diagnose", "use_backend"]

_HALF_TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class HeadFigures:
    """What was measured of one head, over all queries that see at least two keys.

    Attributes:
        layer: number of the layer, from 0.
        head: number of the head, from 0.
        slope: penalty per position, None unless the bias has slopes.
        mean_distance: mean distance to the keys, each counting by its weight, in tokens.
        span90: smallest distance within which 90 % of all weight lies, in tokens.
        entropy_bits: mean entropy of a query's weights.
        entropy_relative: the same as a share of the entropy of equal weights, 0 to 1.
        first_token_mass: mean weight of the first key that a query sees, 0 to 1.
        zero_float32: share of the visible keys whose weight is exactly 0 in float32.
        zero_float16: the same where scores and weights are rounded to float16.
        zero_bfloat16: the same where scores and weights are rounded to bfloat16.
        score_bound: R = max|q| max|k| / sqrt(K); no product of a query and a key is larger.
    """

    layer: int
    head: int
    slope: float | None
    mean_distance: float
    span90: int
    entropy_bits: float
    entropy_relative: float
    first_token_mass: float
    zero_float32: float
    zero_float16: float
    zero_bfloat16: float
    score_bound: float


@dataclass(frozen=True)
class Diagnosis:
    """Figures of every head, and of what was read.

    Attributes:
        heads: by layer, then by head.
        uniform: what a head would show that weighs all keys it sees equally.
        num_windows: rows of text.
        num_tokens: tokens read, without padding.
        longest_window: tokens of the longest row.
    """

    heads: list[HeadFigures]
    uniform: dict[str, float]
    num_windows: int
    num_tokens: int
    longest_window: int


@contextmanager
def use_backend(model: Any, backend: AttentionBackend) -> Iterator[Any]:
    """Lets a model compute attention by another backend for a while; gives its decoder.

    Raises:
        ValueError: the model has no decoder with attention backends.
    """
    decoder: Any = getattr(model, "decoder", None)
    if not isinstance(getattr(decoder, "backend", None), AttentionBackend):
        raise ValueError(
            f"{type(model).__name__} has no attention to look at; give a checkpoint of a "
            "transformer language model (--arch transformer_lm...)"
        )
    before = decoder.backend
    decoder.backend = backend
    try:
        yield decoder
    finally:
        decoder.backend = before


def diagnose(
    model: Any,
    batches: Iterable[dict[str, Any]],
    *,
    progress: Callable[[int], None] | None = None,
) -> Diagnosis:
    """Measures every head on batches of text.

    What is kept grows with layers, heads and the longest distance, not with the text.

    Args:
        model: a transformer language model, in evaluation mode and float32.
        batches: of a language modelling dataset.
        progress: called after each batch with the number of tokens so far.

    Raises:
        ValueError: the batches are empty, or the model is no transformer language model.
    """
    observer = HeadObserver()
    device = next(model.parameters()).device
    num_windows = num_tokens = longest = 0
    with use_backend(model, RecordingBackend(observer)) as decoder, torch.no_grad():
        for batch in batches:
            if "net_input" not in batch:
                continue
            on_device = utils.move_to_cuda(batch, device) if device.type != "cpu" else batch
            tokens = on_device["net_input"]["src_tokens"]
            decoder.extract_features(tokens)
            num_windows += tokens.size(0)
            num_tokens += int(tokens.ne(decoder.padding_idx).sum())
            longest = max(longest, tokens.size(1))
            if progress is not None:
                progress(num_tokens)
    return Diagnosis(observer.figures(), observer.uniform(), num_windows, num_tokens, longest)


class HeadObserver:
    """Adds up what a recording backend shows."""

    def __init__(self) -> None:
        self._layers: list[_LayerSums] = []
        self._uniform: _WeightSums | None = None
        self._slopes: list[float] | None = None

    def __call__(self, seen: Observation) -> None:
        is_visible = seen.scores[:, :1].isneginf().logical_not_()  # (B, 1, N, S)
        num_visible = is_visible.sum(-1, keepdim=True)  # (B, 1, N, 1)
        # A query that sees one key gives it all its weight, whatever the head is like.
        is_counted = num_visible > 1
        if seen.is_left_out is not None:
            is_counted = is_counted & ~seen.is_left_out
        queries = _Queries(is_visible, is_counted, num_visible, _distances(seen))
        num_heads = seen.q.size(1)
        if len(self._layers) == seen.layer:
            self._layers.append(_LayerSums(num_heads))
        self._layers[seen.layer].add(seen, queries)
        if seen.layer == 0:
            slopes = getattr(seen.bias, "slopes", None)
            self._slopes = None if slopes is None else slopes.detach().flatten().tolist()
            self._uniform = self._uniform or _WeightSums(1)
            self._uniform.add(is_visible.double() / num_visible, queries)

    def figures(self) -> list[HeadFigures]:
        """Returns the figures of all heads.

        Raises:
            ValueError: nothing was observed.
        """
        if self._uniform is None or self._uniform.num_queries == 0:
            raise ValueError(
                "no token was read that sees another; choose another --gen-subset, or a larger "
                "--tokens-per-sample"
            )
        return [
            HeadFigures(
                layer=layer,
                head=head,
                slope=self._slopes[head] if self._slopes else None,
                **sums.of_head(head),
            )
            for layer, sums in enumerate(self._layers)
            for head in range(sums.weights.num_heads)
        ]

    def uniform(self) -> dict[str, float]:
        """Returns the figures of a head that weighs all keys it sees equally."""
        assert self._uniform is not None
        return self._uniform.of_head(0)


@dataclass(frozen=True)
class _Queries:
    """What the heads of a layer have in common.

    Attributes:
        is_visible: bool (B, 1, N, S), keys that a query may see.
        is_counted: bool (B, 1, N, 1), queries that enter the figures.
        num_visible: (B, 1, N, 1).
        distance: int64 (B or 1, 1, N, S).
    """

    is_visible: torch.Tensor
    is_counted: torch.Tensor
    num_visible: torch.Tensor
    distance: torch.Tensor


def _distances(seen: Observation) -> torch.Tensor:
    query = position_tensor(seen.query_positions, seen.q.device).unsqueeze(-1)
    key = position_tensor(seen.key_positions, seen.q.device).unsqueeze(-2)
    distance = (query - key).abs_().long()  # (N, S) or (B, N, S)
    return distance.view(-1, 1, *distance.shape[-2:])


class _WeightSums:
    """Sums over the weights of some heads, in float64."""

    def __init__(self, num_heads: int) -> None:
        self.num_heads = num_heads
        self.num_queries = 0
        self._entropy = torch.zeros(num_heads, dtype=torch.float64)
        self._first = torch.zeros(num_heads, dtype=torch.float64)
        self._mass = torch.zeros(num_heads, 0, dtype=torch.float64)  # (H, D)
        self._most_entropy = 0.0

    def add(self, weights: torch.Tensor, queries: _Queries) -> None:
        """Adds weights (B, H, N, S)."""
        counted = queries.is_counted
        weights = torch.where(counted, weights, 0.0)
        self.num_queries += int(counted.sum())
        self._most_entropy += float(
            torch.where(counted, queries.num_visible, 1).double().log().sum()
        )
        self._entropy += _per_head(torch.special.entr(weights))
        first = queries.is_visible.int().argmax(-1, keepdim=True)  # (B, 1, N, 1)
        self._first += _per_head(weights.gather(-1, first.expand(-1, self.num_heads, -1, -1)))
        self._add_mass(weights, queries.distance)

    def _add_mass(self, weights: torch.Tensor, distance: torch.Tensor) -> None:
        longest = int(distance.max()) + 1
        if longest > self._mass.size(1):
            grown = torch.zeros(self.num_heads, longest, dtype=torch.float64)
            grown[:, : self._mass.size(1)] = self._mass
            self._mass = grown
        if distance.size(0) == 1:
            weights = weights.sum(0, keepdim=True)
        by_head = weights.transpose(0, 1).flatten(1).double()  # (H, B N S)
        mass = torch.zeros(self.num_heads, longest, dtype=torch.float64, device=weights.device)
        mass.index_add_(1, distance.flatten(), by_head)
        self._mass[:, :longest] += mass.cpu()

    def of_head(self, head: int) -> dict[str, float]:
        """Returns the figures that weights alone give."""
        mass = self._mass[head]
        cumulated = mass.cumsum(0)
        distances = torch.arange(len(mass), dtype=torch.float64)
        entropy = float(self._entropy[head])
        return {
            "mean_distance": float(mass @ distances / cumulated[-1]),
            "span90": int((cumulated < 0.9 * cumulated[-1]).sum()),
            "entropy_bits": entropy / math.log(2) / self.num_queries,
            "entropy_relative": entropy / self._most_entropy,
            "first_token_mass": float(self._first[head]) / self.num_queries,
        }


class _LayerSums:
    """Sums over the heads of a layer."""

    def __init__(self, num_heads: int) -> None:
        self.weights = _WeightSums(num_heads)
        self._zeros = {
            name: torch.zeros(num_heads, dtype=torch.float64) for name in ("float32", *_HALF_TYPES)
        }
        self._num_visible = 0
        self._longest_query = torch.zeros(num_heads, dtype=torch.float64)
        self._longest_key = torch.zeros(num_heads, dtype=torch.float64)
        self._scale = 1.0

    def add(self, seen: Observation, queries: _Queries) -> None:
        self.weights.add(seen.weights, queries)
        is_pair = queries.is_visible & queries.is_counted  # (B, 1, N, S)
        self._num_visible += int(is_pair.sum())
        self._zeros["float32"] += _per_head(seen.weights.eq(0) & is_pair)
        for name, dtype in _HALF_TYPES.items():
            rounded = torch.softmax(seen.scores.to(dtype), dim=-1)
            self._zeros[name] += _per_head(rounded.eq(0) & is_pair)
        self._scale = seen.scale
        is_padding = seen.key_is_padding
        key_norms = seen.k.float().norm(dim=-1)  # (B, H, S)
        if is_padding is not None:
            key_norms = key_norms.masked_fill(is_padding.unsqueeze(1), 0.0)
        query_norms = seen.q.float().norm(dim=-1)  # (B, H, N)
        if seen.is_left_out is not None:
            query_norms = query_norms.masked_fill(seen.is_left_out.squeeze(-1), 0.0)
        for longest, norms in (
            (self._longest_query, query_norms),
            (self._longest_key, key_norms),
        ):
            torch.maximum(longest, norms.amax((0, 2)).double().cpu(), out=longest)

    def of_head(self, head: int) -> dict[str, Any]:
        bound = float(self._longest_query[head] * self._longest_key[head]) * self._scale
        shares = {
            f"zero_{name}": float(count[head]) / self._num_visible
            for name, count in self._zeros.items()
        }
        return {**self.weights.of_head(head), **shares, "score_bound": bound}


def _per_head(values: torch.Tensor) -> torch.Tensor:
    """Sums (B, H, ...) over all but the heads, in float64, on the CPU."""
    return values.sum(-1, dtype=torch.float64).sum((0, 2)).cpu()
