"""From a path to the dictionary in a checkpoint file, or one message that says what is wrong."""

from __future__ import annotations

import os
import struct
import zipfile
from pathlib import Path
from typing import Any

from fairseq.checkpoint.safe_pickle import UnsafeCheckpointError, load_pickled

__all__ = ["read_checkpoint"]

_REMEDY = "copy it anew from where it came, or use an earlier checkpoint"
_ZIP_MAGIC = b"PK\x03\x04"
# What zipfile raises: names that are no UTF-8 and parts that claim to be encrypted among them.
_DAMAGED_ZIP = (
    *(zipfile.BadZipFile, struct.error, UnicodeDecodeError, NotImplementedError),
    *(RuntimeError, EOFError, OSError),
)
# What torch before 1.6 starts its files with: a pickle of one long number.
_OLD_MAGIC = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"


def read_checkpoint(
    path: str | os.PathLike[str], *, memory_map: bool = False, check: bool = True
) -> dict[str, Any]:
    """Reads a checkpoint file to the CPU without running anything that is in it.

    Args:
        path: the file.
        memory_map: leave tensors in the file until they are used. The file must not be written to
            while they are.
        check: compare the file's contents with the checksums in it, which costs about 0.4 s for a
            GB. Files of torch before 1.6 have none.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is empty, truncated, damaged, or no checkpoint, or wants to run code.
    """
    path = Path(path)
    _check_kind(path)
    if zipfile.is_zipfile(path):
        _check_contents(path, compare=check)
    try:
        state = load_pickled(path, memory_map=memory_map)
    except UnsafeCheckpointError:
        raise
    except Exception as error:
        # A damaged pickle can fail in any way: a wrong index, a missing key, a wrong type.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path} cannot be read as a checkpoint, it is truncated, damaged or of another kind "
            f"({reason}); {_REMEDY}"
        ) from error
    if not isinstance(state, dict):
        raise ValueError(
            f"{path} holds a {type(state).__name__}, not the dictionary of a checkpoint"
        )
    return state


def _check_kind(path: Path) -> None:
    if not path.exists():
        raise FileNotFoundError(f"Model file not found: {path}")
    if not path.is_file():
        raise ValueError(f"{path} is a folder; name the checkpoint file in it")
    with path.open("rb") as stream:
        head = stream.read(32)
    if not head:
        raise ValueError(f"{path} is empty (0 bytes), not a checkpoint; {_REMEDY}")
    if head.startswith(_ZIP_MAGIC):
        if not zipfile.is_zipfile(path):
            size = path.stat().st_size
            raise ValueError(f"{path} is truncated: it ends after {size:,} bytes; {_REMEDY}")
    elif _OLD_MAGIC not in head:
        raise ValueError(f"{path} is no torch file, so no checkpoint; {_REMEDY}")


def _check_contents(path: Path, *, compare: bool) -> None:
    """Looks at the records of a zip file, and compares each with its checksum if asked to.

    torch itself compares none. It writes none compressed, but reads such ones, to any size.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if not any(name.endswith("data.pkl") for name in archive.namelist()):
                raise ValueError(f"{path} is a zip file, but not one that torch.save wrote")
            records = archive.infolist()
            is_larger = sum(record.file_size for record in records) > path.stat().st_size
            if is_larger or any(record.compress_type != zipfile.ZIP_STORED for record in records):
                raise ValueError(
                    f"{path} claims to hold more than the file has, or holds compressed parts, "
                    f"which no checkpoint does; {_REMEDY}"
                )
            # torch can be told to write no checksums (`set_crc32_options`); all are 0 then.
            has_checksums = compare and any(record.CRC for record in records)
            damaged = archive.testzip() if has_checksums else None
    except _DAMAGED_ZIP as error:
        raise ValueError(f"{path} is damaged ({error}); {_REMEDY}") from error
    if damaged is not None:
        raise ValueError(
            f"{path} is damaged: the checksum of its part {damaged} does not fit; {_REMEDY}"
        )
