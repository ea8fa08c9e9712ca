"""A step with a cache equals the full pass; beams in any order; keys that are forgotten."""

import itertools
import math

import pytest
import torch
from toy_models import tiny_lm

from fairseq.modules.key_value_cache import KeyValueCache, WindowedCache, window_of
from fairseq.positions import METHODS

PAD = 1
LENGTH = 21
METHOD_CASES = [
    *((name, {}) for name in METHODS),
    ("alibi", {"alibi_interpolation": "linear"}),
    ("alibi", {"alibi_interpolation": "ntk"}),
    ("alibi", {"alibi_learned_slopes": True}),
    ("rotary", {"rotary_scaling": "linear"}),
    ("rotary", {"rotary_scaling": "ntk"}),
    ("rotary", {"rotary_scaling": "yarn"}),
]


def model_of(method, **given):
    torch.manual_seed(3)
    options = {
        "decoder_layers": 2,
        "decoder_embed_dim": 32,
        "decoder_input_dim": 32,
        "decoder_output_dim": 32,
        "decoder_ffn_embed_dim": 48,
        "decoder_attention_heads": 4,
        "tokens_per_sample": 12,
        "max_target_positions": 64,
        "position_method": method,
        "decoder_normalize_before": True,
    }
    model = tiny_lm(50, **{**options, **given}).eval()
    for parameter in model.parameters():  # far from uniform attention
        if parameter.dim() == 2:
            parameter.data.mul_(1.7)
    return model


def rows_padded(side):
    torch.manual_seed(5)
    tokens = torch.randint(4, 50, (4, LENGTH))
    for row, count in enumerate((0, 3, 7, 2)):
        if side == "left":
            tokens[row, :count] = PAD
        elif side == "right" and count:
            tokens[row, -count:] = PAD
    return tokens


def last_step(model, tokens, ends, order=None, at=None):
    """Yields (end, features of the tokens before it) of reading `tokens` up to each end."""
    state, start = {}, 0
    for end in ends:
        features, _ = model.decoder.extract_features(
            tokens[:, :end], incremental_state=state, sequence_length=LENGTH
        )
        yield start, end, features
        start = end
        if order is not None and end == at:
            model.decoder.reorder_incremental_state(state, order)
            tokens = tokens[order]


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize(
    ("method", "options"), METHOD_CASES, ids=lambda value: str(value).replace("'", "")
)
def test_steps_equal_the_full_pass(method, options, side):
    model = model_of(method, **options)
    tokens = rows_padded(side)
    is_token = tokens.ne(PAD)
    with torch.inference_mode():
        full, _ = model.decoder.extract_features(tokens, sequence_length=LENGTH)
        for ends in (range(1, LENGTH + 1), (9, 10, 11, 17, LENGTH)):
            for start, end, features in last_step(model, tokens, ends):
                own = is_token[:, start:end]
                error = (features - full[:, start:end])[own].abs().max() if own.any() else 0
                assert error < 1e-5


@pytest.mark.parametrize(
    ("method", "options"), METHOD_CASES, ids=lambda value: str(value).replace("'", "")
)
def test_beams_are_reordered(method, options):
    """Rows that swap, double and vanish go on as if they had been read so from the start."""
    model = model_of(method, **options)
    tokens, order = rows_padded("left"), torch.tensor([2, 0, 0, 3, 2, 2])
    with torch.inference_mode():
        found = list(last_step(model, tokens, range(8, LENGTH + 1), order, at=14))[-1][2]
        full, _ = model.decoder.extract_features(tokens[order], sequence_length=LENGTH)
        assert (found[:, -1] - full[:, -1]).abs().max() < 1e-5


def test_joined_projections_change_nothing():
    model = model_of("alibi")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tokens = rows_padded("left")
    with torch.inference_mode():
        expected, _ = model.decoder.extract_features(tokens)
        for layer in model.decoder.layers:
            layer.self_attn.join_projections()
        found, _ = model.decoder.extract_features(tokens)
        step = list(last_step(model, tokens, range(1, LENGTH + 1)))[-1][2]
    assert torch.allclose(found, expected, atol=1e-6)
    assert torch.allclose(step[:, 0], expected[:, -1], atol=1e-5)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    halves = {n: t if n.endswith("version") else t * 0.5 for n, t in before.items()}
    # What is loaded, or changed in type, counts.
    model.load_state_dict(halves)
    halved = model_of("alibi")
    halved.load_state_dict(halves)
    with torch.inference_mode():
        found, expected = (m.decoder.extract_features(tokens)[0] for m in (model, halved))
        assert torch.allclose(found, expected, atol=1e-6)
        assert model.double().decoder.extract_features(tokens)[0].dtype == torch.float64


def test_gradients_flow_through_steps():
    model = model_of("alibi")
    tokens = rows_padded("none")
    state, total = {}, 0.0
    for end in (8, 9, LENGTH):
        features, _ = model.decoder.extract_features(tokens[:, :end], incremental_state=state)
        total = total + features.sum()
    total.backward()
    found = model.decoder.layers[0].self_attn.k_proj.weight.grad
    model.zero_grad()
    model.decoder.extract_features(tokens)[0].sum().backward()
    expected = model.decoder.layers[0].self_attn.k_proj.weight.grad
    assert torch.allclose(found, expected, atol=1e-4)


