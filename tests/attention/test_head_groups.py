"""How heads are put together: all of them once, in order, each looking as far as it must."""

from __future__ import annotations

import pytest

from fairseq.attention.head_groups import group_heads

FALLING = [47, 96, 201, 417, 726, 1464, 2932, 6000]
INTERLEAVED = [200, 900, 3000, 60, 100, 500]


@pytest.mark.parametrize("length", [1, 100, 512, 2048, 16384])
@pytest.mark.parametrize("back", [FALLING, INTERLEAVED], ids=["falling", "interleaved"])
@pytest.mark.parametrize("is_causal", [True, False])
def test_every_head_is_in_one_group_that_looks_far_enough(length, back, is_causal):
    ahead = [0] * len(back) if is_causal else back[::-1]
    groups = group_heads(back, ahead, length, length)
    heads = [head for group in groups for head in range(len(back))[group.heads]]
    assert heads == list(range(len(back)))
    for group in groups:
        assert group.back == max(back[group.heads]) and group.ahead == max(ahead[group.heads])
        assert group.block in (64, 128, 256)


def test_heads_are_parted_where_that_leaves_out_more_than_a_call_costs():
    assert len(group_heads([64, 4096], [0, 0], 4096, 4096)) == 2
    assert len(group_heads([64, 64], [0, 0], 4096, 4096)) == 1


def test_few_queries_are_computed_at_once():
    (group,) = group_heads(FALLING, [0] * 8, 1, 256)
    assert group.heads == slice(0, 8)
