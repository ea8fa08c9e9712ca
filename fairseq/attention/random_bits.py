"""Which attention weights are dropped, from a fast generator.

torch's own generator costs more for an element than all the rest of attention. 16 bits an element
decide here, so that a rate is met to 1 in 65,536, and what is kept is scaled by the rate in effect:
the mean is unbiased.
"""

from __future__ import annotations

import numpy as np
import torch

__all__ = ["DropMask", "new_seed"]

_LEVELS = 1 << 16


def new_seed() -> int:
    """Draws a seed from torch's generator, so that `torch.manual_seed` settles what is dropped."""
    return int(torch.randint(2**63 - 1, ()))


class DropMask:
    """A stream of masks; the same seed and the same sizes give the same masks again.

    Args:
        rate: probability that an element is dropped, from 0 to 1.
        seed: a whole number from 0 on.

    Attributes:
        rate: probability in effect.
        scale: what kept elements are to be multiplied by.

    Raises:
        ValueError: the rate is not between 0 and 1.
    """

    def __init__(self, rate: float, seed: int) -> None:
        if not 0 <= rate <= 1:
            raise ValueError(f"--attention-dropout is {rate}; it must be between 0 and 1")
        level = round(rate * _LEVELS)
        self.rate = level / _LEVELS
        self.scale = 1 / (1 - self.rate) if level < _LEVELS else 0.0
        self._least_kept = level - _LEVELS // 2
        self._generator = np.random.SFC64(seed) if level else None

    def draw(self, like: torch.Tensor) -> torch.Tensor:
        """Returns a new tensor like the given one: 0 for what is dropped, else 1."""
        mask = torch.empty_like(like)
        if self._generator is None:
            return mask.fill_(1.0)
        raw = self._generator.random_raw(-(-like.numel() // 4))
        bits = torch.from_numpy(raw.view(np.int16))[: like.numel()].view(like.shape)
        return torch.ge(bits, self._least_kept, out=mask)
