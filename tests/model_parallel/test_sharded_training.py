"""Checkpoints that every process writes its parts of: the same run, in any layout that reads them.

Runs are killed inside a save, too.
"""

import functools
import multiprocessing
import os
import signal

import pytest
import torch
import torch.distributed as dist
import training_cases
from parallel_launch import findings, launch
from torch.multiprocessing.spawn import ProcessExitedException
from train_runs import make_tiny_data

from fairseq.checkpoint import index, sharded
from fairseq.checkpoint.reading import read_checkpoint, read_index

# Four batches an update, whoever computes them; two updates are the first epoch.
MODELS = ("adaptive", "uneven")
IN_PARTS = "--use-sharded-state --save-interval-updates 1 --max-update 2"
WRITERS = {
    "tp2_dp2": (4, "adaptive", "--tensor-parallel-size 2 --update-freq 2"),
    "fsdp2_tp2": (4, "uneven", "--tensor-parallel-size 2 --data-parallel fsdp2 --update-freq 2"),
    "fsdp2": (2, "adaptive", "--data-parallel fsdp2 --update-freq 2"),
    "ddp2": (2, "adaptive", "--data-parallel ddp --update-freq 2"),
}
READERS = {
    "tp2_dp2 by one": ("tp2_dp2", 1, "--update-freq 4"),
    "tp2_dp2 by sp4": ("tp2_dp2", 4, "--sequence-parallel-size 4 --update-freq 4"),
    "tp2_dp2 by fsdp2": ("tp2_dp2", 2, "--data-parallel fsdp2 --update-freq 2"),
    "fsdp2_tp2 by one": ("fsdp2_tp2", 1, "--update-freq 4"),
    "fsdp2 by tp2": ("fsdp2", 2, "--tensor-parallel-size 2 --update-freq 4"),
    "ddp2 by fsdp2": ("ddp2", 2, "--data-parallel fsdp2 --update-freq 2"),
}
KILLED = "--data-parallel fsdp2 --use-sharded-state --save-interval-updates 1"


