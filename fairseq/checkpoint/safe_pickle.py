"""Reads torch files without ever running what is in them.

A checkpoint is a pickle, and a pickle may name any function to be called. torch's restricted
unpickler (`weights_only=True`) does the reading; this module adds the harmless things that old
checkpoints hold, each replaced by a stand-in of ours, and says what a file wanted when it wants
more. A file's names are listed before anything in it is built.
"""

from __future__ import annotations

import argparse
import io
import pickletools
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch.serialization import safe_globals

__all__ = ["UnsafeCheckpointError", "globals_in", "load_pickled"]


class UnsafeCheckpointError(ValueError):
    """A file names a class or function that is not on the allow-list."""


class _StandIn:
    """Takes the place of an instance of a class that is not loaded; keeps its attributes."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def to_plain(self) -> Any:
        """Returns what the instance held, as a dictionary of its attributes."""
        return {key: _plain(value) for key, value in vars(self).items() if key != "args"}


class _TypeName(_StandIn):
    """Takes the place of a class that is only mentioned, such as the type of a setting."""

    def to_plain(self) -> Any:
        return None


class _Container(_StandIn):
    """An omegaconf dictionary or list."""

    def to_plain(self) -> Any:
        return _plain(vars(self).get("_content"))


class _Node(_StandIn):
    """An omegaconf value."""

    def to_plain(self) -> Any:
        return _plain(vars(self).get("_val"))


class _Dtype(_StandIn):
    """A numpy element type; only plain numbers and booleans are allowed."""

    byte_order = "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if len(state) > 1 and state[1] in ("<", ">"):
            self.byte_order = state[1]

    def resolve(self) -> np.dtype[Any]:
        spec = str(self.args[0])
        if not re.fullmatch(r"[biuf][1248]", spec):
            raise ValueError(f"numpy type {spec!r} is not a number")
        return np.dtype(self.byte_order + spec)

    def to_plain(self) -> Any:
        return None


class _Array(_StandIn):
    """A numpy array of numbers."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, self.shape, self.dtype, self.is_fortran, self.data = state

    def to_plain(self) -> Any:
        flat = np.frombuffer(_as_bytes(self.data), dtype=self.dtype.resolve())
        return flat.reshape(self.shape, order="F" if self.is_fortran else "C").copy()


def _as_bytes(data: bytes | str) -> bytes:
    return data.encode("latin1") if isinstance(data, str) else data


def _numpy_scalar(dtype: _Dtype, data: bytes | str) -> Any:
    return np.frombuffer(_as_bytes(data), dtype=dtype.resolve())[0].item()


def _new_array(*_: Any) -> _Array:
    return _Array()


def _enum_value(value: Any) -> Any:
    return value


def _path_text(*parts: str) -> str:
    return str(Path(*parts)) if parts else "."


def _names(module: str, *names: str) -> list[str]:
    return [f"{module}.{name}" for name in names]


def _allow_list() -> dict[str, Callable[..., Any]]:
    allowed: dict[str, Callable[..., Any]] = {"argparse.Namespace": argparse.Namespace}
    for core in ("numpy.core", "numpy._core"):
        allowed[f"{core}.multiarray.scalar"] = _numpy_scalar
        allowed[f"{core}.multiarray._reconstruct"] = _new_array
    allowed["numpy.dtype"] = _Dtype
    allowed["numpy.ndarray"] = _Array
    for module in ("pathlib", "pathlib._local"):
        for name in _names(module, "Path", "PosixPath", "WindowsPath", "PurePosixPath"):
            allowed[name] = _path_text
    # Before metrics were stored as plain numbers, meters were stored as objects.
    for module in ("fairseq.meters", "fairseq.logging.meters"):
        for name in _names(module, "AverageMeter", "TimeMeter", "StopwatchMeter"):
            allowed[name] = _StandIn
    for name in _names("omegaconf", "dictconfig.DictConfig", "listconfig.ListConfig"):
        allowed[name] = _Container
    for kind in ("Any", "Boolean", "Enum", "Float", "Integer", "String"):
        allowed[f"omegaconf.nodes.{kind}Node"] = _Node
    mentioned = _names("omegaconf.base", "ContainerMetadata", "Metadata")
    mentioned += _names("typing", "Any", "Dict", "List", "Optional", "Union")
    mentioned += _names("builtins", "bool", "dict", "float", "int", "list", "object", "str")
    allowed.update(dict.fromkeys(mentioned, _TypeName))
    return allowed


