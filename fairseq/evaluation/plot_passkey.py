"""The picture of a retrieval task: one heat map of length and depth for each model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fairseq.evaluation.plot import pyplot

if TYPE_CHECKING:
    from fairseq.evaluation.passkey import Accuracy

__all__ = ["plot_accuracy"]


def plot_accuracy(models: Mapping[str, Sequence[Accuracy]], title: str, path: Path) -> None:
    """Draws the share of right answers: lengths across, depths of the key down.

    Args:
        models: name -> its rows; all have the same lengths and depths.
        title: what was asked.
        path: file to write; its suffix is the format.

    Raises:
        ImportError: matplotlib is not installed.
    """
    plt = pyplot()
    rows = next(iter(models.values()))
    lengths = list(dict.fromkeys(row.length for row in rows))
    depths = list(dict.fromkeys(row.depth for row in rows))
    size = (0.6 * len(lengths) * len(models) + 2.0, 0.45 * len(depths) + 1.5)
    figure = plt.figure(figsize=size, layout="constrained")
    figure.suptitle(title)
    for axes, (name, found) in zip(
        figure.subplots(1, len(models), squeeze=False, sharey=True)[0], models.items(), strict=True
    ):
        shares = {(row.depth, row.length): row.exact for row in found}
        values = np.array([[shares[depth, length] for length in lengths] for depth in depths])
        image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        for (row, column), value in np.ndenumerate(values):
            colour = "white" if value < 0.5 else "black"
            axes.text(column, row, f"{value:.0%}", ha="center", va="center", size=7, color=colour)
        axes.set_title(name, fontsize="medium")
        axes.set_xlabel("length [tokens]")
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=45)
        named = ["" if depth is None else f"{depth:g}" for depth in depths]
        axes.set_yticks(range(len(depths)), named)
    figure.axes[0].set_ylabel("depth of the key" if depths != [None] else "")
    figure.colorbar(image, ax=figure.axes, label="right answers")
    figure.savefig(path, dpi=110)
    plt.close(figure)
