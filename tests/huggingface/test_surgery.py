"""What apply_alibi changes in models and optimizers, and what it leaves alone."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers
from tiny_transformers import (
    DECODERS,
    ENCODERS,
    LENGTH,
    bert,
    gpt2,
    largest,
    llama,
    needs_5,
    roberta,
    tokens,
)
from torch import nn

from fairseq.huggingface import apply_alibi, is_alibi
from fairseq.huggingface import probe as probing
from fairseq.huggingface.bias import ScoreBias


@pytest.mark.parametrize("build", DECODERS + ENCODERS)
def test_reads_more_than_the_table_had(build) -> None:
    model = build()
    assert not is_alibi(model)
    assert apply_alibi(model) == 2
    assert is_alibi(model)
    with torch.no_grad():
        long = model(tokens(length=12 * LENGTH)).logits
    assert long.shape[1] == 12 * LENGTH and bool(long.isfinite().all())


@pytest.mark.parametrize("build", DECODERS + ENCODERS)
def test_order_matters_and_only_distances_count(build) -> None:
    model = build()
    apply_alibi(model)
    ids = tokens(length=20)
    places = torch.arange(20)[None]
    with torch.no_grad():
        plain = model(ids).logits
        order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
        turned = model(ids[:, order]).logits[:, order.argsort()]
        moved = model(ids, position_ids=places + 1000).logits
    assert largest(plain, turned) > 0.01
    assert largest(plain, moved) < 1e-4


@pytest.mark.parametrize("build", [gpt2, pytest.param(bert, marks=needs_5)])
def test_applied_twice_is_applied_once(build) -> None:
    model = build()
    apply_alibi(model, 64)
    expected = model(tokens()).logits
    assert apply_alibi(model, 128) == 2
    assert torch.equal(model(tokens()).logits, expected)


@pytest.mark.parametrize("kind", ["GPT2Model", "GPT2LMHeadModel", "GPT2ForSequenceClassification"])
def test_the_root_itself_loses_its_table(kind) -> None:
    model = gpt2(kind)
    apply_alibi(model)
    assert not [name for name, _ in model.named_parameters() if "wpe" in name]


@needs_5
@pytest.mark.parametrize("head", ["ForMaskedLM", "ForSequenceClassification", "Model"])
@pytest.mark.parametrize("build", [bert, roberta])
def test_token_types_have_no_length(build, head) -> None:
    family = "Bert" if build is bert else "Roberta"
    model = build(f"{family}{head}")
    apply_alibi(model)
    ids = tokens(length=200)
    with torch.no_grad():
        found = model(ids)[0]
        told = model(ids, token_type_ids=torch.zeros_like(ids))[0]
    assert torch.equal(found, told)


@needs_5
def test_roberta_with_padding_reads_to_any_length() -> None:
    model = roberta()
    apply_alibi(model, LENGTH)
    ids = tokens(length=LENGTH)
    padded = torch.cat([ids, torch.ones_like(ids)], 1)
    with torch.no_grad():
        found = model(padded, attention_mask=padded.ne(1).long()).logits[:, :LENGTH]
        alone = model(ids).logits
    assert largest(found, alone) < 1e-4


@needs_5
def test_tied_weights_stay_tied_and_trained() -> None:
    model = bert().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    apply_alibi(model, optimizers=optimizer)
    words = model.bert.embeddings.word_embeddings.weight
    assert model.cls.predictions.decoder.weight is words
    assert any(parameter is words for parameter in optimizer.param_groups[0]["params"])
    before = words.detach().clone()
    model(tokens(), labels=tokens(seed=1)).loss.backward()
    optimizer.step()
    assert not torch.equal(words, before)


def _groups(model: nn.Module) -> list[dict[str, object]]:
    decayed = [p for p in model.parameters() if p.dim() > 1]
    return [
        {"params": decayed, "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]


@pytest.mark.parametrize("build", [gpt2, pytest.param(bert, marks=needs_5)])
def test_optimizers_lose_the_table_and_nothing_else(build) -> None:
    model = build().train()
    first = torch.optim.AdamW(_groups(model), lr=1e-3)
    second = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    ids = tokens(length=8)
    model(ids, labels=ids).loss.backward()
    for optimizer in (first, second):
        optimizer.step()
    everything = dict(model.named_parameters())
    states = {name: copy.deepcopy(first.state[p]) for name, p in everything.items()}
    apply_alibi(model, optimizers=[first, second])
    left = dict(model.named_parameters())
    removed = set(everything) - set(left)
    assert len(removed) == 1
    for optimizer in (first, second):
        held = [p for group in optimizer.param_groups for p in group["params"]]
        assert {id(p) for p in held} == {id(p) for p in left.values()}
        assert {id(p) for p in optimizer.state} <= {id(p) for p in left.values()}
    assert [group["weight_decay"] for group in first.param_groups] == [0.1, 0.0]
    for name, parameter in left.items():
        for key, value in states[name].items():
            assert torch.equal(first.state[parameter][key], value)
    model(ids, labels=ids).loss.backward()
    first.step()


def test_a_table_in_a_group_of_its_own() -> None:
    model = gpt2()
    rest = [p for p in model.parameters() if p is not model.transformer.wpe.weight]
    optimizer = torch.optim.AdamW([{"params": rest}, {"params": [model.transformer.wpe.weight]}])
    apply_alibi(model, optimizers=optimizer)
    assert [len(group["params"]) for group in optimizer.param_groups] == [len(rest), 0]
    model(tokens(), labels=tokens()).loss.backward()
    optimizer.step()


def test_nothing_of_it_is_in_the_state_dict() -> None:
    model = gpt2()
    before = set(model.state_dict())
    apply_alibi(model)
    assert before - set(model.state_dict()) == {"transformer.wpe.weight"}
    assert set(model.state_dict()) <= before


def test_copies_and_pickles_keep_it() -> None:
    model = gpt2()
    apply_alibi(model)
    expected = model(tokens()).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert is_alibi(other)
        assert torch.equal(other(tokens()).logits, expected)


def test_training_flags_and_random_numbers_stay() -> None:
    model = gpt2().train()
    model.transformer.h[0].eval()
    flags = [module.training for module in model.modules()]
    flags.pop([name for name, _ in model.named_modules()].index("transformer.wpe"))
    state = torch.get_rng_state()
    apply_alibi(model)
    names = [name for name, _ in model.named_modules()]
    now = [module.training for module in model.modules()]
    now.pop(names.index("transformer.wpe"))
    assert now == flags
    assert torch.equal(torch.get_rng_state(), state)


# ---- variants ----


@needs_5
@pytest.mark.parametrize("variant", ["symmetric", "split_heads", "two_slopes"])
def test_variants_of_encoders(variant) -> None:
    model = bert(num_hidden_layers=1).double()
    apply_alibi(model, variant=variant, bias_max=4.0)
    ids = tokens(length=9)
    layer = model.bert.encoder.layer[0].attention.self
    caught = []
    layer.register_forward_hook(
        lambda m, args, kwargs, out: caught.append((args, kwargs, out)), with_kwargs=True
    )
    model(ids)
    (args, kwargs, output) = caught[0]
    hidden = args[0] if args else kwargs["hidden_states"]
    q, k, v = (
        linear(hidden).view(2, 9, 4, 8).transpose(1, 2)
        for linear in (layer.query, layer.key, layer.value)
    )
    scores = q @ k.mT / 8**0.5
    for h in range(4):
        for i in range(9):
            for j in range(9):
                scores[:, h, i, j] += _term(variant, h, i, j)
    expected = (scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 9, 32)
    assert largest(output[0], expected) < 1e-6


def _term(variant: str, h: int, i: int, j: int) -> float:
    slope = 2.0 ** -(h + 1)  # Of 4 heads with bias_max 4.
    if variant == "split_heads":
        slope = 2.0 ** -(2 * (h % 2) + 2)  # Two heads for each side, ending at the same slope.
        if (j > i and h < 2) or (j < i and h >= 2):
            return float("-inf")
    if variant == "two_slopes" and j > i:
        slope *= 2.0**-0.5
    return -slope * abs(i - j)


def test_interpolation_shrinks_slopes_beyond_the_training_length() -> None:
    plain, scaled, fixed = gpt2(), gpt2(), gpt2()
    apply_alibi(plain, bias_max=9.0)
    apply_alibi(scaled, interpolation={"type": "linear", "train_seq_len": 10})
    apply_alibi(fixed, interpolation={"type": "linear", "factor": 2.0})
    ids = tokens(length=20)
    expected = fixed(ids).logits
    assert largest(scaled(ids).logits, expected) < 1e-6
    assert largest(scaled(ids[:, :10]).logits, fixed(ids[:, :10]).logits) > 0.01
    model = gpt2(num_attention_heads=1, num_hidden_layers=1)
    apply_alibi(model, interpolation={"type": "linear", "factor": 2.0})
    other = gpt2(num_attention_heads=1, num_hidden_layers=1)
    apply_alibi(other, bias_max=9.0)  # Half of 2**-8 is 2**-9.
    assert largest(model(ids).logits, other(ids).logits) < 1e-6


# ---- refusals ----


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("Bloom", {"hidden_size": 16, "n_layer": 1, "n_head": 2}),
        ("Mpt", {"d_model": 16, "n_heads": 2, "n_layers": 1}),
        ("Falcon", {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}),
    ],
)
def test_models_with_an_alibi_of_their_own(kind, config) -> None:
    config = getattr(transformers, f"{kind}Config")(vocab_size=20, **config)
    model = getattr(transformers, f"{kind}Model")(config)
    with pytest.raises(ValueError, match="has an ALiBi of its own"):
        apply_alibi(model)


def test_models_that_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match=r"no attention that can be changed.*policy_registry"):
        apply_alibi(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="part of a model"):
        apply_alibi(gpt2().transformer.h)
    with pytest.raises(TypeError, match=r"give a torch\.nn\.Module"):
        apply_alibi("gpt2")


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"max_sequence_length": 0}, ValueError, "at least 1"),
        ({"max_sequence_length": "64"}, TypeError, "max_sequence_length"),
        ({"variant": "rotary"}, ValueError, "it can be causal"),
        ({"variant": "symmetric"}, ValueError, "attention is causal"),
        ({"bias_max": -1.0}, ValueError, "above 0"),
        ({"interpolation": "linear"}, TypeError, "mapping"),
        ({"interpolation": {"type": "linear"}}, ValueError, "training length"),
        ({"interpolation": {"kind": "linear"}}, ValueError, "it can have type"),
        ({"optimizers": ["adam"]}, TypeError, "optimizers"),
    ],
)
def test_arguments_are_checked_before_anything_changes(arguments, error, text) -> None:
    model = gpt2()
    names = set(model.state_dict())
    with pytest.raises(error, match=text):
        apply_alibi(model, **arguments)
    assert set(model.state_dict()) == names
    assert model.config._attn_implementation == "sdpa"


# ---- never silent ----


def _is_untouched(model, before) -> bool:
    return (
        all(a is b for a, b in zip(model.parameters(), before, strict=True))
        and model.config._attn_implementation == "sdpa"
        and not hasattr(model.config, "fairseq_alibi")
        and not is_alibi(model)
    )


@pytest.mark.parametrize("build", [gpt2, llama])
def test_a_bias_that_does_not_reach_the_scores_is_an_error(build, monkeypatch) -> None:
    model = build()
    before = list(model.parameters())
    expected = model(tokens(length=LENGTH)).logits
    monkeypatch.setattr(ScoreBias, "additive_mask", lambda self, q, k, mask, **_: mask)
    with pytest.raises(RuntimeError, match="bias changes the output"):
        apply_alibi(model)
    assert _is_untouched(model, before)
    assert torch.equal(model(tokens(length=LENGTH)).logits, expected)


def test_attention_that_is_never_asked_is_an_error(monkeypatch) -> None:
    model = gpt2()
    before = list(model.parameters())
    block = model.transformer.h[1]
    block.forward = lambda hidden, *args, **kwargs: hidden
    with pytest.raises(RuntimeError, match="1 of 2 modules"):
        apply_alibi(model)
    assert _is_untouched(model, before)


@pytest.mark.parametrize(("build", "left"), [(gpt2, "_TABLES"), (llama, "NoRotation")])
def test_positions_that_are_left_are_an_error(build, left, monkeypatch) -> None:
    from fairseq.huggingface import surgery

    model = build(max_position_embeddings=64)
    before = list(model.parameters())
    given = () if left == "_TABLES" else (lambda rotary, config: rotary)
    monkeypatch.setattr(surgery, left, given)
    with pytest.raises(RuntimeError, match="tells positions"):
        apply_alibi(model)
    assert _is_untouched(model, before)


def _compute_by(model, name: str) -> None:
    if hasattr(model, "set_attn_implementation"):  # Since transformers 4.54.
        model.set_attn_implementation(name)
    else:
        model.config._attn_implementation = name


@pytest.mark.parametrize("build", [gpt2, llama])
def test_another_implementation_later_is_an_error(build) -> None:
    model = build()
    apply_alibi(model)
    _compute_by(model, "sdpa")
    assert not is_alibi(model)
    with pytest.raises(RuntimeError, match="without ALiBi"):
        model(tokens())
    _compute_by(model, "alibi_eager")
    assert is_alibi(model)
    model(tokens())


def test_probe_leaves_full_strength() -> None:
    model = gpt2()
    apply_alibi(model)
    assert all(bias.strength == 1.0 for bias in probing.biases_of(model).values())
