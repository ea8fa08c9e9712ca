"""One product for queries, keys and values computes what three do, and leaves them three."""

from __future__ import annotations

import pytest
import torch

from fairseq.modules import MultiheadAttention
from fairseq.modules import multihead_attention as module_file


class Observed:
    """Attention that lets queries, keys and values be seen instead."""

    key_is_padding = None

    def __init__(self):
        self.backend = self

    def rotate(self, q, k):
        return q, k

    def attend(self, q, k, v, prepared, *, dropout_p=0.0, scale=None):
        self.seen = q, k, v
        return q + 2 * k + 3 * v


@pytest.fixture
def attention():
    torch.manual_seed(0)
    return MultiheadAttention(12, 3).double()


def run(attention, x):
    prepared = Observed()
    out = attention(x, prepared)
    grads = torch.autograd.grad(out.square().sum(), list(attention.parameters()))
    return prepared.seen, out, grads


def test_joint_and_separate_products_agree(attention, monkeypatch):
    x = torch.randn(2, 200, 12, dtype=torch.float64)
    joint = run(attention, x)
    monkeypatch.setattr(module_file, "_MANY_TOKENS", 10**9)
    separate = run(attention, x)
    torch.testing.assert_close(joint, separate, rtol=1e-12, atol=1e-12)
    q, k, v = joint[0]
    for part, projection in ((q, attention.q_proj), (k, attention.k_proj), (v, attention.v_proj)):
        flat = x @ projection.weight.t() + projection.bias
        torch.testing.assert_close(part, flat.view(2, 200, 3, 4).transpose(1, 2))


def test_parameters_keep_names_and_order(attention):
    names = [name for name, _ in attention.named_parameters()]
    parts = [f"{part}_proj.{kind}" for part in "kvq" for kind in ("weight", "bias")]
    assert names == [*parts, "out_proj.weight", "out_proj.bias"]


def test_a_projection_with_a_hook_is_called(attention):
    calls = []
    attention.k_proj.register_forward_hook(lambda *_: calls.append("k"))
    run(attention, torch.randn(2, 200, 12, dtype=torch.float64))
    assert calls == ["k"]
