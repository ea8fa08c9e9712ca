"""Losses: what training minimises, and the metrics that are made of it."""

from __future__ import annotations

from typing import Any

from fairseq.criterions.fairseq_criterion import FairseqCriterion
from fairseq.dataclass import FairseqDataclass
from fairseq.registry import CRITERIONS

__all__ = ["CRITERION_REGISTRY", "FairseqCriterion", "build_criterion", "register_criterion"]

CRITERION_REGISTRY = CRITERIONS
register_criterion = CRITERIONS.register


def build_criterion(cfg: Any, task: Any) -> FairseqCriterion:
    """Builds the criterion that `cfg` names.

    Args:
        cfg: the criterion's config dataclass, or a namespace with the name in `criterion`.
        task: the task; the criterion takes the target dictionary's pad id from it.

    Raises:
        ValueError: no criterion, or one of an unknown name, is chosen.
    """
    name = cfg._name if isinstance(cfg, FairseqDataclass) else getattr(cfg, "criterion", None)
    if name is None:
        raise ValueError("criterion is required! Choose one with --criterion")
    criterion: FairseqCriterion = CRITERIONS.find(name).build_criterion(cfg, task)
    return criterion