def killed(folder, name, where):
    """Trains until this process, or another, is killed inside the second save."""
    saves = []

    def die_at_second(original):
        def wrapper(*args, **kwargs):
            saves.append(1)
            if len(saves) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return wrapper

    if where == "tensors" and dist.get_rank() == dist.get_world_size() - 1:
        sharded._Writer.write_data = die_at_second(sharded._Writer.write_data)
    elif where == "file" and dist.get_rank() == 0:
        index.save_atomically = die_at_second(index.save_atomically)
    options = f"{KILLED} --max-update 2 --update-freq {4 // dist.get_world_size()}"
    return training_cases.run(folder, name, "adaptive", options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder with what all runs have found."""
    path = tmp_path_factory.mktemp("parts")
    make_tiny_data(path)
    multiprocessing.set_forkserver_preload([training_cases.__name__])
    run = functools.partial(functools.partial, training_cases.run, str(path))

    def writers(size):
        return {
            name: run(name, model, f"{options} {IN_PARTS}")
            for name, (processes, model, options) in WRITERS.items()
            if processes == size
        }

    def readers(size):
        return {
            name: run(
                name.replace(" ", "_"),
                WRITERS[source][1],
                f"{options} --max-update 4 --restore-file {path}/{source}/checkpoint1.pt",
            )
            for name, (source, processes, options) in READERS.items()
            if processes == size
        }

    def after_kill(size):
        # A place within an epoch is one for as many workers.
        options = f"{KILLED} --max-update 4 --update-freq {4 // size} --keep-interval-updates 1"
        return {f"after kill {size}": run(f"killed_{size}", "adaptive", options)}

    kept = {}
    for size, where in ((2, "tensors"), (1, "file")):
        case = functools.partial(killed, str(path), f"killed_{size}", where)
        with pytest.raises(ProcessExitedException, match="SIGKILL"):
            launch(size, {"killed": case}, path)
        good = read_checkpoint(path / f"killed_{size}" / "checkpoint_last.pt")
        kept[size] = (
            good["optimizer_history"][-1]["num_updates"],
            len(list(path.glob(f"killed_{size}/*.parts*"))),
        )
    torch.save(kept, path / "kept.pt")
    whole = run("whole", "adaptive", WRITERS["tp2_dp2"][2] + " --max-update 2")
    launch(4, {**writers(4), "whole files": whole, **readers(4)}, path)
    launch(2, {**writers(2), **readers(2), **after_kill(2)}, path)
    alone = {model: run(model, model, "--update-freq 4 --max-update 4") for model in MODELS}
    for name, case in {**alone, **readers(1), **after_kill(1)}.items():
        torch.save(case(), path / f"{name}.1.0.pt")
    return path


def assert_same_curve(ours, wanted):
    for update, line in ours.items():
        for key in ("loss", "gnorm", "wpb", "bsz", "lr"):
            near = pytest.approx(wanted[update][key], abs=0.0011, rel=2e-4)
            assert line[key] == near, (update, key)


@pytest.mark.parametrize("name", READERS)
def test_training_goes_on_from_parts_in_another_layout(name, folder):
    source, size, _ = READERS[name]
    _, model, _ = WRITERS[source]
    ours = findings(folder, name, size)[0]
    assert list(ours) == [3, 4]
    assert_same_curve(ours, findings(folder, model, 1)[0])
    assert is_in_parts(folder / source / "checkpoint1.pt")


def is_in_parts(path):
    return index.is_index(read_index(path))


def test_the_last_checkpoint_is_one_file_like_the_one_without_parts(folder):
    assert not is_in_parts(folder / "tp2_dp2" / "checkpoint_last.pt")
    parts = torch.load(folder / "tp2_dp2" / "checkpoint_last.pt", weights_only=True)
    whole = torch.load(folder / "whole" / "checkpoint_last.pt", weights_only=True)
    assert list(parts) == list(whole)
    assert parts["alibi"].keys() == whole["alibi"].keys()
    assert list(parts["model"]) == list(whole["model"])
    for name, tensor in whole["model"].items():
        torch.testing.assert_close(parts["model"][name], tensor, rtol=0, atol=1e-6)
    ours, wanted = (each["last_optimizer_state"] for each in (parts, whole))
    assert ours["param_groups"] == wanted["param_groups"]
    assert ours["state"].keys() == wanted["state"].keys()
    for key, state in wanted["state"].items():
        for name, value in state.items():
            torch.testing.assert_close(ours["state"][key][name], value, rtol=0, atol=1e-5)
    for entry in ("train_iterator", "best", "val_loss"):
        assert parts["extra_state"][entry] == whole["extra_state"][entry]


def test_every_process_writes_a_share_and_nothing_twice(folder):
    """Of two processes with the same weights each writes some; of those with parts, its own."""
    state = read_checkpoint(folder / "ddp2" / "checkpoint1.pt")
    assert all(tensor.device.type == "cpu" for tensor in state["model"].values())
    for name, size in (("ddp2", 2), ("tp2_dp2", 4)):
        (parts,) = folder.joinpath(name).glob("checkpoint_*_2.parts")
        sizes = [file.stat().st_size for file in sorted(parts.glob("*.distcp"))]
        assert len(sizes) == size
        stored = sharded.stored_tensors(parts)
        numbers = sum(each.size.numel() for each in stored.values())
        assert 4 * numbers < sum(sizes) < 4 * numbers + 3000 * len(stored) * size
        assert max(sizes) < 0.8 * sum(sizes)


@pytest.mark.parametrize("size", [1, 2])
def test_killed_inside_a_save(folder, size):
    """One of two processes while it writes tensors; one alone before it replaces the file."""
    updates, folders = torch.load(folder / "kept.pt")[size]
    assert updates == 1
    assert folders == 2  # the good one, and what the killed save left
    ours = findings(folder, f"after kill {size}", size)[0]
    later = {update: line for update, line in ours.items() if update > 1}
    assert list(later) == [2, 3, 4]
    assert_same_curve(later, findings(folder, "adaptive", 1)[0])
    save_dir = folder / f"killed_{size}"
    used = {read_index(path)["alibi"].get("parts") for path in save_dir.glob("*.pt")}
    assert {path.name for path in save_dir.glob("*.parts*")} == used - {None}
