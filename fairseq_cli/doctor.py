"""fairseq-doctor: is a checkpoint's position method really in effect?"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fairseq import checkpoint_utils, options, tasks, utils
from fairseq.checkpoint import format as layout
from fairseq.data.dictionary import Dictionary, TruncatedDictionary, dummy_dictionary
from fairseq.dataclass.arguments import literal_dict
from fairseq.dataclass.legacy import namespace_to_config
from fairseq.evaluation.doctor import FAIL, PASS, Finding, Patient, examine
from fairseq.tasks.language_modeling import LanguageModelingTask
from fairseq_cli._run import run_command, set_up_logging
from fairseq_cli.eval_lm import move_to_device

__all__ = ["cli_main", "examine_hf", "main"]

logger = logging.getLogger("fairseq_cli.doctor")

_DICTIONARY = "dictionary fits"


def cli_main() -> None:
    """Runs fairseq-doctor with the arguments of the process; exit code 1 if a check fails."""
    set_up_logging()
    args = options.parse_args_and_arch(options.get_doctor_parser(), needs_data=False)

    def examine_as_told() -> None:
        findings = examine_hf(args.hf) if args.hf else main(namespace_to_config(args))
        if any(finding.status == FAIL for finding in findings):
            sys.exit(1)

    run_command(examine_as_told)


def main(cfg: Any) -> list[Finding]:
    """Examines a checkpoint and prints a line for each check.

    Args:
        cfg: whole configuration; without `task.data` the model reads random ids.

    Returns:
        All findings.

    Raises:
        ValueError: settings do not fit, or the model is no transformer language model.
        FileNotFoundError: the checkpoint or the data are missing.
    """
    set_up_logging()
    utils.import_user_module(cfg.common)
    _check_settings(cfg)
    path = cfg.common_eval.path
    overrides = literal_dict(cfg.common_eval.model_overrides, "--model-overrides")
    stored = checkpoint_utils.load_checkpoint_to_cpu(path, memory_map=True)[layout.ALIBI_KEY]
    state = checkpoint_utils.load_checkpoint_to_cpu(path, overrides, memory_map=True)
    return _report(_examine(cfg, path, state, stored), path)


def examine_hf(folder: str) -> list[Finding]:
    """Examines a folder of a Hugging Face model and prints a line for each check.

    Returns:
        All findings.

    Raises:
        FileNotFoundError: it is no such folder.
        ImportError: transformers is not installed.
    """
    from fairseq.huggingface.doctor import examine_folder

    return _report(examine_folder(Path(folder)), folder)


def _report(examination: Iterator[Finding], name: str) -> list[Finding]:
    """Prints each finding as it is made, and a verdict; returns all of them."""
    started_at = time.perf_counter()
    findings = []
    for finding in examination:
        print(f"{finding.status}  {finding.name:31}  {finding.text}", flush=True)
        findings.append(finding)
    seconds = time.perf_counter() - started_at
    failed = sum(finding.status == FAIL for finding in findings)
    verdict = f"{failed} of {len(findings)} checks FAILED" if failed else "all checks passed"
    print(f"{name}: {verdict} ({seconds:.1f} s)")
    return findings


def _check_settings(cfg: Any) -> None:
    if cfg.common_eval.path is None:
        raise ValueError(
            "--path is needed: the checkpoint to examine (or --hf: a folder of Hugging Face)"
        )


def _examine(
    cfg: Any, path: str, state: dict[str, Any], stored: dict[str, Any]
) -> Iterator[Finding]:
    task: Any = None
    if cfg.task.data:
        task = tasks.setup_task(cfg.task)
        fit = _dictionary_fits(state, task.source_dictionary, path)
        yield fit
        if fit.status == FAIL:
            task = None
            logger.warning("the other checks read random ids, since the data do not fit")
    tokens = None if task is None else _text(cfg, task)
    model = _load(path, state, task)
    device = move_to_device([model], cfg) or torch.device("cpu")
    if tokens is not None and model.decoder.document_mask != "none":
        # Ends of lines would tell the order of tokens, whatever the position method.
        tokens = tokens[tokens.ne(task.source_dictionary.eos())]
    tokens = None if tokens is None else tokens.to(device)
    yield from examine(
        Patient.of(
            model,
            state["cfg"].model,
            tokens,
            train_length=stored.get("train_length"),
            stored_method=stored["position_method"],
            stored_reason=stored["position_reason"],
            is_certain=stored["position_is_certain"],
        )
    )


def _dictionary_fits(state: dict[str, Any], dictionary: Any, path: str) -> Finding:
    try:
        checkpoint_utils.check_dictionary(state, dictionary, path)
    except ValueError as error:
        return Finding(_DICTIONARY, FAIL, str(error))
    is_recorded = bool(state[layout.ALIBI_KEY].get("dictionary"))
    how = "the checkpoint's hash of it agrees" if is_recorded else "its size; no hash is recorded"
    return Finding(_DICTIONARY, PASS, f"{len(dictionary):,} symbols: {how}")


def _load(path: str, state: dict[str, Any], task: Any) -> Any:
    """Builds the model, with a made-up dictionary of the right size if there is no task."""
    if task is None:
        size = checkpoint_utils.vocabulary_size(state["model"])
        if size is None:
            raise ValueError(
                f"{path} holds no transformer language model; give a checkpoint that "
                "fairseq-train wrote for --task language_modeling"
            )
        task = _task_without_data(getattr(state["cfg"], "task", None), size)
        record = state[layout.ALIBI_KEY]
        record = {key: value for key, value in record.items() if key != "dictionary"}
        state = {**state, layout.ALIBI_KEY: record}
    models, _, _ = checkpoint_utils.load_model_ensemble_and_task([path], task=task, state=state)
    return models[0]


def _task_without_data(cfg: Any, size: int) -> LanguageModelingTask:
    dictionary = dummy_dictionary(size - Dictionary().nspecial)
    most = getattr(cfg, "output_dictionary_size", -1)
    output = dictionary if most < 0 else TruncatedDictionary(dictionary, most)
    return LanguageModelingTask(cfg, dictionary, output)


def _text(cfg: Any, task: Any) -> torch.Tensor:
    """Returns the first ids of the split, one after the other, without padding."""
    subset = cfg.dataset.gen_subset
    task.load_dataset(subset)
    dataset = task.dataset(subset)
    parts, num_tokens = [], 0
    for index in range(len(dataset)):
        parts.append(dataset[index]["source"])
        num_tokens += len(parts[-1])
        if num_tokens > 1 << 14:
            break
    ids = torch.cat(parts)
    return ids[ids.ne(task.source_dictionary.pad())]


if __name__ == "__main__":
    cli_main()
