"""The encoder-decoder transformer against its formulas, and against itself in other batches."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from tiny_translation import settings, tiny_transformer, tokens_of

from fairseq.models.encoder_decoder import EncoderOut
from fairseq.positions.encoders import ENCODER_VARIANTS
from fairseq.registry import ARCHITECTURES

CROSS_BIASES = ["none", "aligned", "continued"]
METHODS = ["alibi", "sinusoidal", "learned", "rotary", "t5", "alibi-log", "kerple-log", "sandwich"]


# ---- one pass in float64, from the formulas ----


def slopes(heads):
    """The published slopes for a power of two."""
    return [2 ** (-8 * (h + 1) / heads) for h in range(heads)]


def encoder_score(variant, heads, h, i, j):
    """What ALiBi adds to the score of query i and key j; None if the key is not seen."""
    if variant == "symmetric":
        return -slopes(heads)[h] * abs(i - j)
    if variant == "split":
        is_left = h < heads // 2
        if (is_left and j > i) or (not is_left and j < i):
            return None
        return -slopes(heads // 2)[h % (heads // 2)] * abs(i - j)
    slope = slopes(heads)[h] if j <= i else slopes(heads)[heads - 1 - h]
    return -slope * abs(i - j)


def cross_score(kind, heads, h, i, j, num_keys):
    if kind == "none":
        return 0.0
    place = i if kind == "aligned" else num_keys + i
    return -slopes(heads)[h] * abs(place - j)


def causal_score(heads, h, i, j):
    return None if j > i else -slopes(heads)[h] * (i - j)


def attention(state, name, queries, keys, heads, term):
    """One row: queries (T, D), keys (S, E); `term(h, i, j)` is added, None hides."""

    def project(x, part):
        return x @ state[f"{name}.{part}_proj.weight"].T + state[f"{name}.{part}_proj.bias"]

    q, k, v = project(queries, "q"), project(keys, "k"), project(keys, "v")
    width = q.size(1) // heads
    out = torch.zeros_like(q)
    for h, i in itertools.product(range(heads), range(len(q))):
        part = slice(h * width, (h + 1) * width)
        scores = torch.full((len(k),), -math.inf, dtype=torch.float64)
        for j in range(len(k)):
            added = term(h, i, j)
            if added is not None:
                scores[j] = q[i, part] @ k[j, part] / math.sqrt(width) + added
        out[i, part] = torch.softmax(scores, 0) @ v[:, part]
    return out @ state[f"{name}.out_proj.weight"].T + state[f"{name}.out_proj.bias"]


def layer_norm(state, name, x):
    centred = x - x.mean(-1, keepdim=True)
    scale = torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-5)
    return centred / scale * state[f"{name}.weight"] + state[f"{name}.bias"]


def feed_forward(state, name, x):
    inner = torch.relu(x @ state[f"{name}.fc1.weight"].T + state[f"{name}.fc1.bias"])
    return inner @ state[f"{name}.fc2.weight"].T + state[f"{name}.fc2.bias"]


def reference(model, source, target, *, variant, cross, pre_norm):
    """Returns logits (T, V) of one row."""
    state = {name: tensor.double() for name, tensor in model.state_dict().items()}
    heads = 4

    def part(x, norm, function):
        if pre_norm:
            return x + function(layer_norm(state, norm, x))
        return layer_norm(state, norm, x + function(x))

    x = state["encoder.embed_tokens.weight"][source] * math.sqrt(32)
    for n in range(2):
        name = f"encoder.layers.{n}"

        def see(y, name=name):
            return attention(
                state,
                f"{name}.self_attn",
                y,
                y,
                heads,
                lambda h, i, j: encoder_score(variant, heads, h, i, j),
            )

        x = part(x, f"{name}.self_attn_layer_norm", see)
        x = part(x, f"{name}.final_layer_norm", lambda y, name=name: feed_forward(state, name, y))
    memory = layer_norm(state, "encoder.layer_norm", x) if pre_norm else x

    x = state["decoder.embed_tokens.weight"][target] * math.sqrt(32)
    for n in range(2):
        name = f"decoder.layers.{n}"

        def look_back(y, name=name):
            return attention(
                state,
                f"{name}.self_attn",
                y,
                y,
                heads,
                lambda h, i, j: causal_score(heads, h, i, j),
            )

        def look_at_source(y, name=name):
            return attention(
                state,
                f"{name}.encoder_attn",
                y,
                memory,
                heads,
                lambda h, i, j: cross_score(cross, heads, h, i, j, len(source)),
            )

        x = part(x, f"{name}.self_attn_layer_norm", look_back)
        x = part(x, f"{name}.encoder_attn_layer_norm", look_at_source)
        x = part(x, f"{name}.final_layer_norm", lambda y, name=name: feed_forward(state, name, y))
    if pre_norm:
        x = layer_norm(state, "decoder.layer_norm", x)
    return x @ state["decoder.output_projection.weight"].T


@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("cross", CROSS_BIASES)
@pytest.mark.parametrize("variant", ENCODER_VARIANTS)
def test_a_pass_is_what_its_formulas_say(variant, cross, pre_norm):
    model = tiny_transformer(
        encoder_alibi_variant=variant,
        cross_attention_bias=cross,
        encoder_normalize_before=pre_norm,
        decoder_normalize_before=pre_norm,
    )
    source, target = tokens_of(2, 7), tokens_of(2, 5, seed=1, size=50)
    with torch.no_grad():
        found = model(source, None, target)[0]
    for row in range(2):
        expected = reference(
            model, source[row], target[row], variant=variant, cross=cross, pre_norm=pre_norm
        )
        torch.testing.assert_close(found[row].double(), expected, atol=2e-5, rtol=1e-5)


# ---- the same row in other batches ----


def padded(rows, length, *, left):
    batch = torch.full((len(rows), length), 1)
    for line, row in zip(batch, rows, strict=True):
        line[length - len(row) if left else 0 :][: len(row)] = row
    return batch


@pytest.mark.parametrize("left_target", [False, True])
@pytest.mark.parametrize("left_source", [False, True])
@pytest.mark.parametrize(
    ("method", "variant", "cross"),
    [
        *itertools.product(["alibi"], ENCODER_VARIANTS, CROSS_BIASES),
        *((method, "split", "none") for method in METHODS[1:]),
        ("sinusoidal", "split", "aligned"),
    ],
)
def test_padding_and_other_rows_change_nothing(method, variant, cross, left_source, left_target):
    model = tiny_transformer(
        position_method=method, encoder_alibi_variant=variant, cross_attention_bias=cross
    )
    sources = [tokens_of(n, seed=n) for n in (9, 4, 1)]
    targets = [tokens_of(n, seed=n, size=50) for n in (3, 8, 5)]
    batch = padded(sources, 11, left=left_source), padded(targets, 8, left=left_target)
    with torch.no_grad():
        together = model(batch[0], None, batch[1])[0]
        for row, (source, target) in enumerate(zip(sources, targets, strict=True)):
            alone = model(source[None], None, target[None])[0][0]
            found = together[row][batch[1][row] != 1]
            torch.testing.assert_close(found, alone, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("cross", CROSS_BIASES)
@pytest.mark.parametrize("method", METHODS)
def test_steps_with_a_cache_equal_the_whole_and_follow_a_new_order(method, cross):
    model = tiny_transformer(position_method=method, cross_attention_bias=cross)
    sources = padded([tokens_of(n, seed=n) for n in (6, 9, 2)], 9, left=True)
    target = tokens_of(3, 8, seed=4, size=50)
    order = torch.tensor([2, 0, 0, 1])
    state: dict = {}
    with torch.no_grad():
        whole = model(sources, None, target)[0]
        encoder_out = model.encoder(sources)
        first = model.decoder(target[:, :3], encoder_out=encoder_out, incremental_state=state)[0]
        model.decoder.reorder_incremental_state(state, order)
        encoder_out = model.encoder.reorder_encoder_out(encoder_out, order)
        target = target[order]
        rest = [
            model.decoder(target[:, :end], encoder_out=encoder_out, incremental_state=state)[0]
            for end in (4, 5, 8)
        ]
    assert [part.size(1) for part in rest] == [1, 1, 3]
    torch.testing.assert_close(first, whole[:, :3], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.cat(rest, 1), whole[order, 3:], atol=1e-5, rtol=1e-5)


def test_the_bias_is_prepared_once_for_each_attention(monkeypatch):
    model = tiny_transformer()
    calls = []
    backends = {
        "encoder": model.encoder.backend,
        "decoder": model.decoder.backend,
        "cross": model.decoder.cross_backend,
    }
    for name, backend in backends.items():
        original = backend.prepare

        def prepare(*args, name=name, original=original, **kwargs):
            calls.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(backend, "prepare", prepare)
    model(tokens_of(2, 6), None, tokens_of(2, 6))
    assert sorted(calls) == ["cross", "decoder", "encoder"]


def test_symmetric_alibi_alone_takes_a_sentence_for_its_reverse():
    """Left and right differ in nothing, so states come out reversed; the other variants differ."""
    source = tokens_of(1, 8)
    for variant in ENCODER_VARIANTS:
        encoder = tiny_transformer(encoder_alibi_variant=variant).encoder
        with torch.no_grad():
            forwards = encoder(source).encoder_out
            backwards = encoder(source.flip(1)).encoder_out.flip(1)
        is_same = torch.allclose(forwards, backwards, atol=1e-5)
        assert is_same == (variant == "symmetric")


def test_longer_sentences_than_the_limits_can_be_read():
    model = tiny_transformer(max_source_positions=8, max_target_positions=8)
    assert model.max_positions() == (8, 8)
    logits = model(tokens_of(1, 20), None, tokens_of(1, 15))[0]
    assert logits.shape == (1, 15, 50) and bool(logits.isfinite().all())


def test_gradients_reach_every_parameter():
    model = tiny_transformer(sizes=(40, 40), alibi_learned_slopes=True).train()
    model(tokens_of(2, 6), None, tokens_of(2, 5))[0].square().sum().backward()
    assert all(bool(param.grad.abs().sum() > 0) for param in model.parameters())


def test_recomputed_activations_give_the_same_gradients():
    gradients = []
    for checkpointed in (False, True):
        model = tiny_transformer(checkpoint_activations=checkpointed, dropout=0.3).train()
        torch.manual_seed(3)
        model(tokens_of(2, 6), None, tokens_of(2, 5))[0].square().sum().backward()
        gradients.append([param.grad for param in model.parameters()])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second, atol=0, rtol=0)


# ---- names, sizes, sharing ----


def upstream_names(pre_norm):
    """The names of upstream fairseq's TransformerModel, in its order."""

    def attention(name):
        for part in ("k_proj", "v_proj", "q_proj", "out_proj"):
            yield from (f"{name}.{part}.weight", f"{name}.{part}.bias")

    def both(name):
        yield from (f"{name}.weight", f"{name}.bias")

    for side in ("encoder", "decoder"):
        yield from (f"{side}.version", f"{side}.embed_tokens.weight")
        yield f"{side}.embed_positions._float_tensor"
        for n in range(2):
            layer = f"{side}.layers.{n}"
            yield from attention(f"{layer}.self_attn")
            yield from both(f"{layer}.self_attn_layer_norm")
            if side == "decoder":
                yield from attention(f"{layer}.encoder_attn")
                yield from both(f"{layer}.encoder_attn_layer_norm")
            for part in ("fc1", "fc2", "final_layer_norm"):
                yield from both(f"{layer}.{part}")
        if pre_norm:
            yield from both(f"{side}.layer_norm")
    yield "decoder.output_projection.weight"


