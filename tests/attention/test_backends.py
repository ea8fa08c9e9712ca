"""Every backend against a loop in float64, over who may see whom and what is added."""

from __future__ import annotations

import copy

import pytest
import torch
from naive_attention import DENSE, ON_CPU, naive_attention, prepare_or_skip

from fairseq.attention import (
    BIDIRECTIONAL,
    CAUSAL,
    AttentionBias,
    LinearBias,
    MaskRule,
    ZeroBias,
    attend,
    get_backend,
)
from fairseq.attention.bias import position_tensor

CPU = torch.device("cpu")
SLOPES = [0.5, 0.0625, 0.3, 0.01]
ROWS, HEADS, WIDTH = 2, 4, 8
RULES = {
    "causal": CAUSAL,
    "bidirectional": BIDIRECTIONAL,
    "window": MaskRule(window=3),
    "both ways in a window": MaskRule(is_causal=False, window=3),
}
TOLERANCE = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def sees(rule, distance):
    """Tells, by the words of `MaskRule`, whether a key `distance` positions back is seen."""
    if rule.is_causal and distance < 0:
        return False
    return rule.window is None or abs(distance) < rule.window


def random_qkv(num_queries, num_keys, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(ROWS, HEADS, num_queries, WIDTH, generator=generator)
    k, v = torch.randn(2, ROWS, HEADS, num_keys, WIDTH, generator=generator)
    return q.to(dtype), k.to(dtype), v.to(dtype)


@pytest.fixture(params=ON_CPU)
def backend(request):
    return get_backend(request.param)


@pytest.fixture(params=DENSE)
def dense_backend(request):
    return get_backend(request.param)


class Summed(AttentionBias):
    """Several biases at once."""

    is_relative = True

    def __init__(self, *parts):
        self.parts = parts
        self.num_heads = parts[0].num_heads

    def dense(self, query_positions, key_positions, *, device=None):
        return sum(part.dense(query_positions, key_positions, device=device) for part in self.parts)

    def heads(self, which):
        return Summed(*(part.heads(which) for part in self.parts))


class PerDistance(AttentionBias):
    """A trained number for each head and distance."""

    is_learned = True
    is_relative = True

    def __init__(self, table):
        self.table = table  # (H, distances)
        self.num_heads = len(table)

    def dense(self, query_positions, key_positions, *, device=None):
        query = position_tensor(query_positions, device).long()
        key = position_tensor(key_positions, device).long()
        return self.table[:, (query[:, None] - key).abs()]

    def heads(self, which):
        return PerDistance(self.table[which])


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("name", list(RULES))
@pytest.mark.parametrize("has_bias", [True, False])
def test_rules(backend, dtype, name, has_bias):
    rule = RULES[name]
    bias = LinearBias(SLOPES) if has_bias else ZeroBias(HEADS)
    q, k, v = random_qkv(7, 7, dtype)
    prepared = prepare_or_skip(
        backend, bias, range(7), range(7), rule=rule, dtype=dtype, device=CPU
    )
    expected = naive_attention(
        q,
        k,
        v,
        lambda b, h, i, j: -SLOPES[h] * abs(i - j) * has_bias,
        lambda b, i, j: sees(rule, i - j),
    )
    found = attend(q, k, v, prepared)
    assert found.dtype == dtype
    assert (found.double() - expected).abs().max() < TOLERANCE[dtype]


@pytest.mark.parametrize("name", list(RULES))
def test_padding_left_and_right_and_whole_rows(backend, name):
    rule = RULES[name]
    is_padding = torch.zeros(ROWS, 7, dtype=torch.bool)
    is_padding[0, :2] = is_padding[0, 6:] = True
    is_padding[1] = True
    q, k, v = random_qkv(7, 7)
    for tensor in (q, k, v):
        tensor.requires_grad_()
    prepared = prepare_or_skip(
        backend,
        LinearBias(SLOPES),
        range(7),
        range(7),
        rule=rule,
        key_is_padding=is_padding,
        dtype=torch.float32,
        device=CPU,
    )
    expected = naive_attention(
        q.detach(),
        k.detach(),
        v.detach(),
        lambda b, h, i, j: -SLOPES[h] * abs(i - j),
        lambda b, i, j: sees(rule, i - j) and not is_padding[b, j],
    )
    found = attend(q, k, v, prepared)
    assert (found.double() - expected).abs().max() < 2e-6
    assert not found[1].any()
    found.square().sum().backward()
    assert all(torch.isfinite(tensor.grad).all() for tensor in (q, k, v))
    assert not k.grad[1].any() and k.grad[0].any()


def test_documents_packed_into_a_row(backend):
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 2, 2, 2]])
    is_padding = torch.zeros(ROWS, 7, dtype=torch.bool)
    is_padding[1, 6] = True
    q, k, v = random_qkv(7, 7)
    prepared = prepare_or_skip(
        backend,
        LinearBias(SLOPES),
        range(7),
        range(7),
        key_is_padding=is_padding,
        query_documents=documents,
        key_documents=documents,
        dtype=torch.float32,
        device=CPU,
    )
    expected = naive_attention(
        q,
        k,
        v,
        lambda b, h, i, j: -SLOPES[h] * (i - j),
        lambda b, i, j: j <= i and documents[b, i] == documents[b, j] and not is_padding[b, j],
    )
    found = attend(q, k, v, prepared)
    assert (found.double() - expected).abs().max() < 2e-6
    # Each document is computed as if it were alone.
    alone = prepare_or_skip(
        backend, LinearBias(SLOPES), range(4), range(4), dtype=torch.float32, device=CPU
    )
    part = attend(q[:1, :, 3:], k[:1, :, 3:], v[:1, :, 3:], alone)
    torch.testing.assert_close(found[:1, :, 3:], part, atol=2e-6, rtol=0)


