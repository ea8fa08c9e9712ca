"""What the members of a group tell each other: tensors, dictionaries of numbers, objects."""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from fairseq.distributed.groups import get_rank, get_world_size

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "all_gather_list",
    "all_reduce",
    "all_reduce_dict",
    "broadcast_object",
    "gather_and_sum",
]

_OPERATIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
_BROADCAST_CHUNK = 1 << 28  # bytes


def all_reduce(
    tensor: torch.Tensor, group: ProcessGroup | None, op: str = "sum", async_op: bool = False
) -> Any:
    """Combines a tensor over a group in place.

    Args:
        tensor: same shape on every member.
        group: None leaves the tensor as it is.
        op: sum, max or min.
        async_op: return a handle whose `wait()` ends the operation, None without a group.
    """
    if op not in _OPERATIONS:
        raise ValueError(f"all_reduce: op is {op!r}, it must be one of {', '.join(_OPERATIONS)}")
    if group is None:
        return None if async_op else tensor
    handle = dist.all_reduce(tensor, op=_OPERATIONS[op], group=group, async_op=async_op)
    return handle if async_op else tensor


def all_reduce_dict(
    data: Mapping[str, Any], device: torch.device | str, group: ProcessGroup | None
) -> OrderedDict[str, float]:
    """Sums a dictionary of numbers over a group: one reduction, one copy to the host.

    Args:
        data: the same keys on every member; numbers or one-element tensors.
        device: where the group reduces (a GPU for NCCL).
        group: None only converts the values.

    Returns:
        The same keys in sorted order with float64 sums.
    """
    keys = sorted(data)
    on_host = [0.0 if torch.is_tensor(data[k]) else float(data[k]) for k in keys]
    sums = torch.tensor(on_host, dtype=torch.float64).to(device, non_blocking=True)
    for i, key in enumerate(keys):
        if torch.is_tensor(data[key]):
            sums[i] = data[key].detach().reshape(()).to(device=device, dtype=torch.float64)
    all_reduce(sums, group)
    return OrderedDict(zip(keys, sums.tolist(), strict=True))


def gather_and_sum(
    numbers: Sequence[float], device: torch.device | str, group: ProcessGroup | None
) -> list[float]:
    """Sums a list of numbers over a group, in float64."""
    sums = torch.tensor([float(n) for n in numbers], dtype=torch.float64, device=device)
    return all_reduce(sums, group).tolist()


def all_gather_list(
    data: Any, group: ProcessGroup | None = None, max_size: int = 16384
) -> list[Any]:
    """Returns every member's object, in the order of ranks.

    Args:
        data: anything that can be pickled.
        group: None returns a list of `data` alone.
        max_size: most bytes of a pickled object.

    Raises:
        ValueError: the object is larger than that.
    """
    if group is None:
        return [data]
    size = len(pickle.dumps(data))
    if size > max_size:
        raise ValueError(
            f"a worker has {size} bytes to tell the others, more than --all-gather-list-size "
            f"{max_size}; raise it to at least {size}"
        )
    gathered: list[Any] = [None] * get_world_size(group)
    dist.all_gather_object(gathered, data, group=group)
    return gathered


def broadcast_object(
    obj: Any,
    src_rank: int,
    group: ProcessGroup | None,
    dist_device: torch.device | str | None = None,
) -> Any:
    """Sends an object that may hold large tensors from one member to all.

    Args:
        obj: what the source sends; ignored elsewhere.
        src_rank: rank of the source within the group.
        group: None returns `obj`.
        dist_device: where the group communicates; None is the CPU.

    Returns:
        The source's object, its tensors on the CPU.
    """
    if group is None:
        return obj
    device = torch.device(dist_device or "cpu")
    source = dist.get_global_rank(group, src_rank)
    is_source = get_rank(group) == src_rank
    payload = _to_bytes(obj) if is_source else torch.empty(0, dtype=torch.uint8)
    length = torch.tensor([payload.numel()], dtype=torch.int64, device=device)
    dist.broadcast(length, src=source, group=group)
    if not is_source:
        payload = torch.empty(int(length.item()), dtype=torch.uint8)
    for start in range(0, payload.numel(), _BROADCAST_CHUNK):
        part = payload[start : start + _BROADCAST_CHUNK]
        on_device = part.to(device)
        dist.broadcast(on_device, src=source, group=group)
        if not is_source:
            part.copy_(on_device)
    return obj if is_source else _from_bytes(payload)


def _to_bytes(obj: Any) -> torch.Tensor:
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    return torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8).clone()


def _from_bytes(payload: torch.Tensor) -> Any:
    # A member of our own process group sent this; whatever came from a file was read by the
    # allow-list before.
    return torch.load(io.BytesIO(payload.numpy().tobytes()), map_location="cpu", weights_only=False)
