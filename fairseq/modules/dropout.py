"""Dropout that costs a CPU a fraction of what torch's does.

16 bits from a fast generator (`fairseq.attention.random_bits`) decide about an element: it is
zeroed if they are below p * 65536 as a number. The others are divided by the probability with which
that does not happen, so that the expected value is the input exactly.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from fairseq.attention.random_bits import LEVELS, bit_generator, new_seed

__all__ = [
    "Dropout",
    "dropout",
    "dropout_mask",
    "is_fast",
    "is_full_on_cpu",
    "relu_dropout",
    "relu_dropout_",
]

# Elements that are worked on together; they stay in the cache from one operation to the next.
_CHUNK = 1 << 16


def dropout_mask(like: torch.Tensor, p: float) -> torch.Tensor:
    """Draws what dropout multiplies with, for a tensor of float32 or float64 on the CPU.

    One number is drawn from torch's default generator; it, and the worker's rank, seed all bits.
    So masks follow from `torch.manual_seed`, and from a restored generator state, to the bit.

    Args:
        like: gives shape and dtype.
        p: probability of zero, in [0, 1); rounded to a multiple of 1 / 65536.

    Returns:
        0 where an element is zeroed, else 1 / (1 - p) for the rounded p.
    """
    threshold = round(p * LEVELS)
    scale = LEVELS / (LEVELS - threshold)
    mask = torch.empty(like.shape, dtype=like.dtype)
    bits = bit_generator(new_seed())
    for part in mask.view(-1).split(_CHUNK):
        part.copy_(_is_kept(bits, part.numel(), threshold)).mul_(scale)
    return mask


def _is_kept(bits: np.random.SFC64, count: int, threshold: int) -> torch.Tensor:
    """Draws ones and zeros, uint8, zeros with probability threshold / 65536."""
    words = bits.random_raw((count + 3) // 4)  # 64 bits each
    is_kept = words.view(np.uint16)[:count] >= threshold
    return torch.from_numpy(is_kept.view(np.uint8))


def dropout(x: torch.Tensor, p: float, *, add_to: torch.Tensor | None = None) -> torch.Tensor:
    """Zeroes elements with probability `p` and divides the others by 1 - p.

    On other devices, in half precision, under a compiler, and for a `p` closer to 0 or 1 than
    1 / 131072 this is torch's own dropout.

    Args:
        x: any shape.
        p: probability of zero, in [0, 1].
        add_to: what the result is added to, of the shape of `x`; None adds nothing.
    """
    if p == 0:
        return x if add_to is None else add_to + x
    if not is_fast(x, p):
        x = F.dropout(x, p)
        return x if add_to is None else add_to + x
    mask = dropout_mask(x, p)
    return x * mask if add_to is None else torch.addcmul(add_to, x, mask)


def relu_dropout(x: torch.Tensor, p: float) -> torch.Tensor:
    """Returns dropout of relu of `x`.

    Backward needs the result alone: the gradient passes where the result is positive. So neither
    the mask nor relu's own result is kept.

    Args:
        x: any shape.
        p: probability of zero, in [0, 1].
    """
    if p == 0 or not is_fast(x, p):
        return dropout(F.relu(x), p)
    out: torch.Tensor = _ReluDropout.apply(x, p)
    return out


class _ReluDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, p: float) -> torch.Tensor:
        out = torch.empty(x.shape, dtype=x.dtype).copy_(x)
        ctx.scale = relu_dropout_(out, p)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (out,) = ctx.saved_tensors
        return torch.ops.aten.threshold_backward(grad, out, 0).mul_(ctx.scale), None


def relu_dropout_(x: torch.Tensor, p: float) -> float:
    """Changes a contiguous tensor into dropout of its relu; autograd does not hear of it.

    Args:
        x: float32 or float64, on the CPU.
        p: probability of zero, in [0, 1).

    Returns:
        What is left was multiplied by this.
    """
    threshold = round(p * LEVELS)
    if threshold == 0:
        x.clamp_min_(0)
        return 1.0
    scale = LEVELS / (LEVELS - threshold)
    bits = bit_generator(new_seed())
    mask = torch.empty(min(_CHUNK, x.numel()), dtype=x.dtype)
    for piece in x.view(-1).split(_CHUNK):
        factors = mask[: len(piece)].copy_(_is_kept(bits, len(piece), threshold)).mul_(scale)
        piece.clamp_min_(0).mul_(factors)
    return scale


def is_fast(x: torch.Tensor, p: float) -> bool:
    """Tells whether elements are dropped by the generator here, and not by torch's."""
    return is_full_on_cpu(x) and 0 < round(p * LEVELS) < LEVELS


def is_full_on_cpu(x: torch.Tensor) -> bool:
    """Tells whether a tensor is one of float32 or float64 on the CPU, outside of a compiler."""
    return (
        type(x) is torch.Tensor  # not one that is cut over processes
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and not torch.compiler.is_compiling()
    )


class Dropout(nn.Dropout):
    """`nn.Dropout` by `dropout`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return dropout(x, self.p) if self.training else x
