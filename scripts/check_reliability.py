#!/usr/bin/env python3
"""Damages files and kills training runs, and checks that nothing is lost, run or taken for whole.

Prints a table. `--cases` damaged files of each kind are read: each has to be refused with a message
or to read as the same content (of text and ids, which have no checksum: as some content), within
time and memory. `--kills` runs are killed at random moments, two of five at the next save from
there, and resumed: each has to end with the tensors and log lines of the run that nobody killed.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from fairseq.checkpoint.retention import checkpoint_paths
from fairseq.checkpoint_utils import load_checkpoint_to_cpu
from fairseq.data.dictionary import Dictionary
from fairseq.data.indexed_dataset import make_dataset
from fairseq_cli._run import _is_for_the_user

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden" / "invented"
# A reader may take this many times the file's size, beyond what Python itself needs.
MEMORY_FACTOR = 8
MEMORY_FLOOR = 32 << 20
TIME_LIMIT_S = 20


# ---- damage ----

Damage = tuple[str, float, int, bytes]
_KINDS = ("flip", "overwrite", "cut out", "insert", "truncate", "zero", "repeat")


def damages() -> st.SearchStrategy[list[Damage]]:
    """Returns what happens to a file: (kind, place from 0 to 1, length, bytes), a few times."""
    one = st.tuples(
        st.sampled_from(_KINDS),
        st.one_of(st.floats(0, 1), st.sampled_from([0.0, 1e-4, 1e-3, 0.999, 0.9999])),
        st.integers(1, 64),
        st.binary(min_size=1, max_size=16),
    )
    return st.lists(one, min_size=1, max_size=4)


def damaged(content: bytes, todo: Sequence[Damage]) -> bytes:
    """Returns a file's content after damage."""
    data = bytearray(content)
    for kind, place, length, new in todo:
        at = min(int(place * len(data)), max(0, len(data) - 1))
        if kind == "flip" and data:
            data[at] ^= new[0] or 1
        elif kind == "overwrite":
            data[at : at + len(new)] = new
        elif kind == "cut out":
            del data[at : at + length]
        elif kind == "insert":
            data[at:at] = new
        elif kind == "truncate":
            del data[at:]
        elif kind == "zero":
            data[at : at + length] = bytes(len(data[at : at + length]))
        else:
            data[at:at] = data[at : at + length]
    return bytes(data)


# ---- readers ----


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        name: in the table.
        files: name -> content of what a reader needs.
        victim: the name of the file that is damaged.
        read: folder -> something comparable.
        is_checked: whether content that reads otherwise would have to be noticed.
    """

    name: str
    files: dict[str, bytes]
    victim: str
    read: Callable[[Path], Any]
    is_checked: bool = False
    repack: Callable[[bytes, bytes], bytes] | None = None


def _read_checkpoint(folder: Path) -> Any:
    state = load_checkpoint_to_cpu(folder / "c.pt")
    model = {name: tensor.numpy().tobytes() for name, tensor in state["model"].items()}
    return model, str(state["cfg"])


def _read_dataset(folder: Path, form: str) -> Any:
    dataset = make_dataset(str(folder / "d"), form)
    assert dataset is not None
    return [np.asarray(dataset[i]).tobytes() for i in range(len(dataset))]


def _small_checkpoint() -> bytes:
    """Returns a checkpoint of the original, small enough to be damaged everywhere."""
    path = GOLDEN / "ckpt" / "wiki103_tiny" / "checkpoint_last.pt"
    state = torch.load(path, weights_only=True)
    state.pop("last_optimizer_state", None)
    state["model"] = {
        name: tensor[:8].clone() if tensor.dim() else tensor
        for name, tensor in state["model"].items()
    }
    out = io.BytesIO()
    torch.save(state, out)
    return out.getvalue()


def _pickle_of(content: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        name = next(n for n in archive.namelist() if n.endswith("data.pkl"))
        return archive.read(name)


def _with_pickle(content: bytes, pickled: bytes) -> bytes:
    """Returns a checkpoint with another pickle in it, and checksums that fit."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(out, "w") as new:
        for name in archive.namelist():
            new.writestr(name, pickled if name.endswith("data.pkl") else archive.read(name))
    return out.getvalue()


