"""The registry of surgery functions."""

from __future__ import annotations

import pytest
import torch
from tiny_transformers import gpt2, tokens
from torch import nn

from fairseq.huggingface import apply_alibi, policy_registry
from fairseq.huggingface.policies import PolicyRegistry
from fairseq.huggingface.surgery import attach_bias


class _Layer(nn.Linear):
    pass


class _Below(_Layer):
    pass


class _Other(nn.Linear):
    pass


@pytest.fixture(autouse=True)
def empty_again():
    yield
    policy_registry.clear()


def _replace(module: nn.Module, module_index: int, max_sequence_length: int) -> nn.Module | None:
    new = nn.Linear(module.in_features, module.out_features)
    new.told = (module_index, max_sequence_length)
    return new


def test_functions_for_classes_and_subclasses() -> None:
    policy_registry.register(_Layer)(_replace)
    shared = _Below(2, 2)
    model = nn.Sequential(_Layer(2, 2), nn.Sequential(shared, _Other(2, 2)), shared)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    other = model[1][1]
    assert apply_alibi(model, 77, optimizer) == 2
    assert model[0].told == (0, 77)
    assert model[1][0].told == (1, 77)
    assert model[2] is model[1][0]
    assert model[1][1] is other
    held = {id(parameter) for parameter in optimizer.param_groups[0]["params"]}
    assert held == {id(parameter) for parameter in other.parameters()}


def test_a_nearer_class_comes_first_and_none_changes_nothing() -> None:
    policy_registry.register(_Layer)(_replace)

    @policy_registry.register(_Below)
    def leave(module: _Below, module_index: int, max_sequence_length: int) -> None:
        module.seen = True

    model = nn.Sequential(_Layer(2, 2), _Below(2, 2))
    below = model[1]
    assert apply_alibi(model, 5) == 1
    assert model[1] is below and below.seen


def test_a_function_may_attach_the_bias_itself() -> None:
    model = gpt2()
    kind = type(model.transformer.h[0].attn)

    @policy_registry.register(kind)
    def attach(module, module_index, max_sequence_length):
        attach_bias(module, is_causal=True, num_heads=4)

    assert apply_alibi(model) == 2
    other = gpt2()
    policy_registry.clear()
    apply_alibi(other)
    assert torch.equal(model(tokens()).logits, other(tokens()).logits)
    with pytest.raises(RuntimeError, match="which apply_alibi calls"):
        attach_bias(model.transformer.h[0].attn, is_causal=True)


def test_the_root_is_a_candidate() -> None:
    seen = []

    @policy_registry.register(_Layer)
    def note(module: nn.Module, module_index: int, max_sequence_length: int) -> None:
        seen.append(module)

    root = _Layer(2, 2)
    with pytest.raises(ValueError, match="_Layer"):
        apply_alibi(root)
    assert seen == [root]


def _two(module: nn.Module, module_index: int) -> None: ...


def _misnamed(module: nn.Module, module_index: int, length: int) -> None: ...


def _first(module: int, module_index: int, max_sequence_length: int) -> None: ...


def _second(module: nn.Module, module_index: str, max_sequence_length: int) -> None: ...


def _third(module: nn.Module, module_index: int, max_sequence_length: float) -> None: ...


@pytest.mark.parametrize(
    ("classes", "function", "error", "text"),
    [
        ((), _replace, ValueError, "no class"),
        ((_Layer,), _two, ValueError, "2 parameters"),
        ((_Layer,), _misnamed, NameError, "call it max_sequence_length"),
        ((_Layer,), _first, TypeError, "parameter module is annotated"),
        ((_Layer,), _second, TypeError, "parameter module_index is annotated"),
        ((_Layer,), _third, TypeError, "parameter max_sequence_length is annotated"),
        ((int,), _replace, TypeError, "no subclass of torch.nn.Module"),
        ((_Layer, 3), _replace, TypeError, "no subclass of torch.nn.Module"),
    ],
)
def test_what_cannot_be_registered(classes, function, error, text) -> None:
    registry = PolicyRegistry()
    with pytest.raises(error, match=text):
        registry.register(*classes)(function)
    assert not registry


def test_registered_twice() -> None:
    registry = PolicyRegistry()
    registry.register(_Layer)(_replace)
    with pytest.raises(ValueError, match="registered already, for _replace"):
        registry.register(_Layer)(_replace)
