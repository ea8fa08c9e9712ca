"""Processes that share a sequence compute what one process computes."""

from __future__ import annotations

import pytest
import sequence_workers as workers
import torch
from distributed_workers import settings

from fairseq.distributed.utils import call_main


@pytest.fixture(scope="module", params=[2, 4])
def found(request, tmp_path_factory):
    """What each of 2, or 4, processes found in all cases."""
    folder = tmp_path_factory.mktemp("workers")
    call_main(settings(request.param), workers.everything, folder=str(folder))
    return [
        torch.load(folder / f"found.{rank}.pt", weights_only=False)
        for rank in range(request.param)
    ]


@pytest.mark.parametrize("part", ["exchanges", "attention", "gathered", "dropout"])
def test_equal_one_process(found, part):
    for worker in found:
        worker[part].pop("rank", None)
        assert {name: True for name in worker[part]} == worker[part]


def test_models_equal_one_process(found):
    for worker in found:
        assert {} == {name: what for name, what in worker["models"].items() if what}
