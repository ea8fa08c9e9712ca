"""A model whose parts lie with other processes, and that forwards its calls to them."""

from __future__ import annotations

import atexit
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fairseq.model_parallel.remote_graph import RemoteGraphs
from fairseq.model_parallel.worker import WorkerSettings
from fairseq.model_parallel.worker_optimizer import WorkerOptimizer
from fairseq.model_parallel.workers import WorkerPool
from fairseq.utils import apply_to_sample

__all__ = ["Forwarding", "Parallelization"]

_FIGURES = ("memory_allocated", "memory_reserved", "memory_cached")
_ENDING = ("to", "cpu", "cuda")
_REPLACED = ("forward", "generate", "state_dict", "zero_grad", *_ENDING, *_FIGURES)
_MIB = 2**20


class Parallelization:
    """A model in parts; a context manager that makes it whole again.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __enter__(self) -> Parallelization:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def close(self) -> None:
        """Gathers the weights and makes the model what it was; a second call does nothing."""
        raise NotImplementedError

    def optimizer(
        self, optimizer_class: Any, params: Iterable[Any] | None = None, **options: Any
    ) -> torch.optim.Optimizer:
        """Makes an optimizer for the model's parts, wherever they lie.

        Args:
            optimizer_class: of torch or like torch's, such as `torch.optim.AdamW`.
            params: parameters of the model, or groups of them; None is all.
            **options: of the class.
        """
        raise NotImplementedError

    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """Scales all gradients of the model so that their norm is at most `max_norm`.

        Returns:
            The norm before that.
        """
        raise NotImplementedError

    def memory_allocated(self) -> dict[str, str]:
        """Returns how much the weights take, by process, such as {"cpu:0": "1.5 MiB"}."""
        return self._figures("allocated")

    def memory_reserved(self) -> dict[str, str]:
        """Returns how much is taken in all, by process: CUDA's reserve, or resident memory."""
        return self._figures("reserved")

    def memory_cached(self) -> dict[str, str]:
        """Returns what `memory_reserved` does, under the older name."""
        return self.memory_reserved()

    def _figures(self, kind: str) -> dict[str, str]:
        return {dev: f"{each[kind] / _MIB:.1f} MiB" for dev, each in self._memory().items()}

    def _memory(self) -> dict[str, dict[str, int]]:
        raise NotImplementedError


class Forwarding(Parallelization):
    """Other processes hold the parts; this one forwards calls to them.

    The model here keeps its modules, and parameters that have a shape but no memory: their modes
    (`train`, `eval`, `requires_grad_`) are passed on with the next call.

    Args:
        model: changed in place.
        settings: of the workers.
        start_method: see `WorkerPool`.
        daemon: likewise.
    """

    def __init__(
        self, model: nn.Module, settings: WorkerSettings, start_method: str, daemon: bool
    ) -> None:
        super().__init__(model)
        self._pool = WorkerPool(model, settings, start_method=start_method, daemon=daemon)
        self._graphs = RemoteGraphs(self._pool)
        self._modes = self._modes_now()
        for param in model.parameters():
            param.data = _placeholder(param.data)
            param.grad = None
        self._instance_methods = {n: vars(model)[n] for n in vars(model) if n in _REPLACED}
        self._replace("forward", self._forward)
        if hasattr(model, "generate"):
            self._replace("generate", functools.partial(self._without_graph, "generate"))
        self._replace("state_dict", self._state_dict)
        self._replace("zero_grad", functools.partial(self._pool.call, "zero_grad"))
        for name in _ENDING:
            self._replace(name, functools.partial(self._end_and, name))
        for name in _FIGURES:
            self._replace(name, getattr(self, name))
        self._is_open = True
        self._refusal = register_optimizer_step_pre_hook(self._refuse)
        atexit.register(self._stop)

    def _replace(self, name: str, function: Callable[..., Any]) -> None:
        original = getattr(self.model, name, None)
        replacement = functools.partial(function)
        if original is not None:
            # transformers looks at a function's arguments before it calls it.
            vars(replacement)["__signature__"] = inspect.signature(original)
        vars(self.model)[name] = replacement

    # ---- calls ----

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._without_graph("forward", *args, **kwargs)
        self._pass_on_modes()
        return self._graphs.call(args, kwargs)

    def _without_graph(self, name: str, *args: Any, **kwargs: Any) -> Any:
        self._pass_on_modes()
        self._graphs.forget_dropped()
        args, kwargs = apply_to_sample(torch.Tensor.detach, (args, kwargs))
        return self._pool.call("invoke", name, args, kwargs)

    def _modes_now(self) -> tuple[dict[str, bool], dict[str, bool]]:
        params = self.model.named_parameters(remove_duplicate=False)
        return (
            {name: module.training for name, module in self.model.named_modules()},
            {name: param.requires_grad for name, param in params},
        )

    def _pass_on_modes(self) -> None:
        modes = self._modes_now()
        if modes != self._modes:
            self._pool.call("set_modes", *modes)
            self._modes = modes

    # ---- training ----

    def optimizer(
        self, optimizer_class: Any, params: Iterable[Any] | None = None, **options: Any
    ) -> torch.optim.Optimizer:
        return WorkerOptimizer(self._pool, self.model, optimizer_class, params, options)

    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        norm: torch.Tensor = self._pool.call("clip_grad_norm", max_norm)
        return norm

    def _refuse(self, optimizer: Any, *unused: Any) -> None:
        """Stops an optimizer that would change the placeholders here, and so nothing."""
        if isinstance(optimizer, WorkerOptimizer):
            return
        own = {id(param) for param in self.model.parameters()}
        if any(id(param) in own for group in optimizer.param_groups for param in group["params"]):
            raise RuntimeError(
                f"{type(optimizer).__name__} has parameters whose values lie with the workers; "
                "make it by handle = parallelize(...), handle.optimizer("
                f"{type(optimizer).__name__}, ...)"
            )

    # ---- the end ----

    def _state_dict(self, *unused: Any, prefix: str = "", **options: Any) -> dict[str, Any]:
        state = self._pool.call("whole_state")
        return {prefix + name: tensor for name, tensor in state.items()}

    def _end_and(self, name: str, *args: Any, **kwargs: Any) -> Any:
        self.close()
        return getattr(self.model, name)(*args, **kwargs)

    def close(self) -> None:
        """Gathers the weights, ends the processes, and makes the model what it was.

        Raises:
            RuntimeError: a process has died, and its part of the weights with it.
        """
        if not self._is_open:
            return
        self._is_open = False
        was_running = self._pool.is_running
        state = self._pool.call("whole_state") if was_running else {}
        self._stop()
        for name in _REPLACED:
            vars(self.model).pop(name, None)
        vars(self.model).update(self._instance_methods)
        if not was_running:
            raise RuntimeError("a worker has died with its part of the weights; load them again")
        for name, param in self.model.named_parameters(remove_duplicate=False):
            param.data = state[name]

    def _stop(self) -> None:
        self._refusal.remove()
        atexit.unregister(self._stop)
        self._pool.stop()

    def _memory(self) -> dict[str, dict[str, int]]:
        self._graphs.forget_dropped()
        parts = self._pool.call("memory", everyone=True)
        return {device: figures for part in parts for device, figures in part.items()}


def _placeholder(values: torch.Tensor) -> torch.Tensor:
    """Returns a tensor of the same shape in the memory of one number, which is no number."""
    nothing = torch.nan if values.is_floating_point() else 0
    return values.new_full((), nothing).expand(values.shape)
