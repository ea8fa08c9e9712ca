"""A batch of prompts of unequal length gives what each gives alone, read token by token.

What is expected comes from the modules of the model, one prompt in a batch, without the steps that
the generator takes for decoders it knows well, and without padding.
"""

import pytest
import torch
from test_cache import METHOD_CASES, model_of
from toy_models import EOS, PAD, Words

from fairseq.models.transformer.beam_steps import BeamSteps
from fairseq.search import DiverseBeamSearch
from fairseq.sequence_generator import SequenceGenerator

PROMPTS = [[5, 6, 7, 8, 9, 10], [11], [12, EOS, 13], [14, 15, 16, 17]]
MORE = {"max_len_b": 18, "min_len": 8, "unk_penalty": 0.3, "len_penalty": 0.7}


class WithoutSteps(torch.nn.Module):
    """A model whose decoder is called as one that nothing is known about."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens, incremental_state=None, sequence_length=None):
        return self.model(
            tokens, incremental_state=incremental_state, sequence_length=sequence_length
        )

    def reorder_incremental_state(self, state, order):
        self.model.decoder.reorder_incremental_state(state, order)

    def get_normalized_probs(self, *args, **kwargs):
        return self.model.get_normalized_probs(*args, **kwargs)


def generated(model, prompts, **options):
    width = max(map(len, prompts))
    rows = torch.tensor([prompt + [PAD] * (width - len(prompt)) for prompt in prompts])
    search = SequenceGenerator([model], Words(50), **{**MORE, **options})
    return search.generate(None, {"net_input": {"src_tokens": rows[:, :1]}}, prefix_tokens=rows)


def assert_same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert [h["tokens"].tolist() for h in one] == [h["tokens"].tolist() for h in other]
        for h, g in zip(one, other, strict=True):
            torch.testing.assert_close(h["score"], g["score"], atol=1e-5, rtol=0)
            torch.testing.assert_close(
                h["positional_scores"], g["positional_scores"], atol=1e-5, rtol=0
            )


def alone(model, prompts=PROMPTS, **options):
    return [generated(WithoutSteps(model), [prompt], **options)[0] for prompt in prompts]


@pytest.mark.parametrize("beam", [1, 3])
@pytest.mark.parametrize(
    ("method", "given"), METHOD_CASES, ids=lambda value: str(value) if value else ""
)
def test_every_position_method(method, given, beam):
    model = model_of(method, **given)
    assert_same(generated(model, PROMPTS, beam_size=beam), alone(model, beam_size=beam))


@pytest.mark.parametrize("beam", [1, 4])
@pytest.mark.parametrize("document_mask", ["line", "document"])
@pytest.mark.parametrize("method", ["alibi", "sinusoidal", "fire"])
def test_documents(method, document_mask, beam):
    model = model_of(method, document_mask=document_mask)
    prompts = [[5, 6, 7, 8], [9], [10, 11]]
    assert_same(generated(model, prompts, beam_size=beam), alone(model, prompts, beam_size=beam))


@pytest.mark.parametrize(
    "options",
    [
        {"min_len": 3, "no_repeat_ngram_size": 1},
        {"min_len": 3, "no_repeat_ngram_size": 2, "beam_size": 3},
        {"beam_size": 4, "search_strategy": DiverseBeamSearch(2, 0.5)},
        {"temperature": 1.7, "beam_size": 2},
        {"max_len_b": 4, "min_len": 1, "beam_size": 2},
        {"max_len_b": 70, "min_len": 66, "beam_size": 2},
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("before", [True, False], ids=["norms-first", "norms-last"])
def test_options(options, before):
    model = model_of("alibi", decoder_normalize_before=before)
    assert_same(generated(model, PROMPTS, **options), alone(model, **options))


@pytest.mark.parametrize("adaptive", [False, True])
def test_models_and_a_language_model_together(adaptive):
    given = {"adaptive_softmax_cutoff": "10,30"} if adaptive else {}
    models = [model_of("alibi", **given), model_of("learned", **given)]
    options = {"beam_size": 3, "lm_weight": 0.4}
    found = generated(models[0], PROMPTS, lm_model=models[1], **options)
    expected = alone(models[0], lm_model=WithoutSteps(models[1]), **options)
    assert_same(found, expected)


def test_padding_on_the_left_is_the_same_prompt():
    model = model_of("alibi")
    rows = torch.tensor([[PAD] * (6 - len(prompt)) + prompt for prompt in PROMPTS])
    search = SequenceGenerator([model], Words(50), beam_size=2, **MORE)
    found = search.generate(None, {"net_input": {"src_tokens": rows[:, :1]}}, prefix_tokens=rows)
    assert_same(found, alone(model, beam_size=2))


def test_all_prompts_are_read_in_one_pass(monkeypatch):
    model = model_of("alibi")
    passes, steps = [], []
    read, step = model.decoder.extract_features, BeamSteps.read

    def note_pass(tokens, **given):
        passes.append(tuple(tokens.shape))
        return read(tokens, **given)

    def note_step(self, tokens):
        steps.append(tuple(tokens.shape))
        return step(self, tokens)

    monkeypatch.setattr(model.decoder, "extract_features", note_pass)
    monkeypatch.setattr(BeamSteps, "read", note_step)
    prompts = [[5, 6, 7, 8, 9, 10], [11], [14, 15, 16, 17]]
    generated(model, prompts, beam_size=2, max_len_b=9, min_len=9)
    assert passes == [(3, 7)]
    assert steps[0] == (6, 8)
    assert [len(shape) for shape in steps] == [2] * 8  # the shortest goes on longest


def test_hooks_are_called_in_every_step():
    model = model_of("alibi")
    expected = generated(model, PROMPTS, beam_size=2)
    calls = []
    model.decoder.layers[1].fc2.register_forward_hook(lambda *_: calls.append(1))
    found = generated(model, PROMPTS, beam_size=2)
    assert len(calls) > 10
    assert_same(found, expected)


@pytest.mark.parametrize("beam", [1, 3])
def test_half_precision(beam):
    model = model_of("alibi").bfloat16()
    options = {"beam_size": beam, "max_len_b": 12, "min_len": 12}
    for one, other in zip(
        generated(model, PROMPTS[:2], **options), alone(model, PROMPTS[:2], **options), strict=True
    ):
        assert abs(float(one[0]["score"]) - float(other[0]["score"])) < 0.1


@pytest.mark.parametrize("beam", [1, 3])
def test_keys_are_forgotten_alike(beam):
    model = model_of("alibi")
    options = {"beam_size": beam, "max_len_b": 60, "min_len": 50}
    together = generated(model, PROMPTS, cache_error=1e-9, **options)
    assert_same(together, alone(model, **options))


def test_what_torch_may_use_is_left_as_it_was():
    seen = []
    model = model_of("alibi")
    model.decoder.layers[0].fc1.register_forward_hook(
        lambda *_: seen.append(torch.backends.mkldnn.enabled)
    )
    before = torch.backends.mkldnn.enabled
    generated(model, PROMPTS[:1])
    generated(model.bfloat16(), PROMPTS[:1])
    assert seen[0] is False and seen[-1] is before is torch.backends.mkldnn.enabled
