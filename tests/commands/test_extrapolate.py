"""fairseq-extrapolate: its rows are fairseq-eval-lm's, and what becomes of sweeps that go wrong."""

from __future__ import annotations

import csv
import json
import logging
import math
import os
import re
import shlex
import signal
import sys

import pytest
import torch
from eval_runs import GOLDEN, evaluate, recorded

from fairseq import options
from fairseq_cli import extrapolate

WIKI, GPT = "ckpt/wiki103_tiny/checkpoint_last.pt", "ckpt/gpt_tiny/checkpoint_last.pt"
BOTH = f"bin/main --path {WIKI}:{GPT} --lengths 64 --strides length,32"
ONE = f"bin/main --path {WIKI} --lengths 64,128"
KEYS = [
    "checkpoint", "position_method", "train_length", "eval_length", "stride", "context_window",
    "subset", "tokens", "loss_bits", "perplexity", "seconds", "tokens_per_s", "peak_memory_mib",
]  # fmt: skip


def sweep(command, folder):
    """Runs the command's main function in the folder of the golden data; returns the rows."""
    arguments = [*shlex.split(command), "--cpu", "--results-path", str(folder)]
    before = os.getcwd()
    os.chdir(GOLDEN)
    try:
        return extrapolate.main(
            options.parse_args_and_arch(options.get_extrapolate_parser(), arguments)
        )
    finally:
        os.chdir(before)


# ---- a whole sweep, in processes of its own ----


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    sweep(BOTH, folder)
    return folder


@pytest.fixture(scope="module")
def rows(swept):
    return json.loads((swept / "report.json").read_text())


def test_rows_of_the_report(rows):
    assert [list(row) for row in rows] == [KEYS] * 4
    places = [(r["checkpoint"], r["stride"], r["eval_length"], r["context_window"]) for r in rows]
    windows = [("length", 64, 0), (32, 64, 32)]
    assert places == [(path, *window) for path in (WIKI, GPT) for window in windows]
    for row in rows:
        assert (row["position_method"], row["train_length"]) == ("alibi", 64)
        assert (row["subset"], row["tokens"]) == ("valid", 5601)
        assert row["perplexity"] == pytest.approx(2 ** row["loss_bits"])
        assert row["tokens_per_s"] == pytest.approx(5601 / row["seconds"])
        # Python and torch alone take more than 100 MiB, these models little.
        assert 100 < row["peak_memory_mib"] < 4000


@pytest.mark.parametrize("index", range(4))
def test_rows_are_those_of_eval_lm(rows, index, monkeypatch, caplog):
    row = rows[index]
    result = evaluate(
        monkeypatch,
        caplog,
        f"bin/main --path {row['checkpoint']} --gen-subset valid "
        f"--tokens-per-sample {row['eval_length']} --context-window {row['context_window']}",
    )
    # Same batches, same order of summation: the same floats, not only the same digits.
    assert (row["loss_bits"], row["perplexity"]) == (result.loss, result.perplexity)
    assert row["tokens"] == result.num_tokens


def test_rows_are_the_originals(rows):
    originals = recorded(GOLDEN)
    for name, index in (("wiki103_tiny_valid_l64_c0", 0), ("gpt_tiny_valid_l64_c32", 3)):
        assert rows[index]["loss_bits"] == pytest.approx(originals[name]["loss_base2"], abs=2e-4)


def test_positions_add_up_to_the_rows(swept, rows):
    with open(swept / "by_position.csv", newline="") as file:
        bins = list(csv.DictReader(file))
    for row in rows:
        own = [b for b in bins if all(b[k] == str(row[k]) for k in KEYS[:7])]
        tokens = [int(b["tokens"]) for b in own]
        assert sum(tokens) == row["tokens"]
        losses = (float(b["loss_bits"]) * n for b, n in zip(own, tokens, strict=True))
        assert math.fsum(losses) / row["tokens"] == pytest.approx(row["loss_bits"], abs=1e-6)
        first_half = [int(b["tokens"]) for b in own if int(b["last_position"]) <= 32]
        # 5601 tokens are 87 whole blocks of 64 and one of 33. When windows slide, only the first
        # starts without context.
        assert sum(first_half) == (32 if row["context_window"] else 88 * 32)


