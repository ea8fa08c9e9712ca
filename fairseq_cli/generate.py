"""fairseq-generate: outputs for a binarized split, or scores of its references."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator
from typing import Any, TextIO

from fairseq import options, scoring, utils
from fairseq.dataclass.legacy import config_to_dict, namespace_to_config
from fairseq.distributed import utils as distributed_utils
from fairseq.logging import progress_bar
from fairseq.logging.handlers import LogStream
from fairseq_cli._generation import (
    BASE_2,
    Session,
    hypothesis_lines,
    most_positions,
    sentences,
    start_session,
)
from fairseq_cli._run import run_command, set_up_logging

__all__ = ["cli_main", "main"]

logger = logging.getLogger("fairseq_cli.generate")

# Tokens in a batch when no flag says how many, as in the original.
_MAX_TOKENS = 12000


def cli_main() -> None:
    """Runs fairseq-generate with the arguments of the process."""
    set_up_logging()
    run_command(_run)


def _run() -> None:
    args = options.parse_args_and_arch(options.get_generation_parser())
    distributed_utils.call_main(namespace_to_config(args), main)


def main(cfg: Any) -> Any:
    """Generates outputs for a split and prints them.

    Args:
        cfg: whole configuration.

    Returns:
        The scorer with all outputs and references.

    Raises:
        ValueError: settings contradict each other, or a checkpoint does not fit the data.
        FileNotFoundError: a checkpoint or the split is missing.
    """
    folder = cfg.common_eval.results_path
    if folder is None:
        set_up_logging()
        return _generate(cfg, sys.stdout)
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, f"generate-{cfg.dataset.gen_subset}.txt")
    with open(path, "w", buffering=1, encoding="utf-8") as file:
        set_up_logging(file)
        with _log_to(file):
            return _generate(cfg, file)


@contextlib.contextmanager
def _log_to(stream: TextIO) -> Iterator[None]:
    """Sends to a stream what of the log went to another."""
    handlers = [h for h in logging.getLogger().handlers if isinstance(h, LogStream)]
    before = [handler.setStream(stream) or stream for handler in handlers]
    try:
        yield
    finally:
        for handler, earlier in zip(handlers, before, strict=True):
            handler.setStream(earlier if earlier is not stream else sys.stdout)


def _generate(cfg: Any, output: TextIO) -> Any:
    subset = cfg.dataset.gen_subset
    if cfg.dataset.max_tokens is None and cfg.dataset.batch_size is None:
        cfg.dataset.max_tokens = _MAX_TOKENS
    logger.info(config_to_dict(cfg))
    session = start_session(cfg, load_data=lambda task: task.load_dataset(subset))
    scorer = scoring.build_scorer(cfg.scoring, session.task.target_dictionary)
    progress = progress_bar.progress_bar(
        _batches(cfg, session, subset),
        log_format=cfg.common.log_format,
        log_interval=cfg.common.log_interval,
        default_log_format="simple" if cfg.common.no_progress_bar else "tqdm",
    )
    num_sentences = num_tokens = 0
    seconds = 0.0
    has_target = True
    for sample in progress:
        if "net_input" not in sample:
            continue
        has_target = sample.get("target") is not None
        prefix = sample["target"][:, : cfg.generation.prefix_size] if has_target else None
        started_at = time.perf_counter()
        hypotheses = session.infer(
            sample, prefix_tokens=prefix if cfg.generation.prefix_size > 0 else None
        )
        seconds += time.perf_counter() - started_at
        for place, row, found in sentences(sample, hypotheses):
            lines = _lines(cfg, session, sample, place, row, found, scorer)
            if not cfg.common_eval.quiet:
                print(*lines, sep="\n", file=output)
        num_sentences += len(hypotheses)
        num_tokens += sum(len(found[0]["tokens"]) for found in hypotheses)
    logger.info(BASE_2)
    rate = 1 / seconds if seconds > 0 else 0.0
    logger.info(
        f"Translated {num_sentences:,} sentences ({num_tokens:,} tokens) in {seconds:.1f}s "
        f"({num_sentences * rate:.2f} sentences/s, {num_tokens * rate:.2f} tokens/s)"
    )
    if num_sentences == 0:
        raise ValueError(
            f"nothing was generated: --gen-subset {subset} has no rows that fit; "
            "--skip-invalid-size-inputs-valid-test left them out, or --num-shards is too large"
        )
    if has_target:
        result = scorer.result_string()
        print(f"Generate {subset} with beam={cfg.generation.beam}: {result}", file=output)
    return scorer


def _batches(cfg: Any, session: Session, subset: str) -> Any:
    return session.task.get_batch_iterator(
        dataset=session.task.dataset(subset),
        max_tokens=cfg.dataset.max_tokens,
        max_sentences=cfg.dataset.batch_size,
        max_positions=most_positions(session),
        ignore_invalid_inputs=cfg.dataset.skip_invalid_size_inputs_valid_test,
        required_batch_size_multiple=cfg.dataset.required_batch_size_multiple,
        seed=cfg.common.seed,
        num_shards=cfg.dataset.num_shards,
        shard_id=cfg.dataset.shard_id,
        num_workers=cfg.dataset.num_workers,
        data_buffer_size=cfg.dataset.data_buffer_size,
        allow_oversized=True,
    ).next_epoch_itr(shuffle=False)


def _lines(
    cfg: Any,
    session: Session,
    sample: dict[str, Any],
    place: int,
    row: int,
    found: list[dict[str, Any]],
    scorer: Any,
) -> list[str]:
    """Returns what is printed of a sentence, and hands its best output to the scorer."""
    task, post_process = session.task, cfg.common_eval.post_process
    left_out = getattr(session.generator, "symbols_to_strip_from_output", {session.generator.eos})
    lines = []
    if task.source_dictionary is not None:
        source = utils.strip_pad(
            sample["net_input"]["src_tokens"][place], task.source_dictionary.pad()
        )
        text = task.source_dictionary.string(source.cpu(), post_process)
        lines.append(f"S-{row}\t{session.decode(text)}")
    reference = None
    if sample.get("target") is not None:
        target = utils.strip_pad(sample["target"][place], task.target_dictionary.pad())
        text = task.target_dictionary.string(
            target.int().cpu(), post_process, escape_unk=True, extra_symbols_to_ignore=left_out
        )
        reference = session.decode(text)
        lines.append(f"T-{row}\t{reference}")
    for rank, hypothesis in enumerate(found[: cfg.generation.nbest]):
        ids = sample["net_input"]["src_tokens"][place]
        own, text = hypothesis_lines(session, hypothesis, row, post_process, ids)
        lines += own
        if rank == 0 and reference is not None:
            scorer.add_string(reference, text)
    return lines


if __name__ == "__main__":
    cli_main()
