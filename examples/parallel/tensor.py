"""Tensor parallelism: every process has the same rows and a part of the heads, channels and words.

    torchrun --nproc-per-node 2 examples/parallel/tensor.py     # cut in place
    python examples/parallel/tensor.py                          # starts two processes by itself

The loop is the same. In a training run it is `fairseq-train --tensor-parallel-size 2`.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from tiny import loss_of, rows, tiny_model

from fairseq.model_parallel.parallelize import parallelize


def main() -> None:
    rank = int(os.environ.get("RANK", 0))
    model = tiny_model()
    with parallelize(model, num_gpus=2) as handle:
        for device, size in handle.memory_allocated().items():
            print(f"{device} holds {size} of weights")
        optimizer = handle.optimizer(torch.optim.AdamW, lr=1e-3)
        for step in range(5):
            loss = loss_of(model, rows(step))
            optimizer.zero_grad()
            loss.backward()
            norm = handle.clip_grad_norm_(1.0)
            optimizer.step()
            if rank == 0:
                print(
                    f"step {step}: loss {loss.item():.5f}, norm of the gradient {norm.item():.4f}"
                )
    # The model is whole again.
    with torch.no_grad():
        loss = loss_of(model, rows(5))
    if rank == 0:
        print(f"in one process: loss {loss.item():.5f}")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
