"""What a user can do wrong ends in one message and the right exit code."""

import os
import signal
import sys
import time

import pytest
import torch
from train_runs import TINY_MODEL, TINY_TRAINING, make_tiny_data, train


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_tiny_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def fails(monkeypatch, caplog, capsys, tmp_path, data):
    """Returns a function: options -> (exit code, what stderr says)."""

    def run(options, *, data=data, leave_out=()):
        command = f"{data} {TINY_MODEL} {TINY_TRAINING} --save-dir {tmp_path}/ckpt --max-update 2"
        for text in leave_out:
            assert text in command
            command = command.replace(text, "")
        found = train(monkeypatch, caplog, f"{command} {options}")
        return found.exit_code, capsys.readouterr().err

    return run


MESSAGES = {
    "--restore-file nowhere.pt": "nowhere.pt",
    "--max-tokens 8": "--max-tokens 8 is smaller than --tokens-per-sample 16",
    "--best-checkpoint-metric bleu": "--best-checkpoint-metric bleu: validation reports BLEU with",
    "--valid-subset nope": "nope",
    "--finetune-from-model nowhere.pt": "nowhere.pt",
    "--continue-once nowhere.pt": "nowhere.pt",
}


@pytest.mark.parametrize("options", MESSAGES)
def test_one_message_says_what_is_wrong(fails, options):
    code, printed = fails(options)
    assert code == 1
    assert MESSAGES[options] in printed
    assert "Traceback" not in printed


def test_an_unknown_figure_of_validation_does_not_cost_the_training(fails, tmp_path):
    code, printed = fails("--best-checkpoint-metric perplexity")
    assert code == 1 and len(printed.splitlines()) == 1
    assert "--best-checkpoint-metric perplexity is not among the validation figures" in printed
    assert "goes on from here: loss, " in printed
    saved = torch.load(tmp_path / "ckpt" / "checkpoint_last.pt", weights_only=True)
    assert saved["optimizer_history"][-1]["num_updates"] == 2
    assert fails("--best-checkpoint-metric ppl --max-update 3")[0] == 0


def test_a_folder_for_events_is_tried_before_the_training(fails, tmp_path):
    (tmp_path / "file").touch()
    code, printed = fails(f"--tensorboard-logdir {tmp_path}/file/events")
    assert code == 1 and len(printed.splitlines()) == 1
    assert "--tensorboard-logdir: cannot write there: Not a directory" in printed
    assert not (tmp_path / "ckpt").exists()


def test_missing_choices_are_named(fails):
    code, printed = fails("", leave_out=["--max-tokens 64"])
    assert code == 1 and "Must specify batch size" in printed
    code, printed = fails("", leave_out=["--optimizer nag "])
    assert code == 1 and "optimizer is required!" in printed
    code, printed = fails("", leave_out=["--arch transformer_lm_wiki103 "])
    assert code == 2 and "--arch" in printed
    code, printed = fails("--no-such-flag")
    assert code == 2 and "--no-such-flag" in printed


def test_a_checkpoint_of_another_shape_is_explained(fails, tmp_path):
    assert fails("")[0] == 0
    code, printed = fails(
        f"--restore-file {tmp_path}/ckpt/checkpoint_last.pt --decoder-ffn-embed-dim 48"
    )
    assert code == 1
    assert f"{tmp_path}/ckpt/checkpoint_last.pt" in printed
    assert "decoder.layers.0.fc1.weight is (64, 32) in the file, (48, 32) in the model" in printed


def test_another_optimizer_needs_a_reset(fails, tmp_path):
    assert fails("")[0] == 0
    code, printed = fails("--optimizer adam")
    assert code == 1
    assert "FairseqNAG" in printed and "FairseqAdam" in printed and "--reset-optimizer" in printed
    assert fails("--optimizer adam --reset-optimizer --max-update 1")[0] == 0


def test_unwritable_save_dir(fails, tmp_path):
    (tmp_path / "file").write_text("")
    code, printed = fails(f"--save-dir {tmp_path}/file/ckpt")
    assert code == 1 and "--save-dir" in printed and "Traceback" not in printed


def test_gradients_that_are_not_finite_end_the_run(fails, tmp_path):
    assert fails("--max-update 1")[0] == 0
    path = tmp_path / "ckpt" / "checkpoint_last.pt"
    state = torch.load(path, weights_only=True)
    state["model"]["decoder.layers.1.fc2.bias"][0] = float("nan")
    torch.save(state, path)
    code, printed = fails("")
    assert code == 1 and "gradients are Nan/Inf" in printed


def test_interrupted_run_leaves_no_process_behind(start_process, tmp_path, data):
    command = (
        f"{sys.executable} -m fairseq_cli.train {data} {TINY_MODEL} {TINY_TRAINING} "
        f"--save-dir {tmp_path}/ckpt --num-workers 1 --max-update 100000 --disable-validation "
        "--no-epoch-checkpoints --no-save"
    )
    process = start_process(command.split())
    for line in process.stdout:
        if "train_inner" in line:
            break
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    deadline = time.monotonic() + 60
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(process.pid, 0)
            time.sleep(0.1)


def test_a_run_that_cannot_start_leaves_the_settings_of_the_last_one(fails, tmp_path):
    assert fails("")[0] == 0
    settings = (tmp_path / "ckpt/config.yaml").read_text()
    assert fails("--decoder-ffn-embed-dim 48")[0] == 1
    assert fails("--valid-subset nope")[0] == 1
    assert (tmp_path / "ckpt/config.yaml").read_text() == settings
    assert "decoder_ffn_embed_dim: 64" in settings
