"""Attention by square tiles of scores, for terms that depend on distance alone; made for CPUs.

Queries and keys are cut into blocks of equal length. All pairs of blocks that are as far apart
share one tile of the bias, so that a batched product computes many tiles at once, and blocks that
are too far to matter are left out. No tensor grows with T * S: memory is linear in the length.

* exp(score + bias) is taken as exp2(score) * exp(bias), with log2(e) in the factor of the queries:
  the exponential of very negative numbers is slow, and a hidden key costs nothing.
* Scores are small in practice, so no maximum is subtracted; where they are not, a reference
  of each query is (the score of its own key). The caller makes sure that nothing overflows.
* The backward pass is written out; it makes the tiles and the dropped weights again.

Shapes: `B` rows, `H` heads, `T` queries, `S` keys, `K` head width; of a group of heads: `R` rows
times heads, `N` query blocks, `M` key blocks, `L` length of a block, `n` pairs of blocks at once;
`D` distances.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from fairseq.attention.random_bits import DropMask

__all__ = ["Distances", "HeadGroup", "TiledCall", "tiled_attention"]

_LOG2_E = math.log2(math.e)
_MOST_SCORES = 1 << 18
"""Scores of a batch of tiles; these and what goes with them stay in a core's cache."""


@dataclass(frozen=True)
class Distances:
    """What is added to scores, for each distance from query back to key.

    Attributes:
        terms: (H, D); -inf where a key at that distance is not seen.
        first: distance of column 0; negative for keys after the query.
    """

    terms: torch.Tensor
    first: int


