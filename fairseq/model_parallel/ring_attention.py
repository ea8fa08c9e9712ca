"""Attention over a sequence in parts, with keys and values that go round.

Every process keeps its queries; the keys and values of the others pass by, one part at a time. So a
process never holds more than two parts of keys and values and one tile of scores, in the forward
pass and in the backward pass, where the gradients of keys and values travel with them.
Source: Liu et al. 2023, Ring Attention with Blockwise Transformers, arXiv:2310.01889.

Shapes: `B` rows, `H` heads, `T` columns of one process, `K` head width, `L` learned tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fairseq.model_parallel.block_attention import (
    BlockScores,
    Gradients,
    Known,
    Places,
    RunningSoftmax,
    Tile,
    accumulate_gradients,
    sum_type,
    tiles,
)
from fairseq.model_parallel.collectives import RingOfProcesses
from fairseq.model_parallel.learned_bias import learned_tensors, with_tensors

__all__ = ["RingPlan", "ring_attention"]


@dataclass(frozen=True)
class Pair:
    """A run of own queries and a run of keys that they may see, and where both stand."""

    queries: range
    keys: range
    query_places: Places
    key_places: Places


@dataclass(frozen=True)
class RingPlan:
    """What stays the same for all layers of a forward pass.

    Attributes:
        ring: the processes.
        places: for each process, where each run of successive columns that it holds stands.
        runs: the same runs, counted among its T columns; alike on every process.
    """

    ring: RingOfProcesses
    places: Sequence[Sequence[Places]]
    runs: Sequence[range]

    def pairs(self, owner: int, block: BlockScores) -> Iterator[Pair]:
        """Yields runs of own queries with runs of the owner's keys of which some may be seen."""
        for queries, query_places in zip(self.runs, self.places[self.ring.rank], strict=True):
            for keys, key_places in zip(self.runs, self.places[owner], strict=True):
                if block.can_see(query_places, key_places):
                    yield Pair(queries, keys, query_places, key_places)


def ring_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: RingPlan,
    block: BlockScores,
) -> torch.Tensor:
    """Attends from this process's queries to the keys of all processes.

    Args:
        q: (B, H, T, K).
        k: (B, H, T, K).
        v: (B, H, T, K).
        plan: who holds which columns.
        block: bias, rule, scale and dropout.

    Returns:
        (B, H, T, K) in the dtype of q; a query that sees no key gets zeros.
    """
    learned = learned_tensors(block.bias) if torch.is_grad_enabled() else []
    seed = int(torch.randint(2**62, ())) if block.dropout_p > 0 else 0
    out: torch.Tensor = _Ring.apply(q, k, v, plan, block, seed, *learned)
    return out


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        plan: RingPlan,
        block: BlockScores,
        seed: int,
        *learned: torch.Tensor,
    ) -> torch.Tensor:
        ctx.plan, ctx.block, ctx.seed = plan, block, seed
        block = _seeded(_with_bias(block, [each.detach() for each in learned]), seed, q.device)
        softmax = RunningSoftmax(q)
        for owner, keys, values in _passing_by(k, v, plan.ring):
            for pair in plan.pairs(owner, block):
                k_part, v_part = _part(keys, pair.keys), _part(values, pair.keys)
                for tile in _tiles(pair, k_part):
                    softmax.add(tile, q, k_part, v_part, block)
        out = softmax.out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, softmax.lse, *learned)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        q, k, v, out, lse, *learned = ctx.saved_tensors
        plan: RingPlan = ctx.plan
        dtype = sum_type(q)
        grad_out = grads[0].to(dtype)
        leaves = [each.detach().requires_grad_() for each in learned]
        block = _seeded(_with_bias(ctx.block, leaves), ctx.seed, q.device)
        grad_q = torch.zeros_like(q, dtype=dtype)
        sums = Gradients(grad_q, grad_q, grad_q, [torch.zeros_like(each) for each in leaves])
        known = Known(lse, grad_out, (grad_out * out).sum(-1), leaves)
        arriving: torch.Tensor | None = None
        for owner, keys, values in _passing_by(k, v, plan.ring):
            travelling = torch.zeros(2, *k.shape, dtype=dtype, device=k.device)
            for pair in plan.pairs(owner, block):
                k_part, v_part = _part(keys, pair.keys), _part(values, pair.keys)
                sums.k, sums.v = (_part(each, pair.keys) for each in travelling)
                for tile in _tiles(pair, k_part):
                    accumulate_gradients(tile, q, k_part, v_part, block, known, into=sums)
            if arriving is not None:
                travelling += arriving
            arriving = plan.ring.hand_on(travelling).wait()
        assert arriving is not None
        grad_k, grad_v = arriving.to(k.dtype).unbind()
        return grad_q.to(q.dtype), grad_k, grad_v, None, None, None, *sums.learned


def _passing_by(
    k: torch.Tensor, v: torch.Tensor, ring: RingOfProcesses
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yields (owner, keys, values) of every process once; the next ones travel meanwhile."""
    here = torch.stack([k, v])
    for step in range(ring.size):
        pending = ring.hand_on(here) if step < ring.size - 1 else None
        yield ring.owner(step), here[0], here[1]
        if pending is not None:
            here = pending.wait()


def _part(x: torch.Tensor, columns: range) -> torch.Tensor:
    return x[:, :, columns.start : columns.stop]


def _tiles(pair: Pair, keys: torch.Tensor) -> Iterator[Tile]:
    rows, heads, num_keys, _ = keys.shape
    first = pair.queries.start
    for each in tiles(len(pair.queries), rows * heads * num_keys):
        here = slice(first + each.start, first + each.stop)
        yield Tile(here, pair.query_places.at(each), pair.key_places)


def _with_bias(block: BlockScores, learned: Sequence[torch.Tensor]) -> BlockScores:
    return replace(block, bias=with_tensors(block.bias, learned)) if learned else block


def _seeded(block: BlockScores, seed: int, device: torch.device) -> BlockScores:
    """Returns the same with a generator at its start, so that both passes draw the same."""
    if block.dropout_p == 0:
        return block
    return replace(block, generator=torch.Generator(device).manual_seed(seed))
