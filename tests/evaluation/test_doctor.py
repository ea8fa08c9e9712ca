"""Every check passes for every sound model, and catches the fault it is there for."""

from __future__ import annotations

import functools
import types

import pytest
import torch
from tiny_lm import some_tokens, tiny_lm

from fairseq.attention import BIDIRECTIONAL, LinearBias, MaskRule, ZeroBias
from fairseq.attention.backends.reference import ReferenceBackend
from fairseq.attention.bias import position_tensor
from fairseq.evaluation.doctor import CHECKS, FAIL, PASS, SKIP, Patient, examine
from fairseq.positions import METHODS


def outcome(model, stored="alibi", **given):
    """Returns the status of each check by name."""
    patient = Patient(model, some_tokens(3, 24), some_tokens(1, 520, seed=1), stored, **given)
    return {finding.name: finding.status for finding in examine(patient)}


def failures(model, stored="alibi", **given):
    return {name for name, status in outcome(model, stored, **given).items() if status == FAIL}


@pytest.mark.parametrize("method", METHODS)
def test_no_check_fails_for_a_sound_model(method):
    found = outcome(tiny_lm(method), method, train_length=32)
    assert list(found) == list(CHECKS)
    assert FAIL not in found.values()
    # What can be checked of this method is checked.
    skipped = {name for name, status in found.items() if status == SKIP}
    expected = set() if method == "alibi" else {"slopes are the method's"}
    if method in ("sinusoidal", "learned", "fire"):
        expected.add("only distances count")
    if method == "none":
        expected.add("method changes the output")
    assert skipped == expected


