"""From config dataclasses to command-line options and back.

A dataclass field becomes one option (`tokens_per_sample` -> `--tokens-per-sample`); the flat
namespace that argparse returns is cut into dataclass instances again by field name.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import enum
import math
import types
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any, NoReturn, TypeVar

from fairseq.dataclass.base import MISSING, FairseqDataclass, is_interpolated

__all__ = ["CommandParser", "cast", "fill_dataclass", "literal_dict", "whole_number"]

C = TypeVar("C", bound=FairseqDataclass)


class CommandParser(argparse.ArgumentParser):
    """An argument parser that makes options from dataclasses and refuses unsupported ones."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)
        self._unsupported: dict[str, tuple[str, Any, str]] = {}
        self._unsupported_values: dict[str, tuple[str, dict[str, str]]] = {}

    def error(self, message: str) -> NoReturn:
        """Ends the command with exit 2 and one message, without a page of options before it."""
        self.exit(2, f"{self.prog}: error: {message}\n{self.prog} --help lists the options.\n")

    def add_dataclass(
        self,
        title: str,
        config: type[FairseqDataclass],
        *,
        suppress_defaults: bool = False,
        only: Collection[str] | None = None,
    ) -> None:
        """Adds a group with one option for each field that is not interpolated.

        A field whose option exists already is passed over: the first definition counts.

        Args:
            title: heading of the group in `--help`.
            config: the dataclass.
            suppress_defaults: leave options that are not given out of the namespace, instead of
                setting their defaults.
            only: names of the fields that get an option; None is all of them.
        """
        group = self.add_argument_group(title)
        hints = config.field_types()
        for field in dataclasses.fields(config):
            default = config.default_of(field)
            if field.name == "_name" or is_interpolated(default):
                continue
            if only is not None and field.name not in only:
                continue
            self._add_field(group, field, hints[field.name], default, suppress_defaults)

    def _add_field(
        self,
        group: Any,
        field: dataclasses.Field[Any],
        hint: Any,
        default: Any,
        suppress_defaults: bool,
    ) -> None:
        metadata = field.metadata
        if field.name == "data":
            # Positional, and optional for argparse because a settings file may name it too.
            group.add_argument("data", nargs="?", default=None, help=metadata.get("help"))
            return
        names = ["--" + field.name.replace("_", "-")]
        if alias := metadata.get("argparse_alias"):
            names.append(alias)
        if names[0] in self._option_string_actions:
            return
        names = [name for name in names if name not in self._option_string_actions]
        keywords: dict[str, Any] = {"dest": field.name, "help": metadata.get("help")}
        if default is MISSING or default == MISSING:
            keywords["required"] = not suppress_defaults
            default = None
        keywords["default"] = argparse.SUPPRESS if suppress_defaults else default
        kind, element = _kind_of(hint)
        choices = metadata.get("choices") or _enum_values(kind)
        if kind is bool:
            keywords["action"] = "store_false" if default is True else "store_true"
        else:
            keywords["metavar"] = _metavar(field.name, kind, choices)
            if choices:
                keywords["choices"] = list(choices)
            if kind is list:
                keywords["type"] = _list_parser(element, names[0], metadata)
            elif kind in (int, float):
                keywords["type"] = _number_parser(kind, metadata)
            if "argparse_const" in metadata:
                keywords.update(nargs="?", const=metadata["argparse_const"])
        if reason := metadata.get("unsupported"):
            keywords["help"] = argparse.SUPPRESS
            self._unsupported[field.name] = (names[0], default, reason)
        if values := metadata.get("unsupported_values"):
            self._unsupported_values[field.name] = (names[0], values)
        if keywords["help"] is not argparse.SUPPRESS:
            keywords["help"] = _help_text(keywords["help"], default)
        group.add_argument(*names, **keywords)

    def refuse_unsupported(self, args: argparse.Namespace) -> None:
        """Ends the command with exit 2 if an unsupported option has another value than its default.

        Options that do not exist in this project are refused like this, never ignored.
        """
        for dest, (flag, default, reason) in self._unsupported.items():
            value = getattr(args, dest, default)
            if value != default and value is not None:
                self.error(f"{flag} is not supported: {reason}")
        for dest, (flag, values) in self._unsupported_values.items():
            value = getattr(args, dest, None)
            if value in values:
                self.error(f"{flag} {value} is not supported: {values[value]}")

    def known_flags(self) -> list[str]:
        """Returns every option string of this parser."""
        return list(self._option_string_actions)

    def usable_flags(self) -> list[str]:
        """Returns the option strings that are not refused as unsupported."""
        actions = self._option_string_actions
        return [flag for flag, action in actions.items() if action.dest not in self._unsupported]


