"""Settings in a YAML file: `--config FILE.yaml`, and the file that a training run leaves behind.

A settings file maps option names (with `-` or `_`) to values; options may be grouped under any
headings. What stands on the command line wins.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fairseq.dataclass.arguments import CommandParser
from fairseq.dataclass.base import FairseqDataclass, is_interpolated
from fairseq.dataclass.configs import FairseqConfig

__all__ = ["expand_config", "read_settings", "resolved_settings", "write_resolved_settings"]


def read_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a settings file; returns option name (with underscores) -> value.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no YAML mapping of options to values.
    """
    import yaml

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"--config: there is no file {path}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config: {path} is not a YAML file: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"--config: {path} holds no mapping of options to values")
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict):
            flat.update({str(k).replace("-", "_"): v for k, v in value.items()})
        else:
            flat[str(key).replace("-", "_")] = value
    return flat


def expand_config(argv: Sequence[str]) -> tuple[list[str], dict[str, Any], str | None]:
    """Replaces `--config FILE` by the options the file sets, in front of the others.

    Returns:
        (arguments, settings of the file, path of the file or None). The positional `data` stays
        in the settings only.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    found, rest = finder.parse_known_args(list(argv))
    if found.config is None:
        return rest, {}, None
    settings = read_settings(found.config)
    arguments: list[str] = []
    for name, value in settings.items():
        if name != "data" and value is not None and value is not False:
            flag = "--" + name.replace("_", "-")
            arguments.append(flag if value is True else f"{flag}={_as_text(value)}")
    return arguments + rest, settings, found.config


def check_names(
    parser: CommandParser, settings: dict[str, Any], path: str, hint: Callable[[str], str]
) -> None:
    """Ends the command with exit 2 if the file sets an option the command does not have.

    Args:
        parser: the command's.
        settings: option name -> value.
        path: the file, for the message.
        hint: flag that is unknown -> what else can be said of it.
    """
    known = {flag.lstrip("-").replace("-", "_") for flag in parser.known_flags()} | {"data"}
    for name in settings:
        if name not in known:
            said = hint("--" + name.replace("_", "-"))
            tail = f" ({said})" if said else ""
            parser.error(f"{path} sets {name!r}, which is no option here{tail}")


def _as_text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ",".join(str(item) for item in value)
    return str(value)


_NOT_OF_TRAINING = ("bmuf", "common_eval", "eval_lm", "generation", "interactive")


def resolved_settings(config: FairseqConfig) -> dict[str, Any]:
    """Returns the options that repeat a training run, defaults and presets spelled out."""
    settings: dict[str, Any] = {}
    selectors = {"model": "arch"}
    for top in dataclasses.fields(config):
        section = getattr(config, top.name)
        if top.name in _NOT_OF_TRAINING or not isinstance(section, FairseqDataclass):
            continue
        if section._name is not None:
            settings[selectors.get(top.name, top.name)] = section._name
        for field in dataclasses.fields(section):
            value = getattr(section, field.name)
            default = section.default_of(field)
            hidden = field.metadata.get("unsupported") or is_interpolated(default)
            if field.name == "_name" or hidden or value is None or value is False:
                continue
            settings.setdefault(field.name, value)
    return settings


def write_resolved_settings(config: FairseqConfig, path: str | os.PathLike[str]) -> None:
    """Writes a settings file that `--config` takes and that repeats the run."""
    import yaml

    text = yaml.safe_dump(resolved_settings(config), sort_keys=False, allow_unicode=True)
    temporary = Path(f"{path}.tmp")
    temporary.write_text("# Resolved settings of this run; repeat it with --config.\n" + text)
    os.replace(temporary, path)
