"""One call that gives a Hugging Face model ALiBi, and proof that it took."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from fairseq.huggingface.attention import IMPLEMENTATIONS, register, supports_flex
from fairseq.huggingface.bias import AlibiSettings
from fairseq.huggingface.optimizers import as_optimizers, forget_parameters
from fairseq.huggingface.policies import FAMILIES, OWN_ALIBI, policy_registry
from fairseq.huggingface.probe import biases_of, probe, whole_models
from fairseq.huggingface.requirements import import_transformers
from fairseq.huggingface.surgery import MARKER, Operation
from fairseq.positions import PositionMethod

__all__ = ["apply_alibi", "check_alibi", "is_alibi", "own_position_methods", "settings_of"]

logger = logging.getLogger(__name__)


def apply_alibi(
    model: nn.Module,
    max_sequence_length: int | None = None,
    optimizers: Optimizer | Iterable[Optimizer] | None = None,
    *,
    variant: str | None = None,
    bias_max: float = 8.0,
    interpolation: Mapping[str, Any] | None = None,
    cross_attention: bool = False,
) -> int:
    """Replaces a model's positions by ALiBi, in place.

    Self-attention gets the bias, causal in decoders. Position embeddings are replaced by modules
    that add nothing and know no maximal length; rotations are by no angle. Then the model reads a
    few tokens to see that the bias has an effect and that nothing else tells positions; if not, it
    is put back as it was.

    Args:
        model: a model of transformers, or a module with such models in it, before it is wrapped
            for parallel training.
        max_sequence_length: not needed, since no table is left; handed on to surgery functions of
            `policy_registry`.
        optimizers: those that hold parameters of the model; they lose the removed ones.
        variant: of encoders: `symmetric` (default), `split_heads` or `two_slopes`.
        bias_max: the gentlest of n heads has slope 2 ** -bias_max.
        interpolation: how slopes shrink beyond the training length, such as
            `{"type": "linear", "train_seq_len": 2048}`.
        cross_attention: whether cross attention gets a symmetric bias too.

    Returns:
        How many attention modules were changed.

    Raises:
        TypeError: an argument of another type, or a model that is wrapped already.
        ValueError: a setting that does not exist or fit the model, or a model whose attention
            cannot be changed.
        RuntimeError: the check after the change failed.

    Source: Press, Smith, Lewis, Train Short, Test Long, ICLR 2022; the interface is that of
    MosaicML Composer's method of the same name.
    """
    import_transformers()
    register()
    settings = AlibiSettings(variant, bias_max, _plain(interpolation), cross_attention)
    held = as_optimizers(optimizers)
    _check_arguments(model, max_sequence_length)
    parameters = list(model.parameters())
    operation = Operation(model, settings, max_sequence_length or _longest(model))
    operation.run()
    try:
        _check_operation(operation)
        check_alibi(operation.root)
    except BaseException:
        operation.undo()
        raise
    kept = {id(parameter) for parameter in operation.root.parameters()}
    removed = [parameter for parameter in parameters if id(parameter) not in kept]
    forget_parameters(removed, held)
    count = len(operation.attached) + operation.replaced
    logger.info(
        f"ALiBi: {count} modules changed, {sum(p.numel() for p in removed):,} parameters removed"
    )
    if removed and not held:
        logger.info("an optimizer made before this still holds them: pass it as optimizers=")
    return count


def is_alibi(model: nn.Module) -> bool:
    """Returns whether a model's self-attention is computed with ALiBi.

    Either `apply_alibi` made it so, or it is a language model of this project whose position method
    is ALiBi. It looks at the model without running it; `check_alibi` runs it.
    """
    own = own_position_methods(model)
    if any(method != "alibi" for method in own):
        return False
    biases = biases_of(model)
    return bool(own or biases) and all(
        part.config._attn_implementation in IMPLEMENTATIONS.values()
        and getattr(part.config, MARKER, None) is not None
        for part in biases
    )


def own_position_methods(model: nn.Module) -> list[str]:
    """Returns the names of the position methods of this project's language models in a model."""
    methods = (getattr(part, "positions", None) for part in model.modules())
    return [method.name for method in methods if isinstance(method, PositionMethod)]


