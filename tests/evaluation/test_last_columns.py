"""What is scored in sliding windows is what the whole pass scores there; memory and its lack."""

from __future__ import annotations

import pytest
import torch
from tiny_lm import VOCABULARY, some_tokens, tiny_lm

from fairseq.data.dictionary import dummy_dictionary
from fairseq.evaluation.halving import score_in_parts
from fairseq.sequence_scorer import SequenceScorer
from fairseq.utils import log_probs_of_targets

METHODS = ["alibi", "sinusoidal", "rotary", "xpos", "t5", "none"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("num_last", [1, 5, 12])
def test_features_of_the_last_columns(method, num_last):
    model = tiny_lm(method).double()
    tokens = some_tokens(3, 12)
    with torch.no_grad():
        whole, _ = model.extract_features(tokens)
        found = model.decoder.extract_last_features(tokens, num_last)
    torch.testing.assert_close(found, whole[:, -num_last:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("settings", [{}, {"decoder_normalize_before": False}])
def test_with_padding_behind(settings):
    model = tiny_lm(**settings).double()
    tokens = some_tokens(2, 10)
    tokens[1, 6:] = model.decoder.padding_idx
    with torch.no_grad():
        whole, _ = model.extract_features(tokens)
        found = model.decoder.extract_last_features(tokens, 6)
    torch.testing.assert_close(found[0], whole[0, -6:], rtol=0, atol=1e-12)
    torch.testing.assert_close(found[1, :2], whole[1, 4:6], rtol=0, atol=1e-12)


def batch_with_context(starts):
    tokens, target = some_tokens(3, 9), some_tokens(3, 9, seed=1)
    for row, start in enumerate(starts):
        target[row, :start] = 1
    return {
        "id": torch.arange(3),
        "net_input": {"src_tokens": tokens, "src_lengths": torch.full((3,), 9)},
        "target": target,
        "start_indices": starts,
    }


@pytest.mark.parametrize("starts", [[8, 8, 8], [4, 6, 5], [0, 8, 3]])
def test_scores_are_those_of_the_whole_distribution(starts):
    model = tiny_lm()
    sample = batch_with_context(starts)
    scores = SequenceScorer(dummy_dictionary(VOCABULARY - 4)).score([model], sample)
    with torch.no_grad():
        logits, _ = model(sample["net_input"]["src_tokens"])
        whole = torch.log_softmax(logits.double(), dim=-1)
    expected = [
        whole[row, column, sample["target"][row, column]].item()
        for row in range(3)
        for column in range(starts[row], 9)
    ]
    assert scores.values.tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("num_classes", [7, 1 << 18, (1 << 20) + 3])
def test_a_few_rows_at_a_time(num_classes):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(9, 2, generator=generator)
    weight = torch.randn(num_classes, 2, generator=generator)
    target = torch.randint(num_classes, (9,), generator=generator)
    most = []

    def score(rows):
        most.append(rows.size(0) * num_classes)
        return rows @ weight.t()

    found = log_probs_of_targets(score, features, target, num_classes)
    logits = features.double() @ weight.double().t()
    expected = torch.log_softmax(logits, dim=1)[torch.arange(9), target]
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5)
    assert max(most) <= max(1 << 20, num_classes)


class ShortOfMemory(SequenceScorer):
    """Fails for more rows than fit, as torch does."""

    def __init__(self, dictionary, most_rows, message):
        super().__init__(dictionary)
        self.most_rows, self.message, self.sizes = most_rows, message, []

    def score(self, models, sample):
        rows = len(sample["target"])
        self.sizes.append(rows)
        if rows > self.most_rows:
            raise RuntimeError(self.message)
        return super().score(models, sample)


MESSAGES = ["CUDA out of memory. Tried to allocate", "DefaultCPUAllocator: not enough memory"]


@pytest.mark.parametrize("message", MESSAGES)
def test_a_batch_that_does_not_fit_is_halved(message, caplog):
    model, dictionary = tiny_lm(), dummy_dictionary(VOCABULARY - 4)
    sample = batch_with_context([0, 8, 3])
    whole = SequenceScorer(dictionary).score([model], sample)
    scorer = ShortOfMemory(dictionary, 1, message)
    found = score_in_parts(scorer, [model], sample)
    assert scorer.sizes == [3, 1, 2, 1, 1]
    assert torch.equal(found.is_scored, whole.is_scored)
    torch.testing.assert_close(found.values, whole.values, rtol=0, atol=1e-5)
    assert "out of memory with 3 rows in a batch; going on with 1 at a time" in caplog.text
    pairs = zip(found.rows(sample), whole.rows(sample), strict=True)
    for (row, tokens, _), (expected_row, expected_tokens, _) in pairs:
        assert (row, tokens.tolist()) == (expected_row, expected_tokens.tolist())


@pytest.mark.parametrize(("most_rows", "message"), [(0, MESSAGES[0]), (2, "something else")])
def test_what_halving_does_not_cure(most_rows, message):
    scorer = ShortOfMemory(dummy_dictionary(VOCABULARY - 4), most_rows, message)
    with pytest.raises(RuntimeError, match=message):
        score_in_parts(scorer, [tiny_lm()], batch_with_context([0, 8, 3]))
