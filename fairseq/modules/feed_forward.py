"""The feed-forward net of a layer in one piece: two products, with relu and dropout in place.

Shapes: `N` tokens, `D` width, `F` inner width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from fairseq.modules.basic import is_plain_linear
from fairseq.modules.dropout import is_fast, is_full_on_cpu, relu_dropout, relu_dropout_

__all__ = ["relu_feed_forward"]


def relu_feed_forward(x: torch.Tensor, fc1: nn.Linear, fc2: nn.Linear, p: float) -> torch.Tensor:
    """Returns fc2(dropout(relu(fc1(x)))).

    In float32 and float64 on a CPU one tensor of inner values is made in either direction, and
    changed in place.

    Args:
        x: (..., D).
        fc1: D to F.
        fc2: F to D.
        p: probability of zero, in [0, 1].
    """
    if not _is_in_one(x, fc1, fc2, p):
        out: torch.Tensor = fc2(relu_dropout(fc1(x), p))
        return out
    weights = (fc1.weight, fc1.bias, fc2.weight, fc2.bias)
    out = _ReluFeedForward.apply(x.reshape(-1, x.size(-1)), *weights, p)
    return out.view(*x.shape[:-1], -1)


def _is_in_one(x: torch.Tensor, fc1: nn.Module, fc2: nn.Module, p: float) -> bool:
    return (
        is_full_on_cpu(x)
        and (p == 0 or is_fast(x, p))
        and not torch.is_autocast_enabled("cpu")
        and all(is_plain_linear(part) and part.bias is not None for part in (fc1, fc2))
    )


class _ReluFeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        in_weight: torch.Tensor,
        in_bias: torch.Tensor,
        out_weight: torch.Tensor,
        out_bias: torch.Tensor,
        p: float,
    ) -> torch.Tensor:
        inner = torch.addmm(in_bias, x, in_weight.t())  # (N, F)
        ctx.scale = relu_dropout_(inner, p)
        ctx.save_for_backward(x, in_weight, out_weight, inner)
        return torch.addmm(out_bias, inner, out_weight.t())  # (N, D)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, in_weight, out_weight, inner = ctx.saved_tensors
        needs_x, *needs_in, needs_out_weight, needs_out_bias, _ = ctx.needs_input_grad
        out_weight_grad = grad.t() @ inner if needs_out_weight else None
        out_bias_grad = grad.sum(0) if needs_out_bias else None
        inner_grad = grad @ out_weight  # (N, F)
        # A value that is positive has passed relu and dropout.
        torch.ops.aten.threshold_backward.grad_input(inner_grad, inner, 0, grad_input=inner_grad)
        if ctx.scale != 1:
            inner_grad.mul_(ctx.scale)
        return (
            inner_grad @ in_weight if needs_x else None,
            inner_grad.t() @ x if needs_in[0] else None,
            inner_grad.sum(0) if needs_in[1] else None,
            out_weight_grad,
            out_bias_grad,
            None,
        )
