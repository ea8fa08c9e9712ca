"""From the rules of a policy to torch's parallel styles, for one layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

from fairseq.model_parallel.policy import Layer, Policy
from fairseq.model_parallel.shards import FileLayout, cut_parameter, process_major_order

__all__ = ["layer_plan", "replace_parts"]

COLUMNS, ROWS = 0, 1  # the axis of a weight (out, in) that is cut


def replace_parts(
    name: str, layer: nn.Module, policy: type[Policy], arguments: dict[str, Any], undo: Any
) -> None:
    """Gives a layer the classes and numbers that it has when it is cut.

    Args:
        name: of the layer in the model.
        layer: changed in place.
        policy: names the classes.
        arguments: new values, by dotted names.
        undo: remembers what was there.

    Raises:
        ValueError: the layer has no such attribute.
    """
    classes = policy.replace_modules()
    for module in layer.modules():
        if type(module).__name__ in classes:
            module.__class__ = classes[type(module).__name__]
    for path, value in arguments.items():
        owner_path, _, attribute = path.rpartition(".")
        owner = _find(layer, owner_path)
        if owner is None or not hasattr(owner, attribute):
            raise ValueError(f"the policy replaces {path}, which {name} does not have")
        undo.set(owner, attribute, value)


def layer_plan(
    name: str, layer: nn.Module, policy: type[Policy], mesh: DeviceMesh, layout: FileLayout
) -> dict[str, ParallelStyle]:
    """Cuts the parameters that a policy names; returns the styles to run their modules with.

    Args:
        name: of the layer in the model.
        layer: changed in place.
        policy: the rules.
        mesh: the processes, one axis.
        layout: is told how cut parameters differ from those of the whole model.

    Raises:
        ValueError: a rule matches nothing, or a width cannot be shared.
    """
    plan: dict[str, ParallelStyle] = {}
    for rule in [*policy.attn_qkv(), *policy.mlp_in()]:
        if _cut(name, layer, rule, mesh, layout, COLUMNS):
            plan[rule.module] = ColwiseParallel()
    for rule in [*policy.attn_out(), *policy.mlp_out()]:
        if _cut(name, layer, rule, mesh, layout, ROWS):
            plan[rule.module] = RowwiseParallel()
    if not plan:
        raise ValueError(f"{policy.__name__} names no weight of {name}; nothing would be cut")
    return plan


def _cut(
    name: str, layer: nn.Module, rule: Layer, mesh: DeviceMesh, layout: FileLayout, dim: int
) -> bool:
    """Cuts the parameters of a rule; False if it matches nothing and may."""
    found = _find(layer, rule.module)
    if found is None or getattr(found, rule.weight.rpartition(".")[2], None) is None:
        if rule.ignore_checker:
            return False
        raise ValueError(
            f"the policy names {rule.weight}, which {name} does not have; mend the name, or mark "
            "it with ignore_checker=True"
        )
    path = f"{name}.{rule.module}"
    module = _to_cut(path, found, rule)
    parent, _, last = rule.module.rpartition(".")
    setattr(layer.get_submodule(parent), last, module)
    if rule.reversed:
        layout.reversed.add(f"{path}.weight")
    _check_width(path, module, rule, mesh.size(), dim)
    if dim == COLUMNS and rule.n_fused > 1 and rule.layout == "parts":
        _reorder(path, module, rule.n_fused, mesh.size(), layout)
    cut_parameter(module, "weight", mesh, Shard(dim))
    if module.bias is not None:
        cut_parameter(module, "bias", mesh, Shard(0) if dim == COLUMNS else Replicate())
    return True


def _find(layer: nn.Module, path: str) -> nn.Module | None:
    try:
        return layer.get_submodule(path)
    except AttributeError:
        return None


def _to_cut(path: str, found: nn.Module, rule: Layer) -> nn.Linear:
    """Returns the linear map that takes the place of what was found."""
    module = _as_linear(found) if rule.reversed else found
    module = module if rule.replace is None else rule.replace(module)
    if not isinstance(module, nn.Linear):
        raise ValueError(
            f"{path} is a {type(module).__name__}, which cannot be cut; set reversed=True for a "
            "weight (in, out), or replace=function that makes an nn.Linear of it"
        )
    return module


def _as_linear(module: Any) -> nn.Linear:
    """Returns an `nn.Linear` that computes what a module with weight (in, out) does."""
    weight, bias = module.weight, getattr(module, "bias", None)
    linear = nn.Linear(weight.size(0), weight.size(1), bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach().t().contiguous(), weight.requires_grad)
    if bias is not None:
        linear.bias = bias
    return linear.train(module.training)


def _check_width(path: str, module: nn.Linear, rule: Layer, world_size: int, dim: int) -> None:
    width = module.weight.size(dim)
    if width % (rule.n_fused * world_size):
        parts = f" in {rule.n_fused} parts" if rule.n_fused > 1 else ""
        raise ValueError(
            f"{path} has a width of {width}{parts}, which {world_size} processes cannot share "
            "evenly (--tensor-parallel-size, num_gpus)"
        )


def _reorder(
    path: str, module: nn.Linear, n_fused: int, world_size: int, layout: FileLayout
) -> None:
    """Makes the rows that a process gets neighbours."""
    order = process_major_order(module.out_features, n_fused, world_size)
    for kind in ("weight", "bias"):
        param: torch.Tensor | None = getattr(module, kind)
        if param is not None:
            layout.orders[f"{path}.{kind}"] = order
            values = param.detach()[order.to(param.device)]
            setattr(module, kind, nn.Parameter(values, param.requires_grad))
