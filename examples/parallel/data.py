"""Data parallelism: every process has other rows, and copies or shards of all weights.

    torchrun --nproc-per-node 2 examples/parallel/data.py

In a training run it is `fairseq-train --data-parallel ddp` or `fsdp2`.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from tiny import loss_of, meet_others, rows, tiny_model
from torch.nn.parallel import DistributedDataParallel

from fairseq.distributed.fsdp import shard_model


def main() -> None:
    meet_others(2)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for name in ("ddp", "fsdp2"):
        if name == "ddp":
            model = DistributedDataParallel(tiny_model())
        else:
            model = shard_model(tiny_model(), None, torch.device("cpu"))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for step in range(5):
            loss = loss_of(model, rows(step)[rank::world_size])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            mean = loss.detach() / world_size
            dist.all_reduce(mean)
            if rank == 0:
                print(f"{name} step {step}: loss {mean.item():.5f}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
