"""Rotary embeddings and their scalings: pairs of channels as complex numbers."""

import math

import pytest
import torch
from formulas import check_turns, make, turned


def speed(pair, base=10000.0, head_dim=16):
    return base ** (-2 * pair / head_dim)


@pytest.mark.parametrize("base", [10000.0, 500.0])
def test_formula(base):
    check_turns(
        make("rotary", rotary_base=base),
        lambda kind, pair, position: turned(position * speed(pair, base)),
    )


@pytest.mark.parametrize("length", [None, 30, 64, 160])
def test_linear_scaling(length):
    s = max(1, (length or 0) / 64)
    check_turns(
        make("rotary", train_length=64, rotary_scaling="linear"),
        lambda kind, pair, position: turned(position / s * speed(pair)),
        sequence_length=length,
    )


@pytest.mark.parametrize("length", [None, 64, 160])
def test_ntk_scaling(length):
    s = max(1, (length or 0) / 64)
    check_turns(
        make("rotary", train_length=64, rotary_scaling="ntk"),
        lambda kind, pair, position: turned(position * speed(pair, 10000 * s ** (16 / 14))),
        sequence_length=length,
    )
    # The lowest frequency is that of linear scaling, the highest is kept.
    assert speed(7, 10000 * s ** (16 / 14)) == pytest.approx(speed(7) / s)


@pytest.mark.parametrize("length", [None, 64, 160])
def test_yarn_scaling(length):
    s = max(1, (length or 0) / 64)

    def factor(kind, pair, position):
        wavelengths = 64 / (2 * math.pi / speed(pair))
        if wavelengths < 1:
            gamma = 0.0
        elif wavelengths > 32:
            gamma = 1.0
        else:
            gamma = (wavelengths - 1) / 31
        scaled = (1 - gamma) * speed(pair) / s + gamma * speed(pair)
        return (0.1 * math.log(s) + 1) * turned(position * scaled)

    check_turns(
        make("rotary", train_length=64, rotary_scaling="yarn"), factor, sequence_length=length
    )


@pytest.mark.parametrize("length", [None, 30, 1000])
def test_fixed_factor(length):
    check_turns(
        make("rotary", rotary_scaling="linear", rotary_scaling_factor=3.0),
        lambda kind, pair, position: turned(position / 3 * speed(pair)),
        sequence_length=length,
    )


def test_training_length_by_hand():
    method = make("rotary", train_length=8, rotary_scaling="linear", rotary_train_length=80)
    check_turns(
        method,
        lambda kind, pair, position: turned(position / 2 * speed(pair)),
        sequence_length=160,
    )


def test_a_head_of_two_channels():
    check_turns(
        make("rotary", head_dim=2, rotary_scaling="ntk", rotary_scaling_factor=2.0),
        lambda kind, pair, position: turned(position),
        head_dim=2,
    )


def test_scores_depend_on_distance_alone():
    method = make("rotary")
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0))
    scores = []
    for shift in (0, 7, 300):
        turned_q, _ = method.rotate(q, q, range(9 + shift, 10 + shift))
        turned_k, _ = method.rotate(k, k, range(2 + shift, 3 + shift))
        scores.append((turned_q * turned_k).sum().item())
    assert scores == pytest.approx([scores[0]] * 3, abs=1e-4)


def test_sines_are_computed_once_for_all_layers(monkeypatch):
    method = make("rotary")
    q = torch.randn(1, 4, 3, 16)
    calls = []
    tables = method.tables
    monkeypatch.setattr(method, "tables", lambda *given: calls.append(given) or tables(*given))
    with torch.inference_mode():
        method.rotate(q, q, range(3))
    q.requires_grad_()
    method.rotate(q, q, range(3))[0].sum().backward()
    assert len(calls) == 1 and torch.isfinite(q.grad).all()
    rows = torch.tensor([[0, 1, 2]])
    method.rotate(q, q, rows)
    method.rotate(q, q, rows)
    method.rotate(q, q, rows.clone())
    assert len(calls) == 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_turns_in_float32(dtype):
    method = make("rotary")
    q = torch.randn(1, 4, 3, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    positions = range(30000, 30003)
    found, _ = method.rotate(q, q, positions)
    expected, _ = method.rotate(q.float(), q.float(), positions)
    assert found.dtype == dtype
    assert torch.equal(found, expected.to(dtype))
