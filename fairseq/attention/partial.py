"""Attention to a part of the keys, and how parts are put together.

Softmax over all keys is a weighted mean of softmaxes over parts of them, each weighted by the
exponential of its log-sum-exp. So a sequence can be cut into blocks of queries and blocks of keys
(Rabe and Staats 2021, arXiv:2112.05682; Liu et al. 2023, arXiv:2310.01889).
Shapes: `B` rows, `H` heads, `T` queries, `S` keys, `K` head width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from fairseq.attention.backends.reference import ReferenceBackend
from fairseq.attention.backends.request import Request
from fairseq.attention.bias import AttentionBias, Positions
from fairseq.attention.rules import CAUSAL, AttentionRule

__all__ = ["Part", "attend_with_lse", "merge_parts"]

Part = tuple[torch.Tensor, torch.Tensor]
"""Output (B, H, T, K) over some of the keys, and log-sum-exp of the scores (B, H, T)."""


def attend_with_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: AttentionBias,
    query_positions: Positions,
    key_positions: Positions,
    *,
    rule: AttentionRule = CAUSAL,
    key_is_padding: torch.Tensor | None = None,
    query_documents: torch.Tensor | None = None,
    key_documents: torch.Tensor | None = None,
    head_slice: slice | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
) -> Part:
    """Computes attention to a part of the keys, with what is needed to join it to other parts.

    Gradients flow through both results. A query that sees none of these keys gets zeros and a
    log-sum-exp of -inf. Both orders of positions are allowed: keys may lie before the queries,
    after them, or among them.

    Args:
        q: queries, (B, H, T, K).
        k: keys, (B, H, S, K).
        v: values, (B, H, S, K).
        bias: what is added to the scores.
        query_positions: positions of the T queries in the whole sequence.
        key_positions: positions of the S keys in the whole sequence.
        rule: which keys a query may see.
        key_is_padding: bool (B, S), keys that no query may see.
        query_documents: (T,) or (B, T), see `AttentionBackend.prepare`.
        key_documents: (S,) or (B, S).
        head_slice: which heads of `bias` these are; None is all of them.
        dropout_p: probability that a weight is dropped; the log-sum-exp is of all of them.
        scale: factor of the scores; None is 1 / sqrt(K).

    Returns:
        (output (B, H, T, K) in the dtype of q, log-sum-exp (B, H, T) in float32, in nats).
    """
    backend = ReferenceBackend()
    dtype = torch.promote_types(q.dtype, torch.float32)
    request = Request(
        bias=bias,
        query_positions=query_positions,
        key_positions=key_positions,
        rule=rule,
        key_is_padding=key_is_padding,
        query_documents=query_documents,
        key_documents=key_documents,
        head_slice=head_slice,
        dtype=dtype,
        device=q.device,
    )
    prepared = backend.prepare_request(request)
    scores = backend.scores(q.to(dtype), k.to(dtype), prepared, scale=scale)  # (B, H, T, S)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.unsqueeze(-1))
    if dropout_p > 0:
        weights = F.dropout(weights, dropout_p)
    out = torch.matmul(weights.to(q.dtype), v)
    if prepared.is_blind is not None:
        out = out.masked_fill(prepared.is_blind, 0.0)
        lse = lse.masked_fill(prepared.is_blind.squeeze(-1), -torch.inf)
    return out, lse


def merge_parts(parts: Sequence[Part]) -> Part:
    """Joins attention to several parts of the keys into attention to all of them.

    Args:
        parts: results of `attend_with_lse` for the same queries and disjoint keys.

    Returns:
        What `attend_with_lse` would give for all these keys at once.

    Raises:
        ValueError: there is no part.
    """
    if not parts:
        raise ValueError("merge_parts needs the results of at least one part of the keys")
    lses = torch.stack([lse for _, lse in parts])  # (N, B, H, T)
    # A query that sees no key of any part has -inf throughout; 0 keeps its shares at zero, not NaN.
    highest = lses.detach().amax(0)
    shares = torch.exp(lses - highest.where(highest > -torch.inf, 0.0))  # (N, B, H, T)
    total = shares.sum(0)
    is_seen = total > 0
    shares = (shares / total.where(is_seen, 1.0)).unsqueeze(-1)
    out = sum(share * part for share, (part, _) in zip(shares, parts, strict=True))
    assert isinstance(out, torch.Tensor)
    lse = highest + total.where(is_seen, 1.0).log()
    return out.to(parts[0][0].dtype), lse
