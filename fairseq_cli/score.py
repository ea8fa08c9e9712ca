"""fairseq-score: compares generated text with references, line by line."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from fairseq.data.text_file import check_text_file, read_lines
from fairseq.dataclass.arguments import CommandParser
from fairseq.scoring import build_scorer
from fairseq.scoring.base import load_sacrebleu
from fairseq.scoring.bleu import corpus_bleu, format_bleu
from fairseq.scoring.chrf import ChrFConfig
from fairseq_cli._run import run_command

__all__ = ["cli_main", "get_parser", "main"]


def get_parser() -> CommandParser:
    """Returns the parser of fairseq-score."""
    parser = CommandParser(description="Score text against references by BLEU or chrF.")
    parser.add_argument(
        "-s", "--sys", default="-", metavar="FILE", help="text to score (default: standard input)"
    )
    parser.add_argument("-r", "--ref", required=True, metavar="FILE", help="references")
    parser.add_argument(
        "-o",
        "--order",
        default=4,
        type=int,
        metavar="N",
        help="longest n-gram of words that counts (default: 4)",
    )
    parser.add_argument("--ignore-case", action="store_true", help="case does not matter")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--sacrebleu", action="store_true", help="BLEU of text that sacrebleu splits itself"
    )
    kind.add_argument(
        "--sentence-bleu", action="store_true", help="smoothed BLEU of each line by itself"
    )
    kind.add_argument("--chrf", action="store_true", help="chrF2, of characters")
    return parser


def cli_main() -> None:
    """Runs fairseq-score with the arguments of the process."""
    run_command(_run)


def _run() -> None:
    parser = get_parser()
    args = parser.parse_args()
    if args.order < 1:
        parser.error(f"argument -o/--order: {args.order} is out of range; it must be at least 1")
    if args.order != 4 and args.chrf:
        parser.error("argument -o/--order: it counts words, but --chrf compares characters")
    main(args)


def main(args: argparse.Namespace) -> None:
    """Prints the arguments and the scores.

    Args:
        args: the options of `get_parser`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is empty or no text, or the files differ in their number of lines.
    """
    print(args)
    predictions, references = _read(args.sys), _read(args.ref)
    if len(predictions) != len(references):
        raise ValueError(
            f"--sys {args.sys} has {len(predictions)} lines, --ref {args.ref} has "
            f"{len(references)}; give one reference for each line"
        )
    if args.sentence_bleu:
        pairs = zip(predictions, references, strict=True)
        for index, (prediction, reference) in enumerate(pairs):
            print(index, _sentence_line(args, prediction, reference))
    else:
        print(_corpus_line(args, predictions, references))


def _read(path: str) -> list[str]:
    if path == "-":
        return [line.rstrip("\r\n") for line in sys.stdin]
    check_text_file(path)
    return list(read_lines(path))


def _corpus_line(args: argparse.Namespace, predictions: list[str], references: list[str]) -> str:
    if args.sacrebleu:
        metric = load_sacrebleu().metrics.BLEU(
            lowercase=args.ignore_case, max_ngram_order=args.order
        )
        return str(metric.corpus_score(predictions, [references]).format())
    if args.chrf:
        scorer = build_scorer(ChrFConfig(_name="chrf"))
        return _filled(scorer, args, predictions, references)
    return _filled(build_scorer("bleu"), args, predictions, references)


def _filled(
    scorer: Any, args: argparse.Namespace, predictions: list[str], references: list[str]
) -> str:
    for prediction, reference in zip(predictions, references, strict=True):
        if args.ignore_case:
            prediction, reference = prediction.lower(), reference.lower()
        scorer.add_string(reference, prediction)
    return str(scorer.result_string(args.order))


def _sentence_line(args: argparse.Namespace, prediction: str, reference: str) -> str:
    # One is added to the counts of two words and more, so that short lines are not all 0.
    score = corpus_bleu(
        [reference],
        [prediction],
        order=args.order,
        lowercase=args.ignore_case,
        smooth_method="add-k",
    )
    return format_bleu(score)


if __name__ == "__main__":
    cli_main()
