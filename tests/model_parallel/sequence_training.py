"""Runs of fairseq-train for the comparison of several processes with one."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

import fairseq_cli.train
from fairseq import options
from fairseq.dataclass.legacy import namespace_to_config
from fairseq.distributed import utils as distributed_utils
from fairseq.trainer import Trainer

DATA = Path(__file__).resolve().parents[1] / "golden" / "invented" / "bin" / "main"
COMMON = """
    --task language_modeling --cpu --seed 3 --optimizer nag --momentum 0.9 --lr 0.25 --clip-norm 0.1
    --lr-scheduler fixed --max-update 3 --no-save --log-format none --disable-validation
    --decoder-layers 2 --decoder-embed-dim 32 --decoder-ffn-embed-dim 64 --decoder-attention-heads 4
    --dropout 0 --attention-dropout 0
"""
PLAIN = "--arch transformer_lm_gpt --share-decoder-input-output-embed --criterion cross_entropy"
ADAPTIVE = """
    --arch transformer_lm_wiki103 --decoder-input-dim 32 --decoder-output-dim 32
    --adaptive-input-cutoff 100,300 --adaptive-softmax-cutoff 100,300 --criterion adaptive_loss
    --adaptive-softmax-dropout 0 --activation-dropout 0 --decoder-layerdrop 0
"""
BLOCKS = "--sample-break-mode none --tokens-per-sample 33 --max-tokens 140"
LINES = "--sample-break-mode eos --tokens-per-sample 40 --max-tokens 140"

MODELS = {
    "blocks": f"{PLAIN} {BLOCKS} --position-method t5",
    "lines": f"{PLAIN} {LINES} --position-method sinusoidal --sentence-avg",
    "adaptive": f"{ADAPTIVE} {BLOCKS} --document-mask line",
}
"""What is trained; one process goes through two batches for an update."""

CASES = {
    2: {
        "blocks": ["--sequence-parallel-size 2 --sequence-parallel-attention ring --update-freq 2"],
        "lines": ["--sequence-parallel-size 2 --ddp-backend c10d --update-freq 2"],
        "adaptive": [
            "--sequence-parallel-size 2 --sequence-parallel-attention ulysses --update-freq 2 "
            "--data-parallel ddp",
            "--sequence-parallel-size 2 --data-parallel fsdp2 --update-freq 2",
        ],
    },
    4: {
        "blocks": [
            "--sequence-parallel-size 4 --sequence-parallel-layout zigzag --update-freq 2",
            "--sequence-parallel-size 2 --tensor-parallel-size 2 --update-freq 2 "
            "--sequence-parallel-attention ulysses",
        ],
        "lines": ["--sequence-parallel-size 2 --sequence-parallel-attention ring"],
        "adaptive": [
            "--sequence-parallel-size 4 --sequence-parallel-attention ring --update-freq 2 "
            "--sequence-parallel-layout zigzag --data-parallel ddp",
            "--sequence-parallel-size 2 --data-parallel fsdp2",
        ],
    },
}
"""For each number of processes, how the models are trained on them."""


def train(flags: str) -> dict[str, Any]:
    """Returns losses and gradient norms of all updates, and the parameters at the end."""
    curve: list[tuple[float, float]] = []
    trainers: list[Trainer] = []
    log = Trainer._log_statistics

    def recording(self: Trainer, outputs: Any, sample_size: float, grad_norm: Any) -> Any:
        trainers[:] = [self]
        loss = sum(float(output["loss"]) for output in outputs) / sample_size
        curve.append((loss, float(grad_norm)))
        return log(self, outputs, sample_size, grad_norm)

    parser = options.get_training_parser()
    args = options.parse_args_and_arch(parser, [str(DATA), *COMMON.split(), *flags.split()])
    cfg = namespace_to_config(args)
    if distributed_utils.is_initialized():
        group = distributed_utils.get_global_group()
        cfg.distributed_training.distributed_world_size = distributed_utils.get_world_size(group)
        cfg.distributed_training.distributed_rank = distributed_utils.get_rank(group)
    Trainer._log_statistics = recording
    level = logging.getLogger().level
    try:
        fairseq_cli.train.main(cfg)
    finally:
        Trainer._log_statistics = log
        logging.getLogger().setLevel(level)
        distributed_utils.set_mesh(None)
    from fairseq.distributed.fsdp import gather_whole

    state = trainers[0].get_model().state_dict()
    whole = {k: v.detach() for k, v in gather_whole(state).items()}
    return {"curve": curve, "weights": whole}


def training_cases(world_size: int) -> dict[str, Any]:
    """Every case of this number of processes, by model and place."""
    return {
        f"{model} {i}": train(f"{MODELS[model]} {flags}")
        for model, runs in CASES[world_size].items()
        for i, flags in enumerate(runs)
    }


def in_one_process() -> dict[str, Any]:
    """Every model, trained as one process does."""
    with torch.random.fork_rng():
        return {model: train(f"{flags} --update-freq 2") for model, flags in MODELS.items()}
