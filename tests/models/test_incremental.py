"""Decoding step by step gives what the whole gives."""

from __future__ import annotations

import pytest
import torch
from tiny_models import (
    CHECKPOINTS,
    load_golden,
    log_probs,
    tiny_gpt,
    tiny_wiki103,
    tokens_of,
)

from fairseq.positions import METHODS


def padded_batch(kind, length=14):
    tokens = tokens_of(4, length)
    if kind == "left":
        tokens[1, :5] = tokens[2, : length - 1] = 1
    if kind == "right":
        tokens[1, 5:] = tokens[2, 1:] = 1
    if kind == "within":  # prompts of different lengths, padded on the right, then new tokens
        tokens[1, 3:7] = tokens[2, 1:7] = 1
    return tokens


@pytest.mark.parametrize("chunks", [[1] * 14, [6] + [1] * 8, [1, 4, 2, 7], [14]])
@pytest.mark.parametrize("padding", ["no", "left", "right", "within"])
@pytest.mark.parametrize("method", METHODS)
def test_steps_equal_the_whole(method, padding, chunks):
    torch.manual_seed(0)
    model = tiny_gpt(position_method=method).eval()
    tokens = padded_batch(padding)
    whole = log_probs(model, tokens)
    state, found, end = {}, [], 0
    for size in chunks:
        end += size
        found.append(log_probs(model, tokens[:, :end], incremental_state=state))
        assert found[-1].shape == (4, size, 100)
    is_token = tokens != 1
    torch.testing.assert_close(torch.cat(found, 1)[is_token], whole[is_token], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["wiki103_tiny", "gpt_tiny"])
@pytest.mark.parametrize("backend", ["reference", "sdpa", "auto"])
def test_trained_models(name, backend):
    model = load_golden(CHECKPOINTS / name, attention_backend=backend)
    tokens = tokens_of(2, 40, vocab_size=4192)
    whole = log_probs(model, tokens)
    state = {}
    steps = [log_probs(model, tokens[:, :n], incremental_state=state) for n in range(1, 41)]
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=1e-5, rtol=0)


def test_the_bias_is_there():
    """The original leaves it out in steps, which then are those of a model without positions."""
    model = load_golden(CHECKPOINTS / "gpt_tiny")
    blind = load_golden(CHECKPOINTS / "gpt_tiny", position_method="none")
    tokens = tokens_of(1, 40, vocab_size=4192)
    state = {}
    log_probs(model, tokens[:, :39], incremental_state=state)
    step = log_probs(model, tokens, incremental_state=state)[:, -1]
    assert (step - log_probs(blind, tokens)[:, -1]).abs().max() > 0.01


def test_memory_of_the_keys():
    model = tiny_wiki103().eval()
    tokens = padded_batch("left", length=6)
    state = {}
    log_probs(model, tokens[:, :4], incremental_state=state)
    log_probs(model, tokens, incremental_state=state)
    assert len(state) == 2  # one for each layer
    for stored in state.values():
        assert stored["prev_key"].shape == stored["prev_value"].shape == (4, 4, 6, 8)
        assert torch.equal(stored["prev_key_padding_mask"], tokens == 1)


def test_memory_without_padding():
    model = tiny_gpt().eval()
    state = {}
    log_probs(model, tokens_of(2, 3), incremental_state=state)
    assert all(stored["prev_key_padding_mask"] is None for stored in state.values())


@pytest.mark.parametrize("suffix", ["", "_scripting"])
def test_beams_are_reordered(suffix):
    model = tiny_gpt().eval()
    tokens = padded_batch("left")
    state = {}
    log_probs(model, tokens[:, :9], incremental_state=state)
    order = torch.tensor([3, 1, 1, 0, 2])
    getattr(model.decoder, "reorder_incremental_state" + suffix)(state, order)
    chosen = tokens[order]
    chosen[:, 9:] = tokens_of(5, 5, seed=8)
    found = log_probs(model, chosen, incremental_state=state)
    expected = log_probs(model, chosen)[:, 9:]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_two_states_of_one_model():
    model = tiny_gpt().eval()
    first, second = tokens_of(1, 8), tokens_of(1, 8, seed=1)
    states = ({}, {})
    for n in range(1, 9):
        steps = [
            log_probs(model, tokens[:, :n], incremental_state=state)
            for tokens, state in zip((first, second), states, strict=True)
        ]
    for tokens, step in zip((first, second), steps, strict=True):
        torch.testing.assert_close(step[:, -1], log_probs(model, tokens)[:, -1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("given", [1, 3])
def test_all_tokens_so_far_are_needed(given):
    model = tiny_gpt().eval()
    tokens = tokens_of(1, 4)
    state = {}
    log_probs(model, tokens[:, :3], incremental_state=state)
    message = f"holds 3, so 4 or more are needed, but {given} are given"
    with pytest.raises(ValueError, match=message):
        model(tokens[:, :given], incremental_state=state)
