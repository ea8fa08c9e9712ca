"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864), and how they are stretched."""

from __future__ import annotations

import math

import torch

from fairseq.attention import Positions
from fairseq.positions.base import Surroundings
from fairseq.positions.scaling import LengthScaling
from fairseq.positions.settings import ROTARY_SCALINGS
from fairseq.positions.turning import Tables, TurningMethod, angles_of

__all__ = ["Rotary", "frequencies"]

# YaRN keeps wavelengths that fit so often into the training length, and divides by the whole factor
# the frequencies of those that fit once at most.
_TURNS_KEPT = 32.0
_TURNS_DIVIDED = 1.0


class Rotary(TurningMethod):
    """Turns pair k of K / 2 by position times its frequency, base ** (-2 k / K).

    In sequences longer than those in training by a factor s, frequencies may be lowered:

    * linear: divided by s (Chen et al. 2023, arXiv:2306.15595);
    * ntk: those of the base times s ** (K / (K - 2)), so that the lowest is divided by s and the
      highest is kept (bloc97 2023);
    * yarn: between the two, by how many wavelengths fit into the training length, and queries and
      keys times 0.1 log(s) + 1 each (Peng et al. 2023, arXiv:2309.00071).

    No weights.
    """

    name = "rotary"
    settings = ("rotary_base", "rotary_scaling", "rotary_scaling_factor", "rotary_train_length")

    def __init__(self, model: Surroundings) -> None:
        super().__init__(model)
        cfg = model.settings
        by_hand = cfg.rotary_train_length
        self._kind = cfg.rotary_scaling
        self._scaling = LengthScaling(
            cfg.rotary_scaling,
            ROTARY_SCALINGS,
            flag="--rotary-scaling",
            prefix="--rotary",
            fixed_factor=cfg.rotary_scaling_factor,
            train_length=model.train_length if by_hand is None else by_hand,
        )
        if self._kind == "yarn":
            self._scaling.known_train_length()
        self.depends_on_length = self._kind != "none"

    def tables(
        self, positions: Positions, sequence_length: int | None, device: torch.device
    ) -> Tables:
        factor = self._scaling.factor(sequence_length)
        speeds = frequencies(
            self._head_dim,
            self._base,
            kind=self._kind,
            factor=factor,
            train_length=self._scaling.train_length,
        )
        angles = angles_of(positions, torch.tensor(speeds, dtype=torch.float32, device=device))
        strength = 0.1 * math.log(factor) + 1 if self._kind == "yarn" and factor > 1 else 1.0
        cos, sin = angles.cos() * strength, angles.sin() * strength
        return cos, sin, cos, sin


def frequencies(
    head_dim: int,
    base: float = 10000.0,
    *,
    kind: str = "none",
    factor: float = 1.0,
    train_length: int | None = None,
) -> list[float]:
    """Returns radians per position of each pair of channels, K / 2 doubles; see `Rotary`."""
    if kind == "ntk" and head_dim > 2:
        base *= factor ** (head_dim / (head_dim - 2))
    speeds = [base ** (-2 * k / head_dim) for k in range(head_dim // 2)]
    if kind == "linear":
        return [speed / factor for speed in speeds]
    if kind == "yarn":
        assert train_length is not None
        return [_by_parts(speed, factor, train_length) for speed in speeds]
    return speeds


def _by_parts(speed: float, factor: float, train_length: int) -> float:
    turns = train_length * speed / (2 * math.pi)
    kept = min(max((turns - _TURNS_DIVIDED) / (_TURNS_KEPT - _TURNS_DIVIDED), 0.0), 1.0)
    return speed * kept + speed / factor * (1 - kept)
