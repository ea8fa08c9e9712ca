"""Lines of progress: their form, their digits, when they appear, where else they go."""

import json
import logging

import pytest

from fairseq.logging.meters import AverageMeter
from fairseq.logging.progress_bar import format_stat, log_to_file, progress_bar


class FromTheMiddle(list):
    n = 2

    def __len__(self):
        return super().__len__() + self.n


def lines_of(caplog):
    return [(record.name, record.getMessage()) for record in caplog.records]


def run(bar, caplog, stats, tag="train_inner"):
    with caplog.at_level(logging.INFO):
        for i, _ in enumerate(bar, start=1):
            bar.log(stats, tag=tag, step=i)
        bar.print(stats, tag="train", step=i)
    return lines_of(caplog)


def test_simple(caplog):
    bar = progress_bar([0, 0, 0], log_format="simple", log_interval=2, epoch=1, prefix="x")
    assert run(bar, caplog, {"loss": 6.91649, "wps": 123456.78}) == [
        ("train_inner", "epoch 001 | x:      2 / 3 loss=6.91649, wps=123457"),
        ("train", "epoch 001 | x | loss 6.91649 | wps 123457"),
    ]


def test_json_from_the_middle_of_an_epoch(caplog):
    bar = progress_bar(FromTheMiddle([0, 0]), log_format="json", log_interval=1, epoch=2)
    lines = run(bar, caplog, {"loss": 7.5})
    assert [json.loads(text) for _, text in lines] == [
        {"epoch": 2, "update": 1.75, "loss": "7.5"},
        {"epoch": 2, "update": 2.0, "loss": "7.5"},
        {"epoch": 2, "train_loss": "7.5"},
    ]


def test_none_shows_nothing_and_still_iterates(caplog):
    bar = progress_bar([1, 2], log_format="none", epoch=1)
    assert run(bar, caplog, {"loss": 1}) == [] and list(bar) == [1, 2]


def test_tqdm_becomes_simple_without_a_terminal(caplog, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)
    bar = progress_bar([0], log_interval=1, epoch=3)
    assert ("train", "epoch 003 | loss 1") in run(bar, caplog, {"loss": 1})


def test_tqdm_on_a_terminal(capsys, caplog, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with caplog.at_level(logging.INFO):
        bar = progress_bar([0, 0], log_interval=1, epoch=3)
        lines = run(bar, caplog, {"loss": 1})
    assert lines == [("train", "epoch 003 | loss 1")]
    assert "epoch 003" in capsys.readouterr().err


def test_numbers_have_six_significant_digits():
    average = AverageMeter()
    average.update(1.23456)
    printed = [format_stat(x) for x in (9216.0, 1e-07, 0.00625, 1234567.0, average, None)]
    assert printed == ["9216", "1e-07", "0.00625", "1.23457e+06", "1.235", None]


def test_unknown_format_is_named():
    with pytest.raises(ValueError, match="'xml' is none of json, none, simple, tqdm"):
        progress_bar([], log_format="xml")


def test_a_log_file_receives_the_lines_once(tmp_path):
    path = tmp_path / "run.log"
    root = logging.getLogger()
    before = list(root.handlers)
    level = root.level
    root.setLevel(logging.INFO)
    try:
        for _ in range(2):
            bar = progress_bar([0], log_format="simple", log_file=str(path), epoch=1)
        bar.print({"loss": 1}, tag="train")
    finally:
        root.setLevel(level)
        for handler in [h for h in root.handlers if h not in before]:
            handler.close()
            root.removeHandler(handler)
    assert path.read_text().count("loss 1") == 1


def test_a_log_file_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--log-file: cannot write .*/nowhere/run\.log"):
        log_to_file(str(tmp_path / "nowhere" / "run.log"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_folder_for_events_that_cannot_be_written_is_named(tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / "file").write_text("")
    bar = progress_bar([0], log_format="none", tensorboard_logdir=str(tmp_path / "file" / "events"))
    with pytest.raises(OSError, match=r"--tensorboard-logdir: cannot write .*/file/events"):
        bar.print({"loss": 1, "num_updates": 7}, tag="valid", step=7)


def test_a_closed_stderr_is_no_terminal(monkeypatch):
    monkeypatch.setattr("sys.stderr", None)
    assert list(progress_bar([1, 2], log_format="tqdm")) == [1, 2]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_events_come_back(tmp_path, caplog):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    bar = progress_bar([0], log_format="none", epoch=1, tensorboard_logdir=str(tmp_path))
    bar.print({"loss": 2.5, "num_updates": 7}, tag="valid", step=7)
    read = events.EventAccumulator(str(tmp_path / "valid"))
    read.Reload()
    assert [(e.step, e.value) for e in read.Scalars("loss")] == [(7, 2.5)]
    assert read.Tags()["scalars"] == ["loss"]


def test_a_missing_service_is_a_warning(caplog, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    bar = progress_bar([0], log_format="none", epoch=1, wandb_project="p", wandb_run_name="r")
    bar.print({"loss": 1}, tag="train", step=1)
    assert "pip install wandb" in caplog.text
