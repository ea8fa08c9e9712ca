"""fairseq-train with weights shared by processes does what one process does."""

import functools
import multiprocessing

import pytest
import torch
import training_cases
from parallel_launch import findings, launch
from train_runs import make_tiny_data

# name: (processes, model, options); updates by 4 batches, whoever computes them
LAYOUTS = {
    "tp2_adaptive": (2, "adaptive", "--tensor-parallel-size 2 --update-freq 4"),
    "tp2_fire": (2, "fire", "--tensor-parallel-size 2 --update-freq 4 --data-parallel ddp"),
    "tp4_plain": (4, "plain", "--tensor-parallel-size 4 --update-freq 4"),
    "dp2_tp2_adaptive": (
        4,
        "adaptive",
        "--tensor-parallel-size 2 --data-parallel ddp --update-freq 2",
    ),
    "dp2_tp2_plain": (4, "plain", "--tensor-parallel-size 2 --update-freq 2"),
    "fsdp2_tp2_plain": (
        4,
        "plain",
        "--tensor-parallel-size 2 --data-parallel fsdp2 --update-freq 2",
    ),
    "fsdp2_tp2_fire": (
        4,
        "fire",
        "--tensor-parallel-size 2 --data-parallel fsdp2 --update-freq 2",
    ),
    "fsdp2_tp2_adaptive": (
        4,
        "adaptive",
        "--tensor-parallel-size 2 --data-parallel fsdp2 --update-freq 2",
    ),
    "fsdp2_tp2_uneven": (
        4,
        "uneven",
        "--tensor-parallel-size 2 --data-parallel fsdp2 --update-freq 2",
    ),
    "ddp4_adaptive": (4, "adaptive", "--data-parallel ddp --update-freq 1"),
}
UPDATES = "--max-update 3"
# The first two updates are the first epoch, where a position in the data fits any layout.
FIRST = "--tensor-parallel-size 2 --update-freq 2 --max-update 2"
LAST = "--data-parallel fsdp2 --update-freq 2 --max-update 6"


ONE = "--update-freq 4 --max-update"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder with what all runs have found."""
    path = tmp_path_factory.mktemp("training")
    make_tiny_data(path)
    run = functools.partial(functools.partial, training_cases.run, str(path))
    layouts = {
        processes: {
            name: run(name, model, f"{options} --max-update 3")
            for name, (wanted, model, options) in LAYOUTS.items()
            if wanted == processes
        }
        for processes in (2, 4)
    }
    multiprocessing.set_forkserver_preload([training_cases.__name__])
    launch(4, {**layouts[4], "first": run("resumed", "adaptive", FIRST)}, path)
    alone = {"middle": run("resumed", "adaptive", f"{ONE} 4")}
    alone |= {model: run(f"one_{model}", model, f"{ONE} 3") for model in training_cases.MODELS}
    alone["whole"] = run("whole", "adaptive", f"{ONE} 6")
    for name, case in alone.items():
        torch.save(case(), path / f"{name}.1.0.pt")
    launch(2, {**layouts[2], "last": run("resumed", "adaptive", LAST)}, path)
    return path


def assert_same_curve(ours, wanted):
    for update, line in ours.items():
        for key in ("loss", "gnorm", "wpb", "bsz", "lr"):
            near = pytest.approx(wanted[update][key], abs=0.0011, rel=2e-4)
            assert line[key] == near, (update, key)


def assert_close_files(ours, wanted):
    ours, wanted = (torch.load(f / "checkpoint_last.pt", weights_only=True) for f in (ours, wanted))
    assert list(ours["model"]) == list(wanted["model"])
    for name, tensor in wanted["model"].items():
        torch.testing.assert_close(ours["model"][name], tensor, atol=2e-5, rtol=1e-4)
    for index, state in wanted["last_optimizer_state"]["state"].items():
        for name, value in state.items():
            own = ours["last_optimizer_state"]["state"][index][name]
            torch.testing.assert_close(own, value, atol=5e-5, rtol=1e-3)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_trains_as_one_process_does(name, folder):
    processes, model, _ = LAYOUTS[name]
    ours = findings(folder, name, processes)[0]
    assert list(ours) == [1, 2, 3]
    assert_same_curve(ours, findings(folder, model, 1)[0])
    assert_close_files(folder / name, folder / f"one_{model}")


def test_training_goes_on_in_another_layout(folder):
    """tp 2 x dp 2, then one process, then fsdp2 on two."""
    whole = findings(folder, "whole", 1)[0]
    parts = [findings(folder, *part)[0] for part in (("first", 4), ("middle", 1), ("last", 2))]
    assert [list(part) for part in parts] == [[1, 2], [3, 4], [5, 6]]
    for part in parts:
        assert_same_curve(part, whole)
    assert_close_files(folder / "resumed", folder / "whole")
