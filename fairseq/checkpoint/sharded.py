"""Tensors in a folder to which every process writes its parts, and which any other layout reads.

Written by `torch.distributed.checkpoint` (DCP), which balances what several processes hold alike.
DCP's own list of parts, `.metadata`, is a pickle; it is written for torch's tools and never read
here. What is read is `parts.json`, and tensors by torch's restricted unpickler, each compared with
its checksum: no file of a folder can have code run.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import warnings
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import filesystem, state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from fairseq.checkpoint.records import check_records

__all__ = ["LIST_OF_PARTS", "StoredTensor", "read_tensors", "stored_tensors", "write_tensors"]

LIST_OF_PARTS = "parts.json"
_FILE = re.compile(r"__\d+_\d+\.distcp")
_REMEDY = "use an earlier checkpoint"


@dataclass(frozen=True)
class StoredTensor:
    """What the list of parts says of a tensor.

    Attributes:
        size: of the whole.
        dtype: of the whole.
        parts: `{offsets, sizes, file, start, length}` of each part, as in the list.
    """

    size: torch.Size
    dtype: torch.dtype
    parts: list[dict[str, Any]]


def write_tensors(folder: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes tensors in parts; every process of the run must call it.

    Args:
        folder: on a disk that all processes see; made if it is not there.
        tensors: the same names on every process; DTensors, or tensors that are alike everywhere.

    Raises:
        OSError: a process could not write.
    """
    with _plain_errors(folder, "is not written"):
        state_dict_saver.save(
            dict(tensors), storage_writer=_Writer(folder), no_dist=not dist.is_initialized()
        )


def stored_tensors(folder: str | os.PathLike[str]) -> dict[str, StoredTensor]:
    """Returns what a folder holds, without reading it.

    Raises:
        FileNotFoundError: there is no such folder, or one without a list of parts.
        ValueError: the list is damaged, or claims what the files do not have.
    """
    path = Path(folder) / LIST_OF_PARTS
    if not path.exists():
        raise FileNotFoundError(f"{folder} is no sharded checkpoint: it has no file {path.name}")
    try:
        content = json.loads(path.read_bytes())
        listed = content["tensors"]
        if content["checksum"] != _checksum(listed):
            raise ValueError("its checksum does not fit")
        found = {name: _stored(each) for name, each in listed.items()}
        for name, tensor in found.items():
            _check_parts(Path(folder), name, tensor)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}); {_REMEDY}") from error
    return found


def read_tensors(folder: str | os.PathLike[str], into: Mapping[str, torch.Tensor]) -> None:
    """Reads tensors, or this process's parts of them; needs no other process.

    Args:
        folder: written by `write_tensors`, in any layout.
        into: name -> tensor or DTensor of the stored size, which is filled.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: a tensor is not there or has another size, or a file is damaged.
    """
    stored = stored_tensors(folder)
    for name, place in into.items():
        if name not in stored:
            raise ValueError(f"{folder} has no tensor {name}")
        if stored[name].size != place.shape:
            raise ValueError(
                f"{folder}: {name} is {tuple(stored[name].size)}, not {tuple(place.shape)}"
            )
    if not into:
        return
    with _plain_errors(folder, "cannot be read"):
        reader = _Reader(folder, stored)
        state_dict_loader.load(dict(into), storage_reader=reader, no_dist=True)


class _Writer(filesystem.FileSystemWriter):
    """Writes the list of parts as JSON too."""

    def finish(self, metadata: Metadata, results: Any) -> None:
        super().finish(metadata, results)
        where = {each.index: each.storage_data for some in results for each in some}
        listed = {
            name: _listed(name, each, where)
            for name, each in metadata.state_dict_metadata.items()
            if isinstance(each, TensorStorageMetadata)
        }
        text = json.dumps({"checksum": _checksum(listed), "tensors": listed})
        with open(os.path.join(self.path, LIST_OF_PARTS), "w", encoding="ascii") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())

    def storage_meta(self) -> None:
        """Leaves out where the folder was written."""


class _Reader(filesystem.FileSystemReader):
    """Reads by the list of parts, and compares what it reads with its checksums."""

    def __init__(self, folder: str | os.PathLike[str], stored: Mapping[str, StoredTensor]) -> None:
        super().__init__(folder)
        self._stored = stored

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        where = {}
        for name, tensor in self._stored.items():
            for part in tensor.parts:
                place = filesystem._StorageInfo(
                    relative_path=part["file"], offset=part["start"], length=part["length"]
                )
                where[MetadataIndex(name, part["offsets"])] = place
        return Metadata(
            state_dict_metadata={name: _metadata(each) for name, each in self._stored.items()},
            storage_data=where,
        )

    def _slice_file(self, file: Any, sinfo: Any) -> IO[bytes]:
        file.seek(sinfo.offset)
        part = io.BytesIO(file.read(sinfo.length))
        check_records(part, f"{file.name} at {sinfo.offset}")
        return part


def _listed(name: str, tensor: TensorStorageMetadata, where: Mapping[Any, Any]) -> dict[str, Any]:
    parts = []
    for chunk in tensor.chunks:
        place = where[MetadataIndex(name, chunk.offsets)]
        parts.append(
            {
                "offsets": list(chunk.offsets),
                "sizes": list(chunk.sizes),
                "file": place.relative_path,
                "start": place.offset,
                "length": place.length,
            }
        )
    dtype = str(tensor.properties.dtype).removeprefix("torch.")
    return {"size": list(tensor.size), "dtype": dtype, "parts": parts}


def _checksum(listed: Any) -> int:
    return zlib.crc32(json.dumps(listed, sort_keys=True).encode())


def _stored(listed: Mapping[str, Any]) -> StoredTensor:
    dtype = getattr(torch, str(listed["dtype"]), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{listed['dtype']!r} is no type of numbers")
    return StoredTensor(torch.Size(listed["size"]), dtype, list(listed["parts"]))


def _check_parts(folder: Path, name: str, tensor: StoredTensor) -> None:
    """Refuses files outside of the folder, and more numbers than the files can hold."""
    for part in tensor.parts:
        if not _FILE.fullmatch(part["file"]):
            raise ValueError(f"{name} lies in {part['file']!r}, which is no file of parts")
        num_bytes = math.prod(part["sizes"]) * tensor.dtype.itemsize
        end = part["start"] + part["length"]
        if min(part["start"], *part["sizes"], 0) < 0 or num_bytes > part["length"]:
            raise ValueError(f"a part of {name} claims more numbers than it has bytes")
        if end > (folder / part["file"]).stat().st_size:
            raise ValueError(f"{part['file']} is truncated")
    if sum(math.prod(part["sizes"]) for part in tensor.parts) != tensor.size.numel():
        raise ValueError(f"the parts of {name} are not the whole of it")


def _metadata(tensor: StoredTensor) -> TensorStorageMetadata:
    return TensorStorageMetadata(
        TensorProperties(dtype=tensor.dtype),
        tensor.size,
        [
            ChunkStorageMetadata(torch.Size(part["offsets"]), torch.Size(part["sizes"]))
            for part in tensor.parts
        ],
    )


@contextlib.contextmanager
def _plain_errors(folder: str | os.PathLike[str], what: str) -> Iterator[None]:
    """Raises what failed within DCP, whose own exception is none that anybody catches."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is", UserWarning)
        try:
            yield
        except CheckpointException as error:
            rank, (cause, _) = next(iter(error.failures.items()))
            message = f"{folder} {what} (process {rank}: {cause})"
            if isinstance(cause, OSError):
                raise OSError(cause.errno, message) from error
            raise ValueError(f"{message}; {_REMEDY}") from error
