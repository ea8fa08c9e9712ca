"""Embeddings and output layers whose words are shared out over processes.

Every process holds V / tp rows, the last one fewer if that leaves a rest. Shapes: `N` tokens, `V`
words, `D` width.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ParallelStyle

from fairseq.distributed.vocabulary_scores import ScoresInParts, are_parts_wanted
from fairseq.model_parallel.shards import cut_parameter

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["VocabularyEmbedding", "VocabularyOutput", "sum_gradients"]


class VocabularyEmbedding(ParallelStyle):
    """Each process looks up the words it holds; the others' rows are zero, and all are added up.

    torch's RowwiseParallel hands a padding index on to each shard, where it is another word's.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        cut_parameter(module, "weight", device_mesh, Shard(0))
        vars(module)["forward"] = functools.partial(_look_up, module, device_mesh)
        return module


class VocabularyOutput(ParallelStyle):
    """Each process scores its words; the scores are gathered, unless parts are wanted.

    For layers that compute x W' + b with a parameter `weight` (V, D), of whatever class.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for name in ("weight", "bias"):
            if getattr(module, name, None) is not None:
                cut_parameter(module, name, device_mesh, Shard(0))
        module.register_forward_pre_hook(functools.partial(_enter, device_mesh))
        module.register_forward_hook(_leave)
        return module


def _enter(mesh: DeviceMesh, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (DTensor.from_local(inputs[0], mesh, [Replicate()], run_check=False), *inputs[1:])


def _leave(module: Any, inputs: Any, output: DTensor) -> torch.Tensor | ScoresInParts:
    mesh = output.device_mesh
    if are_parts_wanted():
        num_words = module.weight.size(0)
        return ScoresInParts(
            output.to_local(), mesh.get_group(), _first_word(num_words, mesh), num_words
        )
    gathered: torch.Tensor = output.redistribute(placements=[Replicate()]).to_local()
    return gathered


def _first_word(num_words: int, mesh: DeviceMesh) -> int:
    """Returns the first row of this process, V if it has none."""
    return min(mesh.get_local_rank() * -(-num_words // mesh.size()), num_words)


def _look_up(module: Any, mesh: DeviceMesh, tokens: torch.Tensor) -> torch.Tensor:
    """Embeds ids (...,) as (..., D)."""
    table = module.weight.to_local()
    start = _first_word(module.weight.size(0), mesh)
    row = tokens - start
    is_elsewhere = (row < 0) | (row >= len(table))
    padding = None if module.padding_idx is None else module.padding_idx - start
    if len(table) == 0:
        own = table.new_zeros(*tokens.shape, table.size(1)) + table.sum()
    else:
        own = F.embedding(
            row.masked_fill(is_elsewhere, 0),
            table,
            padding_idx=padding if padding is not None and 0 <= padding < len(table) else None,
        ).masked_fill(is_elsewhere.unsqueeze(-1), 0.0)
    total: torch.Tensor = _SumOutputs.apply(own, mesh.get_group())
    return total


def sum_gradients(x: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """Returns x; in the backward pass its gradients are summed over the group.

    For what all members hold alike and each uses for its own part of the result.
    """
    same: torch.Tensor = _SumGradients.apply(x, group)
    return same


class _SumGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _SumOutputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
        total = x.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        # All members have the same gradient, and each output row is one member's alone.
        return grads[0], None
