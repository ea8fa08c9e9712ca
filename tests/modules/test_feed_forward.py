"""The feed-forward net in one piece, against its formula and autograd in float64."""

import pytest
import torch
from torch import nn

from fairseq.modules.dropout import dropout_mask
from fairseq.modules.feed_forward import relu_feed_forward


def build(width=12, inner=20):
    torch.manual_seed(0)
    fc1, fc2 = nn.Linear(width, inner).double(), nn.Linear(inner, width).double()
    x = torch.randn(3, 5, width, dtype=torch.float64, requires_grad=True)
    return x, fc1, fc2


def expected_output(x, fc1, fc2, mask):
    inner = (x @ fc1.weight.t() + fc1.bias).clamp(min=0) * mask
    return inner @ fc2.weight.t() + fc2.bias


@pytest.mark.parametrize("p", [0.0, 0.3, 0.9])
def test_output_and_gradients(p):
    x, fc1, fc2 = build()
    torch.manual_seed(4)
    mask = dropout_mask(torch.empty(3, 5, 20, dtype=torch.float64), p) if p else 1.0
    inputs = [x, *fc1.parameters(), *fc2.parameters()]
    expected = expected_output(x, fc1, fc2, mask)
    torch.manual_seed(4)
    found = relu_feed_forward(x, fc1, fc2, p)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    grad = torch.randn_like(found)
    pairs = zip(
        torch.autograd.grad(found, inputs, grad),
        torch.autograd.grad(expected, inputs, grad),
        strict=True,
    )
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_strided_and_expanded_tensors():
    x, fc1, fc2 = build()
    turned = x.detach().transpose(0, 1).requires_grad_()
    found = relu_feed_forward(turned, fc1, fc2, 0.0)
    expected = expected_output(turned, fc1, fc2, 1.0)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    grads = [torch.autograd.grad(each.sum(), turned)[0] for each in (found, expected)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


def test_frozen_parts_get_no_gradient():
    x, fc1, fc2 = build()
    fc1.requires_grad_(False)
    relu_feed_forward(x.detach(), fc1, fc2, 0.2).sum().backward()
    assert fc1.weight.grad is None
    # The bias is added to each of the 15 tokens.
    torch.testing.assert_close(fc2.bias.grad, torch.full((12,), 15.0, dtype=torch.float64))


def test_hooks_and_parts_of_another_kind_are_called():
    x, fc1, fc2 = build()
    expected = relu_feed_forward(x, fc1, fc2, 0.0)
    calls = []
    fc1.register_forward_hook(lambda *_: calls.append("hook"))
    torch.testing.assert_close(relu_feed_forward(x, fc1, fc2, 0.0), expected)
    assert calls == ["hook"]

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    double = Doubled(20, 12).double()
    double.load_state_dict(fc2.state_dict())
    torch.testing.assert_close(relu_feed_forward(x, fc1, double, 0.0), 2 * expected)
    without_bias = nn.Linear(12, 20, bias=False).double()
    without_bias.load_state_dict({"weight": fc1.weight})
    found = relu_feed_forward(x, without_bias, fc2, 0.0)
    inner = (x @ fc1.weight.t()).clamp(min=0)
    torch.testing.assert_close(found, inner @ fc2.weight.t() + fc2.bias)
