"""Policies as data."""

import pytest
import torch
from torch import nn

from fairseq.attention.head_share import HeadShare
from fairseq.model_parallel.head_state import own_heads
from fairseq.model_parallel.policies import find_policy, known_policies, register_policy
from fairseq.model_parallel.policy import HeadState, Layer, Policy, check_heads
from fairseq.model_parallel.shards import process_major_order


def test_the_families_there_are():
    families = [
        "BertLayer",
        "BloomBlock",
        "GPT2Block",
        "LlamaDecoderLayer",
        "MptBlock",
        "OPTDecoderLayer",
        "RobertaLayer",
        "TransformerDecoderLayer",
    ]
    assert set(families) <= set(known_policies())


def test_a_layer_names_a_weight_of_one_module():
    assert Layer(weight="experts[1].fc.weight", bias="experts[1].fc.bias").module == "experts.1.fc"
    with pytest.raises(ValueError, match="must name a weight"):
        Layer(weight="")
    with pytest.raises(ValueError, match="layout is 'rows'; it must be one of parts, heads"):
        Layer(weight="a.weight", layout="rows")
    with pytest.raises(ValueError, match="not those of one module"):
        Layer(weight="a.weight", bias="b.bias")
    with pytest.raises(ValueError, match="n_fused is 0"):
        Layer(weight="a.weight", n_fused=0)
    with pytest.raises(ValueError, match="either an argument of the layer or a buffer"):
        HeadState()


@pytest.mark.parametrize(
    ("heads", "size", "possible"), [((12,), 5, "1, 2, 3, 4, 6, 12"), ((32, 8), 16, "1, 2, 4, 8")]
)
def test_heads_that_do_not_divide_name_the_sizes_that_would(heads, size, possible):
    named = {f"heads {i}": count for i, count in enumerate(heads)}
    with pytest.raises(
        ValueError, match=rf"shared by {size} processes .*divide them are {possible}$"
    ):
        check_heads(named, size)


def test_rows_of_fused_parts_by_process():
    # 2 parts of 4 rows on 2 processes: the first two rows of each part come first.
    assert process_major_order(8, 2, 2).tolist() == [0, 1, 4, 5, 2, 3, 6, 7]


def test_state_of_heads_is_cut_from_that_of_all():
    share = HeadShare(slice(2, 4), lambda tensor: tensor)
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])
    assert own_heads(slopes, 0, 4, share).tolist() == [0.125, 0.0625]
    rows = torch.arange(12).view(12, 1, 1)  # 3 rows of 4 heads
    assert own_heads(rows, 0, 4, share).flatten().tolist() == [2, 3, 6, 7, 10, 11]
    assert own_heads(torch.arange(8).view(2, 4), -1, 4, share).tolist() == [[2, 3], [6, 7]]
    with pytest.raises(ValueError, match=r"axis 0 of a tensor \(5,\) is no axis of 4 heads"):
        own_heads(torch.zeros(5), 0, 4, share)


def test_a_registered_policy_is_found_for_subclasses():
    class Own(nn.Module):
        pass

    class Special(Own):
        pass

    @register_policy
    class OwnLayers(Policy):
        @staticmethod
        def original_layer_class():
            return Own

    assert find_policy(nn.Sequential(Special())) is OwnLayers


def test_a_class_of_the_same_name_elsewhere_has_no_policy():
    with pytest.raises(ValueError, match="there is no policy for TransformerDecoderLayer"):
        find_policy(nn.TransformerDecoderLayer(8, 2))
