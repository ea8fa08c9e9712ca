"""Models, and the registries by which the command line and plug-ins name them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from fairseq.models.base import (
    BaseFairseqModel,
    FairseqDecoder,
    FairseqIncrementalDecoder,
    FairseqLanguageModel,
)
from fairseq.models.encoder_decoder import FairseqEncoder, FairseqEncoderDecoderModel
from fairseq.registry import ARCHITECTURES, MODELS

__all__ = [
    "ARCH_MODEL_REGISTRY",
    "MODEL_REGISTRY",
    "BaseFairseqModel",
    "FairseqDecoder",
    "FairseqEncoder",
    "FairseqEncoderDecoderModel",
    "FairseqIncrementalDecoder",
    "FairseqLanguageModel",
    "build_model",
    "register_model",
    "register_model_architecture",
]

T = TypeVar("T")

MODEL_REGISTRY = MODELS
ARCH_MODEL_REGISTRY = ARCHITECTURES
register_model_architecture = ARCHITECTURES.register_preset


def register_model(name: str, dataclass: type | None = None) -> Callable[[T], T]:
    """Returns the decorator that adds a model class under `name`.

    With a config dataclass the name is an architecture too, whose preset sets nothing.

    Raises:
        ValueError: the name is taken, or the class or dataclass is of the wrong kind.
    """

    def add(cls: T) -> T:
        MODELS.register(name, dataclass)(cls)
        if dataclass is not None and name not in ARCHITECTURES:
            ARCHITECTURES.register_preset(name, name)(_set_nothing)
        return cls

    return add


def _set_nothing(args: Any) -> None:
    """The preset of a model whose options' defaults say everything."""


def build_model(cfg: Any, task: Any) -> BaseFairseqModel:
    """Builds the model that `cfg` names.

    Args:
        cfg: the model's config dataclass, or a namespace with the name in `arch`.
        task: gives the dictionaries.

    Raises:
        ValueError: no model, or one of an unknown name, is chosen.
    """
    name = getattr(cfg, "_name", None) or getattr(cfg, "arch", None)
    if name is None:
        raise ValueError("no model is chosen; choose one with --arch")
    if name in ARCHITECTURES:
        name = ARCHITECTURES.model_of(name)
    model: BaseFairseqModel = MODELS.find(name).build_model(cfg, task)
    return model
