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
