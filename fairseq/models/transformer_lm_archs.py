"""The presets of the transformer language model.

Each row names what it sets and the row it is based on. A preset sets only what the command line
left open; the first row that sets something wins. Loading this module loads no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fairseq.registry import ARCHITECTURES

__all__ = ["PRESETS", "Preset"]


@dataclass(frozen=True)
class Preset:
    """One row.

    Attributes:
        settings: set where the command line gave nothing.
        base: the row that fills what is still open; None ends the chain.
        is_gpt3: widths of input and output, and sharing them, are forced.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    base: str | None = None
    is_gpt3: bool = False


def _size(
    layers: int, embed_dim: int, ffn_dim: int | None, heads: int, **others: Any
) -> dict[str, Any]:
    size = {
        "decoder_layers": layers,
        "decoder_embed_dim": embed_dim,
        "decoder_ffn_embed_dim": ffn_dim,
        "decoder_attention_heads": heads,
    }
    return {name: value for name, value in size.items() if value is not None} | others


def _gpt2(layers: int, embed_dim: int, ffn_dim: int, heads: int) -> Preset:
    gelu = {"dropout": 0.1, "attention_dropout": 0.1, "activation_fn": "gelu"}
    return Preset(_size(layers, embed_dim, ffn_dim, heads, **gelu))


def _gpt3(layers: int, embed_dim: int, heads: int) -> Preset:
    return Preset(_size(layers, embed_dim, None, heads), is_gpt3=True)


_BASE: dict[str, Any] = {
    **_size(6, 512, 2048, 8, dropout=0.1, attention_dropout=0.0, activation_fn="relu"),
    "adaptive_softmax_cutoff": None,
    "adaptive_softmax_dropout": 0.0,
    "adaptive_softmax_factor": 4.0,
    "decoder_learned_pos": False,
    "decoder_layerdrop": 0.0,
    "decoder_layers_to_keep": None,
    "quant_noise_pq": 0.0,
    "quant_noise_pq_block_size": 8,
    "quant_noise_scalar": 0.0,
    "base_layers": 0,
    "base_sublayers": 1,
    "base_shuffle": False,
    "add_bos_token": False,
    "no_token_positional_embeddings": False,
    "share_decoder_input_output_embed": False,
    "character_embeddings": False,
    "no_decoder_final_norm": False,
    "adaptive_input": False,
    "adaptive_input_factor": 4.0,
    "adaptive_input_cutoff": None,
    "tie_adaptive_weights": False,
    "tie_adaptive_proj": False,
    "no_scale_embedding": False,
    "layernorm_embedding": False,
    "checkpoint_activations": False,
    "offload_activations": False,
}

PRESETS: dict[str, Preset] = {
    "transformer_lm_big": Preset(_size(12, 1024, 4096, 16)),
    "transformer_lm_baevski_wiki103": Preset(
        {
            "decoder_layers": 16,
            "decoder_attention_heads": 8,
            "dropout": 0.3,
            "attention_dropout": 0.1,
            "activation_dropout": 0.1,
            "adaptive_input": True,
            "tie_adaptive_weights": True,
            "tie_adaptive_proj": True,
            "adaptive_input_cutoff": "20000,60000",
            "adaptive_softmax_cutoff": "20000,60000",
            "adaptive_softmax_dropout": 0.2,
            "no_decoder_final_norm": True,
        },
        base="transformer_lm_big",
    ),
    "transformer_lm_wiki103": Preset(base="transformer_lm_baevski_wiki103"),
    "transformer_lm_baevski_gbw": Preset(
        {
            "decoder_embed_dim": 512,
            "dropout": 0.1,
            "attention_dropout": 0.1,
            "no_decoder_final_norm": True,
        },
        base="transformer_lm_big",
    ),
    "transformer_lm_gbw": Preset(base="transformer_lm_baevski_gbw"),
    "transformer_lm_gpt": _gpt2(12, 768, 3072, 12),
    "transformer_lm_gpt2_tiny": _gpt2(2, 64, 64, 1),
    "transformer_lm_gpt2_small": _gpt2(24, 1024, 4096, 16),
    "transformer_lm_gpt2_medium": _gpt2(36, 1280, 5120, 20),
    "transformer_lm_gpt2_big": _gpt2(48, 1600, 6400, 25),
    "transformer_lm_gpt3_small": _gpt3(12, 768, 12),
    "transformer_lm_gpt3_medium": _gpt3(24, 1024, 16),
    "transformer_lm_gpt3_large": _gpt3(24, 1536, 16),
    "transformer_lm_gpt3_xl": _gpt3(24, 2048, 32),
    "transformer_lm_gpt3_2_7": _gpt3(32, 2560, 32),
    "transformer_lm_gpt3_6_7": _gpt3(32, 4096, 32),
    "transformer_lm_gpt3_13": _gpt3(40, 5120, 40),
    "transformer_lm_gpt3_175": _gpt3(96, 12288, 96),
}


def _set_absent(args: Any, settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        setattr(args, name, getattr(args, name, value))


def _set_gpt3(args: Any) -> None:
    """Sets what all GPT-3 sizes have (Brown et al. 2020); widths and sharing leave no choice."""
    width = args.decoder_embed_dim
    args.decoder_input_dim = args.decoder_output_dim = width
    args.share_decoder_input_output_embed = True
    _set_absent(
        args,
        {
            "decoder_ffn_embed_dim": 4 * width,
            "decoder_learned_pos": True,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "activation_fn": "gelu",
        },
    )


def _apply(preset: Preset, args: Any) -> None:
    _set_absent(args, preset.settings)
    if preset.is_gpt3:
        _set_gpt3(args)
    if preset.base is not None:
        _apply(PRESETS[preset.base], args)
        return
    _set_absent(args, _BASE)
    width = args.decoder_embed_dim
    _set_absent(args, {"decoder_input_dim": width, "decoder_output_dim": width})
    args.decoder_normalize_before = True
    if args.offload_activations:
        args.checkpoint_activations = True


def _preset_function(name: str) -> Callable[[Any], None]:
    def apply_preset(args: Any) -> None:
        _apply(PRESETS[name], args)

    apply_preset.__name__ = apply_preset.__qualname__ = name
    return apply_preset


@ARCHITECTURES.register_preset("transformer_lm", "transformer_lm")
def transformer_lm(args: Any) -> None:
    """Sets nothing: the defaults of the options hold, which make a post-norm model."""


for _name in PRESETS:
    ARCHITECTURES.register_preset("transformer_lm", _name)(_preset_function(_name))
