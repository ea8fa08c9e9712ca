"""Scores against counts by hand, and against sacrebleu's own command."""

from __future__ import annotations

import argparse
import math
import subprocess
import sys

import pytest

from fairseq.registry import SCORERS
from fairseq.scoring import BaseScorer, build_scorer
from fairseq.scoring.bleu import SacrebleuConfig
from fairseq.scoring.chrf import ChrFConfig

REFERENCES = ["the cat sat on the mat", "a dog barks at night"]
PREDICTIONS = ["the cat sat on a mat", "a dog at night"]


def filled(scorer: BaseScorer) -> BaseScorer:
    for ref, pred in zip(REFERENCES, PREDICTIONS, strict=True):
        scorer.add_string(ref, pred)
    return scorer


def test_bleu_by_hand():
    # Matches: the cat sat on _ mat, a dog at night; pairs: the-cat cat-sat sat-on, a-dog at-night;
    # of three words the-cat-sat cat-sat-on; of four the-cat-sat-on.
    counts = [(9, 10), (5, 8), (2, 6), (1, 4)]
    precisions = [100 * hits / total for hits, total in counts]
    penalty = math.exp(1 - 11 / 10)
    expected = penalty * math.exp(sum(map(math.log, precisions)) / 4)
    scorer = filled(build_scorer("bleu"))
    assert scorer.score() == pytest.approx(expected)
    assert scorer.result_string() == (
        f"BLEU4 = {expected:2.2f}, 90.0/62.5/33.3/25.0 "
        f"(BP={penalty:.3f}, ratio=0.909, syslen=10, reflen=11)"
    )


def test_bleu_of_another_order():
    scorer = filled(build_scorer("bleu"))
    expected = math.exp(1 - 11 / 10) * math.sqrt(90 * 62.5)
    assert scorer.score(order=2) == pytest.approx(expected)
    assert scorer.result_string(order=2).startswith(f"BLEU2 = {expected:2.2f}, 90.0/62.5 (")


def test_bleu_is_zero_without_a_match_of_four():
    scorer = build_scorer("bleu")
    scorer.add_string("a b c d", "a b c e")
    assert scorer.score() == 0


def test_an_unknown_word_of_a_reference_matches_nothing():
    scorer = build_scorer("bleu")
    scorer.add_string("a <unk> c d e", "a <unk> c d e")
    assert "80.0/50.0/33.3/0.0" in scorer.result_string()


def test_reset_forgets_the_pairs():
    scorer = filled(build_scorer("bleu"))
    scorer.reset()
    assert scorer.score() == 0
    scorer.add_string("a b c d", "a b c d")
    assert scorer.score() == pytest.approx(100)


@pytest.mark.parametrize(
    ("cfg", "options"),
    [
        (SacrebleuConfig(_name="sacrebleu"), []),
        (SacrebleuConfig(_name="sacrebleu", sacrebleu_lowercase=True), ["-lc"]),
        (SacrebleuConfig(_name="sacrebleu", sacrebleu_tokenizer="intl"), ["-tok", "intl"]),
        (SacrebleuConfig(_name="sacrebleu", sacrebleu_char_level=True), ["-tok", "char"]),
        (ChrFConfig(_name="chrf"), ["-m", "chrf"]),
        (ChrFConfig(_name="chrf", chrf_word_order=2), ["-m", "chrf", "--chrf-word-order", "2"]),
    ],
    ids=["13a", "lowercase", "intl", "char", "chrf", "chrf++"],
)
def test_what_sacrebleu_s_command_prints(cfg, options, tmp_path):
    texts = [["The cat, sat; on the mat!", "A dog barks."], ["the cat sat, on a mat!", "A dog."]]
    for name, lines in zip(("ref", "hyp"), texts, strict=True):
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    command = [sys.executable, "-m", "sacrebleu", tmp_path / "ref", "-i", tmp_path / "hyp"]
    command += [*options, "-b", "-w", "6"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    scorer = build_scorer(cfg)
    for ref, pred in zip(*texts, strict=True):
        scorer.add_string(ref, pred)
    assert scorer.score() == pytest.approx(float(printed), abs=1e-5)
    assert f"{scorer.score():.2f}" in scorer.result_string()


def test_the_default_is_bleu_and_an_unknown_name_lists_the_known():
    assert type(build_scorer(None)) is type(build_scorer("bleu"))
    assert (
        type(build_scorer(argparse.Namespace(scoring="chrf", **vars(ChrFConfig()))))
        is SCORERS["chrf"]
    )
    with pytest.raises(ValueError, match="unknown scoring 'blue'; known are bleu"):
        build_scorer("blue")
