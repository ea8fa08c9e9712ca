"""Comparing position methods with formulas written out in float64, one number at a time."""

from __future__ import annotations

import cmath

import torch

from fairseq.positions import PositionConfig, Surroundings, find_method

HEADS = 4
QUERIES, KEYS = range(3, 12), range(12)
FAR = (range(700, 703), range(690, 703))


def make(name, num_heads=HEADS, head_dim=16, train_length=None, table=None, **settings):
    """Returns a method for a model, with weights that are not those it starts with."""
    torch.manual_seed(5)
    cfg = PositionConfig(position_method=name, **settings)
    method = find_method(name)(
        Surroundings(num_heads, 1, table, head_dim, settings=cfg, train_length=train_length)
    )
    for weight in weights_of(method).values():
        weight.data += 0.2 * torch.randn(weight.shape)
    return method


def weights_of(method):
    return dict(method.named_parameters()) if isinstance(method, torch.nn.Module) else {}


def check_bias(method, term, *, sequence_length=None, places=((QUERIES, KEYS), FAR), atol=1e-5):
    """Compares values and gradients of a bias with `term(weights, head, i, j)`.

    `weights` is a dictionary of float64 copies of the method's weights; i and j are positions.
    """
    moved = set()
    for queries, keys in places:
        found = method.bias(sequence_length).dense(queries, keys)
        weights = {
            name: weight.detach().double().requires_grad_()
            for name, weight in weights_of(method).items()
        }
        terms = [term(weights, h, i, j) for h in range(HEADS) for i in queries for j in keys]
        expected = torch.stack([torch.as_tensor(each).double() for each in terms])
        expected = expected.view(HEADS, len(queries), len(keys))
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, atol=atol, rtol=2e-5)
        if weights:
            moved |= _check_gradients(method, weights, found, expected)
        _check_other_ways(method.bias(sequence_length), queries, keys, found.detach())
    assert moved == set(weights_of(method))


def _check_gradients(method, weights, found, expected):
    """Returns the names of the weights that have a gradient here."""
    mix = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    method.zero_grad()
    (found * mix).sum().backward()
    (expected * mix.double()).sum().backward()
    for name, weight in weights_of(method).items():
        wanted = torch.zeros_like(weights[name])
        if weights[name].grad is not None:
            wanted = weights[name].grad
        largest = float(wanted.abs().max())
        torch.testing.assert_close(weight.grad.double(), wanted, rtol=2e-3, atol=2e-5 * largest)
    return {name for name, weight in weights_of(method).items() if weight.grad.any()}


def _check_other_ways(bias, queries, keys, found):
    """Positions as tensors, rows of their own and some of the heads give the same numbers."""
    q, k = torch.tensor(list(queries)), torch.tensor(list(keys))
    with torch.no_grad():
        torch.testing.assert_close(bias.dense(q, k), found)
        by_row = bias.dense(torch.stack([q, q]), torch.stack([k, k]))
        torch.testing.assert_close(by_row, torch.stack([found, found]))
        torch.testing.assert_close(bias.heads(slice(1, 3)).dense(queries, keys), found[1:3])
        assert bias.dense(queries, range(0)).shape == (HEADS, len(queries), 0)
    assert bias.num_heads == HEADS and bias.heads(slice(1, 3)).num_heads == 2


def check_turns(method, factor, *, sequence_length=None, head_dim=16):
    """Compares with pairs of channels as complex numbers, times `factor(kind, pair, position)`.

    `kind` is "q" or "k".
    """
    generator = torch.Generator().manual_seed(2)
    for positions in (range(5), range(90, 94)):
        q, k = torch.randn(2, 2, 3, len(positions), head_dim, generator=generator)
        found = dict(zip("qk", method.rotate(q, k, positions, sequence_length), strict=True))
        rows = torch.tensor([list(positions)] * 2)
        by_row = method.rotate(q, k, rows, sequence_length)
        for kind, x, row_wise in zip("qk", (q, k), by_row, strict=True):
            expected = torch.empty(x.shape, dtype=torch.float64)
            for t, position in enumerate(positions):
                token = x[..., t, :].double()
                for first in range(head_dim // 2):
                    second = first + head_dim // 2
                    z = torch.complex(token[..., first], token[..., second])
                    z = z * factor(kind, first, position)
                    expected[..., t, first] = z.real
                    expected[..., t, second] = z.imag
            torch.testing.assert_close(found[kind].double(), expected, atol=2e-4, rtol=1e-4)
            torch.testing.assert_close(row_wise, found[kind])


def turned(angle):
    return cmath.exp(1j * angle)
