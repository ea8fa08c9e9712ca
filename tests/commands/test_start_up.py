"""What the commands do not import before they are asked for it."""

import subprocess
import sys

PROGRAM = """
import sys
import torch
before = set(sys.modules)
from fairseq_cli import _commands
names = "train eval_lm validate generate interactive extrapolate diagnose doctor export".split()
for command in (getattr(_commands, name) for name in names):
    sys.argv = ["command", "--help"]
    try:
        command()
    except SystemExit as done:
        assert not done.code
slow = "sympy torch.distributed.tensor torch.distributed.fsdp transformers scipy sacrebleu".split()
print("imported:", sorted(set(slow) & (set(sys.modules) - before)))
"""


def test_nothing_slow_is_imported_for_help():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.stdout.rstrip().endswith("imported: []"), done.stdout[-300:] + done.stderr
    assert done.stdout.count("usage:") == 9


def test_garbage_is_collected_again_once_a_command_runs():
    program = (
        "import gc, sys\n"
        "from fairseq_cli import _commands, score\n"
        "score.cli_main = lambda: print(gc.isenabled(), gc.get_freeze_count() > 1000)\n"
        "_commands.score()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("True True\n", "")