@pytest.mark.parametrize("method", ["alibi", "sinusoidal"])
@pytest.mark.parametrize("pre_norm", [False, True])
def test_names_are_those_of_upstream(pre_norm, method):
    model = tiny_transformer(
        position_method=method,
        encoder_normalize_before=pre_norm,
        decoder_normalize_before=pre_norm,
    )
    assert list(model.state_dict()) == list(upstream_names(pre_norm))


def test_shared_embeddings_are_one_tensor():
    model = tiny_transformer(sizes=(40, 40), share_all_embeddings=True)
    table = model.encoder.embed_tokens.weight
    assert model.decoder.embed_tokens.weight is table
    assert model.decoder.output_projection.weight is table
    model = tiny_transformer(share_decoder_input_output_embed=True)
    assert model.decoder.output_projection.weight is model.decoder.embed_tokens.weight
    assert model.encoder.embed_tokens.weight is not model.decoder.embed_tokens.weight


def test_an_encoder_of_another_width():
    model = tiny_transformer(encoder_embed_dim=24, encoder_attention_heads=2)
    assert model.decoder.layers[0].encoder_attn.k_proj.weight.shape == (32, 24)
    assert model(tokens_of(1, 5), None, tokens_of(1, 4))[0].shape == (1, 4, 50)


