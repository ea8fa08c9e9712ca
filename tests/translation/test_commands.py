"""Text files to scores by the commands: a mapping of words, learnt and carried to longer sentences.

A model is trained once for this file, on sentences of 2 to 8 words.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
import sacrebleu
import torch
from tiny_translation import run_command, write_pairs

from fairseq.logging import metrics
from fairseq_cli import (
    diagnose,
    doctor,
    eval_lm,
    extrapolate,
    generate,
    interactive,
    preprocess,
    score,
    train,
    validate,
)

MODEL = (
    "--arch transformer_tiny --encoder-attention-heads 4 --decoder-attention-heads 4 --dropout 0 "
    "--encoder-normalize-before --decoder-normalize-before --cross-attention-bias aligned"
)
TRAINING = (
    "--task translation -s src -t tgt --optimizer adam --lr 0.005 --lr-scheduler cosine "
    "--warmup-updates 50 --lr-period-updates 200 --min-lr 1e-5 --max-tokens 1000 --clip-norm 1 "
    "--criterion label_smoothed_cross_entropy --label-smoothing 0.1 --cpu --num-workers 0 "
    "--log-format simple --no-epoch-checkpoints"
)
# Words of a JSON object are split at spaces by the helper, so there are none in it.
BLEU = (
    '--eval-bleu --eval-bleu-args {"beam":2,"max_len_a":1.2,"max_len_b":5} '
    "--best-checkpoint-metric bleu --maximize-best-checkpoint-metric"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Text, binarized data and checkpoints of a training run; its validation log."""
    base = tmp_path_factory.mktemp("run")
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.INFO)
    counts = {"train": 3000, "valid": 60, "test": 60, "long": 60}
    short = dict.fromkeys(("train", "valid", "test"), (2, 8))
    write_pairs(base, counts, {**short, "long": (12, 16)})
    with pytest.MonkeyPatch.context() as patch:
        code = run_command(
            patch,
            preprocess,
            f"-s src -t tgt --trainpref {base}/train --validpref {base}/valid",
            f"--testpref {base}/test,{base}/long --destdir {base}/bin",
        )
        assert code == 0
        code = run_command(
            patch,
            train,
            f"{base}/bin {TRAINING} {MODEL} {BLEU} --save-dir {base}/checkpoints",
            f"--max-update 250 --validate-interval-updates 125 --log-file {base}/log",
        )
        assert code == 0
        metrics.reset()
    logging.getLogger().setLevel(level)
    return base


def output_of(monkeypatch, base, split, *options):
    """Runs fairseq-generate; returns what it wrote."""
    code = run_command(
        monkeypatch,
        generate,
        f"{base}/bin --task translation -s src -t tgt --cpu --num-workers 0 --batch-size 30",
        f"--path {base}/checkpoints/checkpoint_best.pt --gen-subset {split}",
        f"--max-len-a 1.2 --max-len-b 5 --results-path {base}/{split}",
        *options,
    )
    assert code == 0
    return (base / split / f"generate-{split}.txt").read_text()


def write_lines(text, base, split):
    """Writes outputs and references of fairseq-generate in the order of the sentences."""
    paths = []
    for letter, column in (("D", 2), ("T", 1)):
        lines = [line.split("\t") for line in text.splitlines() if line.startswith(f"{letter}-")]
        lines.sort(key=lambda fields: int(fields[0][2:]))
        paths.append(base / f"{split}.{letter}")
        paths[-1].write_text("".join(f"{fields[column]}\n" for fields in lines))
    return paths


def figures(text, name):
    return [float(found) for found in re.findall(rf"\| {name} ([\d.]+)", text)]


def test_validation_reports_bleu_and_the_best_is_kept(run):
    log = (run / "log").read_text()
    bleu = figures(log, "bleu")
    assert len(bleu) >= 2 and bleu[-1] > bleu[0] and max(bleu) > 95
    best = torch.load(run / "checkpoints/checkpoint_best.pt", weights_only=True)
    assert best["extra_state"]["best"] == max(bleu)
    assert best["cfg"]["task"]["_name"] == "translation"
    assert best["alibi"]["position_method"] == "alibi"


def test_generated_text_scores_nearly_perfectly(run, monkeypatch, capsys):
    text = output_of(monkeypatch, run, "test", "--beam 4")
    outputs, references = write_lines(text, run, "test")
    assert references.read_text() == (run / "test.tgt").read_text()
    code = run_command(monkeypatch, score, f"-s {outputs} -r {references}")
    line = capsys.readouterr().out.splitlines()[-1]
    assert code == 0 and line.startswith("BLEU4 = ")
    assert float(line.split()[2].rstrip(",")) > 95
    # fairseq-generate has counted the same words.
    assert text.splitlines()[-1] == f"Generate test with beam=4: {line}"
    expected = sacrebleu.corpus_bleu(
        outputs.read_text().splitlines(), [references.read_text().splitlines()], tokenize="none"
    )
    assert float(line.split()[2].rstrip(",")) == pytest.approx(expected.score, abs=0.006)


def test_longer_sentences_than_any_in_training(run, monkeypatch, capsys):
    """Sentences of 12 to 16 words, after training on 2 to 8: most words are right, not all."""
    text = output_of(monkeypatch, run, "test1", "--beam 4")
    outputs, references = write_lines(text, run, "test1")
    assert run_command(monkeypatch, score, f"-s {outputs} -r {references} --chrf") == 0
    assert float(capsys.readouterr().out.split()[-1]) > 70
    found, wanted = (
        [line.split() for line in path.read_text().splitlines()] for path in (outputs, references)
    )
    # From the ninth word on, places that no sentence of training has had.
    right = total = 0
    for words, correct in zip(found, wanted, strict=True):
        right += sum(a == b for a, b in zip(words[8:], correct[8:], strict=False))
        total += len(correct[8:])
    assert right / total > 0.6