def test_documents_shared_by_all_rows(backend):
    documents = torch.tensor([4, 4, 9, 9, 9])
    q, k, v = random_qkv(2, 5)
    prepared = prepare_or_skip(
        backend,
        ZeroBias(HEADS),
        range(3, 5),
        range(5),
        query_documents=documents[3:],
        key_documents=documents,
        dtype=torch.float32,
        device=CPU,
    )
    expected = naive_attention(
        q, k, v, lambda *_: 0.0, lambda b, i, j: j <= i + 3 and documents[i + 3] == documents[j]
    )
    assert (attend(q, k, v, prepared).double() - expected).abs().max() < 2e-6


@pytest.mark.parametrize("as_tensor", [True, False])
def test_some_queries_of_many_keys(backend, as_tensor):
    """As in incremental decoding, or on a worker that holds a part of the sequence."""
    queries, keys = range(4, 6), range(9)
    if as_tensor:
        queries, keys = torch.tensor([4, 5]), torch.arange(9)
    q, k, v = random_qkv(2, 9)
    prepared = prepare_or_skip(
        backend, LinearBias(SLOPES), queries, keys, dtype=torch.float32, device=CPU
    )
    expected = naive_attention(
        q,
        k,
        v,
        lambda b, h, i, j: -SLOPES[h] * (i + 4 - j),
        lambda b, i, j: j <= i + 4,
    )
    assert (attend(q, k, v, prepared).double() - expected).abs().max() < 2e-6


def test_positions_of_each_row(backend):
    positions = torch.tensor([[0, 1, 2, 3, 4], [0, 3, 4, 9, 9]])
    q, k, v = random_qkv(5, 5)
    prepared = prepare_or_skip(
        backend, LinearBias(SLOPES), positions, positions, dtype=torch.float32, device=CPU
    )
    expected = naive_attention(
        q,
        k,
        v,
        lambda b, h, i, j: -SLOPES[h] * abs(positions[b, i] - positions[b, j]),
        lambda b, i, j: positions[b, j] <= positions[b, i],
    )
    assert (attend(q, k, v, prepared).double() - expected).abs().max() < 2e-6


