"""Saved models come back with ALiBi, and do not load silently without it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import transformers
from tiny_transformers import DECODERS, ENCODERS, LENGTH, MAJOR, bert, gpt2, needs_5, tokens

from fairseq.huggingface import apply_alibi, is_alibi, loading
from fairseq.huggingface.alibi import settings_of


@pytest.mark.parametrize("build", DECODERS + ENCODERS)
def test_a_saved_model_is_restored(build, tmp_path, capfd) -> None:
    model = build()
    apply_alibi(model, bias_max=6.0)
    ids = tokens(length=3 * LENGTH)
    with torch.no_grad():
        expected = model(ids).logits
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert is_alibi(loaded)
    assert settings_of(loaded).bias_max == 6.0
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, expected)
    assert set(loaded.state_dict()) == set(model.state_dict())
    assert "MISSING" not in capfd.readouterr().err


@needs_5
def test_settings_and_other_heads_come_back(tmp_path) -> None:
    model = bert("BertModel")
    apply_alibi(model, variant="two_slopes", interpolation={"type": "ntk", "factor": 2.0})
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert settings_of(loaded) == settings_of(model)
    again = transformers.AutoModel.from_config(transformers.AutoConfig.from_pretrained(tmp_path))
    assert is_alibi(again)


def test_another_way_of_computing_is_kept_or_asked_for(tmp_path) -> None:
    model = gpt2(attn_implementation="eager")
    apply_alibi(model)
    assert model.config._attn_implementation == "alibi_eager"
    model.save_pretrained(tmp_path)
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, attn_implementation="sdpa")
    assert loaded.config._attn_implementation == "alibi"
    assert is_alibi(loaded)


def test_half_precision_and_saving_again(tmp_path) -> None:
    model = gpt2().bfloat16()
    apply_alibi(model)
    model.save_pretrained(tmp_path / "a")
    half = {"dtype" if MAJOR >= 5 else "torch_dtype": torch.bfloat16}
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "a", **half)
    loaded.save_pretrained(tmp_path / "b")
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "b", **half)
    ids = tokens()
    assert torch.equal(again.eval()(ids).logits, model(ids).logits)


def test_the_folder_says_what_it_needs(tmp_path) -> None:
    model = gpt2()
    apply_alibi(model)
    (tmp_path / "README.md").write_text("# My model\n")
    for _ in range(2):
        model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("# My model\n")
    assert text.count("import fairseq.huggingface") == 1
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["fairseq_alibi"]["bias_max"] == 8.0
    assert config["attn_implementation"] == "alibi"


@pytest.mark.parametrize(
    ("build", "kind", "auto"),
    [
        (gpt2, "GPT2LMHeadModel", "AutoModelForCausalLM"),
        (gpt2, "GPT2Model", "AutoModel"),
        (gpt2, "GPT2ForSequenceClassification", "AutoModelForSequenceClassification"),
        *(
            pytest.param(bert, f"Bert{head}", f"AutoModel{head}", marks=needs_5)
            for head in (
                "ForMaskedLM",
                "ForMultipleChoice",
                "ForPreTraining",
                "ForQuestionAnswering",
                "ForTokenClassification",
            )
        ),
    ],
)
def test_the_folder_names_the_class_that_loads_its_head(build, kind, auto, tmp_path) -> None:
    model = build(kind)
    apply_alibi(model)
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert f"from transformers import {auto}\n" in text and f"{auto}.from_pretrained" in text
    assert type(getattr(transformers, auto).from_pretrained(tmp_path)) is type(model)


@pytest.mark.parametrize(
    ("kind", "auto"),
    [
        ("BartForConditionalGeneration", "AutoModelForSeq2SeqLM"),
        ("LlamaForCausalLM", "AutoModelForCausalLM"),
        ("BertLMHeadModel", "AutoModelForCausalLM"),
        ("GPT2DoubleHeadsModel", "AutoModel"),
    ],
)
def test_which_class_loads_which(kind, auto) -> None:
    assert loading.auto_class(kind) == auto


def test_a_model_without_alibi_is_saved_as_ever(tmp_path) -> None:
    gpt2().save_pretrained(tmp_path)
    assert not (tmp_path / "README.md").exists()
    assert not is_alibi(transformers.GPT2LMHeadModel.from_pretrained(tmp_path))


@needs_5
@pytest.mark.slow
def test_transformers_alone_refuses_to_load(tmp_path) -> None:
    model = gpt2()
    apply_alibi(model)
    model.save_pretrained(tmp_path)
    program = (
        "import sys, transformers\n"
        "try: transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "except ValueError as error: print(error)\n"
        "else: print('loaded')\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert 'attn_implementation="alibi"` is not supported' in ran.stdout


def test_a_loaded_model_whose_bias_is_lost_is_an_error(tmp_path, monkeypatch) -> None:
    from fairseq.huggingface.bias import ScoreBias

    model = gpt2()
    apply_alibi(model)
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(ScoreBias, "additive_mask", lambda self, q, k, mask, **_: mask)
    with pytest.raises(RuntimeError, match="bias changes the output"):
        transformers.GPT2LMHeadModel.from_pretrained(tmp_path)


def test_installed_once() -> None:
    before = transformers.PreTrainedModel.post_init
    loading.install()
    assert transformers.PreTrainedModel.post_init is before
