"""Calls that the models here hardly make, but that `prepare` allows: against softmax in float64."""

from functools import partial

import pytest
import torch
from naive_attention import ON_CPU, prepare_or_skip
from torch.utils.checkpoint import checkpoint

from fairseq.attention import (
    BIDIRECTIONAL,
    CAUSAL,
    AttentionBias,
    LinearBias,
    ZeroBias,
    attend,
    get_backend,
)
from fairseq.positions import METHODS, Surroundings
from fairseq.positions.distance_bias import DistanceBias

ROWS, HEADS, WIDTH = 2, 2, 8


def qkv(length, dtype=torch.float32, *, requires_grad=False):
    torch.manual_seed(0)
    given = torch.randn(3, ROWS, HEADS, length, WIDTH).to(dtype)
    return [each.clone().requires_grad_(requires_grad) for each in given]


def softmax_attention(q, k, v, bias, is_seen, scale=WIDTH**-0.5):
    """Softmax written out in float64; a query that sees nothing gets zeros."""
    places = range(q.size(2))
    scores = q.double() @ k.double().transpose(-1, -2) * scale + bias.dense(places, places).double()
    weights = scores.masked_fill(~is_seen, -torch.inf).softmax(-1).nan_to_num(0.0)
    return weights @ v.double()


def attended(name, q, k, v, bias, *, rule=CAUSAL, scale=None, **told):
    prepared = prepare_or_skip(
        get_backend(name),
        bias,
        range(q.size(2)),
        range(k.size(2)),
        rule=rule,
        dtype=q.dtype,
        device=q.device,
        **told,
    )
    return attend(q, k, v, prepared, scale=scale)


def is_before(length):
    return torch.ones(length, length, dtype=torch.bool).tril()


def assert_close(found, expected, tolerance=2e-6):
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("rule", [CAUSAL, BIDIRECTIONAL], ids=["causal", "both ways"])
@pytest.mark.parametrize("length", [70, 520])
@pytest.mark.parametrize("backend", ON_CPU)
def test_a_bias_whose_numbers_do_not_lie_side_by_side(backend, length, rule):
    method = METHODS["t5"](Surroundings(num_heads=HEADS, padding_idx=1, head_dim=WIDTH))
    method.buckets.data.normal_(generator=torch.Generator().manual_seed(1))
    q, k, v = qkv(length, requires_grad=True)
    bias = method.bias(length)
    out = attended(backend, q, k, v, bias, rule=rule)
    is_seen = is_before(length) if rule is CAUSAL else torch.ones(length, length).bool()
    expected = softmax_attention(q, k, v, bias, is_seen)
    assert_close(out, expected)
    given = (q, k, v, method.buckets)
    grads = torch.autograd.grad(out.square().sum(), given)
    for grad, of_expected in zip(
        grads, torch.autograd.grad(expected.square().sum(), given), strict=True
    ):
        assert_close(grad, of_expected, 1e-5 * (1 + float(of_expected.abs().max())))


