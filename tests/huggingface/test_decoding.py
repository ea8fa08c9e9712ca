"""Caches, padding, beams, packing, compilation and other ways of running the same attention."""

from __future__ import annotations

import pytest
import torch
import transformers
from tiny_transformers import DECODERS, MAJOR, bert, gpt2, largest, llama, needs_5, tokens

from fairseq.huggingface import apply_alibi, position_context
from fairseq.huggingface.probe import biases_of

_LIMIT = 2e-4  # Of logits up to 30, in float32.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


def _with_alibi(build, **settings):
    model = build(**settings)
    apply_alibi(model)
    return model


@pytest.mark.parametrize("build", DECODERS)
@pytest.mark.parametrize("is_static", [False, True])
def test_chunks_on_a_cache_give_the_same_logits(build, is_static) -> None:
    model = _with_alibi(build)
    ids = tokens(length=30)
    cache = transformers.DynamicCache()
    if is_static:
        if MAJOR < 5:
            pytest.skip("before version 5 some models need their static cache's places told")
        cache = transformers.StaticCache(config=model.config, max_cache_len=40)
    parts = []
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        for part in ids.split([7, 12, 1, 1, 9], dim=1):
            parts.append(model(part, past_key_values=cache, use_cache=True).logits)
    assert largest(torch.cat(parts, 1), expected) < _LIMIT


@pytest.mark.parametrize("build", DECODERS)
def test_padding_on_the_left_changes_nothing(build) -> None:
    model = _with_alibi(build)
    ids = tokens(length=20)
    padded = torch.cat([torch.ones(2, 5, dtype=torch.long), ids], 1)
    mask = torch.ones_like(padded)
    mask[:, :5] = 0
    with torch.no_grad():
        found = model(padded, attention_mask=mask).logits[:, 5:]
        assert largest(found, model(ids).logits) < _LIMIT


@pytest.mark.parametrize("build", [gpt2, llama])
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("cache", [None, "static"])
def test_generation_with_a_cache_equals_without(build, beams, cache) -> None:
    model = _with_alibi(build)
    short, long = tokens(length=6), tokens(length=11, seed=1)
    ids = torch.cat([torch.cat([torch.ones(2, 5, dtype=torch.long), short], 1), long])
    settings = {"max_new_tokens": 24, "do_sample": False, "num_beams": beams, "pad_token_id": 1}
    settings["eos_token_id"] = None
    found = model.generate(
        ids, attention_mask=ids.ne(1).long(), cache_implementation=cache, **settings
    )
    slow = model.generate(ids, attention_mask=ids.ne(1).long(), use_cache=False, **settings)
    assert torch.equal(found, slow)
    alone = model.generate(
        short, attention_mask=torch.ones_like(short), use_cache=False, **settings
    )
    assert torch.equal(found[:2, 5:], alone)


@needs_5
def test_packed_documents_are_apart() -> None:
    model = _with_alibi(gpt2)
    ids = tokens(rows=1, length=30)
    places = torch.cat([torch.arange(11), torch.arange(19)])[None]
    with torch.no_grad():
        found = model(ids, position_ids=places, use_cache=False).logits
        alone = [model(part).logits for part in (ids[:, :11], ids[:, 11:])]
    assert largest(found, torch.cat(alone, 1)) < _LIMIT


@pytest.mark.parametrize("build", [pytest.param(gpt2, marks=needs_5), llama])
def test_gaps_in_positions_are_distances(build) -> None:
    model = build(num_hidden_layers=1)
    apply_alibi(model)
    ids = tokens(rows=1, length=4)
    mask = torch.ones_like(ids)
    filled = torch.cat([ids[:, :2], torch.ones(1, 5, dtype=torch.long), ids[:, 2:]], 1)
    places = torch.tensor([[0, 1, 7, 8]])
    with torch.no_grad():
        found = model(ids, position_ids=places, attention_mask=mask).logits
        expected = model(filled, attention_mask=filled.ne(1).long()).logits[:, [0, 1, 7, 8]]
    assert largest(found, expected) < _LIMIT


