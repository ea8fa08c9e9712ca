"""fairseq-train: the story of a training run, from the settings to the last checkpoint."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fairseq import checkpoint_utils, options, tasks, utils
from fairseq.data import data_utils, iterators
from fairseq.dataclass.legacy import config_to_dict, extension_fields, namespace_to_config
from fairseq.dataclass.settings_file import write_resolved_settings
from fairseq.distributed import utils as distributed_utils
from fairseq.logging import meters, metrics, progress_bar
from fairseq.model_parallel.run import set_up_mesh
from fairseq.trainer import Trainer
from fairseq_cli._interruption import StopRequest, stop_on_signal
from fairseq_cli._run import run_command, set_up_logging

__all__ = [
    "cli_main",
    "get_training_stats",
    "get_valid_stats",
    "main",
    "should_stop_early",
    "train",
    "validate",
    "validate_and_save",
]

logger = logging.getLogger("fairseq_cli.train")

SETTINGS_FILE = "config.yaml"


def cli_main(modify_parser: Callable[[argparse.ArgumentParser], None] | None = None) -> None:
    """Runs fairseq-train with the arguments of the process.

    Args:
        modify_parser: may add options of its own.
    """
    set_up_logging()
    run_command(lambda: _run(modify_parser))


def _run(modify_parser: Callable[[argparse.ArgumentParser], None] | None) -> None:
    parser = options.get_training_parser()
    args = options.parse_args_and_arch(parser, modify_parser=modify_parser)
    distributed_utils.call_main(namespace_to_config(args), main)


def main(cfg: Any) -> None:
    """Trains a model.

    Args:
        cfg: whole configuration; parts of it are filled in on the way.

    Raises:
        ValueError: settings contradict each other, or data or checkpoint do not fit them.
        FileNotFoundError: data or a named checkpoint is missing.
    """
    _check_settings(cfg)
    set_up_mesh(cfg)
    _prepare_process(cfg)
    settings = copy.deepcopy(_settings_of_the_run(cfg))
    task, model, criterion = _build(cfg)
    _check_best_metric(cfg, task, criterion)
    _load_valid_data(cfg, task)
    trainer = Trainer(cfg, task, model, criterion)
    logger.info(f"training on {trainer.data_parallel_world_size} devices (GPUs/TPUs)")
    logger.info(
        f"max tokens per device = {cfg.dataset.max_tokens} and max sentences per device = "
        f"{cfg.dataset.batch_size}"
    )
    try:
        with stop_on_signal(
            is_alone=cfg.distributed_training.distributed_world_size == 1,
            is_master=distributed_utils.is_master(cfg.distributed_training),
        ) as stop:
            trainer.is_asked_to_stop = lambda: bool(stop)
            _train_all_epochs(cfg, trainer, task, settings, stop)
        checkpoint_utils.finish_writing()
        checkpoint_utils.make_last_whole(cfg.checkpoint, trainer)
    finally:
        trainer.close()


def _check_settings(cfg: Any) -> None:
    """Refuses early what would fail late, or would silently train on almost nothing."""
    if cfg.optimizer is None:
        raise ValueError("optimizer is required! Choose one with --optimizer, such as nag or adam")
    if cfg.criterion is None:
        raise ValueError("a criterion is required; choose one with --criterion")
    max_tokens = cfg.dataset.max_tokens
    if max_tokens is None and cfg.dataset.batch_size is None:
        raise ValueError(
            "Must specify batch size either with --max-tokens or --batch-size (--max-sentences)"
        )
    length = getattr(cfg.task, "tokens_per_sample", None)
    has_full_blocks = getattr(cfg.task, "sample_break_mode", None) != "eos"
    if max_tokens is not None and length is not None and has_full_blocks and max_tokens < length:
        raise ValueError(
            f"--max-tokens {max_tokens} is smaller than --tokens-per-sample {length}, so no full "
            f"block fits into a batch; give at least --max-tokens {length} (with --update-freq for "
            "smaller batches' memory), or shorter blocks"
        )


def _prepare_process(cfg: Any) -> None:
    """Sets up logging, metrics, seeds, device and the folder for checkpoints."""
    set_up_logging()
    utils.import_user_module(cfg.common)
    metrics.reset()
    if cfg.common.log_file is not None:
        progress_bar.log_to_file(cfg.common.log_file)
    is_master = distributed_utils.is_master(cfg.distributed_training)
    if is_master and cfg.common.tensorboard_logdir:
        utils.make_writable_folder(cfg.common.tensorboard_logdir, "--tensorboard-logdir")
    if torch.cuda.is_available() and not cfg.common.cpu:
        torch.cuda.set_device(cfg.distributed_training.device_id)
    np.random.seed(cfg.common.seed)
    utils.set_torch_seed(cfg.common.seed)
    if is_master and not cfg.checkpoint.no_save:
        checkpoint_utils.verify_checkpoint_directory(cfg.checkpoint.save_dir)


def _settings_of_the_run(cfg: Any) -> Any:
    """Returns the settings without other commands' and without this process's place."""
    distributed = dataclasses.replace(
        cfg.distributed_training,
        distributed_init_method=None,
        distributed_rank=0,
        distributed_no_spawn=False,
        device_id=0,
    )
    others = dict.fromkeys(("common_eval", "generation", "eval_lm", "interactive", "bmuf"))
    return dataclasses.replace(cfg, distributed_training=distributed, **others)


def _build(cfg: Any) -> tuple[Any, Any, Any]:
    """Builds task, model and criterion, and logs what they are."""
    logger.info(_as_dict(cfg))
    task = tasks.setup_task(cfg.task)
    model = task.build_model(cfg.model)
    criterion = task.build_criterion(cfg.criterion)
    logger.info(model)
    logger.info(f"task: {type(task).__name__}")
    logger.info(f"model: {type(model).__name__}")
    logger.info(f"criterion: {type(criterion).__name__}")
    logger.info(f"position method: {getattr(cfg.model, 'position_method', None)}")
    document_mask = getattr(cfg.model, "document_mask", None)
    if document_mask not in (None, "none"):
        logger.info(f"document mask: {document_mask}")
    for kind, params in _parameters_by_kind(model).items():
        total = sum(p.numel() for p in params)
        trained = sum(p.numel() for p in params if p.requires_grad)
        logger.info(f"num. {kind} model params: {total:,} (num. trained: {trained:,})")
    return task, model, criterion


def _check_best_metric(cfg: Any, task: Any, criterion: Any) -> None:
    """Refuses BLEU as the figure of merit where it is known that no validation reports it."""
    is_known = all(type(each).__module__.startswith("fairseq.") for each in (task, criterion))
    is_asked_for = cfg.checkpoint.best_checkpoint_metric == "bleu"
    reports_it = getattr(cfg.task, "eval_bleu", False) or cfg.dataset.disable_validation
    if is_known and is_asked_for and not reports_it:
        raise ValueError(
            "--best-checkpoint-metric bleu: validation reports BLEU with --task translation and "
            "--eval-bleu alone; add these, or choose another figure, such as loss or ppl"
        )


def _as_dict(cfg: Any) -> dict[str, Any]:
    """Returns all settings as nested dictionaries."""
    plain = config_to_dict(cfg)
    for section, values in extension_fields(cfg).items():
        plain.setdefault(section, {}).update(values)
    return plain


def _parameters_by_kind(model: torch.nn.Module) -> dict[str, list[torch.nn.Parameter]]:
    params = list(model.parameters())
    return {
        "shared": [p for p in params if not getattr(p, "expert", False)],
        "expert": [p for p in params if getattr(p, "expert", False)],
    }


def _valid_subsets(cfg: Any) -> list[str]:
    return cfg.dataset.valid_subset.split(",")


def _load_valid_data(cfg: Any, task: Any) -> None:
    if cfg.dataset.combine_valid_subsets:
        task.load_dataset("valid", combine=True, epoch=1)
        return
    _check_unused_valid_data(cfg)
    for subset in _valid_subsets(cfg):
        task.load_dataset(subset, combine=False, epoch=1)


def _check_unused_valid_data(cfg: Any) -> None:
    data = getattr(cfg.task, "data", None)
    dataset = cfg.dataset
    if dataset.ignore_unused_valid_subsets or dataset.disable_validation or not data:
        return
    splits = data_utils.available_splits(data_utils.split_paths(data)[0])
    is_numbered_valid = [s for s in splits if s.startswith("valid") and s[5:].isdigit()]
    unused = sorted(set(is_numbered_valid) - set(_valid_subsets(cfg)))
    if unused:
        raise ValueError(
            f"{data} has validation splits that --valid-subset does not name: {', '.join(unused)}. "
            "Name them, join all with --combine-valid-subsets, or leave them out with "
            "--ignore-unused-valid-subsets"
        )


def _train_all_epochs(
    cfg: Any, trainer: Trainer, task: Any, settings: Any, stop: StopRequest
) -> None:
    is_sharded = task.has_sharded_data(cfg.dataset.train_subset)
    _, epoch_itr = checkpoint_utils.load_checkpoint(
        cfg.checkpoint, trainer, disable_iterator_cache=is_sharded
    )
    if distributed_utils.is_master(cfg.distributed_training) and not cfg.checkpoint.no_save:
        # Only now: a run that fails before must not replace what a good one left in the folder.
        write_resolved_settings(settings, Path(cfg.checkpoint.save_dir) / SETTINGS_FILE)
    if trainer.get_num_updates() >= (cfg.optimization.max_update or math.inf):
        logger.info(
            f"nothing is left to train: the checkpoint has {trainer.get_num_updates()} updates, "
            f"--max-update is {cfg.optimization.max_update}"
        )
        return
    max_epoch = cfg.optimization.max_epoch or math.inf
    stop_min_lr = cfg.optimization.stop_min_lr
    lr = trainer.get_lr()
    utils.freeze_garbage()
    utils.keep_freed_memory()
    stopwatch = meters.StopwatchMeter()
    stopwatch.start()
    while epoch_itr.next_epoch_idx <= max_epoch:
        if lr <= stop_min_lr:
            logger.info(
                f"stopping training because current learning rate ({lr}) is smaller than or equal "
                f"to minimum learning rate (--stop-min-lr={stop_min_lr})"
            )
            break
        valid_losses, should_stop = train(cfg, trainer, task, epoch_itr, stop)
        if should_stop:
            break
        _leave_if_asked(cfg, trainer, epoch_itr, stop)
        lr = trainer.lr_step(epoch_itr.epoch, valid_losses[0])
        epoch_itr = trainer.get_train_iterator(
            epoch_itr.next_epoch_idx, load_dataset=is_sharded, disable_iterator_cache=is_sharded
        )
    stopwatch.stop()
    logger.info(f"done training in {stopwatch.sum:.1f} seconds")


def _leave_if_asked(cfg: Any, trainer: Trainer, epoch_itr: Any, stop: StopRequest) -> None:
    """Saves and ends the process if a signal has asked this or another worker for it."""
    if not trainer.must_stop:
        return
    logger.info(f"asked to end: saving after {trainer.get_num_updates()} updates")
    checkpoint_utils.save_checkpoint(cfg.checkpoint, trainer, epoch_itr, None)
    checkpoint_utils.finish_writing()
    trainer.wait_for_others()
    stop.leave()


def train(
    cfg: Any, trainer: Trainer, task: Any, epoch_itr: Any, stop: StopRequest | None = None
) -> tuple[list[float | None], bool]:
    """Trains for one epoch, or for what is left of it, unless `stop` is asked for.

    Returns:
        The values of the last validation, one for each subset ([None] if there was none), and
        whether training is to stop.
    """
    with metrics.aggregate("train"):
        progress = _epoch_progress(cfg, epoch_itr)
        trainer.begin_epoch(epoch_itr.epoch)
        valid_losses: list[float | None] = [None]
        should_stop = False
        logger.info("Start iterating over samples")
        for samples in progress:
            _train_on(cfg, trainer, samples, progress)
            valid_losses, should_stop = validate_and_save(
                cfg, trainer, task, epoch_itr, _valid_subsets(cfg), epoch_itr.end_of_epoch()
            )
            if should_stop:
                break
            if stop is not None and not epoch_itr.end_of_epoch():
                _leave_if_asked(cfg, trainer, epoch_itr, stop)
        logger.info(f"end of epoch {epoch_itr.epoch} (average epoch stats below)")
        stats = get_training_stats(metrics.get_smoothed_values("train"))
        progress.print(stats, tag="train", step=trainer.get_num_updates())
        metrics.reset_meters("train")
        return valid_losses, should_stop


def _epoch_progress(cfg: Any, epoch_itr: Any) -> Any:
    """Returns the groups of micro-batches of the next epoch, with their progress bar."""
    batches = epoch_itr.next_epoch_itr(
        fix_batches_to_gpus=cfg.distributed_training.fix_batches_to_gpus,
        shuffle=epoch_itr.next_epoch_idx > cfg.dataset.curriculum,
    )
    update_freq = cfg.optimization.update_freq
    group_size = update_freq[min(epoch_itr.epoch, len(update_freq)) - 1]
    if cfg.optimization.skip_remainder_batch:
        batches.take(len(batches) // group_size * group_size)
    groups = iterators.GroupedIterator(batches, group_size)
    progress = _progress(cfg, groups, epoch_itr.epoch)
    progress.update_config(_as_dict(cfg))
    return progress


def _progress(cfg: Any, iterator: Any, epoch: int, prefix: str | None = None) -> Any:
    common = cfg.common
    is_master = distributed_utils.is_master(cfg.distributed_training)
    return progress_bar.progress_bar(
        iterator,
        log_format=common.log_format,
        log_interval=common.log_interval,
        log_file=common.log_file,
        epoch=epoch,
        prefix=prefix,
        tensorboard_logdir=common.tensorboard_logdir if is_master else None,
        default_log_format="simple" if common.no_progress_bar else "tqdm",
        wandb_project=common.wandb_project if is_master else None,
        wandb_run_name=os.environ.get("WANDB_NAME") or os.path.basename(cfg.checkpoint.save_dir),
    )


def _train_on(cfg: Any, trainer: Trainer, samples: list[Any], progress: Any) -> None:
    """Does one update; logs it if it is due."""
    with metrics.aggregate("train_inner"):
        log_output = trainer.train_step(samples)
    if log_output is None:
        return
    num_updates = trainer.get_num_updates()
    if num_updates % cfg.common.log_interval == 0:
        stats = get_training_stats(metrics.get_smoothed_values("train_inner"))
        progress.log(stats, tag="train_inner", step=num_updates)
        metrics.reset_meters("train_inner")


class _NoSuchFigure(ValueError):
    """Validation does not report what checkpoints are to be compared by."""


def validate_and_save(
    cfg: Any,
    trainer: Trainer,
    task: Any,
    epoch_itr: Any,
    valid_subsets: list[str],
    end_of_epoch: bool,
) -> tuple[list[float | None], bool]:
    """Validates and writes checkpoints where that is due.

    Returns:
        As `train` does.
    """
    should_stop = _has_reached_limit(cfg, trainer)
    is_save_due = _is_save_due(cfg, trainer, epoch_itr.epoch, end_of_epoch) or should_stop
    valid_losses: list[float | None] = [None]
    if _is_validation_due(cfg, trainer, epoch_itr.epoch, end_of_epoch, is_save_due, should_stop):
        try:
            valid_losses = validate(cfg, trainer, task, epoch_itr, valid_subsets)
        except _NoSuchFigure:
            checkpoint_utils.save_checkpoint(cfg.checkpoint, trainer, epoch_itr, None)
            checkpoint_utils.finish_writing()
            raise
    should_stop |= should_stop_early(cfg, trainer, valid_losses[0])
    if is_save_due or should_stop:
        checkpoint_utils.save_checkpoint(cfg.checkpoint, trainer, epoch_itr, valid_losses[0])
    return valid_losses, should_stop


def _has_reached_limit(cfg: Any, trainer: Trainer) -> bool:
    """Tells whether --max-update or --stop-time-hours ends the training."""
    num_updates = trainer.get_num_updates()
    max_update = cfg.optimization.max_update or math.inf
    should_stop = num_updates >= max_update
    if should_stop:
        logger.info(
            f"Stopping training due to num_updates: {num_updates} >= max_update: {max_update}"
        )
    hours = trainer.cumulative_training_time() / 3600
    limit = cfg.optimization.stop_time_hours
    if 0 < limit < hours:
        should_stop = True
        logger.info(
            f"Stopping training due to cumulative_training_time: {hours} > "
            f"stop_time_hours: {limit} hour(s)"
        )
    return should_stop


def _is_every(interval: int, num_updates: int) -> bool:
    return interval > 0 and num_updates > 0 and num_updates % interval == 0


def _is_save_due(cfg: Any, trainer: Trainer, epoch: int, end_of_epoch: bool) -> bool:
    num_updates = trainer.get_num_updates()
    return (end_of_epoch and epoch % cfg.checkpoint.save_interval == 0) or (
        _is_every(cfg.checkpoint.save_interval_updates, num_updates)
        and num_updates >= cfg.dataset.validate_after_updates
    )


def _is_validation_due(
    cfg: Any, trainer: Trainer, epoch: int, end_of_epoch: bool, is_save_due: bool, stop: bool
) -> bool:
    dataset = cfg.dataset
    return not dataset.disable_validation and (
        stop
        or (is_save_due and not end_of_epoch)
        or (end_of_epoch and epoch % dataset.validate_interval == 0)
        or _is_every(dataset.validate_interval_updates, trainer.get_num_updates())
    )


def should_stop_early(cfg: Any, trainer: Trainer, valid_loss: float | None) -> bool:
    """Tells whether `--patience` validations have brought no improvement.

    The best value so far is this run's: a resumed run counts anew.
    """
    patience = cfg.checkpoint.patience
    if valid_loss is None or patience <= 0:
        return False
    best = trainer.best_of_patience
    maximize = cfg.checkpoint.maximize_best_checkpoint_metric
    if best is None or (valid_loss > best if maximize else valid_loss < best):
        trainer.best_of_patience = valid_loss
        trainer.runs_without_improvement = 0
        return False
    trainer.runs_without_improvement += 1
    if trainer.runs_without_improvement < patience:
        return False
    logger.info(f"early stop since valid performance hasn't improved for last {patience} runs")
    return True


def get_training_stats(stats: dict[str, Any]) -> dict[str, Any]:
    """Adds the seconds since the start."""
    stats["wall"] = round(metrics.get_meter("default", "wall").elapsed_time, 0)
    return stats


def validate(
    cfg: Any, trainer: Trainer, task: Any, epoch_itr: Any, subsets: list[str]
) -> list[float | None]:
    """Evaluates the criterion on validation data.

    Returns:
        `--best-checkpoint-metric` of each subset, rounded as it is printed.

    Raises:
        ValueError: there is no such metric.
    """
    if cfg.dataset.fixed_validation_seed is not None:
        utils.set_torch_seed(cfg.dataset.fixed_validation_seed)
    trainer.begin_valid_epoch(epoch_itr.epoch)
    if cfg.dataset.combine_valid_subsets:
        subsets = ["valid"]
    return [_validate_on(cfg, trainer, epoch_itr.epoch, subset) for subset in subsets]


def _validate_on(cfg: Any, trainer: Trainer, epoch: int, subset: str) -> float:
    logger.info(f'begin validation on "{subset}" subset')
    batches = trainer.get_valid_iterator(subset).next_epoch_itr(shuffle=False)
    max_steps = cfg.dataset.max_valid_steps
    if max_steps is not None:
        # One batch more than the flag says, as it has always been.
        batches.take(max_steps + 1)
    progress = _progress(cfg, batches, epoch, prefix=f"valid on '{subset}' subset")
    with metrics.aggregate(new_root=True) as logged:
        for sample in progress:
            trainer.valid_step(sample)
    stats = get_valid_stats(cfg, trainer, logged.get_smoothed_values())
    progress.print(stats, tag=subset, step=trainer.get_num_updates())
    metric = cfg.checkpoint.best_checkpoint_metric
    if metric not in stats:
        raise _NoSuchFigure(
            f"--best-checkpoint-metric {metric} is not among the validation figures; the same "
            f"command with one of them goes on from here: {', '.join(stats)}"
        )
    return float(stats[metric])


def get_valid_stats(cfg: Any, trainer: Trainer, stats: dict[str, Any]) -> dict[str, Any]:
    """Adds the number of updates, and the best value once a checkpoint has recorded one."""
    stats["num_updates"] = trainer.get_num_updates()
    metric = cfg.checkpoint.best_checkpoint_metric
    if trainer.best is not None and metric in stats:
        choose = max if cfg.checkpoint.maximize_best_checkpoint_metric else min
        stats[f"best_{metric}"] = choose(trainer.best, stats[metric])
    return stats


if __name__ == "__main__":
    cli_main()
