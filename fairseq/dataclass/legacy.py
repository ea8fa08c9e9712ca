"""Between the config tree, the flat namespace of the command line, and what checkpoints hold.

A checkpoint of the original stores its configuration as a nested plain dictionary (`cfg`) or, if it
is older, as a flat `argparse.Namespace` (`args`). Both become a `FairseqConfig` here, and a
`FairseqConfig` becomes the dictionary the original reads.
"""

from __future__ import annotations

import argparse
import dataclasses
import enum
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from fairseq.dataclass.arguments import cast, fill_dataclass
from fairseq.dataclass.base import FairseqDataclass
from fairseq.dataclass.configs import FairseqConfig
from fairseq.registry import ARCHITECTURES, COMPONENT_REGISTRIES, MODELS, TASKS, nearest_first

__all__ = [
    "apply_overrides",
    "config_from_dict",
    "config_to_dict",
    "extension_fields",
    "namespace_to_config",
]

logger = logging.getLogger(__name__)

# The original always names a scorer, which language models never use.
_SCORING_OF_THE_ORIGINAL = {"_name": "bleu", "pad": 1, "eos": 2, "unk": 3}


def _dataclass_of(section: str, name: str | None) -> type[FairseqDataclass] | None:
    """Returns the config dataclass of the component `name` chooses for a section."""
    if name is None:
        return None
    if section == "model":
        model = ARCHITECTURES.model_of(name) if name in ARCHITECTURES else name
        MODELS.find(model)
        return MODELS.dataclass_of(model)
    registry = TASKS if section == "task" else COMPONENT_REGISTRIES[section]
    if section == "scoring" and name not in registry:
        return None
    registry.find(name)
    return registry.dataclass_of(name)


def _component_sections() -> Iterator[str]:
    yield from ("model", "task", *COMPONENT_REGISTRIES)


def _plain_sections() -> dict[str, type[FairseqDataclass]]:
    """Returns section name -> dataclass of the sections that belong to no component."""
    hints = FairseqConfig.field_types()
    return {
        field.name: hints[field.name]
        for field in dataclasses.fields(FairseqConfig)
        if isinstance(hints[field.name], type) and issubclass(hints[field.name], FairseqDataclass)
    }


def namespace_to_config(args: argparse.Namespace) -> FairseqConfig:
    """Cuts the flat namespace of a command line, or of an old checkpoint, into sections.

    Raises:
        ValueError: a component name is unknown or a value does not fit its field.
    """
    config = FairseqConfig()
    for section, cls in _plain_sections().items():
        setattr(config, section, fill_dataclass(cls, args))
    for section in _component_sections():
        name = getattr(args, "arch" if section == "model" else section, None)
        if name is not None:
            setattr(config, section, _component_config(section, name, args))
    return config


def _component_config(section: str, name: str, args: argparse.Namespace) -> Any:
    cls = _dataclass_of(section, name)
    if cls is not None:
        return fill_dataclass(cls, args, name=name)
    if section == "scoring":
        return None
    flat = argparse.Namespace(**vars(args))
    flat._name = name
    return flat


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, FairseqDataclass):
        return _section_to_dict(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, argparse.Namespace):
        return {key: _plain(item) for key, item in vars(value).items()}
    return value


def _section_to_dict(section: FairseqDataclass) -> dict[str, Any]:
    return {
        field.name: _plain(getattr(section, field.name))
        for field in dataclasses.fields(section)
        if not field.metadata.get("extension")
    }


def config_to_dict(config: FairseqConfig) -> dict[str, Any]:
    """Returns the configuration as the original writes it into a checkpoint's `cfg`.

    Extension fields are left out, because a key the original does not know stops it from loading
    some models; `extension_fields` has them.
    """
    plain = _section_to_dict(config)
    if plain["scoring"] is None:
        plain["scoring"] = dict(_SCORING_OF_THE_ORIGINAL)
    return plain


def extension_fields(config: FairseqConfig) -> dict[str, dict[str, Any]]:
    """Returns section -> field -> value of everything the original does not know."""
    found: dict[str, dict[str, Any]] = {}
    for top in dataclasses.fields(config):
        section = getattr(config, top.name)
        if not isinstance(section, FairseqDataclass):
            continue
        whole_section = bool(top.metadata.get("extension"))
        values = {
            field.name: _plain(getattr(section, field.name))
            for field in dataclasses.fields(section)
            if field.name != "_name" and (whole_section or field.metadata.get("extension"))
        }
        if values:
            found[top.name] = values
    return found


