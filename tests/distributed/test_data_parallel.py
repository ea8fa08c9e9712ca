"""Several workers compute what one process computes."""

import distributed_workers as workers
import pytest
import torch
from distributed_workers import settings, toy_batches, toy_loss

from fairseq.distributed.data_parallel import DistributedFairseqModel
from fairseq.distributed.utils import (
    all_gather_list,
    all_reduce,
    all_reduce_dict,
    broadcast_object,
    call_main,
)


def one_process():
    """All four batches in one process, clipped and stepped as the workers do."""
    model = workers.Toy().double()
    norms = []
    for _ in range(2):
        model.zero_grad()
        for x, use_tail in toy_batches():
            toy_loss(model, x.double(), use_tail).backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.cat([g.reshape(-1) for g in grads]))
        norms.append(float(norm))
        with torch.no_grad():
            for param in model.parameters():
                param.sub_(0.1 * param.grad * min(1.0, 1.0 / (norms[-1] + 1e-6)))
    return norms, model.state_dict()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Returns a function: name -> what each of two workers found."""
    folder = tmp_path_factory.mktemp("workers")
    call_main(settings(2), workers.everything, folder=str(folder))
    return lambda name: [
        torch.load(folder / f"{name}.{rank}.pt", weights_only=False) for rank in range(2)
    ]


@pytest.mark.parametrize("backend", workers.BACKENDS)
def test_two_workers_equal_one_process(found, backend):
    norms, weights = one_process()
    for worker in found(backend):
        assert worker["norms"] == pytest.approx(norms, rel=1e-5)
        for name, tensor in weights.items():
            torch.testing.assert_close(worker["weights"][name].double(), tensor, rtol=0, atol=1e-6)


def test_a_whole_state_goes_into_shards_and_back(found):
    for worker in found("reload"):
        assert worker["is_sharded"]
        # Adam's first step is -lr wherever the gradient is 1.
        for name, tensor in worker["wanted"].items():
            torch.testing.assert_close(worker["got"][name], tensor - 1e-3)
        first = worker["adam"]["state"][0]
        assert first["exp_avg"].shape == (8, 6)
        torch.testing.assert_close(first["exp_avg"], torch.full((8, 6), 0.1))
        torch.testing.assert_close(worker["adam_again"]["state"], worker["adam"]["state"])


def test_what_workers_tell_each_other(found):
    for rank, worker in enumerate(found("collectives")):
        assert (worker["rank"], worker["world_size"]) == (rank, 2)
        assert worker["reduced"] == 2.0
        assert worker["summed"] == {"count": 7.0, "loss": pytest.approx(1.2)}
        assert worker["gathered"] == [{"rank": 0, "text": ""}, {"rank": 1, "text": "x"}]
        assert "--all-gather-list-size 50" in worker["refused"]
        assert worker["received"]["note"] == "from 1"
        assert worker["received"]["weights"].tolist() == [0, 1, 2, 3, 4]
        assert worker["by_sum"] == ([{"loss": 3.5, "ntokens": 6.0}], {"size": 6.0})
        assert worker["by_list"] == (
            [{"loss": 2.5, "ntokens": 4}, {"loss": 1.0, "ntokens": 2}],
            {"size": 6.0},
        )
        assert "rank   1 = 3.25000000" in worker["inconsistent"]


def test_a_process_on_its_own_tells_itself():
    assert all_gather_list("x", None) == ["x"]
    assert broadcast_object("x", 0, None) == "x"
    assert all_reduce(torch.tensor(2.0), None).item() == 2.0
    assert all_reduce_dict({"b": torch.tensor(2.0), "a": 1}, "cpu", None) == {"a": 1.0, "b": 2.0}
    with pytest.raises(ValueError, match="op is 'mean'"):
        all_reduce(torch.tensor(2.0), None, op="mean")


def test_unknown_backend_is_refused():
    cfg = settings(2, ddp_backend="slow_mo").distributed_training
    with pytest.raises(ValueError, match="--ddp-backend slow_mo is not supported"):
        DistributedFairseqModel(cfg, workers.Toy(), None, torch.device("cpu"))
