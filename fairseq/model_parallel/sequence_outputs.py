"""Outputs of all processes that share a sequence, in the order of the sequence.

Shapes: `B` rows, `T` columns of one process, `S` of the whole batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fairseq.model_parallel.collectives import gather_columns
from fairseq.model_parallel.layout import SequenceLayout
from fairseq.model_parallel.sequence_batch import local_columns, pad_columns

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["gather_kept", "in_order"]


def in_order(x: torch.Tensor, group: ProcessGroup, layout: SequenceLayout) -> torch.Tensor:
    """Gathers the columns of all processes (B, T, ...) in the order of the sequence (B, S, ...)."""
    whole = gather_columns(x, group, 1)
    if layout.num_segments == 1:
        return whole
    return whole.index_select(1, layout.order(whole.size(1)).argsort().to(x.device))


def gather_kept(
    x: torch.Tensor, group: ProcessGroup, layout: SequenceLayout, kept: torch.Tensor, length: int
) -> torch.Tensor:
    """Gathers some columns, of which processes may hold different numbers, in their order.

    Args:
        x: (B, n, ...), this process's columns among `kept`.
        group: the processes.
        layout: which columns each of them holds.
        kept: columns of the whole batch in rising order, (N,).
        length: S, with the columns that were added for the cut.

    Returns:
        (B, N, ...).
    """
    own, most = [], 1
    for rank in range(layout.size):
        columns = torch.as_tensor(list(layout.columns(rank, length)))
        own.append(columns[local_columns(kept, columns)])
        most = max(most, len(own[-1]))
    whole = gather_columns(pad_columns(x, most, 0.0), group, 1)
    where = torch.cat([rank * most + torch.arange(len(each)) for rank, each in enumerate(own)])
    return whole.index_select(1, where[torch.cat(own).argsort()].to(x.device))
