"""Keeping hypotheses from repeating themselves.

Shapes: `N` hypotheses, `S` tokens so far, `V` words.
"""

from __future__ import annotations

import torch

__all__ = ["block_repeated_ngrams"]


def block_repeated_ngrams(
    log_probs: torch.Tensor, tokens: torch.Tensor, size: int, skipped: torch.Tensor
) -> None:
    """Makes every word impossible that would repeat an n-gram of its hypothesis.

    Args:
        log_probs: of each next word, (N, V); changed in place.
        tokens: hypotheses without their start symbol, int64 (N, S).
        size: words of an n-gram, at least 1.
        skipped: first tokens of each hypothesis that do not count, int64 (N,).
    """
    if tokens.size(1) < size:
        return
    ngrams = tokens.unfold(1, size, 1)  # (N, S - size + 1, size)
    tail = tokens[:, tokens.size(1) - size + 1 :].unsqueeze(1)  # (N, 1, size - 1)
    is_begun = ngrams[:, :, :-1].eq(tail).all(dim=-1)  # true for each if size is 1
    first = torch.arange(ngrams.size(1), device=tokens.device)
    is_begun &= first >= skipped.unsqueeze(1)
    row, column = is_begun.nonzero(as_tuple=True)
    log_probs[row, ngrams[row, column, -1]] = -torch.inf