def test_files(swept):
    names = {path.name for path in swept.iterdir()}
    reports = {"report.json", "report.csv", "report.md", "rows.jsonl"}
    pictures = {"extrapolation.png", "by_position.csv", "by_position.png"}
    assert names == reports | pictures
    text = (swept / "report.md").read_text()
    assert "| alibi, L = 64 (wiki103_tiny) | 64 | **" in text
    assert re.search(r"20\d\d-\d\d-\d\d .*, PyTorch \d", text)


def test_a_second_run_evaluates_nothing(swept, rows, monkeypatch):
    def refuse(*args):
        raise AssertionError("evaluated again")

    monkeypatch.setattr(extrapolate._FreshProcesses, "run", refuse)
    again = sweep(f"{BOTH} --no-plots", swept)
    assert [vars(row) for row in again] == rows
    # Fewer lengths, another order of models: a report of just that.
    part = sweep(f"bin/main --path {GPT}:{WIKI} --lengths 64 --no-plots", swept)
    assert [(row.checkpoint, row.eval_length) for row in part] == [(GPT, 64), (WIKI, 64)]


# ---- evaluations that are made up ----


@pytest.fixture
def made_up(monkeypatch):
    """Replaces evaluations by an answer, or by what the test puts for (path, length, context)."""
    answers, asked = {}, []

    def run(self, args, unscored):
        place = (args.path, args.tokens_per_sample, args.context_window)
        asked.append(place)
        result = {
            "loss": 3.0, "perplexity": 8.0, "tokens": 5601, "seconds": 2.0, "wall_s": 2.5,
            "peak_memory_mib": 200.0, "by_position": [[1.0], [1.0], [1.0], [1.0]],
        }  # fmt: skip
        answer = answers.get(place, extrapolate._Answer(result, None))
        if isinstance(answer, BaseException):
            raise answer
        return answer

    monkeypatch.setattr(extrapolate._FreshProcesses, "run", run)
    run.answers, run.asked = answers, asked
    return run


def test_an_interrupted_sweep_goes_on(made_up, tmp_path):
    made_up.answers[WIKI, 128, 0] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        sweep(ONE, tmp_path)
    assert [row["eval_length"] for row in json.loads((tmp_path / "report.json").read_text())] == [
        64
    ]
    made_up.answers.clear()
    made_up.asked.clear()
    assert [row.eval_length for row in sweep(f"{ONE} --no-plots", tmp_path)] == [64, 128]
    assert made_up.asked == [(WIKI, 128, 0)]


@pytest.mark.parametrize(
    "change", ["--max-tokens 512", "--gen-subset test", "--model-overrides \"{'dropout': 0.5}\""]
)
def test_what_figures_depend_on_is_evaluated_anew(made_up, tmp_path, change):
    sweep(f"{ONE} --no-plots", tmp_path)
    made_up.asked.clear()
    sweep(f"{ONE} --no-plots {change}", tmp_path)
    assert len(made_up.asked) == 2


def test_a_checkpoint_is_known_by_its_content(made_up, tmp_path):
    copy = tmp_path / "copy.pt"
    copy.write_bytes((GOLDEN / WIKI).read_bytes())
    sweep(f"{ONE} --no-plots", tmp_path)
    made_up.asked.clear()
    sweep(f"bin/main --path {copy} --lengths 64,128 --no-plots", tmp_path)
    assert made_up.asked == []
    state = torch.load(copy, weights_only=True)
    torch.save({**state, "more": 1}, copy)
    sweep(f"bin/main --path {copy} --lengths 64,128 --no-plots", tmp_path)
    assert len(made_up.asked) == 2


def test_the_same_window_is_evaluated_once(made_up, tmp_path):
    rows = sweep(f"bin/main --path {WIKI} --lengths 64 --strides length,64 --no-plots", tmp_path)
    assert made_up.asked == [(WIKI, 64, 0)]
    assert [(row.stride, row.context_window) for row in rows] == [("length", 0), (64, 0)]


