"""Formulas that others use too: ours against those inside Hugging Face transformers."""

import math

import pytest
import torch

from fairseq.positions import alibi_slopes
from fairseq.positions.rotary import frequencies
from fairseq.positions.t5 import bucket_starts

pytest.importorskip("transformers", "5.0")


@pytest.mark.parametrize("num_heads", [1, 6, 8, 12, 16, 20])
def test_slopes_are_those_of_bloom(num_heads):
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    # Bloom adds slope times key position; its second key has position 1.
    theirs = build_alibi_tensor(torch.ones(1, 2), num_heads, torch.float32)[:, 0, 1]
    torch.testing.assert_close(torch.tensor(alibi_slopes(num_heads)), theirs)


def test_buckets_are_those_of_t5():
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = torch.arange(1000)
    theirs = T5Attention._relative_position_bucket(
        -distance, bidirectional=False, num_buckets=32, max_distance=128
    )
    ours = torch.bucketize(distance, torch.tensor(bucket_starts()), right=True) - 1
    assert torch.equal(ours, theirs)


def rope(kind, factor, head_dim=64, train_length=512):
    """Returns their frequencies and what they multiply both cosines and sines by."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(
        hidden_size=head_dim,
        num_attention_heads=1,
        max_position_embeddings=train_length,
        rope_parameters={
            "rope_type": kind,
            "factor": factor,
            "rope_theta": 10000.0,
            "original_max_position_embeddings": train_length,
        },
    )
    seq_len = int(factor * train_length)
    return ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=seq_len)


def test_linear_scaling_of_rotary():
    theirs, strength = rope("linear", 4.0)
    assert strength == 1
    torch.testing.assert_close(torch.tensor(frequencies(64, kind="linear", factor=4.0)), theirs)


def test_yarn_keeps_and_divides_the_same_ends():
    theirs, strength = rope("yarn", 4.0)
    assert strength == pytest.approx(0.1 * math.log(4) + 1)  # queries and keys, each
    plain, _ = rope("linear", 1.0)
    ours = torch.tensor(frequencies(64, kind="yarn", factor=4.0, train_length=512))
    # The paper's ramp is linear in how often a wavelength fits, theirs in the channel's number,
    # rounded outwards: where both keep a frequency, or both divide it, they agree.
    kept, divided = ours == plain, ours <= plain / 4 * 1.0001
    assert kept.sum() >= 4 and divided.sum() >= 15
    torch.testing.assert_close(theirs[kept][:-1], ours[kept][:-1])
    torch.testing.assert_close(theirs[divided][1:], ours[divided][1:])
    between = ~kept & ~divided
    assert ((theirs[between] <= plain[between]) & (theirs[between] >= plain[between] / 4)).all()
