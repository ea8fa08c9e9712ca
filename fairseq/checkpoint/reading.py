"""From a path to the dictionary in a checkpoint file, or one message that says what is wrong."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

from fairseq.checkpoint.index import Place, is_index, join
from fairseq.checkpoint.records import REMEDY, check_records
from fairseq.checkpoint.safe_pickle import UnsafeCheckpointError, load_pickled

__all__ = ["read_checkpoint", "read_index"]

_ZIP_MAGIC = b"PK\x03\x04"
# What torch before 1.6 starts its files with: a pickle of one long number.
_OLD_MAGIC = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"


def read_checkpoint(
    path: str | os.PathLike[str],
    *,
    memory_map: bool = False,
    check: bool = True,
    place: Place | None = None,
) -> dict[str, Any]:
    """Reads a checkpoint file to the CPU without running anything that is in it.

    Args:
        path: the file.
        memory_map: leave tensors in the file until they are used. The file must not be written to
            while they are.
        check: compare the file's contents with the checksums in it, which costs about 0.4 s for a
            GB. Files of torch before 1.6 have none.
        place: makes what tensors that lie in parts are read into; None reads them whole.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is empty, truncated, damaged, or no checkpoint, or wants to run code.
    """
    state = read_index(path, memory_map=memory_map, check=check)
    return join(state, path, place) if is_index(state) else state


def read_index(
    path: str | os.PathLike[str], *, memory_map: bool = True, check: bool = False
) -> dict[str, Any]:
    """Reads the file alone, without the tensors that lie in parts; see `read_checkpoint`."""
    path = Path(path)
    _check_kind(path)
    if _is_zip(path):
        with path.open("rb") as stream:
            check_records(stream, path, compare=check)
    try:
        state = load_pickled(path, memory_map=memory_map)
    except UnsafeCheckpointError:
        raise
    except Exception as error:
        # A damaged pickle can fail in any way: a wrong index, a missing key, a wrong type.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path} cannot be read as a checkpoint, it is truncated, damaged or of another kind "
            f"({reason}); {REMEDY}"
        ) from error
    if not isinstance(state, dict):
        raise ValueError(
            f"{path} holds a {type(state).__name__}, not the dictionary of a checkpoint"
        )
    return state


def _is_zip(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile as error:
        # As of Python 3.11 for a file that claims to be one of several.
        raise ValueError(f"{path} is damaged ({error}); {REMEDY}") from error


def _check_kind(path: Path) -> None:
    if not path.exists():
        raise FileNotFoundError(f"Model file not found: {path}")
    if not path.is_file():
        raise ValueError(f"{path} is a folder; name the checkpoint file in it")
    with path.open("rb") as stream:
        head = stream.read(32)
    if not head:
        raise ValueError(f"{path} is empty (0 bytes), not a checkpoint; {REMEDY}")
    if head.startswith(_ZIP_MAGIC):
        if not _is_zip(path):
            size = path.stat().st_size
            raise ValueError(f"{path} is truncated: it ends after {size:,} bytes; {REMEDY}")
    elif head[8:10] == b'{"':  # after the length of a safetensors header, the header
        raise ValueError(
            f"{path} is a safetensors file; make a checkpoint of its folder: fairseq-export "
            f"--path {path.parent} --from safetensors --output checkpoint.pt (--from hf if there "
            "is a config.json)"
        )
    elif _OLD_MAGIC not in head:
        raise ValueError(f"{path} is no torch file, so no checkpoint; {REMEDY}")
