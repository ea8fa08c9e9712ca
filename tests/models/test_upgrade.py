"""State dicts of older versions, and of models that are not quite the same."""

from __future__ import annotations

import argparse

import pytest
import torch
from tiny_models import (
    Task,
    build,
    log_probs,
    settings,
    tiny_gpt,
    tiny_wiki103,
    tokens_of,
)

from fairseq.models import build_model


def equal_but(state, other, *missing):
    return all(torch.equal(state[key], other[key]) for key in other if key not in missing)


def test_a_state_dict_goes_round():
    torch.manual_seed(0)
    model, other = tiny_wiki103(), tiny_wiki103()
    state = model.state_dict()
    other.load_state_dict(state)
    assert equal_but(other.state_dict(), state)
    tokens = tokens_of(1, 6)
    assert torch.equal(log_probs(other.eval(), tokens), log_probs(model.eval(), tokens))
    words = other.decoder.embed_tokens.embeddings[0][0].weight
    assert other.decoder.adaptive_softmax.head.word_proj.weight is words


def test_loading_changes_nothing_in_the_given_dictionary():
    model = tiny_gpt()
    state = model.state_dict()
    del state["decoder.embed_positions._float_tensor"]
    names = list(state)
    model.load_state_dict(state)
    assert list(state) == names


@pytest.mark.parametrize("change", ["absent", "other", "weights", "learned"])
@pytest.mark.parametrize("has_table", [True, False])
def test_bookkeeping_of_positions_that_are_not_read(change, has_table):
    model = tiny_gpt(no_token_positional_embeddings=not has_table)
    state = tiny_gpt().state_dict()
    key = "decoder.embed_positions._float_tensor"
    if change == "other":
        state[key] = torch.full((1,), -9.69e32)
    else:
        del state[key]
    if change == "weights":
        state["decoder.embed_positions.weights"] = torch.zeros(18, 32)
    if change == "learned":
        state["decoder.embed_positions.weight"] = torch.zeros(18, 32)
    model.load_state_dict(state)
    assert (key in model.state_dict()) == has_table
    if has_table:
        assert torch.equal(model.state_dict()[key], torch.zeros(1))


def test_learned_table_that_is_not_read_may_be_absent():
    model = tiny_gpt(decoder_learned_pos=True)
    before = model.decoder.embed_positions.weight.clone()
    model.load_state_dict(tiny_gpt().state_dict())
    assert torch.equal(model.decoder.embed_positions.weight, before)


def test_learned_table_that_is_read_may_not():
    model = tiny_gpt(position_method="learned")
    with pytest.raises(RuntimeError, match=r"Missing key.*decoder.embed_positions.weight"):
        model.load_state_dict(tiny_gpt().state_dict())


@pytest.mark.parametrize("method", ["alibi", "learned"])
@pytest.mark.parametrize("limit", [8, 64])
def test_learned_table_keeps_the_size_it_was_trained_with(method, limit):
    given = {"decoder_learned_pos": True, "position_method": method}
    state = tiny_gpt(tokens_per_sample=16, **given).state_dict()
    model = tiny_gpt(max_target_positions=limit, **given)
    parameter = model.decoder.embed_positions.weight
    model.load_state_dict(state)
    assert model.decoder.embed_positions.weight is parameter
    assert torch.equal(parameter, state["decoder.embed_positions.weight"])
    assert model.decoder.position_limit == (16 if method == "learned" else None)


def test_output_layer_of_before_it_had_a_name():
    model = tiny_gpt()
    state = model.state_dict()
    state["decoder.embed_out"] = state.pop("decoder.output_projection.weight") + 1
    model.load_state_dict(state)
    assert torch.equal(
        model.decoder.output_projection.weight, torch.as_tensor(state["decoder.embed_out"])
    )


def test_shared_output_layer_may_be_absent():
    model = tiny_gpt(share_decoder_input_output_embed=True)
    state = {k: v + 1 for k, v in model.state_dict().items()}
    state["decoder.version"] = torch.tensor([3.0])
    del state["decoder.output_projection.weight"]
    model.load_state_dict(state)
    found = model.decoder.output_projection.weight
    assert found is model.decoder.embed_tokens.weight
    assert torch.equal(found, state["decoder.embed_tokens.weight"])


