"""Making padded batches. B: rows, T: longest row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["collate_language_model", "collate_tokens"]


def collate_tokens(
    values: Sequence[torch.Tensor],
    pad_idx: int,
    eos_idx: int | None = None,
    left_pad: bool = False,
    move_eos_to_beginning: bool = False,
    pad_to_length: int | None = None,
    pad_to_multiple: int = 1,
    pad_to_bsz: int | None = None,
) -> torch.Tensor:
    """Stacks vectors of different length into one padded matrix.

    Args:
        values: vectors of token ids.
        pad_idx: what fills the rest.
        eos_idx: the id put in front by `move_eos_to_beginning`; None takes each row's last.
        left_pad: pads in front instead of behind.
        move_eos_to_beginning: moves the last token of each row to its front.
        pad_to_length: at least so many columns.
        pad_to_multiple: a number of columns divisible by this.
        pad_to_bsz: at least so many rows; the extra ones are all padding.

    Returns:
        (B, T) tensor of the vectors' dtype.
    """
    width = max([len(v) for v in values] + [pad_to_length or 0])
    width += -width % pad_to_multiple
    rows = max(len(values), pad_to_bsz or 0)
    batch = values[0].new_full((rows, width), pad_idx)
    for row, value in zip(batch, values, strict=False):
        if move_eos_to_beginning:
            first = value[-1:] if eos_idx is None else value.new_tensor([eos_idx])
            value = torch.cat([first, value[:-1]])
        row[width - len(value) if left_pad else 0 :][: len(value)] = value
    return batch


def collate_language_model(
    samples: Sequence[dict[str, Any]],
    pad_idx: int,
    *,
    fixed_pad_length: int | None = None,
    pad_to_bsz: int | None = None,
) -> dict[str, Any]:
    """Makes the batch of items `{"id", "source", "target"}`.

    Args:
        samples: items; the target is a vector, a list of vectors, or None.
        pad_idx: what fills rows on the right.
        fixed_pad_length: at least so many columns.
        pad_to_bsz: at least so many rows.

    Returns:
        `{}` for no items, else `id` (B,), `nsentences` (B), `ntokens` (source tokens),
        `net_input` with `src_tokens` (B, T) and `src_lengths` (B,), and `target` (B, T): a list of
        such for several targets, the very tensor `src_tokens` where there is none. Padding rows
        count in none of the numbers.
    """
    if not samples:
        return {}

    def pad(values: list[torch.Tensor]) -> torch.Tensor:
        return collate_tokens(
            values, pad_idx, pad_to_length=fixed_pad_length, pad_to_bsz=pad_to_bsz
        )

    lengths = [len(s["source"]) for s in samples]
    src_tokens = pad([s["source"] for s in samples])
    first_target = samples[0]["target"]
    target: torch.Tensor | list[torch.Tensor]
    if first_target is None:
        target = src_tokens
    elif isinstance(first_target, list):
        target = [pad([s["target"][i] for s in samples]) for i in range(len(first_target))]
    else:
        target = pad([s["target"] for s in samples])
    return {
        "id": torch.tensor([int(s["id"]) for s in samples], dtype=torch.int64),
        "nsentences": len(samples),
        "ntokens": sum(lengths),
        "net_input": {
            "src_tokens": src_tokens,
            "src_lengths": torch.tensor(lengths, dtype=torch.int64),
        },
        "target": target,
    }
