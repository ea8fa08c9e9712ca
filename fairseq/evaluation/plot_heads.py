"""The picture of a diagnosis: one heat map of layers and heads for each figure."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fairseq.evaluation.plot import pyplot

if TYPE_CHECKING:
    from fairseq.evaluation.diagnostics import Diagnosis

__all__ = ["plot_heads"]

# Field, title, and limits of the colours (None: what the figures span).
_PANELS: list[tuple[str, str, tuple[float, float] | None]] = [
    ("mean_distance", "mean distance [tokens]", None),
    ("span90", "90 % of the weight lies within [tokens]", None),
    ("entropy_relative", "entropy / that of equal weights", (0.0, 1.0)),
    ("first_token_mass", "weight of the first token", (0.0, 1.0)),
    ("zero_float32", "weights exactly 0 in float32", (0.0, 1.0)),
    ("zero_bfloat16", "weights exactly 0 in bfloat16", (0.0, 1.0)),
    ("zero_float16", "weights exactly 0 in float16", (0.0, 1.0)),
    ("score_bound", "R = max|q| max|k| / sqrt(d)", None),
]

# More cells than this, and numbers in them could not be read.
_MOST_COLUMNS_WITH_NUMBERS = 16


def plot_heads(diagnosis: Diagnosis, title: str, path: Path) -> None:
    """Draws a diagnosis.

    Args:
        diagnosis: figures of all heads.
        title: what was diagnosed on what.
        path: file to write; its suffix is the format.

    Raises:
        ImportError: matplotlib is not installed.
    """
    plt = pyplot()
    num_layers = diagnosis.heads[-1].layer + 1
    num_heads = diagnosis.heads[-1].head + 1
    width = min(12.0, max(3.6, 0.5 * num_heads + 1.6))
    height = min(9.0, max(2.2, 0.36 * num_layers + 1.2))
    figure = plt.figure(figsize=(4 * width, 2 * height + 0.6), layout="constrained")
    figure.suptitle(title)
    for axes, (field, name, limits) in zip(figure.subplots(2, 4).flat, _PANELS, strict=True):
        values = np.array([getattr(head, field) for head in diagnosis.heads], dtype=float)
        _draw(axes, values.reshape(num_layers, num_heads), name, limits)
        if field in diagnosis.uniform:
            axes.set_xlabel(f"head (equal weights: {_short(diagnosis.uniform[field])})")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw(axes: Any, values: np.ndarray, name: str, limits: tuple[float, float] | None) -> None:
    low, high = limits or (0.0, float(values.max()) or 1.0)
    image = axes.imshow(values, vmin=low, vmax=high, cmap="viridis", aspect="auto")
    axes.set_title(name, fontsize="medium")
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    axes.set_xticks(range(0, values.shape[1], 1 + values.shape[1] // 17))
    axes.set_yticks(range(0, values.shape[0], 1 + values.shape[0] // 17))
    axes.figure.colorbar(image, ax=axes)
    if values.shape[1] > _MOST_COLUMNS_WITH_NUMBERS:
        return
    for (layer, head), value in np.ndenumerate(values):
        is_dark = value < (low + high) / 2
        axes.text(
            head,
            layer,
            _short(value),
            ha="center",
            va="center",
            fontsize=7,
            color="white" if is_dark else "black",
        )


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.2g}"
