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
    "tp2_half": (2, "half", "--tensor-parallel-size 2 --update-freq 4"),
    "tp4_plain": (4, "plain", "--tensor-parallel-size 4 --update-freq 4"),
    "dp2_tp2_adaptive": (
        4,
        "adaptive",
        "--tensor-parallel-size 2 --data-parallel ddp --update-freq 2",
    ),
    "dp2_tp2_plain": (4, "plain", "--tensor-parallel-size 2 --update-freq 2"),
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
EXACT = [name for name in LAYOUTS if "half" not in name]


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
    launch(4, layouts[4], path)
    refused = run("refused", "half", "--tensor-parallel-size 2 --data-parallel ddp")
    launch(2, {**layouts[2], "refused": refused}, path)
    for model in training_cases.MODELS:
        alone = training_cases.run(
            str(path), f"one_{model}", model, "--update-freq 4 --max-update 3"
        )
        torch.save(alone, path / f"{model}.1.0.pt")
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


@pytest.mark.parametrize("name", EXACT)
def test_a_layout_trains_as_one_process_does(name, folder):
    processes, model, _ = LAYOUTS[name]
    ours = findings(folder, name, processes)[0]
    assert list(ours) == [1, 2, 3]
    assert_same_curve(ours, findings(folder, model, 1)[0])
    assert_close_files(folder / name, folder / f"one_{model}")


def test_half_precision_in_copies_of_cut_weights_is_refused(folder):
    with pytest.raises(AssertionError, match="keeps float32 shards, which --data-parallel ddp"):
        findings(folder, "refused", 2)


def test_half_precision_with_cut_weights(folder):
    """In bfloat16 sums are rounded where they are cut, so figures agree to its three digits."""
    ours, wanted = findings(folder, "tp2_half", 2)[0], findings(folder, "half", 1)[0]
    assert list(ours) == [1, 2, 3]
    for update, line in ours.items():
        assert line["loss"] == pytest.approx(wanted[update]["loss"], rel=5e-3)
        assert line["gnorm"] == pytest.approx(wanted[update]["gnorm"], rel=2e-2)
    files = [folder / name / "checkpoint_last.pt" for name in ("tp2_half", "one_half")]
    models = [torch.load(file, weights_only=True)["model"] for file in files]
    for name, tensor in models[1].items():
        assert models[0][name].dtype == torch.float32
        torch.testing.assert_close(models[0][name], tensor.float(), atol=2e-2, rtol=2e-2)
