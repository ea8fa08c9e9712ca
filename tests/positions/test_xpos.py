"""xPos: rotary embeddings that fade."""

import pytest
import torch
from formulas import check_turns, make, turned


@pytest.mark.parametrize("length", [None, 100, 101])
def test_formula(length):
    """Positions count from the middle of the sequence in the fading, and from 0 in the turn."""

    def factor(kind, pair, position):
        zeta = (2 * pair / 16 + 0.4) / 1.4
        exponent = (position - (length or 0) // 2) / 512
        return zeta ** (exponent if kind == "q" else -exponent) * turned(
            position * 10000 ** (-2 * pair / 16)
        )

    check_turns(make("xpos"), factor, sequence_length=length)


def score(method, q, k, i, j, length):
    turned_q, _ = method.rotate(q, q, range(i, i + 1), length)
    _, turned_k = method.rotate(k, k, range(j, j + 1), length)
    return (turned_q.float() * turned_k.float()).sum(-1)


def test_scores_depend_on_distance_alone_and_fade():
    method = make("xpos")
    q = k = torch.zeros(1, 1, 1, 16)
    q[..., 0] = 1.0  # pair 0 fades fastest: 0.4 / 1.4 every 512 positions
    angle = 600.0
    expected = (0.4 / 1.4) ** (600 / 512) * torch.tensor(angle).double().cos()
    for start, length in ((0, None), (0, 700), (50, 5000), (3000, 5000)):
        found = score(method, q, k, start + 600, start, length)
        assert found.item() == pytest.approx(expected.item(), abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_stable_over_8000_tokens(dtype):
    method = make("xpos")
    q = torch.randn(1, 1, 8000, 16, generator=torch.Generator().manual_seed(0))
    half_q, half_k = method.rotate(q.to(dtype), q.to(dtype), range(8000), 8000)
    assert torch.isfinite(half_q).all() and torch.isfinite(half_k).all()
    whole_q, whole_k = method.rotate(q, q, range(8000), 8000)
    for i, j in ((7999, 7998), (7999, 7000), (10, 5), (4000, 3990)):
        found = (half_q[0, 0, i].float() * half_k[0, 0, j].float()).sum()
        expected = (whole_q[0, 0, i] * whole_k[0, 0, j]).sum()
        assert found.item() == pytest.approx(expected.item(), abs=0.15)
