"""The attention and mask functions that transformers knows by the names in `IMPLEMENTATIONS`.

An attention module with an attribute `alibi`, a `ScoreBias`, gets that added to its scores; one
without it, such as cross attention, is computed as transformers does.

Shapes: `B` rows, `H` heads, `T` queries, `S` keys, `K` head width.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fairseq.attention import AttentionBias, Positions
from fairseq.attention.coordinates import position_tensor
from fairseq.huggingface.bias import ScoreBias
from fairseq.huggingface.positions import given_positions
from fairseq.huggingface.requirements import import_transformers

__all__ = [
    "IMPLEMENTATIONS",
    "alibi_eager",
    "alibi_flex",
    "alibi_sdpa",
    "implementation_for",
    "observing",
    "register",
    "set_recording",
    "supports_flex",
]

IMPLEMENTATIONS = {"sdpa": "alibi", "eager": "alibi_eager", "flex_attention": "alibi_flex"}
"""Name under which ALiBi is computed by each of transformers' ways."""

Output = tuple[torch.Tensor, torch.Tensor | None]
"""Attention's output (B, T, H, K), and its weights (B, H, T, S) where they were made."""

# What is used of transformers; filled by `register`, since torch.compile traces no import.
_library: dict[str, Callable[..., Any]] = {}

_local = threading.local()  # records: bool; seen: set of modules, or None


def implementation_for(underneath: str | None) -> str:
    """Returns the name of ALiBi computed by one of transformers' implementations.

    Those without a term for scores, as FlashAttention is called by transformers, become sdpa.
    """
    if underneath in IMPLEMENTATIONS.values():
        return str(underneath)
    return IMPLEMENTATIONS.get(underneath or "sdpa", IMPLEMENTATIONS["sdpa"])


def register() -> None:
    """Makes the functions known to transformers, attention and masks alike.

    Without the latter transformers would hand on no mask, and padding would be seen.
    """
    functions = import_transformers("modeling_utils").AttentionInterface
    masking = import_transformers("masking_utils")
    _library.update(
        causal=masking.causal_mask_function,
        dense_mask=masking.sdpa_mask,
        block_mask=masking.flex_attention_mask,
        sdpa=import_transformers("integrations.sdpa_attention").sdpa_attention_forward,
        flex=import_transformers("integrations.flex_attention").flex_attention_forward,
    )
    masks = masking.AttentionMaskInterface
    for name, attend, mask in (
        ("alibi", alibi_sdpa, dense_mask),
        ("alibi_eager", alibi_eager, dense_mask),
        ("alibi_flex", alibi_flex, flex_mask),
    ):
        functions.register(name, attend)
        masks.register(name, mask)


def set_recording(is_on: bool) -> None:
    """Has attention of this thread computed the eager way, which returns weights, or not."""
    _local.records = is_on


@contextmanager
def observing() -> Iterator[set[nn.Module]]:
    """Yields the modules that have asked for their bias since, in this thread."""
    _local.seen = set()
    try:
        yield _local.seen
    finally:
        _local.seen = None


def _records() -> bool:
    return getattr(_local, "records", False)


# ---- attention ----


