"""FIRE: distance as a share of what can be looked back on."""

import pytest
import torch
from formulas import check_bias, make

from fairseq.positions import Surroundings, find_method


@pytest.mark.parametrize(
    ("train_length", "place"),
    [(24, (range(3, 10), range(10))), (400, (range(74, 79), range(70, 79)))],
)
def test_formula(train_length, place):
    """Queries stand on either side of L0, which is about 5 and about 76."""

    def psi(x, c):
        return torch.log(c.abs() * x + 1)

    def term(weights, h, i, j):
        c = weights["c"][0]
        threshold = (weights["threshold_factor"][0] * train_length / 4).abs()
        span = threshold if i < threshold else torch.tensor(float(i), dtype=torch.float64)
        share = psi(abs(i - j), c) / psi(span, c)
        total = weights["output.bias"][h]
        for unit in range(32):
            z = weights["hidden.weight"][unit, 0] * share + weights["hidden.bias"][unit]
            total = total + weights["output.weight"][h, unit] * torch.clamp(z, min=0)
        return total

    method = make("fire", train_length=train_length)
    threshold = float(method.threshold_factor.detach()) * train_length / 4
    assert place[0].start < threshold < place[0].stop - 1
    check_bias(method, term, places=[place])


@pytest.mark.parametrize(("train_length", "threshold"), [(64, 16), (2048, 512), (None, 512)])
def test_first_threshold(train_length, threshold):
    method = find_method("fire")(Surroundings(4, padding_idx=1, train_length=train_length))
    assert method.state_dict()["first_threshold"].tolist() == [threshold]
    assert find_method("fire")(Surroundings(4, 1, train_length=9000)).first_threshold.item() == 512


def test_all_weights_have_a_dimension():
    """Sharding takes no scalars."""
    assert all(weight.dim() > 0 for weight in make("fire").state_dict().values())
