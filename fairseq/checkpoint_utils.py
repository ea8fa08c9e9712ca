"""Saving, resuming and loading checkpoints: the public face of `fairseq.checkpoint`."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fairseq import utils
from fairseq.checkpoint import format as layout
from fairseq.checkpoint.index import is_index, remove_unused
from fairseq.checkpoint.position_method import PositionMethod, position_method_of
from fairseq.checkpoint.reading import read_checkpoint, read_index
from fairseq.checkpoint.retention import (
    checkpoint_names,
    checkpoint_paths,
    outdated_checkpoints,
)
from fairseq.checkpoint.upgrade import upgrade_state
from fairseq.checkpoint.writing import (
    BackgroundWriter,
    copy_atomically,
    save_atomically,
    snapshot,
)
from fairseq.dataclass.arguments import literal_dict
from fairseq.dataclass.configs import CheckpointConfig, FairseqConfig
from fairseq.dataclass.legacy import apply_overrides, config_from_dict, namespace_to_config
from fairseq.distributed import utils as distributed_utils
from fairseq.models.upgrade import prune_layers as prune_state_dict
from fairseq.positions import PositionConfig, find_method, foreign_settings
from fairseq.positions.alibi_slopes import SLOPE_RULE

__all__ = [
    "check_dictionary",
    "checkpoint_paths",
    "finish_writing",
    "load_checkpoint",
    "load_checkpoint_to_cpu",
    "load_ema_from_checkpoint",
    "load_model_ensemble",
    "load_model_ensemble_and_task",
    "make_last_whole",
    "prune_state_dict",
    "save_checkpoint",
    "torch_persistent_save",
    "verify_checkpoint_directory",
    "vocabulary_size",
]

logger = logging.getLogger(__name__)

DEFAULT_RESTORE_FILE = "checkpoint_last.pt"
_background = BackgroundWriter()


# ---- saving ----


def save_checkpoint(
    cfg: CheckpointConfig, trainer: Any, epoch_itr: Any, val_loss: float | None
) -> None:
    """Writes the checkpoints that are due now and removes those that no rule keeps.

    Args:
        cfg: which checkpoints are wanted.
        trainer: gives the content; its `best` is brought up to date, also under `--no-save`.
        epoch_itr: gives the position in the data.
        val_loss: figure of the validation just before, None if there was none.
    """
    best = getattr(trainer, "best", None)
    if val_loss is not None:
        better = max if cfg.maximize_best_checkpoint_metric else min
        best = trainer.best = val_loss if best is None else better(val_loss, best)
    if cfg.no_save:
        return
    trainer.consolidate_optimizer()
    in_parts = getattr(trainer, "saves_in_parts", False)
    if not (trainer.should_save_checkpoint_on_current_rank or in_parts):
        if getattr(trainer, "always_call_state_dict_during_save_checkpoint", False):
            trainer.state_dict()
        return

    started_at = time.perf_counter()
    epoch, end_of_epoch = epoch_itr.epoch, epoch_itr.end_of_epoch()
    updates, suffix = trainer.get_num_updates(), trainer.checkpoint_suffix
    logger.info(f"Preparing to save checkpoint for epoch {epoch} @ {updates} updates")
    names = checkpoint_names(
        cfg,
        epoch=epoch,
        updates=updates,
        end_of_epoch=end_of_epoch,
        val_loss=val_loss,
        best=best,
        suffix=suffix,
    )
    if in_parts:
        # All write or none does; figures might differ in their last digit.
        names = distributed_utils.broadcast_object(
            names, 0, distributed_utils.get_global_group(), trainer.device
        )
    if not names:
        return
    Path(cfg.save_dir).mkdir(parents=True, exist_ok=True)
    files = [os.path.join(cfg.save_dir, name) for name in names]
    extra_state = {"train_iterator": epoch_itr.state_dict(), "val_loss": val_loss}
    if best is not None:
        extra_state["best"] = best
    trainer.save_checkpoint(files[0], layout.to_plain(extra_state))
    if not trainer.should_save_checkpoint_on_current_rank:
        return

    def name_and_prune() -> None:
        for file in files[1:]:
            copy_atomically(files[0], file)
        for outdated in outdated_checkpoints(cfg, end_of_epoch=end_of_epoch, suffix=suffix):
            Path(outdated).unlink(missing_ok=True)
        if in_parts:
            remove_unused(cfg.save_dir)

    if cfg.write_checkpoints_asynchronously:
        _background.submit(name_and_prune)
    else:
        name_and_prune()
    logger.info(
        f"Saved checkpoint {files[0]} (epoch {epoch} @ {updates} updates, score {val_loss}) "
        f"(writing took {time.perf_counter() - started_at} seconds)"
    )


def torch_persistent_save(
    obj: Any, filename: str | os.PathLike[str], async_write: bool = False
) -> None:
    """Writes an object to a file, whole or not at all; a failure is raised.

    Args:
        obj: what `torch.save` takes.
        filename: path of the file.
        async_write: copy the tensors now and write in the background. `finish_writing` waits for
            it; what fails there is raised by the next save or by `finish_writing`.
    """
    if async_write:
        copied = snapshot(obj)
        _background.submit(lambda: save_atomically(copied, filename))
    else:
        save_atomically(obj, filename)


def finish_writing() -> None:
    """Waits until all checkpoints are on the disk; raises what writing them failed with."""
    _background.wait()


def make_last_whole(cfg: CheckpointConfig, trainer: Any) -> None:
    """Makes one file of the last checkpoint, if it was written in parts.

    Args:
        cfg: where it is.
        trainer: says who writes files, and whether in parts.
    """
    if cfg.no_save or not (trainer.saves_in_parts and trainer.is_data_parallel_master):
        return
    path = os.path.join(cfg.save_dir, f"checkpoint_last{trainer.checkpoint_suffix}.pt")
    if os.path.exists(path) and is_index(read_index(path)):
        logger.info(f"Making one file of {path}")
        save_atomically(read_checkpoint(path), path)
        remove_unused(cfg.save_dir)


def verify_checkpoint_directory(save_dir: str | os.PathLike[str]) -> None:
    """Makes the folder for checkpoints and tests that files can be written there.

    Raises:
        OSError: they cannot.
    """
    utils.make_writable_folder(save_dir, "--save-dir")


# ---- resuming ----


def load_checkpoint(
    cfg: CheckpointConfig, trainer: Any, **passthrough_args: Any
) -> tuple[dict[str, Any] | None, Any]:
    """Brings a trainer to where a checkpoint left off, or to the start if there is none.

    Args:
        cfg: which file, and what of it is not wanted.
        trainer: loads parameters and optimizer, makes the train iterator.
        **passthrough_args: for `trainer.get_train_iterator`.

    Returns:
        (extra_state of the file or None, train iterator at its position).

    Raises:
        FileNotFoundError: `--restore-file` or `--finetune-from-model` names a file that is not
            there.
        ValueError: flags that exclude each other, or a file that does not fit this run.
    """
    _check_flags(cfg)
    path, cfg = _file_to_restore(cfg, trainer.checkpoint_suffix)
    if os.path.exists(path) and trainer.is_data_parallel_master:
        _check_fits(path, trainer, is_resume=not cfg.reset_optimizer)
    extra_state = trainer.load_checkpoint(
        path,
        cfg.reset_optimizer,
        cfg.reset_lr_scheduler,
        literal_dict(cfg.optimizer_overrides, "--optimizer-overrides"),
        reset_meters=cfg.reset_meters,
    )
    if extra_state is not None and not cfg.reset_optimizer and not cfg.reset_meters:
        trainer.best = extra_state.get("best", getattr(trainer, "best", None))
    if extra_state is not None and not cfg.reset_dataloader:
        position = extra_state["train_iterator"]
        epoch_itr = trainer.get_train_iterator(
            epoch=position["epoch"], load_dataset=True, **passthrough_args
        )
        epoch_itr.load_state_dict(position)
    else:
        epoch_itr = trainer.get_train_iterator(epoch=1, load_dataset=True, **passthrough_args)
    trainer.lr_step(epoch_itr.epoch)
    return extra_state, epoch_itr


_RESETS = ("reset_optimizer", "reset_lr_scheduler", "reset_meters", "reset_dataloader")


def _check_flags(cfg: CheckpointConfig) -> None:
    if cfg.finetune_from_model is None:
        return
    for name in _RESETS:
        if getattr(cfg, name):
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"--finetune-from-model resets everything itself; leave out {flag}")
    if cfg.restore_file != DEFAULT_RESTORE_FILE:
        raise ValueError(
            "--finetune-from-model and --restore-file both name a checkpoint to start from; give "
            "one of them"
        )


def _file_to_restore(cfg: CheckpointConfig, suffix: str) -> tuple[str, CheckpointConfig]:
    """Returns the file to look for, and the settings with what is not wanted of it."""
    if cfg.restore_file != DEFAULT_RESTORE_FILE:
        path = cfg.restore_file.replace(".pt", suffix + ".pt") if suffix else cfg.restore_file
        if not os.path.exists(path):
            raise FileNotFoundError(
                f"--restore-file: there is no {path}; leave the flag out to start anew or to go on "
                f"from {DEFAULT_RESTORE_FILE} in --save-dir"
            )
        return path, cfg
    path = os.path.join(cfg.save_dir, f"checkpoint_last{suffix}.pt")
    if os.path.exists(path):
        return path, cfg
    if cfg.continue_once is not None:
        if not os.path.exists(cfg.continue_once):
            raise FileNotFoundError(f"--continue-once: there is no {cfg.continue_once}")
        return cfg.continue_once, cfg
    if cfg.finetune_from_model is not None:
        if not os.path.exists(cfg.finetune_from_model):
            raise FileNotFoundError(f"--finetune-from-model: there is no {cfg.finetune_from_model}")
        logger.info(
            f"loading the model's parameters from {cfg.finetune_from_model}; optimizer, learning "
            "rate schedule, averages and data start afresh"
        )
        everything: dict[str, Any] = dict.fromkeys(_RESETS, True)
        return cfg.finetune_from_model, dataclasses.replace(cfg, **everything)
    return path, cfg


def _check_fits(path: str, trainer: Any, *, is_resume: bool) -> None:
    """Compares what a file says of its model with this run, before anything is loaded."""
    # Sizes are enough of what lies in parts.
    state = read_checkpoint(path, memory_map=True, check=False, place=lambda keys, like: like)
    dictionary = getattr(getattr(trainer, "task", None), "source_dictionary", None)
    if dictionary is not None:
        check_dictionary(state, dictionary, path)
    model_cfg = getattr(getattr(trainer, "cfg", None), "model", None)
    comparisons = (_other_method, _other_settings, _other_mask)
    for message in (compare(state, model_cfg, path) for compare in comparisons):
        if message is not None and is_resume:
            raise ValueError(f"{message}, --finetune-from-model {path} changes it")
        if message is not None:
            logger.warning(message)


def _other_method(state: Mapping[str, Any], model_cfg: Any, path: str) -> str | None:
    chosen = getattr(model_cfg, "position_method", None)
    trained = position_method_of(state)
    if chosen is None or not trained.is_certain or trained.name == chosen:
        return None
    return (
        f"{path} holds a model with position method {trained.name} ({trained.reason}), this run "
        f"uses {chosen}; --position-method {trained.name} goes on as before"
    )


def _other_settings(state: Mapping[str, Any], model_cfg: Any, path: str) -> str | None:
    """Compares the settings of a position method that is the same."""
    if not isinstance(model_cfg, PositionConfig):
        return None
    extensions = (state.get(layout.ALIBI_KEY) or {}).get("extensions") or {}
    trained = extensions.get("model") or {}
    if trained.get("position_method") != model_cfg.position_method:
        return None
    changed = [
        f"--{name.replace('_', '-')} {trained[name]} became {getattr(model_cfg, name)}"
        for name in find_method(model_cfg.position_method).settings
        if name in trained and trained[name] != getattr(model_cfg, name)
    ]
    return f"{path}: since it was written {', '.join(changed)}" if changed else None


def _other_mask(state: Mapping[str, Any], model_cfg: Any, path: str) -> str | None:
    if not hasattr(model_cfg, "document_mask"):
        return None
    extensions = (state.get(layout.ALIBI_KEY) or {}).get("extensions") or {}
    trained = (extensions.get("model") or {}).get("document_mask") or "none"
    chosen = model_cfg.document_mask or "none"
    if trained == chosen:
        return None
    return (
        f"{path} holds a model with document mask {trained}, this run uses {chosen}; "
        f"--document-mask {trained} goes on as before"
    )


# ---- loading ----


def load_checkpoint_to_cpu(
    path: str | os.PathLike[str],
    arg_overrides: Mapping[str, Any] | None = None,
    *,
    memory_map: bool = False,
) -> dict[str, Any]:
    """Reads a checkpoint of this project, of the original or of upstream fairseq.

    Args:
        path: the file.
        arg_overrides: settings that replace the stored ones, by name in every section that has the
            name; section -> {name: value} replaces in that section only.
        memory_map: leave tensors in the file until they are used.

    Returns:
        The checkpoint's dictionary in today's layout. `cfg` is a `FairseqConfig`, None if the file
        holds no settings; `alibi` has at least `position_method` and `train_length`, the tokens
        per sample in the file, whatever the overrides say.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no checkpoint, or an override does not fit.
    """
    state = read_checkpoint(path, memory_map=memory_map)
    if "model" not in state:
        raise ValueError(
            f"{path} is no checkpoint: it has no entry 'model', only {', '.join(map(str, state))}"
        )
    method = position_method_of(state)
    upgrade_state(state)
    cfg = _config_of(state, path)
    record = dict(state.get(layout.ALIBI_KEY) or {})
    if cfg is not None:
        record.setdefault("train_length", layout.train_length_of(cfg))
        _set_if_known(cfg.model, "position_method", method.name)
        _set_if_known(cfg.model, "train_length", record["train_length"])
        _set_if_known(cfg.model, "alibi_bias_max", _bias_max(record, path))
        apply_overrides(cfg, arg_overrides or {})
        method = _after_overrides(method, cfg, arg_overrides or {})
    record["position_method"] = method.name
    record["position_reason"] = method.reason
    record["position_is_certain"] = method.is_certain
    return {**state, "args": None, "cfg": cfg, layout.ALIBI_KEY: record}


def _config_of(state: Mapping[str, Any], path: str | os.PathLike[str]) -> FairseqConfig | None:
    try:
        if state.get("args") is not None:
            return namespace_to_config(state["args"])
        if state.get("cfg") is not None:
            extensions = (state.get(layout.ALIBI_KEY) or {}).get("extensions")
            return config_from_dict(state["cfg"], extensions)
    except ValueError as error:
        raise ValueError(f"{path}: settings in the checkpoint: {error}") from error
    return None


def _bias_max(record: Mapping[str, Any], path: str | os.PathLike[str]) -> float | None:
    rule = record.get("slope_rule", SLOPE_RULE)
    if rule != SLOPE_RULE:
        raise ValueError(
            f"{path} was trained with ALiBi slopes by the rule {rule!r}, which is not known here; "
            f"known is {SLOPE_RULE!r}"
        )
    return record.get("bias_max")


def _set_if_known(section: Any, name: str, value: Any) -> None:
    if value is not None and name in getattr(type(section), "__dataclass_fields__", {}):
        setattr(section, name, value)


def _after_overrides(
    method: PositionMethod, cfg: FairseqConfig, overrides: Mapping[str, Any]
) -> PositionMethod:
    in_section = overrides.get("model")
    names = {*overrides, *(in_section if isinstance(in_section, Mapping) else ())}
    if "position_method" not in names:
        return method
    if isinstance(cfg.model, PositionConfig):
        # Settings of the stored method that another one does not have are nothing to complain of.
        for setting in set(foreign_settings(cfg.model)) - names:
            setattr(cfg.model, setting, getattr(PositionConfig, setting))
    name = getattr(cfg.model, "position_method", method.name)
    return PositionMethod(name, "given on the command line")


def load_ema_from_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a checkpoint with the moving average of the parameters in place of the parameters.

    Raises:
        ValueError: the checkpoint was written without `--store-ema`.
    """
    state = load_checkpoint_to_cpu(path)
    average = state["extra_state"].get("ema")
    if average is None:
        raise ValueError(f"{path} holds no moving average; train with --store-ema to have one")
    return {**state, "model": {**state["model"], **average}}


