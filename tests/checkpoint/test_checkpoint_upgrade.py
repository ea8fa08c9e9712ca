"""Dictionaries of older versions."""

from __future__ import annotations

import argparse

import pytest

from fairseq.checkpoint.upgrade import upgrade_namespace, upgrade_state


def test_a_checkpoint_of_the_first_versions():
    state = upgrade_state(
        {
            "args": argparse.Namespace(arch="transformer_lm", task="language_modeling"),
            "model": {},
            "best_loss": 4.5,
            "optimizer": {"state": {}, "param_groups": []},
            "epoch": 7,
            "batch_offset": 12,
            "val_loss": 4.6,
        }
    )
    assert state["optimizer_history"] == [
        {
            "criterion_name": "CrossEntropyCriterion",
            "optimizer_name": "FairseqNAG",
            "lr_scheduler_state": {"best": 4.5},
            "num_updates": 0,
        }
    ]
    assert state["last_optimizer_state"] == {"state": {}, "param_groups": []}
    assert state["extra_state"] == {
        "epoch": 7,
        "batch_offset": 12,
        "val_loss": 4.6,
        "train_iterator": {"epoch": 7, "iterations_in_epoch": 12},
    }
    assert not {"best_loss", "optimizer", "epoch", "val_loss"} & set(state)


def test_optimizer_states_inside_the_history_are_moved_out():
    history = [
        {"criterion_name": "AdaptiveLoss", "optimizer": {"old": 1}, "best_loss": 5.0},
        {
            "criterion_name": "AdaptiveLoss",
            "optimizer_name": "FairseqAdam",
            "optimizer": {"new": 2},
            "lr_scheduler_state": {"best": 4.0},
            "num_updates": 10,
        },
    ]
    state = upgrade_state({"model": {}, "optimizer_history": history, "extra_state": {"epoch": 3}})
    assert state["last_optimizer_state"] == {"new": 2}
    assert all("optimizer" not in entry for entry in state["optimizer_history"])
    assert state["optimizer_history"][-1]["optimizer_name"] == "FairseqAdam"
    assert state["extra_state"]["train_iterator"] == {"epoch": 3, "iterations_in_epoch": 0}


def test_epochs_start_at_one():
    iterator = {"epoch": 0, "iterations_in_epoch": 5}
    state = upgrade_state({"model": {}, "extra_state": {"train_iterator": iterator}})
    assert state["extra_state"]["train_iterator"]["epoch"] == 1


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"max_positions": 512}, {"max_source_positions": 512, "max_target_positions": 512}),
        ({}, {"task": "translation"}),
        ({"task": "language_modeling"}, {"task": "language_modeling"}),
        ({"raw_text": True, "lazy_load": False}, {"dataset_impl": "raw"}),
        ({"raw_text": False, "lazy_load": True}, {"dataset_impl": "lazy"}),
        ({"remove_bpe": "@@ "}, {"post_process": "@@ "}),
        ({"min_lr": 1e-9}, {"stop_min_lr": 1e-9}),
        ({"min_lr": 1e-4, "stop_min_lr": 1e-9}, {"min_lr": 1e-4, "stop_min_lr": 1e-9}),
        ({"lr": 0.5}, {"lr": [0.5]}),
        ({"data": ["a", "b"]}, {"data": "a"}),
    ],
)
def test_options_of_old_command_lines(old, new):
    args = argparse.Namespace(**old)
    upgrade_namespace(args)
    assert {name: getattr(args, name) for name in new} == new
    assert hasattr(args, "min_lr") == ("min_lr" in new)


@pytest.mark.parametrize(("old", "new"), [(True, "hard"), (False, None), ("soft", "soft")])
def test_alignments_were_a_switch(old, new):
    state = upgrade_state({"model": {}, "cfg": {"generation": {"print_alignment": old}}})
    assert state["cfg"]["generation"]["print_alignment"] == new
