"""The optimizer states of the original's checkpoints load, and go on by the rule."""

import argparse
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from fairseq.dataclass.arguments import fill_dataclass
from fairseq.optim import build_optimizer
from fairseq.registry import LR_SCHEDULERS, OPTIMIZERS

CHECKPOINTS = Path(__file__).parents[1] / "golden" / "invented" / "ckpt"


@pytest.fixture(params=["wiki103_tiny", "gpt_tiny"])
def checkpoint(request):
    path = CHECKPOINTS / request.param / "checkpoint_last.pt"
    return torch.load(path, weights_only=True)


def rebuild(checkpoint):
    """Returns parameters of the right shapes and the optimizer of the checkpoint's settings."""
    state = checkpoint["last_optimizer_state"]
    stored = checkpoint["cfg"]["optimizer"]
    cls = OPTIMIZERS.dataclass_of(stored["_name"])
    cfg = fill_dataclass(cls, argparse.Namespace(**stored), name=stored["_name"])
    torch.manual_seed(0)
    tensors = [
        entry.get("momentum_buffer", entry.get("exp_avg")) for entry in state["state"].values()
    ]
    params = [nn.Parameter(torch.randn_like(tensor)) for tensor in tensors]
    return params, build_optimizer(cfg, params)


def test_config_sections_have_the_same_fields_in_the_same_order(checkpoint):
    for registry, section in ((OPTIMIZERS, "optimizer"), (LR_SCHEDULERS, "lr_scheduler")):
        stored = checkpoint["cfg"][section]
        fields = registry.dataclass_of(stored["_name"]).__dataclass_fields__
        assert list(fields) == list(stored)


def test_class_name_is_the_recorded_one(checkpoint):
    _, optimizer = rebuild(checkpoint)
    assert type(optimizer).__name__ == checkpoint["optimizer_history"][-1]["optimizer_name"]


def test_our_state_has_the_layout_of_theirs(checkpoint):
    stored = checkpoint["last_optimizer_state"]
    _, optimizer = rebuild(checkpoint)
    optimizer.load_state_dict(stored)
    ours = optimizer.state_dict()
    assert list(ours) == list(stored)
    assert ours["param_groups"] == stored["param_groups"]
    assert [list(group) for group in ours["param_groups"]] == [
        list(group) for group in stored["param_groups"]
    ]
    assert list(ours["state"]) == list(stored["state"])
    for index, entry in stored["state"].items():
        assert list(ours["state"][index]) == list(entry)
        for name, value in entry.items():
            assert type(ours["state"][index][name]) is type(value)
            assert torch.equal(torch.as_tensor(ours["state"][index][name]), torch.as_tensor(value))
    # A state begun here has the same layout as one that was loaded.
    _, fresh = rebuild(checkpoint)
    for p in fresh.params:
        p.grad = torch.ones_like(p)
    fresh.step()
    begun = fresh.state_dict()
    assert [list(entry) for entry in begun["state"].values()] == [
        list(entry) for entry in stored["state"].values()
    ]
    assert list(begun["param_groups"][0]) == list(stored["param_groups"][0])


def expected_after_one_step(checkpoint, index, p, g):
    """The rules in float64, from the stored state."""
    entry = checkpoint["last_optimizer_state"]["state"][index]
    group = checkpoint["last_optimizer_state"]["param_groups"][0]
    lr, decay = group["lr"], group["weight_decay"]
    if "momentum_buffer" in entry:
        u, v = group["momentum"], entry["momentum_buffer"].double()
        return p * (1 - lr * decay) + u * u * lr / group["lr_old"] * v - (1 + u) * lr * g
    (b1, b2), t = group["betas"], entry["step"] + 1
    m = b1 * entry["exp_avg"].double() + (1 - b1) * g
    s = b2 * entry["exp_avg_sq"].double() + (1 - b2) * g * g
    size = lr * math.sqrt(1 - b2**t) / (1 - b1**t)
    return p * (1 - lr * decay) - size * m / (s.sqrt() + group["eps"])


def test_training_goes_on_from_the_original_state(checkpoint):
    params, optimizer = rebuild(checkpoint)
    optimizer.load_state_dict(checkpoint["last_optimizer_state"])
    for p in params:
        p.grad = torch.randn_like(p)
    expected = [
        expected_after_one_step(checkpoint, index, p.detach().double(), p.grad.double())
        for index, p in enumerate(params)
    ]
    optimizer.step()
    for p, value in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach().double(), value, rtol=1e-5, atol=1e-5)
