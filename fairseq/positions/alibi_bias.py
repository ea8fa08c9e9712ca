"""The bias of ALiBi as a plain tensor, for any model."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fairseq.positions.alibi_slopes import alibi_slopes
from fairseq.positions.distance_bias import per_head

__all__ = ["alibi_bias"]


def alibi_bias(
    heads: int | Sequence[float] | torch.Tensor,
    num_queries: int,
    num_keys: int | None = None,
    *,
    bias_max: float = 8.0,
    first_query: int | None = None,
    is_causal: bool = True,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Returns what ALiBi adds to attention scores: -slope * distance, -inf for keys not seen.

    Example:
        bias = alibi_bias(8, 128)  # (8, 128, 128)
        q, k, v = (torch.randn(2, 8, 128, 64) for _ in range(3))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        step = alibi_bias(8, 1, 129)  # a new token against 129 keys, its own among them
        slopes = torch.nn.Parameter(torch.tensor(alibi_slopes(8)))  # alibi_bias(slopes, 128)

    Args:
        heads: number of heads H, or their slopes (H,), through which gradients flow.
        num_queries: T.
        num_keys: S; None is as many as queries.
        bias_max: exponent of the gentlest slope, see `alibi_slopes`; unused if slopes are given.
        first_query: position of the first query among the keys; None makes the last query stand
            at the last key.
        is_causal: hide keys after the query; otherwise they are penalised by distance too.
        dtype: of the result, which is computed in float32.
        device: of the result; None is that of the slopes.

    Returns:
        (H, T, S).

    Raises:
        ValueError: a number that is not positive, or slopes that are not one for each head.

    Source: Press, Smith, Lewis, Train Short, Test Long, ICLR 2022.
    """
    slopes = torch.as_tensor(alibi_slopes(heads, bias_max) if isinstance(heads, int) else heads)
    num_keys = num_queries if num_keys is None else num_keys
    if slopes.dim() != 1 or num_queries < 1 or num_keys < 1:
        raise ValueError(
            f"alibi_bias: {num_queries} queries, {num_keys} keys, slopes of shape "
            f"{tuple(slopes.shape)}; there must be queries and keys, and one slope for each head"
        )
    first_query = num_keys - num_queries if first_query is None else first_query
    device = slopes.device if device is None else torch.device(device)
    query = torch.arange(first_query, first_query + num_queries, device=device)
    ahead = torch.arange(num_keys, device=device) - query.unsqueeze(1)  # (T, S), > 0 if later
    bias = -per_head(slopes).to(device) * ahead.abs()
    if is_causal:
        bias = bias.masked_fill(ahead > 0, -torch.inf)
    return bias.to(dtype)
