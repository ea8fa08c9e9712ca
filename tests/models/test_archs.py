"""Presets: what they set, and how many parameters the models have."""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys

import pytest
import torch
from tiny_models import CHECKPOINTS, Task, settings

from fairseq.models import build_model
from fairseq.models.transformer_lm import TransformerLanguageModelConfig
from fairseq.positions import PositionConfig
from fairseq.registry import ARCHITECTURES

# arch: layers, width, feed-forward width, heads, dropout, attention dropout, activation dropout,
# activation, final norm, learned positions, shared input and output
ROWS = {
    "big": (12, 1024, 4096, 16, 0.1, 0.0, None, "relu", True, False, False),
    "wiki103": (16, 1024, 4096, 8, 0.3, 0.1, 0.1, "relu", False, False, False),
    "baevski_wiki103": (16, 1024, 4096, 8, 0.3, 0.1, 0.1, "relu", False, False, False),
    "gbw": (12, 512, 4096, 16, 0.1, 0.1, None, "relu", False, False, False),
    "baevski_gbw": (12, 512, 4096, 16, 0.1, 0.1, None, "relu", False, False, False),
    "gpt": (12, 768, 3072, 12, 0.1, 0.1, None, "gelu", True, False, False),
    "gpt2_tiny": (2, 64, 64, 1, 0.1, 0.1, None, "gelu", True, False, False),
    "gpt2_small": (24, 1024, 4096, 16, 0.1, 0.1, None, "gelu", True, False, False),
    "gpt2_medium": (36, 1280, 5120, 20, 0.1, 0.1, None, "gelu", True, False, False),
    "gpt2_big": (48, 1600, 6400, 25, 0.1, 0.1, None, "gelu", True, False, False),
    "gpt3_small": (12, 768, 3072, 12, 0.0, 0.0, None, "gelu", True, True, True),
    "gpt3_medium": (24, 1024, 4096, 16, 0.0, 0.0, None, "gelu", True, True, True),
    "gpt3_large": (24, 1536, 6144, 16, 0.0, 0.0, None, "gelu", True, True, True),
    "gpt3_xl": (24, 2048, 8192, 32, 0.0, 0.0, None, "gelu", True, True, True),
    "gpt3_2_7": (32, 2560, 10240, 32, 0.0, 0.0, None, "gelu", True, True, True),
    "gpt3_6_7": (32, 4096, 16384, 32, 0.0, 0.0, None, "gelu", True, True, True),
    "gpt3_13": (40, 5120, 20480, 40, 0.0, 0.0, None, "gelu", True, True, True),
    "gpt3_175": (96, 12288, 49152, 96, 0.0, 0.0, None, "gelu", True, True, True),
}


def count_by_hand(args, vocab_size, positions):
    """Adds up the parameters of a model without adaptive layers."""
    width, inner = args.decoder_embed_dim, args.decoder_ffn_embed_dim
    attention = 4 * (width * width + width)
    feed_forward = width * inner + inner + inner * width + width
    layer = attention + feed_forward + 2 * 2 * width
    total = args.decoder_layers * layer + vocab_size * width
    total += 0 if args.share_decoder_input_output_embed else vocab_size * width
    total += 0 if args.no_decoder_final_norm else 2 * width
    return total + ((positions + 2) * width if args.decoder_learned_pos else 0)


def meta_model(args, vocab_size):
    with torch.device("meta"):
        return build_model(args, Task(vocab_size))


def test_every_arch_is_tested():
    language_models = {name for name in ARCHITECTURES if name.startswith("transformer_lm")}
    assert {f"transformer_lm_{name}" for name in ROWS} | {"transformer_lm"} == language_models


@pytest.mark.parametrize("name", list(ROWS))
def test_settings(name):
    args = settings(f"transformer_lm_{name}")
    width = ROWS[name][1]
    assert ROWS[name] == (
        args.decoder_layers,
        args.decoder_embed_dim,
        args.decoder_ffn_embed_dim,
        args.decoder_attention_heads,
        args.dropout,
        args.attention_dropout,
        getattr(args, "activation_dropout", None),
        args.activation_fn,
        not args.no_decoder_final_norm,
        args.decoder_learned_pos,
        args.share_decoder_input_output_embed,
    )
    assert args.decoder_normalize_before
    assert args.decoder_input_dim == args.decoder_output_dim == width
    is_adaptive = "wiki103" in name
    cutoffs = "20000,60000" if is_adaptive else None
    assert args.adaptive_input_cutoff == args.adaptive_softmax_cutoff == cutoffs
    ties = (args.adaptive_input, args.tie_adaptive_weights, args.tie_adaptive_proj)
    assert ties == (is_adaptive,) * 3
    assert args.adaptive_softmax_dropout == (0.2 if is_adaptive else 0.0)
    assert args.adaptive_softmax_factor == args.adaptive_input_factor == 4.0


def test_plain_arch_sets_nothing():
    args = settings("transformer_lm", decoder_embed_dim=48)
    assert vars(args) == {"arch": "transformer_lm", "decoder_embed_dim": 48}


def test_the_command_line_wins():
    args = settings("transformer_lm_wiki103", decoder_embed_dim=64, dropout=0.0, decoder_layers=2)
    assert (args.decoder_embed_dim, args.dropout, args.decoder_layers) == (64, 0.0, 2)
    assert args.decoder_input_dim == args.decoder_output_dim == 64
    assert args.decoder_ffn_embed_dim == 4096