@pytest.mark.parametrize("queries", [range(6), range(5, 6)])
def test_some_of_the_heads(backend, queries):
    bias = LinearBias(SLOPES)
    kwargs = {"dtype": torch.float32, "device": CPU}
    q, k, v = random_qkv(len(queries), 6)
    whole = attend(q, k, v, prepare_or_skip(backend, bias, queries, range(6), **kwargs))
    for which in (slice(0, 1), slice(1, 4), slice(2, 4)):
        prepared = prepare_or_skip(backend, bias, queries, range(6), head_slice=which, **kwargs)
        part = attend(q[:, which], k[:, which], v[:, which], prepared)
        torch.testing.assert_close(part, whole[:, which], atol=1e-6, rtol=0)


def test_several_biases(backend):
    bias = Summed(LinearBias(SLOPES), LinearBias(SLOPES[::-1]))
    q, k, v = random_qkv(6, 6)
    prepared = prepare_or_skip(backend, bias, range(6), range(6), dtype=torch.float32, device=CPU)
    expected = naive_attention(
        q,
        k,
        v,
        lambda b, h, i, j: -(SLOPES[h] + SLOPES[3 - h]) * (i - j),
        lambda b, i, j: j <= i,
    )
    assert (attend(q, k, v, prepared).double() - expected).abs().max() < 2e-6


@pytest.mark.parametrize("queries", [range(6), range(2, 6)])
def test_learned_bias_gets_gradients_and_is_made_anew(backend, queries):
    generator = torch.Generator().manual_seed(3)
    table = torch.randn(HEADS, 6, generator=generator).requires_grad_()
    bias = PerDistance(table)
    q, k, v = random_qkv(len(queries), 6)

    def output():
        prepared = prepare_or_skip(
            backend, bias, queries, range(6), dtype=torch.float32, device=CPU
        )
        return attend(q, k, v, prepared)

    def expected(entry):
        return naive_attention(
            q, k, v, lambda b, h, i, j: entry[h, queries[i] - j], lambda b, i, j: j <= queries[i]
        )

    assert (output().double() - expected(table.detach())).abs().max() < 2e-6
    output().square().sum().backward()
    twin = table.detach().double().requires_grad_()
    scores = torch.einsum("bhik,bhjk->bhij", q.double(), k.double()) / WIDTH**0.5
    distance = torch.tensor(list(queries))[:, None] - torch.arange(6)
    scores = (scores + twin[:, distance.abs()]).masked_fill(distance < 0, -torch.inf)
    torch.softmax(scores, -1).matmul(v.double()).square().sum().backward()
    torch.testing.assert_close(table.grad.double(), twin.grad, atol=1e-5, rtol=1e-5)
    table.data += 1.0 * torch.arange(6)
    assert (output().double() - expected(table.detach())).abs().max() < 2e-6


def test_gradients(backend):
    tensors = [tensor.requires_grad_() for tensor in random_qkv(9, 9)]
    twins = [tensor.detach().double().requires_grad_() for tensor in tensors]
    prepared = prepare_or_skip(
        backend, LinearBias(SLOPES), range(9), range(9), dtype=torch.float32, device=CPU
    )
    attend(*tensors, prepared).square().sum().backward()
    q, k, v = twins
    scores = torch.einsum("bhik,bhjk->bhij", q, k) / WIDTH**0.5
    distance = torch.arange(9)[:, None] - torch.arange(9)
    scores = scores - torch.tensor(SLOPES).double()[:, None, None] * distance
    scores = scores.masked_fill(distance < 0, -torch.inf)
    torch.softmax(scores, -1).matmul(v).square().sum().backward()
    for found, expected in zip(tensors, twins, strict=True):
        torch.testing.assert_close(found.grad.double(), expected.grad, atol=1e-5, rtol=1e-5)


def test_scale(backend):
    q, k, v = random_qkv(5, 5)
    prepared = prepare_or_skip(
        backend, LinearBias(SLOPES), range(5), range(5), dtype=torch.float32, device=CPU
    )
    found = attend(q, k, v, prepared, scale=0.1)
    expected = naive_attention(
        0.1 * WIDTH**0.5 * q,
        k,
        v,
        lambda b, h, i, j: -SLOPES[h] * (i - j),
        lambda b, i, j: j <= i,
    )
    assert (found.double() - expected).abs().max() < 2e-6