def test_numbered_layer_norms():
    model = tiny_gpt()
    old = {}
    for key, value in model.state_dict().items():
        key = key.replace("self_attn_layer_norm", "layer_norms.0")
        old[key.replace("final_layer_norm", "layer_norms.2")] = value + 1
    old["decoder.version"] = torch.tensor([3.0])
    model.load_state_dict(old)
    for layer, parameter in (("1", "weight"), ("0", "bias")):
        found = model.state_dict()[f"decoder.layers.{layer}.final_layer_norm.{parameter}"]
        assert torch.equal(found, old[f"decoder.layers.{layer}.layer_norms.2.{parameter}"])


def test_joint_projections():
    model, other = tiny_gpt(), tiny_gpt()
    state = model.state_dict()
    for kind in ("weight", "bias"):
        for layer in range(2):
            name = f"decoder.layers.{layer}.self_attn."
            parts = [state.pop(f"{name}{part}_proj.{kind}") for part in "qkv"]
            state[f"{name}in_proj_{kind}"] = torch.cat(parts)
    other.load_state_dict(state)
    assert equal_but(other.state_dict(), model.state_dict())


@pytest.mark.parametrize("version", [None, 1.0, 2.0, 3.0])
def test_models_of_before_the_final_norm(version):
    model = tiny_gpt()
    state = model.state_dict()
    del state["decoder.version"]
    if version is not None:
        state["decoder.version"] = torch.tensor([version])
    if version != 3.0:
        del state["decoder.layer_norm.weight"], state["decoder.layer_norm.bias"]
    model.load_state_dict(state)
    assert (model.decoder.layer_norm is not None) == (version == 3.0)
    assert model.decoder.version.item() == (3.0 if version == 3.0 else 1.0)


def test_adaptive_softmax_without_a_version():
    model = tiny_wiki103()
    state = model.state_dict()
    del state["decoder.adaptive_softmax.version"]
    with pytest.raises(ValueError, match=r"no decoder.adaptive_softmax.version"):
        model.load_state_dict(state)


def test_superfluous_keys_are_an_error():
    model = tiny_gpt()
    with pytest.raises(RuntimeError, match=r"Unexpected key.*strange"):
        model.load_state_dict({**model.state_dict(), "decoder.strange": torch.zeros(1)})


def test_layers_to_keep():
    whole = tiny_gpt(decoder_layers=5).state_dict()
    cfg = settings("transformer_lm_gpt", decoder_embed_dim=32, decoder_attention_heads=4)
    cfg.decoder_ffn_embed_dim, cfg.tokens_per_sample = 64, 16
    cfg.decoder_input_dim = cfg.decoder_output_dim = 32
    cfg.decoder_layers_to_keep = "4, 1,2"
    model = build_model(cfg, Task(100))
    assert len(model.decoder.layers) == cfg.decoder_layers == 3
    model.load_state_dict(whole, model_cfg=cfg)
    assert cfg.decoder_layers_to_keep is None
    for new, old in enumerate((1, 2, 4)):
        for name, tensor in model.decoder.layers[new].state_dict().items():
            assert torch.equal(tensor, whole[f"decoder.layers.{old}.{name}"])
    # What was saved after that has the kept layers alone.
    cfg.decoder_layers_to_keep = "1,2,4"
    model.load_state_dict(model.state_dict(), model_cfg=cfg)
    assert cfg.decoder_layers_to_keep is None


def test_layers_to_keep_that_are_not_there():
    state = tiny_gpt(decoder_layers=3).state_dict()
    cfg = argparse.Namespace(decoder_layers_to_keep="0,7")
    with pytest.raises(ValueError, match=r"--decoder-layers-to-keep 0,7.* 3 layers.* no 7"):
        tiny_gpt().load_state_dict(state, model_cfg=cfg)


def test_untied_adaptive_keys():
    model = build(
        "transformer_lm",
        decoder_layers=1,
        decoder_embed_dim=32,
        decoder_input_dim=32,
        decoder_output_dim=32,
        decoder_ffn_embed_dim=64,
        decoder_attention_heads=4,
        adaptive_softmax_cutoff="20,60",
    )
    softmax = {k: tuple(v.shape) for k, v in model.state_dict().items() if "softmax" in k}
    assert softmax == {
        "decoder.adaptive_softmax.version": (1,),
        "decoder.adaptive_softmax.head.weight": (22, 32),
        "decoder.adaptive_softmax.tail.0.0.weight": (8, 32),
        "decoder.adaptive_softmax.tail.0.2.weight": (40, 8),
        "decoder.adaptive_softmax.tail.1.0.weight": (2, 32),
        "decoder.adaptive_softmax.tail.1.2.weight": (40, 2),
    }
