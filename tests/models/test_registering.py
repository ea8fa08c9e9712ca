"""Models of plug-ins."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from tiny_models import Task, build

from fairseq import models
from fairseq.dataclass import FairseqDataclass
from fairseq.models.transformer_lm import TransformerLanguageModel, TransformerLanguageModelConfig
from fairseq.registry import ARCHITECTURES, MODELS


@pytest.fixture
def registries(monkeypatch):
    for registry in (ARCHITECTURES, MODELS):
        monkeypatch.setattr(registry, "_classes", dict(registry._classes))
        monkeypatch.setattr(registry, "_dataclasses", dict(registry._dataclasses))
    monkeypatch.setattr(ARCHITECTURES, "_model_of", dict(ARCHITECTURES._model_of))


def test_names_of_the_face():
    assert models.MODEL_REGISTRY["transformer_lm"] is TransformerLanguageModel
    assert "transformer_lm_wiki103" in models.ARCH_MODEL_REGISTRY
    assert MODELS.dataclass_of("transformer_lm") is TransformerLanguageModelConfig


def test_a_model_with_a_dataclass_is_an_arch_too(registries):
    @dataclass
    class Config(FairseqDataclass):
        width: int = 3

    @models.register_model("mine", dataclass=Config)
    class Mine(models.BaseFairseqModel):
        @classmethod
        def build_model(cls, cfg, task):
            model = cls()
            model.layer = torch.nn.Linear(cfg.width, len(task.source_dictionary))
            return model

    @models.register_model_architecture("mine", "mine_wide")
    def wide(args):
        args.width = getattr(args, "width", 8)

    cfg = Config()
    ARCHITECTURES.preset_of("mine")(cfg)
    assert models.build_model(Config(_name="mine_wide", width=5), Task(7)).layer.in_features == 5
    assert cfg.width == 3 and ARCHITECTURES.model_of("mine") == "mine"


def test_a_preset_of_a_plug_in(registries):
    @models.register_model_architecture("transformer_lm", "transformer_lm_mine")
    def mine(args):
        args.decoder_layers = getattr(args, "decoder_layers", 1)
        args.decoder_embed_dim = getattr(args, "decoder_embed_dim", 24)
        args.decoder_input_dim = args.decoder_output_dim = args.decoder_embed_dim
        args.decoder_attention_heads = 3

    model = build("transformer_lm_mine", decoder_embed_dim=12)
    assert len(model.decoder.layers) == 1
    assert model.decoder.layers[0].self_attn.head_dim == 4


def test_duplicate_names(registries):
    with pytest.raises(ValueError, match="duplicate model"):
        models.register_model("transformer_lm")(type("Other", (models.BaseFairseqModel,), {}))


def test_foreign_classes(registries):
    with pytest.raises(ValueError, match="must extend BaseFairseqModel"):
        models.register_model("other")(type("Other", (), {}))


def test_a_model_must_be_chosen():
    with pytest.raises(ValueError, match="choose one with --arch"):
        models.build_model(FairseqDataclass(), Task(5))


def test_a_model_without_a_builder():
    with pytest.raises(NotImplementedError, match="must implement build_model"):
        models.BaseFairseqModel.build_model(None, None)


def test_a_language_model_needs_a_decoder():
    with pytest.raises(TypeError, match="got Linear"):
        models.FairseqLanguageModel(torch.nn.Linear(1, 1))
