"""fairseq-interactive: outputs for lines of text, as they come."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from fairseq import options, utils
from fairseq.data.text_file import decode_lines
from fairseq.dataclass.legacy import config_to_dict, namespace_to_config
from fairseq.distributed import utils as distributed_utils
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

logger = logging.getLogger("fairseq_cli.interactive")


def cli_main() -> None:
    """Runs fairseq-interactive with the arguments of the process."""
    set_up_logging()
    run_command(_run)


def _run() -> None:
    args = options.parse_args_and_arch(options.get_interactive_generation_parser())
    distributed_utils.call_main(namespace_to_config(args), main)


def main(cfg: Any) -> None:
    """Reads lines, in buffers, and prints the outputs of each in the order of the input.

    Args:
        cfg: whole configuration.

    Raises:
        ValueError: settings contradict each other, or a line is not UTF-8 or longer than the model
            reads.
        FileNotFoundError: a checkpoint or the input is missing.
    """
    set_up_logging()
    started_at = time.perf_counter()
    buffer_size = max(1, cfg.interactive.buffer_size)
    if cfg.dataset.max_tokens is None and cfg.dataset.batch_size is None:
        cfg.dataset.batch_size = 1
    _check(cfg, buffer_size)
    logger.info(config_to_dict(cfg))
    session = start_session(cfg)
    if buffer_size > 1:
        logger.info(f"Sentence buffer size: {buffer_size}")
    logger.info(BASE_2)
    logger.info("Type the input sentence and press return:")
    seconds = 0.0
    with _open(cfg.interactive.input) as file:
        first = 0
        path = cfg.interactive.input
        name = "standard input" if path == "-" else path
        for lines in _buffers(decode_lines(file, name), buffer_size):
            seconds += _answer(cfg, session, lines, first)
            first += len(lines)
    logger.info(
        f"Total time: {time.perf_counter() - started_at:.3f} seconds; translation time: "
        f"{seconds:.3f}"
    )


def _check(cfg: Any, buffer_size: int) -> None:
    if cfg.dataset.batch_size is not None and cfg.dataset.batch_size > buffer_size:
        raise ValueError(
            f"--batch-size {cfg.dataset.batch_size} is larger than the buffer of {buffer_size} "
            f"lines; give --buffer-size {cfg.dataset.batch_size} or more"
        )
    if cfg.generation.score_reference or cfg.generation.prefix_size > 0:
        flag = "--score-reference" if cfg.generation.score_reference else "--prefix-size"
        raise ValueError(f"{flag} needs references, which lines of text do not have; leave it out")


def _open(path: str) -> Any:
    """Returns a context that gives lines as bytes."""
    if path != "-":
        return open(path, "rb")
    # It is None where the caller has closed it: then there is nothing to read.
    return contextlib.nullcontext(() if sys.stdin is None else sys.stdin.buffer)


def _buffers(lines: Iterable[str], size: int) -> Iterator[list[str]]:
    buffer: list[str] = []
    for line in lines:
        buffer.append(line.strip())
        if len(buffer) == size:
            yield buffer
            buffer = []
    if buffer:
        yield buffer


def _answer(cfg: Any, session: Session, lines: list[str], first: int) -> float:
    """Prints the outputs for a buffer of lines; returns the seconds that generation took."""
    dictionary = session.task.source_dictionary
    tokens = [
        dictionary.encode_line(session.encode(line), add_if_not_exist=False).long()
        for line in lines
    ]
    answers: dict[int, tuple[float, torch.Tensor, list[dict[str, Any]]]] = {}
    seconds = 0.0
    for sample in _batches(cfg, session, tokens):
        started_at = time.perf_counter()
        hypotheses = session.infer(sample)
        elapsed = time.perf_counter() - started_at
        seconds += elapsed
        for place, row, found in sentences(sample, hypotheses):
            source = sample["net_input"]["src_tokens"][place].cpu()
            answers[row] = (elapsed / len(hypotheses), source, found)
    for row in sorted(answers):
        elapsed, source, found = answers[row]
        words = utils.strip_pad(source, dictionary.pad())
        text = dictionary.string(words, cfg.common_eval.post_process)
        print(f"S-{first + row}\t{text}")
        print(f"W-{first + row}\t{elapsed:.3f}\tseconds")
        for hypothesis in found[: cfg.generation.nbest]:
            own, _ = hypothesis_lines(
                session, hypothesis, first + row, cfg.common_eval.post_process, source
            )
            print(*own, sep="\n")
    sys.stdout.flush()
    return seconds


def _batches(cfg: Any, session: Session, tokens: list[Any]) -> Any:
    return session.task.get_batch_iterator(
        dataset=session.task.build_dataset_for_inference(tokens, [len(each) for each in tokens]),
        max_tokens=cfg.dataset.max_tokens,
        max_sentences=cfg.dataset.batch_size,
        max_positions=most_positions(session),
        ignore_invalid_inputs=cfg.dataset.skip_invalid_size_inputs_valid_test,
        allow_oversized=True,
        disable_iterator_cache=True,
    ).next_epoch_itr(shuffle=False)


if __name__ == "__main__":
    cli_main()
