"""A generalised Gaussian of distance."""

import pytest
import torch
from formulas import check_bias, make

from fairseq.attention import LinearBias
from fairseq.positions import Surroundings, alibi_slopes, find_method

SLOPES = [0.25, 0.0625, 0.015625, 0.00390625]


def test_formula():
    def term(weights, h, i, j):
        if i == j:
            return torch.tensor(0.0, dtype=torch.float64)
        alpha = weights["log_widths"][h].exp() / SLOPES[h]
        return -((abs(i - j) / alpha) ** weights["log_shapes"][h].exp())

    check_bias(make("ggd"), term)


@pytest.mark.parametrize("num_heads", [1, 6, 8])
def test_it_starts_at_alibi(num_heads):
    method = find_method("ggd")(Surroundings(num_heads, padding_idx=1))
    positions = range(40)
    torch.testing.assert_close(
        method.bias().dense(positions, positions),
        LinearBias(alibi_slopes(num_heads)).dense(positions, positions),
    )


def test_steep_shapes_have_finite_gradients():
    method = make("ggd")
    method.log_shapes.data.fill_(5.0)  # (d / alpha) ** 148 overflows
    bias = method.bias().dense(range(2000, 2001), range(2001))
    bias.softmax(-1).square().sum().backward()
    assert torch.isfinite(bias).all()
    assert torch.isfinite(method.log_shapes.grad).all()
    assert torch.isfinite(method.log_widths.grad).all()
