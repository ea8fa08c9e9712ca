"""Checkpoints that every process writes its parts of, and that any other layout reads.

Written by `torch.distributed.checkpoint`. Nothing is gathered, so neither memory nor time grows
with the number of processes. Parameters and optimizer state are kept by name, and a part carries
its place in the whole: tp 2 x dp 2 can go on as tp 4, as FSDP2, or in one process.
"""

from __future__ import annotations

import ast
import contextlib
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint import filesystem, state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from fairseq.model_parallel.tensor_parallel import has_reordered_rows

__all__ = ["load_sharded", "save_sharded", "whole_from_sharded"]

_MODEL, _STATE, _GROUPS = "model.", "optimizer.", "param_groups"


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
    content: dict[str, Any] = {_MODEL + n: t for n, t in model.state_dict().items()}
    if optimizer is not None:
        for name, state in _states(model, optimizer).items():
            content.update({f"{_STATE}{name}.{key}": value for key, value in state.items()})
        # As text: a container would be taken apart.
        content[_GROUPS] = repr(
            [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        )
    with _one_process_is_no_surprise():
        state_dict_saver.save(content, checkpoint_id=folder, no_dist=not _is_distributed())


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
        ValueError: rows of fused weights are in another order in each layout.
        FileNotFoundError: there is no such checkpoint.
    """
    _check_order(model)
    stored = _stored(folder)
    content: dict[str, Any] = {_MODEL + n: t for n, t in model.state_dict().items()}
    if optimizer is not None:
        content |= _places_for_state(model, optimizer, stored)
        content[_GROUPS] = None
    with _one_process_is_no_surprise():
        state_dict_loader.load(content, checkpoint_id=folder, no_dist=not _is_distributed())
    model.load_state_dict({n[len(_MODEL) :]: t for n, t in content.items() if n.startswith(_MODEL)})
    if optimizer is not None:
        for name, param in _named(model, optimizer).items():
            prefix = f"{_STATE}{name}."
            found = {n[len(prefix) :]: t for n, t in content.items() if n.startswith(prefix)}
            optimizer.state[param] = found
        groups = ast.literal_eval(content[_GROUPS])
        for group, settings in zip(optimizer.param_groups, groups, strict=True):
            group.update(settings)


def whole_from_sharded(folder: str | os.PathLike[str], filename: str) -> None:
    """Writes the model of a folder as one file, {"model": whole state dict}, in one process.

    Args:
        folder: written by `save_sharded`.
        filename: for `torch.load`; what trainers keep beside the model is not in it.

    Raises:
        FileNotFoundError: there is no such checkpoint.
    """
    _stored(folder)
    with _one_process_is_no_surprise():
        dcp_to_torch_save(folder, filename)
    content = torch.load(filename, weights_only=False)
    state = {n[len(_MODEL) :]: t for n, t in content.items() if n.startswith(_MODEL)}
    torch.save({"model": state}, filename)


@contextlib.contextmanager
def _one_process_is_no_surprise() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _check_order(model: nn.Module) -> None:
    if has_reordered_rows(model):
        raise ValueError(
            "the policy reorders the rows of fused weights (n_fused with layout 'parts'), in each "
            "layout another way; save whole_state_dict(model) instead"
        )


def _stored(folder: str | os.PathLike[str]) -> dict[str, Any]:
    if not os.path.exists(os.path.join(folder, ".metadata")):
        raise FileNotFoundError(f"{folder} is no sharded checkpoint: it has no file .metadata")
    found: dict[str, Any] = filesystem.FileSystemReader(folder).read_metadata().state_dict_metadata
    return found


def _named(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    own = {id(param) for group in optimizer.param_groups for param in group["params"]}
    return {name: param for name, param in model.named_parameters() if id(param) in own}


def _states(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    return {n: optimizer.state[p] for n, p in _named(model, optimizer).items()}


def _places_for_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, stored: dict[str, Any]
) -> dict[str, Any]:
    """Returns empty tensors, cut as their parameters are, for the stored optimizer state."""
    places: dict[str, Any] = {}
    for name, param in _named(model, optimizer).items():
        prefix = f"{_STATE}{name}."
        for key, kept in stored.items():
            if not key.startswith(prefix):
                continue
            if not isinstance(kept, TensorStorageMetadata):
                places[key] = None
            elif kept.size == param.shape:
                places[key] = torch.zeros_like(param.detach(), dtype=kept.properties.dtype)
            else:
                places[key] = torch.zeros(kept.size, dtype=kept.properties.dtype)
    return places