def settings_of(model: nn.Module) -> AlibiSettings | None:
    """Returns the settings that `apply_alibi` made a model's ALiBi with; None if it did not."""
    return next((bias.settings for bias in biases_of(model).values()), None)


def check_alibi(model: nn.Module) -> None:
    """Runs a model on a few tokens to see that ALiBi is in effect.

    Raises:
        RuntimeError: it is not, or the model cannot be run.
    """
    for whole in whole_models(model):
        try:
            failed = [f"{what} ({text})" for what, is_so, text in probe(whole) if not is_so]
        except Exception as error:
            raise RuntimeError(
                f"{type(whole).__name__} cannot be run with ALiBi: {type(error).__name__}: {error}"
            ) from error
        if failed:
            raise RuntimeError(
                f"{type(whole).__name__} does not compute ALiBi; what should be so and is not: "
                f"{'; '.join(failed)}. Nothing was changed"
            )


def _plain(interpolation: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if interpolation is not None and not isinstance(interpolation, Mapping):
        raise TypeError(
            f"interpolation is {interpolation!r}; give a mapping such as "
            "{'type': 'linear', 'train_seq_len': 2048}"
        )
    return None if interpolation is None else dict(interpolation)


def _check_arguments(model: nn.Module, max_sequence_length: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; give a torch.nn.Module")
    wrapper = next((part for part in model.modules() if _is_wrapper(part)), None)
    if wrapper is not None:
        raise TypeError(
            f"the model is wrapped in {type(wrapper).__name__} already; call apply_alibi before"
        )
    if max_sequence_length is None:
        return
    if not isinstance(max_sequence_length, int) or isinstance(max_sequence_length, bool):
        raise TypeError(f"max_sequence_length is {max_sequence_length!r}; give a number or None")
    if max_sequence_length < 1:
        raise ValueError(f"max_sequence_length is {max_sequence_length}; it must be at least 1")


def _is_wrapper(module: nn.Module) -> bool:
    return type(module).__name__ in ("DistributedDataParallel", "FullyShardedDataParallel")


def _longest(model: nn.Module) -> int:
    configs = (getattr(part, "config", None) for part in model.modules())
    lengths = (getattr(config, "max_position_embeddings", None) for config in configs)
    return next((length for length in lengths if isinstance(length, int)), 1 << 20)


def _check_operation(operation: Operation) -> None:
    """Refuses models that have nothing to change, or cannot have what is asked for."""
    for method in own_position_methods(operation.root):
        what = "has ALiBi already" if method == "alibi" else f"has the position method {method}"
        raise ValueError(
            f"{type(operation.root).__name__} is a language model of this project and {what}; "
            "fairseq-train chooses it, by --position-method"
        )
    for part in operation.root.modules():
        kind = getattr(getattr(part, "config", None), "model_type", None)
        if kind in OWN_ALIBI:
            raise ValueError(f"{kind} has an ALiBi of its own: {OWN_ALIBI[kind]}")
    if not operation.attached and not operation.replaced:
        known = [kind.__name__ for kind in policy_registry]
        raise ValueError(
            f"{type(operation.root).__name__} has no attention that can be changed. Tested are "
            f"{', '.join(FAMILIES)} (BERT and RoBERTa with transformers 5 or newer), and others "
            "whose attention goes through transformers' AttentionInterface; for the rest, "
            f"register a surgery function with policy_registry (registered: {known or 'none'})"
        )
    _check_variant(operation)
    if operation.attached and not whole_models(operation.root):
        raise ValueError(
            f"{type(operation.root).__name__} is a part of a model, which cannot be tried out; "
            "give the whole model"
        )
    names = {part.config._attn_implementation for part in operation.attached}
    if IMPLEMENTATIONS["flex_attention"] in names:
        if not supports_flex():
            raise ValueError("FlexAttention takes a bias since transformers 5; use sdpa or eager")
        if operation.settings.variant == "split_heads":
            raise ValueError("variant split_heads needs attn_implementation sdpa or eager")


def _check_variant(operation: Operation) -> None:
    variant = operation.settings.variant
    kinds = {bias.kind for bias in operation.biases} - {"cross"}
    if variant is not None and kinds and variant not in kinds:
        raise ValueError(
            f"variant is {variant!r}, but the model's attention is {', '.join(sorted(kinds))}"
        )
