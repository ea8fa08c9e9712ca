"""The relative position bias of T5."""

import math

import torch
from formulas import check_bias, make

from fairseq.positions.t5 import bucket_starts


def bucket(distance):
    if distance < 16:
        return distance
    return min(31, 16 + math.floor(math.log(distance / 16) / math.log(128 / 16) * 16))


def test_formula():
    places = ((range(3, 12), range(12)), (range(200, 202), range(0, 202)))
    check_bias(make("t5"), lambda w, h, i, j: w["buckets"][h, bucket(abs(i - j))], places=places)


def test_buckets():
    starts = bucket_starts()
    for distance in range(400):
        assert sum(start <= distance for start in starts) - 1 == bucket(distance)


def test_far_keys_share_a_bucket():
    bias = make("t5").bias().dense(range(9000, 9001), range(9001))
    assert torch.unique(bias[:, 0, : 9001 - 128], dim=1).shape == (4, 1)
