"""What a trainer writes into a checkpoint, and how it goes on from one.

The layout of the file is `fairseq/checkpoint/format.py`. Beside what the original keeps, float32
masters and the loss scaler's counters are kept, so that half precision resumes exactly too.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from fairseq import checkpoint_utils
from fairseq.checkpoint.format import ALIBI_KEY, pack
from fairseq.checkpoint.index import Place, is_index, write_in_parts
from fairseq.checkpoint.reading import read_checkpoint, read_index
from fairseq.distributed import utils as distributed_utils
from fairseq.logging import meters, metrics

if TYPE_CHECKING:
    from fairseq.trainer import Trainer

__all__ = ["checkpoint_content", "gather", "restore", "save_in_parts"]

# The trainer's own name: its log lines have always come from there.
logger = logging.getLogger("fairseq.trainer")

_MOST_NAMES = 5

State = dict[str, Any]


def gather(trainer: Trainer) -> State:
    """Puts a sharded model and its optimizer state together; every worker must call it.

    Returns:
        `{"model": ..., "optimizer": ...}`; only rank 0's holds data.
    """
    from fairseq.distributed.fsdp import gather_whole

    keep = trainer.should_save_checkpoint_on_current_rank
    parts: State = {"model": dict(trainer.get_model().state_dict())}
    if not trainer.cfg.checkpoint.no_save_optimizer_state:
        parts["optimizer"] = trainer.optimizer.state_dict()
    return gather_whole(parts, keep=keep)


def checkpoint_content(trainer: Trainer, gathered: State | None = None) -> State:
    """Returns what a checkpoint holds.

    Args:
        trainer: its state is not copied: write the result before training goes on.
        gathered: what `gather` returned; needed if the model is sharded, unless it is saved in
            parts.
    """
    if trainer.is_cut and gathered is None and not trainer.saves_in_parts:
        gathered = gather(trainer)
    parts = gathered or {}
    criterion_state = trainer.get_criterion().state_dict()
    optimizer_state = None
    if not trainer.cfg.checkpoint.no_save_optimizer_state:
        optimizer_state = parts.get("optimizer") or trainer.optimizer.state_dict()
    return pack(
        cfg=trainer.cfg,
        model_state=parts.get("model") or trainer.get_model().state_dict(),
        criterion_state=criterion_state or None,
        optimizer_history=[*trainer.optimizer_history, _history_entry(trainer)],
        task_state=_task_state(trainer.task),
        extra_state=_extra_state(trainer),
        optimizer_state=optimizer_state,
        alibi=_exact_half_precision(trainer),
        dictionary=getattr(trainer.task, "source_dictionary", None),
    )


def save_in_parts(trainer: Trainer, state: State, filename: str) -> None:
    """Has every worker write its parts of a checkpoint; see `write_in_parts`."""
    epoch = state["extra_state"]["train_iterator"]["epoch"]
    stem = f"checkpoint_{epoch}_{trainer.get_num_updates()}{trainer.checkpoint_suffix}"
    group = distributed_utils.get_global_group()
    write_in_parts(
        state,
        filename,
        stem=stem,
        is_master=trainer.is_data_parallel_master,
        agree=lambda value: distributed_utils.broadcast_object(value, 0, group, trainer.device),
    )


def _history_entry(trainer: Trainer) -> State:
    return {
        "criterion_name": type(trainer.get_criterion()).__name__,
        "optimizer_name": type(trainer.optimizer).__name__,
        "lr_scheduler_state": trainer.lr_scheduler.state_dict(),
        "num_updates": trainer.get_num_updates(),
    }


def _task_state(task: Any) -> State:
    return task.state_dict() if hasattr(task, "state_dict") else {}


def _extra_state(trainer: Trainer) -> State:
    extra: State = {
        "metrics": metrics.state_dict(),
        "previous_training_time": trainer.cumulative_training_time(),
    }
    if trainer.ema is not None:
        extra["ema"] = trainer.ema.get_model().state_dict()
        if trainer.cfg.ema.ema_fp32:
            extra["ema_fp32_params"] = trainer.ema.fp32_params
    return extra


def _exact_half_precision(trainer: Trainer) -> State:
    """Returns what rounding to the file's float32 weights would lose."""
    if trainer.cfg.checkpoint.no_save_optimizer_state or trainer.is_cut:
        return {}
    kept: State = {}
    masters = trainer.optimizer.master_state()
    if masters is not None:
        kept["fp32_masters"] = masters
    scaler = getattr(trainer.optimizer, "scaler", None)
    if scaler is not None:
        kept["loss_scaler"] = scaler.state_dict()
    return kept


