"""The norm of all gradients, and clipping by it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from fairseq.utils import local_part

__all__ = ["clip_grad_norm_"]

CLIP_EPSILON = 1e-6


@torch.no_grad()
def clip_grad_norm_(
    params: torch.Tensor | Iterable[torch.Tensor],
    max_norm: float,
    aggregate_norm_fn: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Scales gradients in place so that their common 2-norm is at most `max_norm`.

    The norm is the 2-norm of the gradients' own 2-norms, each summed in float32, which are the
    numbers training logs have had: in one pass or in float64 they differ in the fifth digit for
    large embeddings.

    Args:
        params: a parameter or several; those without a gradient are passed over.
        max_norm: largest norm allowed; 0 or less only measures. Gradients are multiplied by
            min(1, max_norm / (norm + 1e-6)).
        aggregate_norm_fn: takes this worker's norm to the norm over all workers, where each holds
            a shard of the gradients. A parameter's attribute `num_copies` says on how many of them
            the same gradient lies, so that it is counted once.

    Returns:
        The norm before clipping, a float32 scalar on the gradients' device.
    """
    params = [params] if isinstance(params, torch.Tensor) else list(params)
    device = params[0].device if params else None
    params = [p for p in params if p.grad is not None]
    grads = [local_part(p.grad) for p in params if p.grad is not None]
    if grads:
        norms = list(torch._foreach_norm(grads, 2, dtype=torch.float32))
        for i, param in enumerate(params):
            num_copies = getattr(param, "num_copies", 1)
            if num_copies > 1:
                norms[i] = norms[i] / num_copies**0.5
        norm = torch.linalg.vector_norm(torch.stack(norms)) if len(norms) > 1 else norms[0]
    else:
        norm = torch.zeros((), device=device)
    if aggregate_norm_fn is not None:
        norm = aggregate_norm_fn(norm)
    if max_norm > 0:
        coefficient = (float(max_norm) / (norm + CLIP_EPSILON)).clamp_(max=1.0)
        torch._foreach_mul_(grads, coefficient.to(grads[0].device)) if grads else None
    return norm
