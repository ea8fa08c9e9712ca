"""The same weights in GPT-2 and in our language model give the same logits."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tiny_transformers import gpt2, largest, tokens

from fairseq.data.dictionary import Dictionary
from fairseq.export import Symbols
from fairseq.huggingface import apply_alibi
from fairseq.huggingface.convert import (
    NUM_SPECIAL,
    gpt2_to_transformer_lm,
    transformer_lm_to_gpt2,
)
from fairseq.models.transformer_lm import TransformerLanguageModel

_LIMIT = 1e-4  # Of logits up to 30; our masks and activations are made in float32.


def _ours(**settings: object) -> TransformerLanguageModel:
    torch.manual_seed(0)
    symbols = Symbols(50)
    given = {
        "decoder_embed_dim": 32,
        "decoder_input_dim": 32,
        "decoder_output_dim": 32,
        "decoder_ffn_embed_dim": 48,
        "decoder_layers": 2,
        "decoder_attention_heads": 4,
        "decoder_normalize_before": True,
        "share_decoder_input_output_embed": True,
        "activation_fn": "gelu",
        "max_target_positions": 16,
    }
    model = TransformerLanguageModel.build_model(
        SimpleNamespace(**{**given, **settings}),
        SimpleNamespace(source_dictionary=symbols, target_dictionary=symbols),
    )
    return model.eval().double()


def test_the_special_symbols_are_as_many_as_a_dictionary_has() -> None:
    assert Dictionary().nspecial == NUM_SPECIAL


@pytest.mark.parametrize("bias_max", [8.0, 5.0])
@pytest.mark.parametrize("activation", ["gelu_new", "relu"])
def test_gpt2_as_ours(bias_max, activation) -> None:
    model = gpt2(activation_function=activation).double()
    apply_alibi(model, bias_max=bias_max)
    ids = tokens(length=24)
    found = gpt2_to_transformer_lm(model).double()
    with torch.no_grad():
        expected = model(ids).logits
        logits = found(ids + NUM_SPECIAL)[0]
    assert largest(logits[..., NUM_SPECIAL:], expected) < _LIMIT
    assert float(logits[..., :NUM_SPECIAL].abs().max()) == 0.0


@pytest.mark.parametrize("is_shared", [True, False])
@pytest.mark.parametrize("is_unscaled", [True, False])
def test_ours_as_gpt2_and_back(is_shared, is_unscaled) -> None:
    model = _ours(
        share_decoder_input_output_embed=is_shared,
        no_scale_embedding=is_unscaled,
        alibi_bias_max=6.0,
    )
    ids = tokens(length=24)
    found = transformer_lm_to_gpt2(model).double()
    with torch.no_grad():
        expected = model(ids)[0]
        assert largest(found(ids).logits, expected) < _LIMIT
        again = gpt2_to_transformer_lm(found, has_special_symbols=True).double()
        assert largest(again(ids)[0], expected) < _LIMIT


def test_what_cannot_be_converted() -> None:
    with pytest.raises(ValueError, match="call apply_alibi first"):
        gpt2_to_transformer_lm(gpt2())
    model = gpt2(scale_attn_by_inverse_layer_idx=True)
    apply_alibi(model)
    with pytest.raises(ValueError, match="scale_attn_by_inverse_layer_idx"):
        gpt2_to_transformer_lm(model)
    for settings, text in (
        ({"decoder_normalize_before": False}, "after each part"),
        ({"position_method": "sinusoidal"}, "position method sinusoidal"),
        ({"alibi_learned_slopes": True}, "slopes"),
    ):
        with pytest.raises(ValueError, match=text):
            transformer_lm_to_gpt2(_ours(**settings))
