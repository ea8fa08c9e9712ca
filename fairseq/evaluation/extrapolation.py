"""A sweep over evaluation lengths: its rows, their order and identity, what is done already."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairseq.checkpoint.format import ALIBI_KEY
from fairseq.dataclass.legacy import config_to_dict, extension_fields

__all__ = [
    "NON_OVERLAPPING",
    "CheckpointInfo",
    "Journal",
    "Row",
    "TimeLeft",
    "Window",
    "describe_checkpoint",
    "file_digest",
    "row_cost",
    "windows_of",
]

# The stride that is as long as the window.
NON_OVERLAPPING = "length"

# What may differ between runs of one experiment, beside the seed: where things lie, how they are
# logged, how many processes load data.
_NOT_THE_EXPERIMENT = frozenset(
    {
        "seed",
        "data",
        "save_dir",
        "restore_file",
        "finetune_from_model",
        "continue_once",
        "path",
        "results_path",
        "user_dir",
        "tensorboard_logdir",
        "wandb_project",
        "log_file",
        "log_format",
        "log_interval",
        "no_progress_bar",
        "num_workers",
        "data_buffer_size",
        "device_id",
        "distributed_rank",
        "distributed_init_method",
        "distributed_port",
        "nprocs_per_node",
    }
)


@dataclass(frozen=True)
class Row:
    """One evaluation, as `report.json` has it.

    Attributes:
        checkpoint: path as given.
        position_method: name of the model's position method.
        train_length: tokens per sample in training; None if the checkpoint does not tell.
        eval_length: tokens in a window.
        stride: new tokens in a window, or "length": all of them.
        context_window: tokens of a window that are not scored.
        subset: split.
        tokens: how many were evaluated.
        loss_bits: mean loss per word in bits, as fairseq-eval-lm returns it.
        perplexity: 2 ** loss_bits.
        seconds: time of the model and the scoring, without start and loading.
        tokens_per_s: tokens / seconds.
        peak_memory_mib: peak of the process on the CPU, of the tensors on a GPU; None where the
            system does not tell.
    """

    checkpoint: str
    position_method: str
    train_length: int | None
    eval_length: int
    stride: int | str
    context_window: int
    subset: str
    tokens: int
    loss_bits: float
    perplexity: float
    seconds: float
    tokens_per_s: float
    peak_memory_mib: float | None


@dataclass(frozen=True)
class Window:
    """An evaluation length and how far windows advance: a number of tokens, or "length"."""

    length: int
    stride: int | str

    @property
    def new_tokens(self) -> int:
        """Tokens that a full window scores."""
        return self.length if self.stride == NON_OVERLAPPING else int(self.stride)

    @property
    def context(self) -> int:
        """Tokens of a full window that are there to be seen only."""
        return self.length - self.new_tokens

    def __str__(self) -> str:
        how = "non-overlapping" if self.context == 0 else f"sliding by {self.new_tokens:,}"
        return f"length {self.length:,}, {how}"


def windows_of(
    lengths: Iterable[int], strides: Sequence[int | str]
) -> tuple[list[Window], list[Window]]:
    """Returns the windows of a sweep, and those that cannot be: their stride exceeds the length."""
    every = [Window(length, stride) for stride in strides for length in sorted(lengths)]
    return [w for w in every if w.context >= 0], [w for w in every if w.context < 0]


@dataclass(frozen=True)
class CheckpointInfo:
    """What a sweep knows of a checkpoint before it evaluates it.

    Attributes:
        path: as given.
        digest: SHA-256 of the file.
        position_method: of its model.
        train_length: tokens per sample in training, None if the file does not tell.
        seed: of its run.
        updates: number of updates of its run.
        experiment: digest of the settings; runs with equal ones differ in seed and paths only.
        num_params: parameters of the model.
        width: embedding dimension.
        layers: number of layers.
        position_limit: the longest window the model can read, None for any.
    """

    path: str
    digest: str
    position_method: str
    train_length: int | None
    seed: int | None
    updates: int | None
    experiment: str
    num_params: int
    width: int
    layers: int
    position_limit: int | None


def describe_checkpoint(path: str, state: Mapping[str, Any], model: Any) -> CheckpointInfo:
    """Collects what a sweep needs to know.

    Args:
        path: the file.
        state: its content, as `load_checkpoint_to_cpu` returns it.
        model: the model built from it.
    """
    cfg, record = state["cfg"], state[ALIBI_KEY]
    history = state.get("optimizer_history") or [{}]
    return CheckpointInfo(
        path=path,
        digest=file_digest([path]),
        position_method=record["position_method"],
        train_length=record.get("train_length"),
        seed=getattr(cfg.common, "seed", None),
        updates=history[-1].get("num_updates"),
        experiment=_experiment_of(cfg, record),
        num_params=sum(p.numel() for p in model.parameters()),
        width=getattr(cfg.model, "decoder_embed_dim", None) or 1,
        layers=getattr(cfg.model, "decoder_layers", None) or 1,
        position_limit=getattr(getattr(model, "decoder", None), "position_limit", None),
    )


def _experiment_of(cfg: Any, record: Mapping[str, Any]) -> str:
    known = [record.get(name) for name in ("position_method", "train_length", "slope_rule")]
    settings = [config_to_dict(cfg), extension_fields(cfg), known]
    return _digest(json.dumps(_without_incidentals(settings), sort_keys=True, default=str))


def _without_incidentals(value: Any) -> Any:
    if isinstance(value, Mapping):
        kept = {k: v for k, v in value.items() if k not in _NOT_THE_EXPERIMENT}
        return {key: _without_incidentals(item) for key, item in kept.items()}
    if isinstance(value, (list, tuple)):
        return [_without_incidentals(item) for item in value]
    return value


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(paths: Iterable[str | os.PathLike[str]]) -> str:
    """Returns the SHA-256 of the content of files, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


