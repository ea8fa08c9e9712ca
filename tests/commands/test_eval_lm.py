"""fairseq-eval-lm against what the original printed for its own checkpoints."""

from __future__ import annotations

import argparse
import math
import re
import shutil

import pytest
import torch
from eval_runs import GOLDEN, evaluate, fails, recorded
from train_runs import TINY_MODEL, TINY_TRAINING, make_tiny_data, set_formula_weights

from fairseq import checkpoint_utils, options, tasks
from fairseq.checkpoint import pack
from fairseq.checkpoint.format import to_plain
from fairseq.data.dictionary import Dictionary
from fairseq.dataclass.legacy import namespace_to_config
from fairseq.logging import metrics
from fairseq_cli import preprocess
from fairseq_cli import train as train_command

RECORDED = recorded(GOLDEN)

WIKI = "bin/main --path ckpt/wiki103_tiny/checkpoint_last.pt --gen-subset valid --batch-size 8"
GPT = WIKI.replace("wiki103_tiny", "gpt_tiny")


@pytest.fixture
def run(monkeypatch, caplog):
    return lambda command, **options: evaluate(monkeypatch, caplog, command, **options)


@pytest.fixture
def fail(monkeypatch, capsys):
    return lambda command, **options: fails(monkeypatch, capsys, command, **options)


# ---- the original's numbers ----


@pytest.mark.parametrize(
    "name",
    [
        "wiki103_tiny_valid_l64_c0",
        "wiki103_tiny_valid_l512_c0",
        "wiki103_tiny_test_l128_c0",
        "wiki103_tiny_valid_l64_c32",
        "wiki103_tiny_valid_l128_c100",
        "gpt_tiny_valid_l32_c0",
        "gpt_tiny_test_l512_c0",
        "gpt_tiny_valid_l64_c32",
    ],
)
def test_the_originals_loss(run, name):
    row = RECORDED[name]
    result = run(row["args"])
    assert result.loss == pytest.approx(row["loss_base2"], abs=2e-4)
    assert result.perplexity == pytest.approx(2**result.loss)
    assert result.messages[-1] == (
        f"Loss (base 2): {result.loss:.4f}, Perplexity: {result.perplexity:.2f}"
    )
    if "valid" in name:
        assert result.num_tokens == 5601


def _printed(name):
    """Returns the messages of the command that the original printed."""
    text = (GOLDEN / "eval" / f"{name}.stdout.txt").read_text(encoding="utf-8")
    return re.findall(r"(?m)^\S+ \S+ \| INFO \| fairseq_cli\.eval_lm \| (.*)$", text)


def test_the_lines_before_the_result_are_the_originals(run):
    name = "wiki103_tiny_valid_l64_c0"
    printed, ours = _printed(name), run(RECORDED[name]["args"]).messages
    # All but the dump of the settings and the speed.
    assert ours[1:-2] == printed[1:-2]
    assert re.sub(r"in .*", "", ours[-2]) == re.sub(r"in .*", "", printed[-2])
    assert ours[-1] == printed[-1]


def _words(line):
    row_id, words = line.split(" ", 1)
    pairs = [re.fullmatch(r"(.*) \[(.*)\]", word).groups() for word in words.split("\t")]
    return row_id, [word for word, _ in pairs], [score for _, score in pairs]


def test_word_probabilities_are_the_originals(run):
    name = "wiki103_tiny_valid_l64_c0_outputwordprobs"
    printed = [line for line in _printed(name) if re.match(r"\d+ .*\[", line)]
    ours = [line for line in run(RECORDED[name]["args"]).messages if re.match(r"\d+ .*\[", line)]
    assert len(ours) == len(printed) == 88
    for got, wanted in zip(ours, printed, strict=True):
        (got_id, got_words, got_scores), (wanted_id, words, scores) = _words(got), _words(wanted)
        assert (got_id, got_words) == (wanted_id, words)
        assert [float(s) for s in got_scores] == pytest.approx(list(map(float, scores)), abs=1e-4)
        assert all(re.fullmatch(r"-?\d+\.\d{6}", score) for score in got_scores)


