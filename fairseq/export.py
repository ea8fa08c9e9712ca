"""A trained model apart from its training: settings as JSON, every tensor once.

The settings are the checkpoint's own, so that the way back gives the same model and the same
configuration. What belongs to a training run (optimizer, position in the data) stays behind.
"""

from __future__ import annotations

import json
import os
import shutil
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fairseq import checkpoint_utils, models
from fairseq.checkpoint import dictionary_fingerprint, pack
from fairseq.checkpoint.format import ALIBI_KEY
from fairseq.checkpoint.writing import save_atomically
from fairseq.data.dictionary import Dictionary
from fairseq.dataclass.configs import FairseqConfig
from fairseq.dataclass.legacy import config_from_dict, config_to_dict, extension_fields
from fairseq.models.transformer_lm import TransformerLanguageModel

__all__ = [
    "DICTIONARY_FILE",
    "TENSOR_FILE",
    "ExportedModel",
    "Symbols",
    "build_model",
    "find_dictionary",
    "read_checkpoint_model",
    "read_safetensors",
    "tied_names",
    "write_checkpoint",
    "write_safetensors",
]

TENSOR_FILE = "model.safetensors"
DICTIONARY_FILE = "dict.txt"
_SETTINGS_KEY, _TIES_KEY = "fairseq", "tied"


class Symbols:
    """What a model asks of its dictionary: how many symbols, and the ids of the special ones.

    Args:
        num_symbols: V.
    """

    def __init__(self, num_symbols: int) -> None:
        self.num_symbols = num_symbols

    def __len__(self) -> int:
        return self.num_symbols

    def bos(self) -> int:
        """Returns the id of the beginning of a sentence."""
        return 0

    def pad(self) -> int:
        """Returns the id of padding."""
        return 1

    def eos(self) -> int:
        """Returns the id of the end of a sentence."""
        return 2

    def unk(self) -> int:
        """Returns the id of words that are not known."""
        return 3


@dataclass(frozen=True)
class ExportedModel:
    """A model and what it takes to build it again.

    Attributes:
        settings: values that JSON can hold: `cfg` and `extensions`, the configuration as in a
            checkpoint; `num_symbols`; `optimizer_history`; `dictionary`, its size and hash if the
            checkpoint tells, else None.
        model: on the CPU, float32.
    """

    settings: dict[str, Any]
    model: TransformerLanguageModel


def read_checkpoint_model(path: str | os.PathLike[str]) -> ExportedModel:
    """Loads the model in a checkpoint, for which no dictionary is needed.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no checkpoint of a transformer language model.
    """
    state = checkpoint_utils.load_checkpoint_to_cpu(path, memory_map=True)
    cfg, num_symbols = state["cfg"], checkpoint_utils.vocabulary_size(state["model"])
    if cfg is None or num_symbols is None:
        raise ValueError(
            f"{path} holds parameters but not the settings of a language model with them; use a "
            "checkpoint that training wrote"
        )
    settings = {
        "cfg": config_to_dict(cfg),
        "extensions": extension_fields(cfg),
        "num_symbols": num_symbols,
        "optimizer_history": state["optimizer_history"],
        "dictionary": state[ALIBI_KEY].get("dictionary"),
    }
    settings = json.loads(json.dumps(settings))
    model = build_model(settings)
    try:
        model.load_state_dict(state["model"], model_cfg=cfg.model)
    except RuntimeError as error:
        raise ValueError(
            f"{path}: the parameters do not fit its settings: {' '.join(str(error).split())}"
        ) from error
    return ExportedModel(settings, model)


def config_of(settings: Mapping[str, Any]) -> FairseqConfig:
    """Returns the configuration that settings stand for."""
    return config_from_dict(settings["cfg"], settings["extensions"])


def build_model(settings: Mapping[str, Any]) -> TransformerLanguageModel:
    """Builds the model that settings describe; its parameters are drawn anew.

    Raises:
        ValueError: they describe another kind of model, or lack something.
    """
    missing = {"cfg", "extensions", "num_symbols"} - set(settings)
    if missing:
        raise ValueError(f"the model's settings lack {', '.join(sorted(missing))}")
    symbols = Symbols(int(settings["num_symbols"]))
    task = types.SimpleNamespace(source_dictionary=symbols, target_dictionary=symbols)
    model = models.build_model(config_of(settings).model, task)
    if type(model) is not TransformerLanguageModel:
        raise ValueError(
            f"only transformer language models can be exported, this is a {type(model).__name__}"
        )
    return model


