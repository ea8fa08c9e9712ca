"""Attention by torch's FlexAttention, with a block mask that skips what cannot matter.

Shapes: `B` rows, `H` heads, `T` queries, `S` keys, `K` head width, `N` query blocks, `M` key
blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from fairseq.attention.backends.base import AttentionBackend, Prepared
from fairseq.attention.backends.request import Request
from fairseq.attention.bias import Slopes
from fairseq.attention.rules import CAUSAL
from fairseq.attention.windows import find_windows, measure_scores

__all__ = ["FlexBackend", "FlexPrepared", "block_mask"]

_BLOCK = 128
"""Queries, and keys, of a block that is computed or skipped as a whole."""


@dataclass(kw_only=True)
class FlexPrepared(Prepared):
    """What the kernel's functions read.

    Attributes:
        request: what was asked for.
        slopes: float32 (H,) on the device.
        masks: block masks that were made, by the blocks that each head looks back.
    """

    request: Request
    slopes: torch.Tensor
    masks: dict[tuple[int, ...], Any] = field(default_factory=dict)


class FlexBackend(AttentionBackend):
    """`torch.nn.attention.flex_attention`, compiled; causal linear biases, padding, documents.

    Windows are found as by `windowed`, which makes the host wait for the device once a layer, and
    rounded up to powers of two of blocks, so that few block masks are made.

    Args:
        kernel: computes flex attention; None is the compiled one.
    """

    name = "flex"

    def __init__(self, kernel: Callable[..., torch.Tensor] | None = None) -> None:
        self._kernel = kernel

    def obstacle(self, request: Request) -> str | None:
        if self._kernel is None and request.device.type != "cuda":
            return f"FlexAttention needs CUDA (no backward pass on {request.device.type})"
        if request.rule != CAUSAL:
            return "it computes causal attention alone"
        if request.bias.linear_slopes() is None or request.bias.is_learned:
            return f"{type(request.bias).__name__} is not fixed and linear in the distance"
        if not request.sees_itself:
            return "some query has no key at its own position, or positions are not a range"
        return None

    def prepare_request(self, request: Request) -> FlexPrepared:
        bias, _ = request.bias_and_rule
        slopes = bias.linear_slopes()
        assert slopes is not None
        return FlexPrepared(
            self,
            key_is_padding=request.key_is_padding,
            request=request,
            slopes=slopes.left.to(request.device),
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
        assert isinstance(prepared, FlexPrepared)
        if dropout_p > 0:
            raise ValueError(
                "--attention-backend flex has no attention dropout; set --attention-dropout 0 or "
                "choose --attention-backend auto"
            )
        scale = q.size(-1) ** -0.5 if scale is None else scale
        shift = prepared.request.shift or 0
        back = _blocks_back(q, k, v, prepared, shift, scale)
        if back not in prepared.masks:
            prepared.masks[back] = block_mask(prepared.request, back)
        slopes = prepared.slopes

        def add_bias(
            score: torch.Tensor, b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor
        ) -> torch.Tensor:
            return score - slopes[h] * (i + shift - j)

        kernel = _compiled() if self._kernel is None else self._kernel
        return kernel(q, k, v, score_mod=add_bias, block_mask=prepared.masks[back], scale=scale)


@functools.cache
def _compiled() -> Callable[..., torch.Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    compiled: Callable[..., torch.Tensor] = torch.compile(flex_attention)
    return compiled


def _blocks_back(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    prepared: FlexPrepared,
    shift: int,
    scale: float,
) -> tuple[int, ...]:
    """Returns how many blocks before its own each head has to look, rounded up."""
    most = -(-k.size(2) // _BLOCK)
    if prepared.key_is_padding is not None:
        return (most,) * q.size(1)
    slopes = Slopes(prepared.slopes, torch.full_like(prepared.slopes, torch.inf))
    has_documents = prepared.request.key_documents is not None
    windows = find_windows(
        q,
        k,
        measure_scores(q, k, v, shift, scale),
        slopes,
        shift,
        scale,
        may_average=not has_documents,
    )
    blocks = (-(-steps // _BLOCK) for steps in windows.left.tolist())
    return tuple(min(most, 1 << max(0, n - 1).bit_length()) for n in blocks)


def block_mask(request: Request, back: tuple[int, ...]) -> Any:
    """Makes the block mask of causal attention with a window for each head.

    It is made from numbers of blocks, never from a T x S tensor.

    Args:
        request: positions, padding and documents.
        back: how many blocks before that of a query each head looks.
    """
    from torch.nn.attention.flex_attention import BlockMask

    shift, device = request.shift or 0, request.device
    num_queries, num_keys = len(request.query_positions), len(request.key_positions)
    padding, mine, theirs = request.key_is_padding, request.query_documents, request.key_documents
    reach = torch.tensor(back, device=device)  # (H,)

    def is_seen(b: Any, h: Any, i: Any, j: Any) -> Any:
        seen = (j <= i + shift) & (i + shift - j <= reach[h] * _BLOCK)
        if padding is not None:
            seen = seen & ~padding[b, j]
        if mine is not None and theirs is not None:
            left = mine[i] if mine.dim() == 1 else mine[b, i]
            right = theirs[j] if theirs.dim() == 1 else theirs[b, j]
            seen = seen & (left == right)
        return seen

    starts = torch.arange(0, num_queries, _BLOCK, device=device)  # (N,)
    last = ((starts + _BLOCK - 1).clamp(max=num_queries - 1) + shift) // _BLOCK
    first = ((starts + shift - reach[:, None] * _BLOCK).clamp(min=0)) // _BLOCK  # (H, N)
    count = (last - first + 1).to(torch.int32)  # (H, N)
    num_blocks = -(-num_keys // _BLOCK)
    columns = torch.arange(num_blocks, device=device)
    indices = (first.unsqueeze(-1) + columns).clamp(max=num_blocks - 1)  # (H, N, M)
    return BlockMask.from_kv_blocks(
        count[None],
        indices.to(torch.int32)[None],
        BLOCK_SIZE=_BLOCK,
        mask_mod=is_seen,
        seq_lengths=(num_queries, num_keys),
    )
