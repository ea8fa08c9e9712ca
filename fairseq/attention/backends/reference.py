"""Attention as it is written in papers: two products with a softmax in between."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fairseq.attention.backends.base import Prepared
from fairseq.attention.backends.dense import DenseBackend, DensePrepared
from fairseq.attention.random_bits import DropMask, new_seed

__all__ = ["ReferenceBackend"]


class ReferenceBackend(DenseBackend):
    """Forms every score; the softmax is computed in float32."""

    name = "reference"

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
        scores = self.scores(q, k, prepared, scale=scale)
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
        if dropout_p > 0:
            weights = _drop(weights, dropout_p)
        out = torch.matmul(weights, v)  # (B, H, T, K)
        return out if prepared.is_blind is None else out.masked_fill(prepared.is_blind, 0.0)

    def scores(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        prepared: DensePrepared,
        *,
        scale: float | None = None,
    ) -> torch.Tensor:
        """Returns what the softmax is taken of, (B, H, T, S): -inf where a key is not seen."""
        scale = q.size(-1) ** -0.5 if scale is None else scale
        scores = torch.matmul(q * scale, k.transpose(-2, -1))
        scores += prepared.mask
        return scores


def _drop(weights: torch.Tensor, rate: float) -> torch.Tensor:
    if weights.device.type != "cpu" or weights.dtype is not torch.float32:
        return F.dropout(weights, rate)
    mask = DropMask(rate, new_seed())
    return weights * mask.draw(weights).mul_(mask.scale)
