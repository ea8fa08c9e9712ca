"""What has to be installed besides this project."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

__all__ = ["import_transformers"]


def import_transformers(module: str = "") -> ModuleType:
    """Imports transformers, or one of its modules.

    Args:
        module: name below `transformers`, such as `masking_utils`.

    Raises:
        ImportError: it is not installed, or too old; with the command that installs it.
    """
    try:
        return import_module(f"transformers.{module}" if module else "transformers")
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("transformers"):
            raise
        raise ImportError(
            "ALiBi for Hugging Face models needs transformers 4.53 or newer: "
            "pip install -c constraints.txt -e '.[hf]'"
        ) from error
