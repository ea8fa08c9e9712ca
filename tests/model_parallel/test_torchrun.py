"""Training started by torchrun: a process that is lost ends all, and another layout goes on."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import training_cases
from train_runs import make_tiny_data

SECONDS_TO_END = 90  # torchrun waits 30 s before it kills what does not end by itself
TP2 = "--tensor-parallel-size 2"
EVERY_UPDATE = re.compile(r"train_inner.*?(\{.*\})")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


class Run:
    """A started fairseq-train, its output, and its processes.

    Args:
        folder: with the data; the output goes there too.
        name: of the run; checkpoints go to a folder of this name.
        processes: how many torchrun starts.
        options: of fairseq-train.
    """

    def __init__(self, folder: Path, name: str, processes: int, options: str) -> None:
        starts = f"-m torch.distributed.run --standalone --nproc-per-node {processes}"
        line = training_cases.command(folder / "bin", folder / name, "adaptive", options)
        self.output = folder / f"{name}.out"
        variables = {n: v for n, v in os.environ.items() if n not in ("RANK", "WORLD_SIZE")}
        with self.output.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, *shlex.split(f"{starts} -m fairseq_cli.train {line}")],
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**variables, "OMP_NUM_THREADS": "1"},
            )

    def text(self) -> str:
        return self.output.read_text()

    def losses(self) -> dict[int, float]:
        lines = [json.loads(line) for line in EVERY_UPDATE.findall(self.text())]
        return {int(line["num_updates"]): float(line["loss"]) for line in lines}

    def wait_for_update(self, update: int) -> None:
        deadline = time.monotonic() + SECONDS_TO_END
        while max(self.losses(), default=0) < update:
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.1)

    def wait(self) -> int:
        """Returns the exit code; fails if the run does not end."""
        try:
            return self.process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise

    def ranks(self) -> dict[int, int]:
        """Returns the ids of its processes by rank."""
        found = {}
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                parent = int(path.with_name("stat").read_text().rpartition(")")[2].split()[1])
                if parent == self.process.pid:
                    entries = path.read_bytes().split(b"\0")
                    rank = next(e for e in entries if e.startswith(b"RANK="))
                    found[int(rank[5:])] = int(path.parent.name)
            except (OSError, StopIteration):
                continue
        return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("torchrun")
    make_tiny_data(path)
    return path


@pytest.fixture(scope="module")
def killed(folder):
    """tp 2 x dp 2; the last process is killed in the third epoch."""
    run = Run(folder, "first", 4, f"{TP2} --update-freq 2 --max-update 100000")
    run.wait_for_update(5)
    ranks = run.ranks()
    os.kill(ranks[3], signal.SIGKILL)
    code = run.wait()
    return run, code, ranks


def test_a_killed_process_ends_all_with_an_error(killed):
    run, code, ranks = killed
    assert sorted(ranks) == [0, 1, 2, 3]
    assert code != 0
    assert not any(Path(f"/proc/{process}").exists() for process in ranks.values())
    assert "Signal 9 (SIGKILL)" in run.text()


def test_a_killed_run_goes_on_in_other_layouts(killed, folder):
    """tp 2 x dp 2, then one process, then fsdp2 on two, from the end of an epoch each."""
    goes_on = f"--update-freq 4 --max-update 4 --restore-file {folder}/first/checkpoint1.pt"
    middle = training_cases.run(str(folder), "middle", "adaptive", goes_on)
    wanted = training_cases.run(str(folder), "whole", "adaptive", "--update-freq 4 --max-update 6")
    last = Run(
        folder,
        "last",
        2,
        "--data-parallel fsdp2 --update-freq 2 --max-update 6 "
        f"--restore-file {folder}/middle/checkpoint_last.pt",
    )
    assert last.wait() == 0, last.text()
    losses = {update: line["loss"] for update, line in middle.items()}
    parts = [killed[0].losses(), losses, last.losses()]
    assert [list(part)[:2] for part in parts] == [[1, 2], [3, 4], [5, 6]]
    for part in parts:
        for update in list(part)[:2]:
            assert part[update] == pytest.approx(wanted[update]["loss"], abs=0.0011), update
    models = [
        torch.load(folder / name / "checkpoint_last.pt", weights_only=True)["model"]
        for name in ("last", "whole")
    ]
    for name, tensor in models[1].items():
        torch.testing.assert_close(models[0][name], tensor, atol=2e-5, rtol=1e-4)


FAILING = """
import torch.distributed as dist
from fairseq.criterions.adaptive_loss import AdaptiveLoss, AdaptiveLossConfig
from fairseq.registry import CRITERIONS

@CRITERIONS.register("failing_loss", dataclass=AdaptiveLossConfig)
class FailingLoss(AdaptiveLoss):
    passes = 0

    def forward(self, model, sample, reduce=True):
        FailingLoss.passes += 1
        if FailingLoss.passes == 6 and dist.get_rank() == 1:
            raise ZeroDivisionError("nothing is left to divide by")
        return super().forward(model, sample, reduce)
"""


def test_an_error_in_one_process_ends_all_with_it(folder):
    plugin = folder / "failing_plugin"
    plugin.mkdir()
    (plugin / "__init__.py").write_text(FAILING)
    options = f"{TP2} --user-dir {plugin} --criterion failing_loss --max-update 100000"
    run = Run(folder, "failing", 2, options)
    assert run.wait() != 0
    text = run.text()
    assert "ZeroDivisionError: nothing is left to divide by" in text
    assert max(run.losses()) < 20
