"""Which modules are changed, and how: a registry of surgery functions, and what needs none.

A surgery function takes a module, its number among the modules of its class, and the maximal
sequence length, changes the module in place or not at all, and returns what takes its place, or
None. Attention modules that go through transformers' registry are recognised without one.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any, get_type_hints

from torch import nn

__all__ = [
    "FAMILIES",
    "OWN_ALIBI",
    "PolicyRegistry",
    "Surgery",
    "find_policy",
    "is_attention",
    "is_cross_attention",
    "policy_registry",
]

Surgery = Callable[[nn.Module, int, int], "nn.Module | None"]

FAMILIES = ("GPT-2", "OPT", "Llama", "GPT-NeoX", "BERT", "RoBERTa")
"""Families that are tested; others that go through transformers' registry work the same way."""

OWN_ALIBI = {
    "bloom": "its attention has ALiBi from the start",
    "falcon": "set alibi=True in its configuration (FalconConfig) before training",
    "mpt": "set attn_config={'alibi': True} in its configuration (MptConfig)",
}
"""Model types with an ALiBi of their own, and how it is had."""

_NO_REGISTRY = "does not hand its attention to transformers' registry of attention functions"
_NUM_PARAMETERS = 3


class PolicyRegistry(dict[type[nn.Module], Surgery]):
    """Surgery functions by the class of the modules they change; subclasses count."""

    def register(self, *classes: type[nn.Module]) -> Callable[[Surgery], Surgery]:
        """Returns a decorator that registers a surgery function for some classes of modules.

        The function has three parameters, annotated or not: a module (`torch.nn.Module`), its
        number among those of its class (`int`), and `max_sequence_length` (`int`). It may call
        `fairseq.huggingface.surgery.attach_bias` on an attention module that goes through
        transformers' registry.

        Raises:
            ValueError: no class, one that is registered already, or not three parameters.
            TypeError: a class of no modules, or an annotation of another type.
            NameError: the third parameter has another name.
        """
        if not classes:
            raise ValueError("register() was given no class; name those whose modules are changed")

        def decorate(function: Surgery) -> Surgery:
            _check_signature(function)
            for kind in classes:
                self._check_class(kind)
            for kind in classes:
                self[kind] = function
            return function

        return decorate

    def _check_class(self, kind: Any) -> None:
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            name = getattr(kind, "__name__", repr(kind))
            raise TypeError(
                f"{name} is no subclass of torch.nn.Module; register classes of modules"
            )
        if kind in self:
            raise ValueError(
                f"{kind.__name__} is registered already, for {self[kind].__name__}; "
                f"del policy_registry[{kind.__name__}] first"
            )


policy_registry = PolicyRegistry()
"""Surgery functions for families that are not recognised; empty at first."""


def _check_signature(function: Surgery) -> None:
    name = getattr(function, "__name__", repr(function))
    parameters = list(inspect.signature(function).parameters)
    if len(parameters) != _NUM_PARAMETERS:
        raise ValueError(
            f"{name} has {len(parameters)} parameters; a surgery function has 3: "
            "(module, module_index, max_sequence_length)"
        )
    hints = get_type_hints(function)
    for parameter, wanted in zip(parameters, (nn.Module, int, int), strict=True):
        hint = hints.get(parameter, wanted)
        fits = isinstance(hint, type) and issubclass(hint, wanted)
        if not fits:
            raise TypeError(
                f"{name}: parameter {parameter} is annotated {hint!r}; annotate it with "
                f"{'torch.nn.Module' if wanted is nn.Module else wanted.__name__}"
            )
    if parameters[-1] != "max_sequence_length":
        raise NameError(
            f"{name}: the third parameter is {parameters[-1]}; call it max_sequence_length"
        )


def find_policy(module: nn.Module) -> Surgery | None:
    """Returns the surgery function for a module: its class's own, or the nearest base's."""
    return next(
        (policy_registry[kind] for kind in type(module).__mro__ if kind in policy_registry), None
    )


def is_attention(module: nn.Module) -> bool:
    """Returns whether a module computes attention by a function of transformers' registry."""
    if "Attention" not in type(module).__name__ or not hasattr(module, "is_causal"):
        return False
    return "ALL_ATTENTION_FUNCTIONS" in vars(sys.modules[type(module).__module__])


def is_cross_attention(module: nn.Module, name: str) -> bool:
    """Returns whether attention looks at another sequence, by what models tell of it.

    Args:
        module: an attention module.
        name: its name in the model.
    """
    told = getattr(module, "is_cross_attention", None)
    if told is not None:
        return bool(told)
    of_class = type(module).__name__.lower()
    parts = name.lower().split(".")
    signs = (
        "crossattention",
        "cross_attn",
        "cross_attention",
        "encoder_attn",
        "encdecattention",
        "encoder_decoder_attention",
    )
    return any(sign in of_class or sign in parts for sign in signs)