@pytest.mark.parametrize(
    "settings",
    [
        {"adaptive_softmax_cutoff": "20,40"},
        {"alibi_learned_slopes": True},
        {"alibi_interpolation": "ntk"},
        {"alibi_bias_max": 4.0},
        {"decoder_normalize_before": False, "activation_fn": "relu"},
        {"attention_backend": "reference"},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_no_check_fails_for_other_settings(settings):
    bias_max = settings.get("alibi_bias_max", 8.0)
    assert not failures(tiny_lm(**settings), train_length=32, bias_max=bias_max)


def test_slopes_that_are_interpolated_at_every_length():
    model = tiny_lm(alibi_interpolation="linear", alibi_interpolation_factor=2.0)
    assert not failures(model, train_length=32, interpolation=("linear", 2.0))
    assert failures(model, train_length=32) == {"slopes are the method's"}


def test_another_method_than_the_stored_one():
    assert failures(tiny_lm("sinusoidal")) == {"stored method is in effect"}
    assert not failures(tiny_lm("sinusoidal"), is_certain=False)


def test_a_parameter_that_is_no_number():
    model = tiny_lm()
    with torch.no_grad():
        model.decoder.layers[1].fc1.weight[3, 2] = torch.nan
    found = outcome(model)
    assert found["parameters are finite"] == FAIL
    # What is not a number proves nothing.
    assert PASS not in {found[name] for name in CHECKS if "agrees" in name or "equal" in name}


def replace_prepare(model, change):
    """Lets `change` alter what the decoder hands to its backend; returns the model."""
    original = model.decoder.backend.prepare

    def prepare(bias, query, key, **options):
        return original(*change(bias, query, key, options), **options)

    model.decoder.backend.prepare = prepare
    return model


def test_a_bias_that_is_dropped_with_a_cache():
    # As in the original: incremental decoding has no bias at all.
    def change(bias, query, key, options):
        return (ZeroBias(4) if len(query) < len(key) else bias), query, key

    assert failures(replace_prepare(tiny_lm(), change)) == {"cached decoding equals uncached"}


def test_a_cache_that_counts_positions_anew():
    def change(bias, query, key, options):
        return bias, range(len(query)), key

    found = failures(replace_prepare(tiny_lm(), change))
    assert "cached decoding equals uncached" in found


def test_a_bias_that_never_arrives():
    # As where a library changed its attention and nobody noticed.
    def change(bias, query, key, options):
        return ZeroBias(4), query, key

    found = failures(replace_prepare(tiny_lm(), change))
    assert {
        "method changes the output",
        "order comes from the method",
        "slopes are the method's",
        "attention equals its formula",
    } <= found


def test_embeddings_and_rotations_that_never_arrive():
    for method, hook in (("sinusoidal", "embed"), ("learned", "embed"), ("rotary", "rotate")):
        model = tiny_lm(method)
        if hook == "embed":
            model.decoder.embed = types.MethodType(_embed_without_positions, model.decoder)
        else:
            model.decoder.prepare_attention = functools.partial(
                _prepare_without_rotation, model.decoder, model.decoder.prepare_attention
            )
        found = failures(model, method)
        assert {"method changes the output", "order comes from the method"} <= found, method


def _embed_without_positions(decoder, tokens, columns):
    return decoder.embed_scale * decoder.embed_tokens(tokens[:, columns.start : columns.stop])


def _prepare_without_rotation(decoder, prepare, *args, **options):
    prepared = prepare(*args, **options)
    prepared.rotate = lambda q, k: (q, k)
    return prepared


def test_no_mask():
    def change(bias, query, key, options):
        options["rule"] = BIDIRECTIONAL
        return bias, query, key

    found = failures(replace_prepare(tiny_lm(), change))
    assert {"no token sees a later one", "cached decoding equals uncached"} <= found


def test_a_bias_that_depends_on_the_batch():
    # As where a mask is made for max_tokens // length rows of slopes and cut by the batch.
    model = tiny_lm(attention_backend="sdpa")
    original = model.decoder.prepare_attention

    def prepare(x, *args, **options):
        prepared = original(x, *args, **options)
        if x.size(0) > 1:
            prepared.mask = prepared.mask.roll(1, dims=-3)
        return prepared

    model.decoder.prepare_attention = prepare
    found = failures(model)
    assert "batch size does not matter" in found


def test_wrong_slopes():
    model = tiny_lm()
    plain = [2.0 ** (-8 * (head + 1) / 6) for head in range(6)]  # not the rule for 6 heads
    model = tiny_lm(decoder_attention_heads=6, decoder_embed_dim=48)
    model.decoder.positions._bias = LinearBias(plain)
    assert failures(model) == {"slopes are the method's"}
    assert failures(tiny_lm(), bias_max=16.0) == {"slopes are the method's"}


class Absolute(LinearBias):
    """slope * key position: equal by the softmax, but large."""

    def dense(self, query_positions, key_positions, *, device=None):
        key = position_tensor(key_positions, device)
        zeros = position_tensor(query_positions, device).unsqueeze(-1) * 0
        return self.slopes.view(-1, 1, 1) * (key + zeros)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_an_absolute_bias_in_half_precision(backend):
    model = tiny_lm(attention_backend=backend)
    model.decoder.positions._bias = Absolute(model.decoder.positions._bias.slopes)
    found = failures(model)
    assert "bfloat16 agrees with float32" in found
    # Full-context attention needs the distance itself; all else is right in float32.
    assert found <= {
        "bfloat16 agrees with float32",
        "float16 agrees with float32",
        "order comes from the method",
    }
    # The fused kernel adds in float32, where slope * position was a number of float16.
    assert ("float16 agrees with float32" in found) == (backend == "reference")


def test_padding_that_is_seen():
    def change(bias, query, key, options):
        options["key_is_padding"] = None
        return bias, query, key

    found = failures(replace_prepare(tiny_lm(), change))
    assert found == {"padding left does not matter"}


def test_positions_that_count_padding():
    model = tiny_lm("sinusoidal")
    channel = torch.eye(32)[0]

    def embed(x, tokens, documents=None, columns=None):
        columns = torch.arange(tokens.size(1) - x.size(1), tokens.size(1))
        return x + (columns.sin().view(1, -1, 1) * channel).to(x.dtype)

    model.decoder.positions.embed = embed
    assert failures(model, "sinusoidal") == {"padding left does not matter"}


def test_padding_on_the_right_that_shifts_positions():
    model = tiny_lm()
    original = model.decoder.extract_features

    def aligned_to_the_right(tokens, **options):
        x, extra = original(tokens, **options)
        num_padding = tokens.eq(1).sum(1)
        return torch.stack([r.roll(int(n), 0) for r, n in zip(x, num_padding, strict=True)]), extra

    model.decoder.extract_features = aligned_to_the_right
    assert "padding right does not matter" in failures(model)


def test_a_window_that_cuts_long_inputs():
    def change(bias, query, key, options):
        if len(key) > 40:
            options["rule"] = MaskRule(window=2)
        return bias, query, key

    model = replace_prepare(tiny_lm(), change)
    assert "longer than in training" in failures(model, train_length=32)


def test_positions_that_count_from_the_first_token():
    class FromTheStart(LinearBias):
        def dense(self, query_positions, key_positions, *, device=None):
            far = super().dense(query_positions, key_positions, device=device)
            return far * position_tensor(query_positions, device).view(1, -1, 1)

    model = tiny_lm()
    model.decoder.positions._bias = FromTheStart([0.1, 0.05, 0.02, 0.01])
    assert "only distances count" in failures(model)


def test_a_table_that_does_not_end():
    model = tiny_lm("learned")
    table = model.decoder.embed_positions
    table.lookup = lambda rows: table.weight[rows.clamp(max=len(table.weight) - 1)]
    assert failures(model, "learned") == {"longer than in training"}


def test_a_crash_is_a_failure_with_its_reason():
    model = tiny_lm()
    model.decoder.backend = Crashing()
    patient = Patient(model, some_tokens(3, 24), some_tokens(1, 520), "alibi")
    found = {finding.name: finding for finding in examine(patient)}
    crashed = found["cached decoding equals uncached"]
    assert crashed.status == FAIL
    assert "NotImplementedError: no cache here" in crashed.text


class Crashing(ReferenceBackend):
    def prepare_request(self, request):
        if len(request.query_positions) < len(request.key_positions):
            raise NotImplementedError("no cache here")
        return super().prepare_request(request)
