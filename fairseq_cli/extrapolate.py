"""fairseq-extrapolate: train short, test long; models against lengths, as table and picture.

Every row of the report is fairseq-eval-lm's main function, run with that length in a process of
its own, so that numbers are the same and peaks of memory do not mix.
"""

from __future__ import annotations

import argparse
import datetime
import logging
import multiprocessing
import os
import platform
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fairseq import checkpoint_utils, options, tasks, utils
from fairseq.data.data_utils import split_paths
from fairseq.dataclass.arguments import literal_dict
from fairseq.dataclass.legacy import namespace_to_config
from fairseq.distributed.fork_server import start_server
from fairseq.evaluation import plot, report
from fairseq.evaluation.by_position import LossByPosition
from fairseq.evaluation.extrapolation import (
    NON_OVERLAPPING,
    CheckpointInfo,
    Journal,
    Row,
    TimeLeft,
    Window,
    describe_checkpoint,
    file_digest,
    row_cost,
    windows_of,
)
from fairseq.logging import progress_bar
from fairseq_cli import eval_lm
from fairseq_cli._run import run_command, set_up_logging

__all__ = ["cli_main", "main"]

logger = logging.getLogger("fairseq_cli.extrapolate")

# Evaluation lengths as multiples of the training length, if none are given.
_FACTORS = (1, 2, 4, 8, 16)

# What an evaluation needs; the process that forks the others loads it once.
_PRELOADED = (
    "fairseq_cli.extrapolate",
    "fairseq.tasks.language_modeling",
    "fairseq.models.transformer_lm",
)

# Settings beside checkpoint, window and data that figures of a row depend on.
_SETTINGS = (
    "sample_break_mode",
    "add_bos_token",
    "self_target",
    "future_target",
    "past_target",
    "output_dictionary_size",
    "shorten_method",
    "shorten_data_split_list",
    "pad_to_fixed_length",
    "pad_to_fixed_bsz",
    "document_mask",
    "model_overrides",
    "post_process",
    "max_tokens",
    "batch_size",
    "num_shards",
    "shard_id",
    "cpu",
    "fp16",
    "bf16",
    "cpu_half",
)


def cli_main() -> None:
    """Runs fairseq-extrapolate with the arguments of the process."""
    set_up_logging()
    args = options.parse_args_and_arch(options.get_extrapolate_parser())
    run_command(lambda: main(args))


@dataclass(frozen=True)
class _Cell:
    """A place in the report."""

    checkpoint: CheckpointInfo
    window: Window
    key: str


def main(args: argparse.Namespace) -> list[Row]:
    """Evaluates checkpoints at many lengths and writes the report.

    Args:
        args: the flat namespace of the command line.

    Returns:
        The rows of report.json.

    Raises:
        ValueError: settings contradict each other, or do not fit data or checkpoints.
        FileNotFoundError: a checkpoint or the split is missing.
        ImportError: there is no matplotlib, and pictures are wanted.
        RuntimeError: some evaluations failed; the report holds the others.
    """
    set_up_logging()
    utils.import_user_module(args)
    if args.log_file is not None:
        progress_bar.log_to_file(args.log_file)
    if not args.no_plots:
        plot.check_matplotlib()
    sweep = _Sweep(args)
    sweep.run()
    return sweep.finish()