def test_an_adaptive_softmax_gives_probabilities():
    model = tiny_transformer(adaptive_softmax_cutoff="20,35")
    output = model(tokens_of(1, 5), None, tokens_of(1, 4))
    probs = model.get_normalized_probs(output, log_probs=False)
    torch.testing.assert_close(probs.sum(-1), torch.ones(1, 4))


def test_old_names_and_fewer_layers_load():
    model = tiny_transformer()
    state = model.state_dict()
    old = {}
    for name, tensor in state.items():
        numbered = {"self_attn_layer_norm": "0", "final_layer_norm": "1"}
        if name.startswith("decoder."):
            numbered = {
                "self_attn_layer_norm": "0",
                "encoder_attn_layer_norm": "1",
                "final_layer_norm": "2",
            }
        for norm, number in numbered.items():
            name = name.replace(f".{norm}.", f".layer_norms.{number}.")
        old[name] = tensor
    other = tiny_transformer(dropout=0.2)
    for param in other.parameters():
        param.data.zero_()
    other.load_state_dict(old)
    assert all(torch.equal(state[k], v) for k, v in other.state_dict().items())

    cfg = settings(encoder_layers_to_keep="1", decoder_layers_to_keep="0")
    small = tiny_transformer(encoder_layers=1, decoder_layers=1)
    small.load_state_dict(state, model_cfg=cfg)
    assert torch.equal(small.encoder.layers[0].fc1.weight, model.encoder.layers[1].fc1.weight)
    assert torch.equal(small.decoder.layers[0].fc1.weight, model.decoder.layers[0].fc1.weight)
    assert cfg.encoder_layers_to_keep is None and cfg.decoder_layers_to_keep is None


