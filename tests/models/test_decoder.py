"""The decoder: mask, lengths, position methods, options, contradictions."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import (
    NO_DROPOUT,
    TINY,
    build,
    log_probs,
    tiny_gpt,
    tiny_wiki103,
    tokens_of,
)

from fairseq import utils
from fairseq.attention import ZeroBias
from fairseq.positions import METHODS, PositionMethod

INF = float("inf")


def test_buffered_future_mask_by_hand():
    decoder = tiny_gpt(decoder_attention_heads=2).decoder
    mask = decoder.buffered_future_mask(torch.zeros(3, 4, 32))
    slopes = (2**-4, 2**-8)
    assert mask.tolist() == [
        [[slope * (j - i) if j <= i else -INF for j in range(4)] for i in range(4)]
        for slope in slopes
    ]


def test_buffered_future_mask_grows_and_follows_dtype():
    decoder = tiny_gpt().decoder
    short = decoder.buffered_future_mask(torch.zeros(1, 5, 32))
    assert short.data_ptr() == decoder.buffered_future_mask(torch.zeros(7, 3, 32)).data_ptr()
    long = decoder.buffered_future_mask(torch.zeros(1, 400, 32))
    assert long.shape == (4, 400, 400)
    assert torch.equal(long[:, :5, :5], short)
    half = decoder.buffered_future_mask(torch.zeros(1, 400, 32, dtype=torch.bfloat16))
    assert torch.equal(half, long.to(torch.bfloat16))
    assert not any("mask" in name or "slope" in name for name in decoder.state_dict())


def test_layers_are_handed_the_buffered_mask():
    model = tiny_gpt(attention_backend="sdpa")
    mask = model.decoder.buffered_future_mask(torch.zeros(1, 9, 32))
    seen = []
    for layer in model.decoder.layers:
        layer.self_attn.register_forward_pre_hook(lambda _, args: seen.append(args[1].mask))
    model(tokens_of(2, 9))
    assert [part.data_ptr() for part in seen] == [mask.data_ptr()] * 2


def test_any_batch_and_any_length():
    """Settings about batches and blocks do not bind the model."""
    model = tiny_gpt(max_tokens=8, tokens_per_sample=8).eval()
    tokens = tokens_of(40, 50)
    whole = log_probs(model, tokens)
    torch.testing.assert_close(log_probs(model, tokens[3:4, :20]), whole[3:4, :20])


def test_the_past_does_not_see_the_future():
    model = tiny_wiki103().eval()
    tokens = tokens_of(1, 12)
    changed = tokens.clone()
    changed[0, 7] = 9
    first, second = log_probs(model, tokens), log_probs(model, changed)
    torch.testing.assert_close(first[:, :7], second[:, :7])
    assert not torch.allclose(first[:, 7:], second[:, 7:])


def test_full_context_alignment_sees_the_future():
    model = tiny_gpt().eval()
    tokens = tokens_of(1, 12)
    changed = tokens.clone()
    changed[0, 11] = 9
    with torch.no_grad():
        first, _ = model(tokens, full_context_alignment=True)
        second, _ = model(changed, full_context_alignment=True)
        backwards, _ = model(tokens.flip(1), full_context_alignment=True)
    assert (first[:, 0] - second[:, 0]).abs().max() > 1e-5
    # The bias counts distance both ways, so that reading backwards is the same.
    torch.testing.assert_close(backwards.flip(1), first)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", list(METHODS))
def test_padding_does_not_matter(side, method):
    model = tiny_gpt(position_method=method, tokens_per_sample=40).eval()
    short, long = tokens_of(1, 6), tokens_of(1, 15, seed=1)
    padded = torch.ones(3, 15, dtype=torch.int64)  # the third row is nothing but padding
    padded[0] = long
    where = slice(9, None) if side == "left" else slice(0, 6)
    padded[1, where] = short
    found = log_probs(model, padded)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found[1, where], log_probs(model, short)[0], atol=2e-5, rtol=0)
    torch.testing.assert_close(found[0], log_probs(model, long)[0], atol=2e-5, rtol=0)


def test_padding_gets_finite_gradients():
    model = tiny_gpt().train()
    padded = torch.ones(2, 8, dtype=torch.int64)
    padded[0, 5:] = tokens_of(1, 3)
    model(padded)[0][padded != 1].sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("method", list(METHODS))
def test_methods_tell_order_apart(method):
    torch.manual_seed(0)
    model = tiny_gpt(position_method=method, decoder_layers=1).eval()
    tokens = tokens_of(1, 10)
    swapped = tokens.clone()
    swapped[0, [2, 3]] = swapped[0, [3, 2]]
    changed = (log_probs(model, tokens)[0, -1] - log_probs(model, swapped)[0, -1]).abs().max()
    if method == "none":
        assert changed < 1e-5  # one layer takes the past as a bag of words
    else:
        assert changed > 1e-4


def test_positions_are_not_added_with_alibi():
    model = tiny_gpt(decoder_learned_pos=True).eval()
    tokens = tokens_of(1, 10)
    before = log_probs(model, tokens)
    with torch.no_grad():
        model.decoder.embed_positions.weight.add_(1.0)
    assert torch.equal(log_probs(model, tokens), before)
    model.train()(tokens)[0].sum().backward()
    assert model.decoder.embed_positions.weight.grad is None


@pytest.mark.parametrize(
    ("given", "keys"),
    [
        ({}, ["_float_tensor"]),
        ({"decoder_learned_pos": True}, ["weight"]),
        ({"position_method": "learned"}, ["weight"]),
        ({"position_method": "sinusoidal"}, ["_float_tensor"]),
        ({"position_method": "sinusoidal", "decoder_learned_pos": True}, ["_float_tensor"]),
        ({"position_method": "none"}, []),
        ({"no_token_positional_embeddings": True}, []),
        ({"no_token_positional_embeddings": True, "position_method": "none"}, []),
    ],
)
def test_keys_of_the_position_table(given, keys):
    state = tiny_gpt(**given).state_dict()
    prefix = "decoder.embed_positions."
    assert [name.removeprefix(prefix) for name in state if name.startswith(prefix)] == keys


def test_learned_positions_end_and_others_do_not():
    tokens = tokens_of(1, 21)
    learned = tiny_gpt(position_method="learned", tokens_per_sample=20)
    assert learned.decoder.position_limit == learned.max_positions() == 20
    with pytest.raises(ValueError, match=r"21 tokens, but learned position embeddings .* 20 "):
        learned(tokens)
    for method in set(METHODS) - {"learned"}:
        model = tiny_gpt(position_method=method, tokens_per_sample=20)
        assert model.decoder.position_limit is None and model.max_positions() == 20
        assert model(tokens)[0].shape == (1, 21, 100)


class Rotary(PositionMethod):
    """Turns pairs of channels by position: a method of the third kind."""

    name = "rotary"

    def rotate(self, q, k, positions, sequence_length=None):
        angles = torch.tensor(list(positions))[:, None] * torch.tensor([0.5, 0.1, 0.03, 0.01])

        def turn(x):
            even, odd = x[..., 0::2], x[..., 1::2]
            cos, sin = angles.cos(), angles.sin()
            return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)

        return turn(q), turn(k)


class TrainedBias(PositionMethod, torch.nn.Module):
    """A bias with weights, registered with the decoder."""

    name = "trained"

    def __init__(self, model):
        torch.nn.Module.__init__(self)
        self.strength = torch.nn.Parameter(torch.full((model.num_heads,), 0.1))
        self.num_heads = model.num_heads

    def bias(self, sequence_length=None):
        strength = self.strength

        class Bias(ZeroBias):
            is_learned = True

            def dense(self, query_positions, key_positions, *, device=None):
                distance = torch.tensor(list(query_positions))[:, None] - torch.tensor(
                    list(key_positions)
                )
                return -strength[:, None, None] * distance

        return Bias(self.num_heads)


@pytest.mark.parametrize("method", [Rotary, TrainedBias])
def test_a_method_that_is_added_to_the_table(monkeypatch, method):
    monkeypatch.setitem(METHODS, method.name, method)
    torch.manual_seed(0)
    model = tiny_gpt(position_method=method.name)
    tokens = tokens_of(2, 10)
    model(tokens)[0].sum().backward()
    if method is TrainedBias:
        gradient = model.decoder.positions.strength.grad
        assert gradient.abs().min() > 0
        assert "decoder.positions.strength" in model.state_dict()
    model.eval()
    whole = log_probs(model, tokens)
    state = {}
    steps = [log_probs(model, tokens[:, :n], incremental_state=state) for n in (4, 5, 10)]
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=1e-5, rtol=0)
    assert (whole - log_probs(_like(model, "none"), tokens)).abs().max() > 1e-4


def _like(model, method):
    other = tiny_gpt(position_method=method)
    other.load_state_dict(model.state_dict(), strict=False)
    return other.eval()


@pytest.mark.parametrize("arch_options", [{}, {"offload_activations": True}])
def test_activation_checkpoints_change_nothing(arch_options):
    results = []
    for options in ({}, {"checkpoint_activations": True, **arch_options}):
        torch.manual_seed(1)
        model = tiny_wiki103(**options).train()
        torch.manual_seed(2)
        model(tokens_of(2, 9))[0].square().sum().backward()
        results.append([p.grad for p in model.parameters() if p.grad is not None])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_layerdrop_leaves_out_layers_in_training_only():
    model = tiny_gpt(decoder_layers=6, decoder_layerdrop=0.5)
    calls = []
    for layer in model.decoder.layers.children():
        layer.register_forward_hook(lambda *_: calls.append(1))
    torch.manual_seed(0)
    for _ in range(50):
        model.train()(tokens_of(1, 3))
    assert 100 < len(calls) < 200
    calls.clear()
    model.eval()(tokens_of(1, 3))
    assert len(calls) == 6


def test_dropout_placements():
    """Each probability acts alone, on the parts it is meant for."""
    tokens = tokens_of(1, 8)
    for name in ("dropout", "attention_dropout", "activation_dropout", "relu_dropout"):
        model = tiny_gpt(**{**NO_DROPOUT, name: 0.5})
        rates = {
            "dropout": [model.decoder.dropout_module, model.decoder.layers[0].dropout_module],
            "attention_dropout": [model.decoder.layers[0].self_attn.dropout_module],
            "activation_dropout": [model.decoder.layers[0].activation_dropout_module],
        }
        wanted = "activation_dropout" if name == "relu_dropout" else name
        for key, modules in rates.items():
            assert [module.p for module in modules] == [0.5 * (key == wanted)] * len(modules)
        first, second = model.train()(tokens)[0], model(tokens)[0]
        assert not torch.equal(first, second)
        model.eval()
        assert torch.equal(model(tokens)[0], model(tokens)[0])


def test_extra_outputs():
    model = tiny_gpt().eval()
    tokens = tokens_of(2, 5)
    logits, extra = model(tokens)
    assert extra == {"attn": [None], "inner_states": []}
    features, extra = model.extract_features(tokens, return_all_hiddens=True)
    assert [tuple(state.shape) for state in extra["inner_states"]] == [(2, 5, 32)] * 3
    torch.testing.assert_close(model.output_layer(features), logits)
    torch.testing.assert_close(model(tokens, features_only=True)[0], features)


def test_layernorm_of_embeddings_and_scale():
    model = tiny_gpt(layernorm_embedding=True, no_scale_embedding=True)
    keys = [name for name in model.state_dict() if "layernorm_embedding" in name]
    assert keys == [f"decoder.layernorm_embedding.{kind}" for kind in ("weight", "bias")]
    x = model.decoder.embed(tokens_of(1, 4))
    torch.testing.assert_close(x.mean(-1), torch.zeros(1, 4), atol=1e-6, rtol=0)
    plain = tiny_gpt(no_scale_embedding=True).decoder
    assert torch.equal(plain.embed(tokens_of(1, 4)), plain.embed_tokens(tokens_of(1, 4)))
    scaled = tiny_gpt().decoder
    torch.testing.assert_close(
        scaled.embed(tokens_of(1, 4)), 32**0.5 * scaled.embed_tokens(tokens_of(1, 4))
    )


def test_a_copied_model_is_independent():
    model = tiny_gpt().eval()
    tokens = tokens_of(1, 6)
    expected = log_probs(model, tokens)
    twin = copy.deepcopy(model)
    assert torch.equal(log_probs(twin, tokens), expected)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(log_probs(model, tokens), expected)


def test_generation_options():
    model = tiny_gpt(dropout=0.5)
    cfg = type("Cfg", (), {})()
    cfg.generation = type("Generation", (), {})()
    cfg.generation.retain_dropout = True
    cfg.generation.retain_dropout_modules = ["TransformerDecoder"]
    model.prepare_for_inference_(cfg)
    assert not model.training
    assert model.decoder.dropout_module.rate == 0.5
    assert model.decoder.layers[0].dropout_module.rate == 0.0


def test_number_of_updates_reaches_every_part():
    model = tiny_gpt()
    seen = []
    model.decoder.layers[1].set_num_updates = seen.append
    model.set_num_updates(7)
    assert seen == [7]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"character_embeddings": True}, "--character-embeddings is not supported"),
        ({"base_layers": 1}, "--base-layers is not supported"),
        ({"decoder_attention_heads": 5}, "--decoder-attention-heads 5 does not divide .*32"),
        ({"adaptive_softmax_cutoff": "20,600"}, "equal --adaptive-input-cutoff and"),
        (
            {"adaptive_input_cutoff": "20,600", "adaptive_softmax_cutoff": "20,600"},
            "--adaptive-input-cutoff 20,600 .* 100 words",
        ),
        ({"adaptive_input_factor": 4.0}, "equal --adaptive-input-factor and .* 4.0 and 2.0"),
        ({"decoder_output_dim": 16}, "equal --decoder-input-dim and --decoder-output-dim"),
        ({"adaptive_input": False}, "--tie-adaptive-weights needs --adaptive-input and"),
        ({"adaptive_input_cutoff": None}, "--adaptive-input needs --adaptive-input-cutoff"),
        ({"tie_adaptive_weights": False}, "--tie-adaptive-proj needs --tie-adaptive-weights"),
        ({"position_method": "albi"}, "--position-method: unknown method 'albi'"),
        ({"attention_backend": "flsh"}, "--attention-backend: unknown backend 'flsh'"),
        (
            {"position_method": "learned", "no_token_positional_embeddings": True},
            "learned needs position embeddings; leave out --no-token-positional-embeddings",
        ),
        ({"decoder_layers_to_keep": "0,x"}, "--decoder-layers-to-keep '0,x' is not a list"),
        (
            {
                "adaptive_softmax_cutoff": None,
                "tie_adaptive_weights": False,
                "tie_adaptive_proj": False,
                "share_decoder_input_output_embed": True,
            },
            "--share-decoder-input-output-embed does not go with --adaptive-input",
        ),
        ({"position_method": "learned", "tokens_per_sample": None}, "set --max-target-positions"),
    ],
)
def test_contradictions(given, message):
    with pytest.raises(ValueError, match=message):
        tiny_wiki103(**given)


def test_sharing_needs_equal_widths():
    with pytest.raises(ValueError, match="equal --decoder-input-dim and --decoder-output-dim"):
        build(
            "transformer_lm",
            **TINY,
            decoder_input_dim=32,
            share_decoder_input_output_embed=True,
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("make", [tiny_gpt, tiny_wiki103])
def test_other_dtypes(make, dtype):
    torch.manual_seed(0)
    model = make().eval()
    tokens = tokens_of(2, 9)
    tokens[1, :4] = 1
    expected = log_probs(model, tokens)[tokens != 1]
    model.to(dtype)
    found = log_probs(model, tokens)
    assert found.dtype == torch.float32
    tolerance = {torch.float16: 0.02, torch.bfloat16: 0.1, torch.float64: 1e-4}[dtype]
    assert (found[tokens != 1] - expected).abs().max() < tolerance
    state = {}
    log_probs(model, tokens[:, :8], incremental_state=state)
    step = log_probs(model, tokens, incremental_state=state)[:, -1]
    assert (step - found[:, -1]).abs().max() < tolerance


def test_an_encoder_s_output_is_refused():
    with pytest.raises(ValueError, match="attends to no encoder"):
        tiny_gpt()(tokens_of(1, 3), encoder_out={})


@pytest.mark.parametrize("columns", [range(3, 7), torch.tensor([1, 2, 7, 8])])
@pytest.mark.parametrize("method", ["learned", "sinusoidal", "rotary", "fire"])
def test_some_columns_stand_where_they_stand_in_the_whole_row(method, columns):
    choices = {"document_mask": "line", "attention_backend": "sdpa"}
    decoder = tiny_gpt(position_method=method, **choices).eval().decoder
    tokens = tokens_of(2, 9)
    tokens[0, 4] = decoder.dictionary.eos()
    tokens[1, :2] = 1
    which = torch.as_tensor(list(columns))
    whole = decoder.embed(tokens)
    part = decoder.embed(tokens, columns)
    assert torch.equal(part, whole[:, which])
    all_of_it = decoder.prepare_attention(whole, tokens)
    some_of_it = decoder.prepare_attention(part, tokens, columns)
    wide = all_of_it.mask.expand(2, 4, 9, 9)
    sees_a_key = tokens[:, which].ne(1).view(2, 1, 4, 1)  # what is blind has some key open
    found = some_of_it.mask.expand(2, 4, 4, 9).where(sees_a_key, 0.0)
    assert torch.equal(found, wide[:, :, which].where(sees_a_key, 0.0))
    q = torch.randn(2, 4, 9, 8)
    turned, _ = all_of_it.rotate(q, q)
    assert torch.equal(some_of_it.rotate(q[:, :, which], q[:, :, which])[0], turned[:, :, which])


def test_columns_in_incremental_decoding_are_refused():
    with pytest.raises(ValueError, match="leave one of them out"):
        tiny_gpt()(tokens_of(1, 3), incremental_state={}, columns=range(2))


@pytest.mark.parametrize("num_pads", [0, 2])
def test_padding_is_looked_for_where_the_batch_was_made(monkeypatch, num_pads):
    """On a device that has no values to wait for, the mask is the one of the ids at home."""
    decoder = tiny_gpt().decoder
    tokens = tokens_of(2, 9)
    tokens[1, 9 - num_pads :] = decoder.padding_idx
    asked = []
    monkeypatch.setattr(decoder.backend, "prepare", lambda *_, **how: asked.append(how) or Asked())
    away = utils.move_to_cuda(tokens, device="meta")
    decoder.prepare_attention(torch.zeros(2, 9, 32, device="meta"), away)
    assert (asked[0]["key_is_padding"] is not None) == (num_pads > 0)


class Asked:
    """Takes what the decoder adds to a prepared bias."""
