"""Word alignments between two languages: lines of pairs `source-target` of positions from 0."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from fairseq.data.dictionary import Dictionary
from fairseq.data.text_file import read_lines, split_lines

__all__ = ["AlignmentParser", "most_frequent_translations"]


class AlignmentParser:
    """Parses alignments: for each line of a text a list of (source, target) positions.

    Args:
        path: where the text comes from, for messages.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path

    def __call__(self, text: str) -> list[list[tuple[int, int]]]:
        lines = split_lines(text)
        return [self.parse_line(line) for line in (lines if lines[-1] else lines[:-1])]

    def parse_line(self, line: str) -> list[tuple[int, int]]:
        """Returns the pairs of one line; ValueError if something is no pair."""
        return [self._parse_pair(pair) for pair in line.split()]

    def _parse_pair(self, pair: str) -> tuple[int, int]:
        source, _, target = pair.partition("-")
        if not (source.isdecimal() and target.isdecimal()):
            raise ValueError(
                f"{self.path}: found {pair!r} where a pair of positions like 0-0 is expected"
            )
        return int(source), int(target)


def most_frequent_translations(
    source_path: str | Path,
    target_path: str | Path,
    align_path: str | Path,
    source: Dictionary,
    target: Dictionary,
) -> dict[int, int]:
    """Finds for each source word the target word that it is aligned to most often.

    Args:
        source_path: text of one language.
        target_path: its translation, line by line.
        align_path: alignments of the lines.
        source: dictionary of the first text; unknown words do not count.
        target: dictionary of the second.

    Returns:
        Source id -> target id, in the order in which the source words are first aligned.

    Raises:
        ValueError: the files do not fit each other, or are malformed.
    """
    parser = AlignmentParser(align_path)
    counts: dict[int, Counter[int]] = {}
    files = zip(*map(read_lines, (source_path, target_path, align_path)), strict=True)
    try:
        for source_line, target_line, alignment in files:
            source_ids = source.encode_ids(source_line).tolist()[:-1]
            target_ids = target.encode_ids(target_line).tolist()[:-1]
            for source_position, target_position in parser.parse_line(alignment):
                index, translation = source_ids[source_position], target_ids[target_position]
                if index != source.unk() and translation != target.unk():
                    counts.setdefault(index, Counter())[translation] += 1
    except (ValueError, IndexError) as error:
        raise ValueError(
            f"{align_path} does not fit {source_path} and {target_path}: {error}"
        ) from error
    return {index: max(found, key=found.__getitem__) for index, found in counts.items()}