def test_word_statistics_are_the_originals(run):
    name = "gpt_tiny_valid_l64_c0_outputwordstats"
    printed = [line.split("\t") for line in _printed(name) if line.count("\t") == 5]
    messages = run(RECORDED[name]["args"]).messages
    ours = [line.split("\t") for line in messages if line.count("\t") == 5]
    assert len(ours) == len(printed) > 1000
    for got, wanted in zip(ours, printed, strict=True):
        assert [got[i] for i in (0, 1, 3, 5)] == [wanted[i] for i in (0, 1, 3, 5)]
        count = int(got[1])
        assert float(got[2]) == pytest.approx(float(wanted[2]), abs=1e-4 * count)
        assert float(got[4]) == pytest.approx(float(wanted[4]), abs=1e-4 * count)


# ---- what does not change the numbers ----


@pytest.mark.parametrize(
    "overrides",
    [
        "",
        "--model-overrides \"{'max_target_positions': 128}\"",
        "--model-overrides \"{'tokens_per_sample': 128, 'max_target_positions': 128}\"",
    ],
)
def test_blocks_beyond_the_training_length_need_no_overrides(run, overrides):
    result = run(f"{WIKI} --tokens-per-sample 128 --max-tokens 1024 {overrides}")
    wanted = RECORDED["wiki103_tiny_valid_l128_c0"]["loss_base2"]
    assert result.loss == pytest.approx(wanted, abs=2e-4)
    assert result.num_tokens == 5601


@pytest.mark.parametrize(
    "how",
    [
        "--batch-size 1",
        "--batch-size 5 --max-tokens 200",
        "--num-workers 2",
        "--softmax-batch 7",
        "--required-batch-size-multiple 8",
    ],
)
@pytest.mark.parametrize("model", [WIKI, GPT], ids=["adaptive", "plain"])
def test_windows_do_not_depend_on_how_they_are_batched(run, model, how):
    name = "wiki103_tiny" if model is WIKI else "gpt_tiny"
    result = run(f"{model} --tokens-per-sample 64 --context-window 32 {how}")
    wanted = RECORDED[f"{name}_valid_l64_c32"]["loss_base2"]
    assert result.loss == pytest.approx(wanted, abs=2e-4)
    assert result.num_tokens == 5601


def test_shards_add_up_to_the_whole(run):
    shards = [run(f"{WIKI} --tokens-per-sample 64 --num-shards 3 --shard-id {i}") for i in range(3)]
    total = sum(shard.num_tokens for shard in shards)
    assert total == 5601
    mean = sum(shard.loss * shard.num_tokens for shard in shards) / total
    assert mean == pytest.approx(RECORDED["wiki103_tiny_valid_l64_c0"]["loss_base2"], abs=2e-4)


def test_half_precision_on_a_cpu_is_float32_with_a_warning(run):
    result = run(f"{WIKI} --tokens-per-sample 64 --fp16")
    wanted = RECORDED["wiki103_tiny_valid_l64_c0"]["loss_base2"]
    assert result.loss == pytest.approx(wanted, abs=2e-4)
    assert [w for w in result.warnings if "float32 is used" in w]


@pytest.mark.parametrize("kind", ["--fp16", "--bf16"])
def test_half_precision_on_a_cpu_if_it_must_be(run, kind):
    result = run(f"{GPT} --tokens-per-sample 64 {kind} --cpu-half --num-shards 8 --shard-id 3")
    whole = run(f"{GPT} --tokens-per-sample 64 --num-shards 8 --shard-id 3")
    assert result.loss != whole.loss
    assert result.loss == pytest.approx(whole.loss, abs=0.02)
    assert not [w for w in result.warnings if "float32 is used" in w]


def test_rows_that_start_with_bos(run):
    result = run(f"{WIKI} --tokens-per-sample 64 --add-bos-token")
    without = RECORDED["wiki103_tiny_valid_l64_c0"]["loss_base2"]
    # The model never saw <s>; it costs a little, and is not scored itself.
    assert result.loss == pytest.approx(without, abs=0.5)
    assert result.loss != pytest.approx(without, abs=1e-3)


