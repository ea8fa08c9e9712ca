"""The factor that keeps half-precision gradients in range."""

from __future__ import annotations

import math

import torch

__all__ = ["DynamicLossScaler"]


class DynamicLossScaler:
    """A loss scale that halves on overflow and doubles after a run of good updates.

    Args:
        init_scale: scale to start with.
        scale_factor: factor of each change.
        scale_window: good updates before the scale grows; less than 1 counts as 1.
        tolerance: share of overflows since the last change of scale that is let pass.
        threshold: the scale is not lowered below this; None sets no bound.
        min_loss_scale: an overflow that would need a scale this low ends training.
    """

    def __init__(
        self,
        init_scale: float = 2.0**15,
        scale_factor: float = 2.0,
        scale_window: int = 2000,
        tolerance: float = 0.0,
        threshold: float | None = None,
        min_loss_scale: float = 1e-4,
    ) -> None:
        self.loss_scale = float(init_scale)
        self.scale_factor = scale_factor
        self.scale_window = max(1, scale_window)
        self.tolerance = tolerance
        self.threshold = threshold
        self.min_loss_scale = min_loss_scale
        self._iter = 0
        self._last_overflow_iter = -1
        self._last_rescale_iter = -1
        self._overflows_since_rescale = 0

    def state_dict(self) -> dict[str, float | int]:
        """Returns the scale and the counters that the next change of scale depends on."""
        return {
            "loss_scale": self.loss_scale,
            "iter": self._iter,
            "last_overflow_iter": self._last_overflow_iter,
            "last_rescale_iter": self._last_rescale_iter,
            "overflows_since_rescale": self._overflows_since_rescale,
        }

    def load_state_dict(self, state_dict: dict[str, float | int]) -> None:
        """Restores what `state_dict` returned."""
        self.loss_scale = float(state_dict["loss_scale"])
        self._iter = int(state_dict["iter"])
        self._last_overflow_iter = int(state_dict["last_overflow_iter"])
        self._last_rescale_iter = int(state_dict["last_rescale_iter"])
        self._overflows_since_rescale = int(state_dict["overflows_since_rescale"])

    def scale(self, outputs: torch.Tensor) -> torch.Tensor:
        """Multiplies a loss by the scale."""
        return self.loss_scale * outputs

    def update(self) -> None:
        """Counts a good update; every `scale_window` of them since an overflow raise the scale."""
        if (self._iter - self._last_overflow_iter) % self.scale_window == 0:
            self.loss_scale *= self.scale_factor
            self._last_rescale_iter = self._iter
        self._iter += 1

    def check_overflow(self, grad_norm: float | torch.Tensor) -> None:
        """Lowers the scale if the norm is not finite.

        Raises:
            OverflowError: it is not; this update must be left out.
            FloatingPointError: it is not, and the scale is as low as it may become.
        """
        if math.isfinite(float(grad_norm)):
            return
        scale_before = self.loss_scale
        since_rescale = self._iter - self._last_rescale_iter
        self._last_overflow_iter = self._iter
        self._overflows_since_rescale += 1
        if self._overflows_since_rescale / since_rescale >= self.tolerance:
            self._lower()
        if self.loss_scale <= self.min_loss_scale:
            self.loss_scale = scale_before
            raise FloatingPointError(
                f"Minimum loss scale reached ({self.min_loss_scale}): gradients overflow at any "
                "scale, so the loss is probably exploding. Lower --lr, set --clip-norm, or use "
                "larger batches"
            )
        self._iter += 1
        raise OverflowError(f"setting loss scale to: {self.loss_scale}")

    def _lower(self) -> None:
        lowered = self.loss_scale / self.scale_factor
        self.loss_scale = lowered if self.threshold is None else max(lowered, self.threshold)
        self._last_rescale_iter = self._iter
        self._overflows_since_rescale = 0
