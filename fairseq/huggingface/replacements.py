"""What takes the place of a model's own positions, and hooks that models with ALiBi have.

Shapes: `B` rows, `T` tokens, `D` width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from fairseq.huggingface.attention import IMPLEMENTATIONS, set_recording

__all__ = [
    "NoPositions",
    "NoRotation",
    "fill_in_ids",
    "note_query_offset",
    "watch_output_attentions",
]


class NoPositions(nn.Module):
    """Takes the place of position embeddings: adds nothing, at any length.

    Args:
        config: the configuration whose attention implementation says whether ALiBi is computed.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Returns a zero, to which embeddings of any shape and dtype can be added."""
        _check_implementation(self.config)
        given = (x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))
        # Some models give a shape alone; one number on the CPU can be added on any device.
        return torch.zeros((), device=next((x.device for x in given), "cpu"))


class NoRotation(nn.Module):
    """Takes the place of rotary embeddings: cosines 1 and sines 0, at any position.

    Args:
        rotary: the module whose outputs' shapes it keeps.
        config: see `NoPositions`.
    """

    def __init__(self, rotary: nn.Module, config: Any) -> None:
        super().__init__()
        self.rotary = rotary
        self.config = config

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns a rotation by no angle."""
        _check_implementation(self.config)
        cosines, sines = self.rotary(*args, **kwargs)
        return torch.ones_like(cosines), torch.zeros_like(sines)


def _check_implementation(config: Any) -> None:
    name = config._attn_implementation
    if name not in IMPLEMENTATIONS.values():
        known = ", ".join(IMPLEMENTATIONS.values())
        raise RuntimeError(
            f"attention is computed by {name!r}, without ALiBi, and the model has no other "
            f"positions; call model.set_attn_implementation with one of {known}"
        )


def fill_in_ids(
    embeddings: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Gives embeddings the ids they would cut out of buffers that end at the maximal length.

    A hook before the forward of BERT's embeddings and others made after them.
    """
    given = _first_given(args, kwargs)
    if given is None or len(args) > 1:
        return args, kwargs
    rows, length = given.shape[:2]
    if kwargs.get("token_type_ids") is None:
        zeros = torch.zeros((rows, length), dtype=torch.long, device=given.device)
        kwargs = {**kwargs, "token_type_ids": zeros}
    if kwargs.get("position_ids") is None:
        # Nothing is added for them; that they are there keeps the module from its buffer.
        ids = torch.arange(length, device=given.device).unsqueeze(0)
        kwargs = {**kwargs, "position_ids": ids}
    return args, kwargs


def _first_given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    candidates = (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
    return next((x for x in candidates if x is not None), None)


def note_query_offset(attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Notes how many tokens were decoded before those that cross attention is given.

    A hook before its forward; self-attention of the same layer has added its keys already.
    """
    cache = kwargs.get("past_key_values", kwargs.get("past_key_value"))  # Of 5.x, of 4.x.
    cache = getattr(cache, "self_attention_cache", None)
    hidden = args[0] if args else kwargs["hidden_states"]
    before = 0 if cache is None else cache.get_seq_length() - hidden.size(1)
    attention.alibi_query_offset = max(before, 0)  # type: ignore[assignment]


def watch_output_attentions(model: nn.Module) -> list[RemovableHandle]:
    """Has attention return its weights whenever a model is asked for them.

    Returns:
        Handles of two hooks.
    """
    before = model.register_forward_pre_hook(_start_recording, with_kwargs=True)
    after = model.register_forward_hook(_stop_recording, always_call=True)
    return [before, after]


def _start_recording(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    wanted = kwargs.get("output_attentions")
    set_recording(bool(model.config.output_attentions if wanted is None else wanted))


def _stop_recording(model: nn.Module, args: Any, output: Any) -> None:
    set_recording(False)
