"""fairseq-doctor --hf: a line for each check, exit code 1 if one fails."""

from __future__ import annotations

import sys

import pytest
from tiny_transformers import gpt2

from fairseq.huggingface import apply_alibi
from fairseq.huggingface.bias import ScoreBias
from fairseq_cli import doctor


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command; returns exit code and output."""

    def command(folder):
        monkeypatch.setattr(sys, "argv", ["fairseq-doctor", "--hf", str(folder)])
        capsys.readouterr()
        code = 0
        try:
            doctor.cli_main()
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command


def test_a_model_with_alibi(run, tmp_path) -> None:
    model = gpt2()
    apply_alibi(model, bias_max=6.0)
    model.save_pretrained(tmp_path)
    code, out, _ = run(tmp_path)
    assert code == 0
    assert "gentlest slope 2**-6" in out and "2 attention modules, causal" in out
    assert out.count("PASS") == 8 and "FAIL" not in out


def test_a_model_without(run, tmp_path) -> None:
    gpt2().save_pretrained(tmp_path)
    code, out, _ = run(tmp_path)
    assert code == 1
    assert "FAIL  ALiBi is noted" in out and "gpt2 without ALiBi" in out


def test_a_bias_that_is_lost(run, tmp_path, monkeypatch) -> None:
    model = gpt2()
    apply_alibi(model)
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(ScoreBias, "additive_mask", lambda self, q, k, mask, **_: mask)
    code, out, _ = run(tmp_path)
    assert code == 1
    assert "FAIL  the model loads" in out and "bias changes the output" in out


def test_no_such_folder(run, tmp_path) -> None:
    code, _, err = run(tmp_path / "none")
    assert code != 0
    assert "there is no config.json" in err
