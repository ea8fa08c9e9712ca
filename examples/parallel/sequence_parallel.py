"""Sequence parallelism: every process has a part of each row, and a copy of all weights.

    torchrun --nproc-per-node 2 examples/parallel/sequence_parallel.py

In a training run it is `fairseq-train --sequence-parallel-size 2`.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tiny import meet_others, rows, tiny_model

from fairseq.model_parallel.sequence_parallel import SequenceParallelContextManager


def main() -> None:
    meet_others(2)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for scheme in ("allgather", "ring", "ulysses"):
        model = tiny_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        with SequenceParallelContextManager(
            model, world_size, ring_attn_func=scheme, layout="zigzag"
        ) as sequence:
            for step in range(5):
                tokens = rows(step)
                batch = {"net_input": {"src_tokens": tokens[:, :-1]}, "target": tokens[:, 1:]}
                part = sequence.cut(batch)  # this process's columns, with their targets
                logits = model(**part["net_input"])[0].flatten(0, 1)
                # A sum over this process's targets, divided by the number of all.
                loss = F.cross_entropy(logits, part["target"].flatten(), reduction="sum")
                loss = loss / batch["target"].numel()
                optimizer.zero_grad()
                loss.backward()
                for param in model.parameters():
                    dist.all_reduce(param.grad)  # the loss is the sum over the processes
                optimizer.step()
                whole = sequence.total(loss.detach())
                if rank == 0:
                    print(f"{scheme} step {step}: loss {whole.item():.5f}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
