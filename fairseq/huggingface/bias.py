"""What ALiBi adds to the scores of an attention module of transformers, and with which settings.

Shapes: `B` rows, `H` heads, `T` queries, `S` keys.
"""

from __future__ import annotations

import math
import operator
import weakref
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fairseq.attention import (
    AttentionBias,
    CrossBias,
    LinearBias,
    Positions,
    SplitHeadsBias,
    SymmetricBias,
    TwoSlopeBias,
)
from fairseq.huggingface.positions import find_positions, given_positions
from fairseq.positions.alibi import interpolated
from fairseq.positions.alibi_slopes import alibi_slopes
from fairseq.positions.scaling import LengthScaling
from fairseq.positions.settings import INTERPOLATIONS

__all__ = ["VARIANTS", "AlibiSettings", "ScoreBias"]

VARIANTS = ("causal", "symmetric", "split_heads", "two_slopes")


@dataclass(frozen=True)
class AlibiSettings:
    """How a model's ALiBi is made; kept in its configuration.

    Attributes:
        variant: of encoders: `symmetric`; `split_heads`, half of the heads seeing only what is
            left of a token; or `two_slopes`, whose right slope is half a step gentler than the
            left one. None is `causal` for decoders and `symmetric` for encoders.
        bias_max: the gentlest of n heads has slope 2 ** -bias_max.
        interpolation: how slopes shrink, as in a model card: `{"type": "linear", "factor": 4.0}`,
            or `{"type": "linear", "train_seq_len": 2048}` for longer sequences than that, or with
            type `ntk`. None is not at all.
        cross_attention: whether cross attention gets a symmetric bias too.

    Raises:
        ValueError: a setting that does not exist, or contradicts another.
    """

    variant: str | None = None
    bias_max: float = 8.0
    interpolation: Mapping[str, Any] | None = None
    cross_attention: bool = False

    def __post_init__(self) -> None:
        if self.variant is not None and self.variant not in VARIANTS:
            raise ValueError(f"variant is {self.variant!r}; it can be {', '.join(VARIANTS)}")
        if not 0 < self.bias_max < math.inf:
            raise ValueError(f"bias_max is {self.bias_max}; it must be above 0, usually 8")
        unknown = set(self.interpolation or {}) - {"type", "factor", "train_seq_len"}
        if unknown:
            raise ValueError(
                f"interpolation has {', '.join(sorted(unknown))}; "
                "it can have type, factor and train_seq_len"
            )
        self.scaling()

    def scaling(self) -> LengthScaling:
        """Returns by how much slopes shrink for a sequence of some length."""
        given = self.interpolation or {"type": "none"}
        return LengthScaling(
            given.get("type", "linear"),
            INTERPOLATIONS,
            flag="interpolation type",
            prefix="interpolation",
            fixed_factor=given.get("factor"),
            train_length=given.get("train_seq_len"),
        )

    def as_dict(self) -> dict[str, Any]:
        """Returns what a configuration keeps."""
        return asdict(self)


