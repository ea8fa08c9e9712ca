"""A process without progress is ended; one with progress, or closed, is not."""

import subprocess
import sys
import time

from fairseq.distributed.watchdog import Heartbeat


def test_a_stalled_process_is_ended_with_the_stacks_of_its_threads():
    script = (
        "import time\n"
        "from fairseq.distributed.watchdog import Heartbeat\n"
        "heart = Heartbeat(0.2)\n"
        "heart.beat()\n"
        "def waits_for_ever(): time.sleep(60)\n"
        "waits_for_ever()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 1
    assert "no progress for 0.2 seconds (--heartbeat-timeout)" in done.stderr
    assert "waits_for_ever" in done.stderr


def test_beats_keep_a_process_alive():
    heart = Heartbeat(0.3)
    for _ in range(5):
        heart.beat()
        time.sleep(0.1)
    heart.close()
    time.sleep(0.4)
