"""Words out of tokens: undoing a segmentation, and figures per word type."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["ScoredWord", "WordJoiner", "WordStat", "WordStats"]

_SUBWORD_NMT = ("subword_nmt", "@@ ")
_MARK = "@@"


@dataclass(frozen=True)
class ScoredWord:
    """A word and the natural logarithm of its probability, the sum over its pieces."""

    text: str
    score: float
    is_joined: bool = False


class WordJoiner:
    """Joins the pieces of words that a segmentation marks with `@@`.

    Args:
        dictionary: gives the symbols.
        post_process: None to leave tokens alone, subword_nmt or "@@ " to join them.

    Raises:
        ValueError: another segmentation.
    """

    def __init__(self, dictionary: Any, post_process: str | None = None) -> None:
        if post_process is not None and post_process not in _SUBWORD_NMT:
            raise ValueError(
                f"--post-process {post_process!r} is not supported when evaluating a language "
                "model; allowed is subword_nmt (pieces that end in @@), or leave the flag out"
            )
        self._symbols: Sequence[str] = dictionary.symbols
        self._is_piece: np.ndarray | None = None
        if post_process is not None:
            self._is_piece = np.array([symbol.endswith(_MARK) for symbol in self._symbols])

    def ends(self, tokens: np.ndarray) -> np.ndarray:
        """Returns the positions at which words end; the last token of a row always ends one."""
        if self._is_piece is None:
            return np.arange(len(tokens))
        goes_on = self._is_piece[tokens]
        goes_on[-1:] = False
        return np.flatnonzero(~goes_on)

    def word_scores(self, scores: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Returns the sum of the scores of each word's pieces, float64."""
        if len(ends) == len(scores):
            return scores.astype(np.float64)
        starts = np.concatenate([[0], ends[:-1] + 1])
        return np.add.reduceat(scores.astype(np.float64), starts)

    def words(
        self, tokens: np.ndarray, ends: np.ndarray, word_scores: np.ndarray
    ) -> Iterator[ScoredWord]:
        """Yields the words of a row with their scores."""
        start = 0
        for end, score in zip(ends.tolist(), word_scores.tolist(), strict=True):
            pieces = [self._symbols[token] for token in tokens[start : end + 1]]
            joined = "".join(piece.removesuffix(_MARK) for piece in pieces[:-1]) + pieces[-1]
            yield ScoredWord(joined, score, is_joined=len(pieces) > 1)
            start = end + 1


@dataclass
class WordStat:
    """Figures of one word type.

    Attributes:
        word: the word.
        is_bpe: whether it was joined from pieces, the first time it was seen.
        count: how often it was scored.
        log_prob: sum of its scores in nats.
        next_word_prob: sum of the scores in nats of the words that follow it in a row.
        missing_next_words: how often none follows.
    """

    word: str
    is_bpe: bool
    count: int = 0
    log_prob: float = 0
    next_word_prob: float = 0
    missing_next_words: int = 0

    def add(self, log_prob: float, next_word_prob: float | None) -> None:
        """Counts one occurrence."""
        if next_word_prob is None:
            self.missing_next_words += 1
        else:
            self.next_word_prob += next_word_prob
        self.count += 1
        self.log_prob += log_prob

    def __str__(self) -> str:
        return "\t".join(
            str(field)
            for field in (
                self.word,
                self.count,
                self.log_prob,
                self.is_bpe,
                self.next_word_prob,
                self.count - self.missing_next_words,
            )
        )


class WordStats:
    """Figures of all word types seen."""

    def __init__(self) -> None:
        self._stats: dict[str, WordStat] = {}

    def add_row(self, words: Sequence[ScoredWord]) -> None:
        """Counts the words of one row."""
        next_score: float | None = None
        followers: list[float | None] = []
        for word in reversed(words):
            followers.append(next_score)
            # As in the original, a score of exactly 0 is looked past.
            next_score = word.score if word.score != 0 else next_score
        for word, follower in zip(words, reversed(followers), strict=True):
            stat = self._stats.setdefault(word.text, WordStat(word.text, word.is_joined))
            stat.add(word.score, follower)

    def by_count(self) -> list[WordStat]:
        """Returns the figures, most frequent word first, equal ones as they first appeared."""
        return sorted(self._stats.values(), key=lambda stat: stat.count, reverse=True)
