"""What the installed commands call; each imports its module where a ctrl-C is caught already."""

from __future__ import annotations

from functools import partial

from fairseq_cli._run import start

__all__ = [
    "diagnose",
    "doctor",
    "eval_lm",
    "export",
    "extrapolate",
    "generate",
    "interactive",
    "preprocess",
    "score",
    "train",
    "validate",
]

preprocess = partial(start, "preprocess")
score = partial(start, "score")
train = partial(start, "train")
eval_lm = partial(start, "eval_lm")
generate = partial(start, "generate")
interactive = partial(start, "interactive")
validate = partial(start, "validate")
extrapolate = partial(start, "extrapolate")
diagnose = partial(start, "diagnose")
doctor = partial(start, "doctor")
export = partial(start, "export")
