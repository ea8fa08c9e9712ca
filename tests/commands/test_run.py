"""How a command ends."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fairseq_cli import _commands
from fairseq_cli._run import run_command


def end_of(main, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_command(main)
    return stopped.value.code, capsys.readouterr().err


def test_what_a_user_caused_is_one_line(capsys, tmp_path):
    from fairseq.dataclass.arguments import literal_dict

    code, printed = end_of(lambda: (tmp_path / "missing").read_text(), capsys)
    assert code == 1 and "missing" in printed and len(printed.splitlines()) == 1
    code, printed = end_of(lambda: literal_dict("[", "--model-overrides"), capsys)
    assert code == 1 and "--model-overrides" in printed and len(printed.splitlines()) == 1


def test_a_defect_keeps_its_traceback():
    with pytest.raises(KeyError):
        run_command(lambda: {}["x"])
    with pytest.raises(ValueError):
        run_command(lambda: int("x"))


def test_debugging_shows_every_traceback(monkeypatch, tmp_path):
    monkeypatch.setenv("LOGLEVEL", "DEBUG")
    with pytest.raises(FileNotFoundError):
        run_command(lambda: (tmp_path / "missing").read_text())


def test_interruption_is_130(capsys):
    def interrupted():
        raise KeyboardInterrupt

    assert end_of(interrupted, capsys) == (130, "interrupted\n")


def test_a_closed_stderr_is_no_error(tmp_path):
    # The file that is opened first would be number 2, and what is written there end up in it.
    code = (
        "import os, subprocess, sys\n"
        "from fairseq.logging.progress_bar import progress_bar\n"
        "from fairseq_cli._run import run_command\n"
        "def main():\n"
        "    with open(sys.argv[1], 'w') as file:\n"
        "        print('noise', file=sys.stderr, flush=True)\n"
        "        os.write(2, b'noise')\n"
        "        subprocess.run([sys.executable, '-c', 'import os; os.write(2, b\"noise\")'])\n"
        "        file.write(' '.join(progress_bar(['all', 'done'])))\n"
        "    raise FileNotFoundError\n"
        "run_command(main)"
    )
    shell = ["sh", "-c", 'exec "$0" -c "$1" "$2" 2>&-', sys.executable, code, tmp_path / "file"]
    ended = subprocess.run(shell, stdout=subprocess.PIPE, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert (tmp_path / "file").read_text() == "all done"


def test_success_returns(capsys):
    assert run_command(lambda: 5) is None


def test_a_reader_that_leaves_is_no_error(start_process):
    code = "from fairseq_cli._run import run_command\nrun_command(lambda: print('x\\n' * 10**6))"
    process = start_process([sys.executable, "-c", code])
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 1


def test_a_log_whose_reader_leaves_ends_the_command(start_process):
    code = (
        "import itertools, logging\nfrom fairseq_cli._run import run_command, set_up_logging\n"
        "set_up_logging()\nlog = logging.getLogger('x')\n"
        "run_command(lambda: [log.info(i) for i in itertools.count()])"
    )
    process = start_process([sys.executable, "-c", code])
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 1


def test_a_log_on_a_full_disk_is_told_of_once():
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("there is no /dev/full here")
    code = (
        "import logging, sys\nfrom fairseq_cli._run import run_command, set_up_logging\n"
        "set_up_logging()\nlog = logging.getLogger('x')\n"
        "run_command(lambda: [log.info(i) for i in range(9)] and sys.exit(0))"
    )
    with full.open("w") as stream:
        found = subprocess.run(
            [sys.executable, "-c", code], stdout=stream, stderr=subprocess.PIPE, text=True
        )
    assert found.stderr.count("the log cannot be written any more: [Errno 28]") == 1
    assert "Logging error" not in found.stderr


def test_termination_cleans_up_and_is_143(start_process):
    code = (
        "import time\nfrom fairseq_cli._run import run_command\n"
        "def main():\n    try:\n        print('ready', flush=True)\n        time.sleep(60)\n"
        "    finally:\n        print('cleaned up')\nrun_command(main)"
    )
    process = start_process([sys.executable, "-c", code])
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60) == ("cleaned up\n", "terminated\n")
    assert process.returncode == 143


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_processes_are_terminated_as_always():
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))

    def main():
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        child.start()
        child.terminate()
        child.join(timeout=60)

    run_command(main)
    assert child.exitcode == -signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_an_interruption_of_the_imports_is_130_too(capsys, monkeypatch):
    def interrupted(name):
        assert name == "fairseq_cli.train"
        raise KeyboardInterrupt

    monkeypatch.setattr("importlib.import_module", interrupted)
    assert end_of(_commands.train, capsys) == (130, "interrupted\n")


def test_the_installed_commands_start_the_modules_of_their_names():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    section = text.partition("[project.scripts]")[2].partition("[")[0]
    scripts = dict(re.findall(r'^(\S+) = "(.+)"$', section, flags=re.MULTILINE))
    assert {"fairseq-preprocess", "fairseq-train", "fairseq-eval-lm"} <= set(scripts)
    for command, target in scripts.items():
        name = command.removeprefix("fairseq-").replace("-", "_")
        assert target == f"fairseq_cli._commands:{name}"
        assert getattr(_commands, name).args == (name,)


def test_a_termination_that_comes_during_a_fork_is_not_lost():
    # Hooks that stand before a fork are called in the opposite order: ours is the first of them.
    code = (
        "import os, signal, sys, time\n"
        "os.register_at_fork(before=lambda: os.kill(os.getpid(), signal.SIGTERM))\n"
        "from fairseq_cli._run import run_command\n"
        "def main():\n"
        "    if os.fork() == 0:\n"
        "        os._exit(0)\n"
        "    os.wait()\n"
        "    time.sleep(120)\n"
        "run_command(main)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (143, "terminated\n")
