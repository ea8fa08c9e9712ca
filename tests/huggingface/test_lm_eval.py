"""The model for the lm-evaluation-harness, against our own scorer and without the harness."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from eval_runs import evaluate

from fairseq.export import read_checkpoint_model
from fairseq.huggingface import lm_eval as harness
from fairseq.sequence_scorer import SequenceScorer

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "invented"
CHECKPOINTS = {
    name: str(GOLDEN / "ckpt" / name / "checkpoint_last.pt")
    for name in ("wiki103_tiny", "gpt_tiny")
}
DATA = str(GOLDEN / "bin" / "main")


def asked(*args):
    return types.SimpleNamespace(args=args)


@pytest.fixture(params=list(CHECKPOINTS), scope="module")
def path(request):
    return CHECKPOINTS[request.param]


@pytest.fixture
def lm(path):
    return harness.FairseqAlibiLM(path, DATA, device="cpu")


def scored(lm, tokens):
    """Returns the log-probabilities of tokens after the prefix, by our own scorer."""
    target = torch.tensor([tokens])
    source = torch.tensor([[lm.prefix, *tokens[:-1]]])
    sample = {
        "id": torch.tensor([0]),
        "net_input": {"src_tokens": source, "src_lengths": torch.tensor([len(tokens)])},
        "target": target,
    }
    return SequenceScorer(lm.dictionary).score([lm.model], sample).values.double()


def test_loglikelihood(lm):
    words = lm.dictionary.symbols
    contexts = [" ".join(words[10:16]), "", " ".join(words[20:60]), f"{words[9]}\n{words[12]}"]
    continuations = [
        f" {words[30]} {words[5]}",
        f"{words[7]}",
        f"\n{words[8]} nowhere",
        f" {words[4]}",
    ]
    counts = [2, 1, 3, 1]
    requests = [asked(*pair) for pair in zip(contexts, continuations, strict=True)]
    found = lm.loglikelihood(requests, disable_tqdm=True)
    for request, (nats, _), count in zip(requests, found, counts, strict=True):
        expected = scored(lm, lm.encode("".join(request.args)))[-count:].sum().item()
        assert nats == pytest.approx(expected, abs=1e-4)
    # Alone or together, in any order.
    lm.rows = 1
    again = lm.loglikelihood(requests[::-1])[::-1]
    for (one, _), (other, _) in zip(found, again, strict=True):
        assert one == pytest.approx(other, abs=1e-4)


def test_the_likeliest_continuation_is_known_as_such(lm):
    ids = [lm.prefix, *range(40, 50)]
    for _ in range(3):
        output = lm.model(torch.tensor([ids]))
        ids.append(int(lm.model.get_normalized_probs(output, True)[0, -1].argmax()))
    other = [*ids[:-1], 4 if ids[-1] != 4 else 5]
    found = lm._score([harness.Window(tokens, 3) for tokens in (ids, other)])
    assert [is_likeliest for _, is_likeliest in found] == [True, False]


def test_a_word_across_the_seam_is_scored_and_nothing_is_nothing(lm):
    word, other = lm.dictionary.symbols[5], lm.dictionary.symbols[6]
    expected = scored(lm, lm.encode(f"{other} {word}"))[-1].item()
    cut = len(word) // 2
    ((nats, _),) = lm.loglikelihood([asked(f"{other} {word[:cut]}", word[cut:])])
    assert nats == pytest.approx(expected, abs=1e-4)
    assert lm.loglikelihood([asked(word, " "), asked("", "")]) == [(0.0, True), (0.0, True)]


@pytest.mark.parametrize(
    ("max_length", "stride", "flags"),
    # The split has 5,601 = 3 x 1,867 tokens.
    [
        (1867, None, "--tokens-per-sample 1867"),
        (48, 3, "--tokens-per-sample 48 --context-window 45"),
    ],
)
def test_rolling_is_fairseq_eval_lm(path, max_length, stride, flags, monkeypatch, caplog):
    lm = harness.FairseqAlibiLM(path, DATA, max_length=max_length, stride=stride, device="cpu")
    lm.rows = 64 if stride else 1
    text = (GOLDEN / "text/valid.txt").read_text()
    (nats,) = lm.loglikelihood_rolling([asked(text)])
    command = f"bin/main --gen-subset valid --path '{path}' --max-sentences 32 {flags}"
    found = evaluate(monkeypatch, caplog, command)
    assert found.num_tokens == 5601
    assert -nats / 5601 / math.log(2) == pytest.approx(found.loss, rel=1e-5)


def test_windows_by_hand():
    windows = harness.rolling_windows([11, 12, 13, 14, 15], 2, 3, 3)
    assert [(w.tokens, w.num_scored) for w in windows] == [
        ([2, 11, 12, 13], 3),
        ([12, 13, 14, 15], 2),
    ]
    windows = harness.rolling_windows([11, 12, 13, 14], 2, 3, 2)
    assert [(w.tokens, w.num_scored) for w in windows] == [([2, 11, 12], 2), ([11, 12, 13, 14], 2)]
    assert harness.rolling_windows([], 2, 3, 2) == []


def test_generation_stops_where_told(lm):
    words = " ".join(lm.dictionary.symbols[40:50])
    (text,) = lm.generate_until([asked(words, {"max_gen_toks": 30, "until": ["nothing"]})])
    ids = [lm.prefix, *lm.encode(words)]
    for _ in range(30):
        output = lm.model(torch.tensor([ids]))
        ids.append(int(lm.model.get_normalized_probs(output, True)[0, -1].argmax()))
    assert text == lm.decode(ids[-30:])
    first = text.split()[0]
    stop = text[3:6]
    (cut,) = lm.generate_until([asked(words, {"max_gen_toks": 30, "until": [stop]})])
    assert cut == text[: text.index(stop)]
    (short,) = lm.generate_until([asked(words, {"max_gen_toks": 1, "until": "nothing"})])
    assert short.split() in ([first], [])
    with pytest.raises(ValueError, match="likeliest words alone"):
        lm.generate_until([asked(words, {"do_sample": True})])


def test_long_contexts_are_cut_at_their_beginning(path):
    lm = harness.FairseqAlibiLM(path, DATA, max_length=8, device="cpu")
    symbols = lm.dictionary.symbols
    ((nats, _),) = lm.loglikelihood([asked(" ".join(symbols[10:40]), f" {symbols[50]}")])
    ids = [*range(32, 40), 50]
    log_probs = lm.model.get_normalized_probs(lm.model(torch.tensor([ids[:-1]])), True)
    assert nats == pytest.approx(log_probs[0, -1, 50].item(), abs=1e-4)


def test_what_does_not_fit_is_told(path, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"dict\.txt"):
        harness.FairseqAlibiLM(path, str(tmp_path))
    with pytest.raises(ValueError, match="stride=9 is out of range"):
        harness.FairseqAlibiLM(path, DATA, max_length=8, stride=9)
    with pytest.raises(ValueError, match="symbols, the model"):
        harness.FairseqAlibiLM(path, str(GOLDEN / "bin/nwords1000_thr2_pf16"))


def test_registration(monkeypatch, path):
    """With a stand-in for the harness that has what its real one is asked for."""
    models = {}

    class LM:
        def __init__(self):
            self.cache_hook = None

        @classmethod
        def create_from_arg_string(cls, text, more=None):
            return cls(**dict(pair.split("=", 1) for pair in text.split(",")), **(more or {}))

    def register_model(name):
        return lambda cls: models.setdefault(name, cls)

    parts = {
        "lm_eval": {},
        "lm_eval.api": {},
        "lm_eval.api.model": {"LM": LM},
        "lm_eval.api.registry": {"register_model": register_model},
    }
    for name, content in parts.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    harness.register()
    text = f"path={path},data={DATA},max_length=64"
    lm = models["fairseq-alibi"].create_from_arg_string(
        text, {"batch_size": "auto", "device": "cpu"}
    )
    assert isinstance(lm, LM)
    assert (lm.max_length, lm.rows, lm.cache_hook) == (64, 8, None)
    assert read_checkpoint_model(path).settings["num_symbols"] == len(lm.dictionary)


def test_without_the_harness_it_is_said_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(ImportError, match="pip install lm-eval"):
        harness.register()
    with pytest.raises(SystemExit, match=r"^fairseq-alibi: error: .*pip install lm-eval"):
        harness.main()


TASKS = {
    "choose": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}],
    },
    "read": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
    "write": {
        "output_type": "generate_until",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.mark.slow
def test_the_harness_itself(tmp_path):
    """Three tasks of one's own; what it prints follows from what the model answers."""
    pytest.importorskip("lm_eval", reason="pip install lm-eval")
    lm = harness.FairseqAlibiLM(CHECKPOINTS["wiki103_tiny"], DATA, max_length=64, device="cpu")
    words = lm.dictionary.symbols
    rows = []
    for i in range(6):
        context = " ".join(words[10 * i + 10 : 10 * i + 20])
        answer = lm.generate_until([asked(context, TASKS["write"]["generation_kwargs"])])[0]
        row = {"context": context, "choices": [words[8], words[90], words[200]], "gold": i % 3}
        rows.append({**row, "text": " ".join(words[i : i + 150]), "answer": answer if i else "?"})
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
    for name, task in TASKS.items():
        content = json.dumps({"task": name, "test_split": "test", **source, **task})
        (tmp_path / f"{name}.yaml").write_text(content)  # JSON is YAML
    options = (
        f"--model {harness.NAME} --model_args path={CHECKPOINTS['wiki103_tiny']},data={DATA},"
        f"max_length=64 --include_path {tmp_path} --tasks {','.join(TASKS)} --device cpu "
        f"--output_path {tmp_path}/out"
    )
    done = subprocess.run(
        [sys.executable, "-m", "fairseq.huggingface.lm_eval", *options.split()],
        env={**os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(path.read_text())["results"]

    nats = lm.loglikelihood_rolling([asked(row["text"]) for row in rows])
    assert results["read"]["word_perplexity,none"] == pytest.approx(
        math.exp(-sum(nats) / (150 * len(rows))), rel=1e-5
    )
    right = 0
    for row in rows:
        found = lm.loglikelihood([asked(row["context"], f" {word}") for word in row["choices"]])
        right += max(range(3), key=lambda i: found[i][0]) == row["gold"]
    assert results["choose"]["acc,none"] == pytest.approx(right / len(rows))
    assert results["write"]["exact_match,none"] == pytest.approx(5 / 6)