def test_whole_lines_longer_than_a_block_are_evaluated(run):
    result = run(f"{WIKI} --tokens-per-sample 16 --sample-break-mode complete --max-tokens 64")
    assert result.num_tokens == 5601
    assert result.loss == pytest.approx(9.0, abs=0.2)


# ---- weights that follow from a formula ----


@pytest.fixture(scope="module")
def formula(tmp_path_factory):
    """A folder with binarized made-up text and a checkpoint of formula weights."""
    folder = tmp_path_factory.mktemp("formula")
    data = make_tiny_data(folder)
    arguments = f"{data} {TINY_MODEL} {TINY_TRAINING} --max-update 10".split()
    args = options.parse_args_and_arch(options.get_training_parser(), arguments)
    cfg = namespace_to_config(args)
    task = tasks.setup_task(cfg.task)
    model = task.build_model(cfg.model)
    set_formula_weights(model)
    state = pack(
        cfg=cfg,
        model_state=model.state_dict(),
        criterion_state=None,
        optimizer_history=[{"criterion_name": "AdaptiveLoss", "optimizer_name": "FairseqNAG"}],
        task_state={},
        extra_state={"train_iterator": {"epoch": 1, "iterations_in_epoch": 0}},
        dictionary=task.source_dictionary,
    )
    checkpoint_utils.torch_persistent_save(state, folder / "formula.pt")
    return folder


@pytest.fixture(scope="module")
def trained(formula):
    """The same folder with the checkpoint of a run of ten updates from the formula's weights."""
    arguments = f"{formula}/bin {TINY_MODEL} {TINY_TRAINING} --max-update 10".split()
    arguments += (
        f"--save-dir {formula}/checkpoints --finetune-from-model {formula}/formula.pt".split()
    )
    args = options.parse_args_and_arch(options.get_training_parser(), arguments)
    train_command.main(namespace_to_config(args))
    metrics.reset()
    return formula


def _formula_command(length, context, path="formula.pt"):
    overrides = f"{{'max_tokens':{length}, 'tokens_per_sample':{length}, "
    overrides += f"'max_target_positions':{length}}}"
    return [
        *f"bin --path {path} --sample-break-mode none --gen-subset valid --max-sentences 1".split(),
        *f"--tokens-per-sample {length} --max-tokens {length} --context-window {context}".split(),
        *["--model-overrides", overrides],
    ]


@pytest.mark.parametrize(
    ("length", "context", "loss"), [(16, 0, 7.012098), (16, 15, 7.011866), (32, 0, 7.011872)]
)
def test_weights_of_a_formula(run, formula, length, context, loss):
    result = run(_formula_command(length, context), folder=formula)
    assert result.loss == pytest.approx(loss, abs=2e-5)
    assert result.num_tokens == 114
    assert "position method: alibi (recorded in the checkpoint)" in result.log


@pytest.mark.parametrize(
    ("length", "context", "loss"),
    [(16, 0, 6.059995), (16, 15, 6.086456), (32, 0, 6.066197), (32, 8, 6.069408)],
)
def test_weights_after_ten_updates(run, trained, length, context, loss):
    command = _formula_command(length, context, path="checkpoints/checkpoint_last.pt")
    assert run(command, folder=trained).loss == pytest.approx(loss, abs=1e-4)


# ---- text with symbols that mean something else ----


def test_a_padding_symbol_in_the_text_is_scored_where_it_stands(run, tmp_path):
    words = Dictionary.load(str(GOLDEN / "bin/main/dict.txt")).symbols[4:40]
    line = [*words[:3], "<pad>", *words[3:8]]
    (tmp_path / "text").write_text(" ".join(line) + "\n" + words[9] + "\n", encoding="utf-8")
    parser = options.get_preprocessing_parser(default_task="language_modeling")
    source = f"--only-source --testpref {tmp_path}/text --srcdict {GOLDEN}/bin/main/dict.txt"
    preprocess.main(parser.parse_args(f"{source} --destdir {tmp_path}/bin".split()))
    path = GOLDEN / "ckpt/wiki103_tiny/checkpoint_last.pt"
    result = run(f"{tmp_path}/bin --path {path} --tokens-per-sample 64 --output-word-probs")
    row = next(m for m in result.messages if m.startswith("0 "))
    _, listed, scores = _words(row)
    assert listed == [*line, "</s>", words[9], "</s>"]
    assert result.num_tokens == len(listed) == 12
    nats = -sum(map(float, scores)) / 12
    assert result.loss == pytest.approx(nats / math.log(2), abs=1e-5)


