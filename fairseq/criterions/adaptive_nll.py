"""Negative log-likelihood from the bands of an adaptive softmax.

An adaptive softmax (Grave et al. 2017, Efficient softmax approximation for GPUs) has a head over
the frequent words and one class for each band of rarer words, and a tail over the words of each
band. The likelihood of a rare word is that of its class times that of the word in its tail, so the
loss is a sum of cross entropies and the whole vocabulary is never formed.

Shapes: N target positions, N_i of them in band i.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fairseq.distributed.vocabulary_scores import ScoresInParts, scores_in_parts

__all__ = ["adaptive_nll"]


def adaptive_nll(
    adaptive_softmax: Any,
    features: torch.Tensor,
    target: torch.Tensor,
    *,
    pad: int,
    tail_pad: int | None,
    reduce: bool = True,
) -> torch.Tensor:
    """Sums the cross entropies of head and tails, in nats and in float32.

    Args:
        adaptive_softmax: called with (features, target); returns the logits of the head and of
            each tail that has targets (None for the others), and their targets.
        features: (B, T, D), the decoder's output.
        target: (N,) word ids, N = B * T.
        pad: word id that counts nothing.
        tail_pad: id *within a tail* that counts nothing there; None counts every word.
        reduce: sum over positions; otherwise returns one value for each.

    Returns:
        A scalar, or (N,) without `reduce`.
    """
    with scores_in_parts():
        logits, targets = adaptive_softmax(features, target)
    (head_logits, *tail_logits), (head_target, *tail_targets) = logits, targets
    loss = _cross_entropy(head_logits, head_target, pad, reduce)
    first_class = _num_columns(head_logits) - len(tail_logits)
    for band, (scores, relative) in enumerate(zip(tail_logits, tail_targets, strict=True)):
        if scores is None:
            continue
        tail_loss = _cross_entropy(scores, relative, -100 if tail_pad is None else tail_pad, reduce)
        if reduce:
            loss = loss + tail_loss
        else:
            rows = head_target.eq(first_class + band).nonzero().squeeze(1)  # (N_i,)
            loss = loss.index_add(0, rows, tail_loss)
    return loss


def _num_columns(logits: torch.Tensor | ScoresInParts) -> int:
    return logits.num_words if isinstance(logits, ScoresInParts) else logits.size(-1)


def _cross_entropy(
    logits: torch.Tensor | ScoresInParts, target: torch.Tensor, ignore_index: int, reduce: bool
) -> torch.Tensor:
    if isinstance(logits, ScoresInParts):
        losses = -logits.log_probs(target)[0].masked_fill(target == ignore_index, 0.0)
    else:
        losses = _CrossEntropy.apply(logits, target, ignore_index)
    return losses.sum() if reduce else losses


class _CrossEntropy(torch.autograd.Function):
    """-log softmax at the targets, (N,), whose backward pass writes one (N, V) tensor, once."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, target: torch.Tensor, ignore_index: int
    ) -> torch.Tensor:
        # In half precision a sum over a batch overflows, and the softmax loses its small terms.
        log_probs = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
        is_counted = target != ignore_index
        target = target.where(is_counted, 0).unsqueeze(1)
        ctx.save_for_backward(log_probs, target, is_counted)
        ctx.dtype = logits.dtype
        return -log_probs.gather(1, target).squeeze(1) * is_counted

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        log_probs, target, is_counted = ctx.saved_tensors
        grad = (grad * is_counted).unsqueeze(1)
        out = log_probs.exp()
        out.scatter_add_(1, target, torch.full_like(grad, -1.0))
        return out.mul_(grad).to(ctx.dtype), None, None
