"""fairseq-eval-lm: the perplexity of a language model on a split, in blocks or sliding windows."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

import torch

from fairseq import checkpoint_utils, options, tasks, utils
from fairseq.dataclass.arguments import literal_dict
from fairseq.dataclass.configs import CommonConfig
from fairseq.dataclass.legacy import config_to_dict, namespace_to_config
from fairseq.distributed import utils as distributed_utils
from fairseq.evaluation.perplexity import eval_lm
from fairseq.evaluation.word_stats import WordStat
from fairseq.logging import progress_bar
from fairseq.model_parallel.run import shared_sequences
from fairseq.sequence_scorer import Scores
from fairseq.tasks.language_modeling import check_document_mask
from fairseq_cli._run import run_command, set_up_logging

__all__ = [
    "WordStat",
    "cli_main",
    "eval_lm",
    "main",
    "move_to_device",
    "set_sequence_length",
]

logger = logging.getLogger("fairseq_cli.eval_lm")

# Tokens in a batch when no flag says how many, as in the original.
_MAX_TOKENS = 36000


def cli_main() -> None:
    """Runs fairseq-eval-lm with the arguments of the process."""
    set_up_logging()
    run_command(_run)


def _run() -> None:
    args = options.parse_args_and_arch(options.get_eval_lm_parser())
    distributed_utils.call_main(namespace_to_config(args), main)


def main(
    cfg: Any, *, on_scores: Callable[[dict[str, Any], Scores], None] | None = None
) -> dict[str, float]:
    """Evaluates a checkpoint on a split.

    Args:
        cfg: whole configuration; the task's block length loses the context window on the way.
        on_scores: called with every batch and its scores.

    Returns:
        {"loss": bits per word, "perplexity": 2 ** loss, "tokens", "seconds"}, see
        `fairseq.evaluation.eval_lm`.

    Raises:
        ValueError: settings contradict each other, the checkpoint does not fit the data, or there
            is nothing to evaluate.
        FileNotFoundError: the checkpoint or the split is missing.
    """
    set_up_logging()
    utils.import_user_module(cfg.common)
    if cfg.common.log_file is not None:
        progress_bar.log_to_file(cfg.common.log_file)
    _check_settings(cfg)
    logger.info(config_to_dict(cfg))
    context_window = cfg.eval_lm.context_window
    if context_window > 0:
        cfg.task.tokens_per_sample -= context_window
    task: Any = tasks.setup_task(cfg.task)

    logger.info(f"loading model(s) from {cfg.common_eval.path}")
    models, _, task = checkpoint_utils.load_model_ensemble_and_task(
        [cfg.common_eval.path],
        arg_overrides=literal_dict(cfg.common_eval.model_overrides, "--model-overrides"),
        suffix=cfg.checkpoint.checkpoint_suffix,
        num_shards=cfg.checkpoint.checkpoint_shard_count,
        task=task,
    )
    _check_document_masks(models, cfg.task, context_window)
    device = move_to_device(models, cfg)
    logger.info(f"num. model params: {sum(p.numel() for p in models[0].parameters()):,}")

    subset = cfg.dataset.gen_subset
    task.load_dataset(subset)
    dataset = task.dataset(subset)
    logger.info(f"{cfg.task.data} {subset} {len(dataset):,} examples")
    window = _longest_row(dataset, cfg.task.tokens_per_sample, context_window)
    _check_lengths(models, window)
    set_sequence_length(models, window)
    with shared_sequences(cfg, models) as sharing:
        progress = progress_bar.progress_bar(
            _batches(cfg, task, dataset),
            log_format=cfg.common.log_format,
            log_interval=cfg.common.log_interval,
            default_log_format="simple" if cfg.common.no_progress_bar else "tqdm",
        )
        score_pad = getattr(task, "targets", None) in (None, ["future"])
        scorer = None
        if sharing is not None:
            from fairseq.evaluation.shared_sequences import SharedSequenceScorer

            scorer = SharedSequenceScorer(
                task.target_dictionary,
                cfg.eval_lm.softmax_batch,
                score_pad=score_pad,
                sharing=sharing,
            )
        return eval_lm(
            models,
            task.source_dictionary,
            progress,
            post_process=cfg.common_eval.post_process,
            output_word_probs=cfg.eval_lm.output_word_probs,
            output_word_stats=cfg.eval_lm.output_word_stats,
            target_dictionary=task.target_dictionary,
            softmax_batch=cfg.eval_lm.softmax_batch,
            remove_bos_token=getattr(cfg.task, "add_bos_token", False),
            device=device,
            score_pad=score_pad,
            on_scores=on_scores,
            scorer=scorer,
        )


def _check_settings(cfg: Any) -> None:
    path = cfg.common_eval.path
    if path is None:
        raise ValueError("--path is needed: the checkpoint to evaluate")
    if os.pathsep in path and not os.path.exists(path):
        raise ValueError(
            f"--path {path}: one checkpoint is evaluated at a time; run the command for each of "
            f"{', '.join(path.split(os.pathsep))}"
        )
    window, length = cfg.eval_lm.context_window, cfg.task.tokens_per_sample
    if window < 0:
        raise ValueError(f"--context-window is {window}; it must be at least 0")
    if window >= length:
        raise ValueError(
            f"--context-window {window} leaves no room for new tokens in windows of "
            f"--tokens-per-sample {length}; it must be smaller, {length - 1} at most"
        )


def _check_document_masks(models: list[torch.nn.Module], cfg_task: Any, window: int) -> None:
    """Refuses rows in which a model cannot tell the documents apart."""
    for model in models:
        kind = getattr(getattr(model, "decoder", None), "document_mask", None)
        check_document_mask(kind, cfg_task, window)


def _longest_row(dataset: Any, block_length: int, context_window: int) -> int:
    """Returns the tokens in the longest row, context included."""
    block = int(max(dataset.sizes, default=0))
    return max(block, min(block, block_length) + context_window)


def set_sequence_length(models: list[torch.nn.Module], window: int | None) -> None:
    """Lets position methods that adapt to length take every window, the last too, as full.

    Args:
        models: those without such methods are left as they are.
        window: tokens in the longest row; None takes each batch as long as it is.
    """
    for model in models:
        decoder: Any = getattr(model, "decoder", None)
        if hasattr(decoder, "sequence_length"):
            decoder.sequence_length = window


def _check_lengths(models: list[torch.nn.Module], longest: int) -> None:
    """Refuses rows that a model with a table of positions cannot take."""
    limits = [getattr(getattr(m, "decoder", None), "position_limit", None) for m in models]
    limit = utils.resolve_max_positions(*limits)
    if limit is not None and longest > limit:
        raise ValueError(
            f"a row of {longest} tokens is longer than the {limit} positions the model has "
            f"learned; give --tokens-per-sample {limit} or less"
        )


def _batches(cfg: Any, task: Any, dataset: Any) -> Any:
    """Returns the batches of this process's share of the split; no block is left out."""
    distributed = cfg.distributed_training
    num_shards, shard_id = distributed.distributed_world_size, distributed.distributed_rank
    if distributed.sequence_parallel_size > 1:
        num_shards = distributed_utils.get_data_parallel_world_size()
        shard_id = distributed_utils.get_data_parallel_rank()
    max_tokens = cfg.dataset.max_tokens
    return task.eval_lm_dataloader(
        dataset=dataset,
        max_tokens=_MAX_TOKENS if max_tokens is None else max_tokens,
        batch_size=cfg.dataset.batch_size,
        max_positions=None,
        num_shards=max(cfg.dataset.num_shards, num_shards),
        shard_id=max(cfg.dataset.shard_id, shard_id),
        num_workers=cfg.dataset.num_workers,
        data_buffer_size=cfg.dataset.data_buffer_size,
        context_window=cfg.eval_lm.context_window,
    )


def move_to_device(models: list[torch.nn.Module], cfg: Any) -> torch.device | None:
    """Puts models where and into the precision in which they are evaluated.

    Returns:
        The GPU that batches must be moved to, None for the CPU.
    """
    dtype = _half_type(cfg.common)
    use_cuda = torch.cuda.is_available() and not cfg.common.cpu
    device = None
    if use_cuda:
        torch.cuda.set_device(cfg.distributed_training.device_id)
        device = torch.device("cuda", cfg.distributed_training.device_id)
    elif dtype is not None and not cfg.common.cpu_half:
        logger.warning(
            "half precision is many times slower than float32 on a CPU, so float32 is used; "
            "--cpu-half uses it all the same"
        )
        dtype = None
    for model in models:
        model.to(device=device, dtype=dtype)
        model.eval()
        prepare: Any = getattr(model, "prepare_for_inference_", None)
        if prepare is not None:
            prepare(cfg)
    return device


def _half_type(common: CommonConfig) -> torch.dtype | None:
    if common.fp16 or common.memory_efficient_fp16:
        return torch.float16
    return torch.bfloat16 if common.bf16 or common.memory_efficient_bf16 else None


if __name__ == "__main__":
    cli_main()
