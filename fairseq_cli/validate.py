"""fairseq-validate: the validation of a training run, repeated on a checkpoint."""

from __future__ import annotations

import argparse
import itertools
import logging
from typing import Any

import numpy as np
import torch

from fairseq import checkpoint_utils, options, utils
from fairseq.dataclass.arguments import literal_dict
from fairseq.dataclass.legacy import config_to_dict, namespace_to_config
from fairseq.distributed import utils as distributed_utils
from fairseq.logging import metrics, progress_bar
from fairseq.model_parallel.run import shared_sequences
from fairseq.registry import COMPONENT_REGISTRIES
from fairseq_cli._run import run_command, set_up_logging
from fairseq_cli.eval_lm import move_to_device, set_sequence_length

__all__ = ["cli_main", "main"]

logger = logging.getLogger("fairseq_cli.validate")

# Options that choose a component or concern the command itself; the checkpoint has no such field.
_NO_OVERRIDES = {*COMPONENT_REGISTRIES, "config", "model_overrides", "path", "task", "user_dir"}


def cli_main() -> None:
    """Runs fairseq-validate with the arguments of the process."""
    set_up_logging()
    run_command(_run)


def _run() -> None:
    args = options.parse_args_and_arch(options.get_validation_parser())
    given = options.parse_args_and_arch(options.get_validation_parser(), suppress_defaults=True)
    distributed_utils.call_main(namespace_to_config(args), main, override_args=given)


def main(cfg: Any, override_args: argparse.Namespace | None = None) -> list[dict[str, Any]]:
    """Validates a checkpoint on each of `--valid-subset`.

    Args:
        cfg: whole configuration.
        override_args: the options that were given explicitly; they replace the checkpoint's.

    Returns:
        The validation figures of each subset.

    Raises:
        ValueError: settings are missing or do not fit the checkpoint, or a subset is empty.
        FileNotFoundError: the checkpoint or a subset is missing.
    """
    set_up_logging()
    utils.import_user_module(cfg.common)
    if cfg.common.log_file is not None:
        progress_bar.log_to_file(cfg.common.log_file)
    _check_settings(cfg)
    given = vars(override_args) if override_args is not None else {}
    overrides = {name: value for name, value in given.items() if name not in _NO_OVERRIDES}
    overrides.update(literal_dict(cfg.common_eval.model_overrides, "--model-overrides"))
    logger.info(f"loading model(s) from {cfg.common_eval.path}")
    models, saved_cfg, task = checkpoint_utils.load_model_ensemble_and_task(
        [cfg.common_eval.path], overrides, suffix=cfg.checkpoint.checkpoint_suffix
    )
    device = move_to_device(models, cfg)
    logger.info(config_to_dict(saved_cfg))
    criterion = task.build_criterion(cfg.criterion if "criterion" in given else saved_cfg.criterion)
    criterion.to(device=device).eval()
    subsets = cfg.dataset.valid_subset.split(",")
    with shared_sequences(cfg, models[:1]) as sharing:
        return [
            _validate(cfg, task, models[0], criterion, subset, device, sharing)
            for subset in subsets
        ]


def _check_settings(cfg: Any) -> None:
    if cfg.common_eval.path is None:
        raise ValueError("--path is needed: the checkpoint to validate")
    if cfg.dataset.max_tokens is None and cfg.dataset.batch_size is None:
        raise ValueError(
            "Must specify batch size either with --max-tokens or --batch-size (--max-sentences)"
        )


def _validate(
    cfg: Any,
    task: Any,
    model: torch.nn.Module,
    criterion: torch.nn.Module,
    subset: str,
    device: torch.device | None,
    sharing: Any,
) -> dict[str, Any]:
    """Validates on one subset; prints and returns its figures."""
    task.load_dataset(subset, combine=False, epoch=1)
    set_sequence_length([model], _longest_row(task.dataset(subset)))
    progress = progress_bar.progress_bar(
        _batches(cfg, task, model, subset),
        log_format=cfg.common.log_format,
        log_interval=cfg.common.log_interval,
        prefix=f"valid on '{subset}' subset",
        default_log_format="simple" if cfg.common.no_progress_bar else "tqdm",
    )
    outputs = []
    for step, sample in enumerate(progress):
        if not sample:  # workers with fewer batches than others
            continue
        if sharing is not None:
            sample = sharing.cut(sample)
        on_device = utils.move_to_cuda(sample, device) if device is not None else sample
        _, _, output = task.valid_step(on_device, model, criterion)
        progress.log(output, step=step)
        outputs.append(output)
    # Its members have other batches, or other parts of their sequences.
    group = distributed_utils.get_gradient_group()
    if group is not None:
        size = cfg.common.all_gather_list_size
        gathered = distributed_utils.all_gather_list(outputs, group=group, max_size=size)
        outputs = list(itertools.chain.from_iterable(gathered))
    if not outputs:
        raise ValueError(f"nothing was validated: --valid-subset {subset} has no rows that fit")
    with metrics.aggregate(new_root=True) as logged:
        task.reduce_metrics(outputs, criterion)
    stats = logged.get_smoothed_values()
    progress.print(stats, tag=subset, step=len(outputs))
    return dict(stats)


def _longest_row(dataset: Any) -> int | None:
    """Returns the tokens of the longest row, of targets where there are pairs; None if none is."""
    sizes = np.asarray(dataset.sizes).reshape(len(dataset), -1)  # (N, 1), or (N, 2) for pairs
    return int(sizes[:, -1].max(initial=0)) or None


def _batches(cfg: Any, task: Any, model: Any, subset: str) -> Any:
    return task.get_batch_iterator(
        dataset=task.dataset(subset),
        max_tokens=cfg.dataset.max_tokens,
        max_sentences=cfg.dataset.batch_size,
        max_positions=utils.resolve_max_positions(task.max_positions(), model.max_positions()),
        ignore_invalid_inputs=cfg.dataset.skip_invalid_size_inputs_valid_test,
        required_batch_size_multiple=cfg.dataset.required_batch_size_multiple,
        seed=cfg.common.seed,
        num_shards=distributed_utils.get_data_parallel_world_size(),
        shard_id=distributed_utils.get_data_parallel_rank(),
        num_workers=cfg.dataset.num_workers,
        data_buffer_size=cfg.dataset.data_buffer_size,
    ).next_epoch_itr(shuffle=False)


if __name__ == "__main__":
    cli_main()
