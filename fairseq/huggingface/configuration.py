"""The configuration of a language model of this project, as transformers keeps it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig

from fairseq.export import Symbols

__all__ = ["FairseqAlibiConfig"]


class FairseqAlibiConfig(PretrainedConfig):
    """Settings of a `FairseqAlibiForCausalLM`.

    Args:
        fairseq: the checkpoint's settings, as in `fairseq.export.ExportedModel`.
        **kwargs: further fields of every configuration of transformers.
    """

    model_type = "fairseq_alibi"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    def __init__(self, fairseq: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        self.fairseq = dict(fairseq or {})
        model = (self.fairseq.get("cfg") or {}).get("model") or {}
        symbols = Symbols(self.fairseq.get("num_symbols", 0))
        self.vocab_size = len(symbols)
        self.hidden_size = model.get("decoder_embed_dim")
        self.intermediate_size = model.get("decoder_ffn_embed_dim")
        self.num_hidden_layers = model.get("decoder_layers")
        self.num_attention_heads = model.get("decoder_attention_heads")
        self.use_cache = kwargs.pop("use_cache", True)
        derived = ("vocab_size", "hidden_size", "intermediate_size")
        for name in (*derived, "num_hidden_layers", "num_attention_heads"):
            kwargs.pop(name, None)  # written for readers; the checkpoint's settings rule
        defaults = {
            "bos_token_id": symbols.eos(),  # text begins after the end of a line
            "eos_token_id": symbols.eos(),
            "pad_token_id": symbols.pad(),
            "tie_word_embeddings": True,
        }
        super().__init__(**{**defaults, **kwargs})
