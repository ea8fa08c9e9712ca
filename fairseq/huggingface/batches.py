"""Cutting the rows of a batch into shorter ones, without losing or doubling a target.

A model that shifts labels itself, as causal models of transformers do, never predicts the first
token of a row. So pieces overlap by one token there: the last token of a piece, which it predicts,
is the first of the next piece, which it is given. Shapes: `B` rows, `T` tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

__all__ = ["IGNORED", "REMAINDERS", "piece_length", "split_batch"]

IGNORED = -100
"""The label of what is not to be predicted, in transformers and in torch's cross entropy."""

REMAINDERS = ("pad", "drop")
_REFERENCES = ("input_ids", "inputs_embeds")
_LABELS = "labels"


def piece_length(length: int, scaling: float) -> int:
    """Returns how many tokens a piece has, at least 1, for rows of `length` tokens.

    Raises:
        ValueError: the scaling is not above 0 and at most 1.
    """
    if not 0 < scaling <= 1:
        raise ValueError(
            f"train_sequence_length_scaling is {scaling}; it must be above 0 and at most 1"
        )
    # Products such as 100 * 0.29 end just below a whole number.
    return max(1, math.floor(length * scaling + 1e-6))


def split_batch(
    batch: Any,
    scaling: float = 0.25,
    *,
    shifts_labels: bool = True,
    remainder: str = "pad",
    pad_token_id: int = 0,
    names: Sequence[str] | None = None,
) -> Any:
    """Cuts each row into consecutive pieces of `scaling` times its length, in the order of text.

    Tensors with a value for each token are cut, square masks in both dimensions; those with a value
    for each row are repeated. Pieces that are nothing but padding are left out.

    Args:
        batch: a mapping with `input_ids` or `inputs_embeds`, or a tuple or list of tensors; one row
            without a batch dimension is taken too.
        scaling: above 0 and at most 1, which changes nothing.
        shifts_labels: whether the model compares its output at t with the label at t + 1. Pieces
            then have one token more, for targets at their ends.
        remainder: of rows whose length is no multiple of the pieces': `pad` keeps it as a row that
            is padded on the right, `drop` leaves it out.
        pad_token_id: what padding is made of.
        names: what the items of a tuple or list are; of two, `input_ids` and `labels`.

    Returns:
        A batch of the same kind.

    Raises:
        ValueError: a setting that does not exist, labels for whole rows, which cannot be cut, or
            items that fit neither rows nor tokens.
        TypeError: a batch of another kind.
    """
    if remainder not in REMAINDERS:
        raise ValueError(f"remainder is {remainder!r}; it can be {' or '.join(REMAINDERS)}")
    items, rebuild = _open(batch, names)
    reference = _reference(items)
    if reference.dim() == 1:
        items = {name: _as_row(value, len(reference)) for name, value in items.items()}
        reference = reference.unsqueeze(0)
    num_rows, length = reference.shape[:2]
    size = piece_length(length, scaling)
    if size >= length:
        return batch
    cutter = _Cutter(num_rows, length, size, shifts_labels, remainder == "drop")
    return rebuild(cutter.cut_all(items, pad_token_id))


