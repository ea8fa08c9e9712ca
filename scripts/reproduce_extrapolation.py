#!/usr/bin/env python3
"""Train short, test long, done properly: methods x training lengths x seeds, then one sweep.

Trains every position method at several lengths and with several seeds on the text of the demo (or
on three files of your own), evaluates each model from its own length to 16 times it, measures what
the gain is made of (sliding windows, interpolated slopes), and writes tables with spread, claims
and whether they held, and pictures. Trainings run side by side, one core each; what is done already
is reused.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import datetime
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import demo

METHODS = ("alibi", "sinusoidal", "rotary", "t5", "none", "kerple-log")
FACTORS = (1, 2, 4, 8, 16)


def command_of(options: argparse.Namespace, data: Path, method: str, length: int, seed: int) -> str:
    """Returns the training command of one model."""
    words = sum(1 for _ in (data / "dict.txt").open(encoding="utf-8")) + 4
    cutoffs = f"{words // 8},{words // 2}"
    longest = length * max(FACTORS)
    return (
        f"fairseq-train --task language_modeling {shlex.quote(str(data))} "
        f"--save-dir {shlex.quote(str(folder_of(options, method, length, seed)))} "
        f"--position-method {method} --seed {seed} --max-target-positions {longest} "
        "--arch transformer_lm_wiki103 --decoder-layers 3 --decoder-embed-dim 128 "
        "--decoder-ffn-embed-dim 384 --decoder-attention-heads 8 "
        f"--adaptive-input-cutoff {cutoffs} --adaptive-softmax-cutoff {cutoffs} --dropout 0.1 "
        "--attention-dropout 0 --activation-dropout 0 --adaptive-softmax-dropout 0 "
        "--criterion adaptive_loss --optimizer adam --adam-betas '(0.9, 0.98)' --clip-norm 1.0 "
        f"--lr 0.003 --lr-scheduler polynomial_decay --warmup-updates {options.updates // 10} "
        f"--total-num-update {options.updates} --max-update {options.updates} "
        f"--tokens-per-sample {length} --max-tokens {options.batch_tokens} "
        "--required-batch-size-multiple 1 --sample-break-mode none --disable-validation "
        "--no-epoch-checkpoints --no-save-optimizer-state --num-workers 0 --log-format json "
        "--log-interval 20 --cpu"
    )


def folder_of(options: argparse.Namespace, method: str, length: int, seed: int) -> Path:
    """Returns where one model lies."""
    folder: Path = options.folder / "checkpoints" / f"{method}-L{length}-seed{seed}"
    return folder


def train(options: argparse.Namespace, data: Path, method: str, length: int, seed: int) -> dict:
    """Trains one model on one core; returns what it cost."""
    folder = folder_of(options, method, length, seed)
    record = folder / "cost.json"
    command = command_of(options, data, method, length, seed)
    if record.exists() and json.loads(record.read_text())["command"] == command:
        return json.loads(record.read_text())
    program = "from fairseq_cli.train import cli_main; cli_main()"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("*.pt"):
        stale.unlink()
    with (folder / "train.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", program, *shlex.split(command)[1:]],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        tail = (folder / "train.log").read_text()[-1500:]
        raise SystemExit(f"{command}\nended with {process.returncode}:\n{tail}")
    cost = {
        "command": command,
        "method": method,
        "length": length,
        "seed": seed,
        "wall_s": time.monotonic() - began,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "peak_mib": usage.ru_maxrss / 1024,
    }
    record.write_text(json.dumps(cost))
    return cost


def train_all(options: argparse.Namespace, data: Path) -> list[dict]:
    """Trains what is not trained yet, `--jobs` at a time; shows how many are left."""
    every = [
        (method, length, seed)
        for seed in options.seeds
        for length in options.lengths
        for method in options.methods
    ]
    costs = []
    began = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        futures = [pool.submit(train, options, data, *which) for which in every]
        for done, future in enumerate(concurrent.futures.as_completed(futures), start=1):
            cost = future.result()
            costs.append(cost)
            left_s = (time.monotonic() - began) / done * (len(every) - done)
            print(
                f"[{done}/{len(every)}] {cost['method']} L{cost['length']} seed {cost['seed']}: "
                f"{cost['cpu_s']:.0f} s of processor time, about {left_s / 60:.0f} min left",
                flush=True,
            )
    return costs


def sweep(
    options: argparse.Namespace, data: Path, name: str, models: list[Path], more: str
) -> list:
    """Runs fairseq-extrapolate; returns the rows of its report."""
    results = options.folder / name
    paths = ":".join(str(model / "checkpoint_last.pt") for model in models)
    demo.run(
        f"fairseq-extrapolate {shlex.quote(str(data))} --path {shlex.quote(paths)} "
        f"--gen-subset test --results-path {shlex.quote(str(results))} --max-tokens 8192 --cpu "
        + more
    )
    return json.loads((results / "report.json").read_text())


def interpolated(options: argparse.Namespace, data: Path, kind: str) -> list:
    """Evaluates every ALiBi model with flatter slopes at 2, 4 and 8 times its length."""
    rows = []
    overrides = shlex.quote(repr({"alibi_interpolation": kind}))
    for length in options.lengths:
        models = [folder_of(options, "alibi", length, seed) for seed in options.seeds]
        evals = ",".join(str(length * factor) for factor in (2, 4, 8))
        more = f"--lengths {evals} --model-overrides {overrides}"
        rows += sweep(options, data, f"{kind}-L{length}", models, more)
    return rows


def mean_and_spread(values: list[float]) -> str:
    """Returns 'mean +- standard deviation' (n - 1)."""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def main_table(rows: list[dict], options: argparse.Namespace) -> list[str]:
    """Returns the lines of the table: perplexity by method and length."""
    found: dict[tuple[str, int, int], list[float]] = defaultdict(list)
    for row in rows:
        if row["context_window"] == 0:
            key = (row["position_method"], row["train_length"], row["eval_length"])
            found[key].append(row["perplexity"])
    lines = []
    for length in options.lengths:
        evals = [length * factor for factor in FACTORS]
        lines += [
            f"\nTrained on sequences of {length} tokens:\n",
            "| method | " + " | ".join(f"{e:,}" for e in evals) + " |",
            "|---|" + "---|" * len(evals),
        ]
        for method in options.methods:
            cells = [found.get((method, length, e), []) for e in evals]
            shown = [mean_and_spread(cell) if cell else "n/a" for cell in cells]
            lines.append(f"| {method} | " + " | ".join(shown) + " |")
    return lines


def ratios(rows: list[dict], method: str, factor: int) -> list[float]:
    """Returns perplexity at `factor` times the training length over that at it, for each model."""
    by_model: dict[str, dict[int, float]] = defaultdict(dict)
    length_of: dict[str, int] = {}
    for row in rows:
        if row["position_method"] == method and row["context_window"] == 0:
            by_model[row["checkpoint"]][row["eval_length"]] = row["perplexity"]
            length_of[row["checkpoint"]] = row["train_length"]
    return [
        curve[length_of[model] * factor] / curve[length_of[model]]
        for model, curve in by_model.items()
        if length_of[model] * factor in curve
    ]


def claim(text: str, holds: bool, measured: str) -> str:
    """Returns a row of the table of claims."""
    return f"| {text} | {'yes' if holds else '**no**'} | {measured} |"


def claims(
    rows: list[dict], sliding: list[dict], scaled: dict[str, list[dict]], costs: list[dict]
) -> list[str]:
    """Tests what the paper says against what was measured."""
    lines = ["| claim | holds here | measured |", "|---|---|---|"]
    last = max(FACTORS)
    for method, expected in (("sinusoidal", "degrades"), ("alibi", "does not degrade")):
        found = ratios(rows, method, last)
        if found:
            degrades = min(found) > 1.0
            holds = degrades if expected == "degrades" else max(found) <= 1.005
            text = f"{method} {expected} beyond its training length (at {last} times it)"
            lines.append(
                claim(text, holds, f"perplexity times {min(found):.3f} to {max(found):.3f}")
            )
    lines += [
        _cheaper(rows, costs),
        _early_token_curse(rows, sliding),
        *_interpolation(rows, scaled),
    ]
    return [line for line in lines if line]


def _cheaper(rows: list[dict], costs: list[dict]) -> str:
    """ALiBi short against sinusoidal long: the same evaluation length, which costs less?"""
    lengths = sorted({cost["length"] for cost in costs})
    short, long = lengths[0], lengths[-1]

    def of(method: str, length: int, key: str) -> float:
        return statistics.mean(
            c[key] for c in costs if (c["method"], c["length"]) == (method, length)
        )

    def perplexity(method: str, length: int) -> float:
        return statistics.mean(
            row["perplexity"]
            for row in rows
            if (row["position_method"], row["train_length"], row["eval_length"])
            == (method, length, long)
        )

    if not any(cost["method"] == "sinusoidal" for cost in costs):
        return ""
    ours, theirs = perplexity("alibi", short), perplexity("sinusoidal", long)
    time_ratio = of("alibi", short, "cpu_s") / of("sinusoidal", long, "cpu_s")
    memory_ratio = of("alibi", short, "peak_mib") / of("sinusoidal", long, "peak_mib")
    return claim(
        f"ALiBi trained at {short} costs less than sinusoidal trained at {long} and is no worse at "
        f"{long}",
        ours <= theirs and time_ratio < 1 and memory_ratio < 1,
        f"perplexity {ours:.2f} against {theirs:.2f}; processor time times {time_ratio:.2f}, peak "
        f"memory times {memory_ratio:.2f}",
    )


def _early_token_curse(rows: list[dict], sliding: list[dict]) -> str:
    """Sliding windows give every prediction a long context: does a longer window still help?"""
    curve = {row["eval_length"]: row["perplexity"] for row in sliding}
    if len(curve) < 2:
        return ""
    model = sliding[0]["checkpoint"]
    plain = {
        row["eval_length"]: row["perplexity"]
        for row in rows
        if row["checkpoint"] == model and row["context_window"] == 0
    }
    first, last = min(curve), max(curve)
    gain, slid = plain[first] / plain[last], curve[first] / curve[last]
    return claim(
        "ALiBi's gain beyond the training length is mostly escape from the early-token curse: with "
        "sliding windows little of it is left",
        slid - 1 < 0.5 * (gain - 1),
        f"from {first} to {last}: non-overlapping {100 * (gain - 1):.1f} % better, sliding "
        f"{100 * (slid - 1):.1f} %",
    )


def _interpolation(rows: list[dict], scaled: dict[str, list[dict]]) -> list[str]:
    """Do flatter slopes without retraining help beyond the training length?"""
    plain = {
        (row["checkpoint"], row["eval_length"]): row["perplexity"]
        for row in rows
        if row["context_window"] == 0
    }
    lines = []
    for kind, others in scaled.items():
        found = defaultdict(list)
        for row in others:
            factor = row["eval_length"] // row["train_length"]
            before = plain[row["checkpoint"], row["eval_length"]]
            found[factor].append(row["perplexity"] / before)
        by_factor = ", ".join(
            f"{min(ratio):.3f} to {max(ratio):.3f} at {factor} times"
            for factor, ratio in sorted(found.items())
        )
        lines.append(
            claim(
                f"interpolating the slopes ({kind}, no retraining) helps beyond the training "
                "length",
                all(statistics.mean(ratio) < 1 for ratio in found.values()),
                f"perplexity times {by_factor}",
            )
        )
    return lines


def commit() -> str:
    """Returns the short hash of the checked-out commit."""
    root = Path(__file__).resolve().parent.parent
    asked = ["git", "-C", str(root), "rev-parse", "--short", "HEAD"]
    found = subprocess.run(asked, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def numbers(text: str) -> list[int]:
    """Parses '1,2,3'."""
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add: Any = parser.add_argument
    add("--text", nargs=3, metavar=("TRAIN", "VALID", "TEST"), help="text files to use instead")
    add("--out", type=Path, default=Path("extrapolation-out"), help="folder of all results")
    add("--methods", default=",".join(METHODS), help="position methods")
    add("--lengths", type=numbers, default=[32, 64, 128], help="training lengths")
    add("--seeds", type=numbers, default=[1, 2, 3], help="seeds")
    add("--updates", type=int, default=600, help="updates of each training")
    add("--batch-tokens", type=int, default=2048, help="tokens in a batch")
    add("--most-tokens", type=int, default=1_000_000, help="most tokens of Python's own text")
    add("--jobs", type=int, default=os.cpu_count() or 1, help="trainings at a time")
    options = parser.parse_args()
    options.methods = options.methods.split(",")
    options.folder = options.out.resolve()
    data = demo.prepare(options, options.folder)
    costs = train_all(options, data)
    rows, shortest = [], min(options.lengths)
    for length in options.lengths:
        models = [
            folder_of(options, method, length, seed)
            for method in options.methods
            for seed in options.seeds
        ]
        evals = ",".join(str(length * factor) for factor in FACTORS)
        rows += sweep(options, data, f"sweep-L{length}", models, f"--lengths {evals}")
    sliding: list[dict] = []
    scaled: dict[str, list[dict]] = {}
    if "alibi" in options.methods:
        first = [folder_of(options, "alibi", shortest, options.seeds[0])]
        evals = ",".join(str(shortest * factor) for factor in (1, 2, 4))
        sliding = sweep(options, data, "sliding", first, f"--lengths {evals} --strides 8")
        for kind in ("linear", "ntk"):
            scaled[kind] = interpolated(options, data, kind)
    report = [
        "# Results: perplexity beyond the training length",
        "",
        f"{datetime.date.today()}, commit {commit()}, {platform.machine()} with "
        f"{os.cpu_count()} cores, one core for each training "
        f"({statistics.median(c['cpu_s'] for c in costs):.0f} s of processor time in the median, "
        f"{max(c['cpu_s'] for c in costs):.0f} s at most). Command:",
        "",
        "```bash",
        "bash scripts/reproduce_extrapolation.sh " + shlex.join(sys.argv[1:]),
        "```",
        "",
        f"Models of 3 layers of width 128, {options.updates} updates of {options.batch_tokens} "
        f"tokens, {len(options.seeds)} seeds that all methods share; perplexity on the test "
        "text, non-overlapping windows, mean and standard deviation over seeds. These are small "
        "models on little text: they show the shape of curves, not what a method can reach.",
        *main_table(rows, options),
        "",
        "## Claims",
        "",
        *claims(rows, sliding, scaled, costs),
    ]
    path = options.folder / "results.md"
    path.write_text("\n".join(report) + "\n", encoding="utf-8")
    print(path.read_text())
    print(f"report    {path}")
    for length in options.lengths:
        print(f"picture   {options.folder / f'sweep-L{length}' / 'extrapolation.png'}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
