"""ALiBi by further columns of queries and keys, for fused causal kernels without any mask.

-m (i - j) is m j less a number that is the same for all keys of a query, which softmax ignores. So
a column m / scale beside the queries and a column j beside the keys give ALiBi (Press, Smith, Lewis
2022) without a bias tensor. Numbers grow with m j, so that they need care:

* In float32 queries are taken in blocks whose positions count from the block's end: what is large
  then belongs to keys that are far away and weigh nothing.
* In half precision both factors are split into parts that the type holds exactly, position as
  256 a + b, slope as a sum; the kernels sum up in float32.

Values are padded to the width of the keys, without which fused kernels refuse.
Shapes: `B` rows, `H` heads, `T` queries, `S` keys, `K` head width, `N` queries of a block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fairseq.attention.backends.base import AttentionBackend, Prepared
from fairseq.attention.backends.request import Request
from fairseq.attention.mask import hidden_keys
from fairseq.attention.rules import CAUSAL

__all__ = ["AugmentedBackend", "AugmentedPrepared"]

_BASE = 256
_MOST_KEYS = _BASE * _BASE
"""a and b are below 256, and whole numbers up to that are exact in 8 bits."""
_LARGEST_PENALTY = 16.0
"""Of the steepest head within a block of queries, in float32."""
_SHORTEST_BLOCK = 32


@dataclass(kw_only=True)
class AugmentedPrepared(Prepared):
    """The further columns.

    Attributes:
        request: what was asked for.
        slopes: (H,) in float64 on the CPU.
    """

    request: Request
    slopes: torch.Tensor


class AugmentedBackend(AttentionBackend):
    """Torch's fused kernel on widened queries, keys and values; causal linear biases alone.

    Without a bias nothing is widened: that is the kernel's own causal attention.
    """

    name = "augmented"

    def obstacle(self, request: Request) -> str | None:
        if request.rule != CAUSAL:
            return "it computes causal attention alone"
        if request.bias.linear_slopes() is None or request.bias.is_learned:
            return f"{type(request.bias).__name__} is not fixed and linear in the distance"
        if not request.sees_itself:
            return "some query has no key at its own position, or positions are not a range"
        if len(request.key_positions) > _MOST_KEYS:
            return f"more than {_MOST_KEYS} keys cannot be told apart in half precision"
        return None

    def prepare_request(self, request: Request) -> AugmentedPrepared:
        bias, _ = request.bias_and_rule
        slopes = bias.linear_slopes()
        assert slopes is not None
        return AugmentedPrepared(
            self,
            key_is_padding=request.key_is_padding,
            request=request,
            slopes=slopes.left.double(),
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
        assert isinstance(prepared, AugmentedPrepared)
        request, width = prepared.request, q.size(-1)
        scale = width**-0.5 if scale is None else scale
        is_square = request.hides_nothing and q.size(2) == k.size(2)
        if scale <= 0:  # kernels multiply what is hidden by it too, and columns are divided by it
            q, scale = q * scale, 1.0
        steepest = float(prepared.slopes.abs().max())
        if steepest == 0 and is_square:
            return F.scaled_dot_product_attention(
                q, k, v, is_causal=True, dropout_p=dropout_p, scale=scale
            )
        if q.dtype.itemsize < 4 and is_square:
            size = k.size(2)
            wide = _widen(q, k, v, prepared.slopes, scale, size)
            out = F.scaled_dot_product_attention(
                *wide, is_causal=True, dropout_p=dropout_p, scale=scale
            )
            return out[..., :width]
        size = int(_LARGEST_PENALTY / steepest) if steepest else q.size(2)
        size = max(size, _SHORTEST_BLOCK)
        blocks = [
            self._attend_block(q, k, v, prepared, slice(start, start + size), dropout_p, scale)
            for start in range(0, q.size(2), size)
        ]
        return torch.cat(blocks, dim=2)

    def _attend_block(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        prepared: AugmentedPrepared,
        block: slice,
        dropout_p: float,
        scale: float,
    ) -> torch.Tensor:
        """Attends from a block of queries to all keys up to its end, (B, H, N, K)."""
        request = prepared.request
        shift = request.shift
        assert shift is not None
        mine = q[:, :, block]  # (B, H, N, K)
        end = block.start + mine.size(2) + shift
        wide = _widen(mine, k[:, :, :end], v[:, :, :end], prepared.slopes, scale, end)
        queries, keys = torch.arange(end - mine.size(2), end), torch.arange(end)
        is_seen = (keys <= queries.unsqueeze(-1)).to(q.device)  # (N, end)
        padding, documents = request.key_is_padding, request.query_documents
        is_hidden = hidden_keys(
            None if padding is None else padding[:, :end],
            None if documents is None else documents[..., block],
            None if request.key_documents is None else request.key_documents[..., :end],
        )
        if is_hidden is None:
            out = F.scaled_dot_product_attention(
                *wide, attn_mask=is_seen, dropout_p=dropout_p, scale=scale
            )
            return out[..., : q.size(-1)]
        is_seen = is_seen & ~is_hidden  # (B or 1, 1, N, end)
        is_blind = ~is_seen.any(-1, keepdim=True)
        out = F.scaled_dot_product_attention(
            *wide, attn_mask=is_seen | is_blind, dropout_p=dropout_p, scale=scale
        )
        return out[..., : q.size(-1)].masked_fill(is_blind, 0.0)


def _widen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    scale: float,
    end: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Appends columns whose products are slope * (key - end), and zeros, to a multiple of 8.

    Args:
        q: (B, H, N, K).
        k: (B, H, S, K), at positions end - S ... end - 1.
        v: (B, H, S, K).
        slopes: (H,).
        scale: factor of the scores.
        end: position from which the others are counted in float32; in half precision from 0.
    """
    positions = torch.arange(end - k.size(2), end, dtype=torch.float64)
    if q.dtype.itemsize < 4:
        high = positions.div(_BASE, rounding_mode="floor")
        # 256 is shared between both sides, so that neither becomes too large for float16.
        parts, shared = _exact_parts(slopes / scale, q.dtype), math.sqrt(_BASE)
        columns = [(part * factor) for part in parts for factor in (shared, 1.0)]
        rows = [high * shared, positions - high * _BASE] * len(parts)
    else:
        columns, rows = [slopes / scale], [positions - end]
    spare = -len(rows) % 8
    beside_q = F.pad(torch.stack(columns, -1), (0, spare))  # (H, C)
    beside_k = F.pad(torch.stack(rows, -1), (0, spare))  # (S, C)
    beside_q = beside_q[:, None].expand(*q.shape[:-1], -1)
    beside_k = beside_k.expand(*k.shape[:-1], -1)
    return (
        torch.cat([q, beside_q.to(q)], dim=-1),
        torch.cat([k, beside_k.to(k)], dim=-1),
        F.pad(v, (0, beside_q.size(-1))),
    )


def _exact_parts(numbers: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """Splits numbers (H,) into parts that a half type holds exactly, until nothing is left of
    what float32 would keep."""
    parts: list[torch.Tensor] = []
    rest = numbers
    while len(parts) < 4 and (not parts or bool((rest.abs() > numbers.abs() * 2**-22).any())):
        parts.append(rest.to(dtype).double())
        rest = rest - parts[-1]
    return parts
