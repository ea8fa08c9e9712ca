#!/usr/bin/env python3
"""Megabytes of text per second of fairseq-preprocess, and seconds until a command starts.

Both passes over the text are measured (counting words, then encoding them), with one process and
with two, as whole commands, against the same written plainly: line by line, word by word, as the
original does. The plain form gets the first megabytes only. In turn; medians. The last line is
JSON.

    scripts/bench_preprocess.py                          # invented text, 30,000 words
    scripts/bench_preprocess.py --words 267744 --mb 240 --runs 3
    scripts/bench_preprocess.py --text wiki.test.tokens
    scripts/bench_preprocess.py --only start             # start-up of the commands
"""

from __future__ import annotations

import argparse
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from bench_tools import report, seconds_of

from fairseq_cli import _commands

SPACES = re.compile(r"\s+")
PLAIN_SIZE = 1_000_000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, help="a text, repeated; else invented")
    parser.add_argument("--words", type=int, default=30_000, help="vocabulary of invented text")
    parser.add_argument("--mb", type=int, default=24, help="megabytes of text, at most")
    parser.add_argument("--runs", type=int, default=5, help="runs of each form that count")
    parser.add_argument("--only", choices=["text", "start"], default="text")
    options = parser.parse_args()
    if options.only == "start":
        report("start_up", start_up(options.runs))
        return
    with tempfile.TemporaryDirectory() as folder:
        report("preprocess", [measure(Path(folder), options)])


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measures all forms on one text."""
    text, short = folder / "train.txt", folder / "short.txt"
    content = options.text.read_text("utf-8") if options.text else invented_text(options.words)
    text.write_text(content * max(1, options.mb * 10**6 // len(content.encode())), "utf-8")
    short.write_text(content[:PLAIN_SIZE].rpartition("\n")[0] + "\n", "utf-8")
    forms: dict[str, Callable[[], object]] = {
        "one process": lambda: preprocess_text(text, folder / "one", 1),
        "two processes": lambda: preprocess_text(text, folder / "two", 2),
        "plain": lambda: preprocess_plainly(short, folder),
        "str.split": lambda: [line.split() for line in text.open(encoding="utf-8")],
    }
    seconds = seconds_of(forms, options.runs)
    assert (folder / "one/train.bin").read_bytes() == (folder / "two/train.bin").read_bytes()
    preprocess_text(short, folder / "short", 1)
    assert (folder / "short/train.bin").read_bytes() == (folder / "plain.bin").read_bytes()
    sizes = dict.fromkeys(forms, text.stat().st_size) | {"plain": short.stat().st_size}
    row: dict[str, Any] = {"MB": text.stat().st_size / 1e6}
    row["types"] = sum(1 for _ in (folder / "one/dict.txt").open(encoding="utf-8")) + 4
    row |= {f"{name} MB/s": sizes[name] / seconds[name] / 1e6 for name in forms}
    row["times as fast"] = row["one process MB/s"] / row["plain MB/s"]
    return row


def invented_text(words: int) -> str:
    """Returns about 12 MB of words that follow Zipf's law, frequent ones short, in lines of 90."""
    weights = 1 / (np.arange(words) + 2.7)
    drawn = np.random.default_rng(0).choice(words, 2_200_000, p=weights / weights.sum())
    drawn[:words] = np.arange(words)
    spelled = [f"{np.base_repr(n, 36).lower()}{'ing' * (n > 500)}" for n in range(words)]
    lines = np.array_split(drawn, len(drawn) // 90)
    return "".join(" " + " ".join(spelled[n] for n in line) + " \n" for line in lines)


def preprocess_text(text: Path, destination: Path, workers: int) -> None:
    """Runs fairseq-preprocess, as a process of its own: forks of one that holds torch are slow."""
    shutil.rmtree(destination, ignore_errors=True)
    program = "from fairseq_cli._commands import preprocess; preprocess()"
    flags = ["--only-source", "--trainpref", str(text), "--destdir", str(destination)]
    command = [sys.executable, "-c", program, *flags, "--workers", str(workers)]
    subprocess.run(command, check=True, capture_output=True)


def preprocess_plainly(text: Path, folder: Path) -> None:
    """Counts and encodes line by line and word by word, and writes the ids."""
    counts: Counter[str] = Counter()
    with text.open(encoding="utf-8") as lines:
        for line in lines:
            for word in SPACES.sub(" ", line).strip().split():
                counts[word] += 1
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    ranked = sorted((word for word in counts if word not in special), key=lambda w: (-counts[w], w))
    ids = {word: number for number, word in enumerate(special + ranked)}
    with text.open(encoding="utf-8") as lines, (folder / "plain.bin").open("wb") as out:
        for line in lines:
            words = SPACES.sub(" ", line).strip().split()
            encoded = np.empty(len(words) + 1, dtype=np.uint16 if len(ids) < 65500 else np.uint32)
            for i, word in enumerate(words):
                encoded[i] = ids.get(word, 3)
            encoded[-1] = 2
            out.write(encoded.tobytes())


def start_up(runs: int) -> list[dict[str, Any]]:
    """Measures `--help` of every command as a process of its own, and importing torch."""
    programs = {"import torch": "import torch"}
    for name in _commands.__all__:
        programs[name] = f"import sys; sys.argv = [{name!r}, '--help']; "
        programs[name] += f"from fairseq_cli._commands import {name}; {name}()"
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(runs):
        for name, program in programs.items():
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
            seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    torch_s = medians["import torch"]
    return [{"command": n, "s": s, "more than torch s": s - torch_s} for n, s in medians.items()]


if __name__ == "__main__":
    main()
