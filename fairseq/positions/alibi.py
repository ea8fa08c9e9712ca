"""ALiBi: attention with linear biases (Press, Smith, Lewis, ICLR 2022)."""

from __future__ import annotations

import torch
from torch import nn

from fairseq.attention import AttentionBias, LinearBias
from fairseq.positions.alibi_slopes import alibi_slopes
from fairseq.positions.base import Surroundings, WeightedMethod
from fairseq.positions.distance_bias import DistanceBias, per_head
from fairseq.positions.scaling import LengthScaling
from fairseq.positions.settings import INTERPOLATIONS

__all__ = ["Alibi", "interpolated"]


class Alibi(WeightedMethod):
    """Nothing is added to the embeddings; each head penalises distance by a slope of its own.

    The bias is -m_h d. In sequences longer than those in training by a factor a, slopes may be
    interpolated (linear: Al-Khateeb et al. 2023, arXiv:2310.13017; ntk: keezen/ntk_alibi).

    The model has position embeddings all the same, since published checkpoints have their key. No
    weights, unless slopes are trained: then `slope_log_factors` (H,), by whose exponentials the
    fixed slopes are multiplied, 0 at first.
    """

    name = "alibi"
    settings = (
        "alibi_bias_max",
        "alibi_learned_slopes",
        "alibi_interpolation",
        "alibi_interpolation_factor",
        "alibi_train_length",
    )
    has_table = True

    def __init__(self, model: Surroundings) -> None:
        super().__init__(model)
        cfg = model.settings
        slopes = alibi_slopes(model.num_heads, cfg.alibi_bias_max)
        self._slopes = torch.tensor(slopes, dtype=torch.float32, device="cpu")  # (H,)
        self._kind = cfg.alibi_interpolation
        self._scaling = LengthScaling(
            cfg.alibi_interpolation,
            INTERPOLATIONS,
            flag="--alibi-interpolation",
            prefix="--alibi",
            fixed_factor=cfg.alibi_interpolation_factor,
            train_length=_first(cfg.alibi_train_length, model.train_length),
        )
        self.depends_on_length = self._kind != "none"
        self.slope_log_factors: nn.Parameter | None = None
        if cfg.alibi_learned_slopes:
            self.slope_log_factors = nn.Parameter(torch.zeros(model.num_heads))
        self._factor, self._bias = 1.0, LinearBias(self._slopes)

    def bias(self, sequence_length: int | None = None) -> AttentionBias:
        factor = self._scaling.factor(sequence_length)
        if self.slope_log_factors is not None:
            slopes = self._slopes.to(self.slope_log_factors.device)
            slopes = slopes * self.slope_log_factors.float().exp()
            slopes = interpolated(slopes, factor, self._kind)
            return DistanceBias(_linear, per_head(slopes), is_learned=True)
        if factor != self._factor:
            slopes = interpolated(self._slopes, factor, self._kind)
            self._factor, self._bias = factor, LinearBias(slopes)
        return self._bias


def interpolated(slopes: torch.Tensor, factor: float, kind: str) -> torch.Tensor:
    """Returns slopes (H,) for sequences that are `factor` times as long as those in training.

    Args:
        slopes: those of training.
        factor: how much longer, a.
        kind: `none`; `linear`, m / a; or `ntk`, m / a ** (r / (H - 1)) with r the rank of the
            head by steepness, 0 for the steepest, which is not changed.
    """
    if kind == "linear":
        return slopes / factor
    if kind == "ntk":
        rank = slopes.detach().argsort(descending=True, stable=True).argsort()
        return slopes / factor ** (rank / max(len(slopes) - 1, 1))
    return slopes


def _linear(distance: torch.Tensor, slopes: torch.Tensor) -> torch.Tensor:
    return -slopes * distance


def _first(*values: int | None) -> int | None:
    return next((value for value in values if value is not None), None)
