"""What `prepare` was asked for, kept as an object: to be refused, or handed to another backend."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from fairseq.attention.bias import AttentionBias, Positions
from fairseq.attention.rules import AttentionRule, MaskRule

if TYPE_CHECKING:
    from fairseq.attention.backends.base import AttentionBackend, Prepared

__all__ = ["Request"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """The arguments of `AttentionBackend.prepare`; see there."""

    bias: AttentionBias
    query_positions: Positions
    key_positions: Positions
    rule: AttentionRule
    key_is_padding: torch.Tensor | None
    query_documents: torch.Tensor | None
    key_documents: torch.Tensor | None
    head_slice: slice | None
    dropout_p: float = 0.0
    dtype: torch.dtype
    device: torch.device

    def __post_init__(self) -> None:
        if (self.query_documents is None) != (self.key_documents is None):
            raise ValueError("query_documents and key_documents must be given together")

    def of(self, backend: AttentionBackend) -> Prepared:
        """Returns what a backend makes of it.

        Raises:
            ValueError: it cannot serve this.
        """
        reason = backend.obstacle(self)
        if reason is not None:
            raise ValueError(
                f"--attention-backend {backend.name}: {reason}; --attention-backend auto chooses "
                "one that can"
            )
        return backend.prepare_request(self)

    def of_queries(self, which: slice) -> Request:
        """Returns the request for some of the queries and all keys."""
        positions, documents = self.query_positions, self.query_documents
        return replace(
            self,
            query_positions=(
                positions[which] if isinstance(positions, range) else positions[..., which]
            ),
            query_documents=None if documents is None else documents[..., which],
        )

    @property
    def bias_and_rule(self) -> tuple[AttentionBias, AttentionRule]:
        """Those of the heads that are asked for."""
        if self.head_slice is None:
            return self.bias, self.rule
        return self.bias.heads(self.head_slice), self.rule.heads(self.head_slice)

    @property
    def shift(self) -> int | None:
        """Position of query 0 less that of key 0, if both follow one another; else None."""
        queries, keys = self.query_positions, self.key_positions
        if not (isinstance(queries, range) and isinstance(keys, range)):
            return None
        if queries.step != 1 or keys.step != 1 or not queries or not keys:
            return None
        return queries.start - keys.start

    @property
    def is_causal(self) -> bool:
        """Whether no query may see a key after its own, known without data."""
        return isinstance(self.rule, MaskRule) and self.rule.is_causal

    @property
    def sees_itself(self) -> bool:
        """Whether there is a key at the position of each query, known without data."""
        shift = self.shift
        if shift is None:
            return False
        return shift >= 0 and shift + len(self.query_positions) <= len(self.key_positions)

    @property
    def hides_nothing(self) -> bool:
        """Whether no key is hidden by padding or documents."""
        return self.key_is_padding is None and self.key_documents is None
