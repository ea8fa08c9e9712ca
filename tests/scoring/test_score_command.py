"""fairseq-score on files and standard input."""

from __future__ import annotations

import io
import sys

import pytest

from fairseq_cli import score

REFERENCES = "the cat sat on the mat\na dog barks at night\n"
PREDICTIONS = "The cat sat on a mat\na dog at night\n"


@pytest.fixture
def files(tmp_path):
    (tmp_path / "ref").write_text(REFERENCES)
    (tmp_path / "hyp").write_text(PREDICTIONS)
    return tmp_path


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["fairseq-score", *map(str, arguments)])
    code = 0
    try:
        score.cli_main()
    except SystemExit as leaving:
        code = leaving.code
    printed = capsys.readouterr()
    return code, printed.out.splitlines(), printed.err


def test_bleu_of_words(files, monkeypatch, capsys):
    code, lines, _ = run(monkeypatch, capsys, "-s", files / "hyp", "-r", files / "ref")
    assert code == 0 and lines[0].startswith("Namespace(") and len(lines) == 2
    # Beside the words of test_scorers.py, The is not the.
    assert lines[1].startswith("BLEU4 = 0.00, 80.0/50.0/16.7/0.0 (BP=0.905, ratio=0.909, syslen=10")


def test_case_is_ignored_if_asked(files, monkeypatch, capsys):
    arguments = ["-s", files / "hyp", "-r", files / "ref", "--ignore-case"]
    _, lines, _ = run(monkeypatch, capsys, *arguments)
    assert "90.0/62.5/33.3/25.0" in lines[1]


def test_standard_input_and_order(files, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO(PREDICTIONS))
    _, lines, _ = run(monkeypatch, capsys, "-r", files / "ref", "-o", "2")
    assert lines[1].startswith("BLEU2 = 57.23, 80.0/50.0 (")


def test_sacrebleu_and_chrf(files, monkeypatch, capsys):
    import sacrebleu

    refs, hyps = REFERENCES.splitlines(), PREDICTIONS.splitlines()
    arguments = ["-s", files / "hyp", "-r", files / "ref"]
    _, lines, _ = run(monkeypatch, capsys, *arguments, "--sacrebleu")
    assert lines[1] == sacrebleu.corpus_bleu(hyps, [refs]).format()
    _, lines, _ = run(monkeypatch, capsys, *arguments, "--chrf")
    assert lines[1] == sacrebleu.corpus_chrf(hyps, [refs]).format()


def test_each_sentence_by_itself(files, monkeypatch, capsys):
    arguments = ["-s", files / "hyp", "-r", files / "ref", "--sentence-bleu", "--ignore-case"]
    _, lines, _ = run(monkeypatch, capsys, *arguments)
    assert [line.split()[:2] for line in lines[1:]] == [["0", "BLEU4"], ["1", "BLEU4"]]
    # One is added from two words on: 5/6, 4/6, 3/5, 2/4.
    assert "83.3/66.7/60.0/50.0" in lines[1]


def test_errors_name_the_remedy(files, monkeypatch, capsys):
    (files / "short").write_text("one line\n")
    code, _, error = run(monkeypatch, capsys, "-s", files / "short", "-r", files / "ref")
    assert code == 1 and "has 1 lines" in error and "one reference for each line" in error
    code, _, error = run(monkeypatch, capsys, "-s", files / "none", "-r", files / "ref")
    assert code == 1 and "there is no text file" in error
    code, _, error = run(monkeypatch, capsys, "-r", files / "ref", "-o", "0")
    assert code == 2 and "at least 1" in error
    code, _, error = run(monkeypatch, capsys, "-r", files / "ref", "--chrf", "-o", "2")
    assert code == 2 and "compares characters" in error
