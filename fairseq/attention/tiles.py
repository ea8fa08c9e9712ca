"""Attention by tiles of scores, for terms that depend on distance alone; made for CPUs.

Queries are cut into blocks. Each block meets the run of keys that its heads look at, all heads of
a group in one batched product. No tensor grows with T * S: memory is linear in the length.

* exp(score + term) is taken as exp2(score) * exp(term), with log2(e) in the factor of the product:
  the exponential of very negative numbers is slow, and a hidden key costs nothing.
* Keys and values are turned round, the last one first. The distance from query i to the r-th of
  them is i + r and a constant, so that a tile of factors is a view of one row of numbers, with
  steps of 1 in both directions: nothing is built, and what is read stays in the innermost cache.
* Scores are small in practice, so no maximum is subtracted; where they are not, a reference
  of each query is (the score of its own key). The caller makes sure that nothing overflows.
* The backward pass is written out; it makes the tiles and the dropped weights again.

Shapes: `B` rows, `H` heads, `T` queries, `S` keys, `K` head width, `D` distances; of a block of
queries: `G` heads, `L` queries, `n` keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from fairseq.attention.random_bits import DropMask

__all__ = ["MOST_SCORES", "Distances", "HeadGroup", "TiledCall", "tiled_attention"]

_LOG2_E = math.log2(math.e)
MOST_SCORES = 1 << 18
"""Scores of a tile; these and what goes with them stay in a core's cache."""
_SMALLEST_TERM = -66.0
"""Factors below the exponential of this are 0. Times that of the smallest score without reference,
-20, they would be denormal numbers, with which arithmetic is slow."""
_SMALLEST_TERM_REFERRED = -87.0


class Distances:
    """What is added to scores, for each distance from query back to key.

    Args:
        terms: (H, D); -inf where a key at that distance is not seen.
        first: distance of column 0; negative for keys after the query.
    """

    def __init__(self, terms: torch.Tensor, first: int) -> None:
        self.terms = terms
        self.first = first
        self._factors: torch.Tensor | None = None

    def factors(self, dtype: torch.dtype, *, is_referred: bool) -> torch.Tensor:
        """Returns the exponentials of the terms, (H, D); kept where there is no reference."""
        if is_referred:
            return self._exponentials(dtype, _SMALLEST_TERM_REFERRED)
        if self._factors is None or self._factors.dtype is not dtype:
            self._factors = self._exponentials(dtype, _SMALLEST_TERM)
        return self._factors

    def _exponentials(self, dtype: torch.dtype, smallest: float) -> torch.Tensor:
        terms = self.terms.detach().to(dtype)
        return terms.clamp(min=smallest).exp_().masked_fill_(terms < smallest, 0.0)


@dataclass(frozen=True)
class HeadGroup:
    """Heads that are computed together.

    Attributes:
        heads: which; they follow one another.
        block: length of a block of queries, L.
        back: how many steps back their queries look.
        ahead: how many steps ahead.
    """

    heads: slice
    block: int
    back: int
    ahead: int


@dataclass(frozen=True)
class TiledCall:
    """Everything about a call but its tensors.

    Attributes:
        groups: each head is in one of them.
        shift: position of query 0 less that of key 0.
        scale: factor of the products of queries and keys.
        drop_rate: probability that a weight is dropped.
        seed: of the weights that are dropped.
    """

    groups: tuple[HeadGroup, ...]
    shift: int
    scale: float
    drop_rate: float = 0.0
    seed: int = 0


