"""Progress as lines of JSON, as simple lines, as a tqdm bar, or not at all.

Lines go through `logging`, under the name of what they report (`train_inner`, `train`, `valid`).
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from numbers import Number
from typing import Any

from fairseq.logging.handlers import LogFile
from fairseq.logging.meters import AverageMeter, StopwatchMeter, TimeMeter

__all__ = ["BaseProgressBar", "format_stat", "log_to_file", "progress_bar", "rename_logger"]

logger = logging.getLogger(__name__)


def progress_bar(
    iterator: Any,
    log_format: str | None = None,
    log_interval: int = 100,
    log_file: str | None = None,
    epoch: int | None = None,
    prefix: str | None = None,
    tensorboard_logdir: str | None = None,
    default_log_format: str = "tqdm",
    wandb_project: str | None = None,
    wandb_run_name: str | None = None,
) -> BaseProgressBar:
    """Wraps an iterator so that its progress is shown.

    Args:
        iterator: what is iterated over; it has a length, and an attribute `n` if it starts in the
            middle.
        log_format: json, simple, tqdm or none; None takes `default_log_format`. tqdm becomes simple
            where stderr is no terminal.
        log_interval: updates between interim lines.
        log_file: file to which the lines are appended as well.
        epoch: number of the epoch, from 1.
        prefix: text after the epoch.
        tensorboard_logdir: folder for TensorBoard events, one sub-folder for each tag.
        default_log_format: see `log_format`.
        wandb_project: project to which Weights & Biases uploads.
        wandb_run_name: name of the run there.

    Raises:
        ValueError: unknown format.
    """
    chosen = log_format or default_log_format
    # It is None where the caller has closed it.
    if chosen == "tqdm" and (sys.stderr is None or not sys.stderr.isatty()):
        chosen = "simple"
    if chosen not in _FORMATS:
        raise ValueError(f"--log-format {chosen!r} is none of {', '.join(sorted(_FORMATS))}")
    if log_file is not None:
        log_to_file(log_file)
    bar: BaseProgressBar = _FORMATS[chosen](iterator, epoch, prefix, log_interval)
    if tensorboard_logdir:
        bar = TensorboardProgressBar(bar, tensorboard_logdir)
    if wandb_project:
        bar = WandbProgressBar(bar, wandb_project, wandb_run_name)
    return bar


def log_to_file(path: str) -> None:
    """Appends everything that is logged to a file as well; once for each file.

    Raises:
        OSError: the file cannot be written.
    """
    root = logging.getLogger()
    target = os.path.abspath(path)
    for handler in root.handlers:
        if isinstance(handler, logging.FileHandler) and handler.baseFilename == target:
            return
    try:
        handler = LogFile(target, encoding="utf-8")
    except OSError as error:
        message = f"--log-file: cannot write {target}: {error.strerror}"
        raise type(error)(error.errno, message) from None
    if root.handlers and root.handlers[0].formatter is not None:
        handler.setFormatter(root.handlers[0].formatter)
    root.addHandler(handler)


@contextlib.contextmanager
def rename_logger(target: logging.Logger, name: str | None) -> Iterator[logging.Logger]:
    """Lets a logger speak under another name inside the block."""
    old = target.name
    if name is not None:
        target.name = name
    try:
        yield target
    finally:
        target.name = old


def format_stat(stat: Any) -> Any:
    """Returns a value as it is printed: numbers with six significant digits."""
    if isinstance(stat, Number):
        return f"{stat:g}"
    if isinstance(stat, AverageMeter):
        return f"{stat.avg:.3f}"
    if isinstance(stat, TimeMeter):
        return f"{round(stat.avg):g}"
    if isinstance(stat, StopwatchMeter):
        return f"{round(stat.sum):g}"
    if hasattr(stat, "tolist"):
        listed = stat.tolist()
        return f"{listed:g}" if isinstance(listed, Number) else listed
    return stat


def _formatted(stats: Mapping[str, Any]) -> OrderedDict[str, str]:
    return OrderedDict((key, str(format_stat(value))) for key, value in stats.items())


class BaseProgressBar:
    """Iterates, and shows nothing: the format `none`."""

    def __init__(
        self, iterable: Any, epoch: int | None, prefix: str | None, log_interval: int | None
    ) -> None:
        self.iterable = iterable
        self.epoch = epoch
        self.log_interval = log_interval
        self.i: int | None = None
        self.size: int | None = None
        self.prefix = "" if epoch is None else f"epoch {epoch:03d}"
        if prefix is not None:
            self.prefix += (" | " if self.prefix else "") + prefix

    def __len__(self) -> int:
        return len(self.iterable)

    def __enter__(self) -> BaseProgressBar:
        return self

    def __exit__(self, *exc: Any) -> None:
        pass

    def __iter__(self) -> Iterator[Any]:
        self.size = len(self.iterable)
        yield from self._counted(self.iterable)

    def _counted(self, batches: Any) -> Iterator[Any]:
        for i, batch in enumerate(batches, start=getattr(self.iterable, "n", 0)):
            self.i = i
            yield batch

    def log(
        self, stats: Mapping[str, Any], tag: str | None = None, step: int | None = None
    ) -> None:
        """Shows interim values where the interval is due."""

    def print(
        self, stats: Mapping[str, Any], tag: str | None = None, step: int | None = None
    ) -> None:
        """Shows final values."""

    def update_config(self, config: Mapping[str, Any]) -> None:
        """Hands the configuration to where the values are uploaded."""

    def _is_due(self, step: int | None) -> bool:
        step = step or self.i or 0
        return step > 0 and self.log_interval is not None and step % self.log_interval == 0


class JsonProgressBar(BaseProgressBar):
    """One JSON object a line."""

    def log(
        self, stats: Mapping[str, Any], tag: str | None = None, step: int | None = None
    ) -> None:
        if not self._is_due(step):
            return
        update = None
        if self.epoch is not None and self.i is not None and self.size is not None:
            update = round(self.epoch - 1 + (self.i + 1) / self.size, 3)
        self._write(tag, {"epoch": self.epoch, "update": update}, _formatted(stats))

    def print(
        self, stats: Mapping[str, Any], tag: str | None = None, step: int | None = None
    ) -> None:
        tagged = {f"{tag}_{key}" if tag else key: value for key, value in _formatted(stats).items()}
        self._write(tag, {"epoch": self.epoch}, tagged)

    def _write(self, tag: str | None, place: Mapping[str, Any], stats: Mapping[str, str]) -> None:
        known = {key: value for key, value in place.items() if value is not None}
        with rename_logger(logger, tag):
            logger.info(json.dumps({**known, **stats}))


class SimpleProgressBar(BaseProgressBar):
    """One plain line at each interval."""

    def log(
        self, stats: Mapping[str, Any], tag: str | None = None, step: int | None = None
    ) -> None:
        if not self._is_due(step):
            return
        values = ", ".join(f"{key}={value.strip()}" for key, value in _formatted(stats).items())
        done = (self.i or 0) + 1
        with rename_logger(logger, tag):
            logger.info(f"{self.prefix}:  {done:5d} / {self.size or 0:d} {values}")

    def print(
        self, stats: Mapping[str, Any], tag: str | None = None, step: int | None = None
    ) -> None:
        with rename_logger(logger, tag):
            logger.info(self._final(stats))

    def _final(self, stats: Mapping[str, Any]) -> str:
        values = (f"{key} {value.strip()}" for key, value in _formatted(stats).items())
        return " | ".join([self.prefix, *values])


class TqdmProgressBar(SimpleProgressBar):
    """A bar on stderr, with final values as lines."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        from tqdm import tqdm

        self.tqdm = tqdm(
            self.iterable,
            self.prefix,
            initial=getattr(self.iterable, "n", 0),
            leave=False,
            disable=logger.getEffectiveLevel() > logging.INFO,
        )

    def __iter__(self) -> Iterator[Any]:
        self.size = len(self.iterable)
        yield from self._counted(self.tqdm)

    def log(
        self, stats: Mapping[str, Any], tag: str | None = None, step: int | None = None
    ) -> None:
        self.tqdm.set_postfix(_formatted(stats), refresh=False)

    def print(
        self, stats: Mapping[str, Any], tag: str | None = None, step: int | None = None
    ) -> None:
        with rename_logger(logger, tag):
            self.tqdm.write("", end="", file=sys.stderr)
            logger.info(self._final(stats))