def _kind_of(hint: Any) -> tuple[Any, Any]:
    """Returns (type, element type) of an annotation; None | X counts as X, a tuple as a list."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next((a for a in typing.get_args(hint) if a is not type(None)), Any)
    if typing.get_origin(hint) in (list, tuple) or hint in (list, tuple):
        arguments = typing.get_args(hint)
        return list, arguments[0] if arguments else Any
    return hint, None


def _is_optional(hint: Any) -> bool:
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return hint is Any or (is_union and type(None) in typing.get_args(hint))


def _enum_values(kind: Any) -> list[str] | None:
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return [str(member.value) for member in kind]
    return None


def _metavar(name: str, kind: Any, choices: Any) -> str:
    if choices:
        return "{" + ",".join(str(choice) for choice in choices) + "}"
    if kind in (int, float):
        return "N" if kind is int else "X"
    return name.rsplit("_", 1)[-1].upper()


def _help_text(text: str | None, default: Any) -> str | None:
    """Returns the text for `--help`, with the default where there is one to speak of."""
    if text is None:
        return None
    if default not in (None, False, True, "", [], MISSING) and "default" not in text:
        text += f" (default: {default})"
    return text.replace("%", "%%")


def _list_parser(element: Any, flag: str, metadata: Mapping[str, Any]) -> Any:
    def parse(text: str) -> list[Any]:
        try:
            values = _cast_list(text, element, flag)
        except ValueError as error:
            # argparse names the flag itself.
            raise argparse.ArgumentTypeError(str(error).removeprefix(f"{flag}: ")) from None
        if not values and "minimum" in metadata:
            raise argparse.ArgumentTypeError("it is empty; give a number or a list such as 0.1,0.2")
        for value in values:
            _check_range(value, metadata)
        return values

    return parse


def _number_parser(kind: Any, metadata: Mapping[str, Any]) -> Any:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            whole = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {whole}") from None
        _check_range(value, metadata)
        return value

    return parse


def whole_number(minimum: int) -> Callable[[str], int]:
    """Returns argparse's check of a whole number that has a smallest value."""
    parse: Callable[[str], int] = _number_parser(int, {"minimum": minimum})
    return parse


def _check_range(value: Any, metadata: Mapping[str, Any]) -> None:
    """Refuses a number outside of what its field allows, and NaN."""
    if not isinstance(value, (int, float)):
        return
    if math.isnan(value):
        raise argparse.ArgumentTypeError("it is not a number")
    lowest, highest = metadata.get("minimum", -math.inf), metadata.get("maximum", math.inf)
    if lowest <= value <= highest:
        return
    allowed = f"at least {lowest}" if highest == math.inf else f"from {lowest} to {highest}"
    raise argparse.ArgumentTypeError(f"{value} is out of range; it must be {allowed}")


def cast(value: Any, hint: Any, flag: str) -> Any:
    """Converts a value from text, YAML or an old checkpoint to an annotated type.

    Raises:
        ValueError: the value does not fit; the message names `flag`.
    """
    if value is None or hint is Any:
        return value
    kind, element = _kind_of(hint)
    if isinstance(value, enum.Enum):
        value = value.value
    if kind is list:
        return _cast_list(value, element, flag)
    if kind is bool:
        return _cast_bool(value, flag)
    if kind in (int, float):
        return _cast_number(value, kind, flag)
    if kind is str and not isinstance(value, str):
        return str(value)
    return value


def _cast_number(value: Any, kind: Any, flag: str) -> Any:
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            raise ValueError(f"{flag}: {value!r} is not a number") from None
    if isinstance(value, (bool, int, float)) and (kind is float or value == int(value)):
        return kind(value)
    raise ValueError(f"{flag}: {value!r} is not {'a whole' if kind is int else 'a'} number")


def _cast_bool(value: Any, flag: str) -> bool:
    if isinstance(value, str) and value.lower() in ("true", "1", "yes", "false", "0", "no", ""):
        return value.lower() in ("true", "1", "yes")
    if isinstance(value, (bool, int)):
        return bool(value)
    raise ValueError(f"{flag}: {value!r} is neither true nor false")


def _cast_list(value: Any, element: Any, flag: str) -> list[Any]:
    if isinstance(value, str):
        text = value.strip()
        try:
            value = ast.literal_eval(text) if text else []
        except (ValueError, SyntaxError):
            if element is not str:
                raise ValueError(
                    f"{flag}: {text!r} is not a number or a list of numbers such as 0.1,0.2"
                ) from None
            value = [part.strip() for part in text.split(",")]
    if not isinstance(value, (list, tuple)):
        value = [value]
    return [cast(item, element, flag) for item in value]


def fill_dataclass(config: type[C], values: Any, *, name: str | None = None) -> C:
    """Builds a config dataclass from the attributes of a flat namespace.

    Args:
        config: the dataclass.
        values: an object with attributes, usually an `argparse.Namespace`; a field it lacks takes
            the field's default, an interpolated one None.
        name: the registered name the section was chosen by.

    Raises:
        ValueError: a value does not fit its field.
    """
    hints = config.field_types()
    filled: dict[str, Any] = {"_name": name}
    for field in dataclasses.fields(config):
        if field.name == "_name":
            continue
        default = config.default_of(field)
        if is_interpolated(default) or (isinstance(default, str) and default == MISSING):
            default = None
        value = getattr(values, field.name, default)
        if is_interpolated(value) or (value is None and not _is_optional(hints[field.name])):
            value = default
        flag = "--" + field.name.replace("_", "-")
        filled[field.name] = cast(value, hints[field.name], flag)
    return config(**filled)


def literal_dict(text: str | dict[str, Any] | None, flag: str) -> dict[str, Any]:
    """Reads a Python dictionary literal, such as the value of `--model-overrides`.

    Raises:
        ValueError: the text is no dictionary literal; nothing in it is ever evaluated.
    """
    if text is None or isinstance(text, dict):
        return text or {}
    try:
        value = ast.literal_eval(text.strip() or "{}")
    except (ValueError, SyntaxError):
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{flag}: {text!r} is not a dictionary such as \"{{'dropout': 0.1}}\"")
    return value
