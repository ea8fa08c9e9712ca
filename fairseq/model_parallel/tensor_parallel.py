"""Weights of a model cut over processes, as its policy says, and put together again.

A policy becomes a plan of torch's parallel styles: `ColwiseParallel` for what goes into heads and
inner channels, `RowwiseParallel` for what comes out of them. Parameters that are cut are DTensors
afterwards; the others lie on every process, with the same gradient.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module

from fairseq.distributed.fsdp import (
    accept_whole_tensors,
    gather_whole,
    local_grad_norm_aggregator,
)
from fairseq.distributed.groups import get_mesh
from fairseq.model_parallel.head_state import cut_biases, cut_head_state, head_share
from fairseq.model_parallel.layer_plan import layer_plan, replace_parts
from fairseq.model_parallel.policies import find_policy
from fairseq.model_parallel.policy import Layer, Policy, check_heads
from fairseq.model_parallel.randomness import OwnRandomness
from fairseq.model_parallel.shards import FileLayout, is_cut_over
from fairseq.model_parallel.undo import Undo
from fairseq.model_parallel.vocabulary import VocabularyEmbedding, VocabularyOutput
from fairseq.optim import grad_norm

__all__ = [
    "apply_tensor_parallel",
    "clip_grad_norm_",
    "file_layout",
    "has_reordered_rows",
    "is_tensor_parallel",
    "mark_copies",
    "undo_tensor_parallel",
    "whole_state_dict",
]

_RECORD = "_tensor_parallel"


@dataclass
class _Record:
    """What is needed to make a cut model whole again."""

    policy: type[Policy]
    undo: Undo
    layout: FileLayout = field(default_factory=FileLayout)


def apply_tensor_parallel(
    model: nn.Module, mesh: DeviceMesh, policy: type[Policy] | None = None
) -> None:
    """Cuts a model over processes, in place.

    Args:
        model: the same on every process, on its device.
        mesh: the processes, one axis.
        policy: how; None looks one up for the model's layers.

    Raises:
        ValueError: there is no policy for the model, heads or widths do not divide, or a rule of
            the policy matches nothing.
    """
    if is_tensor_parallel(model):
        raise ValueError("the model's weights are cut over processes already; undo that first")
    policy = find_policy(model) if policy is None else policy
    config, world_size = policy.config(model), mesh.size()
    heads = policy.heads(config)
    check_heads(heads, world_size)
    layers = _layers(model, policy)
    num_heads = max(heads.values())
    share = head_share(num_heads, mesh)
    record = _Record(policy, Undo(model))
    ties = _ties(model)
    device = next(model.parameters()).device
    try:
        for number, (name, layer) in enumerate(layers.items()):
            arguments = policy.replace_arguments(config, world_size)
            replace_parts(name, layer, policy, arguments, record.undo)
            parallelize_module(layer, mesh, layer_plan(name, layer, policy, mesh, record.layout))
            states = policy.head_state()
            cut_head_state(name, layer, states, num_heads, share, record.undo, record.layout)
            _draw_apart(layer, policy, mesh.get_local_rank(), number, device)
        cut_biases(model, share, record.undo)
        _cut_vocabulary(model, policy, mesh)
        _tie_again(model, ties)
    except ValueError:
        record.undo.take_back(None)
        raise
    policy.install(model, share)
    accept_whole_tensors(model)
    record.undo.free()
    vars(model)[_RECORD] = record


def is_tensor_parallel(model: nn.Module) -> bool:
    """Tells whether `apply_tensor_parallel` has cut this model."""
    return _RECORD in vars(model)


def has_reordered_rows(model: nn.Module) -> bool:
    """Tells whether fused weights have their rows in an order that depends on the mesh."""
    record: _Record | None = vars(model).get(_RECORD)
    return record is not None and bool(record.layout.orders)


def undo_tensor_parallel(model: nn.Module) -> None:
    """Gathers a model's weights and makes it what it was; every process must call it.

    Raises:
        ValueError: the model is not cut.
    """
    values = whole_state_dict(model)
    record: _Record = vars(model).pop(_RECORD)
    record.undo.take_back(values)
    record.policy.install(model, None)


def whole_state_dict(model: nn.Module, *, keep: bool = True) -> dict[str, torch.Tensor]:
    """Returns the state dict that the model had in one process; every process must call it.

    Args:
        model: cut by `apply_tensor_parallel`, and perhaps by FSDP2 too.
        keep: whether this process wants it; the others get empty tensors.

    Raises:
        ValueError: the model is not cut.
    """
    record: _Record | None = vars(model).get(_RECORD)
    if record is None:
        raise ValueError("the model's weights are not cut over processes")
    state: dict[str, torch.Tensor] = gather_whole(dict(model.state_dict()), keep=keep)
    if keep:
        record.layout.restore(state)
    return state


def file_layout(model: nn.Module) -> FileLayout:
    """Returns how the parameters of a cut model, put together, differ from those of the whole."""
    record: _Record = vars(model)[_RECORD]
    return record.layout


def mark_copies(params: Iterable[nn.Parameter], mesh: DeviceMesh | None = None) -> None:
    """Sets `num_copies` of parameters that lie whole on every process of an axis.

    Each of them has the same gradient there, which must enter the norm of all gradients once.

    Args:
        params: of a cut model.
        mesh: the axis; None is tp of the run's mesh.
    """
    mesh = get_mesh().submesh("tp") if mesh is None else mesh
    axis = (mesh.mesh_dim_names or ("tp",))[0]
    for param in params:
        if not is_cut_over(param, axis):
            vars(param)["num_copies"] = mesh.size()


def clip_grad_norm_(
    params: Iterable[nn.Parameter], max_norm: float, mesh: DeviceMesh
) -> torch.Tensor:
    """Clips the gradients of a cut model; every process must call it.

    Args:
        params: those of the model.
        max_norm: see `fairseq.optim.grad_norm.clip_grad_norm_`.
        mesh: the one that the model is cut over.

    Returns:
        The norm of the gradients of all processes before that.
    """
    params = list(params)
    mark_copies(params, mesh)
    device = params[0].device
    return grad_norm.clip_grad_norm_(
        params, max_norm, local_grad_norm_aggregator([mesh.get_group()], device)
    )


def _layers(model: nn.Module, policy: type[Policy]) -> dict[str, nn.Module]:
    layer_class = policy.original_layer_class()
    found = {n: module for n, module in model.named_modules() if isinstance(module, layer_class)}
    if not found:
        raise ValueError(
            f"{policy.__name__} is for layers of class {layer_class.__name__}, but "
            f"{type(model).__name__} has none"
        )
    return found


def _draw_apart(
    layer: nn.Module, policy: type[Policy], rank: int, number: int, device: torch.device
) -> None:
    """Lets each process draw its own random numbers for its heads and inner channels."""
    for kind, (starts, ends) in enumerate(
        [(policy.attn_qkv(), policy.attn_out()), (policy.mlp_in(), policy.mlp_out())]
    ):
        randomness = OwnRandomness(rank, 2 * number + kind, device)
        randomness.between(_modules(layer, starts), _modules(layer, ends))


def _modules(layer: nn.Module, rules: list[Layer]) -> list[nn.Module]:
    named = dict(layer.named_modules())
    return [named[rule.module] for rule in rules if rule.module in named]


def _cut_vocabulary(model: nn.Module, policy: type[Policy], mesh: DeviceMesh) -> None:
    for name in policy.embeddings(model):
        parallelize_module(model.get_submodule(name), mesh, VocabularyEmbedding())
    for name in policy.outputs(model):
        parallelize_module(model.get_submodule(name), mesh, VocabularyOutput())


def _ties(model: nn.Module) -> list[list[tuple[nn.Module, str]]]:
    """Returns the places of each parameter that has several."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, param in module._parameters.items():
            if param is not None:
                places.setdefault(id(param), []).append((module, name))
    return [each for each in places.values() if len(each) > 1]


def _tie_again(model: nn.Module, ties: list[list[tuple[nn.Module, str]]]) -> None:
    for places in ties:
        params = [getattr(module, name) for module, name in places]
        cut = [param for param in params if isinstance(param, DTensor)]
        if len({param.placements for param in cut}) > 1:
            raise ValueError(
                f"the policy cuts one parameter of {type(model).__name__} in two ways, "
                f"{' and '.join(str(param.placements) for param in cut)}; name layers that share "
                "it as of one kind"
            )
        # A place that is not named may only hold it, as BERT's head holds its decoder's bias.
        for module, name in places:
            setattr(module, name, cut[0] if cut else params[0])
