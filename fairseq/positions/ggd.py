"""A generalised Gaussian of distance as the prior of attention (arXiv:2505.22842)."""

from __future__ import annotations

import torch
from torch import nn

from fairseq.positions.alibi_slopes import alibi_slopes
from fairseq.positions.base import Surroundings, WeightedMethod
from fairseq.positions.distance_bias import DistanceBias, per_head

__all__ = ["GeneralisedGaussian"]

# exp of it is still a float32; no key with such a bias has any weight.
_LARGEST_EXPONENT = 80.0


class GeneralisedGaussian(WeightedMethod):
    """The bias -(d / alpha_h) ** beta_h with trained widths alpha and shapes beta.

    It starts at ALiBi: beta = 1, alpha = 1 / slope. Weights, (H,) each and 0 at first:
    `log_widths` (alpha = exp(log_widths) / slope) and `log_shapes` (beta = exp(log_shapes)).
    """

    name = "ggd"
    settings = ("alibi_bias_max",)

    def __init__(self, model: Surroundings) -> None:
        super().__init__(model)
        slopes = alibi_slopes(model.num_heads, model.settings.alibi_bias_max)
        self._log_slopes = torch.tensor(slopes, dtype=torch.float32, device="cpu").log()
        self.log_widths = nn.Parameter(torch.zeros(model.num_heads))
        self.log_shapes = nn.Parameter(torch.zeros(model.num_heads))

    def bias(self, sequence_length: int | None = None) -> DistanceBias:
        log_alpha = self.log_widths.float() - self._log_slopes.to(self.log_widths.device)
        beta = self.log_shapes.float().exp()
        return DistanceBias(_power, per_head(log_alpha), per_head(beta), is_learned=True)


def _power(distance: torch.Tensor, log_alpha: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    is_zero = distance == 0
    # The logarithm of 0, and its gradient, must not be computed at all.
    log_distance = distance.masked_fill(is_zero, 1.0).log()
    exponent = beta * (log_distance - log_alpha)
    return -exponent.clamp(max=_LARGEST_EXPONENT).exp().masked_fill(is_zero, 0.0)
