"""The slopes of ALiBi: how fast each head forgets."""

from __future__ import annotations

__all__ = ["SLOPE_RULE", "alibi_slopes"]

SLOPE_RULE = "interleave"
"""Name, in checkpoints, of the rule for numbers of heads that are no powers of two."""


def alibi_slopes(num_heads: int, bias_max: float = 8.0) -> list[float]:
    """Returns the penalty per position of each head.

    For a power of two n: the geometric sequence r, r**2, ..., r**n with r = 2**(-bias_max / n), so
    that the gentlest head has slope 2**-bias_max. Otherwise the slopes of the power of two below,
    followed by every second one of the power of two above.

    Args:
        num_heads: number of heads, at least 1.
        bias_max: exponent of the gentlest slope; 8 in all published models.

    Returns:
        `num_heads` doubles.

    Raises:
        ValueError: there is no head, or `bias_max` is not positive.

    Source: Press, Smith, Lewis, Train Short, Test Long, ICLR 2022, section 3.
    """
    if num_heads < 1 or bias_max <= 0:
        raise ValueError(
            f"alibi_slopes: num_heads is {num_heads} and bias_max {bias_max}; both must be positive"
        )
    below = 1 << (num_heads.bit_length() - 1)
    slopes = _geometric(below, bias_max)
    return slopes + _geometric(2 * below, bias_max)[0 : 2 * (num_heads - below) : 2]


def _geometric(n: int, bias_max: float) -> list[float]:
    # The first slope is also the ratio; powers of it round as the original's do.
    ratio = 2.0 ** (-bias_max / n)
    return [ratio * ratio**i for i in range(n)]