def config_from_dict(
    plain: Mapping[str, Any], extensions: Mapping[str, Mapping[str, Any]] | None = None
) -> FairseqConfig:
    """Rebuilds a configuration from a checkpoint's `cfg`.

    Keys that no field has are left out; those that are set to something are named in a warning,
    since they may stand for what another version's model does and this one's does not.

    Args:
        plain: nested dictionary, as `config_to_dict` returns it or as upstream fairseq wrote it.
        extensions: as `extension_fields` returns it.

    Raises:
        ValueError: a component name is unknown or a value does not fit its field.
    """
    config = FairseqConfig()
    extensions = extensions or {}
    for section, plain_cls in _plain_sections().items():
        values = {**(plain.get(section) or {}), **extensions.get(section, {})}
        setattr(config, section, fill_dataclass(plain_cls, argparse.Namespace(**values)))
    for section in _component_sections():
        stored = plain.get(section)
        if isinstance(stored, argparse.Namespace):
            stored = vars(stored)
        if not stored:
            continue
        values = {**stored, **extensions.get(section, {})}
        name = values.get("_name") or values.get("arch" if section == "model" else section)
        cls = _dataclass_of(section, name)
        if section == "scoring":
            continue
        flat = argparse.Namespace(**values)
        flat._name = name
        if cls is None:
            setattr(config, section, flat)
        else:
            _warn_of_unknown(section, name, values, cls)
            setattr(config, section, fill_dataclass(cls, flat, name=name))
    return config


def _warn_of_unknown(
    section: str, name: str | None, values: Mapping[str, Any], cls: type[FairseqDataclass]
) -> None:
    known = {field.name for field in dataclasses.fields(cls)}
    strange = {
        key: value
        for key, value in values.items()
        if key not in known and isinstance(value, (bool, int, float, str)) and value
    }
    if strange:
        logger.warning(
            f"settings of {section} {name} in the checkpoint that are not known here and have no "
            f"effect: {strange}"
        )


def apply_overrides(config: FairseqConfig, overrides: Mapping[str, Any]) -> list[str]:
    """Replaces settings by name in every section that has a field of that name.

    A name that is itself a section and comes with a dictionary replaces inside that section only.

    Args:
        config: changed in place.
        overrides: field name -> value, or section -> {field: value}.

    Returns:
        The names that no section has; each is named in a warning with its nearest relatives.

    Raises:
        ValueError: a value does not fit its field.
    """
    unknown = []
    for name, value in overrides.items():
        section = getattr(config, name, None) if name != "_name" else None
        if isinstance(value, Mapping) and isinstance(section, FairseqDataclass):
            hits = sum(_override_in(section, key, item) for key, item in value.items())
            found = hits == len(value)
        else:
            sections = [getattr(config, field.name) for field in dataclasses.fields(config)]
            found = sum(_override_in(section, name, value) for section in sections) > 0
        if not found:
            unknown.append(name)
            near = ", ".join(nearest_first(name, _field_names(config))[:3])
            logger.warning(
                f"--model-overrides: no setting of the checkpoint is called {name!r}, so it has no "
                f"effect; names that resemble it are {near}"
            )
    return unknown


def _override_in(section: Any, name: str, value: Any) -> int:
    """Sets one field of a section if it has it; returns how many fields it set."""
    if isinstance(section, argparse.Namespace):
        if not hasattr(section, name):
            return 0
        setattr(section, name, value)
        return 1
    if not isinstance(section, FairseqDataclass):
        return 0
    hints = section.field_types()
    if name not in hints or name == "_name":
        return 0
    setattr(section, name, cast(value, hints[name], f"--model-overrides: {name}"))
    return 1


def _field_names(config: FairseqConfig) -> set[str]:
    names: set[str] = set()
    for top in dataclasses.fields(config):
        section = getattr(config, top.name)
        if isinstance(section, FairseqDataclass):
            names |= {field.name for field in dataclasses.fields(section)} - {"_name"}
        elif isinstance(section, argparse.Namespace):
            names |= set(vars(section))
    return names
