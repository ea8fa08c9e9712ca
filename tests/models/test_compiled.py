"""Compiled layers: the same model, under the same names."""

import pytest
import torch
from tiny_models import NO_DROPOUT, tiny_gpt, tiny_wiki103, tokens_of

from fairseq.models.compiled import check_compiler, compile_layers

# Traces as a compiler does, and makes no machine code, which needs a C++ compiler and minutes.
BACKEND = "aot_eager"
# torch's tracer hides warnings of its own in a way that does not go with warnings as errors.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")


@pytest.fixture(scope="module")
def pair():
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(tiny_wiki103(**NO_DROPOUT, decoder_layers=1))
    compile_layers(models[1], BACKEND)
    return models


def outputs(models, tokens, **options):
    return [model(tokens, **options)[0] for model in models]


@pytest.mark.parametrize("length", [9, 300])
def test_outputs_and_gradients(pair, length):
    tokens = tokens_of(2, length)
    found = []
    for model, out in zip(pair, outputs([model.train() for model in pair], tokens), strict=True):
        model.zero_grad()
        out.square().sum().backward()
        found.append([out, *(p.grad for p in model.decoder.layers.parameters())])
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)


def test_padded_rows_in_evaluation(pair):
    tokens = tokens_of(2, 11)
    tokens[1, 7:] = 1
    with torch.no_grad():
        eager, compiled = outputs([model.eval() for model in pair], tokens)
    torch.testing.assert_close(compiled[0], eager[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(compiled[1, :7], eager[1, :7], rtol=1e-5, atol=1e-5)


def test_generation_goes_on_from_keys_of_before(pair):
    tokens = tokens_of(2, 4)
    model = pair[1].eval()
    with torch.no_grad():
        whole = pair[0].eval()(tokens)[0]
        state = {}
        steps = [model(tokens[:, : end + 1], incremental_state=state)[0][:, -1] for end in range(4)]
    torch.testing.assert_close(torch.stack(steps, 1), whole, rtol=1e-4, atol=1e-5)


def test_names_of_weights_stay(pair):
    eager, compiled = (model.state_dict() for model in pair)
    assert list(compiled) == list(eager)
    assert all(torch.equal(compiled[name], eager[name]) for name in eager)


def test_dropout_is_a_function_of_the_seed():
    model = tiny_gpt(dropout=0.5, decoder_layers=1).train()
    compile_layers(model, BACKEND)
    tokens = tokens_of(2, 6)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(model(tokens)[0])
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2])


def test_layers_that_are_computed_twice_are_refused():
    with pytest.raises(ValueError, match="--checkpoint-activations"):
        compile_layers(tiny_gpt(checkpoint_activations=True), BACKEND)


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"no-such-compiler.*CXX"):
        check_compiler(torch.device("cpu"))
