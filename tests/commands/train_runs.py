"""Running fairseq-train inside a test, and reading what it logs."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import re
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fairseq.logging import metrics
from fairseq.trainer import Trainer
from fairseq_cli import preprocess
from fairseq_cli import train as train_command

GOLDEN = Path(__file__).parents[1] / "golden" / "invented"

# A tiny model with everything that wiki103 models have; every dropout is 0.
TINY_MODEL = (
    "--task language_modeling --arch transformer_lm_wiki103 --decoder-layers 2 "
    "--decoder-embed-dim 32 --decoder-ffn-embed-dim 64 --decoder-attention-heads 4 "
    "--adaptive-softmax-cutoff 20,60 --adaptive-input-cutoff 20,60 --adaptive-softmax-factor 2 "
    "--adaptive-input-factor 2 --dropout 0 --attention-dropout 0 --activation-dropout 0 "
    "--adaptive-softmax-dropout 0 --criterion adaptive_loss --ddp-backend legacy_ddp"
)
TINY_TRAINING = (
    "--lr 0.5 --t-mult 2 --lr-period-updates 20 --lr-scheduler cosine --lr-shrink 0.75 "
    "--warmup-updates 4 --warmup-init-lr 1e-07 --optimizer nag --min-lr 0.0001 --clip-norm 0.5 "
    "--max-tokens 64 --update-freq 2 --tokens-per-sample 16 --seed 1 --sample-break-mode none "
    "--required-batch-size-multiple 1 --cpu --log-interval 1 --log-format json --num-workers 0"
)


def tiny_line(number: int) -> str:
    """Returns a line of the made-up corpus: words follow from the line's number."""
    words = [f"w{(number * number + 3 * j * j + j) % 70}" for j in range(7 * number % 11)]
    return " ".join(words) + "\n"


def make_tiny_data(folder: Path) -> Path:
    """Writes and binarizes 60 lines of training and 20 of validation text: 361 and 114 tokens."""
    (folder / "train").write_text("".join(tiny_line(i) for i in range(60)))
    (folder / "valid").write_text("".join(tiny_line(i + 5) for i in range(20)))
    arguments = f"--only-source --trainpref {folder}/train --validpref {folder}/valid"
    parser = preprocess.options.get_preprocessing_parser(default_task="language_modeling")
    preprocess.main(parser.parse_args(f"{arguments} --destdir {folder}/bin".split()))
    return folder / "bin"


def set_formula_weights(model: torch.nn.Module) -> None:
    """Sets weights that depend on nothing but their names and places."""
    for name, param in model.named_parameters():
        k = torch.arange(param.numel(), dtype=torch.float64)
        values = 0.05 * torch.sin(0.37 * k + len(name))
        if "layer_norm.weight" in name:
            values = 1 + 0.1 * torch.sin(k)
        param.data.copy_(values.view_as(param).float())


@dataclass
class Run:
    """What a run logged and did."""

    exit_code: int
    records: list[tuple[str, str, str]]  # (logger, level, message)
    ids: list[list[list[int]]] = field(default_factory=list)

    def messages(self, logger: str | None = None) -> list[str]:
        """Returns the messages, those of one logger or all."""
        return [m for name, _, m in self.records if logger is None or name == logger]

    def json(self, tag: str) -> list[dict[str, Any]]:
        """Returns the JSON lines of a tag."""
        return [json.loads(message) for message in self.messages(tag)]

    def curve(self) -> dict[int, dict[str, float]]:
        """Returns update -> what its interim line says."""
        lines = [{k: float(v) for k, v in line.items()} for line in self.json("train_inner")]
        return {int(line["num_updates"]): line for line in lines}

    def text(self) -> str:
        """Returns all messages as one text."""
        return "\n".join(self.messages())


def train(monkeypatch: Any, caplog: Any, command: str | list[str]) -> Run:
    """Runs fairseq-train in this process."""
    arguments = shlex.split(command) if isinstance(command, str) else command
    ids: list[list[list[int]]] = []
    step = Trainer.train_step

    def recording(self: Trainer, samples: list[Any], **kwargs: Any) -> Any:
        ids.append([sample["id"].tolist() if sample else [] for sample in samples])
        return step(self, samples, **kwargs)

    caplog.clear()
    with monkeypatch.context() as patch, caplog.at_level(logging.INFO):
        patch.setattr(Trainer, "train_step", recording)
        patch.setattr(sys, "argv", ["fairseq-train", *arguments])
        try:
            train_command.cli_main()
            code = 0
        except SystemExit as leaving:
            code = int(leaving.code or 0)
    metrics.reset()
    records = [(r.name, r.levelname, r.getMessage()) for r in caplog.records]
    return Run(code, records, ids)


def golden_command(name: str, save_dir: Path, **changes: Any) -> list[str]:
    """Returns the arguments of a golden run, writing elsewhere.

    Args:
        name: folder under `ckpt`.
        save_dir: where to write.
        **changes: options (with underscores) to replace or add; None for a bare flag.
    """
    line = (GOLDEN / "ckpt" / name / "COMMAND.txt").read_text().splitlines()[0]
    line = re.sub(r"(\([\d., ]+\))", r"'\1'", line)
    arguments = [*shlex.split(line)[1:], "--cpu", "--num-workers", "0"]
    for option, value in {"save_dir": save_dir, **changes}.items():
        flag = "--" + option.replace("_", "-")
        if value is None:
            arguments.append(flag)
        elif flag in arguments:
            arguments[arguments.index(flag) + 1] = str(value)
        else:
            arguments += [flag, str(value)]
    return arguments


def without_times(line: dict[str, Any]) -> dict[str, Any]:
    """Returns a log line without what depends on the clock."""
    clocks = ("wps", "ups", "wall")
    return {k: v for k, v in line.items() if not k.endswith(clocks)}


def same_bits(a: Any, b: Any) -> bool:
    """Tells whether nested containers are equal to the last bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_bits(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_bits, a, b))
    return a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b))


def processes_below(pid: int) -> list[int]:
    """Returns the ids of a process's children, theirs and so on, rising (Linux)."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            parents[int(entry.name)] = int(fields[1])
    below = [pid]
    for parent in below:
        below += [child for child, its_parent in parents.items() if its_parent == parent]
    return sorted(below[1:])
