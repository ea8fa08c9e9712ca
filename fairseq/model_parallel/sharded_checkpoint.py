"""Models and their optimizers in a folder that every process writes its parts of.

Any other layout reads it. Nothing is gathered, so neither memory nor time grows with the number of
processes. Parameters and optimizer state are kept by name, and a part carries its place in the
whole: tp 2 x dp 2 can go on as tp 4, as FSDP2, or in one process. What fairseq-train writes is
`fairseq/checkpoint/index.py`; both lie on `fairseq/checkpoint/sharded.py`, which runs nothing that
is in a folder.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fairseq.checkpoint.sharded import (
    StoredTensor,
    read_tensors,
    stored_tensors,
    write_tensors,
)
from fairseq.checkpoint.writing import save_atomically
from fairseq.model_parallel.tensor_parallel import has_reordered_rows

__all__ = ["load_sharded", "save_sharded", "whole_from_sharded"]

_MODEL, _STATE, _SETTINGS = "model.", "optimizer.", "settings"


def save_sharded(
    folder: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Writes a folder with the parts of all processes; every process must call it.

    Args:
        folder: on a disk that all processes see; made if it is not there.
        model: in any layout.
        optimizer: of the model's parameters.

    Raises:
        ValueError: rows of fused weights are in another order in each layout.
    """
    _check_order(model)
    content: dict[str, torch.Tensor] = {_MODEL + n: t for n, t in model.state_dict().items()}
    if optimizer is not None:
        numbers: dict[str, Any] = {}
        for name, state in _states(model, optimizer).items():
            for key, value in state.items():
                kind = content if isinstance(value, torch.Tensor) else numbers
                kind[f"{_STATE}{name}.{key}"] = value
        groups = [
            {k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups
        ]
        content[_SETTINGS] = _as_tensor({"groups": groups, "numbers": numbers})
    write_tensors(folder, content)


def load_sharded(
    folder: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Reads what this process needs of a folder; every process must call it.

    Args:
        folder: written by `save_sharded`, in any layout.
        model: changed in place.
        optimizer: of the model's parameters; its state is replaced.

    Raises:
        ValueError: rows of fused weights are in another order in each layout, the model has other
            parameters, or a file is damaged.
        FileNotFoundError: there is no such checkpoint.
    """
    _check_order(model)
    stored = stored_tensors(folder)
    content: dict[str, torch.Tensor] = {_MODEL + n: t for n, t in model.state_dict().items()}
    if optimizer is not None:
        if _SETTINGS not in stored:
            raise ValueError(f"{folder} holds no optimizer; it was saved without one")
        content |= _places_for_state(model, optimizer, stored)
        content[_SETTINGS] = _place(stored[_SETTINGS])
    read_tensors(folder, content)
    model.load_state_dict({n[len(_MODEL) :]: t for n, t in content.items() if n.startswith(_MODEL)})
    if optimizer is not None:
        settings = _from_tensor(content[_SETTINGS])
        everything = {**content, **settings["numbers"]}
        for name, param in _named(model, optimizer).items():
            prefix = f"{_STATE}{name}."
            optimizer.state[param] = {
                n[len(prefix) :]: t for n, t in everything.items() if n.startswith(prefix)
            }
        for group, given in zip(optimizer.param_groups, settings["groups"], strict=True):
            group.update(given)


def whole_from_sharded(folder: str | os.PathLike[str], filename: str) -> None:
    """Writes the model of a folder as one file, {"model": whole state dict}, in one process.

    Args:
        folder: written by `save_sharded`.
        filename: for `torch.load`; what trainers keep beside the model is not in it.

    Raises:
        FileNotFoundError: there is no such checkpoint.
    """
    stored = stored_tensors(folder)
    state = {n: _place(each) for n, each in stored.items() if n.startswith(_MODEL)}
    read_tensors(folder, state)
    save_atomically({"model": {n[len(_MODEL) :]: t for n, t in state.items()}}, filename)


def _as_tensor(settings: Any) -> torch.Tensor:
    """Returns plain values as the bytes of their text."""
    return torch.frombuffer(bytearray(repr(settings).encode()), dtype=torch.uint8)


def _from_tensor(text: torch.Tensor) -> Any:
    return ast.literal_eval(bytes(text.tolist()).decode())


def _check_order(model: nn.Module) -> None:
    if has_reordered_rows(model):
        raise ValueError(
            "the policy reorders the rows of fused weights (n_fused with layout 'parts'), in each "
            "layout another way; save whole_state_dict(model) instead"
        )


def _named(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    own = {id(param) for group in optimizer.param_groups for param in group["params"]}
    return {name: param for name, param in model.named_parameters() if id(param) in own}


def _states(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    return {n: optimizer.state[p] for n, p in _named(model, optimizer).items()}


def _place(stored: StoredTensor) -> torch.Tensor:
    return torch.zeros(stored.size, dtype=stored.dtype)


def _places_for_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, stored: Mapping[str, StoredTensor]
) -> dict[str, torch.Tensor]:
    """Returns empty tensors, cut as their parameters are, for the stored optimizer state."""
    places: dict[str, torch.Tensor] = {}
    for name, param in _named(model, optimizer).items():
        prefix = f"{_STATE}{name}."
        for key, kept in stored.items():
            if not key.startswith(prefix):
                continue
            if kept.size == param.shape:
                places[key] = torch.zeros_like(param.detach(), dtype=kept.dtype)
            else:
                places[key] = _place(kept)
    return places
