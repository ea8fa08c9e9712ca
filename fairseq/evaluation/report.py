"""What a sweep over evaluation lengths leaves behind: tables, and the lines of its pictures."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fairseq.evaluation.by_position import LossByPosition, PositionBin
from fairseq.evaluation.extrapolation import NON_OVERLAPPING, CheckpointInfo, Row

__all__ = [
    "COLUMNS",
    "Curve",
    "Group",
    "PositionLine",
    "curves_of",
    "group_by_seed",
    "markdown",
    "position_lines",
    "write_atomically",
    "write_by_position",
    "write_tables",
]

COLUMNS = tuple(field.name for field in dataclasses.fields(Row))


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed only; most often one.

    Attributes:
        label: name in tables and pictures.
        checkpoints: the runs' files.
    """

    label: str
    checkpoints: tuple[CheckpointInfo, ...]

    @property
    def position_method(self) -> str:
        """The runs' position method."""
        return self.checkpoints[0].position_method

    @property
    def train_length(self) -> int | None:
        """The runs' training length."""
        return self.checkpoints[0].train_length

    @property
    def paths(self) -> frozenset[str]:
        """The runs' files."""
        return frozenset(checkpoint.path for checkpoint in self.checkpoints)


def group_by_seed(checkpoints: Sequence[CheckpointInfo]) -> list[Group]:
    """Groups runs that have all settings but the seed in common.

    Several files of one run (of one seed) are no repetition: they are told apart by their names
    (checkpoint_best.pt, checkpoint_last.pt), or stay on their own.
    """
    groups: dict[tuple[str, ...], list[CheckpointInfo]] = {}
    for checkpoint in checkpoints:
        groups.setdefault((checkpoint.experiment,), []).append(checkpoint)
    for identity in (lambda c: os.path.basename(c.path), lambda c: c.path):
        groups = _split_repeated_seeds(groups, identity)
    members = sorted(groups.values(), key=lambda group: checkpoints.index(group[0]))
    return [
        Group(label, tuple(group)) for label, group in zip(_labels(members), members, strict=True)
    ]


def _split_repeated_seeds(
    groups: Mapping[tuple[str, ...], list[CheckpointInfo]],
    identity: Callable[[CheckpointInfo], str],
) -> dict[tuple[str, ...], list[CheckpointInfo]]:
    split: dict[tuple[str, ...], list[CheckpointInfo]] = {}
    for key, group in groups.items():
        has_repeated = len({checkpoint.seed for checkpoint in group}) < len(group)
        for checkpoint in group:
            new_key = (*key, identity(checkpoint)) if has_repeated else key
            split.setdefault(new_key, []).append(checkpoint)
    return split


def _labels(groups: Sequence[Sequence[CheckpointInfo]]) -> list[str]:
    """Returns short names that are all different: method, training length, then what tells them
    apart in their paths."""
    names = [group[0].position_method for group in groups]
    trained = [
        f"{g[0].position_method}, L = {g[0].train_length:,}"
        if g[0].train_length
        else g[0].position_method
        for g in groups
    ]
    if len(set(names)) < len(names):
        names = trained
    counts = Counter(names)
    paths = [Path(group[0].path).parts for group in groups]
    labels = []
    for index, name in enumerate(names):
        if counts[name] > 1:
            others = [paths[i] for i, other in enumerate(names) if other == name and i != index]
            name += f" ({_distinguishing(paths[index], others)})"
        labels.append(name)
    return labels


def _distinguishing(parts: Sequence[str], others: Sequence[Sequence[str]]) -> str:
    """Returns a path without what it has in common with all others at its start and end."""
    start = 0
    while start < len(parts) - 1 and all(
        o[start : start + 1] == parts[start : start + 1] for o in others
    ):
        start += 1
    stop = len(parts)
    while stop > start + 1 and all(o[-1:] == parts[stop - 1 : stop] for o in others):
        stop -= 1
        others = [other[:-1] for other in others]
    return "/".join(parts[start:stop])


# ---- figures of groups ----


@dataclass(frozen=True)
class Curve:
    """Perplexity of a group against the evaluation length.

    Attributes:
        group: the runs.
        lengths: evaluation lengths, ascending.
        means: mean perplexity at each, over the runs.
        deviations: standard deviation at each (n - 1); None where there is one run.
    """

    group: Group
    lengths: list[int]
    means: list[float]
    deviations: list[float | None]

    def at(self, length: int) -> tuple[float, float | None] | None:
        """Returns mean and deviation at a length, None if it was not evaluated."""
        if length not in self.lengths:
            return None
        index = self.lengths.index(length)
        return self.means[index], self.deviations[index]


