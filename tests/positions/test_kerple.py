"""The two biases of KERPLE, for whose settings ALiBi is one."""

import torch
from formulas import HEADS, check_bias, make

from fairseq.attention import LinearBias
from fairseq.positions import Surroundings, find_method


def test_logarithmic_formula():
    def term(weights, h, i, j):
        r1, r2 = weights["log_r1"][h].exp(), weights["log_r2"][h].exp()
        return -r1 * torch.log(1 + r2 * abs(i - j))

    check_bias(make("kerple-log"), term)


def test_power_formula():
    def term(weights, h, i, j):
        r1 = weights["log_r1"][h].exp()
        r2 = 2 / (1 + torch.exp(-weights["r2_logits"][h]))
        return -r1 * (float(abs(i - j)) ** r2 if i != j else r2 * 0)

    check_bias(make("kerple-power"), term)


def test_alibi_is_the_power_1():
    method = find_method("kerple-power")(Surroundings(HEADS, padding_idx=1))
    slopes = method.log_r1.detach().exp()
    torch.testing.assert_close(
        method.bias().dense(range(30), range(30)), LinearBias(slopes).dense(range(30), range(30))
    )


def test_first_weights_are_within_their_ranges():
    many = Surroundings(4000, padding_idx=1)
    for name, weight, high in (
        ("kerple-log", "log_r1", 2),
        ("kerple-log", "log_r2", 1),
        ("kerple-power", "log_r1", 2),
    ):
        drawn = getattr(find_method(name)(many), weight).exp()
        assert drawn.min() > 0.009 and drawn.max() < high
        assert abs(drawn.mean() - high / 2) < 0.05
