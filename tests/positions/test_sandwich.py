"""Sandwich: inner products of sinusoidal embeddings."""

import math

from formulas import HEADS, check_bias, make


def embedding(position):
    angles = [position / 10000 ** (2 * k / 128) for k in range(64)]
    return [math.sin(a) for a in angles] + [math.cos(a) for a in angles]


def test_formula():
    """The inner product of 128 numbers over 8 h / H, less what a softmax does not see."""
    rows = {i: embedding(i) for i in [*range(12), *range(690, 703)]}

    def term(weights, h, i, j):
        ratio = 8 * (h + 1) / HEADS
        product = sum(a * b for a, b in zip(rows[i], rows[j], strict=True))
        return product / ratio - 64 / ratio

    check_bias(make("sandwich"), term, atol=2e-4)
