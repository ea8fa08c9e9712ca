"""Biases and masks, by hand."""

from __future__ import annotations

import pytest
import torch

from fairseq.attention import CAUSAL, FutureMaskBuffer, LinearBias, MaskRule, ZeroBias
from fairseq.attention.mask import join

CPU = torch.device("cpu")
INF = float("inf")


def test_linear_bias():
    bias = LinearBias([0.5, 0.25]).dense(range(2, 4), range(4))
    assert bias.tolist() == [
        [[-1.0, -0.5, 0.0, -0.5], [-1.5, -1.0, -0.5, 0.0]],
        [[-0.5, -0.25, 0.0, -0.25], [-0.75, -0.5, -0.25, 0.0]],
    ]


def test_linear_bias_is_exact_far_from_the_start():
    bias = LinearBias([1.0]).dense(range(10**7, 10**7 + 1), range(10**7 - 2, 10**7 + 1))
    assert bias.tolist() == [[[-2.0, -1.0, 0.0]]]


def test_zero_bias():
    assert ZeroBias(3).dense(range(2), range(4)).shape == (1, 2, 4)
    assert ZeroBias(3).heads(slice(1, 3)).num_heads == 2


def test_heads_of_a_linear_bias_keep_their_slopes():
    assert LinearBias([0.5, 0.25, 0.125]).heads(slice(1, 3)).slopes.tolist() == [0.25, 0.125]


def test_join():
    mask = join(LinearBias([0.5]), CAUSAL, range(3), range(3), dtype=torch.float32, device=CPU)
    assert mask.tolist() == [[[0.0, -INF, -INF], [-0.5, 0.0, -INF], [-1.0, -0.5, 0.0]]]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (MaskRule(), [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]),
        (MaskRule(window=2), [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]),
        (
            MaskRule(is_causal=False, window=2),
            [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 1]],
        ),
    ],
)
def test_rules(rule, expected):
    assert rule.is_allowed(range(4), range(4)).int().tolist() == [expected]


def test_a_window_needs_a_position():
    with pytest.raises(ValueError, match="window is 0; a query must see at least 1"):
        MaskRule(window=0)


def test_buffer_has_every_head():
    buffer = FutureMaskBuffer(ZeroBias(4))
    assert buffer.get(3, dtype=torch.float32, device=CPU).shape == (4, 3, 3)
