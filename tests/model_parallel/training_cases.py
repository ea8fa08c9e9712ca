"""Training runs inside started processes: all layouts of one number of processes in one start."""

from __future__ import annotations

import json
import logging
import re
import shlex
from pathlib import Path
from typing import Any

import torch._dynamo  # noqa: F401  (every optimizer imports it: once, before a fork)
import torch.distributed as dist
from train_runs import TINY_MODEL, TINY_TRAINING

from fairseq import options
from fairseq.dataclass.legacy import namespace_to_config
from fairseq.distributed import utils as distributed_utils
from fairseq.logging import metrics
from fairseq_cli import train as train_command

PLAIN_MODEL = (
    "--task language_modeling --arch transformer_lm_gpt --decoder-layers 2 --decoder-embed-dim 32 "
    "--decoder-ffn-embed-dim 64 --decoder-attention-heads 4 --share-decoder-input-output-embed "
    "--dropout 0 --attention-dropout 0 --criterion cross_entropy"
)
MODELS = {
    "adaptive": TINY_MODEL,
    "uneven": f"{TINY_MODEL} --adaptive-softmax-cutoff 21,61 --adaptive-input-cutoff 21,61",
    "plain": PLAIN_MODEL,
    "fire": f"{PLAIN_MODEL} --position-method fire",
    "half": f"{PLAIN_MODEL} --bf16 --cpu-half",
}
# 7 batches an epoch: in its last update some of the workers have no batch.
BATCHES = "--tokens-per-sample 13 --max-tokens 52"


def command(data: Path, save_dir: Path, model: str, options: str) -> str:
    return f"{data} {MODELS[model]} {TINY_TRAINING} {BATCHES} --save-dir {save_dir} {options}"


def run(folder: str, name: str, model: str, options_: str) -> dict[str, Any]:
    """Trains in the processes there are; returns the interim lines of rank 0 by update."""
    in_group = dist.is_initialized()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if in_group else (0, 1)
    save_dir = Path(folder) / name
    log = Path(folder) / f"{name}.{world_size}.{rank}.log"
    line = command(Path(folder) / "bin", save_dir, model, f"{options_} --log-file {log}")
    parser = options.get_training_parser()
    cfg = namespace_to_config(options.parse_args_and_arch(parser, shlex.split(line)))
    cfg.distributed_training.distributed_rank = rank
    cfg.distributed_training.distributed_world_size = world_size
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.INFO if rank == 0 else logging.ERROR)
    try:
        train_command.main(cfg)
    finally:
        metrics.reset()
        distributed_utils.set_mesh(None)
        logging.getLogger().setLevel(level)
        for handler in list(logging.getLogger().handlers):
            if isinstance(handler, logging.FileHandler):
                logging.getLogger().removeHandler(handler)
                handler.close()
    return curve(log.read_text())


def curve(log: str) -> dict[int, dict[str, float]]:
    found = re.findall(r"train_inner.*?(\{.*\})", log)
    lines = [{k: float(v) for k, v in json.loads(line).items()} for line in found]
    return {int(line["num_updates"]): line for line in lines}
