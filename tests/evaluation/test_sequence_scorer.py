"""Scores of given tokens, against probabilities looked up by hand."""

from __future__ import annotations

import math

import pytest
import torch

from fairseq.data.dictionary import Dictionary
from fairseq.sequence_scorer import SequenceScorer

PAD, EOS = 1, 2


class Bigram(torch.nn.Module):
    """Predicts the next token by the one before; what a plug-in's model may look like."""

    def __init__(self, logits, attention=None):
        super().__init__()
        self.logits, self.attention = logits, attention

    def forward(self, src_tokens, src_lengths=None):
        return self.logits[src_tokens], {"attn": [self.attention]}

    def get_normalized_probs(self, net_output, log_probs, sample=None):
        probs = net_output[0].softmax(dim=-1)
        return probs.log() if log_probs else probs


@pytest.fixture
def dictionary():
    dictionary = Dictionary()
    for word in "abcd":
        dictionary.add_symbol(word)
    return dictionary


def _logits(seed):
    return torch.randn(8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _sample(start_indices=None):
    sample = {
        "id": torch.tensor([7, 3]),
        "ntokens": 6,
        "net_input": {
            "src_tokens": torch.tensor([[2, 4, 5, 6], [2, 7, PAD, PAD]]),
            "src_lengths": torch.tensor([4, 2]),
        },
        "target": torch.tensor([[4, 5, 6, 2], [7, 2, PAD, PAD]]),
    }
    if start_indices is not None:
        sample["start_indices"] = start_indices
    return sample


def _log_p(logits, before, after):
    row = [math.exp(x) for x in logits[before].tolist()]
    return math.log(row[after] / sum(row))


def test_hypotheses_hold_scored_tokens_and_their_scores(dictionary):
    logits = _logits(1)
    hypotheses = SequenceScorer(dictionary).generate([Bigram(logits)], _sample())
    pairs = [[(2, 4), (4, 5), (5, 6), (6, 2)], [(2, 7), (7, 2)]]
    for (hypothesis,), row in zip(hypotheses, pairs, strict=True):
        expected = [_log_p(logits, *pair) for pair in row]
        assert hypothesis["tokens"].tolist() == [after for _, after in row]
        assert hypothesis["positional_scores"].tolist() == pytest.approx(expected, abs=1e-6)
        assert float(hypothesis["score"]) == pytest.approx(sum(expected) / len(row), abs=1e-6)
        assert hypothesis["attention"] is None
        assert hypothesis["alignment"] is None


def test_an_ensemble_averages_probabilities(dictionary):
    first, second = _logits(1), _logits(2)
    hypotheses = SequenceScorer(dictionary).generate([Bigram(first), Bigram(second)], _sample())
    expected = math.log((math.exp(_log_p(first, 2, 4)) + math.exp(_log_p(second, 2, 4))) / 2)
    assert float(hypotheses[0][0]["positional_scores"][0]) == pytest.approx(expected, abs=1e-6)


def test_context_is_not_scored(dictionary):
    hypotheses = SequenceScorer(dictionary).generate([Bigram(_logits(1))], _sample([2, 1]))
    assert [h[0]["tokens"].tolist() for h in hypotheses] == [[6, 2], [2]]


@pytest.mark.parametrize(("score_pad", "tokens"), [(True, [4, PAD, 6, 2]), (False, [4, 6, 2])])
def test_a_padding_symbol_inside_a_row(dictionary, score_pad, tokens):
    logits = _logits(1)
    sample = _sample()
    sample["target"][0, 1] = PAD
    scorer = SequenceScorer(dictionary, score_pad=score_pad)
    (hypothesis,), (short,) = scorer.generate([Bigram(logits)], sample)
    assert hypothesis["tokens"].tolist() == tokens
    # Every score stands beside its own token.
    before = {4: 2, PAD: 4, 6: 5, 2: 6}
    expected = [_log_p(logits, before[token], token) for token in tokens]
    assert hypothesis["positional_scores"].tolist() == pytest.approx(expected, abs=1e-6)
    assert short["tokens"].tolist() == [7, 2]


def test_attention_is_averaged(dictionary):
    ones, threes = torch.ones(2, 4, 4), torch.full((2, 4, 4), 3.0)
    models = [Bigram(_logits(1), ones), Bigram(_logits(2), threes)]
    hypotheses = SequenceScorer(dictionary).generate(models, _sample())
    assert hypotheses[0][0]["attention"].unique().tolist() == [2]


def test_flags_that_cannot_work_are_refused(dictionary):
    with pytest.raises(ValueError, match="no encoder"):
        SequenceScorer(dictionary, compute_alignment=True)
    with pytest.raises(ValueError, match="--softmax-batch is 0"):
        SequenceScorer(dictionary, softmax_batch=0)
