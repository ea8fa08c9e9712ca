"""From the settings of a run to its mesh."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from fairseq.distributed import utils as distributed_utils
from fairseq.model_parallel.mesh import build_mesh, data_parallel_size

if TYPE_CHECKING:
    from fairseq.model_parallel.sequence_parallel import SequenceParallelContextManager

__all__ = ["refuse_shared_models", "set_up_mesh", "settle_data_parallel", "shared_sequences"]


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


@contextlib.contextmanager
def shared_sequences(
    cfg: Any, models: list[torch.nn.Module]
) -> Iterator[SequenceParallelContextManager | None]:
    """Evaluates on a mesh: while it is open, models compute this process's part of each sequence.

    Args:
        cfg: whole configuration, of a command that evaluates.
        models: on their device.

    Yields:
        What cuts batches; None if every process has sequences of its own.

    Raises:
        ValueError: the sizes do not fit the number of processes, or weights are to be cut too.
    """
    distributed = cfg.distributed_training
    if distributed.tensor_parallel_size > 1:
        raise ValueError(
            f"--tensor-parallel-size {distributed.tensor_parallel_size} is for training; leave it "
            "out to evaluate, with --sequence-parallel-size where a sequence needs too much memory"
        )
    if distributed.sequence_parallel_size == 1:
        yield None
        return
    from fairseq.model_parallel.sequence_parallel import SequenceParallelContextManager

    set_up_mesh(cfg)
    try:
        with SequenceParallelContextManager(
            models,
            ring_attn_func=distributed.sequence_parallel_attention,
            layout=distributed.sequence_parallel_layout,
            device_mesh=distributed_utils.get_mesh().device_mesh,
        ) as sharing:
            yield sharing
    finally:
        distributed_utils.set_mesh(None)


def refuse_shared_models(cfg: Any) -> None:
    """Refuses the sizes of a mesh in commands that generate.

    Raises:
        ValueError: processes are to share weights or sequences.
    """
    distributed = cfg.distributed_training
    for name in ("tensor_parallel_size", "sequence_parallel_size"):
        size = getattr(distributed, name)
        if size > 1:
            raise ValueError(
                f"--{name.replace('_', '-')} {size} does not go with this command, in which every "
                "process has a model of its own; leave it out, or generate with "
                "fairseq.model_parallel.parallelize"
            )


def settle_data_parallel(cfg: Any) -> None:
    """Brings `--data-parallel` and `--ddp-backend` together.

    torch's DDP takes neither weights that are cut over a mesh, nor parameters without a gradient,
    which the tails of an adaptive softmax sometimes are. There `ddp` reduces after the backward
    pass, as `--ddp-backend legacy_ddp` does. Half precision with weights that are cut is that of
    fsdp2, whose parameters are float32 masters; it is chosen unless `ddp` is asked for.

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
    elif is_cut and _is_half(cfg):
        distributed.ddp_backend = "fully_sharded"
    elif is_cut and backend in ("c10d", "pytorch_ddp"):
        distributed.ddp_backend = "legacy_ddp"
    criterion = getattr(cfg, "criterion", None)
    if criterion is not None and hasattr(
        criterion, "ddp_backend"
    ):  # a copy, made when the command line was read
        criterion.ddp_backend = distributed.ddp_backend


def _is_half(cfg: Any) -> bool:
    common = getattr(cfg, "common", None)
    kinds = ("fp16", "bf16", "memory_efficient_fp16", "memory_efficient_bf16")
    return any(getattr(common, kind, False) for kind in kinds)


def _has_rare_gradients(cfg: Any) -> bool:
    return getattr(cfg.model, "adaptive_softmax_cutoff", None) is not None
