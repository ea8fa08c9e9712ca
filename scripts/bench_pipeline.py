#!/usr/bin/env python3
"""Time and memory of the commands, against what the original took for the same work.

Runs preprocessing, training and evaluation as whole processes, one after the other, and prints
tokens per second (or seconds), peak memory, and their ratios to the recorded figures of the
original (torch 2.13 on 2 cores of an AMD EPYC, one thread; best of its runs). Compare on a machine
of that kind only; elsewhere the ratios say nothing. The last line is JSON.

    scripts/bench_pipeline.py --text wiki.test.tokens --data GOLDEN/wikitext-2/bin/main
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

MODEL = (
    "--arch transformer_lm_wiki103 --decoder-layers 4 --decoder-embed-dim 256 "
    "--decoder-input-dim 256 --decoder-output-dim 256 --decoder-ffn-embed-dim 1024 "
    "--decoder-attention-heads 8 --adaptive-softmax-cutoff 1000,3000 "
    "--adaptive-input-cutoff 1000,3000"
)
TRAIN = (
    f"fairseq-train --task language_modeling {{data}} --save-dir {{save}} {MODEL} --lr 1.0 "
    "--t-mult 2 --lr-period-updates 270 --lr-scheduler cosine --lr-shrink 0.75 "
    "--warmup-updates 16 --warmup-init-lr 1e-07 --stop-min-lr 1e-09 --optimizer nag "
    "--min-lr 0.0001 --clip-norm 0.1 --criterion adaptive_loss --update-freq 1 --seed 1 "
    "--sample-break-mode none --skip-invalid-size-inputs-valid-test --ddp-backend=legacy_ddp "
    "--required-batch-size-multiple 1 --log-format json --log-interval 10 "
    "--no-epoch-checkpoints --disable-validation --cpu "
)
EVALUATE = (
    "fairseq-eval-lm {data} --path {save}/checkpoint_last.pt --sample-break-mode none "
    "--gen-subset valid --max-sentences 1 --tokens-per-sample {length} --max-tokens {length} "
    "--context-window {context} --cpu"
)


@dataclass(frozen=True)
class Case:
    """One command and what the original took for it."""

    name: str
    command: str
    unit: str  # "s", smaller is better, or "tok/s", larger is better
    original: float
    original_mib: float
    figure: Callable[[str, float], float]  # (what was printed, seconds of the process)


def seconds_of_process(printed: str, wall_s: float) -> float:
    """Returns the wall time of the whole process."""
    return wall_s


def training_rate(printed: str, wall_s: float) -> float:
    """Returns the tokens per second of the best ten updates."""
    return max(float(rate) for rate in re.findall(r'train_inner.*?"wps": "([\d.]+)"', printed))


def evaluation_rate(printed: str, wall_s: float) -> float:
    """Returns the tokens per second that fairseq-eval-lm prints."""
    found = re.search(r"\(([\d.]+) tokens/s\)", printed)
    assert found is not None, printed[-2000:]
    return float(found[1])


def cases(text: str, data: str, scratch: str) -> list[Case]:
    """Returns the commands in an order in which later ones find what they need."""
    save = f"{scratch}/checkpoints"
    preprocess = f"fairseq-preprocess --only-source --trainpref {text} --destdir {scratch}/bin"
    train = TRAIN.format(data=data, save=save)

    def evaluate(name: str, length: int, context: int, rate: float, mib: float) -> Case:
        command = EVALUATE.format(data=data, save=save, length=length, context=context)
        return Case(name, command, "tok/s", rate, mib, evaluation_rate)

    short = train + "--max-tokens 1024 --tokens-per-sample 128 --max-update 40"
    long = train.replace(save, f"{scratch}/other") + (
        "--max-tokens 2048 --tokens-per-sample 512 --max-update 10 --no-save"
    )
    return [
        Case("start-up", "fairseq-preprocess --help", "s", 2.87, 241, seconds_of_process),
        Case("preprocess 1.26 MB", preprocess, "s", 3.96, 247, seconds_of_process),
        Case("train, length 128", short, "tok/s", 2218, 607, training_rate),
        Case("train, length 512", long, "tok/s", 1092, 1141, training_rate),
        evaluate("evaluate, length 128", 128, 0, 6082, 296),
        evaluate("evaluate, length 512", 512, 0, 5820, 320),
        evaluate("evaluate, length 2048", 2048, 0, 3046, 535),
        evaluate("slide, 64 of 128 new", 128, 64, 2560, 319),
        evaluate("slide, 8 of 128 new", 128, 120, 382, 321),
    ]


def measure(command: str) -> tuple[str, float, float]:
    """Runs a command; returns (what it printed, wall seconds, peak memory in MiB)."""
    environment = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    argv = shlex.split(command)
    module = argv[0].replace("fairseq-", "fairseq_cli.").replace("-", "_")
    program = [sys.executable, "-c", f"from {module} import cli_main; cli_main()", *argv[1:]]
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            program, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
        _, status, usage = os.wait4(process.pid, 0)
        wall_s = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        printed = output.read()
    if process.returncode:
        raise SystemExit(f"{command}\nended with {process.returncode}:\n{printed[-2000:]}")
    return printed, wall_s, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", required=True, help="the test text of WikiText")
    parser.add_argument("--data", required=True, help="binarized data with a split valid")
    parser.add_argument("--runs", type=int, default=3, help="runs of each, interleaved; the median")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    options = parser.parse_args()
    measured: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        every = cases(options.text, options.data, scratch)
        for run in range(options.runs):
            for case in every:
                # The first training run leaves the checkpoint that the evaluations read.
                is_needed = "length 128" in case.name and case.unit == "tok/s" and run == 0
                if options.only not in case.name and not is_needed:
                    continue
                subprocess.run(["rm", "-rf", f"{scratch}/bin"], check=True)
                if case.name == "train, length 128":
                    subprocess.run(["rm", "-rf", f"{scratch}/checkpoints"], check=True)
                printed, wall_s, mib = measure(case.command)
                measured.setdefault(case.name, []).append((case.figure(printed, wall_s), mib))
                print(f"run {run + 1}, {case.name}", file=sys.stderr, flush=True)
    rows = []
    print("| what | ours | original | times as fast | MiB | original MiB |")
    print("|---|---|---|---|---|---|")
    for case in every:
        if case.name not in measured:
            continue
        value = statistics.median(figure for figure, _ in measured[case.name])
        mib = statistics.median(m for _, m in measured[case.name])
        faster = case.original / value if case.unit == "s" else value / case.original
        rows.append({"case": case.name, "value": value, "unit": case.unit, "faster": faster})
        rows[-1].update(mib=mib, original=case.original, original_mib=case.original_mib)
        print(
            f"| {case.name} | {value:,.2f} {case.unit} | {case.original:,.2f} {case.unit} "
            f"| {faster:.2f} | {mib:.0f} | {case.original_mib:.0f} |"
        )
    print(json.dumps({"bench": Path(__file__).stem, "rows": rows}))


if __name__ == "__main__":
    main()