_ALLOWED = _allow_list()
# What configurations mention of fairseq itself: config classes, and choices, which are strings.
_CONFIG_CLASS = re.compile(r"fairseq(\.\w+)+\.\w*Config")
_CHOICES = re.compile(r"fairseq(\.\w+)*\.dataclass\.constants\.\w+")


def _stand_in_for(name: str) -> Callable[..., Any] | None:
    if name in _ALLOWED:
        return _ALLOWED[name]
    if _CONFIG_CLASS.fullmatch(name):
        return _TypeName
    return _enum_value if _CHOICES.fullmatch(name) else None


def globals_in(stream: BinaryIO) -> set[str]:
    """Returns the `module.name` of every class and function one pickle refers to.

    Args:
        stream: positioned at the start of the pickle; left behind its end.
    """
    from torch._utils import IMPORT_MAPPING, NAME_MAPPING

    found: set[str] = set()
    texts: list[str] = []
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name in ("GLOBAL", "INST"):
            module, name = str(argument).split(" ", 1)
            module, name = NAME_MAPPING.get(
                (module, name), (IMPORT_MAPPING.get(module, module), name)
            )
            found.add(f"{module}.{name}")
        elif opcode.name == "STACK_GLOBAL":
            found.add(".".join(texts[-2:]))
        elif isinstance(argument, str):
            texts.append(argument)
    return found


def _pickles_of(path: Path) -> Iterator[BinaryIO]:
    """Yields the pickle inside a torch file: a record of a zip file, or the file's head."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for record in archive.infolist():
                if record.filename.endswith(".pkl"):
                    if record.CRC == 0:
                        # torch was told to write no checksums; zipfile would compare with the 0.
                        del record.CRC
                    yield io.BytesIO(archive.read(record))
        return
    with path.open("rb") as stream:
        # Before torch 1.6: magic number, protocol, system, the object, keys; raw numbers follow.
        for _ in range(5):
            yield stream


def _unknown_to_torch(path: Path) -> list[str]:
    """Returns the names in a file that torch's restricted unpickler refuses, sorted."""
    from torch import _weights_only_unpickler

    names: set[str] = set()
    for stream in _pickles_of(path):
        names |= globals_in(stream)
    return sorted(names - set(_weights_only_unpickler._get_allowed_globals()))


def load_pickled(path: Path, *, memory_map: bool = False) -> Any:
    """Loads a torch file to the CPU; nothing but data is made of it.

    Args:
        path: the file, zip or of torch before 1.6.
        memory_map: leave tensors in the file until they are used (zip files only).

    Raises:
        UnsafeCheckpointError: it refers to a class or function that is not on the allow-list; the
            message names it.
        Exception: whatever torch raises for a file that is no torch file.
    """
    stand_ins: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = []
    refused = []
    for name in _unknown_to_torch(path):
        stand_in = _stand_in_for(name)
        if stand_in is None:
            refused.append(name)
        else:
            stand_ins.append((stand_in, name))
    if refused:
        raise UnsafeCheckpointError(
            f"{path} is refused: loading it would call {', '.join(refused)}, which a checkpoint of "
            "tensors and settings has no need of; if you trust the file, load it with "
            "torch.load(..., weights_only=False) and save its 'model' and 'cfg' anew"
        )
    mapped = memory_map and zipfile.is_zipfile(path)
    with safe_globals(stand_ins), warnings.catch_warnings():
        # Storages of old files are typed, which torch deprecates.
        warnings.filterwarnings("ignore", message="TypedStorage is deprecated")
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    return _plain(loaded)


def _plain(value: Any) -> Any:
    """Replaces stand-ins by plain data, all the way down."""
    if isinstance(value, _StandIn):
        return value.to_plain()
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(item) for item in value)
    if isinstance(value, argparse.Namespace):
        for key, item in list(vars(value).items()):
            setattr(value, key, _plain(item))
    return value
