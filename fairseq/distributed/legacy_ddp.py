"""Data parallelism that reduces all gradients at once, after the backward pass.

Unlike torch's DDP it does not care in which order gradients appear, whether a parameter has one at
all (a tail of the adaptive softmax without a target in this batch), or whether parameters are used
outside `forward`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from fairseq.distributed.groups import get_world_size
from fairseq.utils import local_part

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["LegacyDistributedDataParallel"]


class LegacyDistributedDataParallel(nn.Module):
    """A model whose gradients `all_reduce_grads` averages over the workers.

    Args:
        module: the model.
        process_group: the workers; None is a single one, for which nothing is reduced.
        buffer_size: most elements that are reduced at once.
    """

    def __init__(
        self, module: nn.Module, process_group: ProcessGroup | None, buffer_size: int = 2**28
    ) -> None:
        super().__init__()
        self.module = module
        self.process_group = process_group
        self.buffer_size = buffer_size
        self.accumulate_grads = False

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Lets gradients add up on this worker while the context is open."""
        before, self.accumulate_grads = self.accumulate_grads, True
        try:
            yield
        finally:
            self.accumulate_grads = before

    def all_reduce_grads(self) -> None:
        """Replaces every gradient by its mean over the workers; a missing one counts as zero."""
        if self.accumulate_grads or get_world_size(self.process_group) == 1:
            return
        pending = [self._reduce(bucket) for bucket in self._buckets()]
        for params, flat, handle in pending:
            handle.wait()
            _scatter(flat, params)

    def _buckets(self) -> Iterator[list[nn.Parameter]]:
        """Yields parameters in order, cut where device or type change or the buffer is full."""
        bucket: list[nn.Parameter] = []
        size = 0
        for param in self.module.parameters():
            if not param.requires_grad:
                continue
            is_other = bucket and (param.device, param.dtype) != (bucket[0].device, bucket[0].dtype)
            num_elements = local_part(param).numel()
            if bucket and (is_other or size + num_elements > self.buffer_size):
                yield bucket
                bucket, size = [], 0
            bucket.append(param)
            size += num_elements
        if bucket:
            yield bucket

    def _reduce(self, params: list[nn.Parameter]) -> tuple[list[nn.Parameter], torch.Tensor, Any]:
        world_size = get_world_size(self.process_group)
        flat = torch.cat([local_part(_grad_or_zero(p)).reshape(-1) for p in params])
        # Divided first, so that a sum in half precision does not overflow.
        flat.div_(world_size)
        handle = dist.all_reduce(flat, group=self.process_group, async_op=True)
        return params, flat, handle


def _scatter(flat: torch.Tensor, params: list[nn.Parameter]) -> None:
    parts = flat.split([local_part(p).numel() for p in params])
    for param, part in zip(params, parts, strict=True):
        if param.grad is None:
            param.grad = _grad_or_zero(param)
        own = local_part(param.grad)
        own.copy_(part.view_as(own))


def _grad_or_zero(param: nn.Parameter) -> torch.Tensor:
    return torch.zeros_like(param) if param.grad is None else param.grad
