"""Attention by torch's fused kernels, with a dense mask."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fairseq.attention.backends.base import Prepared
from fairseq.attention.backends.dense import DenseBackend, DensePrepared

__all__ = ["SdpaBackend"]


class SdpaBackend(DenseBackend):
    """`scaled_dot_product_attention`; on a CPU its fused path has no dropout."""

    name = "sdpa"

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
        mask = prepared.mask
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask if mask.dim() == 4 else mask.unsqueeze(0),
            dropout_p=dropout_p,
            scale=scale,
        )  # (B, H, T, K)
        return out if prepared.is_blind is None else out.masked_fill(prepared.is_blind, 0.0)
