"""Position methods where every token sees those before and after it: encoders.

A method made for causal attention is taken as it is where its formula has a meaning for keys on the
right; ALiBi has variants of its own. `H` is the number of heads, m_h the slope of head h.
"""

from __future__ import annotations

import torch

from fairseq.attention import (
    BIDIRECTIONAL,
    AttentionBias,
    AttentionRule,
    LinearBias,
    SplitHeadsRule,
    TwoSlopeBias,
)
from fairseq.positions.alibi import Alibi, interpolated
from fairseq.positions.alibi_slopes import alibi_slopes
from fairseq.positions.base import PositionMethod, Surroundings
from fairseq.positions.methods import find_method

__all__ = ["ENCODER_VARIANTS", "EncoderAlibi", "encoder_method", "encoder_rule"]

ENCODER_VARIANTS = ["symmetric", "split", "two-slope"]

_REFUSED = {
    "none": "leaves an encoder without any order: it would read a bag of words",
    "xpos": "lets queries grow and keys shrink with position, which is meant for keys on the left",
    "fire": "measures distance by what a query can look back on, which an encoder's cannot",
}


class EncoderAlibi(Alibi):
    """ALiBi for both sides of a query.

    * symmetric: -m_h |i - j|. What is left and what is right is told apart by nothing.
    * split: the same, but the first half of the heads sees its own position and those on the left,
      the other half its own and those on the right; both halves have the slopes of H / 2 heads.
    * two-slope: -m_h d on the left, and -m_g d on the right with g = H + 1 - h, so that a head
      which looks far to the left looks a short way to the right.

    Args:
        model: what it serves.
        variant: one of the above.

    Raises:
        ValueError: the variant is unknown or does not fit the heads or the settings.
    """

    def __init__(self, model: Surroundings, variant: str) -> None:
        super().__init__(model)
        _check_variant(model, variant)
        self.variant = variant
        if variant == "split":
            half = alibi_slopes(model.num_heads // 2, model.settings.alibi_bias_max)
            self._slopes = torch.tensor(2 * half, dtype=torch.float32, device="cpu")
            self._bias = LinearBias(self._slopes)
        self._two_slopes: tuple[float, TwoSlopeBias] | None = None

    def bias(self, sequence_length: int | None = None) -> AttentionBias:
        if self.variant != "two-slope":
            return super().bias(sequence_length)
        factor = self._scaling.factor(sequence_length)
        if self._two_slopes is None or self._two_slopes[0] != factor:
            slopes = interpolated(self._slopes, factor, self._kind)
            self._two_slopes = factor, TwoSlopeBias(slopes, slopes.flip(0))
        return self._two_slopes[1]


def _check_variant(model: Surroundings, variant: str) -> None:
    flag = f"--encoder-alibi-variant {variant}"
    if variant not in ENCODER_VARIANTS:
        raise ValueError(f"{flag}: it must be one of {', '.join(ENCODER_VARIANTS)}")
    if variant == "split" and model.num_heads % 2:
        raise ValueError(
            f"{flag} gives half of the heads to each side, but --encoder-attention-heads is "
            f"{model.num_heads}; make it even, or use symmetric or two-slope"
        )
    if variant == "two-slope" and model.num_heads < 2:
        raise ValueError(
            f"{flag} needs heads that differ, but --encoder-attention-heads is 1; use symmetric"
        )
    if variant == "two-slope" and model.settings.alibi_learned_slopes:
        raise ValueError(
            f"{flag} has no trained form; leave out --alibi-learned-slopes, or use symmetric or "
            "split"
        )


def encoder_method(name: str, model: Surroundings, variant: str) -> PositionMethod:
    """Makes the position method of an encoder.

    Args:
        name: as in `--position-method`.
        model: the encoder it serves.
        variant: of ALiBi, for both sides of a query.

    Raises:
        ValueError: the method is unknown or has no meaning for keys on the right, or the variant
            does not fit.
    """
    if name in _REFUSED:
        raise ValueError(
            f"--position-method {name} {_REFUSED[name]}; use alibi, rotary, t5 or sinusoidal"
        )
    if name == Alibi.name:
        return EncoderAlibi(model, variant)
    return find_method(name)(model)


def encoder_rule(method: PositionMethod, num_heads: int) -> AttentionRule:
    """Returns which keys each head of an encoder may see."""
    if isinstance(method, EncoderAlibi) and method.variant == "split":
        return SplitHeadsRule.halves(num_heads)
    return BIDIRECTIONAL
