"""Tasks: where data comes from, how it is batched, and how a step is taken with it."""

from __future__ import annotations

from typing import Any

from fairseq.registry import TASKS
from fairseq.tasks.fairseq_task import FairseqTask, LegacyFairseqTask

__all__ = [
    "TASK_REGISTRY",
    "FairseqTask",
    "LegacyFairseqTask",
    "get_task",
    "register_task",
    "setup_task",
]

TASK_REGISTRY = TASKS
register_task = TASKS.register


def get_task(name: str) -> type[FairseqTask]:
    """Returns the task class of that name."""
    task: type[FairseqTask] = TASKS.find(name)
    return task


def setup_task(cfg: Any, **kwargs: Any) -> FairseqTask:
    """Makes the task that a configuration names.

    Args:
        cfg: the task's section of the configuration, whose `_name` is the task; or a flat
            namespace, whose `task` is.
        kwargs: handed on to the task's `setup_task`.

    Raises:
        ValueError: there is no such task.
    """
    name = getattr(cfg, "_name", None) or getattr(cfg, "task", None)
    if name is None:
        raise ValueError("no task is given; name one with --task (language_modeling)")
    return get_task(name).setup_task(cfg, **kwargs)
