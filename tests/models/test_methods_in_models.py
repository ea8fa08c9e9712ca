"""Every position method inside a model; a new row of the table is taken up by itself."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import log_probs, tiny_gpt, tokens_of

from fairseq.optim.ema import build_ema
from fairseq.positions import METHODS

ADAPTING = {
    "alibi-linear": {"alibi_interpolation": "linear"},
    "alibi-ntk": {"alibi_interpolation": "ntk"},
    "alibi-learned": {"alibi_interpolation": "linear", "alibi_learned_slopes": True},
    "rotary-linear": {"position_method": "rotary", "rotary_scaling": "linear"},
    "rotary-ntk": {"position_method": "rotary", "rotary_scaling": "ntk"},
    "rotary-yarn": {"position_method": "rotary", "rotary_scaling": "yarn"},
    "xpos": {"position_method": "xpos"},
}
CHOICES = {
    **{name: {"position_method": name} for name in METHODS},
    **ADAPTING,
}


def model_of(choice, **given):
    torch.manual_seed(3)
    return tiny_gpt(**{**CHOICES[choice], **given})


def position_weights(model):
    prefix = "decoder.positions."
    return {name: w for name, w in model.named_parameters() if name.startswith(prefix)}


@pytest.mark.parametrize(("remember", "backend"), [(True, "reference"), (False, "sdpa")])
@pytest.mark.parametrize("choice", CHOICES)
def test_weights_get_gradients(choice, remember, backend):
    """All weights of all methods do, padding or not, activations computed twice or not."""
    model = model_of(choice, checkpoint_activations=remember, attention_backend=backend)
    tokens = tokens_of(2, 14)
    tokens[0, :5] = 1
    model.train()(tokens)[0][tokens != 1].square().mean().backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None and torch.isfinite(weight.grad).all(), name
    for name, weight in position_weights(model).items():
        assert weight.grad.abs().max() > 0, name


@pytest.mark.parametrize("choice", CHOICES)
def test_gradients_of_backends_agree(choice):
    found = []
    for backend in ("reference", "sdpa"):
        model = model_of(choice, attention_backend=backend)
        model(tokens_of(2, 12))[0].square().mean().backward()
        found.append({name: w.grad for name, w in model.named_parameters()})
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("choice", CHOICES)
def test_training_lowers_the_loss_and_moves_the_weights(choice):
    model = model_of(choice, decoder_layers=1)
    tokens = tokens_of(4, 16)
    before = {name: w.detach().clone() for name, w in position_weights(model).items()}
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        logits = model(tokens[:, :-1])[0]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    for name, weight in position_weights(model).items():
        assert not torch.equal(weight, before[name]), name


@pytest.mark.parametrize("choice", [c for c in CHOICES if c != "learned"])
def test_inputs_beyond_the_training_length(choice):
    model = model_of(choice, tokens_per_sample=16).eval()
    found = log_probs(model, tokens_of(1, 100))
    assert torch.isfinite(found).all() and found.shape == (1, 100, 100)
    if not model.decoder.positions.depends_on_length:
        torch.testing.assert_close(found[:, :16], log_probs(model, tokens_of(1, 100)[:, :16]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("choice", CHOICES)
def test_half_precision(choice, dtype):
    model = model_of(choice, tokens_per_sample=300).eval()
    tokens = tokens_of(2, 200)
    tokens[1, :60] = 1
    whole = log_probs(model, tokens)
    half = model.to(dtype)
    found = log_probs(half, tokens)
    is_token = tokens != 1
    # Rounding moves a model without positions by 0.004 and 0.025.
    tolerance = 0.01 if dtype == torch.float16 else 0.06
    assert (found[is_token] - whole[is_token]).abs().max() < tolerance
    half(tokens)[0][is_token].float().square().mean().backward()
    for name, weight in half.named_parameters():
        assert torch.isfinite(weight.grad).all() and weight.dtype == dtype, name


@pytest.mark.parametrize("choice", CHOICES)
def test_state_dicts(choice):
    model = model_of(choice)
    state = model.state_dict()
    added = [name for name in state if name.startswith("decoder.positions.")]
    fixed = {"alibi", "sinusoidal", "learned", "none", "rotary", "xpos", "sandwich", "alibi-log"}
    if choice in fixed or (choice in ADAPTING and choice != "alibi-learned"):
        assert added == []
    else:
        assert added != []
    torch.manual_seed(99)
    other = tiny_gpt(**CHOICES[choice])
    other.load_state_dict(state)
    tokens = tokens_of(2, 12)
    assert torch.equal(log_probs(other.eval(), tokens), log_probs(model.eval(), tokens))


@pytest.mark.parametrize("choice", CHOICES)
def test_copies_are_independent(choice):
    """Also after a forward pass, whose gradients a method must not hold on to."""
    model = model_of(choice)
    tokens = tokens_of(1, 12)
    model(tokens)
    duplicate = copy.deepcopy(model).eval()
    before = log_probs(duplicate, tokens)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.5)
    assert torch.equal(log_probs(duplicate, tokens), before)


@pytest.mark.parametrize("choice", CHOICES)
def test_moving_averages_have_the_weights(choice):
    class Settings:
        ema_decay, ema_start_update, ema_update_freq = 0.5, 0, 1
        ema_fp32, ema_seed_model = False, None

    model = model_of(choice)
    average = build_ema(model, Settings())
    before = {name: w.detach().clone() for name, w in position_weights(model).items()}
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(1.0)
    average.step(model, 1)
    averaged = dict(average.get_model().named_parameters())
    for name, weight in before.items():
        torch.testing.assert_close(averaged[name], weight + 0.5)


# ---- the length of a sequence ----


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("chunks", [[1] * 40, [6] + [1] * 34, [1, 24, 2, 13], [40]])
@pytest.mark.parametrize("choice", ADAPTING)
def test_steps_with_a_planned_length_equal_the_whole(choice, chunks, padding):
    model = model_of(choice, tokens_per_sample=16).eval()
    tokens = tokens_of(3, 40)
    if padding:
        tokens[1, :5] = 1
    whole = log_probs(model, tokens)
    state, found, end = {}, [], 0
    for size in chunks:
        planned = {"sequence_length": 40} if end == 0 else {}
        end += size
        found.append(log_probs(model, tokens[:, :end], incremental_state=state, **planned))
    is_token = tokens != 1
    torch.testing.assert_close(torch.cat(found, 1)[is_token], whole[is_token], atol=1e-5, rtol=0)


@pytest.mark.parametrize("choice", ADAPTING)
def test_without_a_plan_the_first_call_settles_the_length(choice):
    model = model_of(choice, tokens_per_sample=16).eval()
    tokens = tokens_of(2, 40)
    state = {}
    found = [log_probs(model, tokens[:, :n], incremental_state=state) for n in (24, 25, 40)]
    whole = log_probs(model, tokens, sequence_length=24)
    torch.testing.assert_close(torch.cat(found, 1), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("choice", ADAPTING)
def test_length_of_the_model_s_own(choice):
    model = model_of(choice, tokens_per_sample=16).eval()
    tokens = tokens_of(2, 20)
    expected = log_probs(model, tokens, sequence_length=64)
    differs = not torch.allclose(expected, log_probs(model, tokens), atol=1e-6)
    assert differs == (choice != "xpos")  # its middle moves no product
    model.decoder.sequence_length = 64
    torch.testing.assert_close(log_probs(model, tokens), expected)


def test_another_length_in_the_middle_of_a_sequence():
    model = model_of("rotary-ntk").eval()
    tokens = tokens_of(2, 9)
    state = {}
    log_probs(model, tokens[:, :3], incremental_state=state, sequence_length=50)
    log_probs(model, tokens[:, :4], incremental_state=state, sequence_length=50)
    with pytest.raises(ValueError, match=r"sequence_length is 60, but .* begun for 50 tokens"):
        model(tokens, incremental_state=state, sequence_length=60)


@pytest.mark.parametrize("choice", ["rotary-ntk", "alibi-linear"])
def test_reordered_beams_keep_the_length(choice):
    model = model_of(choice).eval()
    tokens = tokens_of(3, 30)
    state = {}
    log_probs(model, tokens[:, :20], incremental_state=state, sequence_length=30)
    order = torch.tensor([2, 0, 0, 1])
    model.decoder.reorder_incremental_state(state, order)
    found = log_probs(model, tokens[order], incremental_state=state)
    torch.testing.assert_close(found, log_probs(model, tokens)[order, 20:], atol=1e-5, rtol=0)


def test_interpolation_reads_the_training_length():
    plain, stretched = model_of("alibi"), model_of("alibi-linear", tokens_per_sample=16)
    given = model_of("alibi-linear", tokens_per_sample=64, train_length=16)
    x = torch.zeros(1, 64, 32)
    expected = plain.decoder.buffered_future_mask(x) / 4
    torch.testing.assert_close(stretched.decoder.buffered_future_mask(x), expected)
    torch.testing.assert_close(given.decoder.buffered_future_mask(x), expected)
    short = x[:, :16]
    torch.testing.assert_close(
        stretched.decoder.buffered_future_mask(short), expected[:, :16, :16] * 4
    )