def test_cheap_rows_come_first_with_the_time_left(made_up, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        sweep(f"bin/main --path {WIKI} --lengths 512,64 --strides 16,length --no-plots", tmp_path)
    assert [place[1:] for place in made_up.asked] == [(64, 0), (512, 0), (64, 48), (512, 496)]
    lines = [m for m in caplog.messages if m.startswith("[")]
    assert len(lines) == 4
    assert lines[0].startswith(
        "[1/4] alibi, length 64, non-overlapping: perplexity 8.00, 2.0 s; about "
    )
    assert lines[-1].endswith("sliding by 16: perplexity 8.00, 2.0 s")


def test_lengths_follow_from_the_training_length(made_up, tmp_path, caplog):
    rows = sweep(f"bin/main --path {WIKI} --no-plots", tmp_path)
    assert [row.eval_length for row in rows] == [64, 128, 256, 512, 1024]
    assert rows[0].subset == "valid"


def test_strides_longer_than_a_length_are_left_out(made_up, tmp_path, caplog):
    rows = sweep(f"{ONE} --strides 100 --no-plots", tmp_path)
    assert [(row.eval_length, row.stride, row.context_window) for row in rows] == [(128, 100, 28)]
    notice = "stride 100 is left out at length 64, which is shorter"
    assert notice in caplog.messages
    assert notice in (tmp_path / "report.md").read_text()


def test_other_evaluations_go_on_when_one_fails(made_up, tmp_path, caplog):
    made_up.answers[WIKI, 64, 0] = extrapolate._Answer(None, "it broke", ("beware",))
    with pytest.raises(RuntimeError, match=r"1 of 2 evaluations failed: .*length 64.*: it broke"):
        sweep(f"{ONE} --no-plots", tmp_path)
    assert [row["eval_length"] for row in json.loads((tmp_path / "report.json").read_text())] == [
        128
    ]
    text = (tmp_path / "report.md").read_text()
    assert "it broke" in text
    assert caplog.messages.count(f"{WIKI}: beware") == 1


def _die(sender, args, unscored):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_is_killed(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(extrapolate, "_evaluate", _die)
    with pytest.raises(RuntimeError, match=r"it was killed.*a smaller --max-tokens"):
        sweep(f"bin/main --path {WIKI} --lengths 64 --no-plots", tmp_path)


# ---- tables of positions ----


def _learned(tmp_path):
    """Writes a model with a table for 64 positions."""
    state = torch.load(GOLDEN / GPT, weights_only=True)
    del state["cfg"]["model"]["max_tokens"]
    state["cfg"]["model"]["decoder_learned_pos"] = True
    del state["model"]["decoder.embed_positions._float_tensor"]
    state["model"]["decoder.embed_positions.weight"] = torch.zeros(66, 48)
    torch.save(state, tmp_path / "learned.pt")
    return str(tmp_path / "learned.pt")


def test_lengths_beyond_a_table_are_not_available(made_up, tmp_path, caplog):
    path = _learned(tmp_path)
    rows = sweep(f"bin/main --path {path}:{WIKI} --lengths 64,128 --no-plots", tmp_path / "out")
    places = [(row.checkpoint, row.position_method, row.eval_length) for row in rows]
    assert places == [(path, "learned", 64), (WIKI, "alibi", 64), (WIKI, "alibi", 128)]
    notice = f"{path}: position method learned has 64 positions and cannot read windows of 128"
    assert [m for m in caplog.messages if m.startswith(notice)]
    assert "| learned | 64 | **8.00** | n/a |" in (tmp_path / "out" / "report.md").read_text()
    with pytest.raises(ValueError, match=r"--lengths: every length is beyond.*give 64 or less"):
        sweep(f"bin/main --path {path} --lengths 128 --no-plots", tmp_path / "out")


# ---- bad input ----


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("bin/main --lengths 64", "--path is needed"),
        ("bin/main --path nope.pt", "nope.pt"),
        (f"bin/main --path {WIKI}:{WIKI}", "is there 2 times; name it once"),
        (f"{ONE} --gen-subset nope", "Dataset not found: nope"),
        (
            f"bin/main --path {WIKI} --lengths 64,6000",
            "--lengths 6000 is beyond the data: valid has 5,601 tokens; give a smaller length",
        ),
        (f"{ONE} --strides 129,500", "--strides 129,500: every stride is longer than every length"),
        (f"{ONE} --model-overrides nonsense", "--model-overrides"),
    ],
)
def test_what_cannot_be_swept(made_up, tmp_path, command, message):
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        sweep(command, tmp_path)
    assert made_up.asked == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--lengths 64,0", "argument --lengths: '0' in '64,0'; allowed are whole numbers from 1"),
        ("--lengths=-3", "argument --lengths: '-3'"),
        ("--lengths 64,,128", "argument --lengths: ''"),
        ("--lengths 64,64", "argument --lengths: 64 is in '64,64' twice; give it once"),
        (
            "--strides lenght",
            "argument --strides: 'lenght' in 'lenght'; allowed are whole numbers ",
        ),
        ("--strides length,1.5", "the word 'length'"),
        ("--strides 1,1", "twice"),
        ("--tokens-per-sample 64", "--tokens-per-sample: the sweep sets it"),
        ("--context-window 64", "--context-window: the sweep sets it"),
    ],
)
def test_flags_that_are_wrong(capsys, flags, message):
    arguments = f"bin/main --path x.pt --results-path y {flags}".split()
    with pytest.raises(SystemExit) as leaving:
        options.parse_args_and_arch(options.get_extrapolate_parser(), arguments)
    assert leaving.value.code == 2
    assert message in capsys.readouterr().err