@dataclass(frozen=True)
class HeadGroup:
    """Heads that are computed together.

    Attributes:
        heads: their numbers.
        block: length of a block, L.
        nearest: how many blocks back the first block of keys lies; negative for keys that come
            after the query.
        farthest: how many blocks back the last one lies.
    """

    heads: tuple[int, ...]
    block: int
    nearest: int
    farthest: int

    @property
    def which(self) -> slice | list[int]:
        """The heads as an index; a slice if they follow one another, which copies nothing."""
        first, last = self.heads[0], self.heads[-1]
        if self.heads == tuple(range(first, last + 1)):
            return slice(first, last + 1)
        return list(self.heads)


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
        distances: the terms of all distances that tiles of the groups cover.
        call: everything else.
        reference: (B, H, T), subtracted from each query's scores before the exponential.
        query_labels: (B or 1, T); a query sees keys of its own label alone. None if all are one.
        key_labels: (B or 1, S), given with those of queries.

    Returns:
        (output (B, H, T, K) in the dtype of q, log-sum-exp (B, H, T) in nats).
    """
    result: tuple[torch.Tensor, torch.Tensor] = _Tiled.apply(
        q, k, v, distances.terms, distances.first, call, reference, query_labels, key_labels
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
        first: int,
        call: TiledCall,
        reference: torch.Tensor | None,
        query_labels: torch.Tensor | None,
        key_labels: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = torch.promote_types(q.dtype, torch.float32)
        rows, heads, length, width = q.shape
        # In the order in which the layers read it, (B, T, H, K).
        out = torch.empty(rows, length, heads, width, dtype=q.dtype).transpose(1, 2)
        total = torch.empty(rows, heads, length, dtype=dtype)
        inputs = _Inputs(q, k, v, Distances(terms, first), reference, query_labels, key_labels)
        mask = DropMask(call.drop_rate, call.seed)
        for part in _parts(inputs, call):
            part_out, part_total = _forward(part, mask)
            part.layout.put(out, part_out)
            part.layout.put(total.unsqueeze(-1), part_total)
        lse = total.log()
        if reference is not None:
            lse += reference
        ctx.call, ctx.first = call, first
        ctx.save_for_backward(q, k, v, terms, out, total, reference, query_labels, key_labels)
        return out, lse

    @staticmethod
    def backward(
        ctx: Any, out_grad: torch.Tensor, lse_grad: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        q, k, v, terms, out, total, reference, query_labels, key_labels = ctx.saved_tensors
        call = ctx.call
        inputs = _Inputs(q, k, v, Distances(terms, ctx.first), reference, query_labels, key_labels)
        grads = [torch.empty_like(each) for each in (q, k, v)]
        is_seen = total > 0
        # The derivative of a score is weight * (what its value gives - this number of the query).
        pull = (out_grad * out).sum(-1, dtype=total.dtype) - lse_grad  # (B, H, T)
        share = total.where(is_seen, 1.0).reciprocal_()
        pull = (pull * share).where(is_seen, 0.0)
        term_grad = torch.zeros_like(terms) if ctx.needs_input_grad[3] else None
        mask = DropMask(call.drop_rate, call.seed)
        for part in _parts(inputs, call):
            layout = part.layout
            pulled = layout.queries(pull.unsqueeze(-1))
            given = layout.queries(out_grad) * layout.queries((share * mask.scale).unsqueeze(-1))
            dq, dk, dv = _backward(part, mask, given, pulled, term_grad)
            layout.put(grads[0], dq.mul_(call.scale))
            layout.put_keys(grads[1], dk.mul_(1 / _LOG2_E))
            layout.put_keys(grads[2], dv)
        return (*grads, term_grad, None, None, None, None, None)


@dataclass(frozen=True)
class _Inputs:
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    distances: Distances
    reference: torch.Tensor | None
    query_labels: torch.Tensor | None
    key_labels: torch.Tensor | None


@dataclass(frozen=True)
class _Layout:
    """How some rows of a group of heads are cut into blocks.

    Attributes:
        rows: which rows.
        group: which heads, and how long a block is.
        num_streams: rows times heads, R.
        front: places before query 0 in the first block.
        num_query_blocks: N.
        num_key_blocks: M.
        keys_of_last_block: how many of its places are keys.
        ahead: query block b stands at key block b + ahead.
    """

    rows: slice
    group: HeadGroup
    num_streams: int
    front: int
    num_query_blocks: int
    num_key_blocks: int
    keys_of_last_block: int
    ahead: int
    dtype: torch.dtype

    def queries(self, x: torch.Tensor) -> torch.Tensor:
        """Cuts (B, H, T, K) into new blocks (N R, L, K), with zeros where there is no query."""
        return self._blocks(x, self.front, self.num_query_blocks)

    def keys(self, x: torch.Tensor) -> torch.Tensor:
        """Cuts (B, H, S, K) into new blocks (M R, L, K), with zeros where there is no key."""
        return self._blocks(x, 0, self.num_key_blocks)

    def _blocks(self, x: torch.Tensor, front: int, count: int) -> torch.Tensor:
        x = x[self.rows, self.group.which].to(self.dtype)
        tail = count * self.group.block - front - x.size(2)
        if front or tail:
            x = torch.nn.functional.pad(x, (0, 0, front, tail))
        x = x.unflatten(2, (count, -1)).permute(2, 0, 1, 3, 4)  # (N, B, G, L, K)
        return x.clone(memory_format=torch.contiguous_format).flatten(0, 2)

    def put(self, whole: torch.Tensor, blocks: torch.Tensor) -> None:
        """Writes blocks (N R, L, K) to their places in (B, H, T, K)."""
        self._put(whole, blocks, self.front)

    def put_keys(self, whole: torch.Tensor, blocks: torch.Tensor) -> None:
        """Writes blocks (M R, L, K) to their places in (B, H, S, K)."""
        self._put(whole, blocks, 0)

    def _put(self, whole: torch.Tensor, blocks: torch.Tensor, front: int) -> None:
        shape = (-1, self.num_streams // len(self.group.heads), len(self.group.heads))
        x = blocks.unflatten(0, shape).permute(1, 2, 0, 3, 4)  # (B, G, N, L, K)
        length = whole.size(2)
        if length == x.size(2) * x.size(3) and isinstance(self.group.which, slice):
            whole[self.rows, self.group.which].unflatten(2, x.shape[2:4]).copy_(x)
        else:
            whole[self.rows, self.group.which] = x.flatten(2, 3)[:, :, front : front + length].to(
                whole.dtype
            )

    def labels(self, labels: torch.Tensor, front: int, count: int, missing: float) -> torch.Tensor:
        """Cuts labels (B or 1, T) into blocks (N, B or 1, L); `missing` where there is none."""
        x = labels[self.rows] if len(labels) > 1 else labels
        tail = count * self.group.block - front - x.size(1)
        x = torch.nn.functional.pad(x.to(self.dtype), (front, tail), value=missing)
        return x.unflatten(1, (count, -1)).transpose(0, 1).contiguous()


@dataclass
class _Part:
    """Some rows of a group of heads, in blocks.

    Attributes:
        q: (N R, L, K), times scale and log2(e).
        k: (M R, L, K).
        v: (M R, L, K).
        factors: exponentials of the terms of these heads, (G, D) with R = rows times G.
        first: distance of the first of them.
        reference: (N R, L, 1) in bits, or None.
        query_labels: (N, B or 1, 1, L, 1), or None.
        key_labels: (M, B or 1, 1, 1, L), or None.
    """

    layout: _Layout
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    factors: torch.Tensor
    first: int
    reference: torch.Tensor | None
    query_labels: torch.Tensor | None
    key_labels: torch.Tensor | None

    @property
    def _step(self) -> int:
        """How many pairs of blocks are computed at once."""
        layout = self.layout
        most = _MOST_SCORES // (layout.num_streams * layout.group.block**2)
        return max(1, min(most, layout.num_query_blocks))

    def room(self) -> torch.Tensor:
        """Returns an empty tensor that holds any batch of tiles, (n R, L, L)."""
        block = self.layout.group.block
        return self.q.new_empty(self._step * self.layout.num_streams, block, block)

    def batches(self) -> Iterator[_Batch]:
        """Yields batches of pairs of blocks; all pairs of a batch are equally far apart."""
        layout, streams, step = self.layout, self.layout.num_streams, self._step
        for back in range(layout.group.nearest, layout.group.farthest + 1):
            shift = layout.ahead - back
            low = max(0, -shift)
            end = min(layout.num_query_blocks, layout.num_key_blocks - shift)
            tile = self._tile(back) if low < end else None
            for start in range(low, end, step):
                stop = min(start + step, end)
                assert tile is not None
                yield _Batch(
                    back,
                    tile,
                    slice(start, stop),
                    slice(start + shift, stop + shift),
                    slice(start * streams, stop * streams),
                    slice((start + shift) * streams, (stop + shift) * streams),
                )

    def weights(self, batch: _Batch, room: torch.Tensor) -> torch.Tensor:
        """Computes exp(score + term - reference) of a batch of tiles, (n R, L, L), into `room`."""
        q = self.q[batch.queries]
        w = torch.bmm(q, self.k[batch.keys].transpose(1, 2), out=room[: len(q)])
        if self.reference is not None:
            w.sub_(self.reference[batch.queries])
        w.exp2_()
        by_head = w.view(-1, *batch.tile.shape)
        by_head.mul_(batch.tile)
        if self.query_labels is not None and self.key_labels is not None:
            mine, theirs = self.query_labels[batch.query_blocks], self.key_labels[batch.key_blocks]
            by_head.view(len(mine), -1, *batch.tile.shape).mul_((mine == theirs).to(w.dtype))
        if batch.key_blocks.stop == self.layout.num_key_blocks:
            # The last block may be longer than what is left of the keys.
            w[-self.layout.num_streams :, :, self.layout.keys_of_last_block :].zero_()
        return w

    def _tile(self, back: int) -> torch.Tensor:
        """Returns the factors of two blocks that are so many blocks apart, (G, L, L)."""
        block = self.layout.group.block
        # Query i and key j of the two are back * L + i - j apart.
        start = back * block - (block - 1) - self.first
        return self.factors[:, start : start + 2 * block - 1].unfold(1, block, 1).flip(-1)


@dataclass(frozen=True)
class _Batch:
    """Pairs of blocks that are computed at once.

    Attributes:
        back: how many blocks the keys lie before the queries.
        tile: factors of each pair, (G, L, L).
        query_blocks: which of N.
        key_blocks: which of M.
        queries: which of N R.
        keys: which of M R.
    """

    back: int
    tile: torch.Tensor
    query_blocks: slice
    key_blocks: slice
    queries: slice
    keys: slice


def _parts(inputs: _Inputs, call: TiledCall) -> Iterator[_Part]:
    """Cuts a call into parts: rows are taken together as long as their tiles fit."""
    dtype = torch.promote_types(inputs.q.dtype, torch.float32)
    num_rows, _, num_queries, _ = inputs.q.shape
    num_keys = inputs.k.size(2)
    for group in call.groups:
        block = group.block
        ahead, front = divmod(call.shift, block)
        most_rows = max(1, _MOST_SCORES // (len(group.heads) * block**2))
        factors = inputs.distances.terms[group.which].detach().to(dtype).exp()
        for start in range(0, num_rows, most_rows):
            stop = min(start + most_rows, num_rows)
            layout = _Layout(
                slice(start, stop),
                group,
                (stop - start) * len(group.heads),
                front,
                -(-(front + num_queries) // block),
                -(-num_keys // block),
                (num_keys - 1) % block + 1,
                ahead,
                dtype,
            )
            yield _part(inputs, call.scale, layout, factors)


def _part(inputs: _Inputs, scale: float, layout: _Layout, factors: torch.Tensor) -> _Part:
    reference = query_labels = key_labels = None
    if inputs.reference is not None:
        reference = layout.queries(inputs.reference.unsqueeze(-1)).mul_(_LOG2_E)
    if inputs.query_labels is not None and inputs.key_labels is not None:
        query_labels = layout.labels(
            inputs.query_labels, layout.front, layout.num_query_blocks, -1.0
        )[:, :, None, :, None]
        key_labels = layout.labels(inputs.key_labels, 0, layout.num_key_blocks, -2.0)
        key_labels = key_labels[:, :, None, None, :]
    return _Part(
        layout,
        layout.queries(inputs.q).mul_(scale * _LOG2_E),
        layout.keys(inputs.k),
        layout.keys(inputs.v),
        factors,
        inputs.distances.first,
        reference,
        query_labels,
        key_labels,
    )


def _forward(part: _Part, mask: DropMask) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the output (N R, L, K) and the sum of each query's weights (N R, L, 1)."""
    out, total = torch.zeros_like(part.q), torch.zeros_like(part.q[..., :1])
    room = part.room()
    for batch in part.batches():
        w = part.weights(batch, room)
        total[batch.queries] += w.sum(-1, keepdim=True)
        if mask.rate > 0:
            w.mul_(mask.draw(w))
        out[batch.queries].baddbmm_(w, part.v[batch.keys])
    return out.mul_(mask.scale / total.where(total > 0, 1.0)), total


