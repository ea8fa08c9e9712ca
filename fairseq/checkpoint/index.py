"""Checkpoints in parts: a small file of the usual name, and a folder with the tensors beside it.

The file has the layout of a whole checkpoint (`fairseq/checkpoint/format.py`), but an entry of the
folder (`fairseq/checkpoint/sharded.py`) stands in the place of each large tensor, and the folder's
name under `alibi`. So the file replaces an older one at a stroke, whatever the size of the model,
and its other names are links to it; a folder that no file names any more goes.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from fairseq.checkpoint.format import ALIBI_KEY
from fairseq.checkpoint.safe_pickle import load_pickled
from fairseq.checkpoint.writing import save_atomically, sync_folder

__all__ = ["Place", "free_folder", "is_index", "join", "remove_unused", "split", "write_in_parts"]

logger = logging.getLogger(__name__)

Place = Callable[[tuple[Any, ...], torch.Tensor], "torch.Tensor | None"]
"""(keys that lead to a tensor, its size and type on the device `meta`) -> what it is read into;
None is a whole tensor."""

_FOLDER = "parts"
_ENTRY = "tensor in parts"
_FEWEST = 1024
"""Numbers of a tensor that is not worth an entry of its own."""
_NAME = re.compile(r"[\w.-]+\.parts")


def is_index(state: Any) -> bool:
    """Tells whether a checkpoint's tensors lie in a folder beside it."""
    record = state.get(ALIBI_KEY) if isinstance(state, Mapping) else None
    return isinstance(record, Mapping) and _FOLDER in record


