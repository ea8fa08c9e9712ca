"""fairseq-diagnose: what each attention head of a language model looks at, on real text."""

from __future__ import annotations

import csv
import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

from fairseq import checkpoint_utils, options, tasks, utils
from fairseq.checkpoint import format as layout
from fairseq.dataclass.arguments import literal_dict
from fairseq.dataclass.legacy import namespace_to_config
from fairseq.evaluation.diagnostics import Diagnosis, HeadFigures, diagnose
from fairseq.evaluation.plot import check_matplotlib
from fairseq.evaluation.plot_heads import plot_heads
from fairseq.logging import progress_bar
from fairseq_cli._run import run_command, set_up_logging
from fairseq_cli.eval_lm import move_to_device

__all__ = ["cli_main", "main"]

logger = logging.getLogger("fairseq_cli.diagnose")

# Tokens in a batch when no flag says how many.
_MAX_TOKENS = 4096


def cli_main() -> None:
    """Runs fairseq-diagnose with the arguments of the process."""
    set_up_logging()
    args = options.parse_args_and_arch(options.get_diagnose_parser())
    given = options.parse_args_and_arch(options.get_diagnose_parser(), suppress_defaults=True)

    def diagnose_as_told() -> None:
        main(
            namespace_to_config(args),
            length=getattr(given, "tokens_per_sample", None),
            max_batches=args.max_batches,
            draws=not args.no_plots,
        )

    run_command(diagnose_as_told)


def main(
    cfg: Any, *, length: int | None = None, max_batches: int = 16, draws: bool = True
) -> Diagnosis:
    """Diagnoses a checkpoint on a split, prints the table and writes the results.

    Args:
        cfg: whole configuration.
        length: tokens of a window; None takes the length the model was trained with.
        max_batches: batches to read; 0 reads all.
        draws: whether a picture is among the results.

    Raises:
        ImportError: matplotlib is needed and not there.
        ValueError: settings do not fit, or the model is no transformer language model.
        FileNotFoundError: the checkpoint or the split is missing.
        OSError: the results cannot be written.
    """
    set_up_logging()
    utils.import_user_module(cfg.common)
    _check_settings(cfg, length, max_batches)
    if cfg.common_eval.results_path is not None and draws:
        check_matplotlib()
    if cfg.common_eval.results_path is not None:
        utils.make_writable_folder(cfg.common_eval.results_path, "--results-path")
    path = cfg.common_eval.path
    overrides = literal_dict(cfg.common_eval.model_overrides, "--model-overrides")
    state = checkpoint_utils.load_checkpoint_to_cpu(path, overrides, memory_map=True)
    record = state[layout.ALIBI_KEY]
    cfg.task.tokens_per_sample = length or record.get("train_length") or cfg.task.tokens_per_sample
    task: Any = tasks.setup_task(cfg.task)
    logger.info(f"loading model(s) from {path}")
    models, _, _ = checkpoint_utils.load_model_ensemble_and_task([path], task=task, state=state)
    device = move_to_device(models, cfg)
    del state

    subset = cfg.dataset.gen_subset
    task.load_dataset(subset)
    batches = _batches(cfg, task, task.dataset(subset), max_batches)
    diagnosis = diagnose(models[0], batches)
    described = {
        "checkpoint": path,
        "position_method": record["position_method"],
        "train_length": record.get("train_length"),
        "tokens_per_sample": cfg.task.tokens_per_sample,
        "subset": subset,
        "windows": diagnosis.num_windows,
        "tokens": diagnosis.num_tokens,
        "device": str(device or "cpu"),
    }
    print(_table(diagnosis))
    print(
        f"{path}: {described['position_method']}, trained at length {described['train_length']}; "
        f"{diagnosis.num_tokens:,} tokens of {subset} in {diagnosis.num_windows:,} windows of "
        f"{cfg.task.tokens_per_sample}"
    )
    if cfg.common_eval.results_path is not None:
        _write(Path(cfg.common_eval.results_path), described, diagnosis, draws)
    return diagnosis


def _check_settings(cfg: Any, length: int | None, max_batches: int) -> None:
    if cfg.common_eval.path is None:
        raise ValueError("--path is needed: the checkpoint to diagnose")
    if length is not None and length < 2:
        raise ValueError(f"--tokens-per-sample is {length}; a window needs at least 2 tokens")
    if max_batches < 0:
        raise ValueError(f"--max-batches is {max_batches}; it is at least 1, or 0 for all")


def _batches(cfg: Any, task: Any, dataset: Any, max_batches: int) -> Any:
    max_tokens = cfg.dataset.max_tokens
    batches = task.eval_lm_dataloader(
        dataset=dataset,
        max_tokens=_MAX_TOKENS if max_tokens is None else max_tokens,
        batch_size=cfg.dataset.batch_size,
        num_workers=cfg.dataset.num_workers,
        data_buffer_size=cfg.dataset.data_buffer_size,
    )
    if max_batches and max_batches < len(batches):
        batches.take(max_batches)
    return progress_bar.progress_bar(
        batches,
        log_format=cfg.common.log_format,
        log_interval=cfg.common.log_interval,
        prefix="diagnosing",
        default_log_format="simple" if cfg.common.no_progress_bar else "tqdm",
    )


_COLUMNS = {
    "layer": ("layer", "{}"),
    "head": ("head", "{}"),
    "slope": ("slope", "{:.5f}"),
    "mean_distance": ("distance", "{:.1f}"),
    "span90": ("span90", "{}"),
    "entropy_bits": ("bits", "{:.2f}"),
    "entropy_relative": ("of most", "{:.1%}"),
    "first_token_mass": ("first", "{:.1%}"),
    "zero_float32": ("0 in fp32", "{:.1%}"),
    "zero_bfloat16": ("0 in bf16", "{:.1%}"),
    "zero_float16": ("0 in fp16", "{:.1%}"),
    "score_bound": ("R", "{:.1f}"),
}


def _table(diagnosis: Diagnosis) -> str:
    """Returns one line for each head, and one for a head with equal weights."""
    rows = [[title for title, _ in _COLUMNS.values()]]
    for figures in [*map(dataclasses.asdict, diagnosis.heads), diagnosis.uniform]:
        rows.append(
            [
                "-" if figures.get(name) is None else form.format(figures[name])
                for name, (_, form) in _COLUMNS.items()
            ]
        )
    rows[-1][:2] = ["equal", "weights"]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.rjust, row, widths)) for row in rows]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)


def _write(folder: Path, described: dict[str, Any], diagnosis: Diagnosis, draws: bool) -> None:
    heads = [dataclasses.asdict(head) for head in diagnosis.heads]
    report = {**described, "uniform": diagnosis.uniform, "heads": heads}
    (folder / "heads.json").write_text(json.dumps(report, indent=1) + "\n")
    with (folder / "heads.csv").open("w", newline="") as file:
        names = [field.name for field in dataclasses.fields(HeadFigures)]
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(heads)
    logger.info(f"wrote heads.json and heads.csv to {folder}")
    if not draws:
        return
    title = (
        f"{described['position_method']}, trained at {described['train_length']} tokens, windows "
        f"of {described['tokens_per_sample']}: {described['checkpoint']}"
    )
    plot_heads(diagnosis, title, folder / "heads.png")
    logger.info(f"drew {folder / 'heads.png'}")


if __name__ == "__main__":
    cli_main()