_FORMATS: dict[str, type[BaseProgressBar]] = {
    "json": JsonProgressBar,
    "none": BaseProgressBar,
    "simple": SimpleProgressBar,
    "tqdm": TqdmProgressBar,
}


class _UploadingProgressBar(BaseProgressBar):
    """A bar that also hands numbers on to a service."""

    def __init__(self, inner: BaseProgressBar) -> None:
        self.inner = inner

    def __len__(self) -> int:
        return len(self.inner)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.inner)

    def log(
        self, stats: Mapping[str, Any], tag: str | None = None, step: int | None = None
    ) -> None:
        self._upload(stats, tag, step)
        self.inner.log(stats, tag=tag, step=step)

    def print(
        self, stats: Mapping[str, Any], tag: str | None = None, step: int | None = None
    ) -> None:
        self._upload(stats, tag, step)
        self.inner.print(stats, tag=tag, step=step)

    def update_config(self, config: Mapping[str, Any]) -> None:
        self.inner.update_config(config)

    def _upload(self, stats: Mapping[str, Any], tag: str | None, step: int | None) -> None:
        raise NotImplementedError


def _numbers(stats: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yields name and number of every value but the step itself."""
    for key, value in stats.items():
        if key == "num_updates":
            continue
        if isinstance(value, AverageMeter):
            value = value.val
        if hasattr(value, "item"):
            value = value.item()
        if isinstance(value, Number):
            yield key, float(value)  # type: ignore[arg-type]


_writers: dict[str, Any] = {}


def _close_writers() -> None:
    for writer in _writers.values():
        writer.close()


atexit.register(_close_writers)


class TensorboardProgressBar(_UploadingProgressBar):
    """Writes TensorBoard events, one folder for each tag."""

    def __init__(self, inner: BaseProgressBar, folder: str) -> None:
        super().__init__(inner)
        self.folder = folder
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            logger.warning("--tensorboard-logdir needs the package: pip install tensorboard")
            SummaryWriter = None  # type: ignore[assignment, misc]
        self._make_writer = SummaryWriter

    def _upload(self, stats: Mapping[str, Any], tag: str | None, step: int | None) -> None:
        if self._make_writer is None:
            return
        folder = os.path.join(self.folder, tag or "")
        if folder not in _writers:
            _writers[folder] = self._writer_for(folder)
            _writers[folder].add_text("sys.argv", str(sys.argv))
        step = stats["num_updates"] if step is None else step
        for key, value in _numbers(stats):
            _writers[folder].add_scalar(key, value, step)
        _writers[folder].flush()

    def _writer_for(self, folder: str) -> Any:
        assert self._make_writer is not None
        try:
            return self._make_writer(folder)
        except OSError as error:
            message = f"--tensorboard-logdir: cannot write {folder}: {error.strerror}"
            raise type(error)(error.errno, message) from None


class WandbProgressBar(_UploadingProgressBar):
    """Uploads values to Weights & Biases."""

    def __init__(self, inner: BaseProgressBar, project: str, run_name: str | None) -> None:
        super().__init__(inner)
        try:
            import wandb
        except ImportError:
            logger.warning("--wandb-project needs the package: pip install wandb")
            wandb = None
        self._wandb = wandb
        if wandb is not None:
            wandb.init(project=project, reinit=False, name=run_name)

    def _upload(self, stats: Mapping[str, Any], tag: str | None, step: int | None) -> None:
        if self._wandb is not None:
            prefix = f"{tag}/" if tag else ""
            values = {prefix + key: value for key, value in _numbers(stats)}
            self._wandb.log(values, step=stats["num_updates"] if step is None else step)

    def update_config(self, config: Mapping[str, Any]) -> None:
        if self._wandb is not None:
            self._wandb.config.update(config, allow_val_change=True)
        super().update_config(config)