# ---- what is done already ----


class Journal:
    """The results of a sweep, one line of JSON each; a line is there whole or does not count.

    Args:
        path: the file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._results: dict[str, dict[str, Any]] = {}
        if not path.exists():
            return
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
                self._results[entry["key"]] = entry["result"]
            except (ValueError, KeyError, TypeError):
                continue  # An interrupted write.

    @staticmethod
    def key(**identity: Any) -> str:
        """Returns the key of a result: a digest of all that it depends on."""
        return _digest(json.dumps(identity, sort_keys=True))

    def get(self, key: str) -> dict[str, Any] | None:
        """Returns a result, None if it is not there."""
        return self._results.get(key)

    def append(self, key: str, result: Mapping[str, Any]) -> None:
        """Adds a result; it is on the disk when this returns."""
        self._results[key] = dict(result)
        line = json.dumps({"key": key, "result": result}) + "\n"
        with open(self._path, "ab+") as file:
            if file.tell() and not _ends_with_newline(file):
                line = "\n" + line
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())


def _ends_with_newline(file: Any) -> bool:
    file.seek(-1, os.SEEK_END)
    return bool(file.read(1) == b"\n")


# ---- how long it takes ----


def row_cost(checkpoint: CheckpointInfo, window: Window, num_tokens: int) -> float:
    """Returns the work of an evaluation in multiplications, about.

    Each token of each window goes through every parameter once, and meets all tokens of its window
    in every layer, for scores and for values.
    """
    num_windows = -(-num_tokens // window.new_tokens)
    attention = 2 * window.length * checkpoint.width * checkpoint.layers
    return float(num_windows) * window.length * (checkpoint.num_params + attention)


@dataclass
class TimeLeft:
    """Estimates how long the rest of a sweep takes, from the rows it has done.

    A row takes time to start, the same for all, and time for its work. The last rows tell the
    speed, since long windows have another than short ones.
    """

    remaining: list[float]
    _done: list[tuple[float, float, float]] = dataclasses.field(default_factory=list)

    def add(self, cost: float, work_s: float, start_s: float) -> None:
        """Takes note of a row that is done."""
        self.remaining.remove(cost)
        self._done.append((cost, work_s, start_s))

    @property
    def seconds(self) -> float | None:
        """The estimate; None before the first row."""
        if not self._done:
            return None
        recent = self._done[-3:]
        start_s = sum(start for _, _, start in recent) / len(recent)
        rate = sum(work for _, work, _ in recent) / sum(cost for cost, _, _ in recent)
        return start_s * len(self.remaining) + rate * sum(self.remaining)
