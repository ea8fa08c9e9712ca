"""Makes one file of a checkpoint that was written in parts (fairseq-train --use-sharded-state).

    python scripts/whole_checkpoint.py checkpoints/checkpoint_best.pt whole.pt

The file has the layout that fairseq-train writes without the flag, optimizer state included, and
needs no folder beside it. A checkpoint that is one file already is copied.
"""

from __future__ import annotations

import argparse

from fairseq.checkpoint.reading import read_checkpoint
from fairseq.checkpoint.writing import save_atomically
from fairseq_cli._run import run_command

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> None:
    """Reads a checkpoint and writes it as one file.

    Args:
        arguments: of the command line; None takes the process's.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("input", help="checkpoint, its folder of parts beside it")
    parser.add_argument("output", help="file to write")
    args = parser.parse_args(arguments)
    save_atomically(read_checkpoint(args.input), args.output)


if __name__ == "__main__":
    run_command(main)
