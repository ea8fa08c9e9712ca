"""What started processes do in the tests; they import it by name.

Each function writes what it found to `<folder>/<name>.<rank>.pt`.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.fsdp
from torch import nn

import fairseq_cli.train  # noqa: F401  loaded once, for all the processes that are started
from fairseq.distributed import utils as distributed_utils
from fairseq.distributed.data_parallel import DistributedFairseqModel
from fairseq.distributed.statistics import StatisticsSum, check_gradient_norms
from fairseq.optim.grad_norm import clip_grad_norm_


def settings(world_size: int, **changes: Any) -> SimpleNamespace:
    """Returns a configuration for processes on this machine's CPU."""
    distributed = {
        "distributed_world_size": world_size,
        "distributed_rank": 0,
        "distributed_backend": "nccl",
        "distributed_init_method": None,
        "distributed_port": -1,
        "device_id": 0,
        "distributed_no_spawn": False,
        "distributed_num_procs": 0,
        "nprocs_per_node": 1,
        "ddp_backend": "legacy_ddp",
        "bucket_cap_mb": 25,
        "broadcast_buffers": False,
        "find_unused_parameters": False,
        "gradient_as_bucket_view": False,
        "ddp_comm_hook": "none",
        "no_reshard_after_forward": False,
        "fp32_reduce_scatter": False,
        "cpu_offload": False,
    }
    return SimpleNamespace(
        common=SimpleNamespace(cpu=True, user_dir=None),
        distributed_training=SimpleNamespace(**{**distributed, **changes}),
    )


def _keep(folder: str, name: str, found: Any) -> None:
    torch.save(found, Path(folder) / f"{name}.{dist.get_rank()}.pt")


def collectives(cfg: Any, folder: str) -> None:
    """Every kind of exchange once."""
    group = distributed_utils.get_data_parallel_group()
    rank = distributed_utils.get_data_parallel_rank()
    reduced = distributed_utils.all_reduce(torch.tensor([1.0 + rank]), group, op="max")
    summed = distributed_utils.all_reduce_dict(
        {"loss": torch.tensor([0.1 + rank]), "count": 3 + rank}, "cpu", group
    )
    gathered = distributed_utils.all_gather_list({"rank": rank, "text": "x" * rank}, group)
    try:
        distributed_utils.all_gather_list("x" * 100, group, max_size=50)
        refused = ""
    except ValueError as error:
        refused = str(error)
    sent = {"weights": torch.arange(5.0), "note": "from 1"} if rank == 1 else None
    received = distributed_utils.broadcast_object(sent, 1, group)
    # The second worker has no batch of its own.
    outputs = [{"loss": 2.5, "ntokens": 4}, {"loss": 1.0, "ntokens": 2}] if rank == 0 else []
    by_sum = StatisticsSum(group, torch.device("cpu"), summable=True, max_size=1000)
    by_sum.expect_keys({"loss": 0.0, "ntokens": 0})
    by_list = StatisticsSum(group, torch.device("cpu"), summable=False, max_size=1000)
    check_gradient_norms(torch.tensor(3.0), group)
    try:
        check_gradient_norms(torch.tensor(3.0 + 0.25 * rank), group)
        inconsistent = ""
    except FloatingPointError as error:
        inconsistent = str(error)
    _keep(
        folder,
        "collectives",
        {
            "world_size": distributed_utils.get_data_parallel_world_size(),
            "rank": rank,
            "reduced": reduced.item(),
            "summed": dict(summed),
            "gathered": gathered,
            "refused": refused,
            "received": received,
            "by_sum": by_sum(outputs, {"size": 6.0 * (rank == 0)}),
            "by_list": by_list(outputs, {"size": 6.0 * (rank == 0)}),
            "inconsistent": inconsistent,
        },
    )


