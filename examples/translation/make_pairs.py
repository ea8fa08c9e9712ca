"""Writes a small language pair whose translation is known: words mapped one by one, or reversed.

Training, validation and test sentences have 2 to 10 words, those of `long` 15 to 20.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

# Sentences, fewest and most words of each split.
SPLITS = {
    "train": (4000, 2, 10),
    "valid": (100, 2, 10),
    "test": (100, 2, 10),
    "long": (100, 15, 20),
}
VOCABULARY = 20


def main() -> None:
    """Writes `<split>.src` and `<split>.tgt`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where to write")
    parser.add_argument("--reverse", action="store_true", help="last word first")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    for split, (count, shortest, longest) in SPLITS.items():
        lines = [
            [draw.randrange(VOCABULARY) for _ in range(draw.randint(shortest, longest))]
            for _ in range(count)
        ]
        _write(args.folder / f"{split}.src", "s", lines)
        _write(args.folder / f"{split}.tgt", "t", [x[::-1] if args.reverse else x for x in lines])


def _write(path: Path, letter: str, lines: list[list[int]]) -> None:
    texts = (" ".join(f"{letter}{number}" for number in line) for line in lines)
    path.write_text("".join(f"{text}\n" for text in texts))


if __name__ == "__main__":
    main()
