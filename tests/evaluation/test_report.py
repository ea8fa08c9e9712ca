"""Tables of a sweep, against arithmetic by hand."""

from __future__ import annotations

import csv
import json
import math

import numpy as np
import pytest
from sweeps import checkpoint, row

from fairseq.evaluation import report
from fairseq.evaluation.by_position import LossByPosition

COLUMNS = [
    "checkpoint",
    "position_method",
    "train_length",
    "eval_length",
    "stride",
    "context_window",
    "subset",
    "tokens",
    "loss_bits",
    "perplexity",
    "seconds",
    "tokens_per_s",
    "peak_memory_mib",
]


# ---- grouping ----


def _paths(groups):
    return [[c.path for c in group.checkpoints] for group in groups]


def test_runs_that_differ_in_seed_are_grouped():
    alibi = [checkpoint(f"a{seed}/last.pt", seed=seed) for seed in (1, 2)]
    other = checkpoint("b/last.pt", "sinusoidal")
    groups = report.group_by_seed([alibi[0], other, alibi[1]])
    assert _paths(groups) == [["a1/last.pt", "a2/last.pt"], ["b/last.pt"]]
    assert [group.label for group in groups] == ["alibi", "sinusoidal"]


def test_files_of_one_run_are_told_apart_by_name():
    files = [
        checkpoint(f"s{seed}/{name}.pt", seed=seed) for seed in (1, 2) for name in ("best", "last")
    ]
    groups = report.group_by_seed(files)
    assert _paths(groups) == [["s1/best.pt", "s2/best.pt"], ["s1/last.pt", "s2/last.pt"]]
    assert [g.label for g in groups] == ["alibi, L = 64 (best.pt)", "alibi, L = 64 (last.pt)"]


def test_two_runs_of_one_seed_are_no_repetition():
    groups = report.group_by_seed([checkpoint("x/last.pt"), checkpoint("y/last.pt")])
    assert _paths(groups) == [["x/last.pt"], ["y/last.pt"]]
    assert [g.label for g in groups] == ["alibi, L = 64 (x)", "alibi, L = 64 (y)"]


def test_one_method_at_several_training_lengths():
    lengths = (64, 1024, None)
    groups = report.group_by_seed(
        [checkpoint(f"{n}.pt", train_length=n, experiment=str(n)) for n in lengths]
    )
    assert [group.label for group in groups] == ["alibi, L = 64", "alibi, L = 1,024", "alibi"]


# ---- curves ----


def test_mean_and_deviation_over_seeds():
    one, two = checkpoint("1.pt", seed=1), checkpoint("2.pt", seed=2)
    other = checkpoint("3.pt", "none")
    groups = report.group_by_seed([one, two, other])
    rows = [row(one, 64, 10.0), row(two, 64, 13.0), row(one, 128, 9.0), row(other, 64, 20.0)]
    curves = report.curves_of(groups, [*rows, row(other, 128, 30.0, stride=32)])
    assert list(curves) == ["length", 32]
    alibi, none = curves["length"]
    assert (alibi.lengths, alibi.means) == ([64, 128], [11.5, 9.0])
    # sqrt((1.5**2 + 1.5**2) / (2 - 1))
    assert alibi.deviations == [pytest.approx(math.sqrt(4.5)), None]
    assert none.deviations == [None]
    assert alibi.at(128) == (9.0, None)
    assert alibi.at(256) is None
    assert [(c.group.label, c.lengths) for c in curves[32]] == [("none", [128])]


def _losses(positions, nats):
    losses = LossByPosition()
    losses.add_losses(np.array(positions), np.array(nats, dtype=float))
    return losses


def test_lines_by_position():
    one, two = checkpoint("1.pt", seed=1), checkpoint("2.pt", seed=2)
    results = [
        (row(one, 64, 1.0), _losses([1, 64], [4, 4])),
        (row(one, 128, 1.0), _losses([1, 64, 128], [7, 7, 1])),
        (row(two, 128, 1.0), _losses([1, 64, 128], [7, 7, 3])),
        # A stride as long as the window is no other evaluation.
        (row(one, 128, 1.0, stride=128), _losses([1, 64, 128], [7, 7, 1])),
        (row(one, 128, 1.0, stride=32), _losses([5, 128], [9, 1])),
        (row(one, 64, 1.0, stride=32), _losses([64], [1])),
    ]
    blocks, sliding = report.position_lines(report.group_by_seed([one, two]), results)
    assert (blocks.window, blocks.context) == (128, 0)
    assert (sliding.window, sliding.context) == (128, 96)
    # To 64 from windows of 64, beyond from those of 128, there over both seeds.
    points = [(b.position, b.tokens, b.bits * math.log(2)) for b in blocks.points]
    assert points == [(1, 1, 4), (64, 1, 4), (128, 2, 2)]
    assert blocks.mean_bits == pytest.approx((4 * 7 + 1 + 3) / 6 / math.log(2))
    # The first window of the text is not full.
    assert [b.position for b in sliding.points] == [128]
    assert sliding.mean_bits == pytest.approx(5 / math.log(2))