def test_part_of_a_sequence_by_given_positions() -> None:
    # Rows in another order, as where each device has every other token.
    model = _with_alibi(gpt2)
    ids = tokens(length=24)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids).logits
        with position_context(order, order):
            found = model(ids[:, order]).logits
        padding = torch.zeros(2, 24, dtype=torch.bool)
        padding[:, order >= 20] = True
        with position_context(order, order, key_is_padding=padding):
            short = model(ids[:, order]).logits
    assert largest(found, expected[:, order]) < _LIMIT
    assert largest(short[:, order < 20], expected[:, order[order < 20]]) < _LIMIT
    with position_context(range(3), range(3)), pytest.raises(ValueError, match="3 query"):
        model(ids)


@pytest.mark.parametrize("build", [gpt2, llama])
def test_checkpointed_gradients_are_the_same(build) -> None:
    model = _with_alibi(build).train()
    ids = tokens()
    found = []
    for checkpoints in (False, True):
        if checkpoints:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        found.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("build", [gpt2, pytest.param(bert, marks=needs_5)])
def test_compiled_as_one_graph(build) -> None:
    model = _with_alibi(build, num_hidden_layers=1)
    ids = tokens(length=20)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = model(ids, use_cache=False) if build is gpt2 else model(ids)
        found = compiled(ids, use_cache=False) if build is gpt2 else compiled(ids)
    assert largest(found.logits, expected.logits) < _LIMIT


def test_mixed_precision_is_near() -> None:
    model = _with_alibi(gpt2)
    ids = tokens()
    expected = model(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        found = model(ids, labels=ids)
    found.loss.backward()
    difference = (found.logits - expected).detach()
    assert float(difference.norm() / expected.detach().norm()) < 0.03


@pytest.mark.parametrize("build", DECODERS)
@pytest.mark.filterwarnings("ignore:.*output_attentions.*:UserWarning")
def test_attention_weights_are_returned(build) -> None:
    model = _with_alibi(build)
    ids = tokens(length=20)
    with torch.no_grad():
        found = model(ids, output_attentions=True)
        expected = model(ids)
    assert len(found.attentions) == 2
    for weights in found.attentions:
        assert weights.shape == (2, 4, 20, 20)
        assert largest(weights.sum(-1), torch.ones(2, 4, 20)) < 1e-5
        assert float(weights.triu(1).abs().max()) == 0.0
    assert largest(found.logits, expected.logits) < _LIMIT
    assert model(ids).attentions is None


@needs_5
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Of torch's own compiler.
def test_flex_attention() -> None:
    model = llama(attn_implementation="flex_attention")
    apply_alibi(model)
    assert model.config._attn_implementation == "alibi_flex"
    ids = tokens(length=20)
    padded = torch.cat([torch.ones(2, 5, dtype=torch.long), ids], 1)
    with torch.no_grad():
        found = model(ids).logits
        short = model(padded, attention_mask=padded.ne(1).long()).logits[:, 5:]
        first = model(ids[:, :12], use_cache=True)
        rest = model(ids[:, 12:], past_key_values=first.past_key_values).logits
        model.set_attn_implementation("alibi")
        expected = model(ids).logits
    assert largest(found, expected) < _LIMIT
    assert largest(short, expected) < _LIMIT
    assert largest(torch.cat([first.logits, rest], 1), expected) < _LIMIT


# ---- decoders made of BERT, and cross attention ----


@needs_5
def test_a_decoder_of_bert_steps_by_one_token() -> None:
    model = bert("BertLMHeadModel", is_decoder=True)
    apply_alibi(model)
    ids = tokens(length=20)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        first = model(ids[:, :19], use_cache=True)
        step = model(ids[:, 19:], past_key_values=first.past_key_values).logits
    assert step.shape[1] == 1
    assert largest(step, expected[:, 19:]) < _LIMIT


def test_cross_attention_is_left_alone_unless_asked_for() -> None:
    encoded = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    ids = tokens(length=12)
    outputs = []
    for asked, changed in ((False, 2), (True, 4)):
        model = gpt2(add_cross_attention=True)
        assert apply_alibi(model, cross_attention=asked) == changed
        with torch.no_grad():
            whole = model(ids, encoder_hidden_states=encoded).logits
            first = model(ids[:, :7], encoder_hidden_states=encoded, use_cache=True)
            rest = model(
                ids[:, 7:], encoder_hidden_states=encoded, past_key_values=first.past_key_values
            ).logits
        assert largest(torch.cat([first.logits, rest], 1), whole) < _LIMIT
        outputs.append(whole)
        cross = model.transformer.h[0].crossattention
        assert (cross in biases_of(model)) == asked
    assert largest(*outputs) > 0.01
