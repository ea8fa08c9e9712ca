"""The attention call that every layer makes: softmax(q k' * scale + bias) v."""

from __future__ import annotations

import torch

from fairseq.attention.backends.base import Prepared

__all__ = ["attend"]


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    prepared: Prepared,
    *,
    dropout_p: float = 0.0,
    scale: float | None = None,
) -> torch.Tensor:
    """Computes attention with what a backend prepared once for all layers.

    A query that may see no key gets zeros.

    Args:
        q: queries, (B, H, T, K).
        k: keys, (B, H, S, K).
        v: values, (B, H, S, K).
        prepared: bias and mask, made by a backend's `prepare` for these T queries and S keys.
        dropout_p: probability that a weight is dropped; give 0 outside training.
        scale: factor of the scores; None is 1 / sqrt(K).

    Returns:
        (B, H, T, K).
    """
    return prepared.backend.attend(q, k, v, prepared, dropout_p=dropout_p, scale=scale)
