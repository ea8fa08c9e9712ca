"""Measures memory and time of one training step on a long sequence, over 1, 2 and 4 processes.

    python scripts/bench_sequence_parallel.py --lengths 2048 4096 8192

Each row of the table is a start of processes on this machine that talk over gloo. Memory is what
the largest process holds at its peak beyond what it held before the first step (resident, `VmHWM`
of /proc/self/status); time is the fastest of the steps, of which one goes before. Processes share
the cores of this machine, so times show the cost of the exchanges, not a speed-up.

The C library is told to give freed blocks of 256 KiB and more back to the system. By default it
keeps blocks of up to 32 MiB for later, so that the figure would show what a process held on to,
and hardly what it needed.
"""

from __future__ import annotations

import argparse
import os
import socket
import time
from argparse import Namespace
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from fairseq.data import Dictionary
from fairseq.model_parallel.sequence_parallel import SequenceParallelContextManager
from fairseq.models.transformer_lm import TransformerLanguageModel

MIB = 1 << 20


def main() -> None:
    """Measures, and prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096], help="of the one row")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--steps", type=int, default=2, help="steps after the first one")
    parser.add_argument("--layout", default="zigzag", choices=["contiguous", "zigzag"])
    parser.add_argument("--schemes", nargs="+", default=["allgather", "ring", "ulysses"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[1, 2, 4])
    args = parser.parse_args()
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 18)  # for the processes that are started
    print("| tokens | processes | attention | peak memory of a process, MiB | of one | step, s |")
    print("|---|---|---|---|---|---|")
    for length in args.lengths:
        args.length = length
        alone = None
        for size in args.sizes:
            for scheme in args.schemes if size > 1 else ["-"]:
                memory, seconds = measure(size, scheme, args)
                alone = memory if size == 1 else alone
                share = "-" if alone is None else f"{memory / alone:.2f}"
                cells = (length, size, scheme, f"{memory / MIB:.0f}", share, f"{seconds:.1f}")
                print("| " + " | ".join(str(each) for each in cells) + " |", flush=True)


def measure(size: int, scheme: str, args: argparse.Namespace) -> tuple[float, float]:
    """Starts processes; returns the largest memory of one in bytes, and the seconds of a step."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    queue = mp.get_context("spawn").SimpleQueue()
    mp.spawn(work, (size, scheme, port, args, queue), nprocs=size)
    return queue.get()


def work(rank: int, size: int, scheme: str, port: int, args: Namespace, queue: object) -> None:
    """Trains in one of the processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://localhost:{port}", world_size=size, rank=rank)
    model = build_model(args)
    tokens = torch.randint(4, 100, (1, args.length + 1), generator=torch.Generator().manual_seed(1))
    batch = {"net_input": {"src_tokens": tokens[:, :-1]}, "target": tokens[:, 1:]}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = resident("VmRSS")
    times = []
    scheme = "allgather" if size == 1 else scheme
    with SequenceParallelContextManager(
        model, size, ring_attn_func=scheme, layout=args.layout
    ) as sequence:
        part = sequence.cut(batch)
        for _ in range(args.steps + 1):
            start = time.perf_counter()
            train(model, part, optimizer, args.length)
            times.append(time.perf_counter() - start)
    found = torch.tensor([float(resident("VmHWM") - before), min(times[1:])])
    dist.all_reduce(found, dist.ReduceOp.MAX)
    if rank == 0:
        queue.put(tuple(found.tolist()))
    dist.barrier()
    os._exit(0)


def train(model: torch.nn.Module, part: dict, optimizer: torch.optim.Optimizer, total: int) -> None:
    """Does one step on this process's part of the row."""
    logits = model(**part["net_input"])[0].flatten(0, 1)
    loss = F.cross_entropy(logits, part["target"].flatten(), reduction="sum") / total
    optimizer.zero_grad()
    loss.backward()
    for param in model.parameters():
        dist.all_reduce(param.grad)
    optimizer.step()


def build_model(args: Namespace) -> torch.nn.Module:
    """Returns a model with ALiBi, the same in every process."""
    dictionary = Dictionary()
    for number in range(96):
        dictionary.add_symbol(f"word{number}")
    settings = Namespace(
        decoder_layers=args.layers,
        decoder_embed_dim=args.width,
        decoder_input_dim=args.width,
        decoder_output_dim=args.width,
        decoder_ffn_embed_dim=4 * args.width,
        decoder_attention_heads=4,
        decoder_normalize_before=True,
        share_decoder_input_output_embed=True,
        no_token_positional_embeddings=True,
        tokens_per_sample=args.length,
        dropout=0.0,
        attention_dropout=0.0,
    )
    torch.manual_seed(0)
    task = SimpleNamespace(source_dictionary=dictionary, target_dictionary=dictionary)
    return TransformerLanguageModel.build_model(settings, task)


def resident(field: str) -> int:
    """Returns a number of bytes of this process's memory as Linux counts it."""
    with open("/proc/self/status") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


if __name__ == "__main__":
    main()
