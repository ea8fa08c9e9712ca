"""Cutting a batch for the processes that share its sequences.

Shapes: `B` rows, `S` columns of the whole batch, `T` columns of one process.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from fairseq.attention import Positions
from fairseq.attention.coordinates import at_columns
from fairseq.model_parallel.layout import SequenceLayout

__all__ = ["apply_sequence_parallelism", "cut_batch", "cut_sample", "pad_columns"]

IGNORED = -100
"""Label that counts nothing (torch's and Hugging Face's)."""

_FILL = {
    "input_ids": 0,
    "inputs_embeds": 0,
    "attention_mask": 0,
    "position_ids": 0,
    "token_type_ids": 0,
    "document_ids": -1,
    "labels": IGNORED,
    "shift_labels": IGNORED,
}
"""Entries that have a column for each token, and what they are padded with."""


def apply_sequence_parallelism(
    batch: Mapping[str, Any],
    local_rank: int,
    local_world_size: int,
    gradient_accumulation_steps: int = 1,
    ring_attn_func: str | None = None,
    *,
    layout: str = "contiguous",
    padding_idx: int = 1,
) -> tuple[dict[str, Any], int, int]:
    """Cuts a batch for one of the processes that share its sequences.

    Two kinds of batches are known: those of our tasks, with `net_input` (see `cut_sample`), and
    those of Hugging Face models (see `cut_batch`).

    Args:
        batch: the same on every process; not changed.
        local_rank: which of them this one is, from 0.
        local_world_size: how many they are.
        gradient_accumulation_steps: batches for an update, of which `num_items_in_batch` counts
            the labels where the batch does not have it.
        ring_attn_func: makes no difference to the cut.
        layout: `contiguous` or `zigzag`, see `SequenceLayout`.
        padding_idx: what tokens of our tasks are padded with.

    Returns:
        (the process's batch, columns of the whole batch S, columns that were added to it).

    Raises:
        ValueError: the batch cannot be cut.
    """
    how = SequenceLayout(local_world_size, layout)
    if "net_input" in batch:
        cut = cut_sample(batch, how, local_rank, padding_idx=padding_idx)
        length = batch["net_input"]["src_tokens"].size(1)
    else:
        cut = cut_batch(batch, how, local_rank, accumulation=gradient_accumulation_steps)
        length = _length(batch)
    return cut, length, how.padded(length) - length


def pad_columns(x: torch.Tensor, length: int, value: float, dim: int = 1) -> torch.Tensor:
    """Pads one axis of a tensor at its end."""
    missing = length - x.size(dim)
    if missing == 0:
        return x
    after = [0, 0] * (x.dim() - dim - 1)
    return F.pad(x, [*after, 0, missing], value=value)


def cut_sample(
    sample: Mapping[str, Any], layout: SequenceLayout, rank: int, *, padding_idx: int
) -> dict[str, Any]:
    """Cuts a batch of our tasks.

    The tokens stay whole, padded to a length that can be cut, and `columns` says which of them are
    this process's: so positions, documents and padding are those of the whole batch. Targets, which
    the task has shifted, are cut. Numbers that count the whole batch stay with the first process,
    so that sums over the processes are right.

    Args:
        sample: the same on every process of the group.
        layout: how columns are shared out.
        rank: this process, from 0.
        padding_idx: what tokens and targets are padded with.
    """
    net_input = dict(sample["net_input"])
    tokens = net_input["src_tokens"]
    length = tokens.size(1)
    padded = layout.padded(length)
    columns = layout.columns(rank, padded)
    net_input["src_tokens"] = pad_columns(tokens, padded, padding_idx)
    net_input["columns"] = columns
    if padded > length:
        # For position methods that adapt to it: the columns added here are not part of it.
        net_input["sequence_length"] = length
    cut = {**sample, "net_input": net_input}
    target = sample.get("target")
    cut["num_rows"] = 0 if rank > 0 else tokens.size(0)
    if isinstance(target, torch.Tensor):
        cut["target"] = at_columns(pad_columns(target, padded, padding_idx), columns)
    elif target is not None:
        cut["target"] = [
            at_columns(pad_columns(each, padded, padding_idx), columns) for each in target
        ]
    for name in ("ntokens", "nsentences"):
        if name in sample and rank > 0:
            cut[name] = 0
    return cut


def cut_batch(
    batch: Mapping[str, Any], layout: SequenceLayout, rank: int, *, accumulation: int = 1
) -> dict[str, Any]:
    """Cuts a batch of a Hugging Face model.

    Columns are padded at the end. What the model predicts is shifted before the cut: where there
    are `labels`, the batch gets `shift_labels`, which causal models take as they are, and
    `num_items_in_batch`, by which the loss is divided: the sum over the processes is the loss.
    `position_ids` are made if there are none. An `attention_mask` (B, S) is made if padding needs
    it. `logits_to_keep` becomes the process's own columns among those of the whole batch.

    Args:
        batch: the same on every process of the group.
        layout: how columns are shared out.
        rank: this process, from 0.
        accumulation: batches whose labels `num_items_in_batch` counts, if it is made here.

    Raises:
        ValueError: there is no sequence, or a mask that is not (B, S).
    """
    length = _length(batch)
    padded = layout.padded(length)
    columns = layout.columns(rank, padded)
    whole = _completed(dict(batch), length, padded, accumulation)
    cut = dict(whole)
    for name, fill in _FILL.items():
        value = whole.get(name)
        if isinstance(value, torch.Tensor):
            _check_columns(name, value, length)
            dim = 1 if value.dim() > 1 else 0
            cut[name] = _take(pad_columns(value, padded, fill, dim), columns, dim)
    if "logits_to_keep" in batch:
        kept = kept_columns(batch["logits_to_keep"], length)
        cut["logits_to_keep"] = local_columns(kept, columns)
    return cut


def kept_columns(logits_to_keep: Any, length: int) -> torch.Tensor:
    """Returns the columns whose logits are wanted, in rising order.

    Args:
        logits_to_keep: a number n for the last n, 0 for all; or the columns; or bool (S,).
        length: columns of the whole batch S, without those added for the cut.
    """
    if isinstance(logits_to_keep, torch.Tensor) and logits_to_keep.dim() > 0:
        is_mask = logits_to_keep.dtype == torch.bool
        return logits_to_keep.nonzero().squeeze(1) if is_mask else logits_to_keep % length
    number = int(logits_to_keep)
    return torch.arange(length - number if 0 < number < length else 0, length)


def local_columns(kept: torch.Tensor, columns: Positions) -> torch.Tensor:
    """Returns which of a process's columns are kept, counted among its own."""
    own = torch.as_tensor(list(columns) if isinstance(columns, range) else columns)
    return torch.isin(own, kept.to(own.device)).nonzero().squeeze(1)


def _length(batch: Mapping[str, Any]) -> int:
    for name in ("input_ids", "inputs_embeds"):
        if batch.get(name) is not None:
            return int(batch[name].size(1))
    raise ValueError(
        f"the batch has neither input_ids nor inputs_embeds nor net_input, only "
        f"{', '.join(batch) or 'nothing'}; one of them is needed to know the sequence"
    )


def _check_columns(name: str, value: torch.Tensor, length: int) -> None:
    is_per_token = value.dim() <= 2 or name == "inputs_embeds"
    if not is_per_token or value.size(min(1, value.dim() - 1)) != length:
        raise ValueError(
            f"{name} has the shape {tuple(value.shape)}; to be cut with sequences of {length} "
            f"tokens it must have one entry for each token, (rows, {length})"
        )


def _completed(
    batch: dict[str, Any], length: int, padded: int, accumulation: int
) -> dict[str, Any]:
    """Adds what follows from a whole batch and would be lost by the cut."""
    first = batch["input_ids"] if batch.get("input_ids") is not None else batch["inputs_embeds"]
    rows, device = first.size(0), first.device
    if batch.get("position_ids") is None:
        batch["position_ids"] = torch.arange(length, device=device).expand(rows, -1)
    if batch.get("attention_mask") is None and padded > length:
        batch["attention_mask"] = torch.ones(rows, length, dtype=torch.int64, device=device)
    labels = batch.get("labels")
    if labels is not None and batch.get("shift_labels") is None:
        batch["shift_labels"] = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    if labels is not None and batch.get("num_items_in_batch") is None:
        count = batch["shift_labels"].ne(IGNORED).sum()
        batch["num_items_in_batch"] = count * accumulation
    return batch


def _take(x: torch.Tensor, columns: Positions, dim: int) -> torch.Tensor:
    if isinstance(columns, range):
        return x.narrow(dim, columns.start, len(columns)).contiguous()
    return x.index_select(dim, columns.to(x.device))
