"""Parameters in parts: how they are cut, and what is needed to put them together again."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

__all__ = ["FileLayout", "cut_parameter", "is_cut_over", "process_major_order"]


@dataclass
class FileLayout:
    """How parameters of a cut model, put together, differ from those of the whole one.

    Attributes:
        orders: order of the rows of fused parameters, by their names.
        reversed: names of weights that are (in, out) in the whole model.
        buffers: state of all heads, by the names of the buffers that hold it.
    """

    orders: dict[str, torch.Tensor] = field(default_factory=dict)
    reversed: set[str] = field(default_factory=set)
    buffers: dict[str, torch.Tensor] = field(default_factory=dict)

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Brings whole tensors by name into the original layout, in place."""
        for name in state.keys() & self.orders.keys():
            state[name] = state[name][self.orders[name].argsort()]
        for name in state.keys() & self.reversed:
            state[name] = state[name].t().contiguous()
        for name in state.keys() & self.buffers.keys():
            state[name] = self.buffers[name].cpu()

    def arrange(self, state: dict[str, torch.Tensor]) -> None:
        """Brings whole tensors of parameters from the original layout into that of the parts."""
        for name in state.keys() & self.reversed:
            state[name] = state[name].t().contiguous()
        for name in state.keys() & self.orders.keys():
            state[name] = state[name][self.orders[name]]


def cut_parameter(module: nn.Module, name: str, mesh: DeviceMesh, placement: Placement) -> None:
    """Replaces a parameter by this process's part of it.

    Args:
        module: its owner.
        name: of the parameter in it.
        mesh: the processes, one axis; each holds the whole parameter now.
        placement: how it is cut.
    """
    whole = getattr(module, name)
    # Nothing is sent; the part is copied, so that the whole can be freed.
    part = distribute_tensor(whole.detach(), mesh, [placement], src_data_rank=None)
    part = DTensor.from_local(
        part.to_local().clone(),
        mesh,
        [placement],
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )
    module.register_parameter(name, nn.Parameter(part, requires_grad=whole.requires_grad))


def process_major_order(num_rows: int, num_parts: int, world_size: int) -> torch.Tensor:
    """Returns an order of rows [parts, heads, ...] in which each process's rows are neighbours.

    Args:
        num_rows: rows of the fused weight.
        num_parts: projections in it.
        world_size: processes; each gets as many neighbouring rows of every part.

    Returns:
        int64 (num_rows,): old index of each new row. `order.argsort()` undoes it.
    """
    rows = torch.arange(num_rows).view(num_parts, world_size, -1)
    return rows.transpose(0, 1).reshape(-1)


def is_cut_over(tensor: torch.Tensor, axis: str) -> bool:
    """Tells whether a tensor is in parts along an axis of its mesh; one without names has one."""
    if not isinstance(tensor, DTensor):
        return False
    names = tensor.device_mesh.mesh_dim_names or (axis,)
    return axis in names and not tensor.placements[names.index(axis)].is_replicate()