def kinds() -> list[Kind]:
    """Returns the kinds of files that are damaged."""
    checkpoint = _small_checkpoint()
    main = GOLDEN / "bin" / "main"
    mmap = {f"d.{end}": (main / f"valid.{end}").read_bytes() for end in ("idx", "bin")}
    legacy = _legacy_files()
    dictionary = "".join(
        (main / "dict.txt").read_text(encoding="utf-8").splitlines(keepends=True)[:300]
    ).encode()

    def read_mmap(folder: Path) -> Any:
        return _read_dataset(folder, "mmap")

    def read_legacy(folder: Path) -> Any:
        return _read_dataset(folder, "lazy")

    def read_dictionary(folder: Path) -> Any:
        return Dictionary.load(folder / "dict.txt").symbols

    return [
        Kind("checkpoint", {"c.pt": checkpoint}, "c.pt", _read_checkpoint, is_checked=True),
        Kind(
            "pickle in it, checksums right",
            {"c.pt": checkpoint},
            "c.pt",
            _read_checkpoint,
            repack=_with_pickle,
        ),
        Kind("index (mmap)", mmap, "d.idx", read_mmap),
        Kind("data (mmap)", mmap, "d.bin", read_mmap),
        Kind("index (legacy)", legacy, "d.idx", read_legacy),
        Kind("data (legacy)", legacy, "d.bin", read_legacy),
        Kind("dictionary", {"dict.txt": dictionary}, "dict.txt", read_dictionary),
    ]


def _legacy_files() -> dict[str, bytes]:
    from fairseq.data.indexed_dataset import make_builder

    with tempfile.TemporaryDirectory() as folder:
        source = make_dataset(str(GOLDEN / "bin/main/valid"), "mmap")
        assert source is not None
        builder = make_builder(f"{folder}/d.bin", "lazy", vocab_size=5000)
        for i in range(len(source)):
            builder.add_item(torch.as_tensor(np.asarray(source[i])))
        builder.finalize(f"{folder}/d.idx")
        return {name: (Path(folder) / name).read_bytes() for name in ("d.idx", "d.bin")}


# ---- reading what is damaged ----


class Hang(Exception):
    """A reader took too long."""