def load_model_ensemble(
    filenames: Sequence[str],
    arg_overrides: Mapping[str, Any] | None = None,
    task: Any = None,
    strict: bool = True,
    suffix: str = "",
    num_shards: int = 1,
    state: dict[str, Any] | None = None,
) -> tuple[list[torch.nn.Module], FairseqConfig]:
    """Loads models from checkpoints; see `load_model_ensemble_and_task`.

    Returns:
        (models, configuration of the last).
    """
    models, cfg, _ = load_model_ensemble_and_task(
        filenames, arg_overrides, task, strict, suffix, num_shards, state
    )
    return models, cfg


def load_model_ensemble_and_task(
    filenames: Sequence[str],
    arg_overrides: Mapping[str, Any] | None = None,
    task: Any = None,
    strict: bool = True,
    suffix: str = "",
    num_shards: int = 1,
    state: dict[str, Any] | None = None,
) -> tuple[list[torch.nn.Module], FairseqConfig, Any]:
    """Builds models as their checkpoints say and loads their parameters.

    Args:
        filenames: the checkpoints.
        arg_overrides: settings that replace the stored ones; see `load_checkpoint_to_cpu`.
        task: the task to build the models for; None makes the one in the first checkpoint.
        strict: every parameter must be in the file and every entry of the file be used.
        suffix: put before `.pt` in the names.
        num_shards: must be 1.
        state: what `load_checkpoint_to_cpu` returned for the file, if it is loaded already.

    Returns:
        (models on the CPU in float32, configuration of the last, task).

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: a file is no checkpoint, or does not fit the dictionary or its own settings.
    """
    from fairseq import tasks

    if num_shards != 1:
        raise ValueError(
            f"--checkpoint-shard-count {num_shards} is not supported: a checkpoint is one whole "
            "file here"
        )
    if not filenames:
        raise ValueError("no checkpoint is named; --path takes the file of one")
    models = []
    for filename in filenames:
        path = filename.replace(".pt", suffix + ".pt") if suffix else filename
        loaded = state or load_checkpoint_to_cpu(path, arg_overrides, memory_map=True)
        cfg = loaded["cfg"]
        if cfg is None:
            raise ValueError(
                f"{path} holds parameters but neither 'cfg' nor 'args' with the settings of its "
                "model; use a checkpoint that training wrote"
            )
        if task is None:
            task = tasks.setup_task(cfg.task)
            if loaded.get("task_state"):
                task.load_state_dict(loaded["task_state"])
        models.append(_build_model(loaded, task, path, strict))
        _log_position_method(loaded[layout.ALIBI_KEY])
        _log_document_mask(cfg.model)
    return models, cfg, task