class _Sweep:
    """A sweep, from the command line to the report."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        paths = _paths_in(args.path)
        self.num_tokens, task = _open_split(args)
        self.unscored = task.source_dictionary.bos() if args.add_bos_token else None
        self.checkpoints = [_open_checkpoint(path, args, task) for path in paths]
        self.groups = report.group_by_seed(self.checkpoints)
        self.notes: list[str] = []
        lengths = self._lengths()
        windows, skipped = windows_of(lengths, args.strides)
        for window in skipped:
            self._note(
                f"stride {window.stride} is left out at length {window.length}, which is shorter"
            )
        if not windows:
            raise ValueError(
                f"--strides {','.join(map(str, args.strides))}: every stride is longer than every "
                f"length ({', '.join(map(str, lengths))}); give a smaller one, or the word "
                f"{NON_OVERLAPPING}"
            )
        self.impossible = self._beyond_tables(lengths)
        self.folder = utils.make_writable_folder(args.results_path, "--results-path")
        self.journal = Journal(self.folder / "rows.jsonl")
        data = _data_digest(args)
        self.cells = [
            _Cell(checkpoint, window, self._key(checkpoint, window, data))
            for checkpoint in self.checkpoints
            for window in windows
            if (checkpoint.path, window.length) not in self.impossible
        ]
        self.failed: list[str] = []

    def _note(self, text: str) -> None:
        self.notes.append(text)
        logger.warning(text)

    def _lengths(self) -> list[int]:
        """Returns the lengths asked for, or multiples of the training lengths."""
        lengths: list[int] | None = self.args.lengths
        subset = self.args.gen_subset
        if lengths is not None:
            for length in lengths:
                if length > self.num_tokens:
                    raise ValueError(
                        f"--lengths {length} is beyond the data: {subset} has {self.num_tokens:,} "
                        "tokens; give a smaller length, or another --gen-subset"
                    )
            return lengths
        trained = {}
        for checkpoint in self.checkpoints:
            if checkpoint.train_length is None:
                raise ValueError(
                    f"{checkpoint.path} does not tell its training length; give --lengths"
                )
            trained[checkpoint.train_length] = checkpoint
        every = sorted({length * factor for length in trained for factor in _FACTORS})
        lengths = [length for length in every if length <= self.num_tokens]
        if not lengths:
            raise ValueError(
                f"{subset} has {self.num_tokens:,} tokens, fewer than the training length "
                f"{every[0]:,}; give --lengths that are smaller, or another --gen-subset"
            )
        for length in every[len(lengths) :]:
            self._note(f"length {length:,} is left out: {subset} has {self.num_tokens:,} tokens")
        return lengths

    def _beyond_tables(self, lengths: Sequence[int]) -> set[tuple[str, int]]:
        """Returns (checkpoint, length) that a table of positions does not reach."""
        beyond = set()
        for checkpoint in self.checkpoints:
            limit = checkpoint.position_limit
            too_long = [n for n in lengths if limit is not None and n > limit]
            if too_long:
                self._note(
                    f"{checkpoint.path}: position method {checkpoint.position_method} has "
                    f"{limit:,} positions and cannot read windows of "
                    f"{', '.join(f'{n:,}' for n in too_long)}: n/a in the report"
                )
            beyond |= {(checkpoint.path, length) for length in too_long}
        if len(beyond) == len(self.checkpoints) * len(lengths):
            raise ValueError(
                "--lengths: every length is beyond the positions that the models have learned; "
                f"give {min(c.position_limit or 0 for c in self.checkpoints)} or less"
            )
        return beyond

    def _key(self, checkpoint: CheckpointInfo, window: Window, data: str) -> str:
        return Journal.key(
            checkpoint=checkpoint.digest,
            length=window.length,
            context=window.context,
            subset=self.args.gen_subset,
            data=data,
            settings={name: getattr(self.args, name, None) for name in _SETTINGS},
            device="cuda" if _uses_cuda(self.args) else "cpu",
        )

    # ---- running ----

    def run(self) -> None:
        """Evaluates what is not done yet, cheap rows first."""
        costs = {
            cell.key: row_cost(cell.checkpoint, cell.window, self.num_tokens)
            for cell in self.cells
            if self.journal.get(cell.key) is None
        }
        todo = list({c.key: c for c in self.cells if c.key in costs}.values())
        todo.sort(key=lambda cell: costs[cell.key])
        num_done = len(self.cells) - sum(cell.key in costs for cell in self.cells)
        if num_done:
            logger.info(
                f"{num_done} of {len(self.cells)} rows are done already; "
                f"{self.folder / 'rows.jsonl'} has them"
            )
        left = TimeLeft([costs[cell.key] for cell in todo])
        with _FreshProcesses() as processes:
            for number, cell in enumerate(todo, start=1):
                answer = processes.run(_arguments_of(self.args, cell), self.unscored)
                self._tell_warnings(cell, answer.warnings)
                if answer.error is not None:
                    self._fail(cell, answer.error)
                    left.remaining.remove(costs[cell.key])
                    continue
                assert answer.result is not None
                self.journal.append(cell.key, answer.result)
                start_s = answer.result["wall_s"] - answer.result["seconds"]
                left.add(costs[cell.key], answer.result["seconds"], start_s)
                logger.info(
                    f"[{number}/{len(todo)}] {self._name(cell)}, {cell.window}: perplexity "
                    f"{answer.result['perplexity']:.2f}, {answer.result['seconds']:.1f} s"
                    + _time_left(left)
                )
                self.write_tables()

    def _tell_warnings(self, cell: _Cell, warnings: Sequence[str]) -> None:
        for warning in warnings:
            text = f"{cell.checkpoint.path}: {warning}"
            if text not in self.notes:
                self._note(text)

    def _fail(self, cell: _Cell, error: str) -> None:
        self.failed.append(f"{self._name(cell)}, {cell.window}: {error}")
        logger.error(self.failed[-1])

    def _name(self, cell: _Cell) -> str:
        """Returns the name that the report has for a checkpoint; its path where runs share one."""
        group = next(g for g in self.groups if cell.checkpoint in g.checkpoints)
        return cell.checkpoint.path if len(group.checkpoints) > 1 else group.label

    # ---- reporting ----

    def _results(self) -> Iterator[tuple[Row, LossByPosition]]:
        for cell in self.cells:
            result = self.journal.get(cell.key)
            if result is not None:
                by_position = LossByPosition.from_lists(result["by_position"])
                yield _row(cell, self.args.gen_subset, result), by_position

    def write_tables(self) -> list[Row]:
        """Writes report and tables of what is there so far; returns the rows."""
        results = list(self._results())
        rows = [row for row, _ in results]
        text = report.markdown(
            self.groups,
            rows,
            data=self.args.data,
            notes=[*self.notes, *(f"failed: {failure}" for failure in self.failed)],
            facts=self._facts(),
            impossible=self.impossible,
        )
        report.write_tables(self.folder, rows, text)
        report.write_by_position(self.folder / "by_position.csv", rows, [b for _, b in results])
        return rows

    def _facts(self) -> list[str]:
        now = datetime.datetime.now().astimezone()
        return [
            f"{now:%Y-%m-%d %H:%M %z}, PyTorch {torch.__version__}, {_device_name(self.args)}, "
            f"{torch.get_num_threads()} threads",
            f"`{shlex.join(['fairseq-extrapolate', *sys.argv[1:]])}`",
        ]

    def finish(self) -> list[Row]:
        """Writes everything, prints the table, and fails if a row failed."""
        rows = self.write_tables()
        if rows:
            if not self.args.no_plots:
                self._plot(rows)
            print("\n" + (self.folder / "report.md").read_text(encoding="utf-8"), flush=True)
            logger.info(f"the report is in {self.folder}")
        if self.failed:
            raise RuntimeError(
                f"{len(self.failed)} of {len(self.cells)} evaluations failed: {self.failed[0]}; "
                "the same command tries them again"
            )
        return rows

    def _plot(self, rows: Sequence[Row]) -> None:
        # The folder's name without the way to it, which is nobody's business in a picture.
        data = Path(split_paths(self.args.data)[0]).resolve().name
        subtitle = f"{data}, {self.args.gen_subset}, {rows[0].tokens:,} tokens"
        curves = report.curves_of(self.groups, rows)
        has_seeds = any(len(group.checkpoints) > 1 for group in self.groups)
        plot.plot_extrapolation(
            self.folder / "extrapolation.png",
            curves,
            subtitle=subtitle + ("; band: standard deviation over seeds" if has_seeds else ""),
        )
        plot.plot_by_position(
            self.folder / "by_position.png",
            report.position_lines(self.groups, list(self._results())),
            subtitle=subtitle + "; band: standard error; dashed: mean over all tokens",
        )


def _row(cell: _Cell, subset: str, result: dict[str, Any]) -> Row:
    seconds = result["seconds"]
    return Row(
        checkpoint=cell.checkpoint.path,
        position_method=cell.checkpoint.position_method,
        train_length=cell.checkpoint.train_length,
        eval_length=cell.window.length,
        stride=cell.window.stride,
        context_window=cell.window.context,
        subset=subset,
        tokens=result["tokens"],
        loss_bits=result["loss"],
        perplexity=result["perplexity"],
        seconds=seconds,
        tokens_per_s=result["tokens"] / seconds if seconds > 0 else 0.0,
        peak_memory_mib=result["peak_memory_mib"],
    )


# ---- checks before anything is evaluated ----


def _paths_in(text: str | None) -> list[str]:
    if not text:
        raise ValueError("--path is needed: the checkpoints to compare, separated by colons")
    paths = [text] if os.path.exists(text) else [p for p in text.split(os.pathsep) if p]
    for path in paths:
        if paths.count(path) > 1:
            raise ValueError(f"--path: {path} is there {paths.count(path)} times; name it once")
    return paths


def _open_split(args: argparse.Namespace) -> tuple[int, Any]:
    """Returns the number of tokens in the split, and a task."""
    cfg = namespace_to_config(args)
    task: Any = tasks.setup_task(cfg.task)
    task.load_dataset(args.gen_subset)
    return int(task.dataset(args.gen_subset).sizes.sum()), task


def _open_checkpoint(path: str, args: argparse.Namespace, task: Any) -> CheckpointInfo:
    """Builds the model, so that what is wrong with it shows before hours of evaluation."""
    overrides = literal_dict(args.model_overrides, "--model-overrides")
    state = checkpoint_utils.load_checkpoint_to_cpu(path, overrides, memory_map=True)
    models, _ = checkpoint_utils.load_model_ensemble([path], overrides, task=task, state=state)
    return describe_checkpoint(path, state, models[0])


def _data_digest(args: argparse.Namespace) -> str:
    folder = Path(split_paths(args.data)[0])
    names = ("dict.txt", *(args.gen_subset + suffix for suffix in ("", ".idx", ".bin")))
    return file_digest(folder / name for name in names if (folder / name).is_file())


def _uses_cuda(args: argparse.Namespace) -> bool:
    return torch.cuda.is_available() and not args.cpu


def _device_name(args: argparse.Namespace) -> str:
    if _uses_cuda(args):
        return str(torch.cuda.get_device_name())
    return f"{platform.processor() or platform.machine()} CPU"


def _time_left(left: TimeLeft) -> str:
    seconds = left.seconds
    if not left.remaining or seconds is None:
        return ""
    if seconds < 90:
        return f"; about {seconds:.0f} s left"
    if seconds < 5400:
        return f"; about {seconds / 60:.0f} min left"
    return f"; about {seconds / 3600:.1f} h left"


# ---- one evaluation in a process of its own ----


@dataclass(frozen=True)
class _Answer:
    """What a process has to say: a result or an error, and the warnings on the way."""

    result: dict[str, Any] | None
    error: str | None
    warnings: tuple[str, ...] = ()


def _arguments_of(args: argparse.Namespace, cell: _Cell) -> argparse.Namespace:
    """Returns the arguments of fairseq-eval-lm for a place in the report."""
    return argparse.Namespace(
        **{
            **vars(args),
            "path": cell.checkpoint.path,
            "tokens_per_sample": cell.window.length,
            "context_window": cell.window.context,
            "results_path": None,
            "log_file": None,
        }
    )


class _FreshProcesses:
    """Runs evaluations one after the other, each in a new process.

    Where it is safe, a server that has loaded everything forks them, which saves seconds each.
    """

    def __init__(self) -> None:
        method = "forkserver" if sys.platform == "linux" else "spawn"
        self._context: Any = multiprocessing.get_context(method)
        if method == "forkserver":
            start_server(_PRELOADED)
        self._process: Any = None

    def __enter__(self) -> _FreshProcesses:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._process is not None and self._process.is_alive():
            self._process.terminate()
            self._process.join()

    def run(self, args: argparse.Namespace, unscored: int | None) -> _Answer:
        """Evaluates and returns what came of it, even if the process was killed."""
        receiver, sender = self._context.Pipe(duplex=False)
        self._process = self._context.Process(target=_evaluate, args=(sender, args, unscored))
        self._process.start()
        sender.close()
        try:
            answer: _Answer = receiver.recv()
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            reason = "it was killed, perhaps for want of memory" if code == -9 else f"exit {code}"
            answer = _Answer(
                None,
                f"the process ended early ({reason}); a smaller --max-tokens takes less memory",
            )
        self._process.join()
        receiver.close()
        return answer


class _Collector(logging.Handler):
    """Keeps the warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def _evaluate(sender: Any, args: argparse.Namespace, unscored: int | None) -> None:
    """Evaluates, and sends an `_Answer`.

    Args:
        sender: end of a pipe.
        args: as of fairseq-eval-lm.
        unscored: id of a target that is not scored.
    """
    # An interrupted parent ends this process by itself, unless it is still being forked then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    utils.end_with_parent()
    collector = _Collector()
    logging.basicConfig(level=logging.WARNING, handlers=[collector], force=True)
    began = time.perf_counter()
    losses = LossByPosition(unscored)
    result: dict[str, Any] | None = None
    error = None
    try:
        utils.import_user_module(args)
        result = dict(eval_lm.main(namespace_to_config(args), on_scores=losses.add))
        result["wall_s"] = time.perf_counter() - began
        result["peak_memory_mib"] = _peak_memory_mib()
        result["by_position"] = losses.to_lists()
    except torch.cuda.OutOfMemoryError:
        error = "the GPU's memory is too small; give a smaller --max-tokens"
    except (ValueError, OSError) as problem:
        error = str(problem)
    except Exception:
        error = traceback.format_exc()
    sender.send(_Answer(result, error, tuple(dict.fromkeys(collector.messages))))


def _peak_memory_mib() -> float | None:
    """Returns the peak of this process: of tensors on the GPU if it is used, else of memory."""
    if torch.cuda.is_initialized():
        return float(torch.cuda.max_memory_allocated()) / 2**20
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.split("VmHWM:")[1].split()[0]) / 2**10
    except (OSError, IndexError):
        pass
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


if __name__ == "__main__":
    cli_main()
