"""Attention on CPUs that forms scores up to the diagonal, with dropout that costs little.

Shapes: `B` rows, `H` heads, `T` queries, `S` keys, `K` head width; of a block of queries: `L`
queries and the `n` keys up to the last of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fairseq.attention.backends.base import Prepared
from fairseq.attention.backends.dense import DenseBackend, DensePrepared
from fairseq.attention.backends.request import Request
from fairseq.attention.random_bits import DropMask, new_seed

__all__ = ["TriangularBackend"]

_BLOCK = 64
"""Queries of a block, at most: fewer leave out more scores, but products of few rows are slow."""


class TriangularBackend(DenseBackend):
    """Computes attention block of queries by block; each meets the keys up to its last query.

    For every bias and rule, with the mask of the other dense backends. For its gradients weights
    are kept, before and after dropout, half of the scores where it is causal.
    """

    name = "triangular"

    def obstacle(self, request: Request) -> str | None:
        """Returns why this backend cannot serve a request; None if it can."""
        if request.device.type != "cpu":
            return f"it is made for the CPU, and the model is on {request.device.type}"
        if request.dtype.itemsize < 4:
            return f"it computes in float32, and the model in {request.dtype}"
        return None

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
        assert isinstance(prepared, DensePrepared)
        scale = q.size(-1) ** -0.5 if scale is None else scale
        seed = new_seed() if dropout_p > 0 else 0
        call = _Call(prepared.causal_shift, scale, dropout_p, seed, torch.is_grad_enabled())
        # A bias may be the same for all queries, or for all keys.
        mask = prepared.mask.expand(*prepared.mask.shape[:-2], q.size(2), k.size(2))
        out: torch.Tensor = _Triangular.apply(q, k, v, mask, call)
        return out if prepared.is_blind is None else out.masked_fill(prepared.is_blind, 0.0)


@dataclass(frozen=True)
class _Call:
    """Everything about a call but its tensors.

    Attributes:
        shift: position of query 0 less that of key 0; None if queries may see keys after them.
        scale: factor of the products of queries and keys.
        drop_rate: probability that a weight is dropped.
        seed: of the weights that are dropped.
        may_need_gradients: whether weights are to be kept.
    """

    shift: int | None
    scale: float
    drop_rate: float
    seed: int
    may_need_gradients: bool

    def blocks(self, num_queries: int, num_keys: int) -> Iterator[tuple[slice, int]]:
        """Yields which queries make up a block, and how many keys they meet, the first ones."""
        num_blocks = -(-num_queries // _BLOCK)
        length = max(1, -(-num_queries // max(1, num_blocks)))
        for start in range(0, num_queries, length):
            stop = min(start + length, num_queries)
            seen = num_keys if self.shift is None else min(max(stop + self.shift, 1), num_keys)
            yield slice(start, stop), seen


class _Triangular(torch.autograd.Function):
    """The forward pass and its derivative, written out."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor,
        call: _Call,
    ) -> torch.Tensor:
        rows, heads, length, _ = q.shape
        width = v.size(-1)
        # In the order in which the layers read it, (B, T, H, K).
        out = q.new_empty(rows, length, heads, width).transpose(1, 2)
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))  # (B * H, ...)
        drop, kept = DropMask(call.drop_rate, call.seed), []
        for queries, num_keys in call.blocks(length, k.size(1)):
            block = rows, heads, queries.stop - queries.start, num_keys
            scores = q.new_empty(block).copy_(mask[..., queries, :num_keys]).flatten(0, 1)
            scores.baddbmm_(q[:, queries], k[:, :num_keys].transpose(1, 2), alpha=call.scale)
            weights = torch.softmax(scores, -1)  # (B * H, L, n)
            dropped = weights
            if drop.rate > 0:
                dropped = torch.mul(weights, drop.draw(weights), out=scores)
            result = torch.bmm(dropped, v[:, :num_keys]).view(*block[:3], width)
            torch.mul(result, drop.scale, out=out[:, :, queries])
            if call.may_need_gradients:
                kept += [weights, dropped]
        ctx.call, ctx.drop_scale, ctx.mask_shape = call, drop.scale, mask.shape
        ctx.save_for_backward(q, k, v, out, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, *kept = ctx.saved_tensors
        rows, heads, length, _ = out.shape
        # What all keys of a query have in common; see below.
        pull = (out_grad * out).sum(-1, keepdim=True).flatten(0, 1)  # (B * H, T, 1)
        given = (out_grad * ctx.drop_scale).flatten(0, 1)  # (B * H, T, K)
        mask_grad = q.new_zeros(ctx.mask_shape) if ctx.needs_input_grad[3] else None
        blocks = list(ctx.call.blocks(length, k.size(1)))
        # The last block meets most keys; what others give is added to what it gives.
        sees_all = blocks[-1][1] == k.size(1)
        dq, dk, dv = (torch.empty_like(x) if sees_all else torch.zeros_like(x) for x in (q, k, v))
        for number in reversed(range(len(blocks))):
            queries, num_keys = blocks[number]
            weights, dropped = kept[2 * number : 2 * number + 2]
            # The derivative of a score is what its value gives times its weight as it was used,
            # less its weight times what all keys of the query have in common.
            score_grad = torch.bmm(given[:, queries], v[:, :num_keys].transpose(1, 2))
            if ctx.drop_scale == 1:
                score_grad.sub_(pull[:, queries]).mul_(weights)
            else:
                score_grad.mul_(dropped).addcmul_(weights, pull[:, queries], value=-1)
            if mask_grad is not None:
                part = mask_grad[..., queries, :num_keys]
                part += score_grad.view(rows, heads, *score_grad.shape[1:]).sum_to_size(part.shape)
            torch.mul(torch.bmm(score_grad, k[:, :num_keys]), ctx.call.scale, out=dq[:, queries])
            for total, by_keys, factor, of_queries in (
                (dk, score_grad.transpose(1, 2), ctx.call.scale, q[:, queries]),
                (dv, dropped.transpose(1, 2), 1.0, given[:, queries]),
            ):
                if num_keys == k.size(1):
                    beta = int(number < len(blocks) - 1)
                    total.baddbmm_(by_keys, of_queries, beta=beta, alpha=factor)
                else:
                    total[:, :num_keys].add_(torch.bmm(by_keys, of_queries), alpha=factor)
        dq, dk, dv = (x.unflatten(0, (rows, heads)) for x in (dq, dk, dv))
        return dq, dk, dv, mask_grad, None