# ---- files ----


def test_files(tmp_path):
    info = checkpoint("a,b.pt")
    rows = [row(info, 64, 12.3456), row(info, 128, 11.0, stride=32)]
    report.write_tables(tmp_path, rows, "# text\n")
    listed = json.loads((tmp_path / "report.json").read_text())
    assert [list(entry) for entry in listed] == [COLUMNS, COLUMNS]
    assert listed[0]["stride"] == "length"
    assert (listed[1]["stride"], listed[1]["context_window"]) == (32, 96)
    assert listed[0]["perplexity"] == 12.3456
    with open(tmp_path / "report.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == COLUMNS
    assert [line["checkpoint"] for line in lines] == ["a,b.pt", "a,b.pt"]
    assert float(lines[0]["perplexity"]) == 12.3456
    assert (tmp_path / "report.md").read_text() == "# text\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.csv", "report.json", "report.md"]


def test_csv_of_positions(tmp_path):
    path = tmp_path / "by_position.csv"
    losses = _losses([1, 9, 10], [math.log(2), 2 * math.log(2), 4 * math.log(2)])
    report.write_by_position(path, [row(checkpoint("a.pt"), 64, 1.0)], [losses])
    first, second = csv.DictReader(path.read_text().splitlines())
    assert (first["first_position"], first["tokens"], first["std_error_bits"]) == ("1", "1", "")
    assert float(first["loss_bits"]) == pytest.approx(1)
    assert (second["first_position"], second["last_position"]) == ("9", "10")
    assert float(second["mean_position"]) == 9.5
    assert float(second["loss_bits"]) == pytest.approx(3)
    assert float(second["std_error_bits"]) == pytest.approx(1)


def _tables(text):
    """Returns title -> lines of cells of the first table under it."""
    tables = {}
    for part in text.split("\n## ")[1:]:
        title, _, rest = part.partition("\n\n")
        table = rest.split("\n\n")[0]
        lines = [line.strip("| ").split(" | ") for line in table.splitlines()]
        tables[title] = [lines[0], *lines[2:]]
    return tables


def test_markdown():
    one, two = checkpoint("1.pt", seed=1), checkpoint("2.pt", seed=2)
    table = checkpoint("t.pt", "learned", position_limit=64)
    rows = [
        row(one, 64, 10.0), row(two, 64, 13.0), row(one, 128, 9.0), row(two, 128, 9.0),
        row(table, 64, 1234.5), row(one, 128, 8.0, stride=32), row(two, 128, 9.0, stride=32),
    ]  # fmt: skip
    text = report.markdown(
        report.group_by_seed([one, two, table]),
        rows,
        data="data-bin",
        notes=["mind this"],
        facts=["made so"],
        impossible={("t.pt", 128)},
    )
    tables = _tables(text)
    assert tables["Non-overlapping windows"] == [
        ["model", "trained on", "64", "128"],
        ["alibi (2 seeds)", "64", "**11.50 ± 2.12**", "9.00 ± 0.00"],
        ["learned", "64", "**1234.50**", "n/a"],
    ]
    assert tables["Sliding windows, 32 new tokens each"] == [
        ["model", "trained on", "128"],
        ["alibi (2 seeds)", "64", "8.50 ± 0.71"],
        ["learned", "64", "n/a"],
    ]
    assert [line[1] for line in tables["Checkpoints"][1:]] == ["`1.pt`", "`2.pt`", "`t.pt`"]
    assert "2,500 / 300" in text
    assert text.count("* mind this") == text.count("* made so") == 1


def test_a_table_without_numbers_yet():
    text = report.markdown(report.group_by_seed([checkpoint("1.pt")]), [], data="data-bin")
    assert text.startswith("# Perplexity against the evaluation length")
