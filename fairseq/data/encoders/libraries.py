"""Loads the libraries behind encodings, and the files that they read."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

__all__ = ["load_library", "needed_file"]


def load_library(module: str, package: str, flag: str) -> Any:
    """Returns a module.

    Args:
        module: its name.
        package: what to install for it.
        flag: what the user chose, for messages.

    Raises:
        ImportError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{flag} needs {package}: pip install {package} ({error})") from error


def needed_file(path: str | None, flag: str) -> str:
    """Returns the path of a file that an encoding reads.

    Raises:
        ValueError: it is not given.
        FileNotFoundError: there is no such file.
    """
    if not path:
        raise ValueError(f"{flag} is needed: the file that the text was segmented with")
    if not Path(path).is_file():
        raise FileNotFoundError(f"{flag}: there is no file {path}")
    return str(path)