@pytest.mark.parametrize(
    "numbers",
    [(2**24, 2**24 + 1), (-3, -2), (2**40, -(2**40)), (7, 7)],
    ids=["too close for float32", "that of padding", "huge", "one"],
)
@pytest.mark.parametrize("is_padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("backend", ON_CPU)
def test_documents_may_have_any_numbers(backend, numbers, is_padded):
    length = 520
    q, k, v = qkv(length)
    documents = torch.tensor(numbers).repeat_interleave(length // 2)
    is_padding = torch.zeros(ROWS, length, dtype=torch.bool)
    is_padding[:, :50] = is_padded
    out = attended(
        backend,
        *(q, k, v, LinearBias([0.01, 0.001])),
        query_documents=documents,
        key_documents=documents,
        key_is_padding=is_padding if is_padded else None,
    )
    is_seen = is_before(length) & (documents.unsqueeze(1) == documents)
    is_seen = is_seen & ~is_padding[:, None, None]
    expected = softmax_attention(q, k, v, LinearBias([0.01, 0.001]), is_seen)
    assert_close(out[:, :, 50:], expected[:, :, 50:])


@pytest.mark.parametrize("size", [1.0, 12.0], ids=["small scores", "large scores"])
@pytest.mark.parametrize("backend", ON_CPU)
def test_queries_of_a_document_that_their_own_keys_do_not_belong_to(backend, size):
    length = 600
    q, k, v = qkv(length)
    q = q * size
    of_keys = (torch.arange(length) >= 300).long()
    of_queries = torch.zeros(length, dtype=torch.long)
    bias = LinearBias([0.5, 0.1])
    told = {"query_documents": of_queries, "key_documents": of_keys}
    out = attended(backend, q, k, v, bias, **told)
    is_seen = is_before(length) & (of_keys == 0)
    assert_close(out, softmax_attention(q, k, v, bias, is_seen), 3e-5)


@pytest.mark.parametrize("backend", [name for name in ON_CPU if name != "reference"])
def test_products_that_float16_cannot_hold(backend):
    # The square is above 65,504. `reference` has scores in float16, in which 30,000 has 29,984
    # and 30,016 for neighbours.
    q, _, v = qkv(520)
    q[..., 0] += 300
    q, v = q.half(), v.half()
    out = attended(backend, q, q, v, LinearBias([0.1, 0.01]))
    expected = softmax_attention(q, q, v, LinearBias([0.1, 0.01]), is_before(520))
    assert_close(out, expected, 8e-3)


@pytest.mark.parametrize(
    "slopes", [None, [0.5, 0.125], [-0.3, 0.0]], ids=["none", "falling", "rising"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("scale", [-0.3, 0.0, 0.3])
@pytest.mark.parametrize("backend", ON_CPU)
def test_any_scale_and_slope(backend, scale, dtype, slopes):
    bias = ZeroBias(HEADS) if slopes is None else LinearBias(slopes)
    q, k, v = qkv(60, dtype)
    out = attended(backend, q, k, v, bias, scale=scale)
    expected = softmax_attention(q, k, v, bias, is_before(60), scale)
    assert_close(out, expected, 2e-6 if dtype is torch.float32 else 0.12)


def test_columns_beside_float16_queries_stay_finite():
    q, k, v = qkv(60, torch.float16)
    bias = LinearBias([40.0, 8.0])
    out = attended("augmented", q, k, v, bias, scale=0.05)
    assert_close(out, softmax_attention(q, k, v, bias, is_before(60), 0.05), 2e-3)


class OfKeys(AttentionBias):
    """A number for each key, the same for all queries."""

    num_heads = HEADS

    def dense(self, query_positions, key_positions, *, device=None):
        return torch.linspace(0, 3, HEADS * len(key_positions)).view(HEADS, 1, -1)

    def heads(self, which):
        raise NotImplementedError


@pytest.mark.parametrize("backend", ON_CPU)
def test_a_bias_that_is_the_same_for_all_queries(backend):
    q, k, v = qkv(150)
    out = attended(backend, q, k, v, OfKeys(), rule=BIDIRECTIONAL)
    is_seen = torch.ones(150, 150, dtype=torch.bool)
    assert_close(out, softmax_attention(q, k, v, OfKeys(), is_seen))


@pytest.mark.parametrize("backend", ["windowed", "auto"])
def test_a_learned_bias_where_layers_are_computed_again_and_scores_are_too_large(backend):
    """Tiles cannot do it; the dense mask is made in the layer, and again with it."""
    length = 400
    q, k, v = qkv(length, requires_grad=True)
    numbers = torch.tensor([0.1, 0.2], requires_grad=True)
    bias = DistanceBias(lambda d, m: -m * d, numbers.view(-1, 1, 1), is_learned=True)
    grads = []
    for is_computed_again in (False, True):
        prepared = get_backend(backend).prepare(
            bias, range(length), range(length), dtype=q.dtype, device=q.device
        )
        out = q
        for _ in range(2):
            layer = partial(attend, 30 * out, prepared=prepared)
            if is_computed_again:
                out = checkpoint(layer, k, v, use_reentrant=False)
            else:
                out = layer(k, v)
        grads.append(torch.autograd.grad(out.square().sum(), (q, k, v, numbers), retain_graph=True))
    for expected, found in zip(*grads, strict=True):
        assert expected.abs().max() > 0
        assert torch.equal(found, expected)