def test_alignments_are_printed(run, monkeypatch):
    """Words are mapped one by one: the model has learnt to look at the word that it translates."""
    text = output_of(monkeypatch, run, "test", "--beam 2 --print-alignment")
    pairs = re.findall(r"^A-\d+\t(.*)$", text, flags=re.MULTILINE)
    lengths = [len(line.split()) for line in re.findall(r"^D-.*\t(.*)$", text, flags=re.MULTILINE)]
    assert len(pairs) == 60 and [len(line.split()) for line in pairs] == lengths
    found = [pair.split("-") for line in pairs for pair in line.split()]
    assert sum(source == output for source, output in found) > 0.9 * len(found)

    text = output_of(monkeypatch, run, "test", "--beam 2 --print-alignment soft --score-reference")
    sources = re.findall(r"^S-(\d+)\t(.*)$", text, flags=re.MULTILINE)
    weights = re.findall(r"^A-(\d+)\t(.*)$", text, flags=re.MULTILINE)
    for (row, source), (same_row, line) in zip(sources, weights, strict=True):
        table = [[float(weight) for weight in each.split(",")] for each in line.split()]
        count = len(source.split()) + 1  # </s>; outputs have as many tokens
        assert row == same_row and [len(each) for each in table] == [count] * count
        assert [sum(each) for each in table] == pytest.approx([1.0] * count, abs=1e-4)


def test_one_beam_one_row_at_a_time_gives_the_same(run, monkeypatch):
    def hypotheses(text):
        return sorted(re.findall(r"^D-(\d+)\t\S+\t(.*)$", text, flags=re.MULTILINE))

    together = output_of(monkeypatch, run, "test", "--beam 1")
    alone = output_of(monkeypatch, run, "test", "--beam 1 --batch-size 1 --max-tokens 100")
    behind = output_of(monkeypatch, run, "test", "--beam 1 --left-pad-source")
    assert len(hypotheses(together)) == 60
    assert hypotheses(together) == hypotheses(alone) == hypotheses(behind)


def test_resuming_is_exact(run, monkeypatch, tmp_path):
    def trained(folder: Path, updates):
        code = run_command(
            monkeypatch,
            train,
            f"{run}/bin {TRAINING} {MODEL} --dropout 0.1 --save-dir {folder}",
            f"--max-update {updates} --disable-validation",
        )
        metrics.reset()
        assert code == 0
        state = torch.load(folder / "checkpoint_last.pt", weights_only=True)
        return {**state["model"], **_tensors(state["last_optimizer_state"])}

    whole = trained(tmp_path / "whole", 24)
    trained(tmp_path / "parts", 11)
    parts = trained(tmp_path / "parts", 24)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())


def _tensors(optimizer_state):
    return {
        f"{number} {name}": value
        for number, values in optimizer_state["state"].items()
        for name, value in values.items()
        if isinstance(value, torch.Tensor)
    }


def test_another_position_method_is_noticed(run, monkeypatch, tmp_path, capsys):
    target = tmp_path / "checkpoint_last.pt"
    target.write_bytes((run / "checkpoints/checkpoint_last.pt").read_bytes())
    code = run_command(
        monkeypatch,
        train,
        f"{run}/bin {TRAINING} {MODEL} --position-method sinusoidal --save-dir {tmp_path}",
        "--max-update 251",
    )
    assert code == 1
    assert "position method alibi" in capsys.readouterr().err


def test_data_of_other_languages_do_not_fit(run, monkeypatch, tmp_path, capsys):
    for split in ("train", "valid"):
        for side in ("src", "tgt"):
            (tmp_path / f"{split}.{side}").write_text("a b c\n")
    pairs = f"-s src -t tgt --trainpref {tmp_path}/train --validpref {tmp_path}/valid"
    assert run_command(monkeypatch, preprocess, f"{pairs} --destdir {tmp_path}/bin") == 0
    code = run_command(
        monkeypatch,
        validate,
        f"{tmp_path}/bin --task translation -s src -t tgt --max-tokens 1000 --cpu",
        f"--path {run}/checkpoints/checkpoint_last.pt",
    )
    assert code == 1
    assert "the dictionary of the data has" in capsys.readouterr().err


def test_commands_for_language_models_say_what_they_were_given(run, monkeypatch, tmp_path, capsys):
    text = f"--only-source --srcdict {run}/bin/dict.src.txt --validpref {run}/valid.src"
    assert run_command(monkeypatch, preprocess, f"{text} --destdir {tmp_path}/lm") == 0
    path = f"{run}/checkpoints/checkpoint_best.pt"
    data = f"{tmp_path}/lm --gen-subset valid"
    every = [
        (doctor, ""),
        (doctor, data),
        (diagnose, data),
        (eval_lm, data),
        (generate, f"{data} --task language_modeling"),
        (interactive, f"{tmp_path}/lm --task language_modeling"),
        (extrapolate, f"{data} --lengths 8 --results-path {tmp_path}/report"),
    ]
    for module, arguments in every:
        assert run_command(monkeypatch, module, f"{arguments} --path {path} --cpu") == 1
        told = capsys.readouterr().err
        assert f"{path}: this is a translation model (TransformerModel: encoder and dec" in told
        assert "--task translation" in told and len(told.splitlines()) == 1, module
    code = run_command(
        monkeypatch,
        train,
        f"{tmp_path}/lm --task language_modeling --arch transformer_tiny --optimizer adam",
        f"--cpu --max-tokens 64 --tokens-per-sample 16 --save-dir {tmp_path}/new",
    )
    assert code == 1
    assert "this is a translation model" in capsys.readouterr().err