# ---- presets and errors ----

# Layers, width, inner width, heads of both sides, dropout: upstream's.
PRESETS = {
    "transformer": (6, 512, 2048, 8, 0.1),
    "transformer_tiny": (2, 64, 64, 2, 0.1),
    "transformer_iwslt_de_en": (6, 512, 1024, 4, 0.1),
    "transformer_wmt_en_de": (6, 512, 2048, 8, 0.1),
    "transformer_vaswani_wmt_en_de_big": (6, 1024, 4096, 16, 0.3),
    "transformer_vaswani_wmt_en_fr_big": (6, 1024, 4096, 16, 0.1),
    "transformer_wmt_en_de_big": (6, 1024, 4096, 16, 0.3),
    "transformer_wmt_en_de_big_t2t": (6, 1024, 4096, 16, 0.3),
}


@pytest.mark.parametrize("arch", list(PRESETS))
def test_presets(arch):
    args = settings(arch)
    defaults = {"dropout": 0.1}
    for side in ("encoder", "decoder"):
        names = ("layers", "embed_dim", "ffn_embed_dim", "attention_heads")
        sizes = tuple(getattr(args, f"{side}_{name}") for name in names)
        assert (*sizes, getattr(args, "dropout", defaults["dropout"])) == PRESETS[arch]
    assert args.decoder_output_dim == args.decoder_embed_dim
    is_t2t = arch.endswith("t2t")
    assert getattr(args, "encoder_normalize_before", False) == is_t2t
    assert getattr(args, "decoder_normalize_before", False) == is_t2t


