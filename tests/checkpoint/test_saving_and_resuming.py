"""When checkpoints are written, under which names, and what a run goes on from."""

from __future__ import annotations

import dataclasses
import os
import types
from pathlib import Path

import pytest
import torch

from fairseq import checkpoint_utils
from fairseq.data.dictionary import Dictionary
from fairseq.dataclass.configs import CheckpointConfig

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "invented"


class _Iterator:
    """A position in the data: batches 0 to 9 of each epoch."""

    def __init__(self, epoch=1, offset=0):
        self.epoch, self.offset = epoch, offset

    def end_of_epoch(self):
        return self.offset == 10

    def state_dict(self):
        return {"version": 2, "epoch": self.epoch, "iterations_in_epoch": self.offset}

    def load_state_dict(self, state):
        self.epoch, self.offset = state["epoch"], state["iterations_in_epoch"]


class _Trainer:
    """Has one weight, and writes it as a trainer writes its model."""

    checkpoint_suffix = ""
    is_data_parallel_master = should_save_checkpoint_on_current_rank = True

    def __init__(self, cfg, **model):
        self.checkpoint = cfg
        self.cfg = types.SimpleNamespace(model=types.SimpleNamespace(**model))
        self.task = types.SimpleNamespace()
        self.weight = torch.zeros(1)
        self.updates = 0
        self.best = None
        self.loaded = None
        self.lr_epoch = None

    def consolidate_optimizer(self):
        pass

    def get_num_updates(self):
        return self.updates

    def save_checkpoint(self, filename, extra_state):
        checkpoint_utils.torch_persistent_save(
            {"model": {"w": self.weight}, "extra_state": extra_state},
            filename,
            async_write=self.checkpoint.write_checkpoints_asynchronously,
        )

    def load_checkpoint(self, filename, *resets, reset_meters):
        self.loaded = (os.path.basename(filename), *resets, reset_meters)
        if not os.path.exists(filename):
            return None
        return torch.load(filename, weights_only=True)["extra_state"]

    def get_train_iterator(self, epoch, load_dataset):
        return _Iterator(epoch)

    def lr_step(self, epoch):
        self.lr_epoch = epoch


@pytest.fixture
def cfg(tmp_path):
    return CheckpointConfig(save_dir=str(tmp_path))


def _run(cfg, *saves):
    """Saves after each of (epoch, offset, updates, validation loss)."""
    trainer = _Trainer(cfg)
    for epoch, offset, updates, val_loss in saves:
        trainer.updates = updates
        trainer.weight.fill_(updates)
        checkpoint_utils.save_checkpoint(cfg, trainer, _Iterator(epoch, offset), val_loss)
    checkpoint_utils.finish_writing()
    return trainer


def _weights(cfg):
    """Returns file name -> the update it was written at."""
    return {
        path.name.removesuffix(".pt"): int(torch.load(path, weights_only=True)["model"]["w"])
        for path in Path(cfg.save_dir).iterdir()
    }


@pytest.mark.parametrize("asynchronous", [False, True])
def test_five_epochs_with_pruning_leave_what_the_original_leaves(cfg, asynchronous):
    # logs/naming_keep.log: --keep-last-epochs 2 --keep-best-checkpoints 1, falling losses.
    cfg = dataclasses.replace(
        cfg,
        keep_last_epochs=2,
        keep_best_checkpoints=1,
        write_checkpoints_asynchronously=asynchronous,
    )
    losses = [7.1, 6.2, 5.9, 5.7, 5.48]
    trainer = _run(cfg, *((e + 1, 10, 10 * (e + 1), loss) for e, loss in enumerate(losses)))
    assert _weights(cfg) == {
        "checkpoint.best_loss_5.48": 50,
        "checkpoint4": 40,
        "checkpoint5": 50,
        "checkpoint_best": 50,
        "checkpoint_last": 50,
    }
    assert trainer.best == 5.48


def test_the_best_is_kept_and_a_tie_rewrites_it(cfg):
    _run(cfg, (1, 10, 10, 5.0), (2, 10, 20, 4.5), (3, 10, 30, 4.9))
    assert _weights(cfg)["checkpoint_best"] == 20
    _run(cfg, (1, 10, 10, 5.0), (2, 10, 20, 4.5), (3, 10, 30, 4.5))
    assert _weights(cfg)["checkpoint_best"] == 30


def test_larger_may_be_better(cfg):
    cfg = dataclasses.replace(cfg, maximize_best_checkpoint_metric=True)
    assert _run(cfg, (1, 10, 10, 0.5), (2, 10, 20, 0.7), (3, 10, 30, 0.6)).best == 0.7
    assert _weights(cfg)["checkpoint_best"] == 20


def test_saves_inside_an_epoch(cfg):
    cfg = dataclasses.replace(
        cfg, save_interval_updates=2, keep_interval_updates=2, no_epoch_checkpoints=True
    )
    _run(cfg, (1, 2, 2, None), (1, 4, 4, None), (1, 6, 6, None), (1, 10, 10, 5.0))
    assert _weights(cfg) == {
        "checkpoint_1_4": 4,
        "checkpoint_1_6": 6,
        "checkpoint_best": 10,
        "checkpoint_last": 10,
    }


def test_no_save_still_follows_the_best(cfg):
    cfg = dataclasses.replace(cfg, no_save=True)
    assert _run(cfg, (1, 10, 10, 5.0), (2, 10, 20, 6.0)).best == 5.0
    assert os.listdir(cfg.save_dir) == []


