"""Attention on CPUs in which steep heads look only as far as it matters.

Shapes: `B` rows, `H` heads, `T` queries, `S` keys, `K` head width, `D` distances.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from fairseq.attention.backends.base import AttentionBackend, Prepared
from fairseq.attention.backends.reference import ReferenceBackend
from fairseq.attention.backends.request import Request
from fairseq.attention.backends.sdpa import SdpaBackend
from fairseq.attention.bias import Slopes
from fairseq.attention.head_groups import group_heads
from fairseq.attention.mask import join
from fairseq.attention.random_bits import new_seed
from fairseq.attention.tiles import Distances, HeadGroup, TiledCall, tiled_attention
from fairseq.attention.windows import Scores, Windows, find_windows, measure_scores

__all__ = ["WindowedBackend", "WindowedPrepared"]

logger = logging.getLogger(__name__)

_SMALL_SCORES = 20.0
"""Up to here exponentials of scores need no reference: exp(20) * exp(-60) is a normal number."""
_LARGEST_GAP = 60.0
_PADDING = -3
"""Label of keys that are padding."""

_Terms = tuple[Distances, list[tuple[int, int]], bool]


@dataclass(kw_only=True)
class WindowedPrepared(Prepared):
    """Terms by distance, and how far they reach.

    Attributes:
        request: what was asked for.
        distances: terms of all distances between these queries and keys, and some around them.
        reach: for each head, the furthest key that the rule lets be seen, (back, ahead).
        slopes: how terms fall, infinite towards what is hidden; None where no window is known.
        query_labels: (B or 1, T), or None.
        key_labels: (B or 1, S), or None.
        is_tame: whether exponentials of terms are neither huge nor, for a query's own key, tiny,
            and no document hides that key from it.
        plain: the same for kernels with a dense mask, made when they are needed and kept if the
            bias is fixed. A layer that is computed again for its gradients has to make a learned
            one again too.
    """

    request: Request
    distances: Distances
    reach: list[tuple[int, int]]
    slopes: Slopes | None
    query_labels: torch.Tensor | None
    key_labels: torch.Tensor | None
    is_tame: bool
    plain: Prepared | None = None


class WindowedBackend(AttentionBackend):
    """Tiles of scores, with a window for each head that is found from the norms at hand.

    The windows are such that leaving out the other keys moves no output element by more than
    `TOLERANCE`; see `fairseq.attention.windows`. Heads without a known window are computed in full
    through the same tiles. Memory is linear in the length, also in training, and attention dropout
    costs little. Any bias and rule that depend on distance alone, learned ones too.
    """

    name = "windowed"

    def __init__(self) -> None:
        self._kept: tuple[tuple[object, ...], _Terms] | None = None
        self._has_warned = False

    def obstacle(self, request: Request) -> str | None:
        """Returns why this backend cannot serve a request; None if it can."""
        bias, rule = request.bias, request.rule
        if request.device.type != "cpu":
            return f"it is made for the CPU, and the model is on {request.device.type}"
        if not bias.is_relative or bias.is_per_row:
            return f"{type(bias).__name__} does not depend on distance alone"
        if not rule.is_relative or rule.is_per_row:
            return f"{type(rule).__name__} does not depend on distance alone"
        if request.shift is None:
            return "positions of queries and keys do not follow one another"
        if not request.sees_itself:
            return "some query has no key at its own position"
        return None

    def prepare_request(self, request: Request) -> WindowedPrepared:
        distances, reach, is_tame = self._distances(request)
        query_labels, key_labels = _labels(request)
        return WindowedPrepared(
            self,
            key_is_padding=request.key_is_padding,
            request=request,
            distances=distances,
            reach=reach,
            slopes=_slopes(request, reach),
            query_labels=query_labels,
            key_labels=key_labels,
            is_tame=is_tame and _own_keys_belong_to_queries(request),
        )

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        prepared: Prepared,
        *,
        dropout_p: float = 0.0,
        scale: float | None = None,
    ) -> torch.Tensor:
        assert isinstance(prepared, WindowedPrepared)
        scale = q.size(-1) ** -0.5 if scale is None else scale
        shift = prepared.request.shift or 0
        scores = measure_scores(q, k, v, shift, scale)
        reference = None
        if not prepared.is_tame or scores.largest.max() > _SMALL_SCORES:
            if not self._may_refer(prepared, scores):
                return self._attend_plainly(q, k, v, prepared, dropout_p, scale)
            reference = scores.highest - scores.gaps  # of each query and its own key
        groups = _groups(self.windows(q, k, scores, prepared, scale), prepared)
        seed = new_seed() if dropout_p > 0 else 0
        return tiled_attention(
            q,
            k,
            v,
            prepared.distances,
            TiledCall(groups, shift, scale, dropout_p, seed),
            reference=reference,
            query_labels=prepared.query_labels,
            key_labels=prepared.key_labels,
        )[0]

    def windows(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        scores: Scores,
        prepared: WindowedPrepared,
        scale: float,
    ) -> Windows | None:
        """Returns how far each head has to look; None if that is not known."""
        if prepared.slopes is None or prepared.key_is_padding is not None:
            return None
        shift, num_keys = prepared.request.shift or 0, k.size(2)
        sees_all_before = all(
            back >= shift + q.size(2) - 1 and not ahead for back, ahead in prepared.reach
        )
        return find_windows(
            q,
            k,
            scores,
            prepared.slopes,
            shift,
            scale,
            may_average=sees_all_before and prepared.key_labels is None and num_keys > 0,
        )

    def _may_refer(self, prepared: WindowedPrepared, scores: Scores) -> bool:
        """Tells whether scores less that of the own key have exponentials that are numbers."""
        is_hidden = prepared.key_is_padding is not None
        return prepared.is_tame and not is_hidden and bool(scores.gaps.max() < _LARGEST_GAP)

    def _attend_plainly(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        prepared: WindowedPrepared,
        dropout_p: float,
        scale: float,
    ) -> torch.Tensor:
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                "--attention-backend windowed takes no maximum of scores; where scores or biases "
                "are too large for that, or a document hides a query's own key from it, it "
                "computes with a dense mask"
            )
        plain, request = prepared.plain, prepared.request
        if plain is None:
            plain = request.of(ReferenceBackend() if dropout_p > 0 else SdpaBackend())
            prepared.plain = None if request.bias.is_learned else plain
        return plain.backend.attend(q, k, v, plain, dropout_p=dropout_p, scale=scale)

    def _distances(self, request: Request) -> _Terms:
        """Returns the terms of all distances, the reach of each head, and whether terms are tame.

        They are kept for the next forward pass if it is like this one.
        """
        shift = request.shift
        assert shift is not None
        num_queries, num_keys = len(request.query_positions), len(request.key_positions)
        wanted = (request.bias, request.rule, request.head_slice, shift, num_queries, num_keys)
        if self._kept is not None and self._kept[0] == wanted:
            return self._kept[1]
        bias, rule = request.bias_and_rule
        nearest, furthest = shift - num_keys + 1, shift + num_queries - 1
        with torch.inference_mode(mode=False):
            terms = join(bias, rule, range(nearest, furthest + 1), range(1), dtype=torch.float32)[
                ..., 0
            ].expand(bias.num_heads, -1)  # (H, D)
        fixed = terms.detach()
        inside = torch.isfinite(fixed)
        steps = torch.arange(nearest, furthest + 1)
        reach = [
            (max(0, int(mine.max())), max(0, -int(mine.min())))
            for mine in (steps[is_seen] for is_seen in inside)
        ]
        is_tame = bool(fixed.max() <= _SMALL_SCORES and fixed[:, -nearest].min() >= -_SMALL_SCORES)
        made = Distances(terms, nearest), reach, is_tame
        self._kept = None if bias.is_learned else (wanted, made)
        return made

    def __deepcopy__(self, memo: dict[int, object]) -> WindowedBackend:
        """Copies no terms: a copied model makes its own when it needs some."""
        return type(self)()


def _labels(request: Request) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Returns labels of queries and keys, such that a query sees the keys of its label."""
    is_padding, documents = request.key_is_padding, request.key_documents
    if is_padding is None and documents is None:
        return None, None
    if documents is None or request.query_documents is None:
        assert is_padding is not None
        keys = torch.zeros(is_padding.shape)
        queries = torch.zeros(1, len(request.query_positions))
    else:
        keys, queries = _numbers_of_documents(documents, request.query_documents)
    # A number that no document has.
    return queries, keys if is_padding is None else keys.masked_fill(is_padding, _PADDING)


