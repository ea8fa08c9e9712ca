"""fairseq-eval-lm and fairseq-validate on sequences that several processes share."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch.distributed as dist

from fairseq import options
from fairseq.dataclass.legacy import namespace_to_config
from fairseq.distributed import utils as distributed_utils
from fairseq_cli import eval_lm, validate

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "invented"
GPT = f"{GOLDEN}/bin/main --path {GOLDEN}/ckpt/gpt_tiny/checkpoint_last.pt --cpu --num-workers 0"
WIKI = GPT.replace("gpt_tiny", "wiki103_tiny")
BLOCKS = "--gen-subset valid --max-tokens 512"

EVALUATIONS = {
    "gpt_tiny_valid_l64_c0": f"{GPT} {BLOCKS} --tokens-per-sample 64",
    "gpt_tiny_valid_l64_c32": f"{GPT} {BLOCKS} --tokens-per-sample 64 --context-window 32",
    "wiki103_tiny_valid_l64_c0": f"{WIKI} {BLOCKS} --tokens-per-sample 64 --softmax-batch 100",
}
"""By the name under which the golden data has the loss."""
# Blocks of 64 and a last one of 33: odd lengths, for every number of processes.
VALIDATIONS = {
    "gpt_tiny": f"{GPT} --valid-subset valid --max-tokens 512",
    "wiki103_tiny": f"{WIKI} --valid-subset valid --max-tokens 512",
}


def evaluation_cases() -> dict[str, dict[str, float]]:
    """Losses in bits of all, with each scheme; in half of the cases two groups share the data."""
    size = dist.get_world_size()
    level = logging.getLogger().level
    found: dict[str, dict[str, float]] = {}
    try:
        for scheme, layout in (
            ("allgather", "contiguous"),
            ("ring", "zigzag"),
            ("ulysses", "zigzag"),
        ):
            if scheme == "ulysses" and size == 4:
                continue  # the models have 6 heads
            flags = f"--sequence-parallel-size {size} --sequence-parallel-attention {scheme}"
            flags += f" --sequence-parallel-layout {layout}"
            for name, command in EVALUATIONS.items():
                cfg = _config(options.get_eval_lm_parser(), f"{command} {flags}")
                scored: list[int] = []
                result = eval_lm.main(
                    cfg, on_scores=lambda _, s, to=scored: to.append(len(s.values))
                )
                found[f"{name} {scheme}"] = {"loss": result["loss"], "tokens": sum(scored)}
        for shared in {2, size}:
            for name, loss in validated(f"--sequence-parallel-size {shared}").items():
                found[f"{name} validate {shared}"] = {"loss": loss}
    finally:
        logging.getLogger().setLevel(level)
    return found


def validated(flags: str = "") -> dict[str, float]:
    """Returns the losses of fairseq-validate in the processes there are."""
    losses = {}
    for name, command in VALIDATIONS.items():
        line = f"{command} {flags}"
        parser = options.get_validation_parser
        given = options.parse_args_and_arch(parser(), line.split(), suppress_defaults=True)
        (stats,) = validate.main(_config(parser(), line), given)
        losses[name] = float(stats["loss"])
    return losses


def refusal() -> str:
    """Returns what eval-lm says of weights that are to be cut."""
    cfg = _config(
        options.get_eval_lm_parser(),
        f"{EVALUATIONS['gpt_tiny_valid_l64_c0']} --tensor-parallel-size 2",
    )
    try:
        eval_lm.main(cfg)
    except ValueError as error:
        return str(error)
    return ""


def _config(parser: Any, command: str) -> Any:
    cfg = namespace_to_config(options.parse_args_and_arch(parser, command.split()))
    group = distributed_utils.get_global_group()
    cfg.distributed_training.distributed_world_size = distributed_utils.get_world_size(group)
    cfg.distributed_training.distributed_rank = distributed_utils.get_rank(group)
    return cfg
