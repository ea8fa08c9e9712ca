"""From text files to scores by the installed commands, each a process of its own.

What they compute is tested elsewhere; here that they fit together, and print where they should.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from train_runs import tiny_line

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = Path(sysconfig.get_path("scripts"))
SIZE = (
    "--{side}-layers 1 --{side}-embed-dim 16 --{side}-ffn-embed-dim 32 --{side}-attention-heads 2"
)
TRAINING = "--optimizer adam --lr 0.01 --cpu --num-workers 0 --no-epoch-checkpoints --dropout 0"

pytestmark = pytest.mark.skipif(
    not (SCRIPTS / "fairseq-train").exists(),
    reason="the package is not installed: pip install -e .",
)


def run(command: str, *, text: str = "", cwd: Path) -> str:
    """Runs a command line; returns its standard output."""
    name, *arguments = command.split()
    program = [sys.executable] if name == "python" else [str(SCRIPTS / name)]
    found = subprocess.run(
        [*program, *arguments],
        input=text,
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert found.returncode == 0, found.stderr
    assert "Traceback" not in found.stderr
    return found.stdout


def figures(text: str, tag: str) -> dict[str, str]:
    """Returns name -> figure of the last line about a subset."""
    line = [
        line for line in text.splitlines() if f"'{tag}' subset | " in line or f"| {tag} | " in line
    ]
    return dict(re.findall(r"\| (\w+) ([\d.]+)", line[-1]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Lines in a made-up language, and their translation, which doubles each letter."""
    folder = tmp_path_factory.mktemp("console")
    for split, first, count in (("train", 0, 60), ("valid", 60, 20), ("test", 80, 20)):
        lines = [
            line for line in map(tiny_line, range(first, 2 * first + 2 * count)) if line.strip()
        ]
        (folder / f"{split}.a").write_text("".join(lines[:count]))
        (folder / f"{split}.b").write_text("".join(lines[:count]).replace("w", "ww"))
    return folder


@pytest.fixture(scope="module")
def language_model(folder):
    """Returns what training printed; data lie in `lm`, the checkpoint in `lm-model`."""
    run(
        "fairseq-preprocess --only-source --trainpref train.a --validpref valid.a "
        "--testpref test.a --destdir lm --workers 2",
        cwd=folder,
    )
    return run(
        f"fairseq-train lm --task language_modeling --arch transformer_lm {TRAINING} "
        f"{SIZE.format(side='decoder')} --criterion cross_entropy --tokens-per-sample 16 "
        "--sample-break-mode eos --max-tokens 128 --max-update 8 --save-dir lm-model "
        "--log-format simple",
        cwd=folder,
    )


@pytest.fixture(scope="module")
def translation(folder):
    """Returns what training printed; data lie in `pairs`, the checkpoint in `pairs-model`."""
    run(
        "fairseq-preprocess -s a -t b --trainpref train --validpref valid --testpref test "
        "--destdir pairs --joined-dictionary",
        cwd=folder,
    )
    both = " ".join(SIZE.format(side=side) for side in ("encoder", "decoder"))
    return run(
        f"python {ROOT / 'train.py'} pairs --task translation --arch transformer {TRAINING} {both} "
        "--share-all-embeddings --criterion label_smoothed_cross_entropy --label-smoothing 0.1 "
        "--max-tokens 256 --max-update 8 --save-dir pairs-model --log-format simple",
        cwd=folder,
    )


def evaluated(folder, path):
    """Returns loss and perplexity that fairseq-eval-lm prints for the validation split."""
    text = run(
        f"fairseq-eval-lm lm --path {path} --gen-subset valid --cpu --max-tokens 128 "
        "--sample-break-mode eos",
        cwd=folder,
    )
    return re.findall(r"Loss \(base 2\): ([\d.]+), Perplexity: ([\d.]+)", text)[0]


def test_a_language_model_is_evaluated_validated_and_exported(folder, language_model):
    path = "lm-model/checkpoint_best.pt"
    validated = run(
        f"fairseq-validate lm --path {path} --max-tokens 128 --cpu --log-format simple", cwd=folder
    )
    trained, again = figures(language_model, "valid"), figures(validated, "valid")
    assert [again[name] for name in ("loss", "ppl")] == [trained[name] for name in ("loss", "ppl")]
    loss, perplexity = evaluated(folder, path)
    assert 2 ** float(loss) == pytest.approx(float(perplexity), rel=1e-3)
    assert float(perplexity) == pytest.approx(float(trained["ppl"]), rel=1e-3)

    run(f"fairseq-export --path {path} --to safetensors --output tensors", cwd=folder)
    run("fairseq-export --path tensors --from safetensors --output again.pt", cwd=folder)
    assert evaluated(folder, "again.pt") == (loss, perplexity)


def test_a_language_model_goes_on_with_what_is_typed(folder, language_model):
    prompts = (folder / "test.a").read_text().splitlines()[:3]
    printed = run(
        "fairseq-interactive lm --task language_modeling --path lm-model/checkpoint_last.pt "
        "--beam 2 --max-len-b 12 --cpu",
        text="".join(f"{prompt}\n" for prompt in prompts),
        cwd=folder,
    )
    lines = re.findall(r"^([SHDP])-(\d+)\t", printed, flags=re.MULTILINE)
    assert [row for letter, row in lines if letter == "S"] == ["0", "1", "2"]
    assert {letter for letter, _ in lines} == set("SHDP")


def test_a_translation_is_validated_generated_and_scored(folder, translation):
    validated = run(
        "fairseq-validate pairs --task translation --path pairs-model/checkpoint_last.pt "
        "--max-tokens 256 --cpu --log-format simple",
        cwd=folder,
    )
    names = ("loss", "nll_loss", "ppl")
    trained, again = figures(translation, "valid"), figures(validated, "valid")
    assert [again[name] for name in names] == [trained[name] for name in names]

    printed = run(
        "fairseq-generate pairs --task translation --path pairs-model/checkpoint_last.pt "
        "--batch-size 10 --beam 2 --max-len-b 15 --cpu",
        cwd=folder,
    )
    for name, letter, column in (("outputs", "D", 2), ("references", "T", 1)):
        rows = [line.split("\t") for line in printed.splitlines() if line.startswith(f"{letter}-")]
        rows.sort(key=lambda fields: int(fields[0][2:]))
        (folder / name).write_text("".join(f"{fields[column]}\n" for fields in rows))
    lines = {name: (folder / name).read_text().splitlines() for name in ("references", "test.b")}
    known = [row for row in zip(*lines.values(), strict=True) if "<<unk>>" not in row[0]]
    assert len(known) > 5 and all(found == wanted for found, wanted in known)
    scored = run("fairseq-score --sys outputs --ref references", cwd=folder)
    assert scored.splitlines()[-1] in printed
