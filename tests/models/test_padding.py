"""Padding at either end of a row changes nothing, whatever tells the order."""

from __future__ import annotations

import pytest
import torch
from tiny_models import log_probs, tiny_gpt, tokens_of

from fairseq.positions import METHODS

PAD, LENGTH = 1, 12
# Tokens of each row; the last is alone.
SIZES = [12, 9, 5, 1]


def model_of(method):
    torch.manual_seed(0)
    model = tiny_gpt(position_method=method, tokens_per_sample=LENGTH).eval()
    for name, parameter in model.named_parameters():
        if "positions." in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def padded(sizes, left):
    tokens = tokens_of(len(sizes), LENGTH)
    for row, size in zip(tokens, sizes, strict=True):
        if left:
            row[: LENGTH - size] = PAD
        else:
            row[:size] = row[LENGTH - size :].clone()
            row[size:] = PAD
    return tokens


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_rows_are_as_if_they_were_alone(method, left):
    model = model_of(method)
    tokens = padded(SIZES, left)
    found = log_probs(model, tokens)
    for row, values in zip(tokens, found, strict=True):
        is_token = row != PAD
        expected = log_probs(model, row[is_token].unsqueeze(0))[0]
        torch.testing.assert_close(values[is_token], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_of_left_padded_rows(method):
    model = model_of(method)
    rows = padded(SIZES, left=True)
    is_token = rows != PAD
    weights = torch.randn(int(is_token.sum()), 100, generator=torch.Generator().manual_seed(1))

    def gradients(output):
        model.zero_grad()
        (output * weights).sum().backward()
        return {
            name: parameter.grad.clone()
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }

    found = gradients(model(rows)[0][is_token])
    alone = [model(row[row != PAD].unsqueeze(0))[0][0] for row in rows]
    expected = gradients(torch.cat(alone))
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        scale = float(expected[name].abs().max()) + 1
        assert (gradient - expected[name]).abs().max() < 1e-5 * scale, name


@pytest.mark.parametrize("method", METHODS)
def test_prompts_of_several_lengths_are_continued_as_if_alone(method):
    """Decoding in steps from a left-padded batch of prompts."""
    model = model_of(method)
    tokens = padded([12, 9, 5, 5], left=True)
    state = {}
    for end in range(8, LENGTH + 1):
        step = log_probs(model, tokens[:, :end], incremental_state=state, sequence_length=LENGTH)[
            :, -1
        ]
        for row, values in zip(tokens[:, :end], step, strict=True):
            expected = log_probs(model, row[row != PAD].unsqueeze(0))[0, -1]
            torch.testing.assert_close(values, expected, atol=1e-5, rtol=0)