class ScoreBias:
    """The bias of the attention modules of one kind in a model, which share it.

    What it makes for one layer is kept for the next, as long as mask and positions are the same
    objects. It holds no tensor on a device and has no place in a state dict.

    Args:
        num_heads: heads of each module.
        kind: one of `VARIANTS`, or `cross`.
        settings: the model's.

    Attributes:
        strength: what the bias is multiplied by; 1 but while it is checked.
        is_unmasked: whether every query sees every key; False but while it is checked.
    """

    def __init__(self, num_heads: int, kind: str, settings: AlibiSettings) -> None:
        self.num_heads = num_heads
        self.kind = kind
        self.settings = settings
        self.strength = 1.0
        self.is_unmasked = False
        self._scaling = settings.scaling()
        self._heads = slice(0, num_heads)
        self._biases: dict[tuple[float, float], AttentionBias] = {}
        self._kept: _Kept | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_kept": None}

    @property
    def is_causal(self) -> bool:
        """Whether a query sees no later key."""
        return self.kind == "causal"

    def heads(self, which: slice) -> ScoreBias:
        """Returns the bias of some of the heads, for a worker that computes only those."""
        part = ScoreBias(self.num_heads, self.kind, self.settings)
        part._heads = slice(*which.indices(self.num_heads))
        return part

    def linear_bias(self, sequence_length: int | None = None) -> AttentionBias:
        """Returns the bias as a function of positions, for a sequence of that many tokens."""
        factor = self._scaling.factor(sequence_length)
        key = (factor, self.strength)
        if key not in self._biases:
            whole = _bias_of(self.kind, self.num_heads, self.settings, factor, self.strength)
            self._biases[key] = whole.heads(self._heads)
        return self._biases[key]

    def additive_mask(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        mask: torch.Tensor | None,
        *,
        position_ids: torch.Tensor | None = None,
        query_offset: int | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns what is added to the scores: the bias, and the least number where not allowed.

        Args:
            query: (B, H, T, K).
            key: (B, any number of heads, S, K).
            mask: of transformers: bool, True where allowed, or added to scores; (B, 1 or H, T, S).
            position_ids: as the model was given them.
            query_offset: which key is that of the first query, where it is known.

        Returns:
            (1 or B, H, T, S) in the query's dtype.
        """
        given = given_positions() if self.kind != "cross" else None
        if given is not None:
            mask = _padding_mask(given.key_is_padding, mask)
        if torch.compiler.is_compiling() or (mask is not None and mask.requires_grad):
            return self._make(query, key, mask, position_ids, query_offset)
        sources = (mask, position_ids, query_offset, given)
        shape = (*query.shape[1:3], key.size(2), query.dtype, query.device)
        shape = (*shape, self.strength, self.is_unmasked)
        made = self._kept.made if self._kept and self._kept.fits(sources, shape) else None
        if made is None:
            made = self._make(query, key, mask, position_ids, query_offset)
            self._kept = _Kept(made, sources, shape)
        return made

    def positions(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        query_offset: int | torch.Tensor | None,
    ) -> tuple[Positions, Positions]:
        """Returns where queries and keys stand; see `find_positions`."""
        num_queries, num_keys = query.size(2), key.size(2)
        if self.kind == "cross":
            start = 0 if query_offset is None else query_offset
            return torch.arange(num_queries, device=query.device) + start, range(num_keys)
        return find_positions(
            num_queries,
            num_keys,
            is_allowed=_as_bool(mask) if self.is_causal and mask is not None else None,
            position_ids=position_ids,
            query_offset=query_offset,
        )

    def _make(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        query_offset: int | torch.Tensor | None,
    ) -> torch.Tensor:
        if mask is not None:  # Some versions of transformers make it a column too wide.
            mask = _one_row_if_shared(mask)[..., : key.size(2)]
        where = self.positions(query, key, mask, position_ids, query_offset)
        bias = self.linear_bias(key.size(2))
        self._check(query, bias)
        term = bias.dense(*where, device=query.device)  # (H, T, S) or (B, H, T, S)
        if term.dim() == 3:
            term = term.unsqueeze(0)
        if term.shape[-2:] != (query.size(2), key.size(2)):
            raise ValueError(
                f"position_context gives {term.size(-2)} query and {term.size(-1)} key positions "
                f"to attention with {query.size(2)} queries and {key.size(2)} keys"
            )
        term = term.to(query.dtype)
        if mask is not None and mask.dtype != torch.bool:
            # What is added besides the mask stays, such as a model's own bias.
            added = mask.masked_fill(~_as_bool(mask), 0.0) if self.is_unmasked else mask
            term = term + added.to(query.dtype)
        if self.is_unmasked:
            return term
        for allowed in self._rules(mask, where, query.device):
            term = term.where(allowed, torch.finfo(query.dtype).min)
        return term

    def _rules(
        self,
        mask: torch.Tensor | None,
        where: tuple[Positions, Positions],
        device: torch.device,
    ) -> list[torch.Tensor]:
        """Returns who may see whom, by the mask and by the bias itself."""
        rules = []
        if mask is not None:
            rules.append(_as_bool(mask))
        # With a mask of transformers, causality is in it, along with exceptions that models make.
        if not (self.is_causal and mask is not None and given_positions() is None):
            allowed = self.linear_bias().rule.is_allowed(*where, device=device)
            if allowed is not None:
                rules.append(allowed)
        return rules

    def _check(self, query: torch.Tensor, bias: AttentionBias) -> None:
        if query.size(1) != bias.num_heads:
            raise ValueError(
                f"attention computes {query.size(1)} heads, its ALiBi has {bias.num_heads}; a "
                "worker with some of the heads sets module.alibi = module.alibi.heads(which)"
            )


class _Kept:
    """What was made last, and from what; it goes when one of its sources goes."""

    def __init__(
        self, made: torch.Tensor, sources: tuple[Any, ...], shape: tuple[Any, ...]
    ) -> None:
        self.made: torch.Tensor | None = made
        self._sources = [
            source if source is None or isinstance(source, int) else weakref.ref(source, self._drop)
            for source in sources
        ]
        self._state = _state(sources, shape)

    def _drop(self, _: Any) -> None:
        self.made = None

    def fits(self, sources: tuple[Any, ...], shape: tuple[Any, ...]) -> bool:
        """Returns whether it would be made the same again."""
        kept = [s() if isinstance(s, weakref.ref) else s for s in self._sources]
        return self._state == _state(sources, shape) and all(map(operator.is_, kept, sources))


def _state(sources: tuple[Any, ...], shape: tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns all that matters besides which objects the sources are."""
    return (*shape, torch.is_inference_mode_enabled(), *map(_version, sources))


def _version(source: Any) -> int | None:
    """Counts the changes of a tensor in place."""
    if not isinstance(source, torch.Tensor) or source.is_inference():
        return None
    return source._version


def _bias_of(
    kind: str, num_heads: int, settings: AlibiSettings, factor: float, strength: float
) -> AttentionBias:
    def slopes(num: int) -> torch.Tensor:
        plain = torch.tensor(alibi_slopes(num, settings.bias_max), device="cpu")
        return strength * interpolated(plain, factor, settings.scaling().kind)

    if kind == "causal":
        return LinearBias(slopes(num_heads))
    if kind == "split_heads":
        num_left = (num_heads + 1) // 2
        right = [slopes(num_heads - num_left)] if num_heads > 1 else []
        return SplitHeadsBias(torch.cat([slopes(num_left), *right]))
    if kind == "two_slopes":
        step = 2.0 ** (-settings.bias_max / (2 * num_heads))
        return TwoSlopeBias(slopes(num_heads), step * slopes(num_heads))
    symmetric = SymmetricBias(slopes(num_heads))
    return CrossBias(symmetric) if kind == "cross" else symmetric


def _as_bool(mask: torch.Tensor) -> torch.Tensor:
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _one_row_if_shared(mask: torch.Tensor) -> torch.Tensor:
    """Returns one row of a mask that was expanded to many."""
    return mask[:1] if mask.stride(0) == 0 else mask


def _padding_mask(
    key_is_padding: torch.Tensor | None, mask: torch.Tensor | None
) -> torch.Tensor | None:
    """Returns which keys are no padding; where positions are given, a mask says nothing else."""
    if key_is_padding is not None:
        return ~key_is_padding.bool()[:, None, None, :]
    return mask if mask is not None and mask.size(-2) == 1 else None