# ---- which position method ----


def _upstream_copy(tmp_path, **model):
    """Writes the golden model as upstream fairseq would have written it."""
    state = torch.load(GOLDEN / "ckpt/gpt_tiny/checkpoint_last.pt", weights_only=True)
    del state["cfg"]["model"]["max_tokens"]
    state["cfg"]["model"].update(model)
    torch.save(state, tmp_path / "upstream.pt")
    return tmp_path / "upstream.pt"


def test_a_file_of_upstream_fairseq_is_read_as_such(run, tmp_path):
    command = f"bin/main --path {_upstream_copy(tmp_path)} --gen-subset valid --batch-size 8"
    alibi = RECORDED["gpt_tiny_valid_l64_c0"]["loss_base2"]
    command += " --tokens-per-sample 64"
    assert run(command).loss != pytest.approx(alibi, abs=1e-3)
    for how in ("--position-method alibi", "--model-overrides \"{'position_method': 'alibi'}\""):
        assert run(f"{command} {how}").loss == pytest.approx(alibi, abs=2e-4)


def test_a_file_with_flat_args_cannot_tell_and_is_taken_for_alibi(run, tmp_path):
    state = torch.load(GOLDEN / "ckpt/gpt_tiny/checkpoint_last.pt", weights_only=True)
    cfg = state.pop("cfg")
    flat = {}
    for section in cfg.values():
        flat.update({k: v for k, v in (section or {}).items() if k != "_name"})
    names = {key: cfg[key]["_name"] for key in ("criterion", "optimizer", "lr_scheduler", "task")}
    state["args"] = argparse.Namespace(**flat, **names, arch=cfg["model"]["_name"])
    torch.save(state, tmp_path / "args.pt")
    command = f"bin/main --path {tmp_path}/args.pt --gen-subset valid --tokens-per-sample 64"
    result = run(command + " --batch-size 8")
    wanted = RECORDED["gpt_tiny_valid_l64_c0"]["loss_base2"]
    assert result.loss == pytest.approx(wanted, abs=2e-4)
    assert [w for w in result.warnings if "--position-method sinusoidal" in w]


def test_rows_longer_than_a_learned_table_are_refused_before_evaluating(fail, run, tmp_path):
    path = _upstream_copy(tmp_path, decoder_learned_pos=True)
    state = torch.load(path, weights_only=True)
    del state["model"]["decoder.embed_positions._float_tensor"]
    state["model"]["decoder.embed_positions.weight"] = torch.zeros(66, 48)
    torch.save(state, path)
    command = f"bin/main --path {path} --gen-subset valid --batch-size 8"
    assert run(f"{command} --tokens-per-sample 64 --context-window 32").num_tokens == 5601
    for length in ("--tokens-per-sample 65", "--tokens-per-sample 96 --context-window 64"):
        code, printed = fail(f"{command} {length}")
        assert code == 1
        assert "longer than the 64 positions the model has learned" in printed


# ---- bad input: one message, exit 1 ----


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("bin/main --gen-subset valid", "--path is needed"),
        ("bin/main --path ckpt/nope.pt", "Model file not found: ckpt/nope.pt"),
        ("bin/main --path a.pt:b.pt", "one checkpoint is evaluated at a time"),
        (f"{WIKI} --gen-subset nope", "Dataset not found: nope (bin/main/nope)"),
        (
            f"{WIKI} --tokens-per-sample 32 --context-window 32",
            "--context-window 32 leaves no room for new tokens in windows of --tokens-per-sample "
            "32; it must be smaller, 31 at most",
        ),
        (f"{WIKI} --context-window -1", "--context-window is -1"),
        (f"{WIKI} --post-process letter", "--post-process 'letter' is not supported"),
        (f"{WIKI} --model-overrides dropout=0", "--model-overrides: 'dropout=0'"),
        (f"{WIKI} --model-overrides \"{{'dropout': 'much'}}\"", "dropout"),
        (f"{WIKI} --num-shards 2 --shard-id 2", "shard"),
        (
            f"{WIKI} --tokens-per-sample 6000 --num-shards 2 --shard-id 1",
            "nothing was evaluated",
        ),
        (
            WIKI.replace("bin/main", "bin/nwords1000_thr2_pf16", 1),
            "knows 4,192 symbols, the dictionary of the data has",
        ),
        (f"{WIKI} --position-method alibbi", "unknown method 'alibbi'"),
    ],
)
def test_what_cannot_be_evaluated(fail, command, message):
    code, printed = fail(command)
    assert code == 1
    assert message in printed
    assert len(printed.strip().splitlines()) == 1


