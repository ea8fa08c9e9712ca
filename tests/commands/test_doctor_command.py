"""fairseq-doctor: a line for each check, exit code 1 if one fails, data or not."""

from __future__ import annotations

import shlex
import sys

import pytest
import torch
from eval_runs import GOLDEN

from fairseq.evaluation.doctor import CHECKS
from fairseq_cli import doctor

WIKI = "--path ckpt/wiki103_tiny/checkpoint_last.pt"
GPT = "--path ckpt/gpt_tiny/checkpoint_last.pt"


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command; returns exit code, {check: (status, text)}, last line and stderr."""

    def command(text):
        monkeypatch.chdir(GOLDEN)
        monkeypatch.setattr(sys, "argv", ["fairseq-doctor", *shlex.split(text), "--cpu"])
        capsys.readouterr()
        code = 0
        try:
            doctor.cli_main()
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        captured = capsys.readouterr()
        found = {}
        for line in captured.out.splitlines():
            if line.startswith(("PASS  ", "FAIL  ", "SKIP  ")):
                status, _, rest = line.partition("  ")
                name, _, measured = rest.partition("  ")
                found[name.strip()] = (status, measured.strip())
        last = captured.out.splitlines()[-1] if captured.out else ""
        return code, found, last, captured.err

    return command


@pytest.mark.parametrize("checkpoint", [WIKI, GPT])
def test_without_data(run, checkpoint):
    code, found, last, _ = run(checkpoint)
    assert code == 0
    assert list(found) == list(CHECKS)
    assert {status for status, _ in found.values()} == {"PASS"}
    assert "all checks passed" in last
    assert "max_tokens in the checkpoint" in found["stored method is in effect"][1]
    assert "128 tokens, trained with 64" in found["longer than in training"][1]


def test_with_data(run):
    code, found, _, _ = run(f"bin/main {GPT}")
    assert code == 0
    assert list(found) == ["dictionary fits", *CHECKS]
    assert found["dictionary fits"][0] == "PASS"
    assert "4,192 symbols" in found["dictionary fits"][1]


def test_data_that_do_not_fit_and_another_method_fail_and_all_else_is_checked_still(run):
    code, found, last, _ = run(f"bin/nwords1000_thr2_pf16 {GPT} --position-method sinusoidal")
    assert code == 1
    assert list(found) == ["dictionary fits", *CHECKS]
    failed = {name for name, (status, _) in found.items() if status == "FAIL"}
    assert failed == {"dictionary fits", "stored method is in effect"}
    assert "2 of 16 checks FAILED" in last


def test_a_damaged_parameter(run, tmp_path):
    state = torch.load(GOLDEN / "ckpt/gpt_tiny/checkpoint_last.pt", weights_only=False)
    state["model"]["decoder.layers.0.fc1.bias"][0] = torch.inf
    path = tmp_path / "damaged.pt"
    torch.save(state, path)
    code, found, _, _ = run(f"--path {path}")
    assert code == 1
    assert found["parameters are finite"] == (
        "FAIL",
        "NaN or infinite numbers in decoder.layers.0.fc1.bias",
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "--path is needed"),
        ("--path nowhere.pt", "nowhere.pt"),
        (f"bin {GPT}", "dict.txt"),
        (f"bin/main {GPT} --gen-subset nothing", "nothing"),
    ],
)
def test_one_message_for_bad_input(run, text, message):
    code, found, _, err = run(text)
    assert code == 1
    assert "parameters are finite" not in found
    assert message in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("method", ["none", "t5"])
def test_packed_documents_do_not_tell_the_order(run, tmp_path, method):
    # Without positions, and with attention that restarts at each line.
    state = torch.load(GOLDEN / "ckpt/gpt_tiny/checkpoint_last.pt", weights_only=False)
    state["alibi"] = {
        "position_method": method,
        "train_length": 64,
        "extensions": {"model": {"document_mask": "line"}, "task": {"document_mask": "line"}},
    }
    model = state["model"]
    for name in [name for name in model if "embed_positions" in name]:
        del model[name]
    if method == "t5":
        # What a trained table looks like: every head another taste.
        model["decoder.positions.buckets"] = torch.randn(6, 32)
    path = tmp_path / f"{method}.pt"
    torch.save(state, path)
    code, found, _, _ = run(f"bin/main --path {path}")
    assert (code, found["order comes from the method"][0]) == (0, "PASS")
