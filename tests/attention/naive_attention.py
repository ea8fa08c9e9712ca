"""Attention by loops over rows, heads, queries and keys, in float64."""

from __future__ import annotations

import math

import pytest
import torch

DENSE = ["reference", "sdpa"]
SELECTIVE = ["augmented", "triangular", "windowed"]
ON_CPU = [*DENSE, *SELECTIVE, "auto"]


def prepare_or_skip(backend, *args, **options):
    """Prepares; a selective backend that says it cannot, naming itself, is left out.

    What each may leave out is tested in test_selective.py.
    """
    try:
        return backend.prepare(*args, **options)
    except ValueError as error:
        if backend.name not in SELECTIVE:
            raise
        assert str(error).startswith(f"--attention-backend {backend.name}: ")
        pytest.skip(str(error))


def naive_attention(q, k, v, term, may_see):
    """Computes softmax(q k' / sqrt(K) + term) v over the keys a query may see, zero for none.

    Args:
        q: (B, H, T, K); k, v: (B, H, S, K).
        term: function (row, head, query index, key index) -> number added to the score.
        may_see: function (row, query index, key index) -> bool.
    """
    q, k, v = q.double(), k.double(), v.double()
    out = torch.zeros(q.shape, dtype=torch.float64)
    for b in range(q.size(0)):
        for h in range(q.size(1)):
            for i in range(q.size(2)):
                keys = [j for j in range(k.size(2)) if may_see(b, i, j)]
                if not keys:
                    continue
                scores = [
                    torch.dot(q[b, h, i], k[b, h, j]) / math.sqrt(q.size(-1)) + term(b, h, i, j)
                    for j in keys
                ]
                weights = torch.softmax(torch.stack(scores), 0)
                out[b, h, i] = sum(w * v[b, h, j] for w, j in zip(weights, keys, strict=True))
    return out