def split(
    state: Mapping[str, Any], folder: str, *, is_master: bool = True
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Takes the large tensors out of a checkpoint.

    Args:
        state: a checkpoint's content; its tensors may be DTensors.
        folder: name of the folder that they are for.
        is_master: names tensors that share their numbers once. Other processes cannot tell them,
            since they may have none of the numbers.

    Returns:
        (content with entries in their place, tensors by name).
    """
    tensors: dict[str, torch.Tensor] = {}
    names: dict[Any, str] = {}

    def entry(path: tuple[Any, ...], tensor: torch.Tensor) -> Any:
        if not hasattr(tensor, "to_local") and tensor.numel() < _FEWEST:
            return tensor
        name = ".".join(str(key) for key in path)
        shared = names.setdefault(_identity(tensor, name), name) if is_master else name
        tensors[shared] = tensor
        dtype = str(tensor.dtype).removeprefix("torch.")
        return {_ENTRY: shared, "size": list(tensor.shape), "dtype": dtype}

    index = _mapped(state, entry, ())
    index[ALIBI_KEY] = {**index[ALIBI_KEY], _FOLDER: folder}
    return index, tensors


def _identity(tensor: Any, name: str) -> Any:
    """Returns the same for tensors that share their numbers, such as tied embeddings."""
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    if local.numel() == 0:
        return name
    return local.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def join(
    index: Mapping[str, Any], path: str | os.PathLike[str], place: Place | None = None
) -> dict[str, Any]:
    """Puts the tensors of the folder back into a checkpoint's content.

    Args:
        index: what the file holds.
        path: of the file.
        place: makes what they are read into.

    Raises:
        FileNotFoundError: the folder is not there.
        ValueError: it is damaged, or not this file's.
    """
    name = str(index[ALIBI_KEY][_FOLDER])
    folder = Path(path).parent / name
    if not _NAME.fullmatch(name):
        raise ValueError(f"{path} names the folder {name!r}, which is none of parts")
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{path} has its tensors in the folder {folder}, which is not there; keep the two "
            "together, or make one file of them with scripts/whole_checkpoint.py"
        )
    # Here, since it takes a good part of a second and most checkpoints are whole.
    from fairseq.checkpoint.sharded import read_tensors, stored_tensors

    stored = stored_tensors(folder)
    into: dict[str, torch.Tensor] = {}

    def tensor(keys: tuple[Any, ...], like: torch.Tensor, name: str) -> torch.Tensor:
        there = stored.get(name)
        if there is None or (there.size, there.dtype) != (like.shape, like.dtype):
            raise ValueError(f"{folder} does not have the {name} that {path} names")
        if name not in into:
            made = None if place is None else place(keys, like)
            into[name] = torch.empty_like(like, device="cpu") if made is None else made
        return into[name]

    state: dict[str, Any] = _filled(index, tensor, ())
    state[ALIBI_KEY] = {k: v for k, v in state[ALIBI_KEY].items() if k != _FOLDER}
    read_tensors(folder, {k: each for k, each in into.items() if each.device.type != "meta"})
    return state


def _mapped(value: Any, function: Callable[..., Any], path: tuple[Any, ...]) -> Any:
    """Applies a function to the tensors of nested containers."""
    if isinstance(value, torch.Tensor):
        return function(path, value)
    if isinstance(value, Mapping):
        return {key: _mapped(item, function, (*path, key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_mapped(v, function, (*path, i)) for i, v in enumerate(value))
    return value


def _filled(value: Any, function: Callable[..., Any], path: tuple[Any, ...]) -> Any:
    """Applies a function to the entries of nested containers."""
    if isinstance(value, Mapping) and _ENTRY in value:
        dtype = getattr(torch, str(value["dtype"]), None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{value['dtype']!r} is no type of numbers")
        like = torch.empty(value["size"], dtype=dtype, device="meta")
        return function(path, like, str(value[_ENTRY]))
    if isinstance(value, Mapping):
        return {key: _filled(item, function, (*path, key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_filled(v, function, (*path, i)) for i, v in enumerate(value))
    return value


# ---- writing ----


def free_folder(save_dir: str | os.PathLike[str], stem: str) -> str:
    """Returns a name for a folder of parts that is free."""
    numbers = (f".{number}" if number > 1 else "" for number in itertools.count(1))
    names = (f"{stem}{number}.parts" for number in numbers)
    taken = {path.name.removesuffix(".tmp") for path in Path(save_dir).glob("*.parts*")}
    return next(name for name in names if name not in taken)


def write_in_parts(
    state: Mapping[str, Any],
    path: str | os.PathLike[str],
    *,
    stem: str,
    is_master: bool = True,
    agree: Callable[[Any], Any] = lambda value: value,
) -> None:
    """Writes a checkpoint in parts; every process must call it.

    A process that is killed meanwhile leaves the file that was there before, and its folder.

    Args:
        state: the content; only the master's counts, but for the tensors.
        path: of the file.
        stem: what the name of the folder begins with.
        is_master: whether this process writes the file.
        agree: returns the master's value on every process.

    Raises:
        OSError: a process could not write.
    """
    from fairseq.checkpoint.sharded import stored_tensors, write_tensors

    path = Path(path)
    folder = agree(free_folder(path.parent, stem) if is_master else "")
    index, tensors = split(state, folder, is_master=is_master)
    unfinished = path.parent / f"{folder}.tmp"
    write_tensors(unfinished, {name: tensors[name] for name in agree(list(tensors))})
    if is_master:
        try:
            stored_tensors(unfinished)
        except ValueError as error:
            raise OSError(
                f"checkpoint not written: {error}; do all processes see the same disk?"
            ) from error
        os.replace(unfinished, path.parent / folder)
        sync_folder(path.parent)
        save_atomically(index, path)


def remove_unused(save_dir: str | os.PathLike[str]) -> None:
    """Removes folders of parts that no checkpoint beside them names, and unfinished ones.

    Args:
        save_dir: folder with the checkpoints. Nobody must be writing there.
    """
    used = set()
    for path in sorted(Path(save_dir).glob("*.pt")):
        try:
            used.add(_folder_of(path))
        except Exception as error:  # whatever a damaged pickle makes of it
            logger.warning(f"folders of parts are kept, since {path} cannot be read: {error}")
            return
    for folder in sorted(Path(save_dir).glob("*.parts*")):
        if folder.is_dir() and folder.name not in used:
            # Renamed first, so that nothing takes half of it for a checkpoint.
            gone = folder.with_name(folder.name.removesuffix(".tmp") + ".tmp")
            with suppress(OSError):
                os.replace(folder, gone)
                shutil.rmtree(gone)


def _folder_of(path: Path) -> str | None:
    state = load_pickled(path, memory_map=True)
    return str(state[ALIBI_KEY][_FOLDER]) if is_index(state) else None
