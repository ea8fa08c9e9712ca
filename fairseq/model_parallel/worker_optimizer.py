"""Optimizers whose parameters lie with workers, in parts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fairseq.distributed.fsdp import gather_whole, shard_optimizer_state
from fairseq.model_parallel.shards import is_cut_over
from fairseq.model_parallel.tensor_parallel import file_layout
from fairseq.model_parallel.workers import WorkerPool
from fairseq.utils import apply_to_sample

__all__ = ["OptimizerPart", "WorkerOptimizer", "build_optimizer"]

Groups = list[dict[str, Any]]


def build_optimizer(optimizer_class: Any, params: Any, options: dict[str, Any]) -> Any:
    """Makes an optimizer of torch for parameters of which some are in parts.

    Args:
        optimizer_class: such as `torch.optim.AdamW`.
        params: parameters, or groups of them.
        options: of the class; `foreach` is False unless it is given, since torch's loops over many
            tensors do not take whole ones together with ones in parts.
    """
    if "foreach" in inspect.signature(optimizer_class).parameters and not options.get("fused"):
        options = {"foreach": False, **options}
    return optimizer_class(params, **options)


class WorkerOptimizer(torch.optim.Optimizer):
    """The face of an optimizer that the workers have; schedules of torch take it as any other.

    `param_groups` hold the settings, which go to the workers with each step, and the parameters of
    the script's model, which have no values. `state_dict` is that of one process.

    Args:
        pool: the workers.
        model: the script's.
        optimizer_class: picklable, of which each worker makes an instance.
        params: the model's parameters or groups of them; None is all.
        options: of the class.

    Raises:
        ValueError: a parameter is not the model's.
    """

    def __init__(
        self,
        pool: WorkerPool,
        model: nn.Module,
        optimizer_class: Any,
        params: Iterable[Any] | None,
        options: dict[str, Any],
    ) -> None:
        self._pool = pool
        names = {id(param): name for name, param in model.named_parameters()}
        given = list(model.parameters() if params is None else params)
        groups = given if given and isinstance(given[0], dict) else [{"params": given}]
        groups = [{**group, "params": list(group["params"])} for group in groups]
        if any(id(param) not in names for group in groups for param in group["params"]):
            raise ValueError("the optimizer is given parameters that are not the model's")
        named = [{**group, "params": [names[id(p)] for p in group["params"]]} for group in groups]
        self._number, settings = pool.call("make_optimizer", optimizer_class, named, options)
        super().__init__(groups, dict(options))
        self._take(settings)

    def _take(self, settings: Groups) -> None:
        for group, own in zip(self.param_groups, settings, strict=True):
            group.update(own)

    def _ask(self, method: str, *args: Any) -> Any:
        return self._pool.call("optimizer", self._number, method, *args)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes a step in every worker, with the settings that the groups have now."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._ask("step", [_without_params(group) for group in self.param_groups])
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients of its parameters."""
        self._ask("zero_grad", set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state that one process would have."""
        settings = [_without_params(group) for group in self.param_groups]
        state: dict[str, Any] = self._ask("state_dict", settings)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the state of one process; each worker keeps its part."""
        self._take(self._ask("load_state_dict", state_dict))


class OptimizerPart:
    """What a worker has of an optimizer.

    Args:
        model: cut.
        optimizer_class: of torch.
        groups: with names of parameters.
        options: of the class.
    """

    def __init__(
        self, model: nn.Module, optimizer_class: Any, groups: Groups, options: dict[str, Any]
    ) -> None:
        self._model = model
        self._names = [name for group in groups for name in group["params"]]
        params = dict(model.named_parameters(remove_duplicate=False))
        self._sizes = [params[name].numel() for name in self._names]
        groups = [{**group, "params": [params[n] for n in group["params"]]} for group in groups]
        self._optimizer = build_optimizer(optimizer_class, groups, options)

    def settings(self) -> Groups:
        """Returns the groups without their parameters."""
        return [_without_params(group) for group in self._optimizer.param_groups]

    def step(self, settings: Groups) -> None:
        """Takes a step with these settings."""
        self._set(settings)
        self._optimizer.step()

    def zero_grad(self, set_to_none: bool) -> None:
        """Drops the gradients of its parameters."""
        self._optimizer.zero_grad(set_to_none)

    def state_dict(self, settings: Groups) -> dict[str, Any]:
        """Returns the state that one process would have, on rank 0."""
        self._set(settings)
        keep = dist.get_rank() == 0
        # Sent tensors are moved to shared memory; those in use are to stay this worker's own.
        own = apply_to_sample(_own_copy, self._optimizer.state_dict())
        state: dict[str, Any] = gather_whole(own, keep=keep)
        if keep:
            self._by_name(state, file_layout(self._model).restore)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> Groups:
        """Takes its part of the state of one process; returns the settings in it."""
        self._by_name(state, file_layout(self._model).arrange)
        params = [param for group in self._optimizer.param_groups for param in group["params"]]
        # What arrives lies in memory that all workers share.
        part = apply_to_sample(torch.clone, shard_optimizer_state(state, params))
        self._optimizer.load_state_dict(part)
        return self.settings()

    def _set(self, settings: Groups) -> None:
        for group, own in zip(self._optimizer.param_groups, settings, strict=True):
            group.update(own)

    def _by_name(self, state: dict[str, Any], change: Callable[[dict[str, Any]], None]) -> None:
        """Changes entries with the shape of their parameter, such as averages of gradients."""
        entries: dict[int, dict[str, Any]] = state["state"]
        for kind in {kind for each in entries.values() for kind in each}:
            of_kind = {
                self._names[index]: each[kind]
                for index, each in entries.items()
                if torch.is_tensor(each.get(kind)) and each[kind].numel() == self._sizes[index]
            }
            change(of_kind)
            for index, each in entries.items():
                if self._names[index] in of_kind:
                    each[kind] = of_kind[self._names[index]]


def _own_copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if is_cut_over(tensor, "tp") else tensor.clone()


def _without_params(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}
