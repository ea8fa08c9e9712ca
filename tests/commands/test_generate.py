"""fairseq-generate and fairseq-interactive, from checkpoints of the original."""

import io
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fairseq import options
from fairseq.checkpoint_utils import load_model_ensemble_and_task
from fairseq.dataclass.legacy import namespace_to_config
from fairseq_cli import generate, interactive

GOLDEN = Path(__file__).parents[1] / "golden" / "invented"
DATA = str(GOLDEN / "bin" / "main")
GPT = str(GOLDEN / "ckpt" / "gpt_tiny" / "checkpoint_last.pt")
WIKI = str(GOLDEN / "ckpt" / "wiki103_tiny" / "checkpoint_last.pt")
LM = [DATA, "--task", "language_modeling"]
SPLIT = ["--gen-subset", "valid", "--sample-break-mode", "eos", "--num-workers", "0"]


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(generate, "set_up_logging", lambda stream=None: None)
    monkeypatch.setattr(interactive, "set_up_logging", lambda stream=None: None)


def run_generate(*arguments):
    given = [*LM, *SPLIT, *arguments]
    args = options.parse_args_and_arch(options.get_generation_parser(), given)
    return generate.main(namespace_to_config(args))


def run_interactive(text, *arguments):
    given = [*LM, *arguments]
    parser = options.get_interactive_generation_parser()
    args = options.parse_args_and_arch(parser, given)
    given = text if isinstance(text, bytes) else text.encode()
    sys.stdin = io.TextIOWrapper(io.BytesIO(given))
    try:
        interactive.main(namespace_to_config(args))
    finally:
        sys.stdin = sys.__stdin__


def lines_of(printed, kind):
    """Returns {id: [fields after the id, ...]} of the lines S-, T-, H-, D- or P-."""
    found = {}
    for line in printed.splitlines():
        if line.startswith(kind + "-"):
            row, *fields = line.removeprefix(kind + "-").split("\t")
            found.setdefault(int(row), []).append(fields)
    return found


def test_lines_and_their_digits(capsys, caplog):
    caplog.set_level("INFO")
    scorer = run_generate("--path", GPT, "--beam", "2", "--nbest", "2", "--prefix-size", "2",
                          "--max-len-b", "8", "--batch-size", "16")  # fmt: skip
    printed = capsys.readouterr().out
    sources, targets = lines_of(printed, "S"), lines_of(printed, "T")
    hypotheses, scores = lines_of(printed, "H"), lines_of(printed, "P")
    assert sources.keys() == targets.keys() == hypotheses.keys() and len(sources) > 50
    assert lines_of(printed, "D") == hypotheses
    for row, found in hypotheses.items():
        # A line of fewer words than are given ends where it does, in one way.
        assert len(found) == (2 if len(targets[row][0][0].split()) >= 2 else 1)
        assert [float(score) for score, _ in found] == sorted(
            (float(score) for score, _ in found), reverse=True
        )
        for (score, text), (positional,) in zip(found, scores[row], strict=True):
            assert re.fullmatch(r"(-\d+\.\d{4} ?)+", positional)
            values = [float(value) for value in positional.split()]
            assert len(values) == len(text.split()) + 1
            assert float(score) == pytest.approx(sum(values) / len(values), abs=1e-4)
            reference = targets[row][0][0].replace("<<unk>>", "<unk>").split()
            assert text.split()[:2] == reference[:2]
    last = printed.splitlines()[-1]
    assert re.fullmatch(r"Generate valid with beam=2: BLEU4 = .*", last)
    assert len(scorer.ref) == len(sources)
    assert "NOTE: hypothesis and token scores are output in base 2" in caplog.text
    assert re.search(
        r"Translated [\d,]+ sentences \([\d,]+ tokens\) in \d+\.\ds "
        r"\(\d+\.\d\d sentences/s, \d+\.\d\d tokens/s\)",
        caplog.text,
    )


@pytest.mark.parametrize("batch_size", ["3", "16"])
def test_rows_that_begin_in_the_middle_of_a_line_stand_beside_others(capsys, batch_size):
    """Some rows start with the end of a line, their start symbol, and some with a word."""
    arguments = ["--path", GPT, "--beam", "1", "--max-len-b", "8", "--sample-break-mode", "none"]
    arguments += ["--tokens-per-sample", "30"]
    found = []
    for size in ("1", batch_size):
        run_generate(*arguments, "--batch-size", size)
        printed = capsys.readouterr().out
        found.append({row: text for row, [[_, text]] in lines_of(printed, "H").items()})
    assert found[0] == found[1]
    assert len(found[0]) > 100


