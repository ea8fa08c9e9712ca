"""Losses of a small model whose weights follow a formula, as the original computed them."""

import argparse

import pytest
import torch

from fairseq.criterions.adaptive_loss import AdaptiveLoss
from fairseq.criterions.cross_entropy import CrossEntropyCriterion
from fairseq.dataclass.arguments import fill_dataclass
from fairseq.models.transformer_lm import TransformerLanguageModel
from fairseq.registry import ARCHITECTURES, MODELS

PAD = 1


class Dictionary:
    def __len__(self):
        return 100

    def pad(self):
        return PAD

    def eos(self):
        return 2


class Task:
    dictionary = source_dictionary = target_dictionary = output_dictionary = Dictionary()


SETTINGS = {
    "decoder_layers": 2,
    "decoder_embed_dim": 32,
    "decoder_ffn_embed_dim": 64,
    "decoder_attention_heads": 4,
    "adaptive_input_cutoff": "20,60",
    "adaptive_softmax_cutoff": "20,60",
    "adaptive_input_factor": 2,
    "adaptive_softmax_factor": 2,
    "tokens_per_sample": 16,
    "max_target_positions": 16,
    "max_tokens": 64,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "adaptive_softmax_dropout": 0.0,
}


@pytest.fixture(scope="module")
def model():
    args = argparse.Namespace(**SETTINGS)
    ARCHITECTURES.preset_of("transformer_lm_wiki103")(args)
    cfg = fill_dataclass(MODELS.dataclass_of("transformer_lm"), args, name="transformer_lm_wiki103")
    model = TransformerLanguageModel.build_model(cfg, Task()).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            k = torch.arange(parameter.numel(), dtype=torch.float64)
            value = 0.05 * torch.sin(0.37 * k + len(name))
            if "layer_norm.weight" in name:
                value = 1 + 0.1 * torch.sin(k)
            parameter.copy_(value.view_as(parameter))
    return model


SOURCE = [[2, 5, 30, 70, 21, 61, 4, 99], [2, 7, 8, 9, 10, 11, 12, 13]]
TARGET = [[5, 30, 70, 21, 61, 4, 99, 2], [7, 8, 9, 10, 11, 12, 13, 2]]


def make_sample(num_pads=0):
    source, target = torch.tensor(SOURCE), torch.tensor(TARGET)
    if num_pads:
        source[1, -num_pads:] = target[1, -num_pads:] = PAD
    lengths = source.ne(PAD).sum(dim=1)
    return {
        "net_input": {"src_tokens": source, "src_lengths": lengths},
        "target": target,
        "ntokens": int(lengths.sum()),
        "nsentences": 2,
    }


@pytest.mark.parametrize(
    ("num_pads", "loss", "sample_size"), [(0, 60.404213, 16), (2, 54.286507, 14)]
)
def test_adaptive_loss(model, num_pads, loss, sample_size):
    found, size, _ = AdaptiveLoss(Task())(model, make_sample(num_pads))
    assert (found.item(), size) == (pytest.approx(loss, abs=2e-5), sample_size)


def test_cross_entropy_is_the_sum_over_all_words(model):
    found, size, _ = CrossEntropyCriterion(Task())(model, make_sample())
    assert (found.item(), size) == (pytest.approx(67.762100, abs=2e-5), 16)