def _build_model(state: dict[str, Any], task: Any, path: str, strict: bool) -> torch.nn.Module:
    cfg = state["cfg"]
    dictionary = getattr(task, "source_dictionary", None)
    if dictionary is not None:
        check_dictionary(state, dictionary, path)
    try:
        model = task.build_model(cfg.model)
    except ValueError as error:
        # As it was raised, so that a defect still shows where it happened.
        error.args = (f"{path}: {error}",)
        raise
    try:
        model.load_state_dict(state["model"], strict=strict, model_cfg=cfg.model)
    except RuntimeError as error:
        raise ValueError(
            f"{path}: the parameters do not fit the model that its settings (and overrides) "
            f"describe: {' '.join(str(error).split())}"
        ) from error
    built: torch.nn.Module = model
    return built


def _log_position_method(record: Mapping[str, Any]) -> None:
    name, reason = record["position_method"], record["position_reason"]
    if record["position_is_certain"]:
        logger.info(f"position method: {name} ({reason})")
    else:
        logger.warning(
            f"position method: {name}, because {reason}; if it is upstream fairseq's, give "
            "--position-method sinusoidal"
        )


def _log_document_mask(model_cfg: Any) -> None:
    kind = getattr(model_cfg, "document_mask", None)
    if kind not in (None, "none"):
        logger.info(f"document mask: attention and positions restart at each {kind}")


