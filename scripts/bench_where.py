#!/usr/bin/env python3
"""Where the time and memory of training go, and how they grow.

Every line is a process of its own, since the largest memory of a process never falls. The shares
are those of an update under torch's profiler, by operator and by what it is part of. The last line
is JSON.

    scripts/bench_where.py                     # 32,768 tokens in rows of 512, 4,096, 32,768
    scripts/bench_where.py --case 2            # one of these, counted from 0, in this process
    scripts/bench_where.py --only width        # 128 to 1,024
    scripts/bench_where.py --only vocabulary   # 6,424 to 267,744 words
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_tools import build_trainer, first_batch, model_flags, report, write_data
from bench_training import DROPOUTS, dropout_flags
from torch.profiler import ProfilerActivity, profile, record_function

from fairseq import utils
from fairseq.modules import FairseqDropout

SMALL, LARGE = "1000,3000", "20000,60000"
# length, rows, layers, width, heads, words, cutoffs
CASES: dict[str, list[tuple[int, int, int, int, int, int, str]]] = {
    "length": [
        (512, 64, 2, 128, 4, 6424, SMALL),
        (4096, 8, 2, 128, 4, 6424, SMALL),
        (32768, 1, 2, 64, 2, 6424, SMALL),
    ],
    "width": [(512, 4, 4, width, 8, 6424, SMALL) for width in (128, 256, 512, 1024)],
    "vocabulary": [
        (512, 4, 4, 256, 8, 6424, SMALL),
        (512, 4, 4, 256, 8, 65536, LARGE),
        (512, 4, 4, 256, 8, 267_744, LARGE),
    ],
}
# What an operator belongs to by its own name, or by the first of those it is called from.
PARTS = {
    "attention": ("attention", "_Tiled", "aten::bmm", "aten::baddbmm", "aten::_softmax"),
    "optimizer": ("Optimizer.step", "aten::_foreach", "aten::linalg_vector_norm"),
    "softmax": ("_CrossEntropy", "aten::_log_softmax"),
    "norm": ("aten::native_layer_norm",),
    "relu and dropout": ("dropout", "_ReluFeedForward"),
}
PRODUCTS = ("aten::mm", "aten::addmm")
WITHOUT_PRODUCTS = ("norm", "relu and dropout")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=CASES, default="length")
    parser.add_argument("--case", type=int, help="measure this one in this process")
    options = parser.parse_args()
    if options.case is not None:
        print(json.dumps(measure(CASES[options.only][options.case])))
        return
    rows = []
    for number in range(len(CASES[options.only])):
        command = [sys.executable, *sys.argv, "--case", str(number)]
        rows.append(json.loads(subprocess.check_output(command).splitlines()[-1]))
        print(json.dumps(rows[-1]), flush=True)
    report(f"where_{options.only}", rows)


def measure(case: tuple[int, int, int, int, int, int, str]) -> dict[str, Any]:
    """Measures the updates of one case: time, memory by stage, shares."""
    length, rows, layers, width, heads, words, cutoffs = case
    tokens = rows * length
    utils.keep_freed_memory()  # as fairseq-train does
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        write_data(data, words=words, tokens=2 * tokens)
        flags = [*model_flags(layers, width, cutoffs, heads), *dropout_flags(DROPOUTS)]
        trainer = build_trainer(data, flags, length=length, tokens=tokens)
        batch = first_batch(trainer, length)
    row: dict[str, Any] = {"length": length, "rows": rows, "width": width, "words": words}
    row["model MiB"] = sum(p.numel() for p in trainer.get_model().parameters()) * 4 / 2**20
    row["validation MiB"] = grown_by(lambda: trainer.valid_step(batch))
    row["update MiB"] = row["validation MiB"] + grown_by(lambda: trainer.train_step([batch]))
    for _ in range(3):  # until no memory is fetched from the system any more
        trainer.train_step([batch])
    seconds, parts = shares(trainer, batch)
    return row | {"seconds": seconds, "tok/s": tokens / seconds} | parts


def grown_by(function: Callable[[], object]) -> float:
    """Returns by how many MiB a function raises the largest memory of the process so far."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    function()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def shares(trainer: Any, batch: dict[str, Any]) -> tuple[float, dict[str, float]]:
    """Returns how long an update takes under the profiler, and which share each part takes."""
    mark_parts(trainer.get_model())
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        began = time.perf_counter()
        trainer.train_step([batch])
        whole = time.perf_counter() - began
    seconds: dict[str, float] = defaultdict(float)
    for event in profiler.events():
        seconds[part_of(event)] += event.self_cpu_time_total / 1e6
    rest = whole - sum(s for part, s in seconds.items() if part != "rest")
    named = ("products", *PARTS)
    parts = {part: round(seconds[part] / whole, 3) for part in named}
    return whole, parts | {"rest": round(rest / whole, 3)}


def mark_parts(model: Any) -> None:
    """Has attention and dropout, which are more than one operator, show up by name."""
    for layer in model.decoder.layers:
        layer.self_attn.attend = under_name("attention", layer.self_attn.attend)
    for module in model.modules():
        if isinstance(module, FairseqDropout):
            module.forward = under_name("dropout", module.forward)


def under_name(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function with its calls recorded under a name."""

    def recorded(*args: Any, **kwargs: Any) -> Any:
        with record_function(name):
            return function(*args, **kwargs)

    return recorded


def part_of(event: Any) -> str:
    """Returns the part that an operator belongs to."""
    is_product = event.name in PRODUCTS
    caller = event
    while caller is not None:
        for part, names in PARTS.items():
            if caller.name.startswith(names):
                return "products" if is_product and part in WITHOUT_PRODUCTS else part
        caller = caller.cpu_parent
    return "products" if is_product else "rest"


if __name__ == "__main__":
    main()