def tied_names(module: torch.nn.Module) -> dict[str, str]:
    """Returns further name -> first name, for parameters that a module has under several names."""
    first: dict[int, str] = {}
    tied = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            tied[name] = first[id(parameter)]
        first.setdefault(id(parameter), name)
    return tied


# ---- one file of tensors ----


def write_safetensors(exported: ExportedModel, folder: Path) -> Path:
    """Writes model.safetensors, with the settings in its header; returns its path."""
    tied = tied_names(exported.model)
    tensors = {
        name: tensor.contiguous()
        for name, tensor in exported.model.state_dict().items()
        if name not in tied
    }
    metadata = {
        "format": "pt",
        _SETTINGS_KEY: json.dumps(exported.settings),
        _TIES_KEY: json.dumps(tied),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / TENSOR_FILE
    part = path.with_name(path.name + ".part")
    try:
        save_file(tensors, part, metadata=metadata)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def read_safetensors(folder: Path) -> ExportedModel:
    """Reads what `write_safetensors` wrote.

    Raises:
        FileNotFoundError: there is no model.safetensors.
        ValueError: it is damaged, or not written here.
    """
    path = folder / TENSOR_FILE if folder.is_dir() else folder
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        settings, tied = (json.loads(metadata[key]) for key in (_SETTINGS_KEY, _TIES_KEY))
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged, or not a file that fairseq-export wrote ({error})"
        ) from error
    model = build_model(settings)
    state |= {name: state[first] for name, first in tied.items() if first in state}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    return ExportedModel(settings, model)


# ---- back to a checkpoint ----


def write_checkpoint(exported: ExportedModel, path: Path, dictionary: Dictionary | None) -> None:
    """Writes a checkpoint without the state of a training run, to evaluate or to fine-tune.

    Raises:
        ValueError: the dictionary is not the model's.
    """
    if dictionary is not None:
        check_dictionary(exported.settings, dictionary)
    state = pack(
        cfg=config_of(exported.settings),
        model_state=exported.model.state_dict(),
        criterion_state=None,
        optimizer_history=exported.settings.get("optimizer_history") or [],
        task_state={},
        extra_state={},
        dictionary=dictionary,
    )
    if dictionary is None and exported.settings.get("dictionary"):
        state[ALIBI_KEY]["dictionary"] = exported.settings["dictionary"]
    save_atomically(state, path)


# ---- dictionaries ----


def find_dictionary(given: str | None, settings: Mapping[str, Any]) -> Path | None:
    """Returns the place of the dictionary: the given one, else in the checkpoint's data folder.

    Raises:
        FileNotFoundError: the given one is not there.
        ValueError: it is not the model's.
    """
    if given is not None and not Path(given).exists():
        raise FileNotFoundError(f"--dict: there is no {given}")
    data = ((settings["cfg"].get("task") or {}).get("data") or "").split(os.pathsep)[0]
    for path in _candidates(given, data):
        if path.is_file():
            check_dictionary(settings, Dictionary.load(path), str(path))
            return path
    return None


def _candidates(given: str | None, data: str) -> Iterable[Path]:
    if given is not None:
        yield Path(given)
    elif data:
        yield Path(data) / DICTIONARY_FILE


def copy_dictionary(source: Path, folder: Path) -> None:
    """Puts a dictionary beside a model."""
    folder.mkdir(parents=True, exist_ok=True)
    if source.resolve() != (folder / DICTIONARY_FILE).resolve():
        shutil.copyfile(source, folder / DICTIONARY_FILE)


def check_dictionary(
    settings: Mapping[str, Any], dictionary: Dictionary, name: str = "the dictionary"
) -> None:
    """Compares a dictionary with what the settings know of the model's.

    Raises:
        ValueError: it is another.
    """
    if len(dictionary) != settings["num_symbols"]:
        raise ValueError(
            f"{name} has {len(dictionary):,} symbols, the model {settings['num_symbols']:,}; give "
            "the dict.txt of the data that the model was trained on with --dict"
        )
    recorded = settings.get("dictionary")
    if recorded and recorded != dictionary_fingerprint(dictionary):
        raise ValueError(
            f"{name} is as long as the model's dictionary but has other symbols; give the dict.txt "
            "of the data that the model was trained on with --dict"
        )
