"""Parameters, gradients and optimizer state cut over the workers (FSDP2, `fully_shard`).

A parameter is a `DTensor` afterwards, one for one, so that optimizer state has the plain layout
too: gathering each tensor gives the file that one process would have written, and cutting each
tensor reads such a file.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from fairseq.distributed.groups import get_mesh

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "accept_whole_tensors",
    "gather_whole",
    "is_sharded",
    "local_grad_norm_aggregator",
    "shard_model",
    "shard_optimizer_state",
]


def is_sharded(model: nn.Module) -> bool:
    """Tells whether `shard_model` has changed this model."""
    return isinstance(model, FSDPModule)


def shard_model(
    model: nn.Module,
    process_group: ProcessGroup | None,
    device: torch.device,
    *,
    reshard_after_forward: bool = True,
    reduce_in_fp32: bool = False,
    cpu_offload: bool = False,
    compute_dtype: torch.dtype | None = None,
    min_layer_params: int = 0,
) -> nn.Module:
    """Cuts a model's parameters over the workers, layer by layer and then the rest.

    Args:
        model: the same on every worker, in float32; changed in place.
        process_group: the workers.
        device: device of the model.
        reshard_after_forward: free a layer's whole parameters between forward and backward.
        reduce_in_fp32: sum gradients in float32 although `compute_dtype` is a half.
        cpu_offload: keep the shards on the CPU while they are not needed.
        compute_dtype: type of parameters and activations in forward and backward; None keeps it.
        min_layer_params: layers with fewer parameters belong to the rest.

    Returns:
        `model`. `load_state_dict` takes whole tensors.
    """
    options: dict[str, Any] = {
        "mesh": _mesh(process_group, device),
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=compute_dtype, reduce_dtype=torch.float32 if reduce_in_fp32 else None
        ),
        "offload_policy": CPUOffloadPolicy() if cpu_offload else OffloadPolicy(),
    }
    for layer in _layers(model):
        if sum(p.numel() for p in layer.parameters()) >= min_layer_params:
            fully_shard(layer, reshard_after_forward=reshard_after_forward, **options)
    # The rest stays whole until its backward pass: criterions use the output layer after the
    # model's own forward.
    fully_shard(model, reshard_after_forward=False, **options)
    # Scores of a process's own words are a view, which newer torch warns of: changed in place it
    # would get wrong gradients. No criterion changes its model's output.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
    model.register_forward_hook(_give_unused_parameters_a_gradient)
    accept_whole_tensors(model)
    return model


def accept_whole_tensors(model: nn.Module) -> None:
    """Lets `load_state_dict` of a model with cut parameters take whole tensors."""
    model.register_load_state_dict_pre_hook(_cut_whole_tensors)


def _mesh(process_group: ProcessGroup | None, device: torch.device) -> DeviceMesh:
    grid = get_mesh()
    if grid is not None:
        # Part of the mesh that weights may be cut over already, or the two cannot be combined.
        return cast(DeviceMesh, grid.submesh("dp", "sp"))
    if process_group is None or process_group is dist.group.WORLD:
        return init_device_mesh(device.type, (dist.get_world_size(),))
    return DeviceMesh.from_group(process_group, device.type)


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and name.split(".")[-1] == "layers":
            yield from module


def _give_unused_parameters_a_gradient(model: nn.Module, inputs: Any, output: Any) -> None:
    """Makes all workers reduce the same parameters, whichever of them a batch happens to use.

    Without it the workers would wait for each other for ever: a tail of the adaptive softmax
    without a target in this batch gets no gradient on this worker, but does on another.
    """
    if not (model.training and torch.is_grad_enabled()):
        return
    for param in model.parameters():
        if param.requires_grad and param.grad is None and _is_whole(param):
            param.grad = torch.zeros_like(param)


def _is_whole(param: torch.Tensor) -> bool:
    """Tells whether this worker has a parameter's values now, of all or of its own share of tp."""
    return not isinstance(param, DTensor) or param.device_mesh.mesh_dim_names == ("tp",)


def _cut_whole_tensors(
    model: nn.Module, state_dict: dict[str, Any], prefix: str, *unused: Any
) -> None:
    for name, own in model.state_dict().items():
        given = state_dict.get(prefix + name)
        if not isinstance(given, torch.Tensor) or isinstance(given, DTensor):
            continue
        if isinstance(own, DTensor) and given.shape == own.shape:
            state_dict[prefix + name] = _cut_like(given, own)


def _cut_like(whole: torch.Tensor, like: DTensor, *, replicate: bool = False) -> DTensor:
    mesh = like.device_mesh
    placements = [Replicate()] * mesh.ndim if replicate else like.placements
    # Every worker holds the whole tensor, so nothing has to be sent.
    return distribute_tensor(whole.to(like.to_local().device), mesh, placements, src_data_rank=None)


def gather_whole(state: Any, *, keep: bool = True) -> Any:
    """Puts the tensors of nested containers together; every worker must call it.

    Args:
        state: state dict of a model or an optimizer.
        keep: whether this worker wants the result; the others get empty tensors.

    Returns:
        The same containers with plain tensors on the CPU.
    """
    if isinstance(state, DTensor):
        # Shards that were moved to the CPU are gathered where the group communicates.
        shard = cast(DTensor, state.to(state.device_mesh.device_type))
        whole = shard.full_tensor()
        return whole.detach().cpu() if keep else whole.new_empty(0, device="cpu")
    if isinstance(state, dict):
        return {key: gather_whole(value, keep=keep) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(gather_whole(value, keep=keep) for value in state)
    return state


def shard_optimizer_state(state: dict[str, Any], params: list[nn.Parameter]) -> dict[str, Any]:
    """Cuts the optimizer state that one process wrote as its parameters are cut.

    Args:
        state: `{"state": {index: {name: value}}, "param_groups": ...}` with whole tensors.
        params: the parameters in the optimizer's order.
    """
    cut = dict(state)
    cut["state"] = {
        index: {name: _cut_entry(value, params[int(index)]) for name, value in entries.items()}
        for index, entries in state["state"].items()
    }
    return cut


def _cut_entry(value: Any, param: nn.Parameter) -> Any:
    is_plain = isinstance(value, torch.Tensor) and not isinstance(value, DTensor)
    if not is_plain or not isinstance(param, DTensor) or value.dim() == 0:
        return value
    return _cut_like(value, param, replicate=value.shape != param.shape)


def local_grad_norm_aggregator(
    process_groups: Sequence[ProcessGroup | None], device: torch.device
) -> Any:
    """Returns the function that turns the norms of the workers' shards into the norm of all.

    Args:
        process_groups: the workers, one group for each axis over which gradients are cut; None is
            all processes.
        device: where the groups communicate.
    """

    def aggregate(norm: torch.Tensor) -> torch.Tensor:
        square = norm.detach().to(device, torch.float32) ** 2
        for group in process_groups:
            dist.all_reduce(square, group=group)
        return square.sqrt()

    return aggregate
