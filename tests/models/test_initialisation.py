"""Random weights are those the original draws from the same seed."""

from __future__ import annotations

import argparse

import pytest
import torch
from tiny_models import CHECKPOINTS, Task, tiny_wiki103, vocab_size_of

from fairseq.models import build_model

# Recorded from the original: the first three elements of each parameter.
FIRST_ELEMENTS = {
    "embed_tokens.embeddings.0.0.weight": (0.212705, 0.246267, 0.020793),
    "embed_tokens.embeddings.0.1.weight": (0.143674, 0.101871, -0.128621),
    "embed_tokens.embeddings.1.0.weight": (0.343428, 0.183192, -0.069398),
    "embed_tokens.embeddings.1.1.weight": (0.268002, -0.138137, 0.156867),
    "embed_tokens.embeddings.2.0.weight": (0.234774, -0.026056, 0.035328),
    "embed_tokens.embeddings.2.1.weight": (-0.056417, -0.091836, 0.04108),
    "layers.0.self_attn.k_proj.weight": (-0.050968, -0.139979, 0.002556),
    "layers.0.self_attn.k_proj.bias": (-0.067176, -0.058591, -0.106804),
    "layers.0.self_attn.v_proj.weight": (0.03302, -0.036348, 0.140906),
    "layers.0.self_attn.v_proj.bias": (0.061834, -0.126484, 0.024433),
    "layers.0.self_attn.q_proj.weight": (-0.181452, -0.105687, -0.033832),
    "layers.0.self_attn.q_proj.bias": (0.151061, -0.026001, -0.108077),
    "layers.0.self_attn.out_proj.weight": (0.171721, -0.220566, -0.09122),
    "layers.0.self_attn.out_proj.bias": (0.0, 0.0, 0.0),
    "layers.0.fc1.weight": (0.155681, -0.146934, 0.087864),
    "layers.0.fc1.bias": (0.030233, 0.103792, 0.17342),
    "layers.0.fc2.weight": (-0.101166, -0.065249, -0.117528),
    "layers.0.fc2.bias": (0.079419, 0.074724, -0.055989),
    "adaptive_softmax.head.class_proj.weight": (0.279879, -0.283243, -0.339304),
}


def test_adaptive_model():
    torch.manual_seed(1)
    parameters = dict(tiny_wiki103(decoder_layers=1).decoder.named_parameters())
    norms = {name for name in parameters if "layer_norm" in name}
    assert set(parameters) - norms == set(FIRST_ELEMENTS)
    for name, expected in FIRST_ELEMENTS.items():
        found = parameters[name].detach().flatten()[:3]
        torch.testing.assert_close(found, torch.tensor(expected), atol=1e-6, rtol=0)


def test_second_row_of_every_band_is_zero():
    model = tiny_wiki103()
    for band in range(3):
        table = model.decoder.embed_tokens.embeddings[band][0].weight
        assert not table[1].any() and table[0].any() and table[2].any()


@pytest.mark.parametrize(("name", "seed"), [("wiki103_tiny", 1), ("gpt_tiny", 3)])
def test_every_tensor_of_a_recorded_start(name, seed):
    expected = torch.load(CHECKPOINTS / name / "init.pt", weights_only=True)["model"]
    cfg = torch.load(CHECKPOINTS / name / "checkpoint_last.pt", weights_only=True)["cfg"]["model"]
    torch.manual_seed(seed)
    found = build_model(argparse.Namespace(**cfg), Task(vocab_size_of(expected))).state_dict()
    assert list(found) == list(expected)
    for key in expected:
        assert found[key].dtype == expected[key].dtype
        if not key.endswith("_float_tensor"):  # the original writes whatever the memory held
            assert torch.equal(found[key], expected[key]), key


def test_bookkeeping_tensors_are_defined():
    state = tiny_wiki103().state_dict()
    zeros = [key for key in state if key.endswith("_float_tensor")]
    assert len(zeros) == 3
    assert all(torch.equal(state[key], torch.zeros(1)) for key in zeros)
    assert torch.equal(state["decoder.version"], torch.tensor([3.0]))
    assert torch.equal(state["decoder.adaptive_softmax.version"], torch.tensor([1]))
