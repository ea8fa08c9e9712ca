"""What the backends with a dense mask share: they differ in the kernel alone.

Shapes: `B` rows, `H` heads, `T` queries, `S` keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fairseq.attention.backends.base import AttentionBackend, Prepared
from fairseq.attention.bias import AttentionBias, Positions
from fairseq.attention.mask import CAUSAL, FutureMaskBuffer, MaskRule, hidden_keys, join

__all__ = ["DenseBackend", "DensePrepared"]


@dataclass(kw_only=True)
class DensePrepared(Prepared):
    """A bias as a dense mask.

    Attributes:
        mask: (H, T, S) or (B, H, T, S), added to the scores.
        is_blind: bool (B, 1, T, 1), queries that may see no key; None where each sees one. Their
            rows of the mask are open, so that the softmax is defined, and their output is zero.
    """

    mask: torch.Tensor
    is_blind: torch.Tensor | None = None


class DenseBackend(AttentionBackend):
    """Prepares the buffered future mask; `attend` is left to the kernels."""

    def __init__(self) -> None:
        self._buffer: FutureMaskBuffer | None = None
        self._buffered_for: tuple[AttentionBias, MaskRule, slice | None] | None = None

    def future_mask(
        self,
        bias: AttentionBias,
        length: int,
        *,
        rule: MaskRule = CAUSAL,
        head_slice: slice | None = None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> torch.Tensor:
        """Returns the mask of `length` successive positions, (H, length, length), kept."""
        wanted = (bias, rule, head_slice)
        if self._buffer is None or self._buffered_for != wanted:
            chosen = bias if head_slice is None else bias.heads(head_slice)
            self._buffer, self._buffered_for = FutureMaskBuffer(chosen, rule), wanted
        return self._buffer.get(length, dtype=dtype, device=device)

    def prepare(
        self,
        bias: AttentionBias,
        query_positions: Positions,
        key_positions: Positions,
        *,
        rule: MaskRule = CAUSAL,
        key_is_padding: torch.Tensor | None = None,
        query_documents: torch.Tensor | None = None,
        key_documents: torch.Tensor | None = None,
        head_slice: slice | None = None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> DensePrepared:
        if _is_square(query_positions, key_positions):
            mask = self.future_mask(
                bias,
                len(query_positions),
                rule=rule,
                head_slice=head_slice,
                dtype=dtype,
                device=device,
            )
        else:
            chosen = bias if head_slice is None else bias.heads(head_slice)
            mask = join(chosen, rule, query_positions, key_positions, dtype=dtype, device=device)
        is_hidden = hidden_keys(key_is_padding, query_documents, key_documents)
        if is_hidden is None:
            return DensePrepared(self, mask=mask)
        is_allowed = rule.is_allowed(query_positions, key_positions, device=device)
        mask, is_blind = _hide(mask, is_hidden, is_allowed)
        return DensePrepared(self, key_is_padding=key_is_padding, mask=mask, is_blind=is_blind)

    def __deepcopy__(self, memo: dict[int, object]) -> DenseBackend:
        """Copies no mask: a copied model makes its own when it needs one."""
        return type(self)()


def _is_square(query_positions: Positions, key_positions: Positions) -> bool:
    """Tells whether queries and keys are the same successive positions, known without data."""
    if not (isinstance(query_positions, range) and isinstance(key_positions, range)):
        return False
    return query_positions == key_positions and query_positions.step == 1


def _hide(
    mask: torch.Tensor, is_hidden: torch.Tensor, is_allowed: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hides keys in a mask and finds the queries that see none.

    Returns:
        (mask (B, H, T, S), is_blind (B, 1, T, 1)).
    """
    is_seen = is_hidden.logical_not()  # (B, 1, T or 1, S)
    if is_allowed is not None:
        is_seen = is_seen & is_allowed.unsqueeze(-3)
    is_blind = is_seen.any(-1, keepdim=True).logical_not_()  # (B, 1, T, 1)
    mask = mask.masked_fill(is_hidden, -torch.inf)
    return mask.masked_fill(is_blind, 0.0), is_blind