def greedy(path, text, new_tokens):
    """Continues a text by full passes, greedily; returns the words and the bits of each."""
    models, _, task = load_model_ensemble_and_task([path], {"data": DATA})
    model, words = models[0].eval(), task.source_dictionary
    line = words.encode_line(text, add_if_not_exist=False).long()
    tokens, bits = [words.eos()], []
    for step in range(new_tokens + 1):
        with torch.no_grad():
            output = model(torch.tensor([tokens]))
            found = model.get_normalized_probs(output, log_probs=True, sample=None)[0, -1]
        allowed = found.clone()
        allowed[words.pad()] = -torch.inf
        if step == 0:
            allowed[words.eos()] = -torch.inf
        word = int(line[step]) if step < len(line) - 1 else int(allowed.argmax())
        word = words.eos() if step == new_tokens else word
        bits.append(float(found[word]) / math.log(2))
        if word == words.eos():
            break
        tokens.append(word)
    return words.string(tokens[1:]), bits


@pytest.mark.parametrize("path", [GPT, WIKI], ids=["gpt", "adaptive"])
def test_interactive_answers_with_the_bias(path, capsys):
    """The likeliest continuation, as full passes find it; lines are padded to each other."""
    text = "= Vo Fotdai =\nCol crirkgis bostwas tu sasleavend\nunheard-of\n"
    run_interactive(text, "--path", path, "--beam", "1", "--max-len-b", "20",
                    "--buffer-size", "3", "--batch-size", "3")  # fmt: skip
    printed = capsys.readouterr().out
    hypotheses, scores = lines_of(printed, "H"), lines_of(printed, "P")
    assert list(hypotheses) == [0, 1, 2]
    for row, line in enumerate(text.splitlines()):
        expected, bits = greedy(path, line, 20)
        assert hypotheses[row][0][1] == expected
        found = [float(value) for value in scores[row][0][0].split()]
        assert found == pytest.approx(bits, abs=6e-5 + 1e-5)


def test_interactive_order_and_times(capsys, caplog):
    caplog.set_level("INFO")
    text = "Vo\n\nCol crirkgis bostwas\nVo Fotdai\nVo\n"
    run_interactive(text, "--path", GPT, "--max-len-b", "4", "--buffer-size", "2",
                    "--batch-size", "2", "--nbest", "2")  # fmt: skip
    printed = capsys.readouterr().out
    kinds = [re.match(r"([SWHDP])-(\d+)", line).groups() for line in printed.splitlines()]
    expected = [(k, str(row)) for row in range(5) for k in "SWHDPHDP"]
    assert kinds == expected
    assert [each[0][0] for each in lines_of(printed, "S").values()] == text.split("\n")[:-1]
    assert all(re.fullmatch(r"\d+\.\d{3}", each[0][0]) for each in lines_of(printed, "W").values())
    assert "Sentence buffer size: 2" in caplog.text
    assert "Type the input sentence and press return:" in caplog.text
    assert re.search(r"Total time: \d+\.\d{3} seconds; translation time: \d+\.\d{3}", caplog.text)


def test_interactive_reads_a_file(tmp_path, capsys):
    (tmp_path / "lines.txt").write_text("Vo\nFotdai\n")
    run_interactive("", "--path", GPT, "--max-len-b", "3", "--input", str(tmp_path / "lines.txt"))
    assert list(lines_of(capsys.readouterr().out, "H")) == [0, 1]


def test_input_that_is_not_utf_8_is_named(tmp_path, capsys):
    data = b"Vo\rFotdai\r\n" + "Vo caf\u00e9\n".encode("latin-1")
    (tmp_path / "latin1.txt").write_bytes(data)
    arguments = ["--path", GPT, "--max-len-b", "3"]
    remedy = "convert the text, for example with `iconv -f LATIN1"
    with pytest.raises(
        ValueError, match=r"^standard input: not UTF-8: byte 0xe9 in line 3"
    ) as told:
        run_interactive(data, *arguments)
    assert remedy in str(told.value)
    assert list(lines_of(capsys.readouterr().out, "H")) == [0, 1]
    with pytest.raises(ValueError, match=r"latin1\.txt: not UTF-8: byte 0xe9 in line 3"):
        run_interactive("", *arguments, "--input", str(tmp_path / "latin1.txt"))


