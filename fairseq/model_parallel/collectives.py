"""Exchanges between the processes that share a sequence, with the gradients that belong to them.

Every backward pass here is the transpose of its forward pass, so that for any losses L_r of the
processes r, the gradients that arrive are those of the sum of all L_r. A parameter's gradient
summed over the processes is then that of the summed loss; averaged, as data parallelism does, that
of the mean loss. Plain collectives alone are used: gradients of the differentiable ones of
`torch.distributed.nn` are wrong on gloo where strides are permuted.

Shapes: `G` processes of the group, `T` columns of one process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["RingOfProcesses", "gather_columns", "swap_heads_and_columns", "total"]

# Newer versions of torch have other names for the same.
_ALL_GATHER: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_REDUCE_SCATTER: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def gather_columns(x: torch.Tensor, group: ProcessGroup, dim: int) -> torch.Tensor:
    """Puts the parts of all processes behind each other along one axis, in the order of ranks.

    The gradient of a part is the sum of what all processes have for it.

    Args:
        x: the same shape on every process.
        group: the processes.
        dim: axis of T, which becomes G * T.
    """
    gathered: torch.Tensor = _Gather.apply(x, group, dim)
    return gathered


def swap_heads_and_columns(x: torch.Tensor, group: ProcessGroup, *, to_heads: bool) -> torch.Tensor:
    """Gives every process all columns of some heads, instead of some columns of all heads.

    Args:
        x: (..., H, T, K) of which each process gets H / G heads; or, back again, (..., H / G,
            G * T, K).
        group: the processes.
        to_heads: False is the way back.

    Returns:
        (..., H / G, G * T, K), columns in the order of ranks; or (..., H, T, K).
    """
    axes = (-3, -2) if to_heads else (-2, -3)
    swapped: torch.Tensor = _Swap.apply(x, group, *axes)
    return swapped


def total(x: torch.Tensor, group: ProcessGroup | None) -> torch.Tensor:
    """Returns the sum of a tensor over the processes; its gradient is summed likewise."""
    if group is None:
        return x
    summed: torch.Tensor = _Total.apply(x, group)
    return summed


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: ProcessGroup, dim: int) -> torch.Tensor:
        ctx.group, ctx.dim = group, dim
        part = x.movedim(dim, 0).contiguous()
        whole = part.new_empty(dist.get_world_size(group) * part.size(0), *part.shape[1:])
        _ALL_GATHER(whole, part, group=group)
        return whole.movedim(0, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[torch.Tensor, None, None]:
        whole = grads[0].movedim(ctx.dim, 0).contiguous()
        size = dist.get_world_size(ctx.group)
        part = whole.new_empty(whole.size(0) // size, *whole.shape[1:])
        _REDUCE_SCATTER(part, whole, group=ctx.group)
        return part.movedim(0, ctx.dim), None, None


class _Swap(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, group: ProcessGroup, cut: int, joined: int
    ) -> torch.Tensor:
        ctx.group, ctx.axes = group, (cut, joined)
        return _swap(x, group, cut, joined)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[torch.Tensor, None, None, None]:
        cut, joined = ctx.axes
        return _swap(grads[0], ctx.group, joined, cut), None, None, None


def _swap(x: torch.Tensor, group: ProcessGroup, cut: int, joined: int) -> torch.Tensor:
    """Sends part g of the axis `cut` to process g; joins what arrives along `joined`."""
    size = dist.get_world_size(group)
    sent = torch.stack(x.chunk(size, dim=cut)).contiguous()  # (G, ...)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return torch.cat(received.unbind(), dim=joined)


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return _sum(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[torch.Tensor, None]:
        return _sum(grads[0], ctx.group), None


def _sum(x: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    result = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(result, group=group)
    return result


class RingOfProcesses:
    """Each process hands tensors on to the next of the group, the last one to the first.

    Args:
        group: the processes.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group
        self.size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        self._next = dist.get_global_rank(group, (self.rank + 1) % self.size)
        self._previous = dist.get_global_rank(group, (self.rank - 1) % self.size)

    def owner(self, step: int) -> int:
        """Returns whose tensor this process holds after `step` exchanges."""
        return (self.rank - step) % self.size

    def hand_on(self, tensor: torch.Tensor) -> PendingExchange:
        """Starts to send a contiguous tensor to the next process, and to receive one like it."""
        if self.size == 1:
            return PendingExchange([], tensor, tensor)
        received = torch.empty_like(tensor)
        operations = [
            dist.P2POp(dist.isend, tensor, self._next, self.group),
            dist.P2POp(dist.irecv, received, self._previous, self.group),
        ]
        return PendingExchange(dist.batch_isend_irecv(operations), tensor, received)


class PendingExchange:
    """An exchange under way.

    Args:
        works: what has to end.
        sent: kept until then, since it is read meanwhile.
        received: filled by then.
    """

    def __init__(self, works: list[Any], sent: torch.Tensor, received: torch.Tensor) -> None:
        self._works = works
        self._sent: torch.Tensor | None = sent
        self._received = received

    def wait(self) -> torch.Tensor:
        """Waits for the end; returns the previous process's tensor."""
        for work in self._works:
            work.wait()
        self._sent = None
        return self._received
