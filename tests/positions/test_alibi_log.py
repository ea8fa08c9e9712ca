"""ALiBi with distances in logarithms."""

import math

import pytest
from formulas import check_bias, make


@pytest.mark.parametrize("bias_max", [8.0, 4.0])
def test_formula(bias_max):
    def term(weights, h, i, j):
        return -(2 ** (-bias_max * (h + 1) / 4)) * math.log(1 + abs(i - j))

    check_bias(make("alibi-log", alibi_bias_max=bias_max), term)
