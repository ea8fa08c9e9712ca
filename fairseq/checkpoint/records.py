"""The zip file that `torch.save` writes: its records, compared with the checksums in it."""

from __future__ import annotations

import os
import struct
import zipfile
from typing import BinaryIO

__all__ = ["REMEDY", "check_records"]

REMEDY = "copy it anew from where it came, or use an earlier checkpoint"
# What zipfile raises: names that are no UTF-8 and parts that claim to be encrypted among them.
_DAMAGED_ZIP = (
    *(zipfile.BadZipFile, struct.error, UnicodeDecodeError, NotImplementedError),
    *(RuntimeError, EOFError, OSError),
)


def check_records(stream: BinaryIO, name: object, *, compare: bool = True) -> None:
    """Looks at the records of a zip file, and compares each with its checksum.

    torch itself compares none. It writes none compressed, but reads such ones, to any size.

    Args:
        stream: of the file, which can be positioned; left at its start.
        name: of the file, for messages.
        compare: False leaves out the checksums, which cost about 0.4 s for a GB.

    Raises:
        ValueError: it is damaged, or not what `torch.save` writes.
    """
    size = stream.seek(0, os.SEEK_END)
    try:
        with zipfile.ZipFile(stream) as archive:
            if not any(each.endswith("data.pkl") for each in archive.namelist()):
                raise ValueError(f"{name} is a zip file, but not one that torch.save wrote")
            records = archive.infolist()
            is_larger = sum(record.file_size for record in records) > size
            if is_larger or any(record.compress_type != zipfile.ZIP_STORED for record in records):
                raise ValueError(
                    f"{name} claims to hold more than the file has, or holds compressed parts, "
                    f"which no checkpoint does; {REMEDY}"
                )
            # torch can be told to write no checksums (`set_crc32_options`); all are 0 then.
            has_checksums = compare and any(record.CRC for record in records)
            damaged = archive.testzip() if has_checksums else None
    except _DAMAGED_ZIP as error:
        raise ValueError(f"{name} is damaged ({error}); {REMEDY}") from error
    if damaged is not None:
        raise ValueError(
            f"{name} is damaged: the checksum of its part {damaged} does not fit; {REMEDY}"
        )
    stream.seek(0)
