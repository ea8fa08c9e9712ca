"""Tensor parallelism: every process has the same rows and a part of the heads, channels and words.

    torchrun --nproc-per-node 2 examples/parallel/tensor.py     # trains, cut in place
    python examples/parallel/tensor.py                          # starts two processes by itself

In a training run it is `fairseq-train --tensor-parallel-size 2`.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from tiny import loss_of, rows, tiny_model

from fairseq.model_parallel.parallelize import parallelize


def under_torchrun() -> None:
    dist.init_process_group("gloo")
    model = tiny_model()
    with parallelize(model) as handle:
        for device, size in handle.memory_allocated().items():
            print(f"{device} holds {size} of weights")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
        for step in range(5):
            loss = loss_of(model, rows(step))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if dist.get_rank() == 0:
                print(f"step {step}: loss {loss.item():.5f}")
    # The model is whole again on every process.
    dist.barrier()
    dist.destroy_process_group()


def in_a_plain_script() -> None:
    model = tiny_model().eval()
    tokens = rows(0)[:, :-1]
    with torch.no_grad():
        alone = model(tokens)[0]
        with parallelize(model, num_gpus=2):
            shared = model(tokens)[0]
            print(model.memory_allocated())
    print(f"largest difference of the logits: {(alone - shared).abs().max().item():.1e}")


if __name__ == "__main__":
    under_torchrun() if "RANK" in os.environ else in_a_plain_script()