def test_buffers_grow_and_are_cut():
    cache = KeyValueCache()
    keys = torch.arange(200.0).view(1, 1, 200, 1).expand(2, 3, 200, 4)
    with torch.no_grad():
        for start, end in itertools.pairwise((0, 5, 6, 70, 71, 150, 200)):
            k, v = cache.append(keys[:, :, start:end], -keys[:, :, start:end])
            assert torch.equal(k, keys[:, :, :end]) and torch.equal(v, -keys[:, :, :end])
        cache.keep_last(30)
        assert (cache.num_tokens, cache.num_kept) == (200, 30)
        k, _ = cache.append(keys[:, :, :1], keys[:, :, :1])
        assert k[0, 0, :, 0].tolist() == [*range(170, 200), 0]
        cache.reorder(torch.tensor([1, 1, 0]))
        assert cache["prev_key"].shape == (3, 3, 31, 4)


@pytest.mark.parametrize("slope", [0.5, 0.0625, 2**-8])
@pytest.mark.parametrize("score", [0.0, 3.0])
@pytest.mark.parametrize("error", [1e-2, 1e-6])
def test_the_window_bounds_what_is_lost(slope, score, error):
    """The worst case: the query's own key scores -R, every key beyond the window R."""
    window = window_of(slope, score, error)
    far = torch.arange(window, window + 40_000, dtype=torch.float64)
    near = torch.arange(1, window, dtype=torch.float64)
    lost = (score - slope * far).exp().sum()
    for others in (0.0, float((-score - slope * near).exp().sum())):
        assert lost / (math.exp(-score) + lost + others) < error
    # It is no wider than the formula says.
    exact = (2 * score + math.log(1 / (error * (1 - math.exp(-slope))))) / slope
    assert window == max(1, math.ceil(exact))


def alibi_model(heads=4):
    return model_of("alibi", decoder_attention_heads=heads, alibi_bias_max=4.0, decoder_layers=2)


def windowed_run(model, tokens, error, prompt):
    """Returns (features of each step, caches)."""
    state, found = {}, []
    caches = model.decoder.forget_far_keys(state, error)
    for end in range(prompt, tokens.size(1) + 1):
        features, _ = model.decoder.extract_features(tokens[:, :end], incremental_state=state)
        found.append(features[:, -1])
    return torch.stack(found, dim=1), caches


@pytest.mark.parametrize("padded", [False, True])
def test_what_is_forgotten_does_not_matter(padded):
    torch.manual_seed(1)
    model = alibi_model()
    tokens = torch.randint(4, 50, (2, 600))
    if padded:
        tokens[1, :9] = PAD
    with torch.inference_mode():
        full, _ = model.decoder.extract_features(tokens)
        found, caches = windowed_run(model, tokens, 1e-6, 20)
    assert (found - full[:, 19:]).abs().max() < 1e-4
    # Scores that grow later loosen the bound of what is gone already.
    assert all(0 < cache.largest_error < 1e-3 for cache in caches)
    # Memory: twice a head's window at most, for the largest scores so far.
    for cache in caches:
        pairs = zip(cache._longest_query, cache._longest_key, strict=True)
        windows = [
            window_of(slope, q * k * cache._scale, 1e-6)
            for slope, (q, k) in zip(cache.slopes, pairs, strict=True)
        ]
        assert cache.num_kept <= sum(min(2 * window + 1, 600) for window in windows)
        assert cache.num_kept < 4 * 600


def test_a_large_error_is_seen_and_bounded():
    """With a bound so loose that it shows, a layer's output moves by less than it allows."""
    torch.manual_seed(1)
    model = model_of("alibi", decoder_attention_heads=4, alibi_bias_max=1.0, decoder_layers=1)
    tokens = torch.randint(4, 50, (2, 400))
    attention = model.decoder.layers[0].self_attn
    attention.q_proj.weight.data *= 0.1  # near windows
    values = {}
    attention.v_proj.register_forward_hook(lambda m, i, o: values.setdefault("all", []).append(o))
    outputs = []
    attention.out_proj.register_forward_pre_hook(lambda m, i: outputs.append(i[0][:, -1]))
    with torch.inference_mode():
        _, caches = windowed_run(model, tokens, 0.2, 20)
        forgetful, outputs[:] = torch.stack(outputs, 1), []
        state = {}
        for end in range(20, 401):
            model.decoder.extract_features(tokens[:, :end], incremental_state=state)
        whole = torch.stack(outputs, 1)
    largest = torch.cat(values["all"], dim=1).abs().max()
    error = max(cache.largest_error for cache in caches)
    assert 0 < error <= 0.3
    difference = (forgetful - whole).abs().max()
    assert 0 < difference <= 2 * error * largest


def test_scores_that_grow_later_are_told(monkeypatch):
    cache = WindowedCache(torch.tensor([0.5]), 1e-3)
    q, k = torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2)
    for _ in range(100):
        cache._measure(q, k)
        cache._forget(0, cache._heads[0])
        cache._heads[0].append(k, k)
        cache.num_tokens += 1
    assert 0 < cache.largest_error <= 1e-3
    cache._measure(q + 5, k + 5)
    cache._forget(0, cache._heads[0])
    assert cache.largest_error > 1e-3


@pytest.mark.parametrize(
    ("method", "error", "message"),
    [
        ("rotary", 1e-3, "--cache-error needs --position-method alibi"),
        ("t5", 1e-3, "--cache-error needs --position-method alibi"),
        ("alibi", 0.0, "must be above 0"),
    ],
)
def test_where_keys_cannot_be_forgotten(method, error, message):
    with pytest.raises(ValueError, match=message):
        model_of(method).decoder.forget_far_keys({}, error)
