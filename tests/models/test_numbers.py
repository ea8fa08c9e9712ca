"""The original's numbers, and the formulas in float64."""

from __future__ import annotations

import math

import float64_forward
import pytest
import torch
from tiny_models import CHECKPOINTS, load_golden, tiny_wiki103

# Recorded from the original, with weights set by `set_weights`.
TOKENS = [[2, 5, 30, 70, 21, 61, 4, 99], [2, 7, 8, 9, 10, 11, 12, 13]]
TARGETS = [[5, 30, 70, 21, 61, 4, 99, 2], [7, 8, 9, 10, 11, 12, 13, 2]]
LOG_PROBS = [
    [-3.03263, -6.83743, -6.81309, -6.7859, -6.71101, -3.03202, -6.74568, -3.10408],
    [-3.12179, -3.10422, -3.13111, -3.12192, -3.07521, -3.02829, -3.01439, -3.10332],
]


def set_weights(model):
    """Sets element k of each parameter to a sine of k and of the length of the name."""
    for name, parameter in model.named_parameters():
        k = torch.arange(parameter.numel(), dtype=torch.float64)
        values = 0.05 * torch.sin(0.37 * k + len(name))
        if "layer_norm.weight" in name:
            values = 1 + 0.1 * torch.sin(k)
        parameter.data = values.view_as(parameter).float()


@pytest.fixture
def model():
    built = tiny_wiki103().eval()
    set_weights(built)
    return built


@pytest.fixture
def batch():
    return torch.tensor(TOKENS), torch.tensor(TARGETS)


def adaptive_loss(model, tokens, targets):
    """The original's loss: pad (1) is ignored in the tails too, where ids count from the band."""
    logits, parts = model.decoder.adaptive_softmax(model(tokens)[0], targets)
    return sum(
        torch.nn.functional.cross_entropy(row, part, ignore_index=1, reduction="sum").item()
        for row, part in zip(logits, parts, strict=True)
        if row is not None
    )


def test_features(model, batch):
    features, _ = model(batch[0])
    first = torch.tensor([-0.110663, 0.043453, 0.020423, 0.14039, 0.007955, 0.151425])
    second = torch.tensor([0.195516, 0.216754, 0.130225, -0.045539, -0.165105, -0.136123])
    torch.testing.assert_close(features[0, -1, :6], first, atol=1e-6, rtol=0)
    torch.testing.assert_close(features[1, 3, :6], second, atol=1e-6, rtol=0)


@pytest.mark.parametrize("asks_with_targets", [True, False])
def test_target_log_probs(model, batch, asks_with_targets):
    tokens, targets = batch
    sample = {"target": targets} if asks_with_targets else None
    log_probs = model.get_normalized_probs(model(tokens), log_probs=True, sample=sample)
    picked = log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(picked, torch.tensor(LOG_PROBS), atol=1e-5, rtol=0)
    assert -picked.sum().item() == pytest.approx(67.762100, abs=1e-5)


def test_target_log_probs_without_the_vocabulary(model, batch):
    tokens, targets = batch
    features, _ = model(tokens)
    picked = model.decoder.adaptive_softmax.get_target_log_prob(features, targets)
    torch.testing.assert_close(picked, torch.tensor(LOG_PROBS), atol=1e-5, rtol=0)


def test_loss(model, batch):
    assert adaptive_loss(model, *batch) == pytest.approx(60.404213, abs=1e-5)


def test_loss_of_a_padded_batch(model, batch):
    tokens, targets = batch
    tokens[1, -2:] = targets[1, -2:] = 1
    assert adaptive_loss(model, tokens, targets) == pytest.approx(54.286507, abs=1e-5)


@pytest.mark.parametrize("name", ["wiki103_tiny", "gpt_tiny"])
@pytest.mark.parametrize("backend", ["reference", "sdpa", "auto"])
def test_trained_models_against_float64(name, backend):
    model = load_golden(CHECKPOINTS / name, attention_backend=backend)
    stored = torch.load(CHECKPOINTS / name / "checkpoint_last.pt", weights_only=True)
    cfg = type("Settings", (), stored["cfg"]["model"])
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(3, 4192, (3, 150), generator=generator)
    tokens[1, -40:] = 1
    tokens[2, :30] = 1
    is_token = tokens != 1
    features, log_probs = float64_forward.forward(
        tokens, float64_forward.doubles(stored["model"]), cfg
    )
    with torch.no_grad():
        found, _ = model.extract_features(tokens)
        found_log_probs = model.get_normalized_probs(model(tokens), log_probs=True)
    assert (found.double() - features)[is_token].abs().max() < 2e-5
    assert (found_log_probs.double() - log_probs)[is_token].abs().max() < 5e-5
    assert torch.isfinite(found).all()
    total = found_log_probs.exp().sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["wiki103_tiny", "gpt_tiny"])
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_gradients_against_float64(name, backend):
    model = load_golden(CHECKPOINTS / name, attention_backend=backend).train()
    stored = torch.load(CHECKPOINTS / name / "checkpoint_last.pt", weights_only=True)
    cfg = type("Settings", (), stored["cfg"]["model"])
    generator = torch.Generator().manual_seed(6)
    tokens = torch.randint(3, 4192, (2, 24), generator=generator)
    targets = torch.randint(3, 4192, (2, 24), generator=generator)
    model.get_normalized_probs(model(tokens), True, {"target": targets}).gather(
        -1, targets.unsqueeze(-1)
    ).sum().backward()

    state = float64_forward.doubles(model.state_dict())
    leaves = {}  # one for each parameter, under however many names
    for key, tensor in model.state_dict(keep_vars=True).items():
        state[key] = leaves.setdefault(id(tensor), state[key].clone().requires_grad_())
    _, log_probs = float64_forward.forward(tokens, state, cfg)
    log_probs.gather(-1, targets.unsqueeze(-1)).sum().backward()
    for key, parameter in model.named_parameters():
        expected = state[key].grad
        error = (parameter.grad.double() - expected).norm() / expected.norm()
        assert error < 1e-4 or expected.norm() < 1e-6, key


def test_half_precision_agrees_with_float64():
    """The bias is relative, made in float32 and cast last, so that it is right at any length."""
    stored = torch.load(CHECKPOINTS / "gpt_tiny" / "checkpoint_last.pt", weights_only=True)
    cfg = type("Settings", (), stored["cfg"]["model"])
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(3, 4192, (1, 1200), generator=generator)
    _, expected = float64_forward.forward(tokens, float64_forward.doubles(stored["model"]), cfg)
    model = load_golden(CHECKPOINTS / "gpt_tiny", attention_backend="reference").bfloat16()
    with torch.no_grad():
        found = model.get_normalized_probs(model(tokens), log_probs=True).double()
    error = (found - expected).abs()
    # One bfloat16 step of a logit of 8 is 0.06.
    assert error.mean() < 0.03
    assert error[:, -64:].mean() < 1.5 * error[:, :64].mean()
    assert math.isfinite(error.max())
