"""The base of every config dataclass, and what their fields may say of themselves.

A field's metadata: `help`; `choices` (list of str); `argparse_alias` (a second option name);
`argparse_const` (the value of the option given bare); `minimum`, `maximum` (of a number, or of each
number in a list; the command line is held to them); `unsupported` (a reason: any value but the
default ends the command with exit 2); `unsupported_values` (value -> reason, likewise);
`extension` (True: a field the original does not have, which is kept out of a checkpoint's `cfg`).
"""

from __future__ import annotations

import dataclasses
import enum
import typing
from dataclasses import MISSING as DATACLASS_MISSING
from dataclasses import dataclass
from typing import Any

__all__ = ["II", "MISSING", "ChoiceEnum", "FairseqDataclass", "is_interpolated"]

MISSING = "???"
"""Marks a field that has no default and must be given."""


def II(path: str) -> Any:
    """Marks a default that is filled from the flat option of the same name.

    `lr: list[float] = II("optimization.lr")` gets no option of its own; it takes the value of
    the option `--lr`, whichever section that belongs to.
    """
    return "${" + path + "}"


def is_interpolated(default: Any) -> bool:
    """Tells whether a default was made by `II` (or by omegaconf's function of that name)."""
    return isinstance(default, str) and default.startswith("${") and default.endswith("}")


class StrEnum(str, enum.Enum):
    """An enum whose members are equal to, and print as, their values."""

    def __str__(self) -> str:
        return str(self.value)

    def __repr__(self) -> str:
        return str(self.value)


def ChoiceEnum(choices: list[str]) -> Any:
    """Returns an enum of strings, for the annotation of a field with fixed choices."""
    make: Any = StrEnum  # called like this, an enum class without members makes a new one
    return make("Choices", {choice: choice for choice in choices})


@dataclass
class FairseqDataclass:
    """Base of the config dataclasses. `_name` is the registered name a section was chosen by."""

    _name: str | None = None

    @classmethod
    def field_types(cls) -> dict[str, Any]:
        """Returns field name -> resolved type annotation."""
        return typing.get_type_hints(cls)

    @classmethod
    def default_of(cls, field: dataclasses.Field[Any]) -> Any:
        """Returns a fresh default of a field; `MISSING` if it has none."""
        if field.default is not DATACLASS_MISSING:
            return field.default
        if field.default_factory is not DATACLASS_MISSING:
            return field.default_factory()
        return MISSING

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)

    def get(self, name: str, default: Any = None) -> Any:
        """Returns a field's value, `default` if there is no such field."""
        return getattr(self, name, default)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and hasattr(self, name)