def alibi_sdpa(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> Output:
    """Computes attention by `scaled_dot_product_attention`.

    Args:
        module: the attention module.
        query: (B, H, T, K).
        key: (B, H or fewer, S, K).
        value: (B, H or fewer, S, K).
        attention_mask: (B, 1, T, S), bool or added to scores; None where nothing is masked.
        kwargs: what models hand on: `scaling`, `dropout`, `position_ids` and more.

    Raises:
        ValueError: the model has a position bias of its own beside ALiBi.
    """
    if _records():
        return alibi_eager(module, query, key, value, attention_mask, **kwargs)
    mask = _additive(module, query, key, attention_mask, kwargs)
    output: Output = _library["sdpa"](module, query, key, value, mask, **kwargs)
    return output


def alibi_eager(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> Output:
    """Computes attention from its formula, and returns its weights; see `alibi_sdpa`.

    Raises:
        ValueError: the model wants something between scores and softmax that is not done here, or
            has a position bias of its own beside ALiBi.
    """
    for extra in ("softcap", "s_aux"):
        if kwargs.get(extra) is not None:
            raise ValueError(f"ALiBi's eager attention has no {extra}, which this model needs")
    mask = _additive(module, query, key, attention_mask, kwargs)
    groups = query.size(1) // key.size(1)
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = (
        query @ key.transpose(-1, -2) * (query.size(-1) ** -0.5 if scaling is None else scaling)
    )
    if kwargs.get("position_bias") is not None:
        scores = scores + kwargs["position_bias"]
    if mask is not None:
        least = torch.finfo(scores.dtype).min
        scores = scores.where(mask, least) if mask.dtype == torch.bool else scores + mask
    precise = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.softmax(-1, dtype=precise).to(query.dtype)
    weights = nn.functional.dropout(weights, dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def alibi_flex(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    **kwargs: Any,
) -> Output:
    """Computes attention by FlexAttention, with no T x S tensor for the bias; see `alibi_sdpa`.

    With a cache, when queries are few, it is computed as `alibi_sdpa` does.
    """
    bias = _bias_of(module, kwargs)
    if bias is None:
        plain: Output = _library["flex"](module, query, key, value, attention_mask, **kwargs)
        return plain
    if not hasattr(attention_mask, "seq_lengths"):  # No block mask was made.
        return alibi_sdpa(module, query, key, value, attention_mask, **kwargs)
    if bias.is_unmasked:
        return alibi_sdpa(module, query, key, value, None, **kwargs)
    where = bias.positions(query, key, None, kwargs.get("position_ids"), None)
    term = _LazyTerm(bias.linear_bias(key.size(2)), *where, device=query.device)
    kwargs["position_bias"] = term
    output: Output = _library["flex"](module, query, key, value, attention_mask, **kwargs)
    return output


class _LazyTerm:
    """A bias that is read number by number, as a tensor (B, H, T, S) would be."""

    def __init__(
        self, bias: AttentionBias, query: Positions, key: Positions, *, device: torch.device
    ) -> None:
        self._query = _two_dimensional(position_tensor(query, device))  # (1 or B, T)
        self._key = _two_dimensional(position_tensor(key, device))  # (1 or B, S)
        # The slopes of a bias that is linear on either side are its values at distance 1.
        one = torch.ones(1, device=device)
        self._left = -bias.dense(one, 0 * one, device=device).flatten()  # (H,)
        self._right = -bias.dense(0 * one, one, device=device).flatten()

    def __getitem__(self, index: tuple[torch.Tensor, ...]) -> torch.Tensor:
        row, head, query, key = index
        zero = torch.zeros_like(row)
        query_row = row if self._query.size(0) > 1 else zero
        key_row = row if self._key.size(0) > 1 else zero
        distance = self._query[query_row, query] - self._key[key_row, key]
        return torch.where(distance > 0, -self._left[head] * distance, self._right[head] * distance)


def _two_dimensional(positions: torch.Tensor) -> torch.Tensor:
    return positions if positions.dim() == 2 else positions.unsqueeze(0)


def _bias_of(module: nn.Module, kwargs: dict[str, Any]) -> ScoreBias | None:
    """Returns a module's bias, which must be the only one that tells positions."""
    bias: ScoreBias | None = getattr(module, "alibi", None)
    if bias is not None and kwargs.get("position_bias") is not None:
        raise ValueError(
            f"{type(module).__name__} adds a position bias of its own to its scores, such as T5's "
            "relative_attention_bias, which would stay in effect beside ALiBi"
        )
    seen = getattr(_local, "seen", None)
    if seen is not None:
        seen.add(module)
    return bias


def _additive(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> torch.Tensor | None:
    """Returns the mask with the module's bias in it, if it has one."""
    bias = _bias_of(module, kwargs)
    if bias is None:
        return mask
    offset = getattr(module, "alibi_query_offset", None)
    positions = kwargs.get("position_ids")
    return bias.additive_mask(query, key, mask, position_ids=positions, query_offset=offset)


# ---- masks ----


def dense_mask(
    *,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """Returns transformers' mask for sdpa, bool (1 or B, 1, T, S), never left out if causal.

    The bias of a query is told from it. Where a caller gives positions, the mask says only which
    keys are padding, (B, 1, 1, S).

    Args:
        mask_function: who may see whom, by transformers' protocol; None is causal.
        attention_mask: tokens that are no padding, (B, S).
        kwargs: sizes, offsets and more, which differ among versions.

    Raises:
        ValueError: positions are given, and there is padding among other keys than theirs.
    """
    if attention_mask is not None and not torch.compiler.is_compiling() and attention_mask.all():
        attention_mask = None
    if given_positions() is not None:
        return None if attention_mask is None else attention_mask.bool()[:, None, None, :]
    mask_function = mask_function or _library["causal"]
    if attention_mask is None and mask_function is _library["causal"]:
        kwargs["batch_size"] = 1  # All rows are alike.
    kwargs["allow_is_causal_skip"] = False
    mask: torch.Tensor | None = _library["dense_mask"](
        mask_function=mask_function, attention_mask=attention_mask, **kwargs
    )
    return mask


def flex_mask(**kwargs: Any) -> Any:
    """Returns transformers' block mask for FlexAttention; a dense one where that is not used."""
    is_whole = kwargs.get("q_length") == kwargs["kv_length"]
    if not is_whole or given_positions() is not None or _records():
        return dense_mask(**kwargs)
    return _library["block_mask"](**kwargs)


def supports_flex() -> bool:
    """Returns whether transformers' FlexAttention takes a bias, as it does since version 5."""
    return "position_bias" in inspect.signature(_library["flex"]).parameters