def check_dictionary(state: Mapping[str, Any], dictionary: Any, path: str) -> None:
    """Compares a checkpoint's vocabulary with a dictionary, before a model is built.

    Args:
        state: the checkpoint's dictionary.
        dictionary: the source dictionary of the data.
        path: the checkpoint, for messages.

    Raises:
        ValueError: the sizes differ, or the symbols do in a checkpoint that records them.
    """
    remedy = (
        "use data that was binarized with the dictionary the model was trained with "
        "(fairseq-preprocess --srcdict DICT)"
    )
    rows = vocabulary_size(state.get("model") or {})
    if rows is not None and rows != len(dictionary):
        raise ValueError(
            f"{path} knows {rows:,} symbols, the dictionary of the data has {len(dictionary):,}; "
            f"{remedy}"
        )
    recorded = (state.get(layout.ALIBI_KEY) or {}).get("dictionary")
    if recorded and recorded != layout.dictionary_fingerprint(dictionary):
        raise ValueError(
            f"{path} was trained with another dictionary: both have {len(dictionary):,} symbols, "
            f"but not the same ones in the same order; {remedy}"
        )


def vocabulary_size(model_state: Mapping[str, torch.Tensor]) -> int | None:
    """Returns the rows of the input embeddings of what reads the source, over all bands."""
    for side in ("encoder", "decoder"):
        whole = model_state.get(f"{side}.embed_tokens.weight")
        if whole is not None:
            return int(whole.size(0))
    bands = [
        tensor.size(0)
        for name, tensor in model_state.items()
        if name.startswith("decoder.embed_tokens.embeddings.") and name.endswith(".0.weight")
    ]
    return sum(bands) or None
