#!/usr/bin/env python3
"""Tokens per second of evaluation, against the same model written plainly.

This project's evaluation as fairseq-eval-lm runs it, with several windows in a batch, and
`plain_form.py`, which fills a row over the whole vocabulary for each token of one window after the
other, as the original does. Both score the same tokens in one process, in turn; medians, and the
largest difference of a log-probability. The last line is JSON.

    scripts/bench_evaluation.py                 # blocks of 512 and 2,048
    scripts/bench_evaluation.py --only words    # 267,744 words
    scripts/bench_evaluation.py --only slide    # windows of 32 that move by one token
    scripts/bench_evaluation.py --only wiki103  # windows of 512, 16 layers of 1,024
"""

from __future__ import annotations

import argparse
import logging
import resource
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench_tools import build_trainer, model_flags, report, seconds_of, write_data
from plain_form import PlainModel

from fairseq.evaluation.perplexity import eval_lm


@dataclass(frozen=True)
class Case:
    """What is evaluated.

    Attributes:
        model: layers, width, cutoffs.
        words: size of the vocabulary.
        window: tokens of a window, context included.
        context: tokens of context.
        scored: tokens that are scored in all.
        budget: tokens of a batch, context included.
        only_full: leave out windows without all their context, and the loading of data.
    """

    model: tuple[int, int, str]
    words: int
    window: int
    context: int
    scored: int
    budget: int
    only_full: bool = False


SMALL = (4, 256, "1000,3000")
CASES = {
    "blocks": [
        Case(SMALL, 6424, 512, 0, 8192, 2048),
        Case(SMALL, 6424, 2048, 0, 8192, 2048),
    ],
    "words": [Case((4, 256, "20000,60000"), 267_744, 512, 0, 2048, 2048)],
    "slide": [Case((2, 64, "1000,3000"), 6424, 32, 31, 3000, 2048)],
    "wiki103": [Case((16, 1024, "20000,60000"), 267_744, 512, 511, 515, 1024, only_full=True)],
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=CASES, default="blocks")
    parser.add_argument("--runs", type=int, default=5, help="runs of each form that count")
    parser.add_argument("--flags", default="", help="further flags of the model")
    options = parser.parse_args()
    logging.disable(logging.INFO)
    rows = [measure(case, options) for case in CASES[options.only]]
    report(f"evaluation_{options.only}", rows)


def measure(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Measures one case."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        write_data(data, words=case.words, tokens=case.scored)
        flags = [*model_flags(*case.model), *options.flags.split()]
        length = case.window - case.context
        trainer = build_trainer(data, flags, length=length, tokens=case.budget)
        model, task = trainer.get_model().eval(), trainer.task
        task.load_dataset("valid")
        plain = PlainModel(model, case.window, 1)
        windows = [batch for batch in batches(task, case, rows=1) if is_full(batch, case)]
        full = [batch for batch in batches(task, case) if is_full(batch, case)]
        forms: dict[str, Callable[[], object]] = {
            "ours": lambda: eval_lm(
                [model], task.dictionary, full if case.only_full else batches(task, case)
            ),
            "plain": lambda: [score_plainly(plain, window) for window in windows],
        }
        memory = {name: grown_by(function) for name, function in forms.items()}
        difference = largest_difference(model, plain, task, windows[:8])
        seconds = seconds_of(forms, options.runs)
    counts = {"ours": case.scored, "plain": sum(int(w["ntokens"]) for w in windows)}
    if case.only_full:
        counts["ours"] = sum(int(batch["ntokens"]) for batch in full)
    rates = {name: counts[name] / s for name, s in seconds.items()}
    row: dict[str, Any] = {"layers x width": f"{case.model[0]} x {case.model[1]}"}
    row |= {"words": case.words, "window": case.window, "context": case.context}
    row |= {f"{name} tok/s": rate for name, rate in rates.items()}
    row["times as fast"] = rates["ours"] / rates["plain"]
    row |= {f"{name} MiB": mib for name, mib in memory.items()}
    row |= {"largest difference": difference}
    if case.context:
        row["floor: times as fast"] = floor(model.decoder, case)
    return row


def grown_by(function: Callable[[], object]) -> float:
    """Returns by how many MiB a first run raises the largest memory of the process so far."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    function()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def batches(task: Any, case: Case, rows: int | None = None) -> Any:
    """Returns the batches that fairseq-eval-lm evaluates; with `rows` of so many windows."""
    return task.eval_lm_dataloader(
        dataset=task.dataset("valid"),
        max_tokens=case.budget if rows is None else case.window,
        batch_size=rows,
        context_window=case.context,
        num_workers=0,
    )


def is_full(batch: dict[str, Any], case: Case) -> bool:
    """Tells whether all windows have all their context."""
    return min(batch.get("start_indices", [0])) == case.context


@torch.no_grad()
def score_plainly(plain: PlainModel, window: dict[str, Any]) -> torch.Tensor:
    """Scores one window."""
    return plain.log_probs(window["net_input"]["src_tokens"], window["target"])


def largest_difference(
    model: Any, plain: PlainModel, task: Any, windows: list[dict[str, Any]]
) -> float:
    """Returns how far the two forms' log-probabilities of scored tokens differ at most."""
    largest = 0.0

    def compare(sample: dict[str, Any], scores: Any) -> None:
        nonlocal largest
        expected = score_plainly(plain, sample)[scores.is_scored]
        largest = max(largest, (scores.values - expected).abs().max().item())

    eval_lm([model], task.dictionary, windows, on_scores=compare)
    return largest


def floor(decoder: Any, case: Case) -> float:
    """Returns how many times as fast windows can be by the operations that must be done.

    Every layer but the last computes all columns; the last one keys and values of all, the rest
    and the output of the scored ones. The plain form computes all, and the head for all columns.
    """
    width = decoder.layers[0].embed_dim
    layers = len(decoder.layers)
    in_layer = sum(p.numel() for p in decoder.layers[0].parameters() if p.dim() == 2)
    head = (decoder.adaptive_softmax.cutoff[0] + decoder.adaptive_softmax.num_tails) * width
    scored = case.window - case.context
    plain = case.window * (layers * in_layer + head)
    kept = case.window * ((layers - 1) * in_layer + 2 * width * width)
    return plain / (kept + scored * (in_layer - 2 * width * width + head))


if __name__ == "__main__":
    main()
