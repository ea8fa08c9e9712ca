"""A row of packed documents is computed as each of them alone, whatever tells the order."""

from __future__ import annotations

import argparse

import pytest
import torch
from tiny_models import NO_DROPOUT, TINY, Task, log_probs, settings, tiny_gpt, tokens_of

from fairseq.models import build_model
from fairseq.positions import METHODS

PAD, EOS = 1, 2
# A document ends with an empty line; rows hold the tokens before those that are predicted.
FIRST = [EOS, 11, 12, 13, EOS, 14, EOS]
SECOND = [EOS, 21, 22, EOS, 23, 24, 25, 26, EOS]
THIRD = [EOS, 31, 32]
PACKED = FIRST + SECOND + THIRD
LINES = [[EOS, 11, 12, 13], [EOS, 14], [EOS], [EOS, 21, 22], [EOS, 23, 24, 25, 26], [EOS], THIRD]
PARTS = {"document": [FIRST, SECOND, THIRD], "line": LINES}
MASKS = sorted(PARTS)


class TaskWithEos(Task):
    """A task whose dictionary knows where lines end."""

    def __init__(self, vocab_size):
        super().__init__(vocab_size)
        self.source_dictionary.eos = lambda: EOS


def model_of(method, document_mask, **given):
    torch.manual_seed(0)
    given = {"tokens_per_sample": 64, **TINY, **NO_DROPOUT, **given}
    cfg = settings(
        "transformer_lm_gpt", position_method=method, document_mask=document_mask, **given
    )
    model = build_model(cfg, TaskWithEos(100)).eval()
    for name, parameter in model.named_parameters():
        if "positions." in name:  # what is trained of a method is no longer what it was at first
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def batch(*rows, left=False):
    width = max(map(len, rows))
    pads = [[PAD] * (width - len(row)) for row in rows]
    return torch.tensor([p + r if left else r + p for p, r in zip(pads, rows, strict=True)])


def each_alone(model, documents):
    return torch.cat([log_probs(model, torch.tensor([part])) for part in documents], dim=1)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("method", METHODS)
def test_outputs_are_those_of_each_document_alone(method, kind):
    model = model_of(method, kind)
    whole = log_probs(model, torch.tensor([PACKED]))
    alone = each_alone(model_of(method, None), PARTS[kind])
    torch.testing.assert_close(whole, alone, atol=1e-5, rtol=0)
    if method != "none":
        unmasked = log_probs(model_of(method, None), torch.tensor([PACKED]))
        assert (unmasked - alone).abs().max() > 1e-3


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_those_of_each_document_alone(method, kind):
    models = model_of(method, kind), model_of(method, None)
    weights = torch.randn(len(PACKED), 100, generator=torch.Generator().manual_seed(1))
    (models[0](torch.tensor([PACKED]))[0][0] * weights).sum().backward()
    outputs = [models[1](torch.tensor([part]))[0][0] for part in PARTS[kind]]
    (torch.cat(outputs) * weights).sum().backward()
    wanted = dict(models[1].named_parameters())
    for name, parameter in models[0].named_parameters():
        if wanted[name].grad is None:
            assert parameter.grad is None, name
        else:
            scale = float(wanted[name].grad.abs().max()) + 1
            difference = (parameter.grad - wanted[name].grad).abs().max()
            assert difference < 1e-5 * scale, name


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_padded_rows(method, kind, left):
    """Rows of several lengths, one of which starts in the middle of a document."""
    model = model_of(method, kind)
    rows = [PACKED, SECOND + THIRD, PACKED[3:12]]
    tokens = batch(*rows, left=left)
    found = log_probs(model, tokens)
    for row, line, values in zip(rows, tokens, found, strict=True):
        expected = log_probs(model, torch.tensor([row]))[0]
        torch.testing.assert_close(values[line != PAD], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("chunks", [[1] * 19, [5, 1, 1, 4, 8]])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("method", METHODS)
def test_steps_over_borders_equal_the_whole(method, kind, chunks):
    model = model_of(method, kind)
    tokens = batch(PACKED, SECOND + THIRD, left=True)
    whole = log_probs(model, tokens)
    state, steps, end = {}, [], 0
    for size in chunks:
        end += size
        found = log_probs(
            model, tokens[:, :end], incremental_state=state, sequence_length=len(PACKED)
        )
        steps.append(found)
    is_token = tokens != PAD
    torch.testing.assert_close(torch.cat(steps, 1)[is_token], whole[is_token], atol=1e-5, rtol=0)


def test_reordered_beams_keep_their_documents():
    model = model_of("alibi", "document")
    tokens = torch.tensor([PACKED, PACKED[::-1]])
    state = {}
    log_probs(model, tokens[:, :9], incremental_state=state)
    order = torch.tensor([1, 1, 0])
    model.decoder.reorder_incremental_state(state, order)
    found = log_probs(model, tokens[order], incremental_state=state)
    expected = log_probs(model, tokens[order])[:, 9:]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", ["reference", "sdpa", "auto"])
def test_backends_agree(backend):
    model = model_of("alibi", "document", attention_backend=backend)
    whole = log_probs(model, torch.tensor([PACKED]))
    alone = each_alone(model_of("alibi", None), PARTS["document"])
    torch.testing.assert_close(whole, alone, atol=1e-5, rtol=0)


def test_documents_restart_in_a_table_that_is_as_long_as_the_longest():
    model = model_of("learned", "document", max_target_positions=len(SECOND))
    assert log_probs(model, torch.tensor([PACKED])).isfinite().all()
    unmasked = model_of("learned", None, max_target_positions=len(SECOND))
    with pytest.raises(ValueError, match="an input has 19 tokens"):
        log_probs(unmasked, torch.tensor([PACKED]))


@pytest.mark.parametrize("document_mask", [None, "none"])
def test_without_a_mask_documents_are_not_looked_for(document_mask):
    model = tiny_gpt(document_mask=document_mask).eval()  # its dictionary has no </s>
    assert model.decoder.document_numbers(tokens_of(2, 5)) is None
    assert log_probs(model, tokens_of(2, 5)).shape == (2, 5, 100)


def test_settings_without_the_field():
    model = build_model(argparse.Namespace(**vars(settings("transformer_lm_gpt", **TINY))), Task(9))
    assert model.decoder.document_mask == "none"