def curves_of(groups: Sequence[Group], rows: Sequence[Row]) -> dict[int | str, list[Curve]]:
    """Returns for each stride the curves of all groups that have rows."""
    strides = list(dict.fromkeys(row.stride for row in rows))
    curves: dict[int | str, list[Curve]] = {}
    for stride in strides:
        of_stride = [row for row in rows if row.stride == stride]
        made = [_curve(group, of_stride) for group in groups]
        curves[stride] = [curve for curve in made if curve.lengths]
    return curves


def _curve(group: Group, rows: Sequence[Row]) -> Curve:
    values: dict[int, list[float]] = {}
    for row in rows:
        if row.checkpoint in group.paths:
            values.setdefault(row.eval_length, []).append(row.perplexity)
    lengths = sorted(values)
    return Curve(
        group,
        lengths,
        [statistics.fmean(values[length]) for length in lengths],
        [statistics.stdev(values[n]) if len(values[n]) > 1 else None for n in lengths],
    )


@dataclass(frozen=True)
class PositionLine:
    """Loss of a group by position in the window.

    Attributes:
        group: the runs.
        window: the longest evaluation length.
        context: tokens of such a window that are not scored; 0 for non-overlapping windows.
        points: mean loss by position.
        mean_bits: mean loss over all tokens at the longest length.
    """

    group: Group
    window: int
    context: int
    points: list[PositionBin]
    mean_bits: float


def position_lines(
    groups: Sequence[Group], results: Sequence[tuple[Row, LossByPosition]]
) -> list[PositionLine]:
    """Returns what by_position.png shows.

    Of windows that do not overlap, every position is taken from the shortest that reach it, since
    these are the most. Of sliding windows, the longest are taken, and of these the full ones;
    those at the start of the text have less context.
    """
    lines = []
    for group in groups:
        windows = _pooled(group, results)
        longest = max((length for length, _ in windows), default=0)
        blocks: list[PositionBin] = []
        reached = 0
        for (length, context), loss in sorted(windows.items()):
            if context == 0:
                blocks += [b for b in loss.bins(length) if b.first > reached]
                reached = length
        for (length, context), loss in sorted(windows.items()):
            if length == longest:
                full = [b for b in loss.bins(length) if b.last > context]
                points = blocks if context == 0 else full
                lines.append(PositionLine(group, length, context, points, loss.mean_bits))
    return lines


def _pooled(
    group: Group, results: Sequence[tuple[Row, LossByPosition]]
) -> dict[tuple[int, int], LossByPosition]:
    """Returns (length, context) -> losses of all runs of a group."""
    windows: dict[tuple[int, int], dict[str, LossByPosition]] = {}
    for row, loss in results:
        if row.checkpoint in group.paths:
            place = (row.eval_length, row.context_window)
            windows.setdefault(place, {})[row.checkpoint] = loss
    return {
        place: LossByPosition.from_lists(*(loss.to_lists() for loss in losses.values()))
        for place, losses in windows.items()
    }


# ---- report.json, report.csv, report.md ----


