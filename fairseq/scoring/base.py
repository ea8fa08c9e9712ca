"""The contract of a scorer."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["BaseScorer", "load_sacrebleu"]


def load_sacrebleu() -> Any:
    """Returns the module `sacrebleu`.

    Raises:
        ImportError: it is not installed.
    """
    try:
        return importlib.import_module("sacrebleu")
    except ImportError as error:
        raise ImportError(f"scores need sacrebleu: pip install sacrebleu ({error})") from error


class BaseScorer:
    """Collects pairs of texts and scores them as one corpus.

    Args:
        cfg: settings of the scorer; None where it has none.
        tgt_dict: the target dictionary, if there is one.

    Attributes:
        ref: references.
        pred: predictions, in the same order.
    """

    def __init__(self, cfg: Any = None, tgt_dict: Any = None) -> None:
        self.cfg = cfg
        self.tgt_dict = tgt_dict
        self.ref: list[str] = []
        self.pred: list[str] = []

    def add_string(self, ref: str, pred: str) -> None:
        """Adds a pair."""
        self.ref.append(ref)
        self.pred.append(pred)

    def reset(self) -> None:
        """Forgets all pairs."""
        self.ref, self.pred = [], []

    def score(self, order: int = 4) -> float:
        """Returns the score in percent.

        Args:
            order: longest n-gram that counts, for scorers that count n-grams of words.
        """
        raise NotImplementedError

    def result_string(self, order: int = 4) -> str:
        """Returns the score and what it consists of, as one line."""
        raise NotImplementedError