def restore(
    trainer: Trainer,
    filename: str,
    *,
    reset_optimizer: bool,
    reset_lr_scheduler: bool,
    optimizer_overrides: Mapping[str, Any] | None,
    reset_meters: bool,
) -> State | None:
    """Loads a checkpoint into a trainer; see `Trainer.load_checkpoint`."""
    logger.info(f"Preparing to load checkpoint {filename}")
    state = _read(trainer, filename)
    if state is None:
        logger.info(f"No existing checkpoint found {filename}")
        return None
    _load_model(trainer, state, filename)
    trainer.optimizer_history = state["optimizer_history"]
    extra_state = state["extra_state"]
    _load_ema(trainer, state)
    if not reset_optimizer and state.get("last_optimizer_state") is not None:
        _load_optimizer(trainer, state, filename, optimizer_overrides, reset_lr_scheduler)
    _load_progress(trainer, extra_state, reset_meters)
    epoch = extra_state["train_iterator"]["epoch"]
    logger.info(
        f"Loaded checkpoint {filename} (epoch {epoch} @ {trainer.get_num_updates()} updates)"
    )
    return extra_state


def _read(trainer: Trainer, filename: str) -> State | None:
    """Returns the file's content on every worker; None if there is no such file.

    Rank 0 reads and sends it to the others, which need not see the same disk. Of a checkpoint in
    parts every worker reads what it needs.
    """
    group = distributed_utils.get_global_group()
    if _is_in_parts(trainer, filename):
        content = read_checkpoint(filename, place=_places(trainer))
        return {k: v for k, v in content.items() if k not in ("args", "cfg")}
    if trainer.cfg.checkpoint.load_checkpoint_on_all_dp_ranks:
        group = None
    reads = group is None or trainer.is_data_parallel_master
    state = None
    if reads and os.path.isfile(filename):
        state = checkpoint_utils.load_checkpoint_to_cpu(filename)
    if group is None:
        return state
    parts = None if state is None else {k: v for k, v in state.items() if k not in ("args", "cfg")}
    return distributed_utils.broadcast_object(parts, 0, group, trainer.device)


def _is_in_parts(trainer: Trainer, filename: str) -> bool:
    """Tells whether a file's tensors lie in a folder beside it, on every worker alike."""
    found = False
    if trainer.is_data_parallel_master and os.path.isfile(filename):
        found = is_index(read_index(filename))
    group = distributed_utils.get_global_group()
    return bool(distributed_utils.broadcast_object(found, 0, group, trainer.device))


def _places(trainer: Trainer) -> Place:
    """Returns what makes places for this worker's part of weights and optimizer state."""
    params = list(trainer.optimizer.params) if trainer.is_cut else []
    own = trainer.get_model().state_dict()

    def place(keys: tuple[Any, ...], like: torch.Tensor) -> torch.Tensor | None:
        mine = None
        if keys[0] == "model":
            mine = own.get(keys[1])
        elif keys[:2] == ("last_optimizer_state", "state") and int(keys[2]) < len(params):
            mine = params[int(keys[2])]
        is_cut = hasattr(mine, "to_local")  # a DTensor, whose import takes half a second
        if mine is None or not is_cut or mine.shape != like.shape:
            return None
        return torch.zeros_like(mine.detach(), dtype=like.dtype)

    return place


def _load_model(trainer: Trainer, state: State, filename: str) -> None:
    criterion = trainer.get_criterion()
    try:
        trainer.get_model().load_state_dict(
            state["model"], strict=True, model_cfg=trainer.cfg.model
        )
    except (RuntimeError, KeyError, ValueError) as error:
        raise ValueError(_explain(trainer, state["model"], filename, error)) from None
    if any(True for _ in criterion.parameters()):
        criterion.load_state_dict(state["criterion"], strict=True)
    task_state = state.get("task_state")
    if task_state and hasattr(trainer.task, "load_state_dict"):
        trainer.task.load_state_dict(task_state)


def _explain(trainer: Trainer, stored: State, filename: str, error: Exception) -> str:
    """Says which parameters do not fit, and why if the dictionary is the reason."""
    own = {name: tuple(tensor.shape) for name, tensor in trainer.get_model().state_dict().items()}
    there = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    shapes = [
        f"{name} is {there[name]} in the file, {shape} in the model"
        for name, shape in own.items()
        if name in there and there[name] != shape
    ]
    problems = [
        _listed("with another shape", shapes),
        _listed("missing in the file", [name for name in own if name not in there]),
        _listed("unknown to the model", [name for name in there if name not in own]),
    ]
    details = "; ".join(problem for problem in problems if problem) or str(error)
    return (
        f"Cannot load model parameters from checkpoint {filename}; please ensure that the "
        f"architectures match: {details}{_dictionary_hint(trainer, own, there)}"
    )


