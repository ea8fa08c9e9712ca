"""Learning rates of every recorded run of the original."""

import argparse
import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from fairseq.dataclass.arguments import fill_dataclass
from fairseq.optim import build_optimizer
from fairseq.optim.lr_scheduler import build_lr_scheduler
from fairseq.registry import LR_SCHEDULERS

GOLDEN = os.environ.get("GOLDEN_DIR")
RUNS = ["a0", "a1", "a2", "b0", "b1", "b2", "c_eos", "c_complete"]

pytestmark = pytest.mark.skipif(not GOLDEN, reason="GOLDEN_DIR is not set")


@pytest.mark.parametrize("run", RUNS)
def test_rates_of_a_run(run):
    folder = Path(GOLDEN or "") / "wikitext-2" / "ckpt" / run
    checkpoint = next(
        path for n in ("last", "best") if (path := folder / f"checkpoint_{n}.pt").exists()
    )
    stored = torch.load(checkpoint, weights_only=True)["cfg"]["lr_scheduler"]
    name = stored["_name"]
    cfg = fill_dataclass(LR_SCHEDULERS.dataclass_of(name), argparse.Namespace(**stored), name=name)
    optimizer = build_optimizer(
        argparse.Namespace(optimizer="nag", lr=stored["lr"], momentum=0.99, weight_decay=0.0),
        [nn.Parameter(torch.zeros(1))],
    )
    scheduler = build_lr_scheduler(cfg, optimizer)
    scheduler.step_begin_epoch(1)
    for line in (folder / "curve.jsonl").read_text().splitlines():
        record = json.loads(line)
        update = record["update"]
        assert scheduler.step_update(update - 1) == pytest.approx(record["lr_used"], rel=1e-12)
        assert scheduler.step_update(update) == pytest.approx(record["lr_after"], rel=1e-12)
