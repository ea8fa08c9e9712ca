"""Checkpoints as safetensors and as Hugging Face folders, in transformers, and back."""

from __future__ import annotations

import json
import logging
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from eval_runs import evaluate
from safetensors import safe_open

from fairseq import export, options
from fairseq.data.dictionary import Dictionary
from fairseq.dataclass.legacy import config_to_dict, extension_fields, namespace_to_config
from fairseq.evaluation.doctor import CHECKS
from fairseq.huggingface import Alibi, apply_alibi, is_alibi
from fairseq_cli import doctor
from fairseq_cli import export as command

transformers = pytest.importorskip("transformers")

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "invented"
DICTIONARY = GOLDEN / "bin" / "main" / "dict.txt"
CHECKPOINTS = {
    name: GOLDEN / "ckpt" / name / "checkpoint_last.pt" for name in ("wiki103_tiny", "gpt_tiny")
}
METHODS = ["alibi", "sinusoidal", "learned", "rotary", "t5", "fire", "kerple-log", "xpos", "none"]


def run(*arguments):
    command.main(command.get_parser().parse_args(list(map(str, arguments))))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Returns name -> the Hugging Face folder of a golden checkpoint."""
    made = {}
    for name, path in CHECKPOINTS.items():
        made[name] = tmp_path_factory.mktemp(name) / "hf"
        run("--path", path, "--to", "hf", "--output", made[name], "--dict", DICTIONARY)
    return made


def load(folder):
    import fairseq.huggingface  # noqa: F401, what the documents say to import

    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(params=list(CHECKPOINTS))
def pair(request, folders):
    """Returns our model and that of transformers."""
    ours = export.read_checkpoint_model(CHECKPOINTS[request.param]).model.eval()
    return ours, load(folders[request.param])


def scores_of(model, tokens):
    """Returns the scores of our own model as the Hugging Face one defines them, the long way."""
    features, extra = model(tokens)
    if model.decoder.adaptive_softmax is None:
        return features
    return model.get_normalized_probs((features, extra), log_probs=True)


def random_tokens(*shape, seed=0):
    return torch.randint(4, 4000, shape, generator=torch.Generator().manual_seed(seed))


# ---- what it is told to be ----


def test_an_exported_model_is_examined_as_its_checkpoint_is(folders, tmp_path, capsys):
    findings = doctor.examine_hf(str(folders["wiki103_tiny"]))
    assert all(finding.status != "FAIL" for finding in findings)
    texts = {finding.name: finding.text for finding in findings}
    assert "a language model of this project" in texts["the model loads"]
    assert texts["stored method is in effect"] == "alibi (as config.json says)"
    assert "8 heads" in texts["slopes are the method's"]
    assert set(CHECKS) == set(texts) - {"the model loads"}
    assert "all checks passed" in capsys.readouterr().out

    (tmp_path / "config.json").write_text((folders["wiki103_tiny"] / "config.json").read_text())
    (finding,) = doctor.examine_hf(str(tmp_path))
    assert (finding.name, finding.status) == ("the model loads", "FAIL")


def test_alibi_is_known_and_not_applied_again(folders):
    model = load(folders["wiki103_tiny"])
    assert is_alibi(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="language model of this project and has ALiBi already"):
        apply_alibi(model)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert is_alibi(export.read_checkpoint_model(CHECKPOINTS["wiki103_tiny"]).model)


@pytest.mark.parametrize("method", METHODS[1:])
def test_another_position_method_is_no_alibi(method):
    from fairseq.huggingface.export import to_pretrained

    model = to_pretrained(untrained(method))
    assert not is_alibi(model)
    with pytest.raises(ValueError, match=f"has the position method {method}; fairseq-train"):
        apply_alibi(model)


def test_a_schedule_knows_that_it_is_causal(folders):
    schedule = Alibi(64, 0.5)
    assert schedule.prepare(load(folders["wiki103_tiny"])) == 0
    tokens = random_tokens(1, 9)
    pieces = schedule({"input_ids": tokens, "labels": tokens})["input_ids"]
    assert torch.equal(pieces[:, 0], tokens[0, :-1:4])
    assert torch.equal(pieces[:, -1], tokens[0, 4::4])  # Each with the first of the next.


def test_an_exported_model_is_saved_without_the_note_for_others(folders, tmp_path):
    load(folders["wiki103_tiny"]).save_pretrained(tmp_path)
    assert not (tmp_path / "README.md").exists()


# ---- transformers ----


@torch.no_grad()
def test_the_same_logits(pair):
    ours, theirs = pair
    assert type(theirs).__name__ == "FairseqAlibiForCausalLM"
    tokens = random_tokens(2, 90)
    torch.testing.assert_close(theirs(tokens).logits, scores_of(ours, tokens), rtol=0, atol=1e-6)
    kept = theirs(tokens, logits_to_keep=3)
    torch.testing.assert_close(kept.logits, theirs(tokens).logits[:, -3:], rtol=0, atol=1e-5)
    logits, *_ = theirs(tokens, return_dict=False, use_cache=False)
    assert torch.equal(logits, theirs(tokens).logits)
    states = theirs(tokens, output_hidden_states=True).hidden_states
    assert len(states) == theirs.config.num_hidden_layers + 1


@torch.no_grad()
def test_the_loss_is_the_mean_of_minus_log_p(pair):
    ours, theirs = pair
    tokens = random_tokens(2, 20)
    labels = tokens.clone()
    labels[0, :7] = -100
    log_probs = torch.log_softmax(scores_of(ours, tokens).double(), dim=-1)
    each = [
        -log_probs[row, place - 1, tokens[row, place]].item()
        for row in range(2)
        for place in range(1, 20)
        if labels[row, place] != -100
    ]
    assert len(each) == 13 + 19
    found = theirs(tokens, labels=labels)
    assert found.past_key_values is None
    assert found.loss.item() == pytest.approx(sum(each) / len(each), abs=1e-5)
    summed = theirs(tokens, labels=labels, num_items_in_batch=8).loss
    assert summed.item() == pytest.approx(sum(each) / 8, abs=1e-4)
    with pytest.raises(ValueError, match="leave out logits_to_keep"):
        theirs(tokens, labels=labels, logits_to_keep=1)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(pair, side):
    ours, theirs = pair
    short, long = random_tokens(1, 5), random_tokens(1, 9, seed=1)
    padding = torch.zeros(1, 4, dtype=torch.int64)
    ends = [padding, short] if side == "left" else [short, padding]
    tokens = torch.cat([torch.cat(ends, dim=1), long])
    mask = torch.ones_like(tokens)
    here = slice(4, None) if side == "left" else slice(0, 5)
    mask[0] = 0
    mask[0, here] = 1
    found = theirs(tokens, attention_mask=mask).logits
    torch.testing.assert_close(found[:1, here], scores_of(ours, short), rtol=0, atol=1e-5)
    torch.testing.assert_close(found[1:], scores_of(ours, long), rtol=0, atol=1e-5)


@torch.no_grad()
def test_steps_with_a_cache_are_the_full_pass(pair):
    ours, theirs = pair
    tokens = random_tokens(2, 12)
    cache, steps = None, []
    for part in tokens.split([5, 1, 1, 5], dim=1):
        out = theirs(part, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits)
    assert cache.get_seq_length() == 12
    torch.testing.assert_close(torch.cat(steps, dim=1), scores_of(ours, tokens), rtol=0, atol=1e-5)
    with pytest.raises(TypeError, match="only the cache that it returned itself"):
        theirs(tokens, past_key_values=transformers.DynamicCache())


@torch.no_grad()
def greedy(model, tokens, count):
    """Continues tokens (1, T) by the likeliest symbol, one full pass each."""
    for _ in range(count):
        best = scores_of(model, tokens)[:, -1].argmax(dim=-1, keepdim=True)
        tokens = torch.cat([tokens, best], dim=1)
    return tokens


@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_continues_each_row_as_it_would_alone(pair, use_cache):
    ours, theirs = pair
    short, long = random_tokens(1, 4), random_tokens(1, 8, seed=3)
    tokens = torch.cat([torch.cat([torch.ones(1, 4, dtype=torch.int64), short], dim=1), long])
    found = theirs.generate(
        tokens,
        attention_mask=(tokens != 1).long(),
        max_new_tokens=12,
        do_sample=False,
        use_cache=use_cache,
        eos_token_id=None,
    )
    assert torch.equal(found[0, 4:], greedy(ours, short, 12)[0])
    assert torch.equal(found[1], greedy(ours, long, 12)[0])


@torch.no_grad()
def test_beam_search_reorders_the_cache(pair):
    _, theirs = pair
    tokens = random_tokens(2, 6)
    options_ = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "eos_token_id": None}
    cached = theirs.generate(tokens, use_cache=True, **options_)
    assert torch.equal(cached, theirs.generate(tokens, use_cache=False, **options_))
    sampled = theirs.generate(tokens, max_new_tokens=3, do_sample=True, top_k=5)
    assert sampled.shape[1] <= 9


@torch.no_grad()
def test_saved_and_loaded_again(pair, tmp_path):
    _, theirs = pair
    tokens = random_tokens(1, 10)
    theirs.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert torch.equal(again(tokens).logits, theirs(tokens).logits)
    assert again.config.to_diff_dict()["fairseq"] == theirs.config.fairseq
    expected = export.tied_names(theirs)
    assert export.tied_names(again) == expected
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert not set(expected) & set(file.keys())


def test_the_vocabulary_is_fixed(pair):
    _, theirs = pair
    assert theirs.get_input_embeddings() is theirs.decoder.embed_tokens
    assert (theirs.get_output_embeddings() is None) == (theirs.decoder.output_projection is None)
    with pytest.raises(ValueError, match="is fixed"):
        theirs.resize_token_embeddings(10)


def untrained(method):
    """Returns a small model with a position method."""
    shape = (
        "--decoder-layers 2 --decoder-embed-dim 32 --decoder-ffn-embed-dim 64 "
        "--decoder-attention-heads 4 --tokens-per-sample 16 --max-target-positions 64"
    )
    words = f"x --arch transformer_lm_gpt {shape} --position-method {method}".split()
    args = options.parse_args_and_arch(options.get_training_parser(), [*words, "--max-tokens", "9"])
    cfg = namespace_to_config(args)
    settings = {"cfg": config_to_dict(cfg), "extensions": extension_fields(cfg), "num_symbols": 99}
    settings = json.loads(json.dumps(settings))
    return export.ExportedModel(settings, export.build_model(settings).eval())


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_every_position_method_survives(method, tmp_path):
    from fairseq.huggingface.export import to_pretrained

    exported = untrained(method)
    to_pretrained(exported).save_pretrained(tmp_path)
    again = load(tmp_path)
    tokens = random_tokens(2, 20) % 90 + 4
    expected = scores_of(exported.model, tokens)
    torch.testing.assert_close(again(tokens).logits, expected, rtol=0, atol=1e-6)


def test_the_tokenizer_reads_as_preprocessing_does(folders):
    import fairseq.huggingface  # noqa: F401

    tokenizer = transformers.AutoTokenizer.from_pretrained(folders["gpt_tiny"])
    dictionary = Dictionary.load(DICTIONARY)
    lines = (GOLDEN / "text/valid.txt").read_text().splitlines()[:40]
    expected = [i for line in lines for i in dictionary.encode_ids(line).tolist()]
    text = "\n".join(lines) + "\n"
    assert tokenizer(text)["input_ids"] == expected
    assert 3 in expected, "some word is not known"
    known = " ".join(dictionary.symbols[4:20])
    assert tokenizer.decode(tokenizer(f"{known}\n{known}")["input_ids"]) == f"{known}\n{known}"
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 3)
    assert len(tokenizer) == len(dictionary)
    # Words that look like special symbols are words, no piece of others.
    word = dictionary.symbols[9]
    assert tokenizer(f"{word} <unk> x<unk>y")["input_ids"] == [9, 3, 3]
    batch = tokenizer([word, f"{word} {word}"], padding=True, padding_side="left")
    assert batch["input_ids"] == [[1, 9], [9, 9]]
    assert batch["attention_mask"] == [[0, 1], [1, 1]]


def test_text_in_text_out(folders):
    import fairseq.huggingface  # noqa: F401

    generator = transformers.pipeline("text-generation", str(folders["wiki103_tiny"]), device="cpu")
    text = " ".join(Dictionary.load(DICTIONARY).symbols[10:16])
    (found,) = generator(text, max_new_tokens=4, do_sample=False)
    assert found["generated_text"].startswith(text)


# ---- the command ----


@pytest.mark.parametrize("form", ["safetensors", "hf"])
@pytest.mark.parametrize("name", list(CHECKPOINTS))
def test_there_and_back_is_the_same_model(name, form, folders, tmp_path, monkeypatch, caplog):
    folder = folders[name]
    if form == "safetensors":
        folder = tmp_path / "st"
        arguments = ["--path", CHECKPOINTS[name], "--to", form, "--output", folder]
        run(*arguments, "--dict", DICTIONARY)
    back = tmp_path / "new folder" / "back.pt"
    run("--path", folder, "--from", form, "--output", back)
    first = torch.load(CHECKPOINTS[name], weights_only=True)
    second = torch.load(back, weights_only=True)
    kept = {k: v for k, v in first["model"].items() if not k.endswith("_float_tensor")}
    assert {k for k in second["model"] if not k.endswith("_float_tensor")} == set(kept)
    for key, tensor in kept.items():
        assert torch.equal(second["model"][key], tensor), key
    assert second["alibi"]["dictionary"]["size"] == 4192
    assert second["optimizer_history"][-1]["num_updates"] > 0
    line = "bin/main --gen-subset valid --tokens-per-sample 64 --max-tokens 256 --path"
    runs = [evaluate(monkeypatch, caplog, f"{line} '{path}'") for path in (CHECKPOINTS[name], back)]
    assert runs[0].loss == runs[1].loss


def test_tied_weights_are_written_once(tmp_path):
    run("--path", CHECKPOINTS["wiki103_tiny"], "--to", "safetensors", "--output", tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
        ties = json.loads(file.metadata()["tied"])
    # By hand: the head's words, and of each of two tails projection and words, are the input's.
    softmax, bands = "decoder.adaptive_softmax", "decoder.embed_tokens.embeddings"
    assert ties == {
        f"{softmax}.head.word_proj.weight": f"{bands}.0.0.weight",
        f"{softmax}.tail.0.0.weight": f"{bands}.1.1.weight",
        f"{softmax}.tail.0.2.weight": f"{bands}.1.0.weight",
        f"{softmax}.tail.1.0.weight": f"{bands}.2.1.weight",
        f"{softmax}.tail.1.2.weight": f"{bands}.2.0.weight",
    }
    assert not names & set(ties)
    parameters = export.read_safetensors(tmp_path).model.parameters()
    size = sum(p.numel() for p in parameters) * 4
    assert size < (tmp_path / "model.safetensors").stat().st_size < size + 20_000


def test_fine_tuning_goes_on_from_an_exported_model(tmp_path, monkeypatch, caplog):
    from train_runs import golden_command, train

    name = "gpt_tiny"
    run("--path", CHECKPOINTS[name], "--to", "safetensors", "--output", tmp_path / "st")
    run("--path", tmp_path / "st", "--from", "safetensors", "--output", tmp_path / "model.pt")
    monkeypatch.chdir(GOLDEN)
    changes = {"finetune_from_model": tmp_path / "model.pt", "max_update": 2, "log_interval": 1}
    found = train(monkeypatch, caplog, golden_command(name, tmp_path / "run", **changes))
    assert found.exit_code == 0
    fresh = math.log2(4192)
    assert found.curve()[1]["loss"] < fresh - 2


MISTAKES = {
    "no such checkpoint": ("nowhere.pt", "hf", [], FileNotFoundError, "nowhere.pt"),
    "no dictionary": (CHECKPOINTS["gpt_tiny"], "hf", [], FileNotFoundError, "--dict DATA/dict.txt"),
    "a dictionary that is not there": (
        CHECKPOINTS["gpt_tiny"],
        "safetensors",
        ["--dict", "none.txt"],
        FileNotFoundError,
        "--dict: there is no none.txt",
    ),
    "another dictionary": (
        CHECKPOINTS["gpt_tiny"],
        "hf",
        ["--dict", GOLDEN / "bin/nwords1000_thr2_pf16/dict.txt"],
        ValueError,
        "symbols, the model 4,192",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_told(case, tmp_path, monkeypatch):
    path, form, more, error, message = MISTAKES[case]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        run("--path", path, "--to", form, "--output", tmp_path / "out", *more)
    assert not (tmp_path / "out").exists()


def test_what_is_no_export_is_told(tmp_path):
    out = ["--output", tmp_path / "x.pt"]
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        run("--path", tmp_path, "--from", "safetensors", *out)
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        run("--path", tmp_path, "--from", "hf", *out)
    (tmp_path / "model.safetensors").write_bytes(b"not at all")
    with pytest.raises(ValueError, match="damaged, or not a file that fairseq-export wrote"):
        run("--path", tmp_path, "--from", "safetensors", *out)
    with pytest.raises(ValueError, match="it is the checkpoint's file"):
        run("--path", tmp_path, "--from", "safetensors", "--output", tmp_path)
    shutil.copy(CHECKPOINTS["gpt_tiny"], tmp_path / "file")
    with pytest.raises(ValueError, match="is a file"):
        run("--path", tmp_path / "file", "--to", "hf", "--output", tmp_path / "file")


def test_the_command_line(tmp_path, monkeypatch, caplog, capsys):
    arguments = ["--path", str(CHECKPOINTS["gpt_tiny"]), "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["fairseq-export", *arguments, "--to", "safetensors"])
    with caplog.at_level(logging.INFO):
        command.cli_main()
    assert caplog.messages[-1] == f"wrote {tmp_path}: model.safetensors"
    assert "no dictionary was found" in caplog.text
    monkeypatch.setattr(sys, "argv", ["fairseq-export", *arguments])
    with pytest.raises(SystemExit) as stopped:
        command.cli_main()
    assert stopped.value.code == 2
    assert "--to" in capsys.readouterr().err
