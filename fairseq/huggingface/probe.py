"""Does the bias reach the scores, and is nothing else left that tells positions?

The model reads some tokens, once as it is and once with one thing changed that must, or must not,
change its output. Shapes: `B` rows, `T` tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fairseq.huggingface.attention import observing
from fairseq.huggingface.bias import ScoreBias

__all__ = ["Check", "biases_of", "probe", "whole_models"]

Check = tuple[str, bool, str]
"""What was checked, whether it is so, and what was measured."""

_LENGTH, _TARGET_LENGTH = 12, 9  # Not equal: a decoder must not take source for target positions.
_SHIFT = 17
# Largest relative difference that rounding makes between equal computations, with room.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
_HALF_TOLERANCE = 0.05
# What rounding in all of a model may make of the output, in multiples of what rounding its
# embeddings alone makes; and no more than that, lest a chaotic model passes whatever it does.
_ROUNDING_ROOM, _MOST_ROUNDING = 5.0, 0.3
_TF32_EPS = 2.0**-10


def whole_models(root: nn.Module) -> list[Any]:
    """Returns the models without heads that have attention with ALiBi, the outermost ones."""
    found: list[Any] = []

    def walk(module: nn.Module) -> None:
        base = getattr(module, "base_model", None)
        if isinstance(base, nn.Module) and hasattr(module, "config"):
            if biases_of(base):
                found.append(base)
            return
        for child in module.children():
            walk(child)

    walk(root)
    return found


def biases_of(module: nn.Module) -> dict[Any, ScoreBias]:
    """Returns the bias of each attention module that has one."""
    candidates = ((part, getattr(part, "alibi", None)) for part in module.modules())
    return {part: bias for part, bias in candidates if isinstance(bias, ScoreBias)}


def probe(model: nn.Module) -> Iterator[Check]:
    """Checks a model whose forward takes `input_ids`; see `whole_models`.

    The model is in evaluation mode meanwhile; no random numbers are drawn from global generators.

    Yields:
        One check after the other.
    """
    biases = biases_of(model)
    with _evaluating(model), torch.no_grad():
        with observing() as seen:
            plain = _output(model)
        missing = [part for part in biases if part not in seen]
        yield (
            "attention asks for its bias",
            not missing,
            f"{len(biases) - len(missing)} of {len(biases)} modules",
        )
        noise = _difference(_output(model), plain)
        with _strength(biases.values(), 0.0):
            none = _output(model)
            unbiased = _difference(none, plain)
            moved = _difference(_output(model, step=3), none) if _takes_positions(model) else None
            permuted, rounding = _permutation_difference(model, biases.values())
        yield (
            "bias changes the output",
            unbiased > 3 * noise,
            f"output moves by {unbiased:.1e}, of itself by {noise:.1e}",
        )
        limit = _TOLERANCE.get(plain.dtype, _HALF_TOLERANCE)
        # Sums are taken in another order here, so that the two sides are rounded apart.
        least = _TOLERANCE.get(plain.dtype, _TOLERANCE[torch.float32])
        room = max(least, min(_ROUNDING_ROOM * rounding, _MOST_ROUNDING))
        what = "nothing else tells the order"
        yield what, permuted <= room, f"difference {permuted:.1e}, allowed {room:.1e}"
        if moved is None:
            return
        shifted = _difference(_output(model, start=_SHIFT), plain)
        for what, difference in (
            ("only distances count", shifted),
            ("nothing else tells positions", moved),
        ):
            yield what, difference <= limit, f"difference {difference:.1e}, allowed {limit:.1e}"


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, was_training in training:
            module.training = was_training


@contextmanager
def _strength(biases: Iterable[ScoreBias], strength: float) -> Iterator[None]:
    biases = list(biases)
    for bias in biases:
        bias.strength = strength
    try:
        yield
    finally:
        for bias in biases:
            bias.strength = 1.0


def _permutation_difference(model: Any, biases: Iterable[ScoreBias]) -> tuple[float, float]:
    """Returns how far permuted tokens are from giving permuted outputs, and a rounding's effect.

    Without a bias and without a mask, which tells the order too, attention sees a set of tokens.
    What still knows their order are positions that were left: embeddings whatever their name,
    rotations inside of attention, relative tables, convolutions, recurrent layers, and attention
    that is causal without having asked for a bias.
    """
    biases = list(biases)
    for bias in biases:
        bias.is_unmasked = True
    try:
        expected = _output(model)
        order = _order(expected.size(1))
        permuted = _difference(_output(model, is_permuted=True), expected[:, order])
        with _rounded_embeddings(model):
            return permuted, _difference(_output(model), expected)
    finally:
        for bias in biases:
            bias.is_unmasked = False


@contextmanager
def _rounded_embeddings(model: Any) -> Iterator[None]:
    """Changes each number of the embeddings by about the least that its type tells apart."""

    def disturb(_: nn.Module, __: Any, embedded: torch.Tensor) -> torch.Tensor:
        eps = torch.finfo(embedded.dtype).eps
        if embedded.is_cuda and torch.get_float32_matmul_precision() != "highest":
            eps = max(eps, _TF32_EPS)
        generator = torch.Generator().manual_seed(3)
        noise = torch.randn(embedded.shape, generator=generator, dtype=torch.float64)
        return embedded + (eps * noise).to(embedded) * embedded

    handle = model.get_input_embeddings().register_forward_hook(disturb)
    try:
        yield
    finally:
        handle.remove()


def _order(length: int) -> torch.Tensor:
    return torch.randperm(length, generator=torch.Generator().manual_seed(2))


def _takes_positions(model: nn.Module) -> bool:
    return "position_ids" in inspect.signature(model.forward).parameters


def _output(
    model: Any, *, start: int | None = None, step: int = 1, is_permuted: bool = False
) -> torch.Tensor:
    """Returns the hidden states (1, T, D) for tokens that stand at start, start + step, ...

    Those of an encoder-decoder model are its decoder's, whose tokens are fewer than its encoder's.
    """
    tokens = _tokens(model)
    targets = tokens[:, :_TARGET_LENGTH]
    if is_permuted:
        tokens, targets = (ids[:, _order(ids.size(1))] for ids in (tokens, targets))
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if any(bias.kind == "cross" for bias in biases_of(model).values()):
        inputs |= _encoded(model)
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = targets
    if start is not None or step != 1:
        ids = (start or 0) + step * torch.arange(_LENGTH, device=tokens.device)
        inputs["position_ids"] = ids.unsqueeze(0)
    output: torch.Tensor = model(**inputs)[0]
    return output


def _encoded(model: Any) -> dict[str, torch.Tensor]:
    """Returns what a decoder's cross attention reads, where the model has no encoder itself."""
    if model.config.is_encoder_decoder:
        return {}
    weight = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(1)
    encoded = torch.randn(1, _LENGTH, model.config.hidden_size, generator=generator)
    return {"encoder_hidden_states": encoded.to(weight)}


def _tokens(model: Any) -> torch.Tensor:
    device = model.get_input_embeddings().weight.device
    size = model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(size, (1, _LENGTH), generator=generator)
    padding = getattr(model.config, "pad_token_id", None)
    if padding is not None:
        ids[ids == padding] = (padding + 1) % size
    return ids.to(device)


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns the root mean square difference relative to what is expected."""
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm())