def test_dropout_drops_weights_and_keeps_their_mean(backend):
    """With v the unit matrix the output is the weights themselves."""
    torch.manual_seed(0)
    length, rate = 64, 0.3
    q = torch.zeros(1, 1, length, length)
    v = torch.eye(length).expand(1, 1, length, length)
    prepared = prepare_or_skip(
        backend,
        ZeroBias(1),
        range(length),
        range(length),
        rule=BIDIRECTIONAL,
        dtype=q.dtype,
        device=CPU,
    )
    weights = attend(q, q, v, prepared, dropout_p=rate)
    kept = weights[weights > 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / length / (1 - rate)))
    assert abs(len(kept) / length**2 - (1 - rate)) < 0.03


@pytest.mark.parametrize("slope", [0.5, 2**-8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_at_3072_keys(dtype, slope):
    """The relative form keeps weights right where slope * key position does not."""
    length = 3072
    backend = get_backend("reference")
    prepared = backend.prepare(
        LinearBias([slope]), range(length - 1, length), range(length), dtype=dtype, device=CPU
    )
    q = torch.zeros(1, 1, 1, 8, dtype=dtype)
    k = torch.zeros(1, 1, length, 8, dtype=dtype)
    found = attend(q, k, torch.eye(length, dtype=dtype)[None, None], prepared).double()
    distance = torch.arange(length - 1, -1, -1, dtype=torch.float64)
    expected = torch.softmax(-slope * distance, 0)
    limit = 0.001 if dtype == torch.float16 else 0.004
    assert (found[0, 0, 0] - expected).abs().max() < limit
    absolute = (slope * torch.arange(length)).to(dtype).double()
    if slope == 0.5:
        assert (torch.softmax(absolute, 0) - expected).abs().max() > 0.05


def test_masks_are_kept_and_cut(dense_backend):
    bias = LinearBias(SLOPES)
    kwargs = {"dtype": torch.float32, "device": CPU}
    first = dense_backend.future_mask(bias, 8, **kwargs)
    again = dense_backend.prepare(bias, range(5), range(5), **kwargs).mask
    assert again.data_ptr() == first.data_ptr() and again.shape == (HEADS, 5, 5)
    longer = dense_backend.future_mask(bias, 9, **kwargs)
    assert longer.data_ptr() != first.data_ptr()
    torch.testing.assert_close(longer[:, :8, :8], first, atol=0, rtol=0)
    half = dense_backend.future_mask(bias, 4, dtype=torch.float16, device=CPU)
    assert half.dtype == torch.float16
    other = dense_backend.future_mask(LinearBias([1.0]), 4, **kwargs)
    assert other.shape == (1, 4, 4) and other[0, 3, 0] == -3


def test_a_copied_backend_has_no_mask_yet(dense_backend):
    bias = LinearBias(SLOPES)
    kwargs = {"dtype": torch.float32, "device": CPU}
    mask = dense_backend.future_mask(bias, 8, **kwargs)
    copied = copy.deepcopy(dense_backend)
    assert type(copied) is type(dense_backend)
    assert copied.future_mask(bias, 8, **kwargs).data_ptr() != mask.data_ptr()


def test_masks_made_in_inference_mode_serve_training(backend):
    bias = LinearBias(SLOPES)
    kwargs = {"dtype": torch.float32, "device": CPU}
    with torch.inference_mode():
        backend.prepare(bias, range(5), range(5), **kwargs)
    q, k, v = (tensor.requires_grad_() for tensor in random_qkv(5, 5))
    attend(q, k, v, backend.prepare(bias, range(5), range(5), **kwargs)).sum().backward()
    assert torch.isfinite(q.grad).all()


def test_only_one_kind_of_documents(backend):
    with pytest.raises(ValueError, match="must be given together"):
        backend.prepare(
            ZeroBias(HEADS),
            range(3),
            range(3),
            query_documents=torch.zeros(3),
            dtype=torch.float32,
            device=CPU,
        )


def test_unknown_backend():
    with pytest.raises(ValueError, match=r"--attention-backend.*'spda'.*known are sdpa, auto, ref"):
        get_backend("spda")