class Toy(nn.Module):
    """Layers, a tied weight, and a tail that only some batches use."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.embed = nn.Linear(6, 8, bias=False)
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])
        self.tail = nn.Linear(8, 3)
        for param in self.parameters():
            param.data = torch.randn(param.shape, generator=generator) * 0.3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


def toy_loss(model: nn.Module, x: torch.Tensor, use_tail: bool) -> torch.Tensor:
    """Uses weights outside `forward`, as the adaptive softmax does."""
    features = model(x)
    loss = (features @ model.embed.weight).pow(2).sum()
    return loss + model.tail(features).sum() if use_tail else loss


def toy_batches() -> list[tuple[torch.Tensor, bool]]:
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(2 + i, 6, generator=generator), i == 1) for i in range(4)]


def toy_steps(cfg: Any, folder: str, name: str) -> None:
    """Two accumulated batches on each worker, clipped, and one step of plain SGD, twice."""
    backend = cfg.distributed_training.ddp_backend
    group = distributed_utils.get_data_parallel_group()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    model = Toy()
    wrapped = DistributedFairseqModel(cfg.distributed_training, model, group, torch.device("cpu"))
    params = [p for p in wrapped.parameters() if p.requires_grad]
    norms = []
    for _ in range(2):
        for param in params:
            param.grad = None
        own = toy_batches()[rank::world_size]
        for i, (x, use_tail) in enumerate(own):
            has_no_sync = hasattr(wrapped, "no_sync") and i < len(own) - 1
            if has_no_sync:
                with wrapped.no_sync():
                    toy_loss(wrapped, x, use_tail).backward()
            else:
                toy_loss(wrapped, x, use_tail).backward()
        if hasattr(wrapped, "all_reduce_grads"):
            wrapped.all_reduce_grads()
        torch._foreach_mul_([p.grad for p in params if p.grad is not None], world_size)
        norms.append(_clip(params, backend, group))
        with torch.no_grad():
            for param in params:
                if param.grad is not None:
                    param.sub_(0.1 * param.grad)
    _keep(folder, name, {"norms": norms, "weights": _whole(model)})


def _clip(params: list[nn.Parameter], backend: str, group: Any) -> float:
    aggregate = None
    if backend == "fully_sharded":
        from fairseq.distributed.fsdp import local_grad_norm_aggregator

        aggregate = local_grad_norm_aggregator([group], torch.device("cpu"))
    return float(clip_grad_norm_(params, 1.0, aggregate))


def _whole(model: nn.Module) -> dict[str, torch.Tensor]:
    from fairseq.distributed.fsdp import gather_whole

    return gather_whole({k: v.detach() for k, v in model.state_dict().items()})


def reload_sharded(cfg: Any, folder: str) -> None:
    """A whole state dict goes into a sharded model and comes out again, Adam's state too."""
    from fairseq.distributed.fsdp import gather_whole, is_sharded, shard_optimizer_state

    group = distributed_utils.get_data_parallel_group()
    model = Toy()
    wanted = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    device = torch.device("cpu")
    sharded = DistributedFairseqModel(cfg.distributed_training, model, group, device)
    sharded.load_state_dict(wanted)
    adam = torch.optim.Adam(sharded.parameters())
    for param in sharded.parameters():
        param.grad = torch.ones_like(param)
    adam.step()
    state = gather_whole(adam.state_dict())
    again = torch.optim.Adam(sharded.parameters())
    again.load_state_dict(shard_optimizer_state(state, list(sharded.parameters())))
    _keep(
        folder,
        "reload",
        {
            "is_sharded": is_sharded(sharded),
            "wanted": wanted,
            "got": _whole(sharded),
            "adam": state,
            "adam_again": gather_whole(again.state_dict()),
        },
    )


BACKENDS: dict[str, dict[str, Any]] = {
    "legacy_ddp": {"ddp_backend": "legacy_ddp"},
    "fully_sharded": {"ddp_backend": "fully_sharded"},
    "fully_sharded_kept": {
        "ddp_backend": "fully_sharded",
        "no_reshard_after_forward": True,
        "fp32_reduce_scatter": True,
    },
}


def everything(cfg: Any, folder: str) -> None:
    """All of the above in one start of processes."""
    collectives(cfg, folder)
    for name, changes in BACKENDS.items():
        vars(cfg.distributed_training).update(changes)
        toy_steps(cfg, folder, name)
    reload_sharded(cfg, folder)


def fails_on_rank_one(cfg: Any) -> None:
    """Rank 1 raises; rank 0 waits for it."""
    if dist.get_rank() == 1:
        raise ValueError("this file is not here")
    dist.barrier()


def is_killed_on_rank_one(cfg: Any) -> None:
    """Rank 1 is killed; rank 0 waits for it."""
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()
    time.sleep(60)


def presses_ctrl_c(cfg: Any) -> None:
    """What takes no notice of it returns."""
    os.kill(os.getpid(), signal.SIGINT)


def sleeps(cfg: Any) -> None:
    """Tells its process id and waits for a long time."""
    # In one piece: several tell theirs to the same pipe, and print writes the end of a line apart.
    os.write(1, f"{os.getpid()}\n".encode())
    time.sleep(600)


def divides_by_zero(cfg: Any) -> float:
    """A defect, as opposed to what a user causes."""
    return 1 / 0
