"""Random numbers of processes that share a layer.

Between the column-wise and the row-wise projections each process computes heads and inner channels
of its own, so dropout there must differ; everywhere else all compute the same, so it must agree.
Source of the rule: Shoeybi et al. 2019, Megatron-LM (arXiv:1909.08053), section 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["OwnRandomness"]


class OwnRandomness:
    """From the first of some modules to the last, a process draws numbers of its own.

    The common generators go on as if nothing had been drawn but one number, and that only if
    something was drawn inside. So a pass without dropout is the one of a single process, and a pass
    that is computed again draws the same numbers again.

    Args:
        rank: of this process among those that share the layer.
        number: of the region within the model.
        device: where the region computes.
    """

    def __init__(self, rank: int, number: int, device: torch.device) -> None:
        self.rank = rank
        self.number = number
        self.device = device
        self._before: tuple[torch.Tensor, torch.Tensor | None] | None = None
        self._after_seeding: tuple[torch.Tensor, torch.Tensor | None] | None = None

    def between(self, starts: list[nn.Module], ends: list[nn.Module]) -> None:
        """Hooks the region's start behind each of some modules, and its end before others."""
        for start in starts:
            start.register_forward_hook(self._begin)
        for end in ends:
            end.register_forward_pre_hook(self._end)

    def _begin(self, module: nn.Module, *unused: Any) -> None:
        if not module.training or self._before is not None:
            return
        self._before = self._state()
        seed = int(torch.randint(2**62, ()))
        torch.manual_seed((seed + 1000003 * self.number + self.rank) % 2**63)
        self._after_seeding = self._state()

    def _end(self, *unused: Any) -> None:
        if self._before is None or self._after_seeding is None:
            return
        was_used = not _are_equal(self._state(), self._after_seeding)
        cpu, gpu = self._before
        torch.set_rng_state(cpu)
        if gpu is not None:
            torch.cuda.set_rng_state(gpu, self.device)
        self._before = self._after_seeding = None
        if was_used:
            torch.rand(())  # or the next pass would draw the same numbers here

    def _state(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        is_gpu = self.device.type == "cuda"
        gpu = torch.cuda.get_rng_state(self.device) if is_gpu else None
        return torch.get_rng_state(), gpu


def _are_equal(
    a: tuple[torch.Tensor, torch.Tensor | None], b: tuple[torch.Tensor, torch.Tensor | None]
) -> bool:
    return all(
        (x is None and y is None) or (x is not None and y is not None and torch.equal(x, y))
        for x, y in zip(a, b, strict=True)
    )