def write_tables(folder: Path, rows: Sequence[Row], text: str) -> None:
    """Writes report.json, report.csv and report.md.

    Args:
        folder: where.
        rows: what both tables hold, in this order.
        text: the Markdown, see `markdown`.
    """
    plain = [dataclasses.asdict(row) for row in rows]
    write_atomically(folder / "report.json", json.dumps(plain, indent=1) + "\n")
    write_atomically(folder / "report.csv", _csv(COLUMNS, (row.values() for row in plain)))
    write_atomically(folder / "report.md", text)


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all."""
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def _csv(header: Iterable[str], lines: Iterable[Iterable[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(lines)
    return text.getvalue()


def write_by_position(path: Path, rows: Sequence[Row], losses: Sequence[LossByPosition]) -> None:
    """Writes by_position.csv: for every row of the report the mean loss in each bin.

    Args:
        path: the file.
        rows: rows of the report.
        losses: of each row.
    """
    shared = (
        "checkpoint",
        "position_method",
        "train_length",
        "eval_length",
        "stride",
        "context_window",
        "subset",
    )
    of_bins = ("first_position", "last_position", "mean_position", "tokens", "loss_bits")
    header = (*shared, *of_bins, "std_error_bits")
    lines = [
        (
            *(getattr(row, name) for name in shared),
            *(b.first, b.last, b.position, b.tokens, b.bits, b.std_error),
        )
        for row, loss in zip(rows, losses, strict=True)
        for b in loss.bins(row.eval_length)
    ]
    write_atomically(path, _csv(header, lines))


def markdown(
    groups: Sequence[Group],
    rows: Sequence[Row],
    *,
    data: str,
    notes: Sequence[str] = (),
    facts: Sequence[str] = (),
    impossible: Iterable[tuple[str, int]] = (),
) -> str:
    """Returns the report as Markdown: for each stride a table, models down, lengths across.

    Args:
        groups: the models.
        rows: what was evaluated.
        data: the data folder.
        notes: what a reader has to know besides.
        facts: how it was made.
        impossible: (checkpoint, length) that cannot be: n/a in the tables.
    """
    subset = rows[0].subset if rows else ""
    parts = [
        f"# Perplexity against the evaluation length\n\n`{data}`, {subset}. "
        "Bold: the training length. ± standard deviation over seeds (n - 1)."
    ]
    impossible = set(impossible)
    for stride, curves in curves_of(groups, rows).items():
        lengths = sorted(
            {length for curve in curves for length in curve.lengths}
            | {
                length
                for _, length in impossible
                if stride == NON_OVERLAPPING or int(stride) <= length
            }
        )
        of_stride = [row for row in rows if row.stride == stride]
        parts.append(
            f"## {_title(stride)}\n\n" + _perplexity_table(groups, curves, lengths, impossible)
        )
        parts.append(
            "Tokens per second / peak memory in MiB:\n\n"
            + _resource_table(groups, of_stride, lengths)
        )
    parts.append("## Checkpoints\n\n" + _checkpoint_table(groups))
    if notes:
        parts.append("## Notes\n\n" + "\n".join(f"* {note}" for note in notes))
    if facts:
        parts.append("\n".join(f"* {fact}" for fact in facts))
    return "\n\n".join(parts) + "\n"


def _title(stride: int | str) -> str:
    if stride == NON_OVERLAPPING:
        return "Non-overlapping windows"
    return f"Sliding windows, {int(stride):,} new tokens each"


def _perplexity_table(
    groups: Sequence[Group],
    curves: Sequence[Curve],
    lengths: Sequence[int],
    impossible: set[tuple[str, int]],
) -> str:
    lines = []
    for group in groups:
        curve = next((c for c in curves if c.group is group), None)
        cells = []
        for length in lengths:
            found = curve.at(length) if curve is not None else None
            if found is None:
                is_na = any((path, length) in impossible for path in group.paths)
                cells.append("n/a" if is_na else "")
                continue
            text = _with_deviation(*found)
            cells.append(f"**{text}**" if length == group.train_length else text)
        lines.append([_name(group), _number(group.train_length), *cells])
    return _table(["model", "trained on", *map(_number, lengths)], lines)


def _with_deviation(mean: float, deviation: float | None) -> str:
    return f"{mean:.2f}" + (f" ± {deviation:.2f}" if deviation is not None else "")


def _name(group: Group) -> str:
    count = len(group.checkpoints)
    return group.label + (f" ({count} seeds)" if count > 1 else "")


def _number(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"


def _resource_table(groups: Sequence[Group], rows: Sequence[Row], lengths: Sequence[int]) -> str:
    lines = []
    for group in groups:
        cells = []
        for length in lengths:
            own = [r for r in rows if r.checkpoint in group.paths and r.eval_length == length]
            memory = [r.peak_memory_mib for r in own if r.peak_memory_mib is not None]
            speed = statistics.median(r.tokens_per_s for r in own) if own else None
            cell = f"{speed:,.0f}" if speed is not None else ""
            cells.append(cell + (f" / {statistics.median(memory):,.0f}" if memory else ""))
        lines.append([_name(group), *cells])
    return _table(["model", *map(_number, lengths)], lines)


def _checkpoint_table(groups: Sequence[Group]) -> str:
    lines = [
        [
            group.label,
            f"`{c.path}`",
            _number(c.updates),
            str(c.seed),
            f"{c.num_params:,}",
            f"`{c.digest[:12]}`",
        ]
        for group in groups
        for c in group.checkpoints
    ]
    return _table(["model", "file", "updates", "seed", "parameters", "SHA-256"], lines)


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *lines))
