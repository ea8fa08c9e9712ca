"""Cross entropy with a backward pass of its own, against float64 formulas."""

from __future__ import annotations

import pytest
import torch

from fairseq.criterions.adaptive_nll import adaptive_nll

PAD = 1


class Bands:
    """Stands for an adaptive softmax: a head of 6 words and one tail of 5."""

    def __init__(self, head, tail, head_target, tail_target):
        self.logits = [head, tail]
        self.targets = [head_target, tail_target]

    def __call__(self, features, target):
        return self.logits, self.targets


@pytest.fixture
def bands():
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(8, 7, generator=generator, requires_grad=True)
    tail = torch.randn(3, 5, generator=generator, requires_grad=True)
    head_target = torch.tensor([0, 6, PAD, 3, 6, 6, PAD, 5])
    return Bands(head, tail, head_target, torch.tensor([4, PAD, 0]))


def expected(logits, target, ignored):
    """Returns losses and the gradient of their weighted sum, softmax minus one at the target."""
    exact = logits.detach().double()
    p = torch.softmax(exact, dim=1)
    rows = torch.arange(len(target))
    counts = (target != (-100 if ignored is None else ignored)).double()
    losses = -p[rows, target].log() * counts
    grad = p.clone()
    grad[rows, target] -= 1
    return losses, grad * counts[:, None]


@pytest.mark.parametrize("tail_pad", [None, PAD])
def test_sum_and_gradient(bands, tail_pad):
    loss = adaptive_nll(bands, None, None, pad=PAD, tail_pad=tail_pad)
    (3 * loss).backward()
    (head, tail), (head_target, tail_target) = bands.logits, bands.targets
    head_losses, head_grad = expected(head, head_target, PAD)
    tail_losses, tail_grad = expected(tail, tail_target, tail_pad)
    total = head_losses.sum() + tail_losses.sum()
    torch.testing.assert_close(loss.double(), total, rtol=1e-6, atol=0)
    torch.testing.assert_close(head.grad.double(), 3 * head_grad, rtol=0, atol=1e-6)
    torch.testing.assert_close(tail.grad.double(), 3 * tail_grad, rtol=0, atol=1e-6)


def test_one_loss_for_each_position(bands):
    losses = adaptive_nll(bands, None, None, pad=PAD, tail_pad=None, reduce=False)
    weights = torch.arange(8.0)
    (losses * weights).sum().backward()
    (head, tail), (head_target, tail_target) = bands.logits, bands.targets
    each, head_grad = expected(head, head_target, PAD)
    tail_losses, tail_grad = expected(tail, tail_target, None)
    in_tail = torch.tensor([1, 4, 5])
    each[in_tail] += tail_losses
    torch.testing.assert_close(losses.double(), each, rtol=1e-6, atol=0)
    grads = head_grad * weights[:, None].double(), tail_grad * weights[in_tail, None].double()
    torch.testing.assert_close(head.grad.double(), grads[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(tail.grad.double(), grads[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype):
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(4000, 7, generator=generator).to(dtype).requires_grad_()
    target = torch.randint(7, (4000,), generator=generator)
    tail_free = Bands(head, None, target, None)
    loss = adaptive_nll(tail_free, None, None, pad=-100, tail_pad=None)
    loss.backward()
    losses, grad = expected(head, target, -100)
    assert loss.dtype == torch.float32
    assert head.grad.dtype == dtype
    torch.testing.assert_close(loss.double(), losses.sum(), rtol=1e-6, atol=0)
    torch.testing.assert_close(head.grad.double(), grad, rtol=0, atol=4e-3)
