"""The contract of attention backends.

A backend prepares a bias once per forward pass, before the layer loop, in the form its kernel
needs; every layer then computes attention with the prepared object.
Shapes: `B` rows, `H` heads, `T` queries, `S` keys, `K` head width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fairseq.attention.backends.request import Request
from fairseq.attention.bias import AttentionBias, Positions
from fairseq.attention.rules import CAUSAL, AttentionRule

__all__ = ["AttentionBackend", "Prepared", "Rotation", "no_rotation"]

Rotation = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Turns new queries and keys, (B, H, T, K) each, by their positions."""


def no_rotation(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Leaves queries and keys as they are."""
    return q, k


@dataclass
class Prepared:
    """What every layer of one forward pass is handed.

    Attributes:
        backend: computes attention with it.
        key_is_padding: bool (B, S), None where no key is padding.
        rotate: applied to queries and keys before they are cached or compared.
    """

    backend: AttentionBackend
    key_is_padding: torch.Tensor | None = None
    rotate: Rotation = no_rotation


class AttentionBackend(ABC):
    """A way to compute softmax(q k' * scale + bias) v."""

    name: str

    def prepare(
        self,
        bias: AttentionBias,
        query_positions: Positions,
        key_positions: Positions,
        *,
        rule: AttentionRule = CAUSAL,
        key_is_padding: torch.Tensor | None = None,
        query_documents: torch.Tensor | None = None,
        key_documents: torch.Tensor | None = None,
        head_slice: slice | None = None,
        dropout_p: float = 0.0,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Prepared:
        """Makes what all layers of a forward pass share.

        Args:
            bias: what is added to the scores.
            query_positions: positions of the T queries.
            key_positions: positions of the S keys.
            rule: which keys a query may see, by head and position; the one a bias is meant for is
                `bias.rule`.
            key_is_padding: bool (B, S), keys that no query may see.
            query_documents: (T,) or (B, T), numbers of documents packed into one row; a query sees
                keys of its own document alone. Distances within a document need no change.
            key_documents: (S,) or (B, S).
            head_slice: the heads that this worker computes; None is all of them.
            dropout_p: rate that layers will attend with, by which a backend may choose what to
                make; they may attend with another.
            dtype: of queries, keys and values.
            device: of queries, keys and values.

        Raises:
            ValueError: this backend cannot serve such a call.
        """
        return Request(
            bias=bias,
            query_positions=query_positions,
            key_positions=key_positions,
            rule=rule,
            key_is_padding=key_is_padding,
            query_documents=query_documents,
            key_documents=key_documents,
            head_slice=head_slice,
            dropout_p=dropout_p,
            dtype=dtype,
            device=device,
        ).of(self)

    def obstacle(self, request: Request) -> str | None:
        """Returns why it cannot serve a request, as the end of a sentence; None if it can."""
        return None

    @abstractmethod
    def prepare_request(self, request: Request) -> Prepared:
        """Does what `prepare` does, for a request that there is no obstacle to."""

    @abstractmethod
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
        """Computes attention, (B, H, T, K); see `fairseq.attention.attend`."""
