"""Blocks of queries that meet the keys up to their own end: places, dropout, gradients."""

from __future__ import annotations

import math

import pytest
import torch

from fairseq.attention import BIDIRECTIONAL, LinearBias, attend, get_backend
from fairseq.attention.backends import triangular
from fairseq.attention.backends.triangular import TriangularBackend

SLOPES = [0.5, 2**-5]


def prepared_for(queries, keys, bias=None, dtype=torch.float64, **options):
    return TriangularBackend().prepare(
        LinearBias(SLOPES) if bias is None else bias,
        queries,
        keys,
        dtype=dtype,
        device=torch.device("cpu"),
        **options,
    )


def tensors(num_queries, num_keys, width=4):
    generator = torch.Generator().manual_seed(num_queries)
    shapes = [(2, length, 2, width) for length in (num_queries, num_keys, num_keys)]
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).transpose(1, 2)
        for shape in shapes
    ]


def exact_weights(q, k, queries, keys, slopes=SLOPES):
    distance = torch.tensor(queries)[:, None] - torch.tensor(keys)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.size(-1))
    scores = scores - torch.tensor(slopes, dtype=q.dtype)[:, None, None] * distance.abs()
    return scores.masked_fill(distance < 0, -torch.inf).softmax(-1)


@pytest.mark.parametrize(
    ("queries", "keys"),
    [
        (range(1), range(1)),
        (range(64), range(64)),
        (range(65), range(65)),
        (range(200), range(200)),
        (range(70, 200), range(200)),
        (range(10, 150), range(300)),
        (range(5, 140), range(5, 200)),
    ],
)
def test_blocks_of_queries_see_what_the_formula_sees(queries, keys):
    q, k, v = tensors(len(queries), len(keys))
    found = attend(q, k, v, prepared_for(queries, keys))
    expected = exact_weights(q, k, list(queries), list(keys)) @ v
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("queries", "keys", "scores"),
    [
        (range(256), range(256), 64 * (64 + 128 + 192 + 256)),
        (range(100), range(100), 50 * (50 + 100)),
        (range(128, 256), range(256), 64 * (192 + 256)),
    ],
)
def test_no_score_is_formed_after_the_end_of_a_block(queries, keys, scores):
    call = triangular._Call(queries.start - keys.start, 1.0, 0.0, 0, may_need_gradients=True)
    blocks = list(call.blocks(len(queries), len(keys)))
    assert sum((part.stop - part.start) * num_keys for part, num_keys in blocks) == scores
    assert [part.start for part, _ in blocks[1:]] == [part.stop for part, _ in blocks[:-1]]


def test_queries_that_see_keys_after_them_meet_all_keys():
    q, k, v = tensors(150, 150)
    prepared = prepared_for(range(150), range(150), rule=BIDIRECTIONAL)
    assert prepared.causal_shift is None
    other = get_backend("reference")
    expected = other.prepare(
        LinearBias(SLOPES),
        range(150),
        range(150),
        rule=BIDIRECTIONAL,
        dtype=torch.float64,
        device=q.device,
    )
    # Whose softmax is in float32.
    torch.testing.assert_close(
        attend(q, k, v, prepared), attend(q, k, v, expected), rtol=0, atol=2e-6
    )


def dropped_weights(q, k, rate, seed):
    """The weights as they are used: with values of the unit matrix they are the output."""
    torch.manual_seed(seed)
    length = q.size(2)
    v = torch.eye(length, dtype=q.dtype).expand(2, 2, length, length)
    return attend(q, k, v, prepared_for(range(length), range(length)), dropout_p=rate)


def test_dropout_leaves_out_its_share_in_every_block_and_scales_the_rest():
    q, k, _ = tensors(256, 256)
    rate = 0.25
    weights = exact_weights(q, k, range(256), range(256))
    used = dropped_weights(q, k, rate, seed=1)
    is_kept = used > 0
    torch.testing.assert_close(used[is_kept], weights[is_kept] / (1 - rate), rtol=0, atol=1e-12)
    for start in range(0, 256, 64):
        rows = slice(start, start + 64)
        visible = weights[:, :, rows] > 0
        share = is_kept[:, :, rows][visible].double().mean()
        assert abs(float(share) - (1 - rate)) < 5 * math.sqrt(0.19 / int(visible.sum()))
    assert torch.equal(used, dropped_weights(q, k, rate, seed=1))
    assert not torch.equal(used, dropped_weights(q, k, rate, seed=2))


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_gradients_are_those_of_the_forward_pass(monkeypatch, rate):
    """Of a bias too; with the same weights dropped in each call."""
    monkeypatch.setattr(triangular, "_BLOCK", 3)
    backend = TriangularBackend()
    prepared = prepared_for(range(7), range(7))
    mask = prepared.mask.clone().requires_grad_()

    def compute(q, k, v, mask):
        torch.manual_seed(5)
        prepared.mask = mask
        return backend.attend(q, k, v, prepared, dropout_p=rate)

    given = [x.detach().requires_grad_() for x in tensors(7, 7, width=2)]
    assert torch.autograd.gradcheck(lambda q, k, v: compute(q, k, v, mask.detach()), given)
    visible = torch.isfinite(mask.detach())

    def of_bias(terms):
        return compute(*(x.detach() for x in given), mask.detach().masked_scatter(visible, terms))

    terms = mask.detach()[visible].requires_grad_()
    assert torch.autograd.gradcheck(of_bias, (terms,))


def test_nothing_is_kept_where_no_gradients_are_wanted():
    q, k, v = (x.requires_grad_() for x in tensors(100, 100))
    prepared = prepared_for(range(100), range(100))
    with torch.no_grad():
        assert attend(q, k, v, prepared).grad_fn is None
    assert len(attend(q, k, v, prepared).grad_fn.saved_tensors) == 4 + 2 * 2