def test_a_closed_standard_input_is_an_empty_one(monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(sys, "stdin", None)
    parser = options.get_interactive_generation_parser()
    given = options.parse_args_and_arch(parser, [*LM, "--path", GPT])
    interactive.main(namespace_to_config(given))
    assert "Total time" in caplog.text


def test_pieces_are_joined_and_made(capsys):
    run_interactive("a b\n", "--path", GPT, "--max-len-b", "4", "--bpe", "characters")
    printed = capsys.readouterr().out
    assert lines_of(printed, "S")[0] == [["<unk> <unk> <unk>"]]
    hypothesis = lines_of(printed, "H")[0][0][1]
    assert lines_of(printed, "D")[0][0][1] == hypothesis.replace(" ", "")


def test_references_are_scored(capsys):
    run_generate("--path", GPT, "--score-reference", "--batch-size", "8")
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1].startswith("Generate valid with beam=5: BLEU4 = ")
    hypotheses, scores = lines_of(printed, "H"), lines_of(printed, "P")
    bits = [float(v) for found in scores.values() for v in found[0][0].split()]
    targets = lines_of(printed, "T")
    assert all(
        found[0][1] == targets[row][0][0].replace("<<unk>>", "<unk>")
        for row, found in hypotheses.items()
    )
    # fairseq-eval-lm's figure for this split and these rows.
    loss = subprocess.run(
        [sys.executable, "-m", "fairseq_cli.eval_lm", *LM, *SPLIT, "--path", GPT],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    expected = float(re.search(r"Loss \(base 2\): (\d+\.\d+)", loss)[1])
    assert -sum(bits) / len(bits) == pytest.approx(expected, abs=1e-4)


def test_results_go_to_a_file(tmp_path, capsys):
    run_generate("--path", GPT, "--results-path", str(tmp_path / "out"), "--max-len-b", "3",
                 "--prefix-size", "1", "--batch-size", "64")  # fmt: skip
    assert capsys.readouterr().out == ""
    text = (tmp_path / "out" / "generate-valid.txt").read_text()
    assert len(lines_of(text, "H")) > 50
    assert text.splitlines()[-1].startswith("Generate valid with beam=5: ")


def test_quiet_prints_the_result_alone(capsys):
    run_generate("--path", GPT, "--quiet", "--max-len-b", "3", "--prefix-size", "1",
                 "--batch-size", "64")  # fmt: skip
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 1 and printed[0].startswith("Generate valid with beam=5: ")


def test_an_ensemble_and_a_language_model(capsys):
    """Twice the same model says what it says alone; itself added once more doubles log p."""
    options = ["--max-len-b", "4", "--beam", "2"]
    run_interactive("Vo\n", "--path", GPT, *options)
    alone = capsys.readouterr().out
    run_interactive("Vo\n", "--path", f"{GPT}:{GPT}", *options)
    both = capsys.readouterr().out
    assert lines_of(both, "P") == lines_of(alone, "P")
    run_interactive("Vo\n", "--path", GPT, "--lm-path", GPT, "--lm-weight", "1", *options)
    doubled = lines_of(capsys.readouterr().out, "P")[0][0][0].split()
    expected = [2 * float(value) for value in lines_of(alone, "P")[0][0][0].split()]
    assert [float(value) for value in doubled] == pytest.approx(expected, abs=3e-4)


def test_samples_are_repeatable(capsys):
    options = ["--path", GPT, "--sampling", "--sampling-topk", "20", "--beam", "3", "--nbest", "3",
               "--max-len-b", "9", "--temperature", "1.3"]  # fmt: skip
    printed = []
    for seed in ("7", "7", "8"):
        run_interactive("Vo\n", *options, "--seed", seed)
        printed.append(lines_of(capsys.readouterr().out, "H"))
    assert printed[0] == printed[1] != printed[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--path is needed"),
        (["--path", GPT, "--sampling", "--beam", "3"], "--sampling requires --nbest"),
        (["--path", GPT, "--nbest", "9"], "--nbest 9 is more than the --beam 5"),
        (["--path", GPT, "--sampling-topk", "3"], "need --sampling"),
        (["--path", GPT, "--match-source-len", "--diversity-rate", "1"], "mutually exclusive"),
        (["--path", GPT, "--diverse-beam-groups", "2"], "is not a multiple"),
        (["--path", GPT, "--temperature", "0"], "--temperature is 0"),
        (["--path", GPT, "--min-len", "9", "--max-len-b", "4"], "--min-len 9"),
        (["--path", GPT, "--bpe", "sentencepiece"], "--sentencepiece-model is needed"),
    ],
)
def test_wrong_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        run_generate(*arguments)


def test_wrong_settings_of_interactive():
    with pytest.raises(ValueError, match="--batch-size 4 is larger than the buffer of 2 lines"):
        run_interactive("x\n", "--path", GPT, "--batch-size", "4", "--buffer-size", "2")
    with pytest.raises(ValueError, match="--score-reference needs references"):
        run_interactive("x\n", "--path", GPT, "--score-reference")
    with pytest.raises(ValueError, match="--print-alignment needs models whose decoder attends"):
        run_interactive("x\n", "--path", GPT, "--print-alignment")
    with pytest.raises(FileNotFoundError):
        run_interactive("x\n", "--path", GPT, "--input", "nowhere.txt")


@pytest.mark.parametrize("command", ["generate", "interactive"])
def test_from_the_console(command, tmp_path):
    """--help, and one line for a file that is missing."""
    script = [sys.executable, "-c", f"from fairseq_cli._commands import {command} as c; c()"]
    found = subprocess.run([*script, "--help"], capture_output=True, text=True)
    assert found.returncode == 0 and "--beam" in found.stdout
    found = subprocess.run([*script, *LM, "--path", "nowhere.pt"], capture_output=True, text=True)
    assert found.returncode == 1
    assert "nowhere.pt" in found.stderr and "Traceback" not in found.stderr
