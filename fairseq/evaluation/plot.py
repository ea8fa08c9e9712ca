"""Pictures of a sweep over evaluation lengths. Needs matplotlib, which is loaded here alone."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fairseq.evaluation.extrapolation import NON_OVERLAPPING
from fairseq.evaluation.report import Curve, PositionLine

__all__ = ["check_matplotlib", "plot_by_position", "plot_extrapolation"]

# Okabe and Ito's colours, which also the colour-blind tell apart; yellow is too pale for lines.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "os^Dv<>"
_LINES = ("-", "--", ":", "-.")
_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
}
_PANEL_WIDTH, _PANEL_HEIGHT, _LEGEND_LINE = 4.6, 3.2, 0.2  # inches
_DPI = 200
# From this ratio of the largest to the smallest perplexity on, the axis is logarithmic.
_WIDE_RANGE = 4


def check_matplotlib() -> None:
    """Raises ImportError with the remedy if matplotlib is not installed."""
    pyplot()


def pyplot() -> Any:
    """Returns matplotlib.pyplot, set to draw into files; raises ImportError with the remedy."""
    try:
        matplotlib = importlib.import_module("matplotlib")
    except ImportError as error:
        raise ImportError(
            "the pictures need matplotlib: pip install 'fairseq-alibi[plot]' (or pip install "
            "matplotlib), or give --no-plots"
        ) from error
    # Draws into files; needs no display.
    matplotlib.use("Agg")
    return importlib.import_module("matplotlib.pyplot")


def plot_extrapolation(
    path: Path, curves: Mapping[int | str, Sequence[Curve]], *, subtitle: str = ""
) -> None:
    """Draws perplexity against the evaluation length, a panel for each stride, a line for each
    model; colours are position methods, a band shows the standard deviation over seeds.

    Args:
        path: PNG to write.
        curves: stride -> curves, see `report.curves_of`.
        subtitle: what was evaluated.
    """
    plt = pyplot()
    every = [curve for of_stride in curves.values() for curve in of_stride]
    looks = _looks_of(every)
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(
            1,
            len(curves),
            figsize=(_PANEL_WIDTH * len(curves), _PANEL_HEIGHT),
            sharey=True,
            squeeze=False,
            layout="constrained",
        )
        for axis, (stride, of_stride) in zip(axes[0], curves.items(), strict=True):
            _draw_curves(axis, of_stride, looks)
            axis.set_title(_stride_name(stride), fontsize=9)
            axis.set_xlabel("evaluation length (tokens)")
        means = [mean for curve in every for mean in curve.means]
        if max(means) > _WIDE_RANGE * min(means):
            _use_log_scale(axes[0][0], max(means) / min(means))
        axes[0][0].set_ylabel("perplexity")
        _add_legend(figure, _one_of_each(axes[0]), most_columns=2 * len(curves))
        _save(plt, figure, path, subtitle)


def _add_legend(figure: Any, handles: Sequence[Any], *, most_columns: int) -> None:
    """Puts a legend above the panels in as many columns as fit, and makes room for it."""
    width = figure.get_figwidth()
    for num_columns in range(min(most_columns, len(handles)), 0, -1):
        legend = figure.legend(handles=handles, loc="outside upper left", ncols=num_columns)
        figure.set_figheight(_PANEL_HEIGHT + _LEGEND_LINE * math.ceil(len(handles) / num_columns))
        figure.draw_without_rendering()
        # Around the legend is as much room as around the panels.
        needed = legend.get_window_extent().width / figure.dpi + 0.1
        if needed <= width:
            return
        if num_columns > 1:
            legend.remove()
    figure.set_figwidth(needed)


def _looks_of(curves: Sequence[Curve]) -> dict[str, dict[str, Any]]:
    """Returns label -> colour and marker of the method, and a line for each model of a method."""
    methods: dict[str, list[str]] = {}
    for curve in curves:
        labels = methods.setdefault(curve.group.position_method, [])
        if curve.group.label not in labels:
            labels.append(curve.group.label)
    return {
        label: {
            "color": _COLORS[index % len(_COLORS)],
            "marker": _MARKERS[index % len(_MARKERS)],
            "linestyle": _LINES[number % len(_LINES)],
        }
        for index, labels in enumerate(methods.values())
        for number, label in enumerate(labels)
    }


def _one_of_each(axes: Sequence[Any]) -> list[Any]:
    """Returns a line for each label in the panels."""
    found: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return list(found.values())


def _draw_curves(
    axis: Any, curves: Sequence[Curve], looks: Mapping[str, Mapping[str, Any]]
) -> None:
    """Draws the lines of a panel; each training length is marked, one that all share by a rule."""
    lengths = sorted({length for curve in curves for length in curve.lengths})
    trained = {curve.group.train_length for curve in curves}
    common = trained.pop() if len(trained) == 1 else None
    if common is not None:
        _mark_train_length(axis, common)
    for curve in curves:
        look = looks[curve.group.label]
        axis.plot(curve.lengths, curve.means, label=_legend_name(curve), zorder=3, **look)
        _draw_band(axis, curve.lengths, curve.means, curve.deviations, look["color"])
        at_train_length = curve.at(curve.group.train_length or 0)
        if common is None and at_train_length is not None:
            place = [curve.group.train_length], [at_train_length[0]]
            star = {"marker": "*", "markersize": 11, "markeredgecolor": "white"}
            axis.plot(*place, color=look["color"], linestyle="none", zorder=4, **star)
    _log_ticks(axis, lengths)


def _mark_train_length(axis: Any, length: int) -> None:
    axis.axvline(length, color="#888888", linestyle=":", linewidth=1.2, zorder=1)
    axis.annotate(
        f"trained on {length:,}",
        (length, 1),
        xycoords=("data", "axes fraction"),
        xytext=(3, -2),
        textcoords="offset points",
        va="top",
        fontsize=8,
        color="#666666",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
    )


def _draw_band(
    axis: Any,
    places: Sequence[float],
    means: Sequence[float],
    errors: Sequence[float | None],
    color: str,
) -> None:
    if not any(errors):
        return
    low = [mean - (error or 0) for mean, error in zip(means, errors, strict=True)]
    high = [mean + (error or 0) for mean, error in zip(means, errors, strict=True)]
    axis.fill_between(places, low, high, color=color, alpha=0.2, linewidth=0, zorder=2)


def _legend_name(curve: Curve) -> str:
    count = len(curve.group.checkpoints)
    return curve.group.label + (f" ({count} seeds)" if count > 1 else "")


def _log_ticks(axis: Any, lengths: Sequence[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axis.minorticks_off()
    if len(lengths) > 6:
        axis.tick_params(axis="x", labelrotation=45)


def _use_log_scale(axis: Any, ratio: float) -> None:
    from matplotlib import ticker

    axis.set_yscale("log")
    subs = (1, 1.5, 2, 3, 4, 5, 7) if ratio < 10 else (1, 2, 5)
    axis.yaxis.set_major_locator(ticker.LogLocator(subs=subs))
    axis.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.yaxis.set_minor_locator(ticker.NullLocator())


def _stride_name(stride: int | str) -> str:
    if stride == NON_OVERLAPPING:
        return "non-overlapping windows"
    return f"sliding windows, stride {int(stride):,}"


def _save(plt: Any, figure: Any, path: Path, subtitle: str) -> None:
    if subtitle:
        figure.supxlabel(subtitle, fontsize=7, color="#666666")
    unfinished = path.with_name(path.name + ".tmp")
    figure.savefig(unfinished, format="png", dpi=_DPI)
    plt.close(figure)
    unfinished.replace(path)


# ---- loss against position ----


def plot_by_position(path: Path, lines: Sequence[PositionLine], *, subtitle: str = "") -> None:
    """Draws the mean loss against the position in the window, a panel for each model.

    In windows that do not overlap the first positions have little to go by, which is what sliding
    avoids.

    Args:
        path: PNG to write.
        lines: non-overlapping and sliding windows of the models.
        subtitle: what was evaluated.
    """
    plt = pyplot()
    models = list(dict.fromkeys(line.group.label for line in lines))
    num_columns = min(len(models), 3)
    num_rows = math.ceil(len(models) / num_columns)
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(
            num_rows,
            num_columns,
            figsize=(_PANEL_WIDTH * num_columns, _PANEL_HEIGHT * num_rows),
            sharex=True,
            sharey=True,
            squeeze=False,
            layout="constrained",
        )
        for axis, model in zip(axes.flat, models, strict=False):
            _draw_position_panel(axis, [line for line in lines if line.group.label == model])
        for axis in axes.flat[len(models) :]:
            axis.set_visible(False)
        for axis in axes.flat[max(0, len(models) - num_columns) : len(models)]:  # none is below
            axis.set_xlabel("position in the window (tokens seen)")
            axis.tick_params(axis="x", labelbottom=True)
        for axis in axes[:, 0]:
            axis.set_ylabel("loss (bits per token)")
        _save(plt, figure, path, subtitle)


def _draw_position_panel(axis: Any, lines: Sequence[PositionLine]) -> None:
    for index, line in enumerate(sorted(lines, key=lambda line: line.context)):
        color = _COLORS[index % len(_COLORS)]
        places, bits = [b.position for b in line.points], [b.bits for b in line.points]
        name = f"{_mode_name(line)}: mean {line.mean_bits:.2f} bits at length {line.window:,}"
        marker = "D" if len(places) == 1 else ""
        axis.plot(places, bits, color=color, marker=marker, label=name, zorder=3 + index)
        _draw_band(axis, places, bits, [b.std_error for b in line.points], color)
        axis.axhline(line.mean_bits, color=color, linestyle="--", linewidth=0.9, zorder=1)
    train_length = lines[0].group.train_length
    if train_length is not None:
        _mark_train_length(axis, train_length)
    longest = max(line.window for line in lines)
    ticks = [2**k for k in range(int(math.log2(longest)) + 1)]
    _log_ticks(axis, ticks[:: 1 + len(ticks) // 8])
    legend = axis.legend(
        title=lines[0].group.label, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0
    )
    legend.set_alignment("left")


def _mode_name(line: PositionLine) -> str:
    if line.context == 0:
        return "non-overlapping"
    return f"sliding by {line.window - line.context:,}"
