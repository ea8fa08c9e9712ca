import math

import pytest
import torch
from torch import nn

from fairseq import utils
from fairseq.optim.grad_norm import clip_grad_norm_


def with_grads(*grads):
    params = []
    for grad in grads:
        p = nn.Parameter(torch.zeros(len(grad)))
        p.grad = torch.tensor(grad)
        params.append(p)
    return params


def test_norm_before_clipping_is_returned_and_gradients_are_scaled():
    params = with_grads([3.0, 0.0], [0.0, 4.0])
    norm = clip_grad_norm_(params, 1.0)
    assert norm.item() == 5.0
    coefficient = 1 / (5 + 1e-6)
    assert params[0].grad.tolist() == pytest.approx([3 * coefficient, 0.0], rel=1e-6)
    assert params[1].grad.tolist() == pytest.approx([0.0, 4 * coefficient], rel=1e-6)


@pytest.mark.parametrize("max_norm", [0.0, 10.0])
def test_gradients_within_bounds_stay_as_they_are(max_norm):
    params = with_grads([3.0, 0.0], [0.0, 4.0])
    clip_grad_norm_(params, max_norm)
    assert params[0].grad.tolist() == [3.0, 0.0]


def test_norm_is_that_of_float32_norms_of_each_tensor():
    torch.manual_seed(0)
    params = [nn.Parameter(torch.zeros(s)) for s in [(6424, 48), (48, 48), (48,)]]
    for p in params:
        p.grad = torch.randn_like(p)
    norms = torch.stack([torch.norm(p.grad, p=2, dtype=torch.float32) for p in params])
    assert torch.equal(utils.clip_grad_norm_(params, 0.0), torch.norm(norms))


def test_norm_of_half_precision_gradients_does_not_overflow():
    p = nn.Parameter(torch.zeros(100, dtype=torch.float16))
    p.grad = torch.full_like(p, 60000.0)
    norm = clip_grad_norm_([p], 0.0)
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(600000, rel=1e-6)


def test_shards_are_combined_by_the_given_function():
    params = with_grads([3.0], [4.0])
    norm = clip_grad_norm_(params, 1.0, lambda local: torch.sqrt(local**2 + 144.0))
    assert norm.item() == 13.0
    assert params[0].grad.item() == pytest.approx(3 / 13, rel=1e-6)


def test_parameters_without_gradients():
    assert clip_grad_norm_([nn.Parameter(torch.zeros(2))], 1.0).item() == 0.0
    assert clip_grad_norm_([], 1.0).item() == 0.0
    params = [*with_grads([3.0]), nn.Parameter(torch.zeros(2))]
    assert clip_grad_norm_(params, 0.0).item() == 3.0
    assert clip_grad_norm_(params[0], 0.0).item() == 3.0


def test_a_norm_that_is_not_finite_is_reported():
    assert math.isnan(clip_grad_norm_(with_grads([math.nan], [1.0]), 1.0).item())
    assert math.isinf(clip_grad_norm_(with_grads([math.inf], [1.0]), 1.0).item())
