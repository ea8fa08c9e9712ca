"""Calls to workers that keep their graphs, so that `backward()` in the script runs there."""

from __future__ import annotations

import collections
import itertools
import weakref
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fairseq.model_parallel.workers import WorkerPool
from fairseq.utils import apply_to_sample, tensors_in

__all__ = ["RemoteGraphs"]


class RemoteGraphs:
    """Calls the workers' model with gradients.

    Each call has a graph of its own in the workers, until its backward pass, or until its result
    is dropped here.

    Args:
        pool: the workers.
    """

    def __init__(self, pool: WorkerPool) -> None:
        self.pool = pool
        self._numbers = itertools.count()
        # Filled when results are collected, which may be in the midst of a call.
        self._dropped: collections.deque[int] = collections.deque()

    def call(self, args: Any, kwargs: Any) -> Any:
        """Calls the model; tensors of the result lead back to the workers."""
        self.forget_dropped()
        given = tensors_in((args, kwargs))
        inputs = {i: tensor for i, tensor in enumerate(given) if tensor.requires_grad}
        call = _Call(self.pool, next(self._numbers), args, kwargs, list(inputs))
        result, with_grad = call.forward()
        made = tensors_in(result)
        if not with_grad:
            return result
        weakref.finalize(call, self._dropped.append, call.number).atexit = False
        start = torch.zeros((), requires_grad=True)  # the weights, which are not here
        found: tuple[torch.Tensor, ...] = _Remote.apply(
            call, [made[i] for i in with_grad], start, *inputs.values()
        )
        linked = dict(zip(with_grad, found, strict=True))
        numbers = itertools.count()
        return apply_to_sample(lambda tensor: linked.get(next(numbers), tensor), result)

    def forget_dropped(self) -> None:
        """Lets the workers free graphs whose results are gone."""
        numbers = [self._dropped.popleft() for _ in range(len(self._dropped))]
        if numbers:
            self.pool.call("forget_graphs", numbers)


class _Call:
    """One call, as long as somebody may ask for its backward pass."""

    def __init__(
        self, pool: WorkerPool, number: int, args: Any, kwargs: Any, wanted: list[int]
    ) -> None:
        self.pool = pool
        self.number = number
        self._arguments: Any = apply_to_sample(torch.Tensor.detach, (args, kwargs))
        self._wanted = wanted
        self._is_used = False

    def forward(self) -> tuple[Any, list[int]]:
        (args, kwargs), self._arguments = self._arguments, None
        result: tuple[Any, list[int]] = self.pool.call(
            "invoke_with_graph", self.number, args, kwargs, self._wanted
        )
        return result

    def backward(self, grads: tuple[torch.Tensor | None, ...]) -> list[torch.Tensor | None]:
        if self._is_used:
            raise RuntimeError(
                "backward() a second time on one result of the model: the workers have freed its "
                "graph (retain_graph does not reach them); call the model again, or add up the "
                "losses and call backward() once"
            )
        self._is_used = True
        sent = [None if grad is None else grad.detach() for grad in grads]
        found: list[torch.Tensor | None] = self.pool.call("backward", self.number, sent)
        return found


class _Remote(torch.autograd.Function):
    """Passes on what the workers have computed; its backward pass is theirs."""

    @staticmethod
    def forward(
        ctx: Any, call: _Call, results: list[torch.Tensor], *unused: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.call = call
        ctx.devices = [tensor.device for tensor in unused[1:]]
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        found = ctx.call.backward(grads)
        moved = [
            None if grad is None else grad.to(device)
            for grad, device in zip(found, ctx.devices, strict=True)
        ]
        return None, None, None, *moved
