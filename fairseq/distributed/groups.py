"""Who takes part: ranks, world sizes and process groups.

A group is a `torch.distributed.ProcessGroup`; None stands for a process on its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch.distributed as dist

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "get_data_parallel_group",
    "get_data_parallel_rank",
    "get_data_parallel_world_size",
    "get_global_group",
    "get_gradient_group",
    "get_mesh",
    "get_rank",
    "get_world_size",
    "is_initialized",
    "is_master",
    "set_data_parallel_group",
    "set_mesh",
]


class Mesh(Protocol):
    """What is asked of a grid of processes; `fairseq.model_parallel.mesh.ParallelMesh` is one."""

    def group(self, *axes: str) -> ProcessGroup | None:
        """Returns the processes along an axis (dp, sp, tp), or along dp and sp together."""


_mesh: Any = None
_data_parallel_group: ProcessGroup | None = None


def is_initialized() -> bool:
    """Tells whether this process is one of several that `torch.distributed` connects."""
    return dist.is_available() and dist.is_initialized()


def get_global_group() -> ProcessGroup | None:
    """Returns the group of all processes, None if there is only this one."""
    return dist.group.WORLD if is_initialized() else None


def set_data_parallel_group(group: ProcessGroup | None) -> None:
    """Makes `group` the one that shares the data; None makes it all processes again."""
    global _data_parallel_group
    _data_parallel_group = group


def set_mesh(mesh: Mesh | None) -> None:
    """Makes `mesh` the grid of this run; None makes all processes data parallel again."""
    global _mesh
    _mesh = mesh


def get_mesh() -> Any:
    """Returns the grid of this run (a `ParallelMesh`), None if all processes are data parallel."""
    return _mesh


def get_gradient_group() -> ProcessGroup | None:
    """Returns the group whose gradients and counts of tokens are summed.

    Its members see other batches, or other parts of the sequences of a batch.
    """
    return get_data_parallel_group() if _mesh is None else _mesh.group("dp", "sp")


def get_data_parallel_group() -> ProcessGroup | None:
    """Returns the group whose members train on different batches."""
    if _mesh is not None:
        return _mesh.group("dp")
    if _data_parallel_group is not None and is_initialized():
        return _data_parallel_group
    return get_global_group()


def get_rank(group: ProcessGroup | None) -> int:
    """Returns this process's rank within a group, 0 without a group."""
    return dist.get_rank(group) if group is not None else 0


def get_world_size(group: ProcessGroup | None) -> int:
    """Returns the number of processes in a group, 1 without a group."""
    return dist.get_world_size(group) if group is not None else 1


def get_data_parallel_rank() -> int:
    """Returns which of the shards of the data is this process's, from 0."""
    return get_rank(get_data_parallel_group())


def get_data_parallel_world_size() -> int:
    """Returns into how many shards the data is cut."""
    return get_world_size(get_data_parallel_group())


def is_master(cfg_distributed: Any) -> bool:
    """Tells whether this process is the one that logs and writes files."""
    return int(cfg_distributed.distributed_rank or 0) == 0
