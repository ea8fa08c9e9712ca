"""One part of a model in a process of its own, and what can be asked of it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fairseq.model_parallel.shards import is_cut_over
from fairseq.utils import apply_to_sample, local_part, tensors_in

__all__ = ["Worker", "WorkerSettings", "memory_of"]


@dataclass(frozen=True)
class WorkerSettings:
    """How workers find each other and what they do to the model first.

    Attributes:
        world_size: number of workers.
        backend: of torch.distributed.
        address: host at which they meet.
        port: likewise.
        policy: how the model is cut; None looks one up.
        seed: of the random numbers of all workers.
        num_threads: of torch, for each worker.
    """

    world_size: int
    backend: str
    address: str
    port: int
    policy: Any
    seed: int
    num_threads: int


@dataclass
class _Graph:
    """What a backward pass needs of a call."""

    inputs: list[torch.Tensor]
    outputs: list[torch.Tensor]


class Worker:
    """One part of the model and what can be asked of it; every method is called on all workers.

    Args:
        rank: of this worker.
        settings: of all of them.
    """

    model: Any
    mesh: DeviceMesh

    def __init__(self, rank: int, settings: WorkerSettings) -> None:
        self.rank = rank
        self.settings = settings
        on_cuda = settings.backend == "nccl"
        self.device = torch.device("cuda", rank) if on_cuda else torch.device("cpu")
        self._graphs: dict[int, _Graph] = {}
        self._optimizers: list[Any] = []

    def start(self, model: nn.Module) -> None:
        """Joins the others, and takes its part of the model."""
        from fairseq.model_parallel.tensor_parallel import apply_tensor_parallel

        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        address = f"tcp://{self.settings.address}:{self.settings.port}"
        world_size = self.settings.world_size
        dist.init_process_group(
            self.settings.backend, init_method=address, rank=self.rank, world_size=world_size
        )
        self.mesh = init_device_mesh(self.device.type, (world_size,), mesh_dim_names=("tp",))
        torch.manual_seed(self.settings.seed)
        self.model = model.to(self.device)
        apply_tensor_parallel(self.model, self.mesh, self.settings.policy)
        # What is not cut lies in memory that all workers share still: that of the whole model.
        for tensor in [*self.model.parameters(), *self.model.buffers()]:
            if tensor.is_shared():
                tensor.data = tensor.data.clone()

    def stop(self) -> None:
        """Leaves the others."""
        dist.destroy_process_group()

    # ---- calls and their backward passes ----

    def invoke(self, name: str, args: Any, kwargs: Any) -> Any:
        """Calls the model, or a method of it, without gradients."""
        function = self.model if name == "forward" else getattr(self.model, name)
        args, kwargs = apply_to_sample(lambda x: x.to(self.device), (args, kwargs))
        with torch.no_grad():
            return _without_caches(function(*args, **kwargs))

    def invoke_with_graph(
        self, number: int, args: Any, kwargs: Any, wanted: list[int]
    ) -> tuple[Any, list[int]]:
        """Calls the model and keeps what the backward pass needs.

        Args:
            number: names the graph.
            args: of the model.
            kwargs: likewise.
            wanted: which of the tensors in both, in their order, are to have gradients.

        Returns:
            The result, and which of the tensors in it have gradients.
        """
        args, kwargs = apply_to_sample(lambda x: x.to(self.device), (args, kwargs))
        given = tensors_in((args, kwargs))
        inputs = [given[i].requires_grad_() for i in wanted]
        result = _without_caches(self.model(*args, **kwargs))
        made = tensors_in(result)
        with_grad = [i for i, tensor in enumerate(made) if tensor.requires_grad]
        if with_grad:
            self._graphs[number] = _Graph(inputs, [made[i] for i in with_grad])
        return result, with_grad

    def backward(self, number: int, grads: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """Adds to the gradients of the parameters; returns those of the wanted inputs."""
        graph = self._graphs.pop(number)
        pairs = [
            (out, grad.to(self.device))
            for out, grad in zip(graph.outputs, grads, strict=True)
            if grad is not None
        ]
        torch.autograd.backward([out for out, _ in pairs], [grad for _, grad in pairs])
        return [tensor.grad for tensor in graph.inputs]

    def forget_graphs(self, numbers: list[int]) -> None:
        """Frees what results keep that no longer exist in the script."""
        for number in numbers:
            self._graphs.pop(number, None)

    def set_modes(self, is_training: dict[str, bool], has_grad: dict[str, bool]) -> None:
        """Sets the modes of modules, and which parameters are trained, by their names."""
        for name, module in self.model.named_modules():
            module.training = is_training.get(name, module.training)
        for name, param in self.model.named_parameters(remove_duplicate=False):
            param.requires_grad_(has_grad.get(name, param.requires_grad))

    # ---- optimizers ----

    def make_optimizer(
        self, optimizer_class: Any, groups: list[dict[str, Any]], options: dict[str, Any]
    ) -> tuple[int, list[dict[str, Any]]]:
        """Makes an optimizer of parameters given by their names; see `WorkerOptimizer`."""
        from fairseq.model_parallel.worker_optimizer import OptimizerPart

        part = OptimizerPart(self.model, optimizer_class, groups, options)
        self._optimizers.append(part)
        return len(self._optimizers) - 1, part.settings()

    def optimizer(self, number: int, method: str, *args: Any) -> Any:
        """Calls a method of an `OptimizerPart`."""
        return getattr(self._optimizers[number], method)(*args)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients of all parameters."""
        self.model.zero_grad(set_to_none)

    def clip_grad_norm(self, max_norm: float) -> torch.Tensor:
        """Clips the gradients; returns their norm."""
        from fairseq.model_parallel.tensor_parallel import clip_grad_norm_

        return clip_grad_norm_(self.model.parameters(), max_norm, self.mesh)

    # ---- weights and figures ----

    def whole_state(self) -> dict[str, torch.Tensor]:
        """Returns the whole state dict on rank 0."""
        from fairseq.model_parallel.tensor_parallel import whole_state_dict

        state = whole_state_dict(self.model, keep=self.rank == 0)
        # Sent tensors are moved to shared memory; those in use are to stay this worker's own.
        own = self.model.state_dict()
        return {n: x if is_cut_over(own[n], "tp") else x.clone() for n, x in state.items()}

    def memory(self) -> dict[str, dict[str, int]]:
        """Returns bytes of this worker, see `memory_of`, and how many graphs it keeps."""
        figures = memory_of(self.model, self.rank)
        for each in figures.values():
            each["graphs"] = len(self._graphs)
        return figures


def _without_caches(result: Any) -> Any:
    """Returns a result without the caches that belong to this worker's heads."""
    if not isinstance(result, dict) or "past_key_values" not in result:
        return result
    values = {**result, "past_key_values": None}
    return values if type(result) is dict else type(result)(**values)


def memory_of(model: nn.Module, rank: int) -> dict[str, dict[str, int]]:
    """Returns bytes that a part of a model takes, by the name of its device.

    Args:
        model: with parameters that may be cut.
        rank: of this process.

    Returns:
        {device: {"allocated": bytes of the weights, on a GPU of all tensors, "reserved": bytes that
        CUDA has reserved, on a CPU those of this process that are in memory}}.
    """
    if next(model.parameters()).device.type == "cuda":
        figures = {
            "allocated": torch.cuda.memory_allocated(),
            "reserved": torch.cuda.memory_reserved(),
        }
        return {f"cuda:{rank}": figures}
    parts = [local_part(tensor) for tensor in [*model.parameters(), *model.buffers()]]
    allocated = sum(part.numel() * part.element_size() for part in parts)
    return {f"cpu:{rank}": {"allocated": allocated, "reserved": _resident_bytes()}}


def _resident_bytes() -> int:
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
