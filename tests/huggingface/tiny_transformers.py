"""Small models of transformers with large random weights, so that every term matters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

MAJOR = int(transformers.__version__.split(".")[0])
needs_5 = pytest.mark.skipif(MAJOR < 5, reason="since transformers 5 this goes through a registry")

VOCABULARY, LENGTH, HEADS = 50, 16, 4
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "max_position_embeddings": LENGTH,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def gpt2(kind: str = "GPT2LMHeadModel", **settings: Any) -> Any:
    dropout = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    return _build(kind, transformers.GPT2Config(**{**_SIZES, **dropout, **settings}))


def bert(kind: str = "BertForMaskedLM", **settings: Any) -> Any:
    given = {**_SIZES, **_NO_DROPOUT, "intermediate_size": 48, **settings}
    return _build(kind, transformers.BertConfig(**given))


def roberta(kind: str = "RobertaForMaskedLM", **settings: Any) -> Any:
    given = {**_SIZES, **_NO_DROPOUT, "intermediate_size": 48, **settings}
    return _build(kind, transformers.RobertaConfig(**given))


def opt(**settings: Any) -> Any:
    given = {**_SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0, "init_std": 0.3}
    return _build("OPTForCausalLM", transformers.OPTConfig(**{**given, **settings}))


def llama(**settings: Any) -> Any:
    given = {**_SIZES, "intermediate_size": 48, "num_key_value_heads": 2}
    return _build("LlamaForCausalLM", transformers.LlamaConfig(**{**given, **settings}))


def gpt_neox(**settings: Any) -> Any:
    given = {**_SIZES, "intermediate_size": 48, "hidden_dropout": 0.0}
    return _build("GPTNeoXForCausalLM", transformers.GPTNeoXConfig(**{**given, **settings}))


DECODERS = [gpt2, opt, llama, gpt_neox]
ENCODERS = [pytest.param(bert, marks=needs_5), pytest.param(roberta, marks=needs_5)]


def _build(kind: str, config: Any) -> Any:
    torch.manual_seed(0)
    return getattr(transformers, kind)(config).eval()


def tokens(rows: int = 2, length: int = 3 * LENGTH, seed: int = 0) -> torch.Tensor:
    """Random ids without padding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (rows, length), generator=generator)


def collate(examples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch of examples of one length; here, where worker processes can import it."""
    return {key: torch.stack([example[key] for example in examples]) for key in examples[0]}


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference."""
    return float((a.detach().double() - b.detach().double()).abs().max())
