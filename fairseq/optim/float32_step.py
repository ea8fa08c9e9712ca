"""What this project's own torch optimizers share: every update is computed in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

__all__ = ["Float32Step"]

MAX_BUCKET_ELEMENTS = {"cpu": 1 << 16, "cuda": 1 << 22}
"""Parameters are updated together until they have this many elements.

On a CPU a bucket should stay in the cache over all operations of an update; on a GPU few and large
kernels are best, and the bound is one on the temporaries.
"""

_HALF = (torch.float16, torch.bfloat16)

Tensors = list[torch.Tensor]


class Float32Step(torch.optim.Optimizer):
    """Base: subclasses give the rule for a list of float32 values and gradients.

    Half-precision parameters are updated through a temporary float32 copy; the state stays in
    float32 for them as well. Parameters without a gradient are passed over.
    """

    supports_memory_efficient_fp16 = True
    supports_step_with_scale = True
    supports_flat_params = True

    @torch.no_grad()
    def step(
        self, closure: Callable[[], Any] | None = None, *, scale: float | torch.Tensor = 1.0
    ) -> Any:
        """Takes one step.

        Args:
            closure: re-evaluates the loss.
            scale: gradients are divided by this, in float32 and without changing them.

        Returns:
            What the closure returns, None without one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for params in _buckets(group["params"]):
                values = _as_float32(params)
                grads = _as_float32([p.grad for p in params if p.grad is not None])
                if torch.is_tensor(scale) or scale != 1.0:
                    grads = list(torch._foreach_mul(grads, 1.0 / scale))
                states = [self.state[p] for p in params]
                for state, value in zip(states, values, strict=True):
                    if not state:
                        self.init_state(group, state, value)
                self.update(group, states, values, grads)
                if values[0] is not params[0]:
                    torch._foreach_copy_(params, values)
            self.finish_group(group)
        return loss

    def init_state(self, group: dict[str, Any], state: dict[str, Any], value: torch.Tensor) -> None:
        """Fills the state of a parameter before its first step.

        Args:
            group: the parameter's group.
            state: empty dictionary to fill.
            value: the parameter in float32.
        """
        raise NotImplementedError

    def update(
        self, group: dict[str, Any], states: list[dict[str, Any]], values: Tensors, grads: Tensors
    ) -> None:
        """Changes values in place by the optimizer's rule.

        Args:
            group: settings.
            states: one for each value, in float32.
            values: parameters in float32.
            grads: their gradients in float32; not to be changed.
        """
        raise NotImplementedError

    def finish_group(self, group: dict[str, Any]) -> None:
        """Called once for each group after its parameters are updated."""


def _as_float32(tensors: Tensors) -> Tensors:
    """Returns float32 copies of half-precision tensors, the same tensors otherwise."""
    return [t.float() if t.dtype in _HALF else t for t in tensors]


def _buckets(params: Tensors) -> Iterator[Tensors]:
    """Yields runs of parameters with gradients, of one dtype and device, of bounded size."""
    bucket: Tensors = []
    num_elements = 0
    for parameter in params:
        if parameter.grad is None:
            continue
        if parameter.grad.is_sparse:
            raise ValueError("this optimizer does not take sparse gradients; use --optimizer sgd")
        limit = MAX_BUCKET_ELEMENTS.get(parameter.device.type, 0)
        is_full = num_elements + parameter.numel() > limit
        if bucket and (is_full or not _are_alike(bucket[0], parameter)):
            yield bucket
            bucket, num_elements = [], 0
        bucket.append(parameter)
        num_elements += parameter.numel()
    if bucket:
        yield bucket


def _are_alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    meshes = [getattr(t, "device_mesh", None) for t in (a, b)]  # of sharded parameters
    return a.dtype == b.dtype and a.device == b.device and meshes[0] == meshes[1]
