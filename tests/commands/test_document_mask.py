"""--document-mask from training through the checkpoint to evaluation."""

from __future__ import annotations

import math

import pytest
import torch
from eval_runs import evaluate, fails
from train_runs import TINY_MODEL, TINY_TRAINING, make_tiny_data, train

from fairseq import checkpoint_utils
from fairseq.data.dictionary import Dictionary

EOS = 2
COMMAND = f"{TINY_MODEL} {TINY_TRAINING} --max-update 3 --no-epoch-checkpoints"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_tiny_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def run_training(monkeypatch, caplog, tmp_path, data):
    def run(options):
        return train(monkeypatch, caplog, f"{data} --save-dir {tmp_path} {COMMAND} {options}")

    return run


@pytest.fixture
def run(monkeypatch, caplog, tmp_path, data):
    def run(options, folder=tmp_path):
        command = f"{data} --path {folder}/checkpoint_last.pt --gen-subset valid {options}"
        return evaluate(monkeypatch, caplog, command)

    return run


def one_by_one(data, checkpoint, kind):
    """Returns the loss in bits of a model without mask that reads each document by itself."""
    dictionary = Dictionary.load(str(data / "dict.txt"))
    lines = (data.parent / "valid").read_text().splitlines()
    documents = [[]]
    for line in lines:
        ids = dictionary.encode_ids(line.split()).tolist()
        documents[-1] += ids if ids[-1:] == [EOS] else [*ids, EOS]
        if kind == "line" or not line:
            documents.append([])
    models, _, _ = checkpoint_utils.load_model_ensemble_and_task(
        [str(checkpoint)], {"document_mask": "none"}
    )
    model, nats, words = models[0].eval(), 0.0, 0
    for target in filter(None, documents):
        source = torch.tensor([[EOS, *target[:-1]]])
        with torch.no_grad():
            log_probs = model.get_normalized_probs(model(source), log_probs=True)[0]
        nats -= float(log_probs[range(len(target)), target].double().sum())
        words += len(target)
    assert words == 114 and len(documents) > 2
    return nats / words / math.log(2)


@pytest.mark.parametrize(
    ("method", "kind"), [("alibi", "line"), ("sinusoidal", "document"), ("rotary", "document")]
)
def test_from_training_to_evaluation(run_training, run, data, tmp_path, method, kind):
    training = run_training(f"--document-mask {kind} --position-method {method}")
    assert training.exit_code == 0
    assert f"document mask: {kind}" in training.messages("fairseq_cli.train")
    stored = torch.load(tmp_path / "checkpoint_last.pt", weights_only=True)
    assert "document_mask" not in {**stored["cfg"]["model"], **stored["cfg"]["task"]}
    assert stored["alibi"]["extensions"]["model"]["document_mask"] == kind

    expected = one_by_one(data, tmp_path / "checkpoint_last.pt", kind)
    whole = run("--tokens-per-sample 200")
    assert f"document mask: attention and positions restart at each {kind}" in whole.log
    assert whole.loss == pytest.approx(expected, abs=1e-5)
    unmasked = run("--tokens-per-sample 200 --document-mask none")
    assert not any("document mask" in message for message in unmasked.log)
    assert unmasked.loss != pytest.approx(expected, abs=1e-4)


def test_every_way_to_cut_rows_that_keeps_lines_whole(run_training, run, data, tmp_path):
    run_training("--document-mask line")
    expected = one_by_one(data, tmp_path / "checkpoint_last.pt", "line")
    ways = [
        "--sample-break-mode eos",
        "--sample-break-mode complete --tokens-per-sample 30",
        "--tokens-per-sample 40 --context-window 30",
        "--tokens-per-sample 33 --context-window 32 --batch-size 7",
        "--sample-break-mode eos --tokens-per-sample 40 --context-window 30",
    ]
    for way in ways:
        assert run(way).loss == pytest.approx(expected, abs=1e-5), way


def test_shards_of_an_evaluation(run_training, run, tmp_path):
    run_training("--document-mask document")
    options = "--tokens-per-sample 40 --context-window 25 --batch-size 2"
    whole = run(options)
    parts = [run(f"{options} --num-shards 3 --shard-id {i}") for i in range(3)]
    assert sum(part.num_tokens for part in parts) == whole.num_tokens == 114
    total = sum(part.loss * part.num_tokens for part in parts)
    assert total / 114 == pytest.approx(whole.loss, abs=1e-6)


def test_training_on_packed_lines_is_training_on_lines(run_training):
    """The first update has the same loss, whether lines are packed or rows of their own."""
    options = "--max-tokens 1000 --update-freq 1 --tokens-per-sample 500 --max-update 1"
    packed = run_training(f"{options} --document-mask line --no-save").curve()[1]
    single = run_training(f"{options} --sample-break-mode eos --no-save").curve()[1]
    loose = run_training(f"{options} --no-save").curve()[1]
    for name in ("loss", "gnorm"):
        assert packed[name] == pytest.approx(single[name], rel=1e-3)
    assert packed["gnorm"] != pytest.approx(loose["gnorm"], rel=1e-3)


def test_a_checkpoint_without_mask_can_be_evaluated_with_one(run_training, run, data, tmp_path):
    run_training("")
    expected = one_by_one(data, tmp_path / "checkpoint_last.pt", "line")
    masked = run("--tokens-per-sample 200 --document-mask line")
    assert masked.loss == pytest.approx(expected, abs=1e-5)


def test_combinations_in_which_documents_cannot_be_told_apart(
    run_training, monkeypatch, capsys, data, tmp_path
):
    code, message = fails(monkeypatch, capsys, f"{data} --path x --document-mask page")
    assert code == 2 and "invalid choice: 'page'" in message
    wrong = run_training("--document-mask line --add-bos-token")
    assert wrong.exit_code != 0
    run_training("--document-mask document")
    path = f"{data} --path {tmp_path}/checkpoint_last.pt --gen-subset valid --tokens-per-sample 40"
    cases = {
        "--add-bos-token": "--document-mask document goes by the </s>",
        "--sample-break-mode complete_doc --context-window 20": "leaves out the empty lines",
    }
    for options, text in cases.items():
        code, message = fails(monkeypatch, capsys, f"{path} {options}")
        assert code != 0 and text in message


def test_going_on_with_another_mask_is_refused(run_training, capsys):
    run_training("--document-mask line")
    assert run_training("--max-update 5").exit_code != 0
    assert "--document-mask line goes on as before" in capsys.readouterr().err
