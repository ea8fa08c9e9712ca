"""What `prepare` was asked for, kept as an object: to be refused, or handed to another backend."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch

from fairseq.attention.backends.base import AttentionBackend, Prepared
from fairseq.attention.bias import AttentionBias, Positions
from fairseq.attention.rules import CAUSAL, AttentionRule

__all__ = ["Request", "SelectiveBackend"]


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

    def of(self, backend: AttentionBackend) -> Prepared:
        """Returns what another backend makes of it."""
        return backend.prepare(
            self.bias,
            self.query_positions,
            self.key_positions,
            rule=self.rule,
            key_is_padding=self.key_is_padding,
            query_documents=self.query_documents,
            key_documents=self.key_documents,
            head_slice=self.head_slice,
            dropout_p=self.dropout_p,
            dtype=self.dtype,
            device=self.device,
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


class SelectiveBackend(AttentionBackend):
    """A backend that cannot serve every request, and says why not."""

    @abstractmethod
    def obstacle(self, request: Request) -> str | None:
        """Returns why it cannot serve a request, as the end of a sentence; None if it can."""

    @abstractmethod
    def prepare_request(self, request: Request) -> Prepared:
        """Does what `prepare` does, for a request that there is no obstacle to."""

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
        if (query_documents is None) != (key_documents is None):
            raise ValueError("query_documents and key_documents must be given together")
        request = Request(
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
        )
        reason = self.obstacle(request)
        if reason is not None:
            raise ValueError(
                f"--attention-backend {self.name}: {reason}; --attention-backend auto chooses one "
                "that can"
            )
        return self.prepare_request(request)
