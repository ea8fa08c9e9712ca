"""The presets of the transformer with an encoder and a decoder.

Each row names what it sets and the row it is based on; the values are those of upstream fairseq.
A preset sets only what the command line left open. Loading this module loads no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fairseq.registry import ARCHITECTURES

__all__ = ["PRESETS"]


def _size(layers: int, embed_dim: int, ffn_dim: int, heads: int, **others: Any) -> dict[str, Any]:
    size = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (
            ("layers", layers),
            ("embed_dim", embed_dim),
            ("ffn_embed_dim", ffn_dim),
            ("attention_heads", heads),
        )
    }
    return size | others


_BIG = _size(6, 1024, 4096, 16)
_ENCODER = {
    "encoder_layers": 6,
    "encoder_embed_dim": 512,
    "encoder_ffn_embed_dim": 2048,
    "encoder_attention_heads": 8,
}

PRESETS: dict[str, dict[str, Any]] = {
    "transformer": {},
    "transformer_tiny": _size(2, 64, 64, 2),
    "transformer_iwslt_de_en": _size(6, 512, 1024, 4),
    "transformer_wmt_en_de": {},
    "transformer_vaswani_wmt_en_de_big": _BIG | {"dropout": 0.3},
    "transformer_vaswani_wmt_en_fr_big": _BIG | {"dropout": 0.1},
    "transformer_wmt_en_de_big": _BIG | {"dropout": 0.3, "attention_dropout": 0.1},
    "transformer_wmt_en_de_big_t2t": _BIG
    | {
        "dropout": 0.3,
        "attention_dropout": 0.1,
        "activation_dropout": 0.1,
        "encoder_normalize_before": True,
        "decoder_normalize_before": True,
    },
}


def _set_absent(args: Any, settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        if not hasattr(args, name):
            setattr(args, name, value)


def _apply(settings: dict[str, Any], args: Any) -> None:
    _set_absent(args, settings)
    _set_absent(args, _ENCODER)
    # A row that leaves the decoder's widths open takes those of the encoder.
    for name in ("embed_dim", "ffn_embed_dim"):
        _set_absent(args, {f"decoder_{name}": getattr(args, f"encoder_{name}")})
    _set_absent(args, {"decoder_layers": 6, "decoder_attention_heads": 8})
    _set_absent(args, {"decoder_output_dim": args.decoder_embed_dim})
    if getattr(args, "offload_activations", False):
        args.checkpoint_activations = True


def _preset_function(name: str) -> Callable[[Any], None]:
    def apply_preset(args: Any) -> None:
        _apply(PRESETS[name], args)

    apply_preset.__name__ = apply_preset.__qualname__ = name
    return apply_preset


for _name in PRESETS:
    ARCHITECTURES.register_preset("transformer", _name)(_preset_function(_name))
