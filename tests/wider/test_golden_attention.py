"""Slopes, masks and per-token scores of the original, on data that is not part of the project."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fairseq.positions import alibi_slopes

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "models"))

from tiny_models import Task, load_golden, settings

from fairseq.data import Dictionary, data_utils
from fairseq.models import build_model

GOLDEN = os.environ.get("GOLDEN_DIR")
WIKITEXT = Path(GOLDEN or "") / "wikitext-2"
UPSTREAM = Path(GOLDEN or "") / "upstream-positions"

pytestmark = pytest.mark.skipif(not GOLDEN, reason="GOLDEN_DIR is not set")


def load(name):
    return np.load(WIKITEXT / "attention" / name)


@pytest.mark.parametrize("num_heads", range(1, 65))
def test_slopes(num_heads):
    expected = load("slopes_1_to_64.npy")[num_heads - 1, :num_heads]
    assert np.array_equal(np.array(alibi_slopes(num_heads), dtype=np.float32), expected)


def mask_of(num_heads, length):
    args = settings(
        "transformer_lm_gpt",
        decoder_layers=1,
        decoder_embed_dim=4 * num_heads,
        decoder_ffn_embed_dim=8,
        decoder_attention_heads=num_heads,
        tokens_per_sample=4,
    )
    decoder = build_model(args, Task(10)).decoder
    return decoder.buffered_future_mask(torch.zeros(1, length, 4 * num_heads)).numpy()


def without_row_constants(mask):
    """Subtracts the diagonal, which softmax does not see."""
    return mask - np.einsum("hii->hi", mask)[..., None]


@pytest.mark.parametrize(
    ("name", "length"),
    [("mask_heads8_len16_bsz2.npy", 16), ("mask_heads8_buf16_bsz3_len11.npy", 11)],
)
def test_masks(name, length):
    recorded = load(name)
    ours = mask_of(8, length)
    for row in recorded.reshape(-1, 8, length, length):
        np.testing.assert_array_equal(without_row_constants(row), without_row_constants(ours))


def test_bias_of_six_heads():
    recorded = load("alibi_heads6_buf10_rep3.npy")  # (3 * 6, 1, 10): slope * key position
    ours = mask_of(6, 10)
    for row in recorded.reshape(3, 6, 10):
        np.testing.assert_allclose(row - row[:, -1:], ours[:, -1], atol=1e-6)


def cases():
    if not GOLDEN:
        return []
    found = sorted((WIKITEXT / "eval").glob("*_B*.tokens.npy"))
    return [path.name.removesuffix(".tokens.npy") for path in found]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("case", cases())
def test_scores_of_every_token(case, backend):
    folder = WIKITEXT / "eval"
    model = load_golden(
        WIKITEXT / "ckpt" / case.split("_")[0], "checkpoint_best.pt", attention_backend=backend
    )

    def recorded(kind):
        path = folder / f"{case}.{kind}.npy"
        return torch.from_numpy(np.load(path)) if path.exists() else None

    tokens, targets = recorded("tokens").long(), recorded("targets").long()
    with torch.no_grad():
        output = model(tokens)
        found = model.get_normalized_probs(output, True, {"target": targets})
        everything = model.get_normalized_probs(output, True)
    found = found.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    assert (found - recorded("target_logprobs")).abs().max() < 1e-4
    if recorded("all_logprobs") is not None:
        assert (everything - recorded("all_logprobs")).abs().max() < 1e-4
    if recorded("features") is not None:
        features, _ = model.extract_features(tokens)
        assert (features - recorded("features")).abs().max() < 2e-5


def evaluations():
    if not GOLDEN:
        return []
    lines = (UPSTREAM / "eval" / "RESULTS.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [pytest.param(row, id=row["name"]) for row in rows if row["name"].endswith("_c0")]


@pytest.mark.parametrize("row", evaluations())
def test_models_with_position_embeddings(row):
    """Blocks of l tokens, each read after the one before it, scored in bits per token."""
    arguments = dict(zip(row["args"][1::2], row["args"][2::2], strict=True))
    length = int(arguments["--tokens-per-sample"])
    method = row["name"].split("_")[0]
    folder = (UPSTREAM / arguments["--path"]).parent
    model = load_golden(folder, position_method=method)
    dictionary = Dictionary.load(str(UPSTREAM / "bin" / "main" / "dict.txt"))
    split = str(UPSTREAM / "bin" / "main" / arguments["--gen-subset"])
    lines = data_utils.load_indexed_dataset(split, dictionary)
    stream = torch.cat([torch.as_tensor(lines[i]).long() for i in range(len(lines))])
    source = torch.cat([torch.tensor([dictionary.eos()]), stream[:-1]])
    total = 0.0
    for start in range(0, len(stream), length):
        tokens, targets = (part[None, start : start + length] for part in (source, stream))
        with torch.no_grad():
            scores = model.get_normalized_probs(model(tokens), True)
        total -= scores.gather(-1, targets.unsqueeze(-1)).double().sum().item()
    bits = total / len(stream) / np.log(2)
    assert bits == pytest.approx(row["loss_base2"], abs=2e-4)


@pytest.mark.parametrize(("method", "seed"), [("sinusoidal", 4), ("learned", 6)])
def test_start_of_models_with_position_embeddings(method, seed):
    folder = UPSTREAM / "ckpt" / f"{method}_tiny"
    expected = torch.load(folder / "init.pt", weights_only=True)["model"]
    cfg = torch.load(folder / "checkpoint_last.pt", weights_only=True)["cfg"]["model"]
    args = settings("transformer_lm_gpt", **{k: v for k, v in cfg.items() if k != "_name"})
    args.position_method = method
    torch.manual_seed(seed)
    found = build_model(args, Task(len(expected["decoder.embed_tokens.weight"]))).state_dict()
    assert list(found) == list(expected)
    for key in expected:
        if not key.endswith("_float_tensor"):
            assert torch.equal(found[key], expected[key]), key
