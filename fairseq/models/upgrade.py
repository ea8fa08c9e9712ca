"""Brings state dicts of older versions up to date, and leaves out layers that are not wanted.

Each rule works in place on a dictionary of names and tensors. Modules with rules of their own have
a method `upgrade_state_dict_named(state_dict, name)`.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

__all__ = [
    "fit_position_table",
    "layers_to_keep",
    "prune_layers",
    "rename_layer_norms",
    "upgrade_state_dict",
]

_LAYER = {
    side: re.compile(rf"^((?:.*\.)?{side}\.layers\.)(\d+)(\..*)$")
    for side in ("encoder", "decoder")
}
_OLD_LAYER_NORM = re.compile(r"^(.*\.layers\.\d+\.)layer_norms\.([012])(\..*)$")
_LAYER_NORM_NAMES = {
    "encoder": ["self_attn_layer_norm", "final_layer_norm"],
    "decoder": ["self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"],
}


def upgrade_state_dict(module: nn.Module, state_dict: dict[str, Any], name: str = "") -> None:
    """Applies the rules of every part of a module.

    Args:
        module: where the state dict is to be loaded.
        state_dict: changed in place.
        name: what the module's names in the state dict start with, without the last dot.
    """
    prefix = name + "." if name else ""
    child: Any
    for child_name, child in module.named_children():
        path = prefix + child_name
        if hasattr(child, "upgrade_state_dict_named"):
            child.upgrade_state_dict_named(state_dict, path)
        elif hasattr(child, "upgrade_state_dict"):
            child.upgrade_state_dict(state_dict)
        upgrade_state_dict(child, state_dict, path)


def rename_layer_norms(state_dict: dict[str, Any], name: str, side: str = "decoder") -> None:
    """Renames the numbered layer norms of old checkpoints.

    Args:
        state_dict: changed in place.
        name: what the names of the encoder or decoder start with, without the last dot.
        side: `encoder` or `decoder`.
    """
    names = _LAYER_NORM_NAMES[side]
    for key in list(state_dict):
        found = _OLD_LAYER_NORM.match(key)
        if found and key.startswith(name + "."):
            start, number, end = found.groups()
            state_dict[f"{start}{names[int(number)]}{end}"] = state_dict.pop(key)


def fit_position_table(
    state_dict: dict[str, Any], name: str, table: nn.Module | None, is_used: bool
) -> None:
    """Fits the keys of the position table to those of the model.

    A table that the model does not read may be absent from a checkpoint or present in it. A
    learned table takes the size it has in the checkpoint: the length limit of a trained model is
    that of its table, whatever `--max-target-positions` says later.

    Args:
        state_dict: changed in place.
        name: what the names of the table start with, without the last dot.
        table: the position embeddings of the model.
        is_used: whether the model reads them.
    """
    for bookkeeping in ("weights", "_float_tensor"):
        state_dict.pop(f"{name}.{bookkeeping}", None)
    key = f"{name}.weight"
    weight: Any = getattr(table, "weight", None)
    if weight is not None:
        if key not in state_dict and not is_used:
            state_dict[key] = weight.detach()
        _take_number_of_rows(weight, state_dict.get(key))
        return
    if not is_used:
        state_dict.pop(key, None)
    if table is not None:
        state_dict[f"{name}._float_tensor"] = torch.zeros(1)


def _take_number_of_rows(weight: torch.Tensor, stored: torch.Tensor | None) -> None:
    if stored is not None and len(stored) != len(weight):
        # The parameter stays the same object, which an optimizer may know already.
        weight.data = weight.data.new_zeros(len(stored), *weight.shape[1:])


def prune_layers(state_dict: dict[str, Any], cfg: Any) -> dict[str, Any]:
    """Keeps the layers that `decoder_layers_to_keep` lists, numbered anew from 0.

    `encoder_layers_to_keep` does so for an encoder. The settings are cleared then, since the model
    that is saved next has no other layers.

    Args:
        state_dict: names and tensors.
        cfg: settings of the model; None keeps everything.

    Returns:
        The state dict, or a smaller one. One that has no more layers than are listed was pruned
        before and is returned as it is.

    Raises:
        ValueError: a listed layer does not exist.
    """
    for side in ("encoder", "decoder"):
        listed = getattr(cfg, f"{side}_layers_to_keep", None)
        if listed:
            state_dict = _prune_side(state_dict, side, listed)
            setattr(cfg, f"{side}_layers_to_keep", None)
    return state_dict


def _prune_side(state_dict: dict[str, Any], side: str, listed: str) -> dict[str, Any]:
    flag = f"--{side}-layers-to-keep"
    keep = layers_to_keep(listed, flag)
    found = {key: match for key in state_dict if (match := _LAYER[side].match(key))}
    present = sorted({int(match.group(2)) for match in found.values()})
    if len(present) == len(keep):
        return state_dict
    missing = [str(layer) for layer in keep if layer not in present]
    if missing:
        raise ValueError(
            f"{flag} {listed}: the checkpoint has {len(present)} layers, counted from 0, but no "
            f"{', '.join(missing)}"
        )
    renumbered = {old: new for new, old in enumerate(keep)}
    pruned = {}
    for key, value in state_dict.items():
        if key not in found:
            pruned[key] = value
            continue
        start, number, end = found[key].groups()
        if int(number) in renumbered:
            pruned[f"{start}{renumbered[int(number)]}{end}"] = value
    return pruned


def layers_to_keep(listed: str, flag: str = "--decoder-layers-to-keep") -> list[int]:
    """Reads a list of layers such as "0,2,4"; returns them ascending.

    Raises:
        ValueError: it is no list of different whole numbers from 0.
    """
    parts = [part.strip() for part in str(listed).split(",")]
    if not all(part.isdigit() for part in parts) or len(set(map(int, parts))) != len(parts):
        raise ValueError(f"{flag} {listed!r} is not a list of different layers such as 0,2,4")
    return sorted(map(int, parts))
