"""The processes of a run as a grid with named axes.

Axes, from the slowest to the fastest changing rank: `dp`, whose members train on other data; `sp`,
whose members hold other parts of the same sequences; `tp`, whose members hold other parts of the
same weights. So the members of a `tp` group are neighbours, which talk most: every layer, against
every layer for `sp` and once an update for `dp`.

What is applied to a model, in this order:

1. tensor parallelism over `tp` (weights become DTensors on that axis),
2. sequence parallelism over `sp` (changes no weight),
3. data parallelism over `dp` and `sp` together: to the weights, the parts of a sequence are further
   data, so their gradients are summed over the group of both.

Ask for a group by its axes: `mesh.group("tp")`, `mesh.group("dp", "sp")`. A group of one process is
None, as everywhere in `fairseq.distributed`. The mesh of a run is kept there: `get_mesh()` is None
where `dp` is the only axis with more than one process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["AXES", "ParallelMesh", "build_mesh", "data_parallel_size"]

AXES = ("dp", "sp", "tp")


class ParallelMesh:
    """Groups and sub-meshes of a grid of processes.

    Args:
        device_mesh: with the axes `AXES`, in that order; all processes must make it together.
    """

    def __init__(self, device_mesh: DeviceMesh) -> None:
        if device_mesh.mesh_dim_names != AXES:
            raise ValueError(
                f"a mesh with the axes {device_mesh.mesh_dim_names} is given; they must be {AXES}"
            )
        self.device_mesh = device_mesh
        # Both axes as one are made here, since every process must take part.
        self._joined = device_mesh["dp", "sp"]._flatten("dp_sp") if self.size("sp") > 1 else None

    def __repr__(self) -> str:
        return "ParallelMesh(" + ", ".join(f"{axis}={self.size(axis)}" for axis in AXES) + ")"

    def submesh(self, *axes: str) -> DeviceMesh:
        """Returns the part of the mesh that this process is in, as one axis.

        Args:
            *axes: one of `AXES`, or "dp", "sp" for both as one axis.

        Raises:
            ValueError: no such axis, or another combination.
        """
        if len(axes) == 1 and axes[0] in AXES:
            return self.device_mesh[axes[0]]
        if axes == ("dp", "sp"):
            return self.device_mesh["dp"] if self._joined is None else self._joined
        raise ValueError(f"there is no axis {axes}; ask for one of {AXES}, or for dp and sp")

    def size(self, *axes: str) -> int:
        """Returns the number of processes along one axis, or along dp and sp together."""
        if axes == ("dp", "sp"):
            return self.size("dp") * self.size("sp")
        return int(self.submesh(*axes).size())

    def rank(self, *axes: str) -> int:
        """Returns this process's place along one axis, or along dp and sp, from 0."""
        return int(self.submesh(*axes).get_local_rank())

    def group(self, *axes: str) -> ProcessGroup | None:
        """Returns the processes along one axis, or along dp and sp; None if there is only one."""
        return self.submesh(*axes).get_group() if self.size(*axes) > 1 else None


def data_parallel_size(
    world_size: int, *, tensor_parallel_size: int = 1, sequence_parallel_size: int = 1
) -> int:
    """Returns how many copies of the model there are.

    Raises:
        ValueError: the processes cannot be shared out.
    """
    for flag, size in (
        ("--tensor-parallel-size", tensor_parallel_size),
        ("--sequence-parallel-size", sequence_parallel_size),
    ):
        if size < 1:
            raise ValueError(f"{flag} is {size}; it must be 1 or more")
    per_copy = tensor_parallel_size * sequence_parallel_size
    if world_size % per_copy:
        raise ValueError(
            f"--tensor-parallel-size {tensor_parallel_size} x --sequence-parallel-size "
            f"{sequence_parallel_size} = {per_copy} processes for each copy of the model do not "
            f"divide the {world_size} of this run ({world_size} / {per_copy} = "
            f"{world_size / per_copy:g}); start a multiple of {per_copy}, such as torchrun "
            f"--nproc-per-node {per_copy * max(1, round(world_size / per_copy))}, or "
            "--distributed-world-size"
        )
    return world_size // per_copy


def build_mesh(
    world_size: int,
    *,
    tensor_parallel_size: int = 1,
    sequence_parallel_size: int = 1,
    device_type: str = "cpu",
) -> ParallelMesh:
    """Makes the mesh of a run; all processes must call it.

    Args:
        world_size: number of processes; what the other two leave is `dp`.
        tensor_parallel_size: processes that share a copy of the weights.
        sequence_parallel_size: processes that share a sequence.
        device_type: cpu or cuda.

    Raises:
        ValueError: their product does not divide the world size.
    """
    data_parallel = data_parallel_size(
        world_size,
        tensor_parallel_size=tensor_parallel_size,
        sequence_parallel_size=sequence_parallel_size,
    )
    shape = (data_parallel, sequence_parallel_size, tensor_parallel_size)
    return ParallelMesh(init_device_mesh(device_type, shape, mesh_dim_names=AXES))