def test_the_log_says_what_was_saved(cfg, caplog):
    with caplog.at_level("INFO"):
        _run(cfg, (2, 10, 20, None))
    preparing, saved = [record.getMessage() for record in caplog.records]
    assert preparing == "Preparing to save checkpoint for epoch 2 @ 20 updates"
    start = f"Saved checkpoint {cfg.save_dir}/checkpoint2.pt (epoch 2 @ 20 updates, score None) "
    assert saved.startswith(start + "(writing took ")


def test_a_failed_background_write_reaches_the_trainer(cfg, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_utils, "save_atomically", fail)
    cfg = dataclasses.replace(cfg, write_checkpoints_asynchronously=True, no_last_checkpoints=True)
    with pytest.raises(OSError, match="No space left"):
        _run(cfg, (1, 10, 10, None))


def test_going_on_in_the_middle_of_an_epoch(cfg):
    _run(cfg, (1, 10, 10, 5.0), (2, 4, 14, None))
    trainer = _Trainer(cfg)
    extra_state, iterator = checkpoint_utils.load_checkpoint(cfg, trainer)
    assert trainer.loaded == ("checkpoint_last.pt", False, False, {}, False)
    assert extra_state == {
        "train_iterator": {"version": 2, "epoch": 2, "iterations_in_epoch": 4},
        "val_loss": None,
        "best": 5.0,
    }
    assert (iterator.epoch, iterator.offset) == (2, 4)
    assert trainer.best == 5.0
    assert trainer.lr_epoch == 2


def test_a_fresh_start(cfg):
    extra_state, iterator = checkpoint_utils.load_checkpoint(cfg, _Trainer(cfg))
    assert extra_state is None
    assert iterator.epoch == 1


@pytest.mark.parametrize(
    ("flag", "epoch", "best"),
    [("reset_dataloader", 1, 5.0), ("reset_meters", 2, None), ("reset_optimizer", 2, None)],
)
def test_reset_flags(cfg, flag, epoch, best):
    _run(cfg, (2, 4, 14, 5.0))
    trainer = _Trainer(cfg)
    _, iterator = checkpoint_utils.load_checkpoint(
        dataclasses.replace(cfg, **{flag: True}), trainer
    )
    assert (iterator.epoch, trainer.best) == (epoch, best)


def test_fine_tuning_takes_the_parameters_only_and_only_the_first_time(cfg, tmp_path):
    _run(cfg, (4, 10, 40, 5.0))
    model = str(tmp_path / "checkpoint_last.pt")
    fresh = dataclasses.replace(cfg, save_dir=str(tmp_path / "new"), finetune_from_model=model)
    trainer = _Trainer(fresh)
    _, iterator = checkpoint_utils.load_checkpoint(fresh, trainer)
    assert trainer.loaded == ("checkpoint_last.pt", True, True, {}, True)
    assert (iterator.epoch, trainer.best) == (1, None)

    _run(fresh, (2, 10, 20, 6.0))
    trainer = _Trainer(fresh)
    _, iterator = checkpoint_utils.load_checkpoint(fresh, trainer)
    assert trainer.loaded == ("checkpoint_last.pt", False, False, {}, False)
    assert iterator.epoch == 2


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"restore_file": "nope.pt"}, FileNotFoundError, r"--restore-file: there is no nope\.pt"),
        ({"finetune_from_model": "no.pt"}, FileNotFoundError, r"--finetune-from-model: .* no\.pt"),
        ({"continue_once": "no.pt"}, FileNotFoundError, r"--continue-once: .* no\.pt"),
        (
            {"finetune_from_model": "a.pt", "reset_meters": True},
            ValueError,
            "leave out --reset-meters",
        ),
        (
            {"finetune_from_model": "a.pt", "restore_file": "b.pt"},
            ValueError,
            "--finetune-from-model and --restore-file",
        ),
        ({"optimizer_overrides": "lr=3"}, ValueError, "--optimizer-overrides"),
    ],
)
def test_flags_that_cannot_be_followed(cfg, settings, error, message):
    cfg = dataclasses.replace(cfg, **settings)
    with pytest.raises(error, match=message):
        checkpoint_utils.load_checkpoint(cfg, _Trainer(cfg))


def _resume_from_original(cfg, *, dictionary=None, **changes):
    path = str(GOLDEN / "ckpt" / "gpt_tiny" / "checkpoint_last.pt")
    cfg = dataclasses.replace(cfg, **{"restore_file": path, **changes})
    trainer = _Trainer(cfg, position_method="sinusoidal")
    if dictionary is not None:
        trainer.task.source_dictionary = dictionary
        trainer.cfg.model.position_method = "alibi"
    return checkpoint_utils.load_checkpoint(cfg, trainer)


def test_another_position_method_is_noticed(cfg, caplog):
    with pytest.raises(ValueError, match=r"position method alibi .*, this run uses sinusoidal"):
        _resume_from_original(cfg)
    path = str(GOLDEN / "ckpt" / "gpt_tiny" / "checkpoint_last.pt")
    _resume_from_original(cfg, restore_file="checkpoint_last.pt", finetune_from_model=path)
    assert "this run uses sinusoidal" in caplog.text


def test_another_dictionary_is_noticed(cfg):
    small = Dictionary()
    small.add_symbol("a")
    with pytest.raises(ValueError, match="knows 4,192 symbols, the dictionary of the data has 5"):
        _resume_from_original(cfg, dictionary=small)


def test_the_save_folder_is_made_and_tried(tmp_path):
    checkpoint_utils.verify_checkpoint_directory(tmp_path / "a" / "b")
    assert os.listdir(tmp_path / "a" / "b") == []
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="--save-dir"):
        checkpoint_utils.verify_checkpoint_directory(tmp_path / "file" / "c")