def tiled_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    distances: Distances,
    call: TiledCall,
    *,
    reference: torch.Tensor | None = None,
    query_labels: torch.Tensor | None = None,
    key_labels: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes attention and the log-sum-exp of its scores; gradients flow through both.

    A query that sees no key gets zeros and -inf.

    Args:
        q: (B, H, T, K); computed in float32, or float64 if it is that.
        k: (B, H, S, K).
        v: (B, H, S, K).
        distances: the terms of all distances between these queries and keys.
        call: everything else.
        reference: (B, H, T), subtracted from each query's scores before the exponential. None
            where no score is further than 20 from 0.
        query_labels: (B or 1, T); a query sees keys of its own label alone. None if all are one.
        key_labels: (B or 1, S), given with those of queries.

    Returns:
        (output (B, H, T, K) in the dtype of q, log-sum-exp (B, H, T) in nats).
    """
    result: tuple[torch.Tensor, torch.Tensor] = _Tiled.apply(
        q, k, v, distances.terms, distances, call, reference, query_labels, key_labels
    )
    return result


class _Tiled(torch.autograd.Function):
    """The forward pass and its derivative, written out."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        terms: torch.Tensor,
        distances: Distances,
        call: TiledCall,
        *others: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.call, ctx.distances = call, distances
        out, total = _forward(_Sheet(q, k, v, distances, call, *others))
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, total, *others)
        lse, reference = total.log().squeeze(-1), others[0]
        return out, lse if reference is None else lse.add_(reference)

    @staticmethod
    def backward(
        ctx: Any, out_grad: torch.Tensor, lse_grad: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, total, *others = ctx.saved_tensors
        sheet = _Sheet(q, k, v, ctx.distances, ctx.call, *others)
        # The derivative of a score is weight * (what its value gives - this number of the query).
        pull = (out_grad * out).sum(-1, keepdim=True, dtype=total.dtype)  # (B, H, T, 1)
        pull.sub_(lse_grad.unsqueeze(-1))
        share = total.where(total > 0, torch.inf).reciprocal_()
        term_grad = torch.zeros_like(ctx.distances.terms) if ctx.needs_input_grad[3] else None
        grads = _backward(sheet, out_grad, pull.mul_(share), share, term_grad)
        dq, dk, dv = (x.to(q.dtype) for x in grads)
        return dq, dk, dv, term_grad, None, None, None, None, None


class _Sheet:
    """The tensors of a call in the form in which tiles are cut out of them.

    Attributes:
        q: (B, H, T, K).
        k: (B, H, S, K), the last key first.
        v: (B, H, S, K), the last value first.
        backwards: numbers of the keys, the last one first, (S,).
        call: everything that is no tensor.
        factors: exponentials of the terms, (H, D).
        first: distance of the first of them.
        reference: (B, H, T, 1) in bits, or None.
        query_labels: (B or 1, T, 1), or None.
        key_labels: (B or 1, 1, S), the last one first, or None.
    """

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        distances: Distances,
        call: TiledCall,
        reference: torch.Tensor | None,
        query_labels: torch.Tensor | None,
        key_labels: torch.Tensor | None,
    ) -> None:
        dtype = torch.promote_types(q.dtype, torch.float32)
        self.backwards = torch.arange(k.size(2) - 1, -1, -1)
        self.q = q.to(dtype)
        self.k, self.v = (x.to(dtype).index_select(2, self.backwards) for x in (k, v))
        self.call = call
        self.factors = distances.factors(dtype, is_referred=reference is not None)
        self.first = distances.first
        self.reference = None if reference is None else reference.unsqueeze(-1) * _LOG2_E
        self.query_labels = None if query_labels is None else query_labels.unsqueeze(-1)
        self.key_labels = None if key_labels is None else key_labels.flip(-1).unsqueeze(-2)

    def panels(self) -> Iterator[_Panel]:
        """Yields every row of every group of heads."""
        for group in self.call.groups:
            blocks = self._blocks(group)
            for row in range(len(self.q)):
                yield _Panel(self, row, group.heads, blocks)

    def _blocks(self, group: HeadGroup) -> list[_Block]:
        num_queries, num_keys = self.q.size(2), self.k.size(2)
        most = max(1, MOST_SCORES // (len(self.factors[group.heads]) * group.block))
        blocks = []
        for start in range(0, num_queries, group.block):
            stop = min(start + group.block, num_queries)
            position = start + self.call.shift
            oldest = max(0, position - group.back)
            newest = min(num_keys - 1, position + stop - start - 1 + group.ahead)
            end = num_keys - oldest
            runs = [
                slice(at, min(at + most, end)) for at in range(num_keys - 1 - newest, end, most)
            ]
            blocks.append(_Block(slice(start, stop), runs, position - (num_keys - 1)))
        return blocks


@dataclass(frozen=True)
class _Block:
    """A block of queries, and the keys that it meets.

    Attributes:
        queries: which queries.
        runs: of reversed keys, each as long as makes a tile.
        nearest: distance from the first of the queries to reversed key 0.
    """

    queries: slice
    runs: list[slice]
    nearest: int


class _Panel:
    """One row of a group of heads.

    Attributes:
        which: row and heads, an index of (B, H, ...).
        blocks: what there is to compute.
        q: (G, T, K).
        k: (G, S, K), the last key first.
        v: (G, S, K), the last value first.
    """

    def __init__(self, sheet: _Sheet, row: int, heads: slice, blocks: list[_Block]) -> None:
        self.which = row, heads
        self.blocks = blocks
        self.q, self.k, self.v = (x[self.which] for x in (sheet.q, sheet.k, sheet.v))
        self._scale = sheet.call.scale * _LOG2_E
        self._factors = sheet.factors[heads]  # (G, D)
        self._start = self._factors.storage_offset() - sheet.first  # of the factor of distance 0
        self._reference = None if sheet.reference is None else sheet.reference[self.which]
        self._labels = None
        if sheet.query_labels is not None and sheet.key_labels is not None:
            mine, theirs = sheet.query_labels, sheet.key_labels
            self._labels = mine[row % len(mine)], theirs[row % len(theirs)]  # (T, 1), (1, S)

    def weights(
        self, q: torch.Tensor, block: _Block, run: slice, room: torch.Tensor
    ) -> torch.Tensor:
        """Computes exp(score + term - reference) of a tile, (G, L, n), in a tensor of that size."""
        torch.baddbmm(room, q, self.k[:, run].transpose(1, 2), beta=0, alpha=self._scale, out=room)
        if self._reference is not None:
            room.sub_(self._reference[:, block.queries])
        room.exp2_()
        # Query i of the block and key r of the run are i + r and a constant apart.
        start = self._start + block.nearest + run.start
        room.mul_(self._factors.as_strided(room.shape, (self._factors.stride(0), 1, 1), start))
        if self._labels is not None:
            mine, theirs = self._labels
            room.mul_((mine[block.queries] == theirs[:, run]).to(room.dtype))
        return room


class _Room:
    """Memory for one tile, used again and again."""

    def __init__(self, like: torch.Tensor) -> None:
        self._memory = like.new_empty(MOST_SCORES)

    def tile(self, q: torch.Tensor, run: slice) -> torch.Tensor:
        """Returns an empty (G, L, n) for queries (G, L, K)."""
        shape = len(q), q.size(1), run.stop - run.start
        size = math.prod(shape)
        if size > len(self._memory):
            self._memory = q.new_empty(size)
        return self._memory[:size].view(shape)


def _forward(sheet: _Sheet) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the output (B, H, T, K) and the sums of the queries' weights (B, H, T, 1)."""
    rows, heads, length, width = sheet.q.shape
    # In the order in which the layers read it, (B, T, H, K).
    out = sheet.q.new_empty(rows, length, heads, width).transpose(1, 2)
    total = sheet.q.new_empty(rows, heads, length, 1)
    room, mask = _Room(sheet.q), DropMask(sheet.call.drop_rate, sheet.call.seed)
    for panel in sheet.panels():
        panel_out, panel_total = out[panel.which], total[panel.which]
        for block in panel.blocks:
            o, sums = panel_out[:, block.queries], panel_total[:, block.queries]
            if not block.runs:
                o.zero_()
                sums.zero_()
                continue
            q = panel.q[:, block.queries]
            for run in block.runs:
                w = panel.weights(q, block, run, room.tile(q, run))
                if run is block.runs[0]:
                    torch.sum(w, -1, keepdim=True, out=sums)
                else:
                    sums += w.sum(-1, keepdim=True)
                if mask.rate > 0:
                    w.mul_(mask.draw(w))
                o.baddbmm_(w, panel.v[:, run], beta=int(run is not block.runs[0]))
    share = total.where(total > 0, torch.inf).reciprocal_()
    return out.mul_(share.mul_(mask.scale)), total


def _backward(
    sheet: _Sheet,
    out_grad: torch.Tensor,
    pull: torch.Tensor,
    share: torch.Tensor,
    term_grad: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the gradients of q, k and v; adds to that of the terms.

    Args:
        sheet: what was computed.
        out_grad: (B, H, T, K).
        pull: what all keys of a query have in common, over the sum of weights, (B, H, T, 1).
        share: 1 over the sum of weights, 0 where nothing is seen, (B, H, T, 1).
        term_grad: (H, D), or None.
    """
    scale = sheet.call.scale
    dq, dk, dv = torch.zeros_like(sheet.q), torch.zeros_like(sheet.k), torch.zeros_like(sheet.v)
    room, other, mask = (
        _Room(sheet.q),
        _Room(sheet.q),
        DropMask(sheet.call.drop_rate, sheet.call.seed),
    )
    given = out_grad * (share * mask.scale)
    for panel in sheet.panels():
        mine = [x[panel.which] for x in (given, pull, dq)]
        panel_dk, panel_dv = dk[panel.which], dv[panel.which]
        for block in panel.blocks:
            q = panel.q[:, block.queries]
            do, pulled, block_dq = (x[:, block.queries] for x in mine)
            for run in block.runs:
                w = panel.weights(q, block, run, room.tile(q, run))
                ds = torch.bmm(do, panel.v[:, run].transpose(1, 2), out=other.tile(q, run))
                if mask.rate > 0:
                    kept = mask.draw(w).mul_(w)
                    ds.mul_(kept).addcmul_(w, pulled, value=-1)
                else:
                    kept = w
                    ds.sub_(pulled).mul_(w)
                panel_dv[:, run].baddbmm_(kept.transpose(1, 2), do)
                panel_dk[:, run].baddbmm_(ds.transpose(1, 2), q, alpha=scale)
                block_dq.baddbmm_(ds, panel.k[:, run], alpha=scale)
                if term_grad is not None:
                    start = block.nearest + run.start - sheet.first
                    _add_diagonals(term_grad[panel.which[1]], ds, start)
    # Into memory that is at hand: what is fresh has to be cleared by the system.
    torch.index_select(dk, 2, sheet.backwards, out=sheet.k)
    torch.index_select(dv, 2, sheet.backwards, out=sheet.v)
    return dq, sheet.k, sheet.v


def _add_diagonals(term_grad: torch.Tensor, ds: torch.Tensor, start: int) -> None:
    """Adds up the gradients of scores (G, L, n) by distance, into (G, D) from `start` on."""
    heads, length, keys = ds.shape
    end = length + keys - 1
    # Each row is put one further to the right than the one before; then columns are distances.
    skewed = torch.nn.functional.pad(ds, (0, length)).flatten(1)[:, : length * end]
    by_distance = skewed.view(heads, length, end).sum(1)  # (G, L + n - 1)
    term_grad[:, start : start + end] += by_distance.to(term_grad.dtype)
