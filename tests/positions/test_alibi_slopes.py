"""The slopes of ALiBi: table, formula, and the numbers in the paper."""

from __future__ import annotations

import math

import pytest

from fairseq.positions import alibi_slopes

TABLE = {
    1: [0.00390625],
    2: [0.0625, 0.00390625],
    4: [0.25, 0.0625, 0.015625, 0.00390625],
    8: [2.0**-k for k in range(1, 9)],
    12: [*(2.0**-k for k in range(1, 9)), 0.707107, 0.353553, 0.176777, 0.088388],
    16: [2.0 ** (-k / 2) for k in range(1, 17)],
    20: [*(2.0 ** (-k / 2) for k in range(1, 17)), 0.840896, 0.594604, 0.420448, 0.297302],
}


@pytest.mark.parametrize("num_heads", list(TABLE))
def test_table(num_heads):
    assert alibi_slopes(num_heads) == pytest.approx(TABLE[num_heads], abs=5e-7)


@pytest.mark.parametrize("num_heads", range(1, 130))
def test_formula(num_heads):
    below = 2 ** int(math.log2(num_heads))
    expected = [2 ** (-8 * k / below) for k in range(1, below + 1)]
    expected += [2 ** (-8 * k / (2 * below)) for k in range(1, 2 * below, 2)][: num_heads - below]
    assert alibi_slopes(num_heads) == pytest.approx(expected, rel=1e-12)


def test_another_gentlest_slope():
    assert alibi_slopes(4, bias_max=4) == pytest.approx([0.5, 0.25, 0.125, 0.0625])


@pytest.mark.parametrize(("num_heads", "bias_max"), [(0, 8), (-1, 8), (4, 0)])
def test_bad_input(num_heads, bias_max):
    with pytest.raises(ValueError, match="must be positive"):
        alibi_slopes(num_heads, bias_max)
