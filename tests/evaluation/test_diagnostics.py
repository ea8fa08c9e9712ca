"""What each head looks at, against plain loops over its weights."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tiny_lm import some_tokens, tiny_lm
from torch import nn

from fairseq.attention.backends.recording import RecordingBackend
from fairseq.evaluation.diagnostics import diagnose, use_backend


def batch(tokens):
    return {"net_input": {"src_tokens": tokens}}


def by_hand(q, k, slope, lengths):
    """Returns the figures of one head by loops: q, k (B, T, K) of rows with so many real tokens."""
    entropies, most, first, mass, zeros, seen = [], [], [], {}, 0, 0
    for row, length in enumerate(lengths):
        for i in range(1, length):
            scores = [
                float(q[row, i].double() @ k[row, j].double()) / math.sqrt(q.size(-1))
                - slope * (i - j)
                for j in range(i + 1)
            ]
            weights = np.exp(np.array(scores) - max(scores))
            weights /= weights.sum()
            entropies.append(-sum(w * math.log2(w) for w in weights if w > 0))
            most.append(math.log2(i + 1))
            first.append(weights[0])
            # Below half of the smallest number, 2**-24, nothing is left in float16.
            zeros += sum(w < 2**-25 for w in weights)
            seen += i + 1
            for j, weight in enumerate(weights):
                mass[i - j] = mass.get(i - j, 0.0) + weight
    total, within, span = sum(mass.values()), 0.0, 0
    for span in sorted(mass):
        within += mass[span]
        if within >= 0.9 * total:
            break
    return {
        "mean_distance": sum(d * w for d, w in mass.items()) / total,
        "span90": span,
        "entropy_bits": np.mean(entropies),
        "entropy_relative": sum(entropies) / sum(most),
        "first_token_mass": np.mean(first),
        "zero_float16": zeros / seen,
    }


def test_figures_equal_those_of_loops_over_the_weights():
    model = tiny_lm()
    tokens = some_tokens(3, 24)
    lengths = [24, 15, 24]
    tokens[1, 15:] = 1
    found = diagnose(model, [batch(tokens[:2]), batch(tokens[2:])])
    assert (found.num_windows, found.num_tokens, found.longest_window) == (3, 63, 24)
    assert [(h.layer, h.head) for h in found.heads] == [(a, b) for a in (0, 1) for b in range(4)]

    recorded = []
    with use_backend(model, RecordingBackend(recorded.append)), torch.no_grad():
        model.extract_features(tokens)
    slopes = [0.25, 0.0625, 0.015625, 0.00390625]  # r, r**2, ... with r = 2**(-8 / 4)
    for figures in found.heads:
        seen = recorded[figures.layer]
        q, k = seen.q[:, figures.head], seen.k[:, figures.head]
        expected = by_hand(q, k, slopes[figures.head], lengths)
        assert figures.slope == slopes[figures.head]
        for name, value in expected.items():
            # A rounded score moves a weight across the border of zero here and there.
            room = 0.02 if name == "zero_float16" else 1e-5
            assert getattr(figures, name) == pytest.approx(value, rel=1e-4, abs=room), name
        longest = [
            max(float(x[row, i].norm()) for row in range(3) for i in range(lengths[row]))
            for x in (q, k)
        ]
        # A query that sees one key is a query all the same.
        assert figures.score_bound == pytest.approx(longest[0] * longest[1] / 8**0.5, rel=1e-5)


def test_no_product_of_a_query_and_a_key_exceeds_the_bound():
    model = tiny_lm("none")
    tokens = some_tokens(2, 20)
    found = diagnose(model, [batch(tokens)])
    recorded = []
    with use_backend(model, RecordingBackend(recorded.append)), torch.no_grad():
        model.extract_features(tokens)
    for figures in found.heads:
        scores = recorded[figures.layer].scores[:, figures.head]
        assert scores[scores > -torch.inf].abs().max() <= figures.score_bound * (1 + 1e-6)
        assert figures.slope is None


def silent(model):
    """Makes all scores but the bias zero."""
    with torch.no_grad():
        for layer in model.decoder.layers:
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                nn.init.zeros_(projection.weight)
                nn.init.zeros_(projection.bias)
    return model


def test_without_scores_and_bias_all_figures_are_those_of_equal_weights():
    found = diagnose(silent(tiny_lm("none")), [batch(some_tokens(2, 16))])
    # Query i sees distances 0 to i; queries 1 to 15 count.
    distances = [d for i in range(1, 16) for d in range(i + 1)]
    weights = [1 / (i + 1) for i in range(1, 16) for d in range(i + 1)]
    expected = {
        "mean_distance": sum(d * w for d, w in zip(distances, weights, strict=True)) / 15,
        "entropy_bits": sum(math.log2(i + 1) for i in range(1, 16)) / 15,
        "entropy_relative": 1.0,
        "first_token_mass": sum(1 / (i + 1) for i in range(1, 16)) / 15,
    }
    for name, value in expected.items():
        assert found.uniform[name] == pytest.approx(value, rel=1e-6), name
        for figures in found.heads:
            assert getattr(figures, name) == pytest.approx(value, rel=1e-5), name


def test_heads_go_blind_where_weights_underflow():
    # Weights are exp(-d / 4) / 4.52 and the like: float16 ends at 2**-25, d of about 63.
    found = diagnose(silent(tiny_lm()), [batch(some_tokens(1, 512))])
    steep = found.heads[0]
    normalizer = 1 / (1 - math.exp(-0.25))
    reach16 = max(d for d in range(512) if math.exp(-0.25 * d) / normalizer >= 2**-25)
    pairs = sum(i + 1 for i in range(1, 512))
    expected = sum(max(0, i - reach16) for i in range(1, 512)) / pairs
    assert steep.zero_float16 == pytest.approx(expected, abs=0.01)
    # exp(-0.25 * 511) = 4e-56 is below what float32 holds, 1e-45.
    assert 0 < steep.zero_float32 <= steep.zero_bfloat16 < steep.zero_float16
    assert found.heads[3].zero_float16 == 0  # exp(-2)
    assert steep.mean_distance < 4 < found.heads[3].mean_distance


def test_a_sink_shows():
    model = silent(tiny_lm("none"))
    with torch.no_grad():
        # Every query is e1, the key of token 4 is 50 times e1, the others are 0.
        attention = model.decoder.layers[0].self_attn
        attention.q_proj.bias[0] = 1.0
        model.decoder.layers[0].self_attn_layer_norm = nn.Identity()
        model.decoder.embed_tokens.weight[:, 0] = 0.0
        model.decoder.embed_tokens.weight[4, 0] = 1.0
        attention.k_proj.weight[0, 0] = 50.0
    tokens = some_tokens(2, 16)
    tokens[tokens.eq(4)] = 5
    tokens[:, 0] = 4
    found = diagnose(model, [batch(tokens)])
    assert found.heads[0].first_token_mass > 0.99
    assert found.heads[0].entropy_bits < 0.01
    assert found.heads[1].first_token_mass == pytest.approx(found.uniform["first_token_mass"])


def test_the_model_is_left_as_it_was_and_errors_are_explained():
    model = tiny_lm()
    backend = model.decoder.backend
    diagnose(model, [batch(some_tokens(1, 8))])
    assert model.decoder.backend is backend
    with pytest.raises(ValueError, match="no token was read"):
        diagnose(model, [batch(some_tokens(3, 1))])
    with pytest.raises(ValueError, match="no token was read"):
        diagnose(model, [])
    with pytest.raises(ValueError, match="transformer"):
        diagnose(nn.Linear(1, 1), [])
