"""Scores of generated text; every figure is computed by the sacrebleu library."""

from __future__ import annotations

from typing import Any

from fairseq.registry import SCORERS
from fairseq.scoring.base import BaseScorer

__all__ = ["SCORER_REGISTRY", "BaseScorer", "build_scorer", "register_scorer"]

SCORER_REGISTRY = SCORERS
register_scorer = SCORERS.register


def build_scorer(choice: Any, tgt_dict: Any = None) -> BaseScorer:
    """Makes a scorer.

    Args:
        choice: the scoring section of a configuration, a namespace with the name in `scoring`, or a
            name; None is the default, `bleu`.
        tgt_dict: the target dictionary, by which a scorer recognises its unknown word.

    Raises:
        ValueError: there is no such scorer.
    """
    named = choice if isinstance(choice, str) else getattr(choice, "_name", None)
    name = str(named or getattr(choice, "scoring", None) or SCORERS.default)
    cls = SCORERS.find(name)
    cfg = SCORERS.dataclass_of(name)
    settings = choice if choice is not None and not isinstance(choice, str) else None
    if settings is None and cfg is not None:
        settings = cfg()
    scorer: BaseScorer = cls(settings, tgt_dict)
    return scorer
