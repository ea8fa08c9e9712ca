"""ALiBi by the `alibi_slopes` of FlashAttention-2, where the package flash-attn is installed."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any

import torch

from fairseq.attention.backends.base import AttentionBackend, Prepared
from fairseq.attention.backends.request import Request
from fairseq.attention.rules import BIDIRECTIONAL, CAUSAL

__all__ = ["FlashBackend", "FlashPrepared"]


@dataclass(kw_only=True)
class FlashPrepared(Prepared):
    """What `flash_attn_func` is called with.

    Attributes:
        slopes: float32 (H,) on the device; None where there is no bias.
        is_causal: whether keys after the query are hidden.
    """

    slopes: torch.Tensor | None
    is_causal: bool


class FlashBackend(AttentionBackend):
    """`flash_attn.flash_attn_func` (Dao 2023, arXiv:2307.08691), version 2.4 or later.

    Its bias is -slope * |i + S - T - j|: the last query stands at the last key. Versions 3 and 4
    know no slopes.
    """

    name = "flash"

    def obstacle(self, request: Request) -> str | None:
        if importlib.util.find_spec("flash_attn") is None:
            return "the package is not installed (pip install flash-attn)"
        if request.device.type != "cuda":
            return f"it needs CUDA, and the model is on {request.device.type}"
        if request.dtype not in (torch.float16, torch.bfloat16):
            return f"it computes in half precision (--fp16, --bf16), not in {request.dtype}"
        slopes = request.bias.linear_slopes()
        if slopes is None or request.bias.is_learned or not torch.equal(slopes.left, slopes.right):
            return f"{type(request.bias).__name__} is not fixed and linear in the distance"
        if request.rule not in (CAUSAL, BIDIRECTIONAL):
            return "it knows causal attention and both ways, no other rule"
        if not request.hides_nothing:
            return "it hides no padding and no documents"
        num_queries, num_keys = len(request.query_positions), len(request.key_positions)
        if request.shift != num_keys - num_queries:
            return "the last query must stand at the last key"
        return None

    def prepare_request(self, request: Request) -> FlashPrepared:
        bias, rule = request.bias_and_rule
        slopes = bias.linear_slopes()
        assert slopes is not None
        is_needed = bool(slopes.left.any())
        return FlashPrepared(
            self,
            slopes=slopes.left.to(request.device) if is_needed else None,
            is_causal=rule == CAUSAL,
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
        assert isinstance(prepared, FlashPrepared)
        package: Any = importlib.import_module("flash_attn")
        out: torch.Tensor = package.flash_attn_func(
            q.transpose(1, 2),  # (B, T, H, K)
            k.transpose(1, 2),
            v.transpose(1, 2),
            dropout_p=dropout_p,
            softmax_scale=scale,
            causal=prepared.is_causal,
            alibi_slopes=prepared.slopes,
        )
        return out.transpose(1, 2)
