"""One sequence over several processes: a model is made to compute its part of every sequence.

Everything but attention works on each token alone, so a process computes it for its own columns.
What tokens know of order (positions, documents, padding) follows from the whole row of ids, which
every process has; in attention the parts meet, see `fairseq/model_parallel/sequence_attention.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fairseq import utils
from fairseq.attention import AttentionBackend
from fairseq.distributed.groups import get_world_size
from fairseq.model_parallel.collectives import total
from fairseq.model_parallel.layout import SequenceLayout
from fairseq.model_parallel.sequence_attention import SCHEMES, sequence_backend
from fairseq.model_parallel.sequence_batch import apply_sequence_parallelism, pad_columns
from fairseq.model_parallel.sequence_outputs import in_order

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["SequenceParallelContextManager", "apply_sequence_parallelism", "sequence_group"]

_AXES = ("sp", "cp")
_SEED_STEP = 100_000_007


class SequenceParallelContextManager:
    """While it is open, every process of a group computes its part of each sequence.

    A model called with whole sequences, the same on every process of the group, computes this
    process's columns. For our models `cut` cuts a batch with its targets likewise: a criterion's
    loss is then a sum over a process's own targets. Models of transformers, after `apply_alibi`,
    take whole batches with `labels`, and their loss is that of the whole batch on every process.

    Gradients: summed over the group, a parameter's gradients are those of the sum of the processes'
    losses; averaged, as data parallelism over the group does, those of their mean.

    Example:
        with SequenceParallelContextManager([model], 4, ring_attn_func="ring") as sequence:
            sample = sequence.cut(sample)
            loss, sample_size, log = criterion(model, sample)

    Args:
        models: a model or several; they may be wrapped for data parallelism.
        sequence_parallel_degree: processes that share a sequence.
        gradient_accumulation_steps: see `apply_sequence_parallelism`.
        ring_attn_func: `allgather`, `ring` or `ulysses`; also `varlen_llama3` and `batch_ring`.
        heads_k_stride: with `allgather`, heads whose keys are gathered at once; None is all.
        gather_outputs: models return the outputs of all columns, in order and without padding.
        device_mesh: has the processes along an axis `sp` or `cp`; None puts neighbours together.
        context_parallel_size: another name of the degree.
        layout: `contiguous`, or `zigzag`, which balances causal attention.

    Raises:
        ValueError: settings contradict each other, or fit neither the processes nor the models.
    """

    def __init__(
        self,
        models: nn.Module | Sequence[nn.Module],
        sequence_parallel_degree: int | None = None,
        gradient_accumulation_steps: int = 1,
        ring_attn_func: str | None = "allgather",
        heads_k_stride: int | None = None,
        gather_outputs: bool = False,
        device_mesh: DeviceMesh | None = None,
        *,
        context_parallel_size: int | None = None,
        layout: str = "contiguous",
    ) -> None:
        self.models = [models] if isinstance(models, nn.Module) else list(models)
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.scheme = ring_attn_func or "allgather"
        if self.scheme not in SCHEMES:
            raise ValueError(
                f"ring_attn_func is {ring_attn_func!r}; it must be one of {', '.join(SCHEMES)}"
            )
        self.heads_k_stride = heads_k_stride
        self.gather_outputs = gather_outputs
        size = _degree(sequence_parallel_degree, context_parallel_size, device_mesh)
        self.layout = SequenceLayout(size, layout)
        self.group = sequence_group(size, device_mesh)
        self.rank = 0 if self.group is None else dist.get_rank(self.group)
        self._changes: list[Any] = []
        self._generators: list[tuple[Any, torch.Generator]] = []

    def __enter__(self) -> SequenceParallelContextManager:
        if self.group is None:
            return self
        try:
            for model in self.models:
                self._changes += self._changes_of(model)
        except BaseException:
            self.__exit__()
            raise
        for module in _modules_that_draw(self.models):
            module.generator = torch.Generator()
            self._generators.append((module, module.generator))
        return self

    def _changes_of(self, model: nn.Module) -> list[Any]:
        changes: list[Any] = [_DecoderChange(each, self) for each in _decoders(model)]
        if any(hasattr(module, "alibi") for module in model.modules()):
            # By its name, since it is a floor above this one and needs an optional library.
            others = import_module("fairseq.huggingface.sequence_parallel")
            changes += [others.SharedModel(each, self) for each in others.find_models(model)]
        if not changes:
            raise ValueError(
                f"{type(model).__name__} attends neither by a backend of fairseq.attention nor by "
                "ALiBi in a model of transformers, so no sequence can be cut for it; build it with "
                "--arch transformer_lm, or call fairseq.huggingface.apply_alibi first"
            )
        return changes

    def __exit__(self, *exception: object) -> None:
        for change in self._changes:
            change.undo()
        for module, _ in self._generators:
            module.generator = None
        self._changes, self._generators = [], []

    def cut(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Returns this process's part of a batch; see `apply_sequence_parallelism`."""
        if self.group is None:
            return dict(batch)
        part, _, _ = apply_sequence_parallelism(
            batch,
            self.rank,
            self.layout.size,
            self.gradient_accumulation_steps,
            layout=self.layout.kind,
            padding_idx=next((each.padding_idx for each in self._changes), 1),
        )
        return part

    def total(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the sum of a tensor over the group, with the gradient of each one's sum."""
        return total(x, self.group)

    def seed(self, seed: int) -> None:
        """Seeds torch's generators: dropout differs between the processes of a group.

        Which layers are left out (`--decoder-layerdrop`) does not, since their attention is
        computed together.
        """
        utils.set_torch_seed((seed + self.rank * _SEED_STEP) % 2**63)
        for _, generator in self._generators:
            generator.manual_seed(seed)


class _DecoderChange:
    """Makes one of our decoders compute its process's columns, until it is undone.

    Args:
        decoder: has a `backend`; its forward pass takes `columns`.
        how: group, layout and the rest.
    """

    def __init__(self, decoder: Any, how: SequenceParallelContextManager) -> None:
        assert how.group is not None
        self.decoder = decoder
        self.padding_idx: int = decoder.padding_idx
        self.how = how
        self.group = how.group
        self._original = decoder.backend
        self._length = 0
        decoder.backend = sequence_backend(
            how.scheme,
            decoder.backend,
            how.group,
            how.layout,
            heads_k_stride=how.heads_k_stride,
        )
        self._handles = [decoder.register_forward_pre_hook(self._cut, with_kwargs=True)]
        if how.gather_outputs:
            self._handles.append(decoder.register_forward_hook(self._gather))

    def undo(self) -> None:
        """Leaves the decoder as it was."""
        self.decoder.backend = self._original
        for handle in self._handles:
            handle.remove()

    def _cut(self, _: nn.Module, args: Any, kwargs: Any) -> tuple[Any, dict[str, Any]]:
        kwargs = dict(kwargs)
        tokens, *others = args if args else [kwargs.pop("prev_output_tokens")]
        self._length = kwargs.get("sequence_length") or tokens.size(1)
        if kwargs.get("columns") is None:
            length = self.how.layout.padded(tokens.size(1))
            kwargs["columns"] = self.how.layout.columns(self.how.rank, length)
            if length > tokens.size(1):
                # Position methods that adapt to length must not count what is added here.
                kwargs.setdefault("sequence_length", tokens.size(1))
            tokens = pad_columns(tokens, length, self.padding_idx)
        if self.decoder.sequence_length is not None and "sequence_length" in kwargs:
            kwargs["sequence_length"] = self.decoder.sequence_length
        return (tokens, *others), kwargs

    def _gather(self, _: nn.Module, args: Any, output: tuple[torch.Tensor, Any]) -> Any:
        features, extra = output
        return in_order(features, self.group, self.how.layout)[:, : self._length], extra


def sequence_group(size: int, device_mesh: DeviceMesh | None = None) -> ProcessGroup | None:
    """Returns the processes that share a sequence with this one; None if it has its own.

    Without a mesh the groups are made here, of neighbours, so that all processes must call it.

    Args:
        size: processes for a sequence.
        device_mesh: has them along an axis `sp` or `cp`.

    Raises:
        ValueError: the number of processes is no multiple of it, or the mesh has no such axis.
    """
    if device_mesh is not None:
        return device_mesh[_axis(device_mesh)].get_group() if size > 1 else None
    world_size = get_world_size(dist.group.WORLD if dist.is_initialized() else None)
    if world_size % size:
        fitting = ", ".join(str(n) for n in range(1, world_size + 1) if world_size % n == 0)
        raise ValueError(
            f"{size} processes are to share a sequence, but that does not divide the {world_size} "
            f"of this run; use {fitting}"
        )
    if size == 1:
        return None
    if size == world_size:
        return dist.group.WORLD
    device_type = "cuda" if dist.get_backend() == "nccl" else "cpu"
    mesh = init_device_mesh(device_type, (world_size // size, size), mesh_dim_names=("dp", "sp"))
    return mesh["sp"].get_group()


def _axis(device_mesh: DeviceMesh) -> str:
    names = device_mesh.mesh_dim_names or ()
    for axis in _AXES:
        if axis in names:
            return axis
    raise ValueError(
        f"device_mesh has the axes {tuple(names)}; one must be named {' or '.join(_AXES)}"
    )


def _degree(degree: int | None, alias: int | None, device_mesh: DeviceMesh | None) -> int:
    given = {each for each in (degree, alias) if each is not None}
    if device_mesh is not None:
        given.add(device_mesh[_axis(device_mesh)].size())
    if len(given) != 1:
        raise ValueError(
            f"sequence_parallel_degree is {degree}, context_parallel_size {alias}"
            + ("" if device_mesh is None else f", and the mesh is {device_mesh}")
            + "; give one of them, or the same number"
        )
    return given.pop()


def _decoders(model: nn.Module) -> Iterable[Any]:
    for module in model.modules():
        if isinstance(getattr(module, "backend", None), AttentionBackend):
            yield module


def _modules_that_draw(models: Iterable[nn.Module]) -> Iterable[Any]:
    """Yields modules whose draws all processes must share."""
    for model in models:
        for module in model.modules():
            if hasattr(module, "generator"):
                yield module
