"""Copies of a model on several workers, and how their gradients become one.

All three ways leave the *mean* over the workers in the gradients; the trainer multiplies by the
number of workers and divides by the number of tokens.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fairseq.distributed.legacy_ddp import LegacyDistributedDataParallel

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["DistributedFairseqModel", "TorchDistributedDataParallel", "is_fully_sharded"]


def is_fully_sharded(cfg_distributed: Any) -> bool:
    """Tells whether the configuration asks for parameters cut over the workers."""
    return cfg_distributed.ddp_backend == "fully_sharded"


class TorchDistributedDataParallel(DistributedDataParallel):
    """torch's DDP that also hands on the attributes of the model it wraps."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


def DistributedFairseqModel(
    cfg_distributed: Any,
    model: nn.Module,
    process_group: ProcessGroup | None,
    device: torch.device,
    **fsdp_options: Any,
) -> nn.Module:
    """Prepares a model for training on several workers as `--ddp-backend` says.

    Args:
        cfg_distributed: section `distributed_training`.
        model: the same on every worker, on its device.
        process_group: the workers that share the data.
        device: device of the model.
        **fsdp_options: further arguments of `shard_model` (fully_sharded only).

    Returns:
        A wrapper that has `no_sync()` and the attributes of `model`; with `fully_sharded` the
        model itself, changed in place.

    Raises:
        ValueError: the backend is unknown or not provided.
    """
    backend = cfg_distributed.ddp_backend
    if backend in ("legacy_ddp", "no_c10d"):
        return LegacyDistributedDataParallel(model, process_group)
    if backend in ("c10d", "pytorch_ddp"):
        return _torch_ddp(cfg_distributed, model, process_group, device)
    if backend == "fully_sharded":
        # Imported here because it takes a second, which every command would wait for.
        from fairseq.distributed.fsdp import shard_model

        return shard_model(
            model,
            process_group,
            device,
            reshard_after_forward=not cfg_distributed.no_reshard_after_forward,
            reduce_in_fp32=cfg_distributed.fp32_reduce_scatter,
            cpu_offload=cfg_distributed.cpu_offload,
            **fsdp_options,
        )
    raise ValueError(
        f"--ddp-backend {backend} is not supported; choose legacy_ddp, c10d or fully_sharded"
    )


def _torch_ddp(
    cfg: Any, model: nn.Module, process_group: ProcessGroup | None, device: torch.device
) -> nn.Module:
    with warnings.catch_warnings():
        # Newer versions of torch want another name, which older ones do not have.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        wrapped = TorchDistributedDataParallel(
            model,
            device_ids=[device] if device.type == "cuda" else None,
            broadcast_buffers=cfg.broadcast_buffers,
            bucket_cap_mb=cfg.bucket_cap_mb,
            process_group=process_group,
            find_unused_parameters=cfg.find_unused_parameters,
            gradient_as_bucket_view=cfg.gradient_as_bucket_view,
        )
    if cfg.ddp_comm_hook == "fp16":
        from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

        wrapped.register_comm_hook(process_group, default_hooks.fp16_compress_hook)
    return wrapped
