"""A process without progress is ended; one with progress, or closed, is not."""

import subprocess
import sys


def run(script):
    """Returns the exit code, stdout and stderr of a program of its own, which may be ended."""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stdout, done.stderr


def test_a_stalled_process_is_ended_with_the_stacks_of_its_threads():
    script = (
        "import time\n"
        "from fairseq.distributed.watchdog import Heartbeat\n"
        "heart = Heartbeat(0.2)\n"
        "heart.beat()\n"
        "def waits_for_ever(): time.sleep(60)\n"
        "waits_for_ever()\n"
    )
    code, _, errors = run(script)
    assert code == 1
    assert "no progress for 0.2 seconds (--heartbeat-timeout)" in errors
    assert "waits_for_ever" in errors


def test_beats_keep_a_process_alive():
    script = (
        "import time\n"
        "from fairseq.distributed.watchdog import Heartbeat\n"
        "heart = Heartbeat(1.5)\n"
        "for _ in range(5):\n"
        "    heart.beat()\n"
        "    time.sleep(0.4)\n"
        "heart.close()\n"
        "time.sleep(1.6)\n"
        "print('alive')"
    )
    assert run(script) == (0, "alive\n", "")
