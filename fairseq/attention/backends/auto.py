"""Chooses the faster of the dense backends for each call."""

from __future__ import annotations

import torch

from fairseq.attention.backends.base import Prepared
from fairseq.attention.backends.dense import DenseBackend
from fairseq.attention.backends.reference import ReferenceBackend
from fairseq.attention.backends.sdpa import SdpaBackend

__all__ = ["AutoBackend"]


class AutoBackend(DenseBackend):
    """The fused kernel, except with dropout on a CPU.

    There dropout takes `scaled_dot_product_attention` off its fused path, on to one slower than
    two products with a softmax in between.
    """

    name = "auto"

    def __init__(self) -> None:
        super().__init__()
        self._reference = ReferenceBackend()
        self._sdpa = SdpaBackend()

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
        is_plain = dropout_p > 0 and q.device.type == "cpu"
        kernel = self._reference if is_plain else self._sdpa
        return kernel.attend(q, k, v, prepared, dropout_p=dropout_p, scale=scale)
