"""Measuring language models."""

from fairseq.evaluation.perplexity import LossSum, eval_lm
from fairseq.evaluation.word_stats import ScoredWord, WordJoiner, WordStat, WordStats

__all__ = ["LossSum", "ScoredWord", "WordJoiner", "WordStat", "WordStats", "eval_lm"]
