"""From the settings of a run to its mesh."""

from __future__ import annotations

from typing import Any

import torch

from fairseq.distributed import utils as distributed_utils
from fairseq.model_parallel.mesh import build_mesh, data_parallel_size

__all__ = ["set_up_mesh", "settle_data_parallel"]


def set_up_mesh(cfg: Any) -> None:
    """Makes the mesh of this run and tells `fairseq.distributed.groups` of it.

    Args:
        cfg: whole configuration; `--data-parallel` is turned into a `--ddp-backend`.

    Raises:
        ValueError: the sizes do not fit the number of processes, or flags contradict each other.
    """
    distributed = cfg.distributed_training
    distributed_utils.set_mesh(None)
    world_size = distributed_utils.get_world_size(distributed_utils.get_global_group())
    sizes = {
        "tensor_parallel_size": distributed.tensor_parallel_size,
        "sequence_parallel_size": distributed.sequence_parallel_size,
    }
    data_parallel_size(world_size, **sizes)
    settle_data_parallel(cfg)
    if max(sizes.values()) > 1:
        on_cuda = torch.cuda.is_available() and not cfg.common.cpu
        device_type = "cuda" if on_cuda else "cpu"
        distributed_utils.set_mesh(build_mesh(world_size, device_type=device_type, **sizes))


def settle_data_parallel(cfg: Any) -> None:
    """Brings `--data-parallel` and `--ddp-backend` together.

    torch's DDP takes neither weights that are cut over a mesh, nor parameters without a gradient,
    which the tails of an adaptive softmax sometimes are. There `ddp` reduces after the backward
    pass, as `--ddp-backend legacy_ddp` does.

    Raises:
        ValueError: they contradict each other, or a backend cannot do what is asked.
    """
    distributed = cfg.distributed_training
    backend, wanted = distributed.ddp_backend, distributed.data_parallel
    is_cut = distributed.tensor_parallel_size > 1
    if wanted == "fsdp2":
        # A preset or the default may name another backend, so that is no contradiction.
        distributed.ddp_backend = "fully_sharded"
    elif wanted == "ddp":
        if backend == "fully_sharded":
            raise ValueError(
                "--data-parallel ddp contradicts --ddp-backend fully_sharded; leave one of them out"
            )
        if is_cut or _has_rare_gradients(cfg):
            distributed.ddp_backend = "legacy_ddp"
    elif is_cut and backend in ("c10d", "pytorch_ddp"):
        distributed.ddp_backend = "legacy_ddp"
    criterion = getattr(cfg, "criterion", None)
    if criterion is not None and hasattr(
        criterion, "ddp_backend"
    ):  # a copy, made when the command line was read
        criterion.ddp_backend = distributed.ddp_backend


def _has_rare_gradients(cfg: Any) -> bool:
    return getattr(cfg.model, "adaptive_softmax_cutoff", None) is not None
