"""Attention by tiles of scores, for terms that depend on distance alone; made for CPUs.

Queries are cut into blocks. Each block meets the run of keys that its heads look at, all heads of
a group in one batched product. No tensor grows with T * S: memory is linear in the length.

* exp(score + term) is taken as exp(score) * exp(term): the exponential of very negative numbers is
  slow, and a hidden key costs nothing.
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

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from fairseq.attention.random_bits import DropMask

__all__ = ["MOST_SCORES", "Distances", "HeadGroup", "TiledCall", "tiled_attention"]

MOST_SCORES = 1 << 18
"""Scores of a tile; these and what goes with them stay in a core's cache."""
_TILES_AT_A_TIME = 32
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
        # Tiles are views that count on a row's numbers lying side by side.
        terms = self.terms.detach().to(dtype).contiguous()
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
    @once_differentiable
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
        reference: (B, H, T, 1), or None.
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
        self._given = k, v
        self.backwards = torch.arange(k.size(2) - 1, -1, -1)
        self.q = q.to(dtype)
        self.k, self.v = (x.to(dtype).index_select(2, self.backwards) for x in (k, v))
        self.call = call
        self.factors = distances.factors(dtype, is_referred=reference is not None)
        self.first = distances.first
        self.reference = None if reference is None else reference.unsqueeze(-1)
        self.query_labels = None if query_labels is None else query_labels.unsqueeze(-1)
        self.key_labels = None if key_labels is None else key_labels.flip(-1).unsqueeze(-2)

    def memory_like_given(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the memory of k and v, which are lost, in the strides of those that were given.

        Fresh memory would have to be cleared by the system, and gradients in other strides than
        what they belong to are copied once more.
        """
        k, v = (torch.empty_like(x, device="meta") for x in self._given)
        return self.k.as_strided(k.shape, k.stride()), self.v.as_strided(v.shape, v.stride())

    def tiles(
        self,
        of_queries: Sequence[torch.Tensor],
        of_keys: Sequence[torch.Tensor] = (),
        *,
        num_rooms: int = 1,
    ) -> Iterator[_Tile]:
        """Yields every tile: heads of a group, row by row, block by block, run by run.

        Args:
            of_queries: further tensors of which a tile holds its part, (B, H, T, ...).
            of_keys: the same for keys, (B, H, S, ...), the last one first.
            num_rooms: how many numbers of its own a tile needs for each score.
        """
        tiles = self._tiles(of_queries, of_keys, num_rooms)
        # Numbers of a tile fill the caches. After that Python and what only makes a view are
        # several times as slow as before; so the views of many tiles are made at a time.
        while several := list(itertools.islice(tiles, _TILES_AT_A_TIME)):
            yield from several

    def _tiles(
        self, of_queries: Sequence[torch.Tensor], of_keys: Sequence[torch.Tensor], num_rooms: int
    ) -> Iterator[_Tile]:
        blocks = [self._blocks(group) for group in self.call.groups]
        memory = _Memory(self, blocks, num_rooms)
        for group, group_blocks in zip(self.call.groups, blocks, strict=True):
            for row in range(len(self.q)):
                panel = _Panel(self, row, group, of_queries, of_keys, memory)
                for number, block in enumerate(group_blocks):
                    yield from panel.tiles(number, block)

    def _blocks(self, group: HeadGroup) -> list[_Block]:
        num_queries, num_keys = self.q.size(2), self.k.size(2)
        most = max(1, MOST_SCORES // (len(self.factors[group.heads]) * group.block))
        blocks = []
        for start in range(0, num_queries, group.block):
            stop = min(start + group.block, num_queries)
            position = start + self.call.shift
            oldest = max(0, position - group.back)
            newest = min(num_keys - 1, position + stop - start - 1 + group.ahead)
            begin, end = num_keys - 1 - newest, num_keys - oldest
            runs = [(at, min(most, end - at)) for at in range(begin, end, most)]
            blocks.append(_Block(runs or [(0, 0)], position - (num_keys - 1)))
        return blocks


@dataclass(frozen=True)
class _Block:
    """A block of queries, and the keys that it meets.

    Attributes:
        runs: of reversed keys, (start, length), each as long as makes a tile; one of no keys
            where it meets none.
        nearest: distance from the first of the queries to reversed key 0.
    """

    runs: list[tuple[int, int]]
    nearest: int


class _Memory:
    """Memory for the numbers of one tile, used again and again.

    Attributes:
        scores: of each room, as many as the largest tile has.
        result: as many as the queries of a tile have, of all its heads.
    """

    def __init__(self, sheet: _Sheet, blocks: list[list[_Block]], num_rooms: int) -> None:
        most_scores = most_results = 0
        for group, group_blocks in zip(sheet.call.groups, blocks, strict=True):
            rows = len(sheet.factors[group.heads]) * min(group.block, sheet.q.size(2))
            longest = max((length for each in group_blocks for _, length in each.runs), default=0)
            most_scores = max(most_scores, rows * longest)
            most_results = max(most_results, rows * sheet.q.size(-1))
        self.scores = [sheet.q.new_empty(most_scores) for _ in range(num_rooms)]
        self.result = sheet.q.new_empty(most_results)


class _Panel:
    """One row of a group of heads, out of which tiles are cut."""

    def __init__(
        self,
        sheet: _Sheet,
        row: int,
        group: HeadGroup,
        of_queries: Sequence[torch.Tensor],
        of_keys: Sequence[torch.Tensor],
        memory: _Memory,
    ) -> None:
        which = row, group.heads
        self._heads = group.heads
        self._of_queries = [x[which].split(group.block, 1) for x in (sheet.q, *of_queries)]
        self._of_keys = [x[which] for x in (sheet.k, sheet.v, *of_keys)]
        self._memory = memory
        self._factors = sheet.factors[group.heads]  # (G, D)
        self._first = sheet.first
        self._reference = self._query_labels = self._key_labels = None
        if sheet.reference is not None:
            self._reference = sheet.reference[which].split(group.block, 1)
        if sheet.query_labels is not None and sheet.key_labels is not None:
            mine, theirs = sheet.query_labels, sheet.key_labels
            self._query_labels = mine[row % len(mine)].split(group.block)  # (L, 1) each
            self._key_labels = theirs[row % len(theirs)]  # (1, S)

    def tiles(self, number: int, block: _Block) -> Iterator[_Tile]:
        """Yields the tiles of a block of queries."""
        q, *of_queries = (x[number] for x in self._of_queries)
        reference = None if self._reference is None else self._reference[number]
        heads, length, width = q.shape
        result = self._memory.result.as_strided((heads, length, width), (length * width, width, 1))
        for run, (start, num_keys) in enumerate(block.runs):
            shape, steps = (heads, length, num_keys), (length * num_keys, num_keys, 1)
            # Query i of the block and key r of the run are i + r and a constant apart.
            nearest = block.nearest + start - self._first
            labels = None
            if self._query_labels is not None and self._key_labels is not None:
                labels = self._query_labels[number], self._key_labels.narrow(1, start, num_keys)
            k, v, *of_keys = (x.narrow(1, start, num_keys) for x in self._of_keys)
            yield _Tile(
                heads=self._heads,
                is_first=run == 0,
                is_last=run == len(block.runs) - 1,
                nearest=nearest,
                q=q,
                k=k,
                v=v,
                k_t=k.transpose(1, 2),
                v_t=v.transpose(1, 2),
                factors=self._factors.as_strided(
                    shape,
                    (self._factors.stride(0), 1, 1),
                    self._factors.storage_offset() + nearest,
                ),
                reference=reference,
                labels=labels,
                of_queries=of_queries,
                of_keys=of_keys,
                rooms=[x.as_strided(shape, steps) for x in self._memory.scores],
                result=result,
            )


class _Tile(NamedTuple):
    """A block of queries of some heads in one row, and a run of the keys that it meets.

    Attributes:
        heads: which.
        is_first: whether this is the first run that the block meets.
        is_last: whether it is the last one.
        nearest: index of the smallest distance in it among the factors.
        q: (G, L, K).
        k: (G, n, K), the last key first.
        v: (G, n, K), the last value first.
        k_t: (G, K, n).
        v_t: (G, K, n).
        factors: exponentials of the terms, (G, L, n).
        reference: (G, L, 1), or None.
        labels: of queries (L, 1) and keys (1, n), or None.
        of_queries: parts (G, L, ...) of what was asked for.
        of_keys: parts (G, n, ...) of what was asked for.
        rooms: for its own numbers, (G, L, n) each.
        result: for sums over all runs of a block, (G, L, K).
    """

    heads: slice
    is_first: bool
    is_last: bool
    nearest: int
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    k_t: torch.Tensor
    v_t: torch.Tensor
    factors: torch.Tensor
    reference: torch.Tensor | None
    labels: tuple[torch.Tensor, torch.Tensor] | None
    of_queries: list[torch.Tensor]
    of_keys: list[torch.Tensor]
    rooms: list[torch.Tensor]
    result: torch.Tensor

    def weights(self, scale: float) -> torch.Tensor:
        """Computes exp(score + term - reference) in the first room, (G, L, n)."""
        w = self.rooms[0]
        torch.baddbmm(w, self.q, self.k_t, beta=0, alpha=scale, out=w)
        if self.reference is not None:
            w.sub_(self.reference)
        w.exp_().mul_(self.factors)
        if self.labels is not None:
            mine, theirs = self.labels
            w.mul_((mine == theirs).to(w.dtype))
        return w

    def add_up(self, weights: torch.Tensor, of_keys: torch.Tensor, scale: float) -> torch.Tensor:
        """Adds products (G, L, n) x (G, n, K) to those of the runs before, in `result`."""
        # A product is faster where its result lies in one piece, not among the other heads'.
        beta = 0 if self.is_first else 1
        return torch.baddbmm(self.result, weights, of_keys, beta=beta, alpha=scale, out=self.result)


def _forward(sheet: _Sheet) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the output (B, H, T, K) and the sums of the queries' weights (B, H, T, 1)."""
    rows, heads, length, width = sheet.q.shape
    # In the order in which the layers read it, (B, T, H, K).
    out = sheet.q.new_empty(rows, length, heads, width).transpose(1, 2)
    total = sheet.q.new_empty(rows, heads, length, 1)
    mask = DropMask(sheet.call.drop_rate, sheet.call.seed)
    smallest = torch.finfo(total.dtype).tiny  # where nothing is seen: 0 / smallest is 0
    for tile in sheet.tiles([out, total]):
        tile_out, sums = tile.of_queries
        w = tile.weights(sheet.call.scale)
        if tile.is_first:
            torch.sum(w, -1, keepdim=True, out=sums)
        else:
            sums += w.sum(-1, keepdim=True)
        if mask.rate > 0:
            w.mul_(mask.draw(w))
        result = tile.add_up(w, tile.v, mask.scale)
        if tile.is_last:
            torch.div(result, sums.clamp(min=smallest), out=tile_out)
    return out, total


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
    dq, dk, dv = torch.empty_like(sheet.q), torch.zeros_like(sheet.k), torch.zeros_like(sheet.v)
    mask = DropMask(sheet.call.drop_rate, sheet.call.seed)
    given = out_grad * (share * mask.scale)
    for tile in sheet.tiles([given, pull, dq], [dk, dv], num_rooms=2):
        do, pulled, tile_dq = tile.of_queries
        tile_dk, tile_dv = tile.of_keys
        w = tile.weights(scale)
        ds = torch.bmm(do, tile.v_t, out=tile.rooms[1])
        if mask.rate > 0:
            kept = mask.draw(w).mul_(w)
            ds.mul_(kept).addcmul_(w, pulled, value=-1)
        else:
            kept = w
            ds.sub_(pulled).mul_(w)
        tile_dv.baddbmm_(kept.transpose(1, 2), do)
        tile_dk.baddbmm_(ds.transpose(1, 2), tile.q, alpha=scale)
        result = tile.add_up(ds, tile.k, scale)
        if tile.is_last:
            tile_dq.copy_(result)
        if term_grad is not None:
            _add_diagonals(term_grad[tile.heads], ds, tile.nearest)
    for_k, for_v = sheet.memory_like_given()
    torch.index_select(dk, 2, sheet.backwards, out=for_k)
    torch.index_select(dv, 2, sheet.backwards, out=for_v)
    return dq, for_k, for_v


def _add_diagonals(term_grad: torch.Tensor, ds: torch.Tensor, start: int) -> None:
    """Adds up the gradients of scores (G, L, n) by distance, into (G, D) from `start` on."""
    heads, length, keys = ds.shape
    end = length + keys - 1
    # Each row is put one further to the right than the one before; then columns are distances.
    skewed = torch.nn.functional.pad(ds, (0, length)).flatten(1)[:, : length * end]
    by_distance = skewed.view(heads, length, end).sum(1)  # (G, L + n - 1)
    term_grad[:, start : start + end] += by_distance.to(term_grad.dtype)