def test_results_need_a_folder(capsys):
    with pytest.raises(SystemExit) as leaving:
        options.parse_args_and_arch(options.get_extrapolate_parser(), ["bin/main"])
    assert leaving.value.code == 2
    assert "--results-path" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made(made_up, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="--results-path: cannot write there"):
        sweep(f"{ONE} --no-plots", tmp_path / "file")


def test_the_command_ends_with_a_message(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fairseq-extrapolate", "nope", "--results-path", "x"])
    with pytest.raises(SystemExit) as leaving:
        extrapolate.cli_main()
    assert leaving.value.code == 1
    assert "fairseq-extrapolate: error: --path is needed" in capsys.readouterr().err


def test_without_matplotlib_nothing_is_evaluated(made_up, monkeypatch, tmp_path):
    def missing():
        raise ImportError("the pictures need matplotlib")

    monkeypatch.setattr(extrapolate.plot, "check_matplotlib", missing)
    with pytest.raises(ImportError):
        sweep(ONE, tmp_path)
    assert made_up.asked == []
    assert len(sweep(f"{ONE} --no-plots", tmp_path)) == 2
    assert not list(tmp_path.glob("*.png"))


INTERRUPTED = """
import sys
from fairseq_cli import extrapolate
extrapolate._PRELOADED = ("presses_ctrl_c", *extrapolate._PRELOADED)
sys.argv = ["fairseq-extrapolate", *sys.argv[1:]]
extrapolate.cli_main()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked by a server on Linux")
def test_ctrl_c_while_the_server_imports_is_one_word(start_process, tmp_path):
    # As on a terminal, the signal reaches every process of the group.
    (tmp_path / "presses_ctrl_c.py").write_text(
        "import os, signal\nos.killpg(0, signal.SIGINT)\nprint('went on')\n"
    )
    search = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    process = start_process(
        [
            *(sys.executable, "-c", INTERRUPTED, *shlex.split(ONE)),
            *("--no-plots", "--cpu", "--results-path", str(tmp_path / "report")),
        ],
        cwd=GOLDEN,
        env={**os.environ, "PYTHONPATH": search},
    )
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (130, "interrupted\n")
    assert "went on" in out