@contextlib.contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    def stop(number: int, frame: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _memory(name: str) -> int:
    """Returns a figure of /proc/self/status in bytes, such as VmRSS or its peak, VmHWM."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in text.splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def _forget_peak() -> int:
    """Lets the peak begin at what is used now, and returns that (Linux)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _memory("VmRSS")


def examine(kind: Kind, content: bytes, expected: Any, folder: Path) -> str:
    """Reads one damaged file; returns what came of it: refused, same, other, or a fault."""
    (folder / kind.victim).write_bytes(content)
    try:
        with _time_limit(TIME_LIMIT_S):
            found = kind.read(folder)
    except Hang:
        return f"FAULT: longer than {TIME_LIMIT_S} s"
    except Exception as error:
        if str(error) and _is_for_the_user(error):
            return "refused"
        return f"FAULT: {type(error).__name__}: {error}"
    if found == expected:
        return "same"
    return "FAULT: other content, and nobody noticed" if kind.is_checked else "other"


def check_kind(kind: Kind, cases: int, seed_: int) -> dict[str, Any]:
    """Damages a kind of file many times; returns counts, and the memory that it took."""
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, content in kind.files.items():
            (folder / file).write_bytes(content)
        whole = kind.files[kind.victim]
        expected = kind.read(folder)
        gc.collect()
        before = _forget_peak()

        @seed(seed_)
        @settings(
            max_examples=cases,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(damages())
        def one(todo: list[Damage]) -> None:
            if kind.repack is not None:
                content = kind.repack(whole, damaged(_pickle_of(whole), todo))
            else:
                content = damaged(whole, todo)
            outcomes[examine(kind, content, expected, folder)] += 1

        one()
        grown = _memory("VmHWM") - before
    limit = MEMORY_FLOOR + MEMORY_FACTOR * len(whole)
    if grown > limit:
        outcomes[f"FAULT: {grown:,} bytes of memory, {limit:,} are allowed"] += 1
    return {"name": kind.name, "size": len(whole), "grown": grown, "outcomes": dict(outcomes)}


# ---- killing ----

_TRAINING = (
    "--task language_modeling --arch transformer_lm_wiki103 --decoder-layers 2 "
    "--decoder-embed-dim 32 --decoder-ffn-embed-dim 64 --decoder-attention-heads 4 "
    "--adaptive-softmax-cutoff 200,1000 --adaptive-input-cutoff 200,1000 "
    "--adaptive-softmax-factor 2 --adaptive-input-factor 2 --dropout 0.2 --attention-dropout 0.1 "
    "--criterion adaptive_loss --ddp-backend legacy_ddp --optimizer adam --lr 0.003 "
    "--clip-norm 0.5 --max-tokens 256 --tokens-per-sample 64 --max-update 24 --seed 1 --cpu "
    "--save-interval-updates 1 --keep-interval-updates 2 --no-epoch-checkpoints "
    "--disable-validation --log-interval 1 --log-format json --num-workers 0"
)
FORMS = {"float32": "", "fp16": " --fp16 --cpu-half --fp16-init-scale 4"}


def train_in_child(folder: str, form: str) -> None:
    """Trains into a folder, appending to its log; runs in a process of its own."""
    from fairseq_cli import train

    torch.set_num_threads(1)
    log = os.open(f"{folder}/log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = ["fairseq-train", str(GOLDEN / "bin/main"), *(_TRAINING + FORMS[form]).split()]
    sys.argv += ["--save-dir", f"{folder}/ckpt"]
    train.cli_main()


def _start(folder: Path, form: str) -> Any:
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=train_in_child, args=(str(folder), form))
    folder.mkdir(parents=True, exist_ok=True)
    process.start()
    return process


def _train_whole(folder: Path, form: str) -> float:
    """Trains to the end; returns the seconds from the first update on."""
    process = _start(folder, form)
    _wait_for_updates(process, folder)
    began = time.monotonic()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"training failed: {(folder / 'log').read_text()[-2000:]}")
    return time.monotonic() - began


def _wait_for_updates(process: Any, folder: Path) -> None:
    log = folder / "log"
    while process.is_alive() and not (log.exists() and b"train_inner" in log.read_bytes()):
        time.sleep(0.002)


def _wait_for_a_save(process: Any, folder: Path) -> None:
    while process.is_alive() and not list(folder.glob("*.tmp")):
        time.sleep(0.0002)


_CLOCKS = ("wps", "ups", "wall")


def log_lines(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Returns update -> the lines of the log about it, without what depends on the clock."""
    lines: dict[str, list[dict[str, Any]]] = {}
    for text in (folder / "log").read_text(errors="replace").splitlines():
        _, is_update, rest = text.partition(" | train_inner | ")
        try:
            line = json.loads(rest) if is_update else None
        except ValueError:
            continue  # the run was killed in the middle of a line
        if line is not None:
            kept = {key: value for key, value in line.items() if not key.endswith(_CLOCKS)}
            lines.setdefault(line["num_updates"], []).append(kept)
    return lines


def same_tensors(a: Any, b: Any) -> bool:
    """Tells whether nested values are equal, tensors to the last bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_tensors(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_tensors, a, b))
    return bool(a == b)


_TENSORS = ("model", "last_optimizer_state")


def differences(whole: Path, resumed: Path) -> list[str]:
    """Returns what a resumed run has otherwise than the whole one."""
    first, second = (
        torch.load(folder / "ckpt/checkpoint_last.pt", weights_only=True)
        for folder in (whole, resumed)
    )
    found = [key for key in _TENSORS if not same_tensors(first[key], second[key])]
    # The history has an entry more for each start; the last is that of the end.
    if not same_tensors(first["optimizer_history"][-1], second["optimizer_history"][-1]):
        found.append("optimizer_history")
    masters = [state["alibi"].get("fp32_masters") for state in (first, second)]
    if not same_tensors(*masters):
        found.append("float32 masters")
    expected, logged = log_lines(whole), log_lines(resumed)
    if set(expected) != set(logged):
        found.append("logged updates")
    found += [
        f"log of update {update}"
        for update, lines in logged.items()
        if any([line] != expected.get(update) for line in lines)
    ]
    return found


def check_kills(kills: int, seed_: int, work: Path) -> dict[str, Any]:
    """Kills runs and resumes them; returns counts."""
    # Every optimizer imports the second: once, before processes are forked.
    needed = ["fairseq_cli.train", "torch._dynamo"]
    multiprocessing.get_context("forkserver").set_forkserver_preload(needed)
    rng = random.Random(seed_)
    durations = {}
    for form in FORMS:
        _train_whole(work / f"warm-{form}", form)
        durations[form] = _train_whole(work / form, form)
    outcomes: Counter[str] = Counter()
    moments: Counter[str] = Counter()
    for number in range(kills):
        form = list(FORMS)[number % len(FORMS)]
        folder = work / f"kill{number}"
        while not _kill_a_run(folder, form, number, rng.uniform(0, durations[form])):
            shutil.rmtree(folder)  # it had ended before
        moment = moment_of(folder / "ckpt")
        moments[moment] += 1
        _train_whole(folder, form)
        found = differences(work / form, folder)
        outcome = "FAULT: " + ", ".join(found) if found else "same"
        outcomes[f"{outcome}, {form}"] += 1
        print(f"kill {number + 1} of {kills}, {form}: {moment}: {outcome}", file=sys.stderr)
        shutil.rmtree(folder)
    return {"outcomes": dict(outcomes), "moments": dict(moments)}


def _kill_a_run(folder: Path, form: str, number: int, delay_s: float) -> bool:
    """Starts a run and kills it some seconds after its first update; returns whether it could."""
    process = _start(folder, form)
    if number % 10 != 9:  # else perhaps before it has begun
        _wait_for_updates(process, folder)
    process.join(timeout=delay_s)
    if number % 5 in (1, 3):
        _wait_for_a_save(process, folder / "ckpt")
    process.kill()
    process.join()
    return bool(process.exitcode)


def moment_of(folder: Path) -> str:
    """Returns where in a run a kill fell, by the files that it left."""
    last = folder / "checkpoint_last.pt"
    by_update = checkpoint_paths(folder, r"checkpoint_\d+_(\d+)\.pt") if folder.exists() else []
    if list(folder.glob("*.tmp")):
        return "inside a save"
    if not by_update:
        return "between saves" if last.exists() else "before the first save"
    # A save writes the file by update, links the last one to it and removes the oldest.
    is_linked = last.exists() and last.stat().st_mtime >= Path(by_update[0]).stat().st_mtime
    return "between saves" if is_linked and len(by_update) <= 2 else "inside a save"


# ---- the report ----


def faults(outcomes: dict[str, int]) -> list[str]:
    """Returns the outcomes that must not be."""
    return [name for name in outcomes if name.startswith("FAULT")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the script with command-line arguments; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--cases", type=int, default=1000, help="damaged files of each kind")
    parser.add_argument("--kills", type=int, default=50, help="training runs to kill")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    is_bad = False
    if args.cases:
        columns = "| file | bytes | cases | refused | same | other | memory, MiB |"
        print(columns + "\n" + "|---" * 7 + "|", flush=True)
    for kind in kinds() if args.cases else ():
        found = check_kind(kind, args.cases, args.seed)
        counts = found["outcomes"]
        shown = " | ".join(str(counts.get(name, 0)) for name in ("refused", "same", "other"))
        total = sum(counts.values())
        grown = found["grown"] / 2**20
        print(f"| {kind.name} | {found['size']:,} | {total} | {shown} | {grown:.1f} |", flush=True)
        for fault in faults(counts):
            is_bad = True
            print(f"  {fault}: {counts[fault]} times")
    if args.kills:
        with tempfile.TemporaryDirectory() as work:
            found = check_kills(args.kills, args.seed, Path(work))
        print(
            f"\n{args.kills} runs killed: "
            + ", ".join(f"{count} {moment}" for moment, count in found["moments"].items())
            + "; after resuming:"
        )
        for outcome, count in found["outcomes"].items():
            print(f"  {count} {outcome}")
        is_bad |= bool(faults(found["outcomes"]))
    return int(is_bad)


if __name__ == "__main__":
    sys.exit(main())