def _numbers_of_documents(*documents: torch.Tensor) -> list[torch.Tensor]:
    """Returns numbers above that of padding, which float32 tells apart, (B or 1, ...) each."""
    limits = [int(limit) for each in documents if each.numel() for limit in each.aminmax()]
    if limits and (min(limits) <= _PADDING or max(limits) > 1 / torch.finfo(torch.float32).eps):
        sizes = [each.numel() for each in documents]
        together = torch.cat([each.flatten() for each in documents])
        parts = together.unique(return_inverse=True)[1].split(sizes)
        documents = tuple(part.view_as(each) for part, each in zip(parts, documents, strict=True))
    return [each.float().view(-1, each.size(-1)) for each in documents]


def _own_keys_belong_to_queries(request: Request) -> bool:
    """Tells whether each query is of the same document as the key at its position."""
    queries, keys = request.query_documents, request.key_documents
    if queries is None or keys is None:
        return True
    return bool((keys.narrow(-1, request.shift or 0, queries.size(-1)) == queries).all())


def _slopes(request: Request, reach: list[tuple[int, int]]) -> Slopes | None:
    bias, _ = request.bias_and_rule
    slopes = bias.decay()
    if slopes is None:
        return None
    back, ahead = torch.tensor(reach).unbind(-1)
    return Slopes(slopes.left.where(back > 0, torch.inf), slopes.right.where(ahead > 0, torch.inf))


def _groups(windows: Windows | None, prepared: WindowedPrepared) -> tuple[HeadGroup, ...]:
    """Returns which heads are computed together, none further than its window and its rule."""
    back, ahead = ([each[side] for each in prepared.reach] for side in range(2))
    if windows is not None:
        back = [min(each) for each in zip(back, windows.left.tolist(), strict=True)]
        ahead = [min(each) for each in zip(ahead, windows.right.tolist(), strict=True)]
    request = prepared.request
    return group_heads(back, ahead, len(request.query_positions), len(request.key_positions))
