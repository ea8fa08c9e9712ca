"""State that each head has of its own: every process takes its heads' part of the global one."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from fairseq.attention.head_share import HeadShare
from fairseq.model_parallel.policy import HeadState
from fairseq.model_parallel.shards import FileLayout
from fairseq.model_parallel.vocabulary import sum_gradients

if TYPE_CHECKING:
    from fairseq.model_parallel.undo import Undo

__all__ = ["cut_biases", "cut_head_state", "head_share"]


def head_share(num_heads: int, mesh: DeviceMesh) -> HeadShare:
    """Returns which of the heads this process computes."""
    each = num_heads // mesh.size()
    start = mesh.get_local_rank() * each
    enter = functools.partial(sum_gradients, group=mesh.get_group())
    return HeadShare(slice(start, start + each), enter)


def cut_head_state(
    name: str,
    layer: nn.Module,
    states: list[HeadState],
    num_heads: int,
    share: HeadShare,
    undo: Undo,
    layout: FileLayout,
) -> None:
    """Gives a layer the state of its own heads.

    Args:
        name: of the layer in the model.
        layer: gets hooks, and parts of its buffers.
        states: what there is.
        num_heads: of all processes.
        share: the heads of this one.
        undo: remembers the buffers.
        layout: likewise, for files.

    Raises:
        ValueError: the layer has no such buffer, or it has no axis for the heads.
    """
    for state in states:
        if state.argument:
            cut = functools.partial(_cut_argument, state, num_heads, share)
            layer.register_forward_pre_hook(cut, with_kwargs=True)
            continue
        path, _, attribute = state.buffer.rpartition(".")
        try:
            owner = layer.get_submodule(path)
            whole = getattr(owner, attribute)
        except AttributeError:
            if state.ignore_checker:
                continue
            raise ValueError(
                f"the policy names the buffer {state.buffer}, which {name} does not have; mend the "
                "name, or mark it with ignore_checker=True"
            ) from None
        layout.buffers[f"{name}.{state.buffer}"] = whole
        undo.set(owner, attribute, own_heads(whole, state.dim, num_heads, share).clone())


def cut_biases(model: nn.Module, share: HeadShare, undo: Undo) -> None:
    """Gives attention modules that `apply_alibi` has changed the bias of their own heads.

    Args:
        model: modules with an attribute `alibi` are changed; those that share one go on sharing.
        share: the heads of this process.
        undo: remembers the biases of all heads.
    """
    parts: dict[int, Any] = {}
    for module in model.modules():
        whole = vars(module).get("alibi")
        if whole is not None and hasattr(whole, "heads"):
            undo.set(module, "alibi", parts.setdefault(id(whole), whole.heads(share.heads)))


def _cut_argument(
    state: HeadState,
    num_heads: int,
    share: HeadShare,
    layer: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    whole = kwargs.get(state.argument)
    if isinstance(whole, torch.Tensor):
        kwargs = {**kwargs, state.argument: own_heads(whole, state.dim, num_heads, share)}
    return args, kwargs


def own_heads(whole: torch.Tensor, dim: int, num_heads: int, share: HeadShare) -> torch.Tensor:
    """Returns the part of a tensor for the heads of this process.

    Raises:
        ValueError: the axis is no multiple of the number of heads.
    """
    if whole.size(dim) % num_heads:
        raise ValueError(
            f"axis {dim} of a tensor {tuple(whole.shape)} is no axis of {num_heads} heads; mend "
            "the policy's head_state()"
        )
    if whole.requires_grad:
        whole = share.enter(whole)
    own = share.heads.stop - share.heads.start
    by_head = whole.unflatten(
        dim, (-1, num_heads)
    )  # rows in front of the heads, 1 if there are none
    axis = (dim if dim >= 0 else whole.dim() + dim) + 1
    return by_head.narrow(axis, share.heads.start, own).flatten(axis - 1, axis)
