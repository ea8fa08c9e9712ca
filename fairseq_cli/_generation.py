"""What fairseq-generate and fairseq-interactive have in common."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fairseq import checkpoint_utils, tasks, utils
from fairseq.data import encoders
from fairseq.data.data_utils import split_paths
from fairseq.dataclass.arguments import literal_dict
from fairseq.generation.alignment import add_alignments, alignment_text, check_can_align
from fairseq.generation.layout import lay_out_for_generation
from fairseq.logging import progress_bar
from fairseq.model_parallel.run import refuse_shared_models
from fairseq_cli.eval_lm import move_to_device

__all__ = ["BASE_2", "Session", "hypothesis_lines", "most_positions", "sentences", "start_session"]

logger = logging.getLogger(__name__)

BASE_2 = "NOTE: hypothesis and token scores are output in base 2"


@dataclass
class Session:
    """Models, and what turns text into ids and back.

    Attributes:
        task: the task of the command line.
        models: an ensemble.
        generator: made by the task.
        tokenizer: None where there is none.
        bpe: None where there is none.
        device: the GPU that batches must be moved to, None for the CPU.
        alignment: `hard` or `soft`, None for none.
    """

    task: Any
    models: list[Any]
    generator: Any
    tokenizer: Any
    bpe: Any
    device: Any
    alignment: str | None = None

    def encode(self, text: str) -> str:
        """Returns a line as the dictionary knows it: words split, then pieces."""
        for step in (self.tokenizer, self.bpe):
            text = text if step is None else step.encode(text)
        return text

    def decode(self, text: str) -> str:
        """Returns text from pieces."""
        for step in (self.bpe, self.tokenizer):
            text = text if step is None else step.decode(text)
        return text

    def infer(self, sample: dict[str, Any], **given: Any) -> list[list[dict[str, Any]]]:
        """Generates for a batch."""
        if self.device is not None:
            sample = utils.move_to_cuda(sample, self.device)
        found: list[list[dict[str, Any]]] = self.task.inference_step(
            self.generator, self.models, sample, **given
        )
        if self.alignment is not None:
            words = self.task.target_dictionary
            pad, eos = words.pad(), words.eos()
            add_alignments(self.models, sample["net_input"], found, pad=pad, eos=eos)
        return found


def start_session(cfg: Any, *, load_data: Callable[[Any], None] | None = None) -> Session:
    """Sets up the task, loads the models and makes the generator.

    Args:
        cfg: whole configuration.
        load_data: called with the task before the models are loaded.

    Raises:
        ValueError: settings contradict each other, or a checkpoint does not fit the data.
        FileNotFoundError: a file is missing.
    """
    utils.import_user_module(cfg.common)
    if cfg.common.log_file is not None:
        progress_bar.log_to_file(cfg.common.log_file)
    _check(cfg)
    refuse_shared_models(cfg)
    np.random.seed(cfg.common.seed)
    utils.set_torch_seed(cfg.common.seed)
    task = tasks.setup_task(cfg.task)
    if load_data is not None:
        load_data(task)
    overrides = literal_dict(cfg.common_eval.model_overrides, "--model-overrides")
    models = _load(cfg, cfg.common_eval.path, overrides, task)
    if cfg.generation.print_alignment is not None:
        check_can_align(models)
    extra: dict[str, Any] = {}
    if cfg.generation.lm_path is not None:
        logger.info(f"loading the language model from {cfg.generation.lm_path}")
        found = _load(cfg, cfg.generation.lm_path, {**overrides, "data": cfg.task.data}, None)
        _check_words(found[0], task.target_dictionary, cfg.generation.lm_path)
        extra = {"lm_model": found[0], "lm_weight": cfg.generation.lm_weight}
    device = move_to_device([*models, *filter(None, [extra.get("lm_model")])], cfg)
    lay_out_for_generation(models)
    generator = task.build_generator(models, cfg.generation, extra_gen_cls_kwargs=extra)
    return Session(
        task=task,
        models=models,
        generator=generator,
        tokenizer=encoders.build_tokenizer(cfg.tokenizer),
        bpe=encoders.build_bpe(cfg.bpe),
        device=device,
        alignment=cfg.generation.print_alignment,
    )


def _check(cfg: Any) -> None:
    if cfg.common_eval.path is None:
        raise ValueError("--path is needed: the checkpoint to generate with, or several")
    generation = cfg.generation
    if generation.sampling and generation.nbest != generation.beam:
        raise ValueError(
            f"--sampling requires --nbest to be equal to --beam: each of --beam {generation.beam} "
            f"samples is printed, but --nbest is {generation.nbest}"
        )
    if generation.nbest > generation.beam:
        raise ValueError(
            f"--nbest {generation.nbest} is more than the --beam {generation.beam} hypotheses"
        )
    if generation.score_reference and generation.lm_path is not None:
        raise ValueError("--score-reference scores with the models of --path; leave --lm-path out")


def _load(cfg: Any, paths: str, overrides: dict[str, Any], task: Any) -> list[Any]:
    logger.info(f"loading model(s) from {paths}")
    files = [paths] if os.path.exists(paths) else split_paths(paths)
    models, _, _ = checkpoint_utils.load_model_ensemble_and_task(
        files,
        arg_overrides=overrides,
        task=task,
        suffix=cfg.checkpoint.checkpoint_suffix,
        num_shards=cfg.checkpoint.checkpoint_shard_count,
    )
    return list(models)


def _check_words(model: Any, dictionary: Any, path: str) -> None:
    if model.decoder.dictionary != dictionary:
        raise ValueError(
            f"--lm-path {path}: its dictionary is not that of the outputs, whose words it is to "
            "weigh; use one that was trained on data with the same dictionary"
        )


def most_positions(session: Session) -> Any:
    """Returns the longest input that can be read; None for any, a pair for translation.

    A language model whose positions have no end reads inputs beyond those of training.
    """
    limits = [session.task.max_positions()]
    for model in session.models:
        decoder: Any = getattr(model, "decoder", None)
        is_free = not hasattr(model, "encoder") and hasattr(decoder, "position_limit")
        limits.append(decoder.position_limit if is_free else model.max_positions())
    return utils.resolve_max_positions(*limits)


def hypothesis_lines(
    session: Session,
    hypothesis: dict[str, Any],
    row: Any,
    post_process: str | None,
    source: torch.Tensor,
) -> tuple[list[str], str]:
    """Returns a hypothesis as printed, scores in bits.

    Args:
        session: says how ids become text.
        hypothesis: what the generator made.
        row: number of the sentence.
        post_process: how pieces are joined.
        source: ids of the source, (S,).

    Returns:
        (lines H-, D- and P-, and A- if it is asked for; the text as in line D-).
    """
    dictionary = session.task.target_dictionary
    left_out = getattr(session.generator, "symbols_to_strip_from_output", {session.generator.eos})
    text = dictionary.string(
        hypothesis["tokens"].int().cpu(), post_process, extra_symbols_to_ignore=left_out
    )
    decoded = session.decode(text)
    score = (hypothesis["score"] / math.log(2)).item()
    positional = (hypothesis["positional_scores"] / math.log(2)).tolist()
    lines = [
        f"H-{row}\t{score}\t{text}",
        f"D-{row}\t{score}\t{decoded}",
        f"P-{row}\t" + " ".join(f"{each:.4f}" for each in positional),
    ]
    if session.alignment is not None:
        pad = dictionary.pad()
        lines.append(f"A-{row}\t{alignment_text(hypothesis, session.alignment, source, pad)}")
    return lines, decoded


def sentences(sample: dict[str, Any], hypotheses: list[Any]) -> Iterator[tuple[int, int, Any]]:
    """Yields (place in the batch, id, hypotheses) of each sentence."""
    for place, row in enumerate(sample["id"].tolist()):
        yield place, row, hypotheses[place]
