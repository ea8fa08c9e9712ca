"""The heads that this process computes, where several processes share the heads of a layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fairseq.attention.bias import AttentionBias

__all__ = ["HeadShare"]


@dataclass(frozen=True)
class HeadShare:
    """Which heads, and how gradients of what all heads are computed from are put together.

    Attributes:
        heads: of all heads of a layer.
        enter: called with every tensor that all processes hold and each uses for its heads alone;
            returns it unchanged, and sums its gradients over the processes in the backward pass.
    """

    heads: slice
    enter: Callable[[torch.Tensor], torch.Tensor]

    def of(self, bias: AttentionBias) -> AttentionBias:
        """Returns a bias of all heads whose gradients will be whole on every process."""
        return bias.through(self.enter)