def _backward(
    part: _Part,
    mask: DropMask,
    given: torch.Tensor,
    pulled: torch.Tensor,
    term_grad: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the gradients of q, k (times log2(e)) and v, in blocks; adds to that of the terms.

    Args:
        part: what was computed.
        mask: in the state in which the forward pass had it at this part.
        given: gradient of the output over the sum of weights, (N R, L, K).
        pulled: what all keys of a query have in common, over the sum of weights, (N R, L, 1).
        term_grad: (H, D), or None.
    """
    dq, dk, dv = (torch.zeros_like(each) for each in (part.q, part.k, part.v))
    room, other = part.room(), part.room()
    for batch in part.batches():
        mine, keys = batch.queries, batch.keys
        w, do = part.weights(batch, room), given[mine]
        ds = torch.bmm(do, part.v[keys].transpose(1, 2), out=other[: len(w)])
        if mask.rate > 0:
            kept = mask.draw(w).mul_(w)
            dv[keys].baddbmm_(kept.transpose(1, 2), do)
            ds.mul_(kept).addcmul_(w, pulled[mine], value=-1)
        else:
            dv[keys].baddbmm_(w.transpose(1, 2), do)
            ds.sub_(pulled[mine]).mul_(w)
        dq[mine].baddbmm_(ds, part.k[keys])
        dk[keys].baddbmm_(ds.transpose(1, 2), part.q[mine])
        if term_grad is not None:
            _add_diagonals(term_grad, ds, part, batch)
    return dq, dk, dv


def _add_diagonals(term_grad: torch.Tensor, ds: torch.Tensor, part: _Part, batch: _Batch) -> None:
    """Adds up the gradients of scores (n R, L, L) by distance, into (H, D)."""
    group, heads = part.layout.group, len(part.factors)
    block = group.block
    tile = ds.view(-1, heads, block, block).sum(0).flip(-1)  # (G, L, L)
    # Each row is put one further to the right than the one before; then columns are distances.
    skewed = torch.nn.functional.pad(tile, (0, block)).flatten(1)[:, : block * (2 * block - 1)]
    by_distance = skewed.view(heads, block, 2 * block - 1).sum(1)  # (G, 2 L - 1)
    start = batch.back * block - (block - 1) - part.first
    index = torch.tensor(group.heads)[:, None], torch.arange(start, start + 2 * block - 1)
    term_grad.index_put_(index, by_distance.to(term_grad.dtype), accumulate=True)
