"""What the pictures show: the data in the lines, not their looks."""

from __future__ import annotations

import importlib
import math

import numpy as np
import pytest
from sweeps import checkpoint, row

from fairseq.evaluation import plot, report
from fairseq.evaluation.by_position import LossByPosition


@pytest.fixture
def figures(monkeypatch):
    """The figures that were drawn, still open."""
    pyplot = plot.pyplot()
    kept = []
    monkeypatch.setattr(pyplot, "close", kept.append)
    yield kept
    monkeypatch.undo()
    pyplot.close("all")


def _is_png(path):
    return path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def _lines(axis):
    """Returns label -> (x, y) of the lines that have a name."""
    named = [line for line in axis.get_lines() if not line.get_label().startswith("_")]
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in named}


def test_perplexity_against_length(tmp_path, figures):
    one, two = checkpoint("1.pt", seed=1), checkpoint("2.pt", seed=2)
    other = checkpoint("3.pt", "sinusoidal")
    rows = [
        row(one, 64, 10.0), row(two, 64, 12.0), row(one, 128, 9.0), row(two, 128, 9.0),
        row(other, 64, 11.0), row(other, 128, 90.0), row(one, 128, 8.0, stride=32),
    ]  # fmt: skip
    curves = report.curves_of(report.group_by_seed([one, two, other]), rows)
    plot.plot_extrapolation(tmp_path / "a.png", curves, subtitle="data-bin")
    assert _is_png(tmp_path / "a.png")
    left, right = figures[0].axes
    assert _lines(left) == {
        "alibi (2 seeds)": ([64, 128], [11.0, 9.0]),
        "sinusoidal": ([64, 128], [11.0, 90.0]),
    }
    assert _lines(right) == {"alibi (2 seeds)": ([128], [8.0])}
    assert left.get_title() == "non-overlapping windows"
    assert right.get_title() == "sliding windows, stride 32"
    assert left.get_xscale() == "log"
    # 90 is more than four times 8.
    assert left.get_yscale() == "log"
    assert [text.get_text() for text in left.get_xticklabels()] == ["64", "128"]
    assert [text.get_text() for text in left.texts] == ["trained on 64"]
    # The band of the two seeds: 11 +- sqrt(2) at 64.
    band = left.collections[0].get_paths()[0].vertices
    at_64 = band[band[:, 0] == 64][:, 1]
    assert (at_64.min(), at_64.max()) == pytest.approx((11 - math.sqrt(2), 11 + math.sqrt(2)))


def test_each_training_length_is_marked_on_its_line(tmp_path, figures):
    short = checkpoint("1.pt", experiment="short")
    long = checkpoint("2.pt", experiment="long", train_length=128)
    rows = [row(short, 64, 10.0), row(short, 128, 9.0), row(long, 64, 11.0), row(long, 128, 9.5)]
    curves = report.curves_of(report.group_by_seed([short, long]), rows)
    plot.plot_extrapolation(tmp_path / "a.png", curves)
    (axis,) = figures[0].axes
    assert axis.get_yscale() == "linear"
    lines = [line for line in axis.get_lines() if not line.get_label().startswith("_")]
    # One method, one colour; its models have lines of their own.
    assert lines[0].get_color() == lines[1].get_color()
    assert [line.get_linestyle() for line in lines] == ["-", "--"]
    stars = [line for line in axis.get_lines() if line.get_marker() == "*"]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in stars] == [
        (64, 10.0),
        (128, 9.5),
    ]


def _losses(by_position):
    losses = LossByPosition()
    for position, bits in by_position.items():
        losses.add_losses(np.array([position] * 2), np.array([bits * math.log(2)] * 2))
    return losses


def test_loss_against_position(tmp_path, figures):
    info = checkpoint("1.pt")
    results = [
        (row(info, 8, 1.0), _losses({1: 9, 2: 7, 4: 5, 8: 3})),
        # The first windows of the text have less context, and are not drawn.
        (row(info, 8, 1.0, stride=1), _losses({2: 7, 8: 3})),
    ]
    lines = report.position_lines(report.group_by_seed([info]), results)
    plot.plot_by_position(tmp_path / "b.png", lines)
    assert _is_png(tmp_path / "b.png")
    (axis,) = figures[0].axes
    drawn = _lines(axis)
    (blocks, sliding) = drawn
    assert blocks == "non-overlapping: mean 6.00 bits at length 8"
    assert sliding == "sliding by 1: mean 5.00 bits at length 8"
    assert drawn[blocks][0] == [1, 2, 4, 8]
    assert drawn[blocks][1] == pytest.approx([9, 7, 5, 3])
    assert drawn[sliding][0] == [8]
    assert axis.get_legend().get_title().get_text() == "alibi"


def test_models_have_panels_of_their_own(tmp_path, figures):
    infos = [checkpoint(f"{n}.pt", method) for n, method in enumerate(("a", "b", "c", "d"))]
    results = [(row(info, 8, 1.0), _losses({1: 9, 8: 3})) for info in infos]
    lines = report.position_lines(report.group_by_seed(infos), results)
    plot.plot_by_position(tmp_path / "b.png", lines)
    visible = [axis for axis in figures[0].axes if axis.get_visible()]
    assert len(visible) == 4
    # Two panels have the empty cells of the second row below them.
    for axis, has_numbers in zip(visible, (False, True, True, True), strict=True):
        assert bool(axis.get_xlabel()) == has_numbers
        assert any(text.get_visible() for text in axis.get_xticklabels()) == has_numbers


def test_without_matplotlib(monkeypatch):
    def missing(name, *args):
        if name == "matplotlib":
            raise ImportError(name)
        return importlib.__import__(name, *args)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r"pip install 'fairseq-alibi\[plot\]'.*--no-plots"):
        plot.check_matplotlib()


@pytest.mark.parametrize("num_models", [2, 6])
@pytest.mark.parametrize("num_strides", [1, 2])
@pytest.mark.parametrize("name", ["a", "runs/with/a/long/name/of-its-own", "x" * 150])
def test_the_legend_is_inside_the_picture(tmp_path, figures, name, num_strides, num_models):
    infos = [checkpoint(f"{name}{n}.pt", experiment=str(n)) for n in range(num_models)]
    strides = [{}, {"stride": 8}][:num_strides]
    rows = [row(info, 64, 9.0, **stride) for info in infos for stride in strides]
    curves = report.curves_of(report.group_by_seed(infos), rows)
    plot.plot_extrapolation(tmp_path / "a.png", curves)
    (figure,) = figures
    (legend,) = figure.legends
    around, panels = legend.get_window_extent(), [axis.get_window_extent() for axis in figure.axes]
    assert len(legend.get_texts()) == num_models
    assert around.x0 >= 0 and around.x1 <= figure.bbox.width
    assert max(panel.y1 for panel in panels) < around.y0 and around.y1 <= figure.bbox.height
    assert all(panel.height > 150 for panel in panels)
