"""fairseq-train --compile: the same curve, checkpoints that know nothing of it."""

import functools

import pytest
import torch
from train_runs import TINY_MODEL, TINY_TRAINING, make_tiny_data, train

from fairseq.models import compiled

# torch's tracer hides warnings of its own in a way that does not go with warnings as errors.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")


@pytest.fixture
def run(monkeypatch, caplog, tmp_path):
    data = make_tiny_data(tmp_path)
    backend = functools.partial(compiled.compile_layers, backend="aot_eager")
    monkeypatch.setattr(compiled, "compile_layers", backend)
    monkeypatch.setattr(compiled, "check_compiler", lambda device: None)

    def run_with(options, save_dir):
        command = f"{data} {TINY_MODEL} {TINY_TRAINING} --save-dir {tmp_path / save_dir} {options}"
        return train(monkeypatch, caplog, command)

    return run_with


def losses(found):
    return {update: line["loss"] for update, line in found.curve().items()}


def weights(path):
    return torch.load(path, weights_only=True)["model"]


def test_curve_checkpoint_and_resuming(run, tmp_path):
    eager = run("--max-update 6", "eager")
    whole = run("--max-update 6 --compile", "whole")
    assert losses(whole) == pytest.approx(losses(eager), rel=1e-4)
    run("--max-update 3 --compile", "parts")
    rest = run("--max-update 6", "parts")
    assert sorted(losses(rest)) == [4, 5, 6]
    assert losses(rest) == pytest.approx({u: losses(eager)[u] for u in (4, 5, 6)}, rel=1e-4)
    expected = weights(tmp_path / "eager" / "checkpoint_last.pt")
    for folder in ("whole", "parts"):
        found = weights(tmp_path / folder / "checkpoint_last.pt")
        assert list(found) == list(expected)
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-5)


def test_refused_before_training(run, capsys):
    found = run("--max-update 1 --compile --checkpoint-activations", "x")
    assert found.exit_code != 0 and not found.curve()
    assert "--checkpoint-activations" in capsys.readouterr().err