def test_every_preset_is_tested():
    others = {name for name in ARCHITECTURES if not name.startswith("transformer_lm")}
    assert others == set(PRESETS)


def test_what_the_command_line_says_wins_and_the_decoder_follows_the_encoder():
    args = settings("transformer", encoder_embed_dim=256)
    assert (args.encoder_embed_dim, args.decoder_embed_dim) == (256, 256)
    args = settings("transformer_iwslt_de_en", encoder_embed_dim=256, dropout=0.0)
    assert (args.encoder_embed_dim, args.decoder_embed_dim, args.dropout) == (256, 512, 0.0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"position_method": "none"}, "none leaves an encoder without any order.*use alibi"),
        ({"position_method": "xpos"}, "xpos lets queries grow.*rotary"),
        ({"position_method": "fire"}, "fire measures distance.*t5"),
        (
            {"encoder_attention_heads": 1},
            "split gives half of the heads.*--encoder-attention-heads is 1.*symmetric",
        ),
        (
            {"encoder_attention_heads": 1, "encoder_alibi_variant": "two-slope"},
            "needs heads that differ.*symmetric",
        ),
        (
            {"alibi_learned_slopes": True, "encoder_alibi_variant": "two-slope"},
            "leave out --alibi-learned-slopes",
        ),
        (
            {"position_method": "rotary", "encoder_alibi_variant": "symmetric"},
            "belongs to --position-method alibi, not rotary",
        ),
        ({"encoder_attention_heads": 5}, "--encoder-attention-heads 5 does not divide"),
        ({"share_all_embeddings": True}, "--joined-dictionary"),
        (
            {"share_all_embeddings": True, "encoder_embed_dim": 16, "sizes": (40, 40)},
            "equal --encoder-embed-dim and --decoder-embed-dim, which are 16 and 32",
        ),
        (
            {"share_decoder_input_output_embed": True, "decoder_output_dim": 16},
            "equal --decoder-embed-dim and --decoder-output-dim",
        ),
    ],
)
def test_contradictions_name_the_remedy(given, message):
    with pytest.raises(ValueError, match=message):
        tiny_transformer(**given)


def test_a_decoder_says_what_it_misses():
    model = tiny_transformer()
    with pytest.raises(ValueError, match="encoder_out is missing"):
        model.decoder(tokens_of(1, 3))


def test_interpolation_goes_by_the_length_of_each_side():
    cfg = {"alibi_interpolation": "linear", "alibi_train_length": 4}
    model = tiny_transformer(encoder_alibi_variant="symmetric", **cfg)
    source = tokens_of(1, 8)
    with torch.no_grad():
        found = model.encoder(source).encoder_out
        # Twice the length halves the slopes, as one exponent more does.
        halved = tiny_transformer(encoder_alibi_variant="symmetric")
        halved.encoder.positions._bias.slopes /= 2
        torch.testing.assert_close(found, halved.encoder(source).encoder_out)


def test_the_output_of_an_encoder_is_a_tuple_with_names():
    model = tiny_transformer()
    out = model.encoder(padded([tokens_of(3)], 5, left=True), return_all_hiddens=True)
    assert isinstance(out, EncoderOut) and len(out.encoder_states) == 3
    assert out.encoder_padding_mask.tolist() == [[True, True, False, False, False]]
    assert model.encoder(tokens_of(1, 3)).encoder_padding_mask is None
    again = model.encoder.forward_torchscript(
        {"src_tokens": tokens_of(1, 3), "src_lengths": None, "prev_output_tokens": None}
    )
    assert again.encoder_out.shape == (1, 3, 32)
