"""One call that spreads a model over processes.

Under torchrun every process calls it, and the model is cut in place: it trains and infers as
before. In a plain script the call starts the processes itself and the model forwards its calls to
them, for inference as parallelformers (2022) does for GPUs of one machine, and for training.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fairseq.model_parallel.forwarding import Forwarding, Parallelization
from fairseq.model_parallel.mesh import ParallelMesh
from fairseq.model_parallel.policies import find_policy
from fairseq.model_parallel.policy import Policy, check_heads
from fairseq.model_parallel.worker import WorkerSettings, memory_of
from fairseq.model_parallel.workers import free_port

__all__ = ["Parallelization", "parallelize"]

logger = logging.getLogger(__name__)

_START_METHODS = ("forkserver", "spawn", "fork")


def parallelize(
    model: nn.Module,
    *,
    num_gpus: int | None = None,
    fp16: bool = False,
    custom_policies: type[Policy] | Sequence[type[Policy]] | None = None,
    mesh: DeviceMesh | ParallelMesh | None = None,
    backend: str | None = None,
    seed: int | None = None,
    verbose: bool | str | None = None,
    master_addr: str = "127.0.0.1",
    master_port: int | None = None,
    init_method: str | None = None,
    daemon: bool = True,
) -> Parallelization:
    """Spreads a model over processes.

    Example:
        with parallelize(model, num_gpus=2) as handle:
            optimizer = handle.optimizer(torch.optim.AdamW, lr=1e-4)
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            model.generate(**inputs)

    Args:
        model: one that has a policy; changed in place.
        num_gpus: processes that share the weights, on GPUs or on the CPU; None is as many as
            torchrun started, in a plain script as there are GPUs, or CPU cores up to 2.
        fp16: convert the model to half precision first.
        custom_policies: one or several policies, looked at before the built-in ones.
        mesh: under torchrun, the processes to use; None is all.
        backend: of torch.distributed; None is nccl on GPUs, else gloo.
        seed: of the random numbers, so that all processes sample alike; None draws one.
        verbose: log the memory of each process; "detail" logs each cut parameter too.
        master_addr: plain script only: where the processes meet.
        master_port: plain script only: likewise; None is a free port.
        init_method: plain script only: how processes are started, forkserver (default), spawn or
            fork. All but fork need the `if __name__ == "__main__":` of Python's multiprocessing.
        daemon: plain script only: let the processes end with this one.

    Returns:
        The handle that ends it: call `close()`, or use it as a context manager. In a plain script
        `model.to`, `model.cpu` and `model.cuda` end it too, and so does the end of the script.

    Raises:
        ValueError: no policy fits, the heads do not divide, or arguments contradict each other.
        RuntimeError: a started process failed.
    """
    if fp16:
        model.half()
    policy = _choose(model, custom_policies)
    under_launcher = dist.is_initialized() or "TORCHELASTIC_RUN_ID" in os.environ
    if under_launcher or mesh is not None:
        found: Parallelization = _InPlace(model, policy, num_gpus, mesh, backend, seed)
    else:
        size = _default_size() if num_gpus is None else num_gpus
        check_heads(policy.heads(policy.config(model)), size)
        method = _START_METHODS[0] if init_method is None else init_method
        if method not in _START_METHODS:
            raise ValueError(
                f"init_method is {method!r}; it must be one of {', '.join(_START_METHODS)}"
            )
        settings = WorkerSettings(
            world_size=size,
            backend=_backend(backend, size),
            address=master_addr,
            port=free_port() if master_port is None else master_port,
            policy=policy,
            seed=int(torch.randint(2**31, ())) if seed is None else seed,
            num_threads=max(1, torch.get_num_threads() // size),
        )
        found = Forwarding(model, settings, method, daemon)
    if verbose:
        for device, text in found.memory_allocated().items():
            logger.info(f"{device}: {text} of weights, {found.memory_reserved()[device]} in all")
        if verbose == "detail":
            logger.info(str(model))
    return found


class _InPlace(Parallelization):
    """This process holds one part, and others, started by a launcher, the rest."""

    def __init__(
        self,
        model: nn.Module,
        policy: type[Policy],
        num_gpus: int | None,
        mesh: DeviceMesh | ParallelMesh | None,
        backend: str | None,
        seed: int | None,
    ) -> None:
        from fairseq.model_parallel.tensor_parallel import apply_tensor_parallel

        super().__init__(model)
        if not dist.is_initialized():
            dist.init_process_group(backend or ("nccl" if torch.cuda.is_available() else "gloo"))
        if mesh is None:
            device_type = next(model.parameters()).device.type
            mesh = init_device_mesh(device_type, (dist.get_world_size(),), mesh_dim_names=("tp",))
        axis = mesh.submesh("tp") if isinstance(mesh, ParallelMesh) else mesh
        if axis.ndim != 1:
            raise ValueError(
                f"mesh has the axes {axis.mesh_dim_names}; give the one whose members share the "
                "weights, such as mesh['tp']"
            )
        if num_gpus is not None and num_gpus != axis.size():
            raise ValueError(
                f"num_gpus is {num_gpus}, but {axis.size()} processes share the weights; leave it "
                "out, or start as many"
            )
        _seed_alike(seed, axis)
        self._is_open = True
        self._axis = axis
        apply_tensor_parallel(model, axis, policy)

    def close(self) -> None:
        """Gathers the weights and makes the model what it was; every process must call it."""
        from fairseq.model_parallel.tensor_parallel import undo_tensor_parallel

        if self._is_open:
            self._is_open = False
            undo_tensor_parallel(self.model)

    def optimizer(
        self, optimizer_class: Any, params: Iterable[Any] | None = None, **options: Any
    ) -> torch.optim.Optimizer:
        from fairseq.model_parallel.worker_optimizer import build_optimizer

        params = self.model.parameters() if params is None else params
        made: torch.optim.Optimizer = build_optimizer(optimizer_class, params, options)
        return made

    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        from fairseq.model_parallel.tensor_parallel import clip_grad_norm_

        return clip_grad_norm_(self.model.parameters(), max_norm, self._axis)

    def _memory(self) -> dict[str, dict[str, int]]:
        return memory_of(self.model, dist.get_rank())


def _choose(model: nn.Module, custom: Any) -> type[Policy]:
    given: list[type[Policy]] = [custom] if isinstance(custom, type) else list(custom or [])
    for policy in given:
        layer_class = policy.original_layer_class()
        if any(isinstance(module, layer_class) for module in model.modules()):
            return policy
    if given:
        names = ", ".join(policy.original_layer_class().__name__ for policy in given)
        raise ValueError(
            f"custom_policies are for layers of class {names}, but {type(model).__name__} has none"
        )
    return find_policy(model)


def _default_size() -> int:
    if torch.cuda.is_available():
        return torch.cuda.device_count()
    return min(2, os.cpu_count() or 1)


def _backend(given: str | None, size: int) -> str:
    if given == "nccl" or (given is None and torch.cuda.is_available()):
        if not torch.cuda.is_available() or torch.cuda.device_count() < size:
            raise ValueError(
                f"num_gpus is {size}, but {torch.cuda.device_count()} GPUs are visible; lower it, "
                "or give backend='gloo' to compute on the CPU"
            )
        return "nccl"
    return "gloo" if given is None else given


def _seed_alike(seed: int | None, axis: DeviceMesh) -> None:
    """Seeds the processes alike: with the number given, or with rank 0's own state."""
    shared = torch.randint(2**31, ()) if seed is None else torch.tensor(seed)
    if seed is None:
        group = axis.get_group()
        shared = shared.to(axis.device_type)
        dist.broadcast(shared, src=dist.get_global_rank(group, 0), group=group)
    torch.manual_seed(int(shared))
