"""Where ranks and addresses come from, and how a failing process ends the run."""

import os
import subprocess
import sys
import time
from pathlib import Path

import distributed_workers as workers
import pytest
from distributed_workers import settings

from fairseq.distributed import launch
from fairseq.distributed.utils import call_main, infer_init_method


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in (
        *launch._TORCHRUN_VARIABLES,
        "LOCAL_RANK",
        "SLURM_STEP_NODELIST",
        "SLURM_JOB_NODELIST",
    ):
        monkeypatch.delenv(name, raising=False)


def inferred(world_size, **changes):
    cfg = settings(world_size, **changes).distributed_training
    infer_init_method(cfg)
    return cfg


def test_one_process_needs_no_meeting_point():
    assert inferred(1).distributed_init_method is None
    assert call_main(settings(1), lambda cfg, x: x + 1, x=2) == 3


def test_torchrun_variables_win(monkeypatch):
    variables = {"MASTER_ADDR": "h", "MASTER_PORT": "1", "WORLD_SIZE": "8", "RANK": "5"}
    for name, value in {**variables, "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    cfg = inferred(2)
    assert cfg.distributed_init_method == "env://"
    assert (cfg.distributed_rank, cfg.distributed_world_size) == (5, 8)
    assert cfg.device_id == 1 and cfg.distributed_no_spawn
    assert inferred(2, device_id=3).device_id == 3  # --local_rank was given


def test_several_devices_meet_on_a_free_port_of_this_machine():
    host, port = inferred(2).distributed_init_method.rsplit(":", 1)
    assert host == "tcp://localhost" and 0 < int(port) < 65536


def test_processes_that_others_start_need_a_meeting_point():
    with pytest.raises(
        ValueError, match=r"--distributed-no-spawn: the 2 .*--distributed-init-method"
    ):
        inferred(2, distributed_no_spawn=True)


def test_a_meeting_point_that_does_not_work_is_named():
    cfg = settings(2, distributed_no_spawn=True, distributed_init_method="carrier://pigeon")
    with pytest.raises(RuntimeError, match=r"cannot meet at carrier://pigeon .*--distributed-init"):
        call_main(cfg, lambda cfg: None)


def slurm(monkeypatch, **variables):
    monkeypatch.setenv("SLURM_STEP_NODELIST", "node[3-4]")
    for name, value in variables.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setattr(subprocess, "check_output", lambda command: b"node3\nnode4\n")


def test_slurm_with_a_task_for_each_device(monkeypatch):
    slurm(monkeypatch, NNODES="2", NTASKS="8", NTASKS_PER_NODE="4", PROCID="6", LOCALID="2")
    cfg = inferred(8, distributed_port=1234)
    assert cfg.distributed_init_method == "tcp://node3:1234"
    assert (cfg.distributed_rank, cfg.device_id, cfg.distributed_no_spawn) == (6, 2, True)
    with pytest.raises(ValueError, match="--distributed-world-size must be 8, not 4"):
        inferred(4, distributed_port=1234)


def test_slurm_with_a_task_for_each_machine(monkeypatch):
    slurm(monkeypatch, NNODES="2", NTASKS="2", NTASKS_PER_NODE="1", NODEID="1")
    cfg = inferred(8, distributed_port=1234)
    assert (cfg.distributed_rank, cfg.distributed_no_spawn) == (4, False)
    with pytest.raises(ValueError, match="shared evenly"):
        inferred(7, distributed_port=1234)


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    cfg = settings(3)
    cfg.common.cpu = False
    with pytest.raises(ValueError, match="--distributed-world-size is 3, but this machine has 2"):
        call_main(cfg, workers.fails_on_rank_one)


def test_the_first_error_of_a_worker_is_the_error_of_the_run():
    with pytest.raises(RuntimeError) as failure:
        call_main(settings(2), workers.fails_on_rank_one)
    assert str(failure.value) == "worker 1: this file is not here"


def test_a_defect_in_a_worker_keeps_its_traceback():
    cfg = settings(1, distributed_init_method="tcp://localhost:" + str(launch._free_port()))
    with pytest.raises(RuntimeError, match=r"(?s)worker 0: Traceback.*1 / 0.*ZeroDivisionError"):
        call_main(cfg, workers.divides_by_zero)


def test_a_killed_worker_ends_the_run():
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="worker 1 was ended by SIGKILL"):
        call_main(settings(2), workers.is_killed_on_rank_one)
    assert time.monotonic() - started < 120


def test_an_interrupted_worker_ends_the_run():
    with pytest.raises(KeyboardInterrupt):
        call_main(settings(2), workers.presses_ctrl_c)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_end_when_the_process_that_started_them_is_killed(start_process):
    here = Path(__file__).parent
    code = (
        "import distributed_workers as workers\n"
        "from fairseq.distributed.utils import call_main\n"
        "call_main(workers.settings(2), workers.sleeps)\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{here.parents[1]}{os.pathsep}{here}"}
    process = start_process([sys.executable, "-c", code], env=environment)
    ids = [int(process.stdout.readline()) for _ in range(2)]
    assert all(map(is_running, ids))
    process.kill()
    process.communicate(timeout=60)
    deadline = time.monotonic() + 60
    while any(map(is_running, ids)):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def is_running(process_id):
    status = Path(f"/proc/{process_id}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
