"""Processes that share a sequence compute what one process computes."""

from __future__ import annotations

import pytest
import sequence_workers as workers
import torch
from distributed_workers import settings
from eval_runs import GOLDEN, recorded
from sequence_evaluation import validated
from sequence_training import in_one_process

from fairseq.distributed.utils import call_main


@pytest.fixture(scope="module", params=[2, 4])
def found(request, tmp_path_factory):
    """Returns a function: name -> what each of 2, or 4, processes found."""
    folder = tmp_path_factory.mktemp("workers")
    call_main(settings(request.param), workers.everything, folder=str(folder))

    def of(name):
        files = [folder / f"{name}.{rank}.pt" for rank in range(request.param)]
        if not files[0].exists():
            pytest.skip(f"nothing was found out about {name} on {request.param} processes")
        each = [torch.load(file, weights_only=False) for file in files]
        errors = [one["error"] for one in each if "error" in one]
        assert not errors, errors[0]
        return each

    return of


@pytest.mark.parametrize("part", ["exchanges", "attention", "gathered", "dropout"])
def test_equal_one_process(found, part):
    for worker in found(part):
        worker.pop("rank", None)
        assert worker == dict.fromkeys(worker, True)


@pytest.mark.parametrize("part", ["models", "transformers"])
def test_models_equal_one_process(found, part):
    for worker in found(part):
        assert worker
        assert {name: what for name, what in worker.items() if what} == {}


def test_evaluation_equals_one_process(found):
    """eval-lm has the golden losses on all processes, validate those of one."""
    losses = {name: each["loss_base2"] for name, each in recorded(GOLDEN).items()}
    losses |= validated()
    for worker in found("evaluation"):
        assert len(worker["losses"]) >= 10
        for name, figures in worker["losses"].items():
            case = name.split()[0]
            assert figures["loss"] == pytest.approx(losses[case], abs=1e-5), name
            assert figures.get("tokens", 5601) == 5601, name
        assert "--tensor-parallel-size 2 is for training" in worker["refusal"]


def test_a_sequence_too_long_for_one_process_trains_on_four(found):
    workers_found = found("memory")
    assert "allocate memory" in workers_found[0]["alone"]
    first, second = workers_found[0]["losses"]
    assert 3.0 < second < first == pytest.approx(workers_found[0]["with room"], rel=1e-5)
    assert all(worker["losses"] == [first, second] for worker in workers_found)


def test_a_process_that_fails_ends_all():
    with pytest.raises(RuntimeError, match="worker 1: this layer is not here"):
        call_main(settings(2), workers.fails_on_rank_one)


@pytest.fixture(scope="module")
def one_process():
    """What fairseq-train does in this process, by model."""
    return in_one_process()


def test_training_equals_one_process(found, one_process):
    for worker in found("training"):
        for name, run in worker.items():
            expected = one_process[name.split()[0]]
            assert len(run["curve"]) == 3
            for (loss, norm), (expected_loss, expected_norm) in zip(
                run["curve"], expected["curve"], strict=True
            ):
                assert loss == pytest.approx(expected_loss, rel=1e-5), name
                assert norm == pytest.approx(expected_norm, rel=1e-4), name
            for key, weight in expected["weights"].items():
                torch.testing.assert_close(run["weights"][key], weight, rtol=0, atol=2e-6)