def test_what_the_command_line_cannot_change():
    args = settings("transformer_lm_gpt3_small", decoder_embed_dim=96, decoder_input_dim=32)
    assert args.decoder_input_dim == args.decoder_output_dim == 96
    assert args.decoder_ffn_embed_dim == 384
    assert settings("transformer_lm_gpt", decoder_normalize_before=False).decoder_normalize_before


def test_offloading_means_checkpointing():
    assert settings("transformer_lm_gpt", offload_activations=True).checkpoint_activations


@pytest.mark.parametrize("arch", ["wiki103", "baevski_wiki103"])
def test_parameters_of_the_published_model(arch):
    args = settings(f"transformer_lm_{arch}", tokens_per_sample=512)
    model = meta_model(args, 267744)
    assert sum(parameter.numel() for parameter in model.parameters()) == 246_933_504


def test_published_shapes():
    args = settings("transformer_lm_wiki103", tokens_per_sample=512)
    state = meta_model(args, 267744).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items() if "layers" not in name}
    assert shapes == {
        "decoder.version": (1,),
        "decoder.embed_tokens._float_tensor": (1,),
        "decoder.embed_tokens.embeddings.0.0.weight": (20000, 1024),
        "decoder.embed_tokens.embeddings.0.1.weight": (1024, 1024),
        "decoder.embed_tokens.embeddings.1.0.weight": (40000, 256),
        "decoder.embed_tokens.embeddings.1.1.weight": (1024, 256),
        "decoder.embed_tokens.embeddings.2.0.weight": (207744, 64),
        "decoder.embed_tokens.embeddings.2.1.weight": (1024, 64),
        "decoder.embed_positions._float_tensor": (1,),
        "decoder.adaptive_softmax.version": (1,),
        "decoder.adaptive_softmax.head._float_tensor": (1,),
        "decoder.adaptive_softmax.head.word_proj.weight": (20000, 1024),
        "decoder.adaptive_softmax.head.class_proj.weight": (2, 1024),
        "decoder.adaptive_softmax.tail.0.0.weight": (1024, 256),
        "decoder.adaptive_softmax.tail.0.2.weight": (40000, 256),
        "decoder.adaptive_softmax.tail.1.0.weight": (1024, 64),
        "decoder.adaptive_softmax.tail.1.2.weight": (207744, 64),
    }


@pytest.mark.parametrize("name", [name for name in ROWS if "wiki103" not in name])
def test_parameter_counts(name):
    args = settings(f"transformer_lm_{name}", max_target_positions=1024)
    # Several layers more change the count by so many layers more; building two is quick.
    args.decoder_layers = min(args.decoder_layers, 2)
    model = meta_model(args, 5000)
    found = sum(parameter.numel() for parameter in model.parameters())
    assert found == count_by_hand(args, 5000, 1024)


def test_plain_arch_is_post_norm_with_fixed_widths_of_input_and_output():
    args = settings("transformer_lm", decoder_embed_dim=48, tokens_per_sample=16)
    state = meta_model(args, 100).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items() if "layers" not in name}
    assert shapes == {
        "decoder.version": (1,),
        "decoder.embed_tokens.weight": (100, 512),
        "decoder.project_in_dim.weight": (48, 512),
        "decoder.embed_positions._float_tensor": (1,),
        "decoder.project_out_dim.weight": (512, 48),
        "decoder.output_projection.weight": (100, 512),
    }
    assert sum(name.startswith("decoder.layers.5.") for name in state) == 16


@pytest.mark.parametrize("name", ["wiki103_tiny", "gpt_tiny"])
def test_settings_are_those_of_a_checkpoint(name):
    stored = torch.load(CHECKPOINTS / name / "checkpoint_last.pt", weights_only=True)
    fields = dataclasses.fields(TransformerLanguageModelConfig)
    kept = [field.name for field in fields if not field.metadata.get("extension")]
    added = [field.name for field in fields if field.metadata.get("extension")]
    assert kept == list(stored["cfg"]["model"])
    positions = [field.name for field in dataclasses.fields(PositionConfig)]
    assert ["_name", *added] == [*positions, "attention_backend", "document_mask"]


def test_defaults():
    cfg = TransformerLanguageModelConfig()
    assert (cfg.decoder_embed_dim, cfg.decoder_layers, cfg.decoder_attention_heads) == (512, 6, 8)
    assert (cfg.position_method, cfg.attention_backend) == ("alibi", "auto")
    assert not cfg.decoder_normalize_before


@pytest.mark.parametrize("name", ["transformer_lm_megatron", "transformer_lm_megatron_11b"])
def test_archs_of_other_packages(name):
    with pytest.raises(ValueError, match="not supported: it needs the Megatron"):
        ARCHITECTURES.find(name)


def test_listing_presets_loads_no_torch():
    code = (
        "import sys, fairseq.registry as r; sorted(r.ARCHITECTURES); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_old_namespace_lacks_newer_settings():
    args = argparse.Namespace(
        arch="transformer_lm",
        tokens_per_sample=16,
        decoder_layers=1,
        decoder_embed_dim=32,
        decoder_input_dim=32,
        decoder_output_dim=32,
        decoder_ffn_embed_dim=64,
        decoder_attention_heads=2,
    )
    model = build_model(args, Task(50))
    assert model(torch.tensor([[2, 3, 4]]))[0].shape == (1, 3, 50)
    assert model.max_positions() == args.max_target_positions == 16
