"""What a sweep consists of, what is done, how long it takes."""

from __future__ import annotations

import copy
import hashlib
import json

import pytest
import torch

from fairseq.dataclass.configs import FairseqConfig
from fairseq.evaluation.extrapolation import (
    CheckpointInfo,
    Journal,
    TimeLeft,
    Window,
    describe_checkpoint,
    file_digest,
    row_cost,
    windows_of,
)
from fairseq.models.transformer_lm import TransformerLanguageModelConfig


def test_windows():
    windows, skipped = windows_of([128, 64], ["length", 100, 64])
    assert [(w.length, w.stride, w.new_tokens, w.context) for w in windows] == [
        (64, "length", 64, 0),
        (128, "length", 128, 0),
        (128, 100, 100, 28),
        (64, 64, 64, 0),
        (128, 64, 64, 64),
    ]
    assert skipped == [Window(64, 100)]
    assert str(windows[0]) == "length 64, non-overlapping"
    assert str(windows[2]) == "length 128, sliding by 100"


# ---- checkpoints ----


def _state(**changes):
    cfg = FairseqConfig()
    cfg.model = TransformerLanguageModelConfig(decoder_embed_dim=32, decoder_layers=2)
    record = {"position_method": "alibi", "train_length": 64}
    for name, value in changes.items():
        section, _, field = name.partition("__")
        if section == "record":
            record[field] = value
        else:
            setattr(getattr(cfg, section), field, value)
    return {"cfg": cfg, "alibi": record, "optimizer_history": [{"num_updates": 7}]}


@pytest.fixture
def describe(tmp_path):
    path = tmp_path / "a.pt"
    path.write_bytes(b"content")
    return lambda **changes: describe_checkpoint(
        str(path), copy.deepcopy(_state(**changes)), torch.nn.Linear(3, 4)
    )


def test_what_is_known_of_a_checkpoint(describe):
    info = describe(common__seed=5)
    assert (info.position_method, info.train_length, info.seed) == ("alibi", 64, 5)
    assert (info.updates, info.num_params, info.width, info.layers) == (7, 16, 32, 2)
    assert info.position_limit is None
    assert info.digest == hashlib.sha256(b"content").hexdigest()


@pytest.mark.parametrize(
    "changes",
    [
        {"common__seed": 2},
        {"checkpoint__save_dir": "elsewhere"},
        {"common__log_interval": 7},
        {"dataset__num_workers": 9},
        {"distributed_training__distributed_port": 1234},
    ],
)
def test_runs_of_one_experiment(describe, changes):
    assert describe(**changes).experiment == describe().experiment


@pytest.mark.parametrize(
    "changes",
    [
        {"optimization__lr": [0.1]},
        {"dataset__max_tokens": 100},
        {"model__decoder_layers": 3},
        {"record__train_length": 128},
        {"record__position_method": "none"},
    ],
)
def test_runs_of_another_experiment(describe, changes):
    assert describe(**changes).experiment != describe().experiment


def test_digest_of_files(tmp_path):
    (tmp_path / "a").write_bytes(b"one")
    (tmp_path / "b").write_bytes(b"two")
    wanted = hashlib.sha256(b"onetwo").hexdigest()
    assert file_digest([tmp_path / "a", tmp_path / "b"]) == wanted


# ---- what is done ----


def test_a_journal_keeps_results(tmp_path):
    journal = Journal(tmp_path / "rows.jsonl")
    key = Journal.key(length=64, checkpoint="a")
    assert key == Journal.key(checkpoint="a", length=64) != Journal.key(checkpoint="a", length=65)
    assert journal.get(key) is None
    journal.append(key, {"loss": 1.25})
    journal.append("other", {"loss": float("inf")})
    again = Journal(tmp_path / "rows.jsonl")
    assert again.get(key) == {"loss": 1.25}
    assert again.get("other") == {"loss": float("inf")}


def test_an_interrupted_line_is_forgotten_and_does_not_spoil_the_next(tmp_path):
    path = tmp_path / "rows.jsonl"
    whole = json.dumps({"key": "a", "result": {"loss": 1}})
    path.write_text(whole + "\n" + whole[:20])
    journal = Journal(path)
    assert journal.get("a") == {"loss": 1}
    journal.append("b", {"loss": 2})
    again = Journal(path)
    assert (again.get("a"), again.get("b")) == ({"loss": 1}, {"loss": 2})


# ---- how long it takes ----


def _info(**changes):
    known = {
        "path": "a.pt", "digest": "d", "position_method": "alibi", "train_length": 64, "seed": 1,
        "updates": 10, "experiment": "e", "num_params": 1000, "width": 8, "layers": 2,
        "position_limit": None,
    }  # fmt: skip
    return CheckpointInfo(**{**known, **changes})


def test_the_cost_of_a_row():
    # 100 tokens in windows of 10: ten windows, each token through 1000 parameters, and 10 tokens
    # of 8 numbers, twice, in 2 layers.
    assert row_cost(_info(), Window(10, "length"), 100) == 100 * (1000 + 2 * 10 * 8 * 2)
    # Windows that advance by 3 are 34, each of 10.
    assert row_cost(_info(), Window(10, 3), 100) == 340 * (1000 + 2 * 10 * 8 * 2)


def test_time_left():
    left = TimeLeft([10.0, 10.0, 40.0])
    assert left.seconds is None
    left.add(10.0, work_s=2.0, start_s=1.0)
    # Two rows of 50 together at 0.2 s for each unit, each after a second of starting.
    assert left.seconds == pytest.approx(50 * 0.2 + 2)
    left.add(10.0, work_s=4.0, start_s=3.0)
    assert left.seconds == pytest.approx(40 * 6 / 20 + 2)
    left.add(40.0, work_s=1.0, start_s=1.0)
    assert left.seconds == 0
