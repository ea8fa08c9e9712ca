"""xPos: rotary position embeddings that fade with distance (Sun et al., arXiv:2212.10554)."""

from __future__ import annotations

import torch

from fairseq.attention import Positions
from fairseq.attention.coordinates import position_tensor
from fairseq.positions.rotary import frequencies
from fairseq.positions.turning import Tables, TurningMethod, angles_of

__all__ = ["XPos"]

_GAMMA = 0.4
_SCALE_BASE = 512.0


class XPos(TurningMethod):
    """Rotary embeddings, with the product of each pair of channels times zeta ** (distance / 512).

    zeta_k = (2 k / K + 0.4) / 1.4 for pair k of K / 2: queries are multiplied by
    zeta_k ** (position / 512), keys divided by it. Positions count from the middle of the sequence
    there, which changes no product, so that float16 holds sequences twice as long: in one of 8,000
    tokens the last key is multiplied by 18,000. No weights.
    """

    name = "xpos"
    settings = ("rotary_base",)
    depends_on_length = True

    def tables(
        self, positions: Positions, sequence_length: int | None, device: torch.device
    ) -> Tables:
        pairs = self._head_dim // 2
        speeds = frequencies(self._head_dim, self._base)
        zetas = [(k / pairs + _GAMMA) / (1 + _GAMMA) for k in range(pairs)]
        both = torch.tensor([speeds, zetas], dtype=torch.float32, device=device)
        angles = angles_of(positions, both[0])
        middle = (sequence_length or 0) // 2
        exponents = (position_tensor(positions, device) - middle) / _SCALE_BASE
        growth = angles_of(exponents, both[1].log()).exp()
        cos, sin = angles.cos(), angles.sin()
        return cos * growth, sin * growth, cos / growth, sin / growth
