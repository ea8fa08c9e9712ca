"""The mean loss over batches, against sums by hand."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
import torch

from fairseq.data.dictionary import Dictionary
from fairseq.evaluation.perplexity import LossSum, eval_lm

PAD, EOS = 1, 2


class Unigram(torch.nn.Module):
    """Predicts every token by its share alone."""

    def __init__(self, probabilities):
        super().__init__()
        self.log_probs = torch.tensor(probabilities).log()

    def forward(self, src_tokens, src_lengths=None):
        return self.log_probs.expand(*src_tokens.shape, -1), {}

    def get_normalized_probs(self, net_output, log_probs, sample=None):
        return net_output[0]


#          <s> <pad> </s> <unk> un@@  y    man
SHARES = [0.0, 1 / 8, 1 / 4, 0.0, 1 / 8, 1 / 4, 1 / 4]


@pytest.fixture
def dictionary():
    dictionary = Dictionary()
    for word in ("un@@", "y", "man"):
        dictionary.add_symbol(word)
    return dictionary


def _batch(dictionary, *lines, first=()):
    rows = [[*first, *(dictionary.index(word) for word in line.split()), EOS] for line in lines]
    width = max(map(len, rows))
    target = torch.tensor([row + [PAD] * (width - len(row)) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return {
        "id": torch.arange(len(rows)),
        "ntokens": int(lengths.sum()),
        "net_input": {"src_tokens": target, "src_lengths": lengths},
        "target": target,
    }


def _evaluate(dictionary, batches, caplog, **options):
    with caplog.at_level(logging.INFO):
        result = eval_lm([Unigram(SHARES)], dictionary, batches, **options)
    return result, [record.getMessage() for record in caplog.records]


def test_every_token_counts_once(dictionary, caplog):
    batches = [_batch(dictionary, "un@@ y", "man"), {}, _batch(dictionary, "y")]
    result, lines = _evaluate(dictionary, batches, caplog)
    # un@@ 3 bits; y, man, y and three </s> 2 bits each.
    assert result["loss"] == pytest.approx(15 / 7)
    assert result["perplexity"] == pytest.approx(2 ** (15 / 7))
    assert lines[0].startswith("Evaluated 7 tokens in ")
    assert lines[0].endswith(" tokens/s)")
    assert lines[1] == "Loss (base 2): 2.1429, Perplexity: 4.42"


def test_a_loss_per_word_where_pieces_are_joined(dictionary, caplog):
    result, lines = _evaluate(
        dictionary,
        [_batch(dictionary, "un@@ y man")],
        caplog,
        post_process="subword_nmt",
        output_word_probs=True,
        output_word_stats=True,
    )
    # uny 5 bits, man and </s> 2 bits: 9 bits over 3 words.
    assert result["loss"] == pytest.approx(3)
    assert lines[0] == "0 uny [-3.465736]\tman [-1.386294]\t</s> [-1.386294]"
    figures = [line.split("\t") for line in lines[2:-1]]
    assert [(f[0], f[1], f[3], f[5]) for f in figures] == [
        ("uny", "1", "True", "1"),
        ("man", "1", "False", "1"),
        ("</s>", "1", "False", "0"),
    ]
    assert float(figures[0][4]) == pytest.approx(-math.log(4), abs=1e-6)


def test_rows_that_start_with_bos(dictionary, caplog):
    batch = _batch(dictionary, "y man", first=[dictionary.bos()])
    result, _ = _evaluate(dictionary, [batch], caplog, remove_bos_token=True)
    assert result["loss"] == pytest.approx(2)
    with pytest.raises(ValueError, match="--add-bos-token"):
        _evaluate(dictionary, [_batch(dictionary, "y")], caplog, remove_bos_token=True)


def test_a_piece_before_the_last_token_after_bos(dictionary, caplog):
    batch = _batch(dictionary, "y un@@", first=[dictionary.bos()])
    batch["target"] = batch["target"][:, :-1]
    batch["net_input"] = {
        "src_tokens": batch["target"],
        "src_lengths": batch["net_input"]["src_lengths"] - 1,
    }
    result, _ = _evaluate(
        dictionary, [batch], caplog, remove_bos_token=True, post_process="subword_nmt"
    )
    assert result["loss"] == pytest.approx((2 + 3) / 2)


def test_words_of_probability_zero_are_left_out_and_counted(dictionary, caplog):
    batch = _batch(dictionary, "y <unk> man")
    result, lines = _evaluate(
        dictionary, [batch], caplog, output_word_probs=True, output_word_stats=True
    )
    assert result["loss"] == pytest.approx(2)
    assert lines[0] == "0 y [-1.386294]\t<unk> [-inf]\tman [-1.386294]\t</s> [-1.386294]"
    assert "1 words have probability 0" in lines[1]
    assert not any(line.startswith("<unk>\t") for line in lines)


def test_a_padding_symbol_in_the_text_is_a_word(dictionary, caplog):
    batch = _batch(dictionary, "y <pad> man", "man")
    result, lines = _evaluate(dictionary, [batch], caplog, output_word_probs=True)
    assert result["loss"] == pytest.approx((2 + 3 + 2 + 2 + 2 + 2) / 6)
    assert lines[0].split("\t")[1] == "<pad> [-2.079442]"
    assert lines[1] == "1 man [-1.386294]\t</s> [-1.386294]"
    assert lines[2].startswith("Evaluated 6 tokens")


def test_nothing_to_score_is_an_error(dictionary, caplog):
    with pytest.raises(ValueError, match="nothing was evaluated"):
        _evaluate(dictionary, [{}], caplog)


def test_the_sum_does_not_lose_small_scores():
    total = LossSum()
    total.add(np.full(1, -(2.0**26), dtype=np.float32))
    for _ in range(1000):
        total.add(np.full(1000, -1.0, dtype=np.float32))
    assert total.nats == 2.0**26 + 1_000_000


def test_a_perplexity_too_large_for_a_number_is_infinite():
    total = LossSum()
    total.add(np.array([-1e4]))
    assert total.perplexity == math.inf
