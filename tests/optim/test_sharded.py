"""Two workers that each hold half of every tensor take the steps one process takes."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor

from fairseq.optim.adafactor import Adafactor
from fairseq.optim.adam import Adam
from fairseq.optim.adamax import Adamax
from fairseq.optim.grad_norm import clip_grad_norm_
from fairseq.optim.nag import NAG

OPTIMIZERS = [
    lambda params: NAG(params, lr=0.1, momentum=0.9, weight_decay=0.1),
    lambda params: Adam(params, lr=0.1, weight_decay=0.1),
    lambda params: Adamax(params, lr=0.1, weight_decay=0.1),
    lambda params: Adafactor(params, lr=0.1, beta1=0.9, scale_parameter=True),
]


def norm_over_workers(norm):
    square = norm**2
    dist.all_reduce(square)
    return square.sqrt()


def work(rank, init_file):
    dist.init_process_group("gloo", init_method=f"file://{init_file}", rank=rank, world_size=2)
    mesh = dist.init_device_mesh("cpu", (2,))
    for make in OPTIMIZERS:
        torch.manual_seed(0)
        whole = [nn.Parameter(torch.randn(shape)) for shape in [(5, 3), (4,), (3, 2)]]
        cut = [nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])) for p in whole]
        one, two = make(whole), make(cut)
        for _ in range(3):
            for p, q in zip(whole, cut, strict=True):
                p.grad = torch.randn_like(p)
                q.grad = distribute_tensor(p.grad.clone(), mesh, [Shard(0)])
            norm = clip_grad_norm_(whole, 1.0)
            torch.testing.assert_close(clip_grad_norm_(cut, 1.0, norm_over_workers), norm)
            one.step(scale=2.0)
            two.step(scale=2.0)
        for p, q in zip(whole, cut, strict=True):
            torch.testing.assert_close(q.full_tensor(), p.detach())
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch is built without distributed")
def test_sharded_parameters(tmp_path):
    # Forked processes end at once. Spawned ones finalize the interpreter first, and a thread of
    # gloo that still lets go of a tensor by then aborts the process.
    mp.start_processes(work, (str(tmp_path / "init"),), nprocs=2, start_method="forkserver")
