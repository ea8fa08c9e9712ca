"""Models that know the order of tokens by more than the bias are refused, and left as they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from tiny_transformers import bert, gpt2, needs_5, tokens

from fairseq.huggingface import apply_alibi, is_alibi, surgery
from fairseq.huggingface.policies import is_cross_attention
from fairseq.huggingface.probe import biases_of, probe

_SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "d_model": 32,
    "num_heads": 4,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "decoder_start_token_id": 0,
}
_BART = {
    "vocab_size": 50,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 32,
    "pad_token_id": 1,
    "decoder_start_token_id": 0,
    "init_std": 0.3,
}


def _t5(kind: str, config: str = "T5Config", **settings: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, config)(**_SIZES, **settings)
    return getattr(transformers, kind)(config).eval()


def _like_bart(family: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**_BART, **settings})
    head = "MTModel" if family == "Marian" else "ForConditionalGeneration"
    return getattr(transformers, f"{family}{head}")(config).eval()


def _output(model: Any) -> torch.Tensor:
    inputs = {"input_ids": tokens(length=20)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens(length=8, seed=1)
    with torch.no_grad():
        return model(**inputs)[0]


def _everything(model: Any) -> list[Any]:
    """Returns what a model is made of: objects by identity, settings by value."""
    parts: list[Any] = [(name, id(tensor)) for name, tensor in model.named_parameters()]
    parts += [(name, tensor.tolist()) for name, tensor in model.named_buffers()]
    for name, module in model.named_modules():
        hooks = (len(module._forward_hooks), len(module._forward_pre_hooks))
        parts.append((name, id(module), sorted(vars(module)), hooks, module.training))
        if hasattr(module, "config"):
            parts.append((repr(module.config), vars(module.config).get("fairseq_alibi")))
            parts.append(module.config._attn_implementation)
    return parts


def _assert_refused(model: Any, text: str, **arguments: Any) -> None:
    before, expected = _everything(model), _output(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=text):
        apply_alibi(model, **arguments)
    assert _everything(model) == before
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(_output(model), expected)
    assert not is_alibi(model)


@needs_5
@pytest.mark.parametrize("cross_attention", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_t5_has_relative_tables(attention, cross_attention) -> None:
    model = _t5("T5ForConditionalGeneration", attn_implementation=attention)
    text = "T5Attention adds a position bias of its own"
    _assert_refused(model, text, cross_attention=cross_attention)


@needs_5
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Of torch's own compiler.
def test_t5_with_flex_attention() -> None:
    model = _t5("T5EncoderModel", attn_implementation="flex_attention")
    with pytest.raises(RuntimeError, match="adds a position bias of its own"):
        apply_alibi(model)  # Its forward alone would be compiled, for many seconds.
    assert model.config._attn_implementation == "flex_attention"


@needs_5
@pytest.mark.parametrize(
    ("kind", "config"),
    [("T5EncoderModel", "T5Config"), ("UMT5ForConditionalGeneration", "UMT5Config")],
)
def test_models_made_after_t5(kind, config) -> None:
    _assert_refused(_t5(kind, config), "adds a position bias of its own")


def test_position_embeddings_of_another_kind() -> None:
    _assert_refused(_like_bart("M2M100"), "nothing else tells the order")


def _shift(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
    """Mixes each token with the one before it, a convolution of width 2."""
    return output + 0.1 * output.roll(1, 1)


def _remember(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
    """Mixes each token with all before it, as a recurrent layer does."""
    return output + 0.1 * output.cumsum(1)


def _rotate(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
    """Turns each token by its position, as rotations inside of attention do."""
    angles = 0.1 * torch.arange(output.size(1), dtype=output.dtype)[:, None]
    return output * angles.cos() + output.roll(1, -1) * angles.sin()


@pytest.mark.parametrize("mix", [_shift, _remember, _rotate])
@pytest.mark.parametrize(
    ("build", "name"),
    [
        (gpt2, "transformer.h.1.mlp"),
        (gpt2, "transformer.h.0.attn.c_attn"),
        pytest.param(bert, "bert.encoder.layer.1.intermediate", marks=needs_5),
    ],
)
def test_layers_that_mix_tokens_by_their_places(build, name, mix) -> None:
    model = build(max_position_embeddings=32)
    model.get_submodule(name).register_forward_hook(mix)
    _assert_refused(model, "nothing else tells the order")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_rounding_is_no_order(dtype) -> None:
    deep = gpt2(num_hidden_layers=24).to(dtype)
    assert apply_alibi(deep) == 24
    shifted = gpt2().to(dtype)
    shifted.transformer.h[0].mlp.register_forward_hook(_shift)
    with pytest.raises(RuntimeError, match="nothing else tells the order"):
        apply_alibi(shifted)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("cross_attention", [False, True])
@pytest.mark.parametrize("family", ["Bart", "MBart", "Blenderbot", "Marian", "Pegasus"])
def test_encoders_with_decoders(family, cross_attention, attention) -> None:
    model = _like_bart(family, attn_implementation=attention)
    before = _output(model)
    assert apply_alibi(model, cross_attention=cross_attention) == (6 if cross_attention else 4)
    assert is_alibi(model)
    assert not torch.equal(_output(model), before)
    kinds = {bias.kind for bias in biases_of(model).values()}
    assert kinds == {"symmetric", "causal"} | ({"cross"} if cross_attention else set())
    names = [name for name, _, _ in probe(model.model)]
    assert names[-1] == "nothing else tells the order"


def test_a_refused_encoder_with_decoder_is_put_back_with_its_cross_attention() -> None:
    model = _like_bart("Bart")
    model.model.decoder.layers[0].fc2.register_forward_hook(_shift)
    _assert_refused(model, "nothing else tells the order", cross_attention=True)


def test_source_and_target_differ_in_length(monkeypatch) -> None:
    model = _like_bart("Bart")
    monkeypatch.setattr(surgery, "is_cross_attention", lambda module, name: False)
    _assert_refused(model, "9 queries and 12 keys")


@pytest.mark.parametrize(
    ("name", "is_cross"),
    [
        ("decoder.block.0.layer.1.EncDecAttention", True),
        ("decoder.layers.0.encoder_decoder_attention.attention", True),
        ("decoder.layers.0.encoder_attn", True),
        ("decoder.block.0.layer.0.SelfAttention", False),
        ("encoder.layers.0.self_attn", False),
    ],
)
def test_names_of_cross_attention(name, is_cross) -> None:
    assert is_cross_attention(torch.nn.Linear(1, 1), name) is is_cross


def test_eager_attention_without_alibi_keeps_a_position_bias() -> None:
    attend = transformers.AttentionInterface()["alibi_eager"]
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 5, 4, generator=generator)
    added = torch.randn(1, 2, 5, 5, generator=generator)
    found, weights = attend(torch.nn.Identity(), query, key, value, None, position_bias=added)
    expected = (query @ key.mT / 2 + added).softmax(-1)
    torch.testing.assert_close(weights, expected)
    torch.testing.assert_close(found, (expected @ value).transpose(1, 2))
