"""Words out of pieces, and figures per word, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from fairseq.data.dictionary import Dictionary
from fairseq.evaluation.word_stats import ScoredWord, WordJoiner, WordStats

WORDS = ("un@@", "happ@@", "y", "man", "@@")


@pytest.fixture
def dictionary():
    dictionary = Dictionary()
    for word in WORDS:
        dictionary.add_symbol(word)
    return dictionary


def _joined(dictionary, text, scores, post_process):
    tokens = np.array([dictionary.index(word) for word in text.split()], dtype=np.int64)
    joiner = WordJoiner(dictionary, post_process)
    ends = joiner.ends(tokens)
    word_scores = joiner.word_scores(np.array(scores, dtype=np.float32), ends)
    return [(w.text, w.score, w.is_joined) for w in joiner.words(tokens, ends, word_scores)]


def test_without_a_segmentation_every_token_is_a_word(dictionary):
    words = _joined(dictionary, "un@@ y man", [-1, -2, -4], None)
    assert words == [("un@@", -1, False), ("y", -2, False), ("man", -4, False)]


@pytest.mark.parametrize("post_process", ["subword_nmt", "@@ "])
def test_pieces_give_their_scores_to_the_word(dictionary, post_process):
    words = _joined(
        dictionary, "un@@ happ@@ y man un@@ y", [-1, -2, -4, -8, -16, -32], post_process
    )
    assert words == [("unhappy", -7, True), ("man", -8, False), ("uny", -48, True)]


def test_a_piece_at_the_end_of_a_row_counts_by_itself(dictionary):
    assert _joined(dictionary, "man un@@", [-1, -2], "subword_nmt") == [
        ("man", -1, False),
        ("un@@", -2, False),
    ]
    assert _joined(dictionary, "un@@ happ@@", [-1, -2], "subword_nmt") == [("unhapp@@", -3, True)]
    assert _joined(dictionary, "", [], "subword_nmt") == []


def test_another_segmentation_is_refused(dictionary):
    with pytest.raises(ValueError, match="--post-process 'sentencepiece' is not supported"):
        WordJoiner(dictionary, "sentencepiece")


def test_figures_per_word():
    stats = WordStats()
    stats.add_row([ScoredWord("b", -1.0), ScoredWord("a", -2.0), ScoredWord("b", -4.0)])
    stats.add_row([ScoredWord("ab", -8.0, True), ScoredWord("z", 0.0), ScoredWord("a", -16.0)])
    lines = [str(stat) for stat in stats.by_count()]
    # word, count, sum of scores, is joined, sum of the next words' scores, how many had a next one;
    # the score 0 of z is looked past.
    assert lines == [
        "b\t2\t-5.0\tFalse\t-2.0\t1",
        "a\t2\t-18.0\tFalse\t-4.0\t1",
        "ab\t1\t-8.0\tTrue\t-16.0\t1",
        "z\t1\t0.0\tFalse\t-16.0\t1",
    ]
