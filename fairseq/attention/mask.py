"""The dense mask that says who may see whom together with the bias.

A mask is what is added to attention scores: the bias where a key may be seen, -inf where not.
Shapes: `B` rows, `H` heads, `T` queries, `S` keys.
"""

from __future__ import annotations

import copy

import numpy as np
import torch

from fairseq.attention.bias import AttentionBias, Positions
from fairseq.attention.rules import BIDIRECTIONAL, CAUSAL, AttentionRule, MaskRule

__all__ = ["BIDIRECTIONAL", "CAUSAL", "FutureMaskBuffer", "MaskRule", "hidden_keys", "join"]


def join(
    bias: AttentionBias,
    rule: AttentionRule,
    query_positions: Positions,
    key_positions: Positions,
    *,
    dtype: torch.dtype,
    device: torch.device | None = None,
) -> torch.Tensor:
    """Returns bias and rule as one mask, (H, T, S) or (B, H, T, S), made in float32, cast last."""
    mask = bias.dense(query_positions, key_positions, device=device)
    is_allowed = rule.is_allowed(query_positions, key_positions, device=device)
    if is_allowed is not None:
        is_hidden = is_allowed.logical_not_()
        has_room = np.broadcast_shapes(mask.shape, is_hidden.shape) == mask.shape
        if has_room and not bias.is_learned:
            mask.masked_fill_(is_hidden, -torch.inf)
        else:
            mask = mask.masked_fill(is_hidden, -torch.inf)
    return mask.to(dtype)


def hidden_keys(
    key_is_padding: torch.Tensor | None = None,
    query_documents: torch.Tensor | None = None,
    key_documents: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Returns which keys a query may not see for reasons other than position.

    Args:
        key_is_padding: bool (B, S).
        query_documents: number of each query's document, (T,) or (B, T).
        key_documents: number of each key's document, (S,) or (B, S).

    Returns:
        bool (B or 1, 1, T or 1, S), True where hidden; None if nothing is.

    Raises:
        ValueError: only one of the two document arguments is given.
    """
    if (query_documents is None) != (key_documents is None):
        raise ValueError("query_documents and key_documents must be given together")
    is_hidden = None
    if key_is_padding is not None:
        is_hidden = key_is_padding[:, None, None, :]  # (B, 1, 1, S)
    if query_documents is not None and key_documents is not None:
        is_foreign = query_documents.unsqueeze(-1) != key_documents.unsqueeze(-2)
        is_foreign = is_foreign.view(-1, 1, *is_foreign.shape[-2:])  # (B or 1, 1, T, S)
        is_hidden = is_foreign if is_hidden is None else is_hidden | is_foreign
    return is_hidden


class FutureMaskBuffer:
    """The square mask of successive positions, kept and cut to the length that is asked for.

    The mask of length L holds those of all shorter inputs. It is made again for a longer input, or
    another dtype or device. A learned bias is not kept.

    Args:
        bias: what is added where a key may be seen, the same for all rows.
        rule: which keys may be seen, the same for all rows.
    """

    def __init__(self, bias: AttentionBias, rule: AttentionRule = CAUSAL) -> None:
        self.bias = bias
        self.rule = rule
        self._mask: torch.Tensor | None = None

    def get(self, length: int, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Returns the mask of `length` successive positions, (H, length, length)."""
        if self.bias.is_learned:
            return self._make(length, dtype, device)
        mask = self._mask
        is_current = mask is not None and mask.dtype == dtype and mask.device == device
        if mask is None or not is_current or mask.size(-1) < length:
            self._mask = mask = None  # frees the old one before the new one is made
            # A tensor made in inference mode could not take part in training later.
            with torch.inference_mode(False):
                self._mask = mask = self._make(length, dtype, device)
        return mask[:, :length, :length]

    def _make(self, length: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        positions = range(length)
        mask = join(self.bias, self.rule, positions, positions, dtype=dtype, device=device)
        return mask.expand(self.bias.num_heads, -1, -1)

    def __deepcopy__(self, memo: dict[int, object]) -> FutureMaskBuffer:
        """Copies no mask: a copied model makes its own when it needs one."""
        return FutureMaskBuffer(copy.deepcopy(self.bias, memo), self.rule)