def test_a_split_without_a_block_to_score(fail, tmp_path):
    (tmp_path / "text").write_text("\n\n\n")
    dictionary = GOLDEN / "bin/main/dict.txt"
    arguments = f"--only-source --srcdict {dictionary} --validpref {tmp_path}/text"
    parser = options.get_preprocessing_parser()
    preprocess.main(parser.parse_args(f"{arguments} --destdir {tmp_path}/bin".split()))
    command = WIKI.replace("bin/main", f"{tmp_path}/bin", 1)
    code, printed = fail(f"{command} --gen-subset valid --sample-break-mode complete_doc")
    assert code == 1 and "nothing was evaluated" in printed


def test_a_name_that_no_setting_has_is_warned_of(run):
    result = run(
        f"{WIKI} --tokens-per-sample 64 --model-overrides \"{{'max_target_position': 9}}\""
    )
    assert [w for w in result.warnings if "max_target_positions" in w]


def test_another_dictionary_of_the_same_size_is_noticed(fail, formula, tmp_path):
    shutil.copytree(formula / "bin", tmp_path / "bin")
    lines = (tmp_path / "bin/dict.txt").read_text().splitlines(keepends=True)
    (tmp_path / "bin/dict.txt").write_text("".join([lines[1], lines[0], *lines[2:]]))
    shutil.copy(formula / "formula.pt", tmp_path)
    command = " ".join(_formula_command(16, 0)[:-2])
    code, printed = fail(command, folder=tmp_path)
    assert code == 1
    assert "trained with another dictionary: both have 64 symbols" in printed


def test_a_file_of_weights_alone_cannot_be_evaluated(fail):
    code, printed = fail(WIKI.replace("checkpoint_last", "init"))
    assert code == 1
    assert "neither 'cfg' nor 'args'" in printed


def test_a_checkpoint_that_wants_to_run_code_is_refused(fail, tmp_path):
    class Evil:
        def __reduce__(self):
            return shutil.rmtree, (str(tmp_path / "precious"),)

    (tmp_path / "precious").mkdir()
    torch.save({"model": {}, "cfg": Evil()}, tmp_path / "evil.pt")
    code, printed = fail(f"bin/main --path {tmp_path}/evil.pt --gen-subset valid")
    assert code == 1
    assert f"{tmp_path}/evil.pt is refused: loading it would call shutil.rmtree" in printed
    assert (tmp_path / "precious").exists()


def test_a_truncated_checkpoint(fail, tmp_path):
    content = (GOLDEN / "ckpt/gpt_tiny/checkpoint_last.pt").read_bytes()
    (tmp_path / "part.pt").write_bytes(content[: len(content) // 2])
    code, printed = fail(f"bin/main --path {tmp_path}/part.pt --gen-subset valid")
    assert code == 1
    assert f"{tmp_path}/part.pt is truncated" in printed
    assert len(printed.strip().splitlines()) == 1


def test_weights_that_do_not_fit_their_settings(fail, tmp_path):
    state = torch.load(GOLDEN / "ckpt/gpt_tiny/checkpoint_last.pt", weights_only=True)
    state["cfg"]["model"]["decoder_ffn_embed_dim"] = 80
    torch.save(to_plain(state), tmp_path / "wrong.pt")
    code, printed = fail(f"bin/main --path {tmp_path}/wrong.pt --gen-subset valid")
    assert code == 1
    assert f"{tmp_path}/wrong.pt: the parameters do not fit" in printed
