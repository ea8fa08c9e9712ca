"""Adding up what the workers log: one reduction where the numbers can be summed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from fairseq.distributed.collectives import all_gather_list, all_reduce, all_reduce_dict
from fairseq.distributed.groups import get_rank, get_world_size

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["StatisticsSum", "check_gradient_norms"]

Outputs = list[dict[str, Any]]


class StatisticsSum:
    """Sums the logging outputs of micro-batches over the workers of a group.

    Args:
        group: the workers; None is a single one, whose outputs stay as they are.
        device: where the group reduces.
        summable: add the outputs key by key; otherwise every worker gets all of them.
        max_size: most bytes a worker may send if the outputs are not summable.
    """

    def __init__(
        self,
        group: ProcessGroup | None,
        device: torch.device,
        *,
        summable: bool,
        max_size: int,
    ) -> None:
        self.group = group
        self.device = device
        self.summable = summable
        self.max_size = max_size
        self._keys: list[str] = []

    def __call__(
        self, outputs: Outputs, counts: Mapping[str, float]
    ) -> tuple[Outputs, dict[str, float]]:
        """Returns the logging outputs of all workers, and `counts` summed over them.

        Args:
            outputs: those of this worker's real batches; an empty list is the neutral element.
            counts: further numbers to sum, the same keys on every worker.
        """
        if get_world_size(self.group) == 1:
            return outputs, dict(counts)
        return self._reduced(outputs, counts) if self.summable else self._gathered(outputs, counts)

    def expect_keys(self, output: Mapping[str, Any]) -> None:
        """Remembers what a logging output consists of, for workers that have none."""
        if not self._keys:
            self._keys = sorted(output)

    def _reduced(
        self, outputs: Outputs, counts: Mapping[str, float]
    ) -> tuple[Outputs, dict[str, float]]:
        if outputs:
            self.expect_keys(outputs[0])
        data: dict[str, Any] = {f"count {key}": value for key, value in counts.items()}
        for key in self._keys:
            data[f"output {key}"] = sum(output[key] for output in outputs if key in output)
        sums = all_reduce_dict(data, self.device, self.group)
        output = {key: sums[f"output {key}"] for key in self._keys}
        return [output], {key: sums[f"count {key}"] for key in counts}

    def _gathered(
        self, outputs: Outputs, counts: Mapping[str, float]
    ) -> tuple[Outputs, dict[str, float]]:
        parts = all_gather_list((outputs, dict(counts)), self.group, self.max_size)
        everything = [output for part, _ in parts for output in part]
        return everything, {key: float(sum(part[key] for _, part in parts)) for key in counts}


def check_gradient_norms(norm: torch.Tensor, group: ProcessGroup | None) -> None:
    """Makes sure that the workers agree on the gradient they are about to apply.

    Args:
        norm: this worker's norm of the combined gradient.
        group: the workers.

    Raises:
        FloatingPointError: the norms differ by more than 1e-6 of themselves.
    """
    world_size = get_world_size(group)
    if world_size == 1:
        return
    norms = torch.zeros(world_size, dtype=torch.float64, device=norm.device)
    norms[get_rank(group)] = norm
    norms = all_reduce(norms, group).cpu()
    if not torch.isfinite(norms).any():
        return
    if bool(((norms - norms[0]).abs() / (norms[0] + 1e-6) < 1e-6).all()):
        return
    table = "\n".join(f"rank {rank:3d} = {value:.8f}" for rank, value in enumerate(norms.tolist()))
    raise FloatingPointError(
        "Fatal error: gradients are inconsistent between workers. Try --ddp-backend=legacy_ddp, "
        f"and do not mix generations of GPUs. grad_norm across the workers:\n{table}"
    )
