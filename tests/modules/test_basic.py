"""Small parts: activations, dropout, layer drop, memory of decoding, activation checkpoints."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from fairseq.modules import (
    Embedding,
    FairseqDropout,
    LayerDropModuleList,
    LayerNorm,
    Linear,
    MultiheadAttention,
    checkpoint_wrapper,
    get_activation_fn,
)

TANH_GELU = "gelu_accurate"


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("relu", lambda x: max(x, 0.0)),
        ("gelu", lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2)))),
        (
            TANH_GELU,
            lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        ),
        ("tanh", math.tanh),
        ("linear", lambda x: x),
    ],
)
def test_activations(name, formula):
    values = [-3.0, -0.5, 0.0, 0.7, 2.5]
    found = get_activation_fn(name)(torch.tensor(values))
    assert found.tolist() == pytest.approx([formula(x) for x in values], abs=1e-6)


def test_both_names_of_the_approximation():
    assert get_activation_fn("gelu_fast") is get_activation_fn(TANH_GELU)


def test_gelu_is_computed_in_float32():
    x = torch.linspace(-3, 3, 50).half()
    found = get_activation_fn("gelu")(x)
    assert found.dtype == torch.float16
    assert torch.equal(found, nn.functional.gelu(x.double()).half())


def test_unknown_activation():
    with pytest.raises(ValueError, match=r"--activation-fn: unknown function 'swish'; known are"):
        get_activation_fn("swish")


def test_layer_norm_formula():
    x = torch.tensor([[1.0, 2.0, 3.0, 6.0]])
    mean, variance = 3.0, 3.5
    expected = [(value - mean) / math.sqrt(variance + 1e-5) for value in x[0].tolist()]
    assert LayerNorm(4)(x)[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_tables_and_linear_maps():
    torch.manual_seed(0)
    table = Embedding(2000, 64, padding_idx=1)
    assert not table.weight[1].any()
    assert table.weight.std().item() == pytest.approx(1 / 8, rel=0.02)
    layer = Linear(300, 100)
    assert not layer.bias.any()
    bound = math.sqrt(6 / 400)
    assert 0.99 * bound < layer.weight.abs().max() <= bound


def test_dropout():
    torch.manual_seed(0)
    dropout = FairseqDropout(0.25, "Layer")
    x = torch.ones(10000)
    kept = dropout(x)
    assert kept.unique().tolist() == pytest.approx([0, 4 / 3])
    assert kept.mean().item() == pytest.approx(1.0, abs=0.03)
    assert dropout.eval()(x) is x


def test_dropout_may_stay_on_for_generation():
    named, other = FairseqDropout(0.5, "Layer").eval(), FairseqDropout(0.5, "Other").eval()
    for module in (named, other):
        module.make_generation_fast_("name", retain_dropout=True, retain_dropout_modules=["Layer"])
    x = torch.ones(100)
    assert (named(x) == 0).any() and other(x) is x


def test_layer_drop():
    torch.manual_seed(0)
    layers = LayerDropModuleList(0.3)
    layers.extend(nn.Identity() for _ in range(10))
    counts = [len(list(layers)) for _ in range(500)]
    assert sum(counts) / 5000 == pytest.approx(0.7, abs=0.02)
    assert len(set(counts)) > 3
    assert list(layers.eval()) == [layers[i] for i in range(10)]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.calls = 0

    def forward(self, x, power):
        self.calls += 1
        return nn.functional.dropout(torch.tanh(self.inner(x)), 0.5) ** power


@pytest.mark.parametrize("offload", [False, True])
def test_activation_checkpoints_change_no_bit(offload):
    torch.manual_seed(0)
    plain = Block()
    wrapped = checkpoint_wrapper(copy.deepcopy(plain), offload)
    assert list(wrapped.state_dict()) == list(plain.state_dict())
    gradients = []
    for module in (plain, wrapped):
        x = torch.linspace(-1, 1, 12).view(2, 6).requires_grad_()
        torch.manual_seed(5)
        module(x, 2).sum().backward()
        gradients.append((x.grad, module.inner.weight.grad))
    assert torch.equal(gradients[0][0], gradients[1][0])
    assert torch.equal(gradients[0][1], gradients[1][1])
    assert plain.calls == 1 and wrapped.calls == 2


def test_activation_checkpoints_are_for_training():
    wrapped = checkpoint_wrapper(Block())
    with torch.no_grad():
        wrapped(torch.ones(1, 6), 1)
    assert wrapped.calls == 1
    wrapped.eval()(torch.ones(1, 6), 1).sum().backward()
    assert wrapped.calls == 2


def test_a_copy_of_a_checkpointed_module_uses_its_own_weights():
    wrapped = checkpoint_wrapper(Block())
    twin = copy.deepcopy(wrapped)
    with torch.no_grad():
        twin.inner.weight.zero_()
        twin.inner.bias.zero_()
        assert not twin.eval()(torch.ones(1, 6), 1).any()
        assert wrapped.eval()(torch.ones(1, 6), 1).any()


def test_a_copied_attention_has_a_memory_of_its_own():
    attention = MultiheadAttention(8, 2)
    twin = copy.deepcopy(attention)
    state = {}
    attention.set_incremental_state(state, "x", {"a": torch.tensor([1.0])})
    twin.set_incremental_state(state, "x", {"a": torch.tensor([2.0])})
    assert attention.get_incremental_state(state, "x")["a"].item() == 1
    assert twin.get_incremental_state(state, "x")["a"].item() == 2
    assert attention.get_incremental_state(None, "x") is None


def test_reordering_touches_the_module_s_own_part():
    first, second = MultiheadAttention(8, 2), MultiheadAttention(8, 2)
    state = {}
    for module in (first, second):
        value = {"a": torch.tensor([10.0, 20.0, 30.0]), "b": None}
        module.set_incremental_state(state, "x", value)
    first.reorder_incremental_state(state, torch.tensor([2, 0, 0, 1]))
    assert first.get_incremental_state(state, "x")["a"].tolist() == [30, 10, 10, 20]
    assert second.get_incremental_state(state, "x")["a"].tolist() == [10, 20, 30]


def test_heads_must_divide_the_width():
    message = r"--decoder-attention-heads 5 .*--decoder-embed-dim 12; possible .* 1, 2, 3, 4, 6, 12"
    with pytest.raises(ValueError, match=message):
        MultiheadAttention(12, 5)


def test_joint_projections_of_old_checkpoints():
    attention = MultiheadAttention(4, 2)
    weight, bias = torch.arange(48.0).view(12, 4), torch.arange(12.0)
    state = {"layer.in_proj_weight": weight, "layer.in_proj_bias": bias}
    attention.upgrade_state_dict_named(state, "layer")
    assert set(state) == {f"layer.{p}_proj.{kind}" for p in "qkv" for kind in ("weight", "bias")}
    for i, part in enumerate("qkv"):
        assert torch.equal(state[f"layer.{part}_proj.weight"], weight[4 * i : 4 * i + 4])
        assert torch.equal(state[f"layer.{part}_proj.bias"], bias[4 * i : 4 * i + 4])
