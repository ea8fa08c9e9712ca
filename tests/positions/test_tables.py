"""Position tables: their numbers, their rows, their limits."""

from __future__ import annotations

import math

import pytest
import torch

from fairseq.modules import PositionalEmbedding
from fairseq.positions import (
    METHODS,
    LearnedPositionalEmbedding,
    SinusoidalPositionalEmbedding,
    Surroundings,
    find_method,
    table_rows,
)


def test_rows_count_tokens_and_not_padding():
    tokens = torch.tensor([[5, 6, 7, 8], [5, 6, 1, 1], [1, 1, 5, 6], [5, 1, 6, 1]])
    expected = [[2, 3, 4, 5], [2, 3, 1, 1], [1, 1, 2, 3], [2, 1, 3, 1]]
    assert table_rows(tokens, padding_idx=1).tolist() == expected


@pytest.mark.parametrize("width", [6, 7])
def test_sinusoidal_formula(width):
    table = SinusoidalPositionalEmbedding.get_embedding(40, width, padding_idx=1)
    for row in (0, 2, 3, 39):
        angles = [row * math.exp(-k * math.log(10000) / 2) for k in range(3)]
        expected = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        expected += [0.0] * (width - 6)
        assert table[row].tolist() == pytest.approx(expected, abs=4e-6)
    assert not table[1].any()


def test_sinusoidal_table_grows():
    module = SinusoidalPositionalEmbedding(8, padding_idx=1, init_size=4)
    tokens = torch.full((1, 20), 9)
    expected = SinusoidalPositionalEmbedding.get_embedding(50, 8, padding_idx=1)
    assert torch.equal(module(tokens)[0], expected[2:22])
    assert list(module.state_dict()) == ["_float_tensor"]


def test_learned_table():
    torch.manual_seed(0)
    module = PositionalEmbedding(4, 8, padding_idx=1, learned=True)
    assert isinstance(module, LearnedPositionalEmbedding)
    assert module.weight.shape == (6, 8) and module.max_positions == 4
    assert not module.weight[1].any()
    found = module(torch.tensor([[1, 9, 9], [9, 9, 9]]))
    assert torch.equal(found[0], module.weight[torch.tensor([1, 2, 3])])
    assert torch.equal(found[1], module.weight[torch.tensor([2, 3, 4])])


def test_learned_table_is_drawn_with_unit_norm_rows():
    torch.manual_seed(0)
    module = PositionalEmbedding(2000, 64, padding_idx=1, learned=True)
    assert module.weight.std().item() == pytest.approx(64**-0.5, rel=0.02)


def test_learned_table_ends():
    module = PositionalEmbedding(4, 8, padding_idx=1, learned=True)
    module(torch.tensor([[1, 1, 9, 9, 9, 9]]))
    with pytest.raises(ValueError, match=r"5 tokens.*exist for 4 .*--max-target-positions"):
        module(torch.full((1, 5), 9))


def test_hooks_of_each_method():
    x = torch.zeros(1, 3, 8)
    tokens = torch.full((1, 5), 9)
    table = SinusoidalPositionalEmbedding(8, padding_idx=1)
    changes_x, has_bias = set(), set()
    for name in METHODS:
        method = find_method(name)(Surroundings(num_heads=4, padding_idx=1, table=table))
        if method.embed(x, tokens).any():
            changes_x.add(name)
        if method.bias().dense(range(3), range(3)).any():
            has_bias.add(name)
        assert method.bias().is_learned or method.bias() is method.bias()
        assert method.bias().num_heads == 4
    assert changes_x == {"sinusoidal", "learned"}
    assert set(METHODS) - has_bias - changes_x == {"none", "rotary", "xpos"}


def test_new_tokens_take_the_last_rows():
    table = SinusoidalPositionalEmbedding(8, padding_idx=1)
    method = find_method("sinusoidal")(Surroundings(num_heads=4, padding_idx=1, table=table))
    tokens = torch.tensor([[1, 9, 9, 9, 9]])
    rows = SinusoidalPositionalEmbedding.get_embedding(9, 8, padding_idx=1)[4:6]
    assert torch.equal(method.embed(torch.ones(1, 2, 8), tokens)[0], 1 + rows)


@pytest.mark.parametrize("name", ["sinusoidal", "learned"])
def test_a_method_without_its_table(name):
    with pytest.raises(ValueError, match=f"{name} needs.*--no-token-positional-embeddings"):
        find_method(name)(Surroundings(num_heads=4, padding_idx=1))


def test_unknown_method():
    with pytest.raises(ValueError, match=r"--position-method.*'albi'.*known are alibi, "):
        find_method("albi")
