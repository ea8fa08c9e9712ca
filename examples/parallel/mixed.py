"""Two axes at once: weights cut over pairs of processes, and again over the pairs' copies.

    torchrun --nproc-per-node 4 examples/parallel/mixed.py

In a training run it is `fairseq-train --tensor-parallel-size 2 --data-parallel fsdp2`.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from tiny import loss_of, meet_others, rows, tiny_model

from fairseq.distributed.fsdp import shard_model
from fairseq.distributed.groups import set_mesh
from fairseq.model_parallel.mesh import build_mesh
from fairseq.model_parallel.tensor_parallel import apply_tensor_parallel


def main() -> None:
    meet_others(4)
    mesh = build_mesh(dist.get_world_size(), tensor_parallel_size=2)
    set_mesh(mesh)
    model = tiny_model()
    apply_tensor_parallel(model, mesh.submesh("tp"))  # first tp, then dp: the order is fixed
    model = shard_model(model, mesh.group("dp"), torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
    for step in range(5):
        loss = loss_of(model, rows(step)[mesh.rank("dp") :: mesh.size("dp")])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach() / mesh.size("dp")
        if mesh.size("dp") > 1:
            dist.all_reduce(mean, group=mesh.group("dp"))
        if dist.get_rank() == 0:
            print(f"step {step}: loss {mean.item():.5f}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
