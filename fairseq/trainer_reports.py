"""What a trainer says of itself: precision, shared parameters, GPUs, the numbers of a step."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from fairseq.distributed import utils as distributed_utils

__all__ = [
    "LoggedValues",
    "log_gpus",
    "log_shared_parameters",
    "note_on_precision",
    "settle_precision",
]

# The trainer's own name: its log lines have always come from there.
logger = logging.getLogger("fairseq.trainer")

_HALF_FLAGS = ("fp16", "bf16", "memory_efficient_fp16", "memory_efficient_bf16")


def settle_precision(cfg: Any, on_cuda: bool) -> torch.dtype | None:
    """Returns the half-precision type to train in, None for float32.

    Without a GPU the flags are switched off in `cfg`, so that optimizer, log and checkpoint say
    what is done.
    """
    common = cfg.common
    if not (common.fp16 or common.bf16):
        return None
    if not on_cuda and not common.cpu_half:
        flag = "--fp16" if common.fp16 else "--bf16"
        logger.warning(
            f"{flag}: there is no GPU, and half precision is many times slower on a CPU, so this "
            "run trains in float32 (--cpu-half really uses half precision)"
        )
        for name in _HALF_FLAGS:
            setattr(common, name, False)
        cfg.distributed_training.fp16 = cfg.distributed_training.memory_efficient_fp16 = False
        return None
    return torch.float16 if common.fp16 else torch.bfloat16


def note_on_precision(device: torch.device, half_type: torch.dtype | None) -> None:
    """Logs whether the other precision would be faster on this GPU."""
    if device.type != "cuda":
        return
    has_fast_half = torch.cuda.get_device_capability(device)[0] >= 7
    if half_type is None and has_fast_half:
        logger.info("NOTE: your device may support faster training with --fp16")
    elif half_type is not None and not has_fast_half:
        logger.info("NOTE: your device does NOT support faster training with --fp16")


def log_shared_parameters(model: nn.Module) -> None:
    """Logs every further name of a parameter, in the order of the model."""
    first_names: dict[int, str] = {}
    shared: dict[str, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        first = first_names.setdefault(id(param), name)
        if first != name:
            shared.setdefault(first, []).append(name)
    for first in first_names.values():
        for other in shared.get(first, []):
            logger.info(f"detected shared parameter: {first} <- {other}")


def log_gpus(device: torch.device, group: Any, max_size: int) -> None:
    """Logs the GPUs of all workers; every worker must call it."""
    properties = torch.cuda.get_device_properties(device)
    mine = (properties.name, properties.major, properties.minor, properties.total_memory)
    gpus = distributed_utils.all_gather_list(mine, group, max_size)
    banner = f"***CUDA enviroments for all {len(gpus)} workers***"
    logger.info(banner)
    for rank, (name, major, minor, total) in enumerate(gpus):
        logger.info(
            f"rank {rank:3d}: capabilities = {major:2d}.{minor:<2d} ; "
            f"total memory = {total / 2**30:.3f} GB ; name = {name:40s}"
        )
    logger.info(banner)


class LoggedValues(Mapping[str, Any]):
    """What a step logged, as numbers to print.

    They are computed when they are first looked at: doing it in every step would make the host
    wait for the GPU.
    """

    _LEFT_OUT = ("ppl", "wps", "wpb", "bsz")

    def __init__(self, meters: Any, sample_size: float) -> None:
        self._meters = meters
        self._sample_size = sample_size
        self._values: dict[str, Any] | None = None

    def _computed(self) -> dict[str, Any]:
        if self._values is None:
            smoothed = self._meters.get_smoothed_values()
            self._values = {k: v for k, v in smoothed.items() if k not in self._LEFT_OUT}
            self._values["sample_size"] = self._sample_size
        return self._values

    def __getitem__(self, key: str) -> Any:
        return self._computed()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._computed())

    def __len__(self) -> int:
        return len(self._computed())