def _listed(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f", and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return f"{len(names)} {what} ({', '.join(names[:_MOST_NAMES])}{more})"


def _dictionary_hint(
    trainer: Trainer, own: dict[str, tuple[int, ...]], there: dict[str, tuple[int, ...]]
) -> str:
    differing = [
        name
        for name in own
        if ("embed_tokens" in name or "softmax" in name or "output_projection" in name)
        and name in there
        and own[name][:1] != there[name][:1]
    ]
    dictionary = getattr(trainer.task, "source_dictionary", None)
    if not differing or dictionary is None:
        return ""
    return (
        f". The number of words differs ({differing[0]} has {there[differing[0]][0]} rows in the "
        f"file): the data's dict.txt has {len(dictionary)} types; use the data the checkpoint was "
        "trained on, or data binarized with --srcdict and its dict.txt"
    )


def _load_ema(trainer: Trainer, state: State) -> None:
    if trainer.ema is None:
        return
    extra_state = state["extra_state"]
    stored = extra_state.get("ema")
    if stored is None:
        logger.warning(
            "--store-ema: the checkpoint has no moving average, so it starts from its parameters"
        )
        stored = state["model"]
    trainer.ema.restore({**stored, **extra_state.get("ema_fp32_params", {})})


def _load_optimizer(
    trainer: Trainer,
    state: State,
    filename: str,
    overrides: Mapping[str, Any] | None,
    reset_lr_scheduler: bool,
) -> None:
    last = trainer.optimizer_history[-1]
    # Anew, because half-precision masters are copies of the parameters.
    trainer.build_optimizer()
    _check_class(filename, "criterion", last["criterion_name"], trainer.get_criterion())
    _check_class(filename, "optimizer", last["optimizer_name"], trainer.optimizer)
    if not reset_lr_scheduler:
        trainer.lr_scheduler.load_state_dict(last["lr_scheduler_state"])
    optimizer_state = state["last_optimizer_state"]
    if trainer.is_cut:
        from fairseq.distributed.fsdp import shard_optimizer_state

        params = list(trainer.optimizer.params)
        optimizer_state = shard_optimizer_state(optimizer_state, params)
    try:
        trainer.optimizer.load_state_dict(optimizer_state, dict(overrides or {}))
    except ValueError as error:
        raise ValueError(
            f"the optimizer state in {filename} cannot be used: {error} (--reset-optimizer leaves "
            "it out)"
        ) from None
    _load_half_precision(trainer, state.get(ALIBI_KEY) or {})
    trainer.set_num_updates(last["num_updates"])


def _check_class(filename: str, what: str, stored: str, own: Any) -> None:
    if stored != type(own).__name__:
        raise ValueError(
            f"{filename} was trained with the {what} {stored}, this run uses {type(own).__name__}: "
            f"choose the same --{what} and precision, or --reset-optimizer"
        )


def _load_half_precision(trainer: Trainer, kept: Mapping[str, Any]) -> None:
    if kept.get("fp32_masters") is not None:
        trainer.optimizer.load_master_state(kept["fp32_masters"])
    scaler = getattr(trainer.optimizer, "scaler", None)
    if scaler is not None and kept.get("loss_scaler"):
        scaler.load_state_dict(kept["loss_scaler"])


def _load_progress(trainer: Trainer, extra_state: State, reset_meters: bool) -> None:
    """Restores time, learning rate and averages."""
    position = extra_state["train_iterator"]
    if "previous_training_time" in extra_state:
        trainer.set_previous_training_time(extra_state["previous_training_time"])
    trainer.lr_step(position["epoch"])
    is_new_epoch = position.get("version", 1) >= 2 and position["iterations_in_epoch"] == 0
    if reset_meters or is_new_epoch or "metrics" not in extra_state:
        return
    metrics.load_state_dict(extra_state["metrics"])
    # Clocks of an earlier process mean nothing in this one.
    for meter in (metrics.get_meters("default") or {}).values():
        if isinstance(meter, meters.TimeMeter):
            meter.reset()
    metrics.log_start_time("wall", priority=790, round=0)
