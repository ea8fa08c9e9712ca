"""Perplexity of language models over batches of text. Scores are natural logarithms (nats)."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fairseq import utils
from fairseq.evaluation.halving import score_in_parts
from fairseq.evaluation.word_stats import ScoredWord, WordJoiner, WordStats
from fairseq.sequence_scorer import Scores, SequenceScorer

__all__ = ["LossSum", "eval_lm"]

logger = logging.getLogger("fairseq_cli.eval_lm")


@dataclass
class LossSum:
    """What is averaged.

    Attributes:
        nats: sum of -log p over the scored words, in float64.
        words: number of scored words; without a segmentation to undo, of tokens.
        impossible: words of probability 0, which are not in the other two.
    """

    nats: float = 0.0
    words: int = 0
    impossible: int = 0

    def add(self, scores: np.ndarray) -> None:
        """Adds words by their log-probabilities."""
        is_possible = ~np.isinf(scores)
        self.nats -= float(scores[is_possible].sum(dtype=np.float64))
        self.words += int(is_possible.sum())
        self.impossible += int((~is_possible).sum())

    @property
    def bits(self) -> float:
        """Mean loss in bits per word; 0 if there are none."""
        return self.nats / self.words / math.log(2) if self.words else 0.0

    @property
    def perplexity(self) -> float:
        """2 ** bits."""
        return utils.get_perplexity(self.bits, round=None)


def eval_lm(
    models: Sequence[torch.nn.Module],
    source_dictionary: Any,
    batch_iterator: Iterable[dict[str, Any]],
    post_process: str | None = None,
    output_word_probs: bool = False,
    output_word_stats: bool = False,
    target_dictionary: Any = None,
    softmax_batch: int | None = None,
    remove_bos_token: bool = False,
    device: torch.device | None = None,
    *,
    score_pad: bool = True,
    on_scores: Callable[[dict[str, Any], Scores], None] | None = None,
    scorer: SequenceScorer | None = None,
) -> dict[str, float]:
    """Scores every target token of the batches and logs the mean loss and perplexity.

    Args:
        models: several make an ensemble, whose probabilities are averaged.
        source_dictionary: gives the words.
        batch_iterator: batches of a language modelling dataset, `start_indices` included if the
            rows have context that is not to be scored.
        post_process: segmentation to undo (subword_nmt), for a perplexity per word.
        output_word_probs: log a line with the score of each word for every row.
        output_word_stats: log a line for every word type.
        target_dictionary: dictionary of the output; by default the source's.
        softmax_batch: most tokens whose distribution is computed at once.
        remove_bos_token: rows start with `<s>`, which is not scored.
        device: where the models are, and the batches go; by default that of the first parameter.
        score_pad: a padding symbol inside a row is a word like others. False leaves such targets
            out, as is right where targets are not the row shifted by one.
        on_scores: called with every batch and its scores.
        scorer: scores the batches, whole ones alone; None makes one that `softmax_batch` and
            `score_pad` describe, and that scores in parts what does not fit into memory.

    Returns:
        {"loss": bits per word, "perplexity": 2 ** loss, "tokens": how many were evaluated,
        "seconds": what the models and the scoring took}.

    Raises:
        ValueError: there was nothing to score.
    """
    score = _scoring(scorer, target_dictionary or source_dictionary, softmax_batch, score_pad)
    joiner = WordJoiner(source_dictionary, post_process)
    device = device or _device_of(models[0])
    total, stats = LossSum(), WordStats() if output_word_stats else None
    tokens, seconds = 0, 0.0
    for sample in batch_iterator:
        if "net_input" not in sample:
            continue
        on_device = utils.move_to_cuda(sample, device) if device.type != "cpu" else sample
        started_at = time.perf_counter()
        scores = score(models, on_device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds += time.perf_counter() - started_at
        if on_scores is not None:
            on_scores(sample, scores)
        tokens += sample["ntokens"]
        for row_id, row_tokens, row_scores in scores.rows(sample):
            if remove_bos_token:
                row_tokens, row_scores = _without_bos(row_tokens, row_scores, source_dictionary)
            if len(row_tokens) == 0:
                continue
            ends = joiner.ends(row_tokens)
            word_scores = joiner.word_scores(row_scores, ends)
            total.add(word_scores)
            if output_word_probs or stats is not None:
                words = list(joiner.words(row_tokens, ends, word_scores))
                if output_word_probs:
                    logger.info(_words_line(row_id, words))
                if stats is not None:
                    stats.add_row([word for word in words if not math.isinf(word.score)])
    return _report(total, stats, tokens, seconds)


def _scoring(
    scorer: SequenceScorer | None, dictionary: Any, softmax_batch: int | None, score_pad: bool
) -> Callable[[Sequence[torch.nn.Module], dict[str, Any]], Scores]:
    if scorer is not None:
        return scorer.score
    made = SequenceScorer(dictionary, softmax_batch, score_pad=score_pad)
    return lambda models, sample: score_in_parts(made, models, sample)


def _device_of(model: torch.nn.Module) -> torch.device:
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def _without_bos(
    tokens: np.ndarray, scores: np.ndarray, dictionary: Any
) -> tuple[np.ndarray, np.ndarray]:
    if len(tokens) and tokens[0] != dictionary.bos():
        raise ValueError(
            "--add-bos-token: a row starts with "
            f"{dictionary[int(tokens[0])]!r} instead of {dictionary[dictionary.bos()]!r}"
        )
    return tokens[1:], scores[1:]


def _words_line(row_id: int, words: Sequence[ScoredWord]) -> str:
    return f"{row_id} " + "\t".join(f"{word.text} [{word.score:2f}]" for word in words)


def _report(
    total: LossSum, stats: WordStats | None, tokens: int, seconds: float
) -> dict[str, float]:
    if total.words == 0:
        raise ValueError(
            "nothing was evaluated: there was no token to score; choose another --gen-subset, or "
            "fewer --num-shards"
        )
    if total.impossible:
        logger.warning(
            f"{total.impossible:,} words have probability 0 (a score of -inf) and are left out of "
            "the loss"
        )
    rate = tokens / seconds if seconds > 0 else 0.0
    logger.info(f"Evaluated {tokens:,} tokens in {seconds:.1f}s ({rate:.2f} tokens/s)")
    for stat in stats.by_count() if stats is not None else ():
        logger.info(stat)
    logger.info(f"Loss (base 2): {total.bits:.4f}, Perplexity: {total.perplexity:.2f}")
    return {
        "loss": total.bits,
        "perplexity": total.perplexity,
        "tokens": tokens,
        "seconds": seconds,
    }
