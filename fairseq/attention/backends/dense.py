"""What the backends with a dense mask share: they differ in the kernel alone.

Shapes: `B` rows, `H` heads, `T` queries, `S` keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fairseq.attention.backends.base import AttentionBackend, Prepared
from fairseq.attention.backends.request import Request
from fairseq.attention.bias import AttentionBias, Positions
from fairseq.attention.mask import FutureMaskBuffer, hidden_keys, join
from fairseq.attention.rules import CAUSAL, AttentionRule

__all__ = ["DenseBackend", "DensePrepared"]


@dataclass(kw_only=True)
class DensePrepared(Prepared):
    """A bias as a dense mask.

    Attributes:
        mask: (H, T, S) or (B, H, T, S), added to the scores.
        is_blind: bool (B or 1, H or 1, T, 1), queries that may see no key; None where each sees
            one. Some key is open in their rows of the mask, so that the softmax is defined, and
            their output is zero.
        causal_shift: position of query 0 less that of key 0, where no query may see a key after
            its own; None where one may, or that is not known without data.
    """

    mask: torch.Tensor
    is_blind: torch.Tensor | None = None
    causal_shift: int | None = None


class DenseBackend(AttentionBackend):
    """Prepares the buffered future mask; `attend` is left to the kernels."""

    def __init__(self) -> None:
        self._buffer: FutureMaskBuffer | None = None
        self._buffered_for: tuple[AttentionBias, AttentionRule, slice | None] | None = None

    def future_mask(
        self,
        bias: AttentionBias,
        length: int,
        *,
        rule: AttentionRule = CAUSAL,
        head_slice: slice | None = None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> torch.Tensor:
        """Returns the mask of `length` successive positions, (H, length, length), kept."""
        wanted = (bias, rule, head_slice)
        if self._buffer is None or self._buffered_for != wanted:
            if head_slice is not None:
                bias, rule = bias.heads(head_slice), rule.heads(head_slice)
            self._buffer = FutureMaskBuffer(bias, rule)
            self._buffered_for = wanted
        return self._buffer.get(length, dtype=dtype, device=device)

    def prepare_request(self, request: Request) -> DensePrepared:
        queries, keys = request.query_positions, request.key_positions
        bias, rule = request.bias_and_rule
        dtype, device = request.dtype, request.device
        if _is_square(queries, keys) and not (bias.is_per_row or rule.is_per_row):
            mask = self.future_mask(
                request.bias,
                len(queries),
                rule=request.rule,
                head_slice=request.head_slice,
                dtype=dtype,
                device=device,
            )
        else:
            mask = join(bias, rule, queries, keys, dtype=dtype, device=device)
        is_hidden = hidden_keys(
            request.key_is_padding, request.query_documents, request.key_documents
        )
        see_themselves = _see_themselves(queries, keys)
        causal_shift = request.shift if request.is_causal else None
        if is_hidden is None and see_themselves:
            return DensePrepared(self, mask=mask, causal_shift=causal_shift)
        is_allowed = rule.is_allowed(queries, keys, device=device)
        mask, is_blind = _hide(mask, is_hidden, is_allowed, see_themselves=see_themselves)
        return DensePrepared(
            self,
            key_is_padding=request.key_is_padding,
            mask=mask,
            is_blind=is_blind,
            causal_shift=causal_shift,
        )

    def __deepcopy__(self, memo: dict[int, object]) -> DenseBackend:
        """Copies no mask: a copied model makes its own when it needs one."""
        return type(self)()


def _is_square(query_positions: Positions, key_positions: Positions) -> bool:
    """Tells whether queries and keys are the positions 0, 1, ..., known without data.

    Only these are what the kept mask is made for: not every bias is relative.
    """
    if not (isinstance(query_positions, range) and isinstance(key_positions, range)):
        return False
    return query_positions == key_positions == range(len(query_positions))


def _see_themselves(queries: Positions, keys: Positions) -> bool:
    """Tells whether there is a key at each query's position, known without data.

    Every rule lets it be seen.
    """
    if not (isinstance(queries, range) and isinstance(keys, range)):
        return False
    if queries.step != 1 or keys.step != 1:
        return False
    return keys.start <= queries.start and queries.stop <= keys.stop


def _hide(
    mask: torch.Tensor,
    is_hidden: torch.Tensor | None,
    is_allowed: torch.Tensor | None,
    *,
    see_themselves: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Hides keys in a mask and finds the queries that see none.

    Returns:
        (mask (H, T, S) or (B, H, T, S), is_blind (B or 1, H or 1, T, 1), None if no query can be).
    """
    if is_hidden is None:
        if is_allowed is None:
            return mask, None
        is_seen = is_allowed if is_allowed.dim() == 4 else is_allowed.unsqueeze(0)
    else:
        is_seen = is_hidden.logical_not()  # (B, 1, T or 1, S)
        if is_allowed is not None:
            is_seen = is_seen & is_allowed
    is_blind = is_seen.any(-1, keepdim=True).logical_not_()  # (B or 1, H or 1, T or 1, 1)
    if is_hidden is not None:
        mask = mask.masked_fill(is_hidden & ~is_blind, -torch.inf)
    # What is left of a blind row is what the rule lets it see; its own key, if there is one.
    return (mask if see_themselves else mask.masked_fill(is_blind, 0.0)), is_blind
