"""Dropout by a generator of its own: statistics, repeatability, gradients."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fairseq.attention.random_bits import set_dropout_worker
from fairseq.modules.dropout import (
    Dropout,
    dropout,
    dropout_mask,
    relu_dropout,
)

COUNT = 1 << 20


def draw(p, seed=0, count=COUNT):
    torch.manual_seed(seed)
    return dropout_mask(torch.empty(count), p)


@pytest.mark.parametrize("p", [0.001, 0.1, 0.3, 0.5, 0.9])
def test_rate_is_the_one_asked_for(p):
    mask = draw(p)
    num_kept = int((mask > 0).sum())
    spread = math.sqrt(COUNT * p * (1 - p))
    assert abs(num_kept - COUNT * (1 - p)) < 5 * spread + COUNT / 65536
    assert set(mask.unique().tolist()) == {0.0, mask.max().item()}


@pytest.mark.parametrize("p", [0.1, 0.3, 0.777])
def test_expected_value_is_the_input(p):
    dropped = round(p * 65536) / 65536
    assert draw(p).double().max() * (1 - dropped) == pytest.approx(1, abs=1e-7)


def test_draws_are_independent_of_their_neighbours_and_of_other_calls():
    p = 0.3
    torch.manual_seed(0)
    first, second = (dropout_mask(torch.empty(COUNT), p).numpy() > 0 for _ in range(2))
    bound = 5 / math.sqrt(COUNT)
    for lag in (1, 2, 3, 4, 5, 8, 64, 1024, 65536):
        assert abs(np.corrcoef(first[lag:], first[:-lag])[0, 1]) < bound, lag
    assert abs(np.corrcoef(first, second)[0, 1]) < bound


def test_successive_updates_and_workers_are_independent():
    masks = [draw(0.5, seed=seed) for seed in (1, 2, 3)]
    set_dropout_worker(1)
    try:
        masks.append(draw(0.5, seed=1))
    finally:
        set_dropout_worker(0)
    kept = np.stack([mask.numpy() > 0 for mask in masks])
    correlations = np.corrcoef(kept)[np.triu_indices(4, k=1)]
    assert np.abs(correlations).max() < 5 / math.sqrt(COUNT)


def test_counts_in_small_blocks_are_binomial():
    p, size = 0.25, 8
    counts = (draw(p).view(-1, size) == 0).sum(1).bincount(minlength=size + 1).double()
    chances = [math.comb(size, k) * p**k * (1 - p) ** (size - k) for k in range(size + 1)]
    expected = torch.tensor(chances, dtype=torch.float64) * (COUNT / size)
    chi_square = ((counts - expected) ** 2 / expected)[expected > 5].sum()
    assert chi_square < 30  # 8 degrees of freedom: once in 5,000


def test_the_state_of_torch_s_generator_settles_the_mask():
    torch.manual_seed(3)
    dropout_mask(torch.empty(10), 0.5)
    state = torch.get_rng_state()
    first = dropout_mask(torch.empty(70001), 0.5)
    torch.set_rng_state(state)
    assert torch.equal(first, dropout_mask(torch.empty(70001), 0.5))
    assert not torch.equal(first, dropout_mask(torch.empty(70001), 0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dropout_multiplies_with_the_mask(dtype):
    x = torch.randn(3, 50, 7, dtype=dtype, requires_grad=True)
    torch.manual_seed(5)
    mask = dropout_mask(x, 0.3)
    torch.manual_seed(5)
    out = dropout(x, 0.3)
    assert torch.equal(out, x * mask)
    grad = torch.randn_like(x)
    out.backward(grad)
    assert torch.equal(x.grad, grad * mask)


def test_the_sum_with_what_is_left():
    x = torch.randn(4, 33, dtype=torch.float64, requires_grad=True)
    y = torch.randn(4, 33, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(5)
    mask = dropout_mask(y, 0.2)
    torch.manual_seed(5)
    total = dropout(y, 0.2, add_to=x)
    torch.testing.assert_close(total, x + y * mask, rtol=0, atol=1e-15)
    grads = torch.autograd.grad(total.square().sum(), (x, y))
    torch.testing.assert_close(grads[0], 2 * total)
    torch.testing.assert_close(grads[1], 2 * total * mask)


@pytest.mark.parametrize("count", [1, 6, 65536, 65537, 200_003])
def test_relu_and_dropout_in_one(count):
    x = torch.randn(count, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(9)
    mask = dropout_mask(x, 0.3)
    torch.manual_seed(9)
    out = relu_dropout(x, 0.3)
    assert torch.equal(out, x.clamp(min=0) * mask)
    grad = torch.randn_like(x)
    (found,) = torch.autograd.grad(out, x, grad)
    torch.testing.assert_close(found, grad * (x > 0) * mask, rtol=1e-15, atol=0)


def test_relu_and_dropout_of_a_strided_input():
    x = torch.randn(8, 6).t()
    torch.manual_seed(1)
    mask = dropout_mask(x, 0.5)
    torch.manual_seed(1)
    assert torch.equal(relu_dropout(x, 0.5), x.relu() * mask)


def test_a_pass_that_is_computed_again_drops_the_same():
    x = torch.randn(100, requires_grad=True)
    out = checkpoint(lambda x: dropout(x, 0.5).square(), x, use_reentrant=False)
    (grad,) = torch.autograd.grad(out.sum(), x)
    kept = out > 0
    torch.testing.assert_close(grad, torch.where(kept, 8 * x, 0.0))  # (2 x)^2


@pytest.mark.parametrize(("p", "expected"), [(0.0, 1.0), (1.0, 0.0), (1e-7, 1.0)])
def test_rates_at_the_ends(p, expected):
    torch.manual_seed(0)
    x = torch.ones(1000)
    for found in (dropout(x, p), relu_dropout(x, p)):
        torch.testing.assert_close(found, torch.full((1000,), expected), rtol=1e-6, atol=0)
    assert torch.equal(dropout(x, p, add_to=x), x + dropout(x, p))


def test_half_precision_drops_too():
    torch.manual_seed(0)
    out = dropout(torch.ones(10_000, dtype=torch.bfloat16), 0.25)
    assert out.dtype == torch.bfloat16
    assert set(out.tolist()) == {0.0, 1.3359375}  # 4 / 3 in bfloat16
    assert 0.7 < (out > 0).float().mean() < 0.8


def test_the_module_drops_in_training_only():
    module = Dropout(0.5)
    x = torch.ones(1000)
    assert (module(x) == 0).any()
    assert module.eval()(x) is x
