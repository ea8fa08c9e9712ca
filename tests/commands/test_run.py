"""How a command ends."""

import subprocess
import sys

import pytest

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


def test_success_returns(capsys):
    assert run_command(lambda: 5) is None


def test_a_reader_that_leaves_is_no_error():
    code = "from fairseq_cli._run import run_command\nrun_command(lambda: print('x\\n' * 10**6))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 1
