"""Tokenizers and subword encodings: from text to what dictionaries hold, and back.

Each lies in a module that is imported when its name is asked for, and the library behind it when it
is made.
"""

from __future__ import annotations

from typing import Any

from fairseq.registry import BPES, TOKENIZERS, Registry

__all__ = [
    "BPE_REGISTRY",
    "TOKENIZER_REGISTRY",
    "build_bpe",
    "build_tokenizer",
    "register_bpe",
    "register_tokenizer",
]

BPE_REGISTRY = BPES
TOKENIZER_REGISTRY = TOKENIZERS
register_bpe = BPES.register
register_tokenizer = TOKENIZERS.register


def build_tokenizer(choice: Any) -> Any:
    """Makes a tokenizer, with methods `encode` and `decode` from str to str.

    Args:
        choice: the section of a configuration, a namespace with the name in `tokenizer`, or a name.

    Returns:
        The tokenizer; None if none is chosen.

    Raises:
        ValueError: the name is unknown, or a setting does not fit.
        ImportError: the library it needs is not installed.
    """
    return _build(TOKENIZERS, choice)


def build_bpe(choice: Any) -> Any:
    """Makes a subword encoding; as `build_tokenizer`, with the name in `bpe`."""
    return _build(BPES, choice)


def _build(registry: Registry, choice: Any) -> Any:
    name = choice if isinstance(choice, str) else getattr(choice, "_name", None)
    name = name or getattr(choice, registry.kind, None)
    if name is None:
        return None
    cls = registry.find(name)
    config = registry.dataclass_of(name)
    if config is None:
        return cls(choice)
    return cls(config() if isinstance(choice, str) else choice)
