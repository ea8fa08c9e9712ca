"""Small language models for tests, and the settings they are made from."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from fairseq.models import build_model
from fairseq.registry import ARCHITECTURES

CHECKPOINTS = Path(__file__).resolve().parents[1] / "golden" / "invented" / "ckpt"


class Words:
    """As much of a dictionary as a model needs."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def pad(self) -> int:
        return 1

    def eos(self) -> int:
        return 2


class Task:
    def __init__(self, vocab_size: int) -> None:
        self.source_dictionary = self.target_dictionary = Words(vocab_size)


def settings(arch: str, **given: Any) -> argparse.Namespace:
    """Returns what the command line makes of an arch and explicit options."""
    args = argparse.Namespace(arch=arch, **given)
    ARCHITECTURES.preset_of(arch)(args)
    return args


def build(arch: str, vocab_size: int = 100, **given: Any) -> Any:
    given.setdefault("tokens_per_sample", 16)
    return build_model(settings(arch, **given), Task(vocab_size))


TINY = {
    "decoder_layers": 2,
    "decoder_embed_dim": 32,
    "decoder_ffn_embed_dim": 64,
    "decoder_attention_heads": 4,
}
NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}


def tiny_wiki103(**given: Any) -> Any:
    """Returns the adaptive model of the number tests: 100 words in bands 20, 60, 100."""
    given = {
        **TINY,
        "decoder_input_dim": 32,
        "decoder_output_dim": 32,
        "adaptive_input_cutoff": "20,60",
        "adaptive_softmax_cutoff": "20,60",
        "adaptive_input_factor": 2.0,
        "adaptive_softmax_factor": 2.0,
        **given,
    }
    return build("transformer_lm_wiki103", **given)


def tiny_gpt(**given: Any) -> Any:
    return build("transformer_lm_gpt", **{**TINY, **NO_DROPOUT, **given})


def load_golden(folder: Path, name: str = "checkpoint_last.pt", **overrides: Any) -> Any:
    """Builds the model of a checkpoint of the original and loads its weights."""
    stored = torch.load(folder / name, weights_only=True)
    cfg = argparse.Namespace(**{**stored["cfg"]["model"], **overrides})
    model = build_model(cfg, Task(vocab_size_of(stored["model"])))
    model.load_state_dict(stored["model"])
    return model.eval()


def vocab_size_of(state: dict[str, torch.Tensor]) -> int:
    if "decoder.embed_tokens.weight" in state:
        return len(state["decoder.embed_tokens.weight"])
    bands = [k for k in state if k.startswith("decoder.embed_tokens.") and k.endswith(".0.weight")]
    return sum(len(state[key]) for key in bands)


def tokens_of(*shape: int, seed: int = 0, vocab_size: int = 100) -> torch.Tensor:
    """Returns random ids without special ones."""
    return torch.randint(4, vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def log_probs(model: Any, tokens: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.get_normalized_probs(model(tokens, **kwargs), log_probs=True)
        return found
