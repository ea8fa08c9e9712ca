"""Every recorded evaluation of the original that took it less than ten seconds."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "commands"))

from eval_runs import GOLDEN, evaluate, recorded

WIDER = os.environ.get("GOLDEN_DIR")
FOLDERS = {"invented": GOLDEN}
if WIDER:
    FOLDERS["wikitext-2"] = Path(WIDER) / "wikitext-2"
    FOLDERS["upstream-positions"] = Path(WIDER) / "upstream-positions"

pytestmark = pytest.mark.skipif(not WIDER, reason="GOLDEN_DIR is not set")


def _rows():
    for folder in FOLDERS:
        for name, row in recorded(FOLDERS[folder]).items():
            checkpoint = FOLDERS[folder] / row["args"][row["args"].index("--path") + 1]
            if row["eval_wall_s"] < 10 and checkpoint.exists():
                yield pytest.param(folder, row, id=f"{folder}-{name}")


@pytest.mark.parametrize(("folder", "row"), list(_rows()))
def test_the_originals_loss(monkeypatch, caplog, folder, row):
    result = evaluate(monkeypatch, caplog, row["args"], folder=FOLDERS[folder])
    assert result.loss == pytest.approx(row["loss_base2"], abs=2e-4)
