#!/usr/bin/env python3
"""Measures memory and time of a training step for 1, 2 and 4 processes of this machine.

    python scripts/bench_parallel.py [--width 512 --layers 8 --tokens 256]

Prints a table: the weights of each process, its largest resident memory, and the time of an update
of the same four rows, whoever computes them.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from fairseq.data import Dictionary
from fairseq.distributed.data_parallel import DistributedFairseqModel
from fairseq.distributed.fsdp import shard_model
from fairseq.distributed.groups import set_mesh
from fairseq.distributed.vocabulary_scores import ScoresInParts, scores_in_parts
from fairseq.model_parallel.mesh import build_mesh
from fairseq.model_parallel.tensor_parallel import apply_tensor_parallel
from fairseq.model_parallel.worker import memory_of
from fairseq.models.transformer_lm import TransformerLanguageModel

LAYOUTS = [
    ("one process", 1, 1, "ddp"),
    ("ddp", 2, 1, "ddp"),
    ("fsdp2", 2, 1, "fsdp2"),
    ("tp", 2, 2, "ddp"),
    ("ddp", 4, 1, "ddp"),
    ("fsdp2", 4, 1, "fsdp2"),
    ("tp", 4, 4, "ddp"),
    ("tp 2 x fsdp2 2", 4, 2, "fsdp2"),
]


def build(options: argparse.Namespace) -> Any:
    dictionary = Dictionary()
    for number in range(options.words):
        dictionary.add_symbol(f"word{number}")
    task = SimpleNamespace(source_dictionary=dictionary, target_dictionary=dictionary)
    width = options.width
    settings = argparse.Namespace(
        decoder_layers=options.layers,
        decoder_embed_dim=width,
        decoder_input_dim=width,
        decoder_output_dim=width,
        decoder_ffn_embed_dim=4 * width,
        decoder_attention_heads=8,
        share_decoder_input_output_embed=True,
        no_token_positional_embeddings=True,
        tokens_per_sample=options.tokens,
        dropout=0.0,
    )
    torch.manual_seed(0)
    return TransformerLanguageModel.build_model(settings, task)


def work(rank: int, layout: Any, options: argparse.Namespace, folder: str) -> None:
    """Takes updates in one layout; rank 0 writes what it measured."""
    _, world_size, tensor_parallel, kind = layout
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
    )
    mesh = build_mesh(world_size, tensor_parallel_size=tensor_parallel)
    set_mesh(mesh)
    model = build(options)
    if tensor_parallel > 1:
        apply_tensor_parallel(model, mesh.submesh("tp"))
    wrapped = model
    if mesh.size("dp") > 1 and kind == "fsdp2":
        wrapped = shard_model(model, mesh.group("dp"), torch.device("cpu"))
    elif mesh.size("dp") > 1:
        cfg = SimpleNamespace(ddp_backend="legacy_ddp")
        wrapped = DistributedFairseqModel(cfg, model, mesh.group("dp"), torch.device("cpu"))
    weights = memory_of(model, rank)[f"cpu:{rank}"]["allocated"]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, foreach=False)
    tokens = torch.arange(4 * (options.tokens + 1)).view(4, -1) % options.words + 4
    own = tokens[mesh.rank("dp") :: mesh.size("dp")]
    seconds = []
    for _ in range(options.updates + 1):
        dist.barrier()
        start = time.perf_counter()
        loss_of(wrapped, own, options.gather_scores).backward()
        if hasattr(wrapped, "all_reduce_grads"):
            wrapped.all_reduce_grads()
        optimizer.step()
        optimizer.zero_grad()
        dist.barrier()
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    torch.save((weights, peak, min(seconds[1:])), Path(folder) / f"{rank}.pt")
    dist.barrier()
    os._exit(0)


def loss_of(model: Any, tokens: torch.Tensor, gather_scores: bool) -> torch.Tensor:
    with contextlib.nullcontext() if gather_scores else scores_in_parts():
        scores = model(tokens[:, :-1])[0]
    if isinstance(scores, ScoresInParts):
        return -scores.log_probs(tokens[:, 1:])[0].mean()
    return F.cross_entropy(scores.flatten(0, 1), tokens[:, 1:].flatten())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=256, help="tokens of each of the four rows")
    parser.add_argument("--words", type=int, default=10000)
    parser.add_argument("--only", help="one of the layouts, such as tp")
    parser.add_argument(
        "--gather-scores", action="store_true", help="compute losses under tp from whole scores"
    )
    parser.add_argument("--updates", type=int, default=3, help="the fastest counts")
    options = parser.parse_args()
    multiprocessing.set_forkserver_preload(["__main__"])
    print("| layout | processes | weights of each, MiB | peak of each, MiB | update, s |")
    print("|---|---|---|---|---|")
    for layout in [each for each in LAYOUTS if options.only in (None, each[0])]:
        with tempfile.TemporaryDirectory() as folder:
            arguments = (layout, options, folder)
            mp.start_processes(work, arguments, nprocs=layout[1], start_method="forkserver")
            weights, peak, seconds = torch.load(Path(folder) / "0.pt")
        print(
            f"| {layout[0]} | {layout[1]} | {weights / 2**20:.1f} | {peak / 2**20:.0f} "
            f"| {seconds:.2f} |"
        )
        sys.stdout.flush()


if __name__ == "__main__":
    main()
