"""Running fairseq-eval-lm inside a test, and reading what it logs."""

from __future__ import annotations

import json
import logging
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairseq import options
from fairseq.dataclass.legacy import namespace_to_config
from fairseq_cli import eval_lm

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "invented"


@dataclass
class Evaluation:
    """What an evaluation returned; what the command logged, its warnings, and the whole log."""

    loss: float
    perplexity: float
    messages: list[str]
    warnings: list[str]
    log: list[str]

    @property
    def num_tokens(self) -> int:
        """The N in `Evaluated N tokens`."""
        line = next(m for m in self.messages if m.startswith("Evaluated "))
        return int(line.split()[1].replace(",", ""))


def evaluate(
    monkeypatch: Any, caplog: Any, command: str | list[str], folder: Path = GOLDEN
) -> Evaluation:
    """Runs the command's main function in a folder, on the CPU; errors come out as exceptions."""
    arguments = shlex.split(command) if isinstance(command, str) else list(command)
    caplog.clear()
    with monkeypatch.context() as patch, caplog.at_level(logging.INFO):
        patch.chdir(folder)
        args = options.parse_args_and_arch(
            options.get_eval_lm_parser(), ["--cpu", "--num-workers", "0", *arguments]
        )
        result = eval_lm.main(namespace_to_config(args))
    records = list(caplog.records)
    return Evaluation(
        result["loss"],
        result["perplexity"],
        [r.getMessage() for r in records if r.name == "fairseq_cli.eval_lm"],
        [r.getMessage() for r in records if r.levelno >= logging.WARNING],
        [r.getMessage() for r in records],
    )


def fails(monkeypatch: Any, capsys: Any, command: str, folder: Path = GOLDEN) -> tuple[int, str]:
    """Runs the whole command, which must fail; returns exit code and what stderr says."""
    monkeypatch.chdir(folder)
    arguments = ["--cpu", "--num-workers", "0", *shlex.split(command)]
    monkeypatch.setattr(sys, "argv", ["fairseq-eval-lm", *arguments])
    capsys.readouterr()
    try:
        eval_lm.cli_main()
        code = 0
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    return code, capsys.readouterr().err


def recorded(folder: Path) -> dict[str, dict[str, Any]]:
    """Returns name -> recorded evaluation of the original."""
    lines = (folder / "eval" / "RESULTS.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return {row["name"]: row for row in rows if not row["error"] and row["loss_base2"] is not None}
