"""fairseq-validate: the validation of training, from a checkpoint alone."""

from __future__ import annotations

import logging
import math
import re
import shlex
import sys

import pytest
from eval_runs import GOLDEN, recorded

from fairseq_cli import validate

GPT = "bin/main --path ckpt/gpt_tiny/checkpoint_last.pt"
WIKI = "bin/main --path ckpt/wiki103_tiny/checkpoint_last.pt"


@pytest.fixture
def run(monkeypatch, caplog, capsys):
    """Runs the command; returns exit code, (logger, message) of what it logged, and stderr."""

    def command(text):
        caplog.clear()
        monkeypatch.chdir(GOLDEN)
        arguments = [*shlex.split(text), "--cpu", "--num-workers", "0"]
        monkeypatch.setattr(sys, "argv", ["fairseq-validate", *arguments])
        code = 0
        with caplog.at_level(logging.INFO):
            try:
                validate.cli_main()
            except SystemExit as leaving:
                code = int(leaving.code or 0)
        records = [(record.name, record.getMessage()) for record in caplog.records]
        return code, records, capsys.readouterr().err

    return command


def _stats(records, subset="valid"):
    line = [message for name, message in records if name == subset][-1]
    start = f"valid on '{subset}' subset | "
    assert line.startswith(start)
    return dict(field.split() for field in line.removeprefix(start).split(" | "))


def test_the_loss_of_cross_entropy_is_that_of_eval_lm(run):
    code, records, _ = run(f"{GPT} --valid-subset valid --max-tokens 512")
    assert code == 0
    stats = _stats(records)
    expected = recorded(GOLDEN)["gpt_tiny_valid_l64_c0"]["loss_base2"]
    assert list(stats) == ["loss", "ppl", "wps", "wpb", "bsz"]
    assert float(stats["loss"]) == pytest.approx(expected, abs=6e-4)
    assert float(stats["ppl"]) == pytest.approx(2**expected, rel=3e-4)
    # One event for the whole subset: its rate has no time before it.
    assert (stats["wps"], stats["wpb"], stats["bsz"]) == ("0", "5601", "88")


def test_the_criterion_of_the_checkpoint_is_used(run):
    # Its last validation, as the original logged it; adaptive_loss leaves some tail losses out.
    log = (GOLDEN / "ckpt/wiki103_tiny/train.log").read_text()
    logged = re.findall(r'"valid_loss": "([\d.]+)"', log)[-1]
    code, records, _ = run(f"{WIKI} --max-tokens 512")
    assert code == 0
    assert _stats(records)["loss"] == logged


def test_options_that_are_given_replace_those_in_the_checkpoint(run):
    code, records, _ = run(
        f"{GPT} --batch-size 4 --tokens-per-sample 128 --max-target-positions 128"
    )
    assert code == 0
    stats = _stats(records)
    expected = recorded(GOLDEN)["gpt_tiny_valid_l128_c0"]["loss_base2"]
    assert float(stats["loss"]) == pytest.approx(expected, abs=6e-4)
    assert stats["bsz"] == "44"
    assert not [m for _, m in records if "no setting of the checkpoint" in m]


def test_several_subsets(run):
    code, records, _ = run(f"{GPT} --max-tokens 512 --valid-subset valid,test")
    assert code == 0
    assert float(_stats(records, "valid")["loss"]) != float(_stats(records, "test")["loss"])


def test_interim_lines(run):
    text = f"{GPT} --max-tokens 512 --log-format simple --log-interval 5"
    code, records, _ = run(text)
    assert code == 0
    interim = [m for _, m in records if re.match(r"valid on 'valid' subset:\s+\d+ / 11 ", m)]
    assert len(interim) == 2  # after batches 6 and 11 of 11
    assert all(math.isfinite(float(re.search(r"ntokens=([\d.]+)", m)[1])) for m in interim)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("bin/main --max-tokens 512", "--path is needed"),
        (GPT, "--max-tokens or --batch-size"),
        (f"{GPT} --max-tokens 512 --valid-subset nope", "Dataset not found: nope"),
        ("bin/main --path nope.pt --max-tokens 512", "Model file not found: nope.pt"),
        (f"{GPT} --max-tokens 512 --tokens-per-sample 128", "max_positions=64"),
    ],
)
def test_what_cannot_be_validated(run, command, message):
    code, _, printed = run(command)
    assert code == 1
    assert message in printed


def test_the_log_goes_to_a_file_as_well(run, tmp_path):
    root = logging.getLogger()
    before = list(root.handlers)
    try:
        assert run(f"{GPT} --valid-subset valid --max-tokens 512 --log-file {tmp_path}/log")[0] == 0
    finally:
        for handler in [h for h in root.handlers if h not in before]:
            handler.close()
            root.removeHandler(handler)
    assert "valid on 'valid' subset | loss" in (tmp_path / "log").read_text()


def test_the_factor_of_an_interpolation_is_that_of_the_longest_row(run):
    """Slopes of rows 4 times as long as in training are divided by 4, however rows are batched."""
    length = "--tokens-per-sample 256 --max-target-positions 256"
    losses = [
        float(_stats(run(f"{GPT} {length} {options}")[1])["loss"])
        for options in (
            "--max-sentences 1 --alibi-interpolation linear",
            "--max-sentences 9 --alibi-interpolation linear",
            "--max-sentences 9 --alibi-interpolation linear --alibi-interpolation-factor 4",
            "--max-sentences 9",
        )
    ]
    assert losses[0] == losses[1] == losses[2] != losses[3]
