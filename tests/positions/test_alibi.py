"""ALiBi: its bias, interpolated and trained slopes, and the function for other people's models."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from formulas import HEADS, check_bias, make

from fairseq.attention import CAUSAL, LinearBias
from fairseq.attention.mask import join
from fairseq.positions import alibi_bias, alibi_slopes

SLOPES = [0.25, 0.0625, 0.015625, 0.00390625]


def test_formula():
    check_bias(make("alibi"), lambda w, h, i, j: -SLOPES[h] * abs(i - j))


def test_another_gentlest_slope():
    method = make("alibi", alibi_bias_max=16.0)
    check_bias(method, lambda w, h, i, j: -(SLOPES[h] ** 2) * abs(i - j))


def test_nothing_is_stored_for_fixed_slopes():
    assert list(make("alibi").state_dict()) == []


def test_trained_slopes_start_from_the_fixed_ones():
    method = make("alibi", alibi_learned_slopes=True)
    assert list(method.state_dict()) == ["slope_log_factors"]
    check_bias(method, lambda w, h, i, j: -SLOPES[h] * w["slope_log_factors"][h].exp() * abs(i - j))
    method.slope_log_factors.data.zero_()
    positions = range(30)
    assert torch.equal(
        method.bias().dense(positions, positions), LinearBias(SLOPES).dense(positions, positions)
    )


@pytest.mark.parametrize("is_learned", [False, True])
@pytest.mark.parametrize("length", [None, 1, 64, 65, 256])
@pytest.mark.parametrize("kind", ["none", "linear", "ntk"])
def test_interpolation(kind, length, is_learned):
    method = make(
        "alibi", train_length=64, alibi_interpolation=kind, alibi_learned_slopes=is_learned
    )
    a = max(1.0, length / 64) if length and kind != "none" else 1.0

    def term(weights, h, i, j):
        # Four heads go from steep to gentle, so that the head's number is its rank.
        divisor = a if kind == "linear" else a ** (h / 3)
        slope = SLOPES[h] / divisor * (weights["slope_log_factors"][h].exp() if is_learned else 1)
        return -slope * abs(i - j)

    assert method.depends_on_length == (kind != "none")
    check_bias(method, term, sequence_length=length)


def test_ntk_ranks_heads_by_steepness():
    """With 6 heads the slopes are not in order: the last two lie between the first four."""
    slopes = alibi_slopes(6)
    assert slopes[4] > slopes[0] > slopes[5] > slopes[1]
    method = make("alibi", num_heads=6, train_length=10, alibi_interpolation="ntk")
    found = -method.bias(40).dense(range(1, 2), range(1)).view(6)
    ranks = [1, 3, 4, 5, 0, 2]
    expected = [slope / 4 ** (rank / 5) for slope, rank in zip(slopes, ranks, strict=True)]
    assert found.tolist() == pytest.approx(expected)


def test_a_single_head_is_the_steepest():
    method = make("alibi", num_heads=1, train_length=10, alibi_interpolation="ntk")
    assert method.bias(40).dense(range(1, 2), range(1)).item() == pytest.approx(-(2.0**-8))


@pytest.mark.parametrize("length", [None, 3, 1000])
def test_fixed_factor(length):
    method = make("alibi", alibi_interpolation="linear", alibi_interpolation_factor=4.0)
    check_bias(method, lambda w, h, i, j: -SLOPES[h] / 4 * abs(i - j), sequence_length=length)


def test_training_length_by_hand():
    method = make("alibi", train_length=10, alibi_interpolation="linear", alibi_train_length=100)
    assert method.bias(50).slopes.tolist() == SLOPES
    assert method.bias(200).slopes.tolist() == [slope / 2 for slope in SLOPES]


def test_the_same_length_is_the_same_object():
    """So that masks are kept from window to window."""
    method = make("alibi", train_length=10, alibi_interpolation="linear")
    assert method.bias(40) is method.bias(40)
    assert method.bias(40) is not method.bias(20)
    assert method.bias(7) is method.bias(10)


# ---- the plain function ----


@pytest.mark.parametrize("heads", [1, 6, 8])
@pytest.mark.parametrize("sizes", [(5,), (1, 7), (3, 9), (1,)])
def test_plain_function(heads, sizes):
    found = alibi_bias(heads, *sizes)
    num_queries, num_keys = sizes[0], sizes[-1]
    assert found.shape == (heads, num_queries, num_keys)
    for h, slope in enumerate(alibi_slopes(heads)):
        for t in range(num_queries):
            for s in range(num_keys):
                distance = num_keys - num_queries + t - s
                expected = -slope * distance if distance >= 0 else -math.inf
                assert found[h, t, s].item() == pytest.approx(expected)


def test_plain_function_equals_the_model_s_mask():
    mask = join(make("alibi").bias(), CAUSAL, range(3, 9), range(9), dtype=torch.float32)
    assert torch.equal(alibi_bias(HEADS, 6, 9), mask)


def test_plain_function_in_other_people_s_models():
    q, k, v = torch.randn(3, 2, 8, 20, 4, generator=torch.Generator().manual_seed(0))
    whole = F.scaled_dot_product_attention(q, k, v, attn_mask=alibi_bias(8, 20))
    step = F.scaled_dot_product_attention(q[:, :, 19:], k, v, attn_mask=alibi_bias(8, 1, 20))
    torch.testing.assert_close(step[:, :, 0], whole[:, :, 19])


def test_plain_function_both_ways_and_elsewhere():
    found = alibi_bias([0.5], 2, 4, first_query=1, is_causal=False, dtype=torch.float64)
    assert found.tolist() == [[[-0.5, 0, -0.5, -1], [-1, -0.5, 0, -0.5]]]
    assert found.dtype == torch.float64


def test_plain_function_hands_gradients_to_slopes():
    slopes = torch.tensor([0.5, 0.25], requires_grad=True)
    alibi_bias(slopes, 3, is_causal=False).sum().backward()
    assert slopes.grad.tolist() == [-8, -8]
    assert torch.equal(alibi_bias(alibi_slopes(4, 4), 3), alibi_bias(4, 3, bias_max=4))


@pytest.mark.parametrize("given", [(0, 3), (8, 0), (8, 3, 0), (torch.ones(2, 2), 3)])
def test_plain_function_with_bad_input(given):
    with pytest.raises(ValueError, match=r"alibi_\w+: .*must be"):
        alibi_bias(*given)