class _Cutter:
    """Where rows are cut; see `split_batch`."""

    def __init__(self, rows: int, length: int, size: int, overlaps: bool, drops: bool) -> None:
        self.rows, self.length = rows, length
        self.width = size + overlaps
        self.pieces: list[tuple[int, int, int]] = []  # start, end, first label that counts
        for start in range(0, length, size):
            is_tail = length - start < size
            is_target_only = overlaps and start > 0 and length - start == 1
            if is_target_only or (is_tail and drops):
                continue
            end = min(start + self.width, length)
            # A last piece without a next token begins one earlier instead of being padded.
            is_last = overlaps and length - start == size
            self.pieces.append((start - is_last, end, start + (overlaps and start > 0)))
        self.is_padded = any(end - start < self.width for start, end, _ in self.pieces)

    def cut_all(self, items: dict[str, Any], pad_token_id: int) -> dict[str, Any]:
        padding = {"input_ids": pad_token_id, _LABELS: IGNORED}
        if self.is_padded and "attention_mask" not in items:
            reference = _reference(items)
            ones = torch.ones(reference.shape[:2], dtype=torch.long, device=reference.device)
            items = {**items, "attention_mask": ones}
        cut = {name: self._cut(name, value, padding.get(name, 0)) for name, value in items.items()}
        return _without_padding_rows(cut, self.rows * len(self.pieces))

    def _cut(self, name: str, value: Any, padding: int) -> Any:
        if not isinstance(value, torch.Tensor):
            return self._repeat_list(value)
        per_token = (self.rows, self.length)
        if value.shape[-2:] == (self.length, self.length) and value.dim() >= 3 and "mask" in name:
            return self._cut_square(value, padding)
        if value.shape[:2] == per_token:
            return self._cut_tokens(name, value, padding)
        if value.shape[:2] == (1, self.length):  # One row for all, as of position_ids.
            return self._cut_tokens(name, value.expand(self.rows, *value.shape[1:]), padding)
        if name == _LABELS:
            raise ValueError(
                f"labels have shape {tuple(value.shape)}: one for each row, whose pieces would "
                "each predict it; only labels for each token, "
                f"{per_token}, can be cut"
            )
        if value.dim() and len(value) == self.rows:
            return value.repeat_interleave(len(self.pieces), dim=0)
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}, in a batch of {self.rows} rows with "
            f"{self.length} tokens; its first dimension must be the rows"
        )

    def _cut_tokens(self, name: str, value: torch.Tensor, padding: int) -> torch.Tensor:
        parts = []
        for start, end, first_label in self.pieces:
            part = value[:, start:end]
            if name == _LABELS and first_label > start:
                part = part.clone()
                part[:, : first_label - start] = IGNORED
            missing = self.width - part.size(1)
            trailing = [0, 0] * (value.dim() - 2)
            parts.append(torch.nn.functional.pad(part, [*trailing, 0, missing], value=padding))
        return torch.stack(parts, dim=1).flatten(0, 1)

    def _cut_square(self, value: torch.Tensor, padding: int) -> torch.Tensor:
        value = value.expand(self.rows, *value.shape[1:])
        parts = []
        for start, end, _ in self.pieces:
            missing = self.width - (end - start)
            part = value[..., start:end, start:end]
            parts.append(torch.nn.functional.pad(part, [0, missing, 0, missing], value=padding))
        return torch.stack(parts, dim=1).flatten(0, 1)

    def _repeat_list(self, value: Any) -> Any:
        if isinstance(value, list | tuple) and len(value) == self.rows:
            return type(value)(item for item in value for _ in self.pieces)
        return value


def _without_padding_rows(items: dict[str, Any], num_rows: int) -> dict[str, Any]:
    mask = items.get("attention_mask")
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        return items
    keeps = mask.bool().any(dim=1)
    if bool(keeps.all()) or not bool(keeps.any()):
        return items
    return {
        name: value[keeps]
        if isinstance(value, torch.Tensor) and len(value) == num_rows
        else _kept_of_list(value, keeps, num_rows)
        for name, value in items.items()
    }


def _kept_of_list(value: Any, keeps: torch.Tensor, num_rows: int) -> Any:
    if isinstance(value, list | tuple) and len(value) == num_rows:
        return type(value)(item for item, keep in zip(value, keeps.tolist(), strict=True) if keep)
    return value


def _open(
    batch: Any, names: Sequence[str] | None
) -> tuple[dict[str, Any], Callable[[dict[str, Any]], Any]]:
    """Returns a batch's items by name, and what makes such a batch of items."""
    if isinstance(batch, Mapping) or hasattr(batch, "keys"):
        kind = type(batch)
        return dict(batch.items()), lambda items: items if kind is dict else kind(items)
    if not isinstance(batch, list | tuple):
        raise TypeError(
            f"the batch is a {type(batch).__name__}; give a mapping, a tuple or a list of tensors"
        )
    if names is None and len(batch) <= 2:
        names = ("input_ids", _LABELS)[: len(batch)]
    if names is None or len(names) != len(batch):
        raise ValueError(
            f"the batch has {len(batch)} items; say what they are, such as "
            "names=('input_ids', 'attention_mask', 'labels')"
        )
    kind, given = type(batch), tuple(names)
    return dict(zip(given, batch, strict=True)), lambda items: kind(items[name] for name in given)


def _reference(items: dict[str, Any]) -> torch.Tensor:
    found = (items.get(name) for name in _REFERENCES)
    reference = next((x for x in found if isinstance(x, torch.Tensor)), None)
    if reference is None:
        raise ValueError(
            f"the batch has {', '.join(items) or 'nothing'}; it needs {' or '.join(_REFERENCES)}"
        )
    return reference


def _as_row(value: Any, length: int) -> Any:
    is_per_token = isinstance(value, torch.Tensor) and value.dim() and len(value) == length
    return value.unsqueeze(0) if is_per_token else value
