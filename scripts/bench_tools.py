"""What the benchmarks share: invented data, real trainers, and alternating measurements."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fairseq import options, tasks, utils
from fairseq.data.dictionary import Dictionary
from fairseq.data.mmap_indexed_dataset import MMapIndexedDatasetBuilder
from fairseq.dataclass.legacy import namespace_to_config
from fairseq.trainer import Trainer

__all__ = [
    "build_trainer",
    "first_batch",
    "model_flags",
    "ratio",
    "report",
    "seconds_of",
    "write_data",
]


def write_data(
    folder: Path, *, words: int, tokens: int, splits: tuple[str, ...] = ("train", "valid")
) -> None:
    """Writes binarized data whose words follow Zipf's law, as words of a text do.

    Args:
        folder: where to; made if it is missing.
        words: size of the vocabulary, its four special symbols included.
        tokens: of each split.
        splits: their names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    dictionary = Dictionary()
    for number in range(words - len(dictionary)):
        dictionary.add_symbol(f"w{number}", words - number)
    dictionary.save(folder / "dict.txt")
    dtype = np.uint16 if words < 65500 else np.uint32
    weights = 1 / (np.arange(words - 4) + 2.7)
    for seed, split in enumerate(splits):
        drawn = np.random.default_rng(seed).choice(words - 4, tokens, p=weights / weights.sum())
        builder = MMapIndexedDatasetBuilder(str(folder / f"{split}.bin"), dtype=dtype)
        for line in np.array_split(drawn + 4, max(1, tokens // 25)):
            builder.add_item(line)
        builder.finalize(str(folder / f"{split}.idx"))


def model_flags(layers: int, width: int, cutoffs: str, heads: int = 8) -> list[str]:
    """Returns the flags of a model with the shape of `transformer_lm_wiki103`, only smaller."""
    sizes = {
        "--decoder-layers": layers,
        "--decoder-embed-dim": width,
        "--decoder-input-dim": width,
        "--decoder-output-dim": width,
        "--decoder-ffn-embed-dim": 4 * width,
        "--decoder-attention-heads": heads,
        "--adaptive-softmax-cutoff": cutoffs,
        "--adaptive-input-cutoff": cutoffs,
    }
    flags = ["--arch", "transformer_lm_wiki103"]
    for name, value in sizes.items():
        flags += [name, str(value)]
    return flags


RECIPE = (
    "--lr 1.0 --t-mult 2 --lr-period-updates 270 --lr-scheduler cosine --lr-shrink 0.75 "
    "--warmup-updates 16 --warmup-init-lr 1e-07 --stop-min-lr 1e-09 --optimizer nag "
    "--min-lr 0.0001 --clip-norm 0.1 --criterion adaptive_loss"
)


def build_trainer(
    data: Path, model: list[str], *, length: int, tokens: int, recipe: str = RECIPE
) -> Trainer:
    """Builds what fairseq-train builds for these flags.

    Args:
        data: binarized data.
        model: flags of the model.
        length: tokens of a row.
        tokens: of a batch.
        recipe: flags of optimizer, schedule and criterion.
    """
    batch = f"--tokens-per-sample {length} --max-tokens {tokens} --sample-break-mode none"
    device = "" if torch.cuda.is_available() else "--cpu"
    flags = [str(data), "--task", "language_modeling", *model, *recipe.split(), *batch.split()]
    parser = options.get_training_parser()
    args = options.parse_args_and_arch(parser, input_args=[*flags, *device.split()])
    cfg = namespace_to_config(args)
    utils.set_torch_seed(cfg.common.seed)
    task: Any = tasks.setup_task(cfg.task)
    model, criterion = task.build_model(cfg.model), task.build_criterion(cfg.criterion)
    trainer = Trainer(cfg, task, model, criterion)
    utils.freeze_garbage()  # as fairseq-train does
    return trainer


def first_batch(trainer: Trainer, length: int) -> dict[str, Any]:
    """Returns the first training batch whose rows are all full."""
    epoch = trainer.get_train_iterator(epoch=1).next_epoch_itr(shuffle=False)
    for batch in epoch:
        if bool((batch["net_input"]["src_lengths"] == length).all()):
            chosen: dict[str, Any] = batch
            return chosen
    raise SystemExit(f"the data have no full batch of rows of {length} tokens")


def seconds_of(forms: dict[str, Callable[[], object]], runs: int) -> dict[str, float]:
    """Measures functions in turn; returns the median of each, after one run that is not counted.

    Args:
        forms: what is compared.
        runs: runs of each.
    """
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for run in range(runs + 1):
        for name, function in forms.items():
            began = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if run:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def ratio(seconds: dict[str, float], baseline: str, ours: str) -> float:
    """Returns how many times as fast `ours` is."""
    return seconds[baseline] / seconds[ours]


def report(bench: str, rows: list[dict[str, Any]]) -> None:
    """Prints rows as a table, and as one line of JSON."""
    for row in rows:
        shown = {k: f"{v:,.3g}" if isinstance(v, float) else str(v) for k, v in row.items()}
        print("  ".join(f"{name} {value}" for name, value in shown.items()))
    threads = torch.get_num_threads()
    print(
        json.dumps({"bench": bench, "torch": torch.__version__, "threads": threads, "rows": rows})
    )
