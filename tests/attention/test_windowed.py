"""Tiles and windows against the formula in float64: outputs, gradients, bounds, dropout."""

from __future__ import annotations

import logging
import math

import pytest
import torch

from fairseq.attention import (
    BIDIRECTIONAL,
    CAUSAL,
    LinearBias,
    MaskRule,
    SplitHeadsBias,
    SymmetricBias,
    TwoSlopeBias,
    ZeroBias,
    attend,
    get_backend,
)
from fairseq.attention.random_bits import DropMask
from fairseq.attention.tiles import Distances, HeadGroup, TiledCall, tiled_attention
from fairseq.attention.windows import TOLERANCE, measure_windows
from fairseq.positions.distance_bias import DistanceBias, per_head

CPU = torch.device("cpu")
POWERS = [2.0 ** -(n + 1) for n in range(8)]
SIX = [0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125]  # as for 6 heads: not in falling order


def random_qkv(heads, queries, keys=None, width=16, largest=7.0, dtype=torch.float32, rows=1):
    """Random tensors in which no score of a head is above `largest`, but one may be equal."""
    generator = torch.Generator().manual_seed(queries)
    keys = queries if keys is None else keys
    q = torch.randn(rows, heads, queries, width, generator=generator)
    k, v = torch.randn(2, rows, heads, keys, width, generator=generator)
    bound = q.norm(dim=-1).amax() * k.norm(dim=-1).amax() / math.sqrt(width)
    q, k = (x * (largest / bound).sqrt() for x in (q, k))
    return [x.to(dtype).requires_grad_() for x in (q, k, v)]


def exact(q, k, v, slopes, *, is_causal=True, right=None, hidden=None):
    """Output by the formula in float64; the last query stands at the last key."""
    shift = k.size(2) - q.size(2)
    distance = (torch.arange(q.size(2)) + shift)[:, None] - torch.arange(k.size(2))
    left, right = (
        torch.tensor(each, dtype=torch.float64)[:, None, None] for each in (slopes, right or slopes)
    )
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.size(-1))
    scores = scores - left * distance.clamp(min=0) + right * distance.clamp(max=0)
    if is_causal:
        scores = scores.masked_fill(distance < 0, -torch.inf)
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    return torch.softmax(scores, -1).nan_to_num(0.0) @ v


def twins(tensors):
    return [each.detach().double().requires_grad_() for each in tensors]


def rms(found, expected):
    return float((found.detach().double() - expected.detach()).square().mean().sqrt())


def compare(out, tensors, expected, others, limit=1e-6):
    """Compares outputs, and the gradients of a random weighting of them."""
    assert rms(out, expected) < limit
    given = torch.randn(out.shape, generator=torch.Generator().manual_seed(9))
    out.backward(given.to(out.dtype))
    expected.backward(given.double())
    for found, other in zip(tensors, others, strict=True):
        assert rms(found.grad, other.grad) < limit


@pytest.mark.parametrize("slopes", [POWERS, SIX, [0.5]], ids=["8", "6", "1"])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 300, 1100])
def test_lengths_and_heads(slopes, length):
    tensors = random_qkv(len(slopes), length)
    prepared = get_backend("windowed").prepare(
        LinearBias(slopes), range(length), range(length), dtype=torch.float32, device=CPU
    )
    others = twins(tensors)
    compare(attend(*tensors, prepared), tensors, exact(*others, slopes), others)


def test_windows_are_taken_and_hold():
    slopes = [0.5, 2**-4, 2**-6, 2**-7]
    tensors = random_qkv(4, 2600, width=8)
    backend = get_backend("windowed")
    prepared = backend.prepare(
        LinearBias(slopes), range(2600), range(2600), dtype=torch.float32, device=CPU
    )
    windows = measure_windows(*tensors, LinearBias(slopes))
    assert windows.left[0] < 60 and windows.left[1] < 500 and windows.left[2] < 2000
    assert (windows.error <= TOLERANCE).all()
    others = twins(tensors)
    compare(attend(*tensors, prepared), tensors, exact(*others, slopes), others)


@pytest.mark.parametrize("slopes", [[0.5, 0.05], [0.02, 0.004]])
@pytest.mark.parametrize("tolerance", [1e-2, 1e-5])
def test_what_is_left_out_moves_the_output_by_less_than_the_bound(slopes, tolerance):
    length = 2500
    q, k, v = (each.detach() for each in random_qkv(2, length, width=8, largest=5.0))
    # Keys that pull as hard as they can: the last ones of a window's outside.
    k[:, :, :40] *= 1.5
    windows = measure_windows(q, k, v, LinearBias(slopes), tolerance=tolerance)
    distance = torch.arange(length)[:, None] - torch.arange(length)
    hidden = distance > windows.left.view(-1, 1, 1)
    whole = exact(*twins((q, k, v)), slopes)
    cut = exact(*twins((q, k, v)), slopes, hidden=hidden)
    moved = (whole - cut).abs().amax((0, 2, 3))
    assert (moved <= windows.error).all() and (windows.error <= tolerance).all()
    assert bool(hidden.any())


@pytest.mark.parametrize("queries", [1, 7, 130, 700])
def test_queries_at_the_end_of_the_keys(queries):
    keys = 900
    tensors = random_qkv(8, queries, keys)
    prepared = get_backend("windowed").prepare(
        LinearBias(POWERS),
        range(keys - queries, keys),
        range(keys),
        dtype=torch.float32,
        device=CPU,
    )
    others = twins(tensors)
    compare(attend(*tensors, prepared), tensors, exact(*others, POWERS), others)


@pytest.mark.parametrize("length", [100, 128, 700])
@pytest.mark.parametrize(
    ("bias", "left", "right"),
    [
        (SymmetricBias(SIX), SIX, SIX),
        (TwoSlopeBias(SIX, SIX[::-1]), SIX, SIX[::-1]),
        (SplitHeadsBias(SIX), SIX[:3] + [99.0] * 3, [99.0] * 3 + SIX[3:]),
    ],
    ids=["symmetric", "two slopes", "split"],
)
def test_both_ways(length, bias, left, right):
    tensors = random_qkv(6, length)
    prepared = get_backend("windowed").prepare(
        bias, range(length), range(length), rule=bias.rule, dtype=torch.float32, device=CPU
    )
    others = twins(tensors)
    # A slope of 99 hides a side: the key next to the query gets exp(-99 + 7 + 7) of its weight.
    expected = exact(*others, left, is_causal=False, right=right)
    compare(attend(*tensors, prepared), tensors, expected, others)


@pytest.mark.parametrize("rule", [MaskRule(window=70), MaskRule(is_causal=False, window=70)])
def test_a_rule_with_a_window(rule):
    length = 400
    tensors = random_qkv(6, length)
    prepared = get_backend("windowed").prepare(
        LinearBias(SIX), range(length), range(length), rule=rule, dtype=torch.float32, device=CPU
    )
    distance = torch.arange(length)[:, None] - torch.arange(length)
    others = twins(tensors)
    expected = exact(*others, SIX, is_causal=rule.is_causal, hidden=distance.abs() >= 70)
    compare(attend(*tensors, prepared), tensors, expected, others)


def test_padding_and_documents():
    length = 600
    tensors = random_qkv(6, length, rows=3)
    is_padding = torch.zeros(3, length, dtype=torch.bool)
    is_padding[0, :5] = is_padding[1, 590:] = True
    documents = (torch.arange(length)[None] // torch.tensor([[600], [170], [7]])).long()
    prepared = get_backend("windowed").prepare(
        LinearBias(SIX),
        range(length),
        range(length),
        key_is_padding=is_padding,
        query_documents=documents,
        key_documents=documents,
        dtype=torch.float32,
        device=CPU,
    )
    hidden = (documents[:, :, None] != documents[:, None]) | is_padding[:, None]
    others = twins(tensors)
    expected = exact(*others, SIX, hidden=hidden[:, None])
    compare(attend(*tensors, prepared), tensors, expected, others)


def test_documents_with_windows():
    length = 1500
    tensors = random_qkv(2, length, width=8)
    documents = torch.arange(length) // 700
    prepared = get_backend("windowed").prepare(
        LinearBias([0.5, 0.05]),
        range(length),
        range(length),
        query_documents=documents,
        key_documents=documents,
        dtype=torch.float32,
        device=CPU,
    )
    others = twins(tensors)
    expected = exact(*others, [0.5, 0.05], hidden=documents[:, None] != documents)
    compare(attend(*tensors, prepared), tensors, expected, others)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float16, 1.5e-3), (torch.bfloat16, 1.2e-2)])
def test_half_precision_is_rounded_at_the_end_alone(dtype, limit):
    q, k, v = (each.detach() for each in random_qkv(8, 500, dtype=dtype))
    prepared = get_backend("windowed").prepare(
        LinearBias(POWERS), range(500), range(500), dtype=dtype, device=CPU
    )
    found = attend(q, k, v, prepared)
    expected = exact(*twins((q, k, v)), POWERS)
    assert found.dtype == dtype
    assert rms(found, expected) < 1.01 * rms(expected.to(dtype), expected) + 1e-7
    assert (found.double() - expected).abs().max() < limit


def test_large_scores_take_a_reference():
    tensors = random_qkv(8, 200, largest=45.0)
    backend = get_backend("windowed")
    prepared = backend.prepare(
        LinearBias(POWERS), range(200), range(200), dtype=torch.float32, device=CPU
    )
    others = twins(tensors)
    compare(attend(*tensors, prepared), tensors, exact(*others, POWERS), others, limit=1e-5)
    assert prepared.plain is None


def test_larger_scores_take_a_mask_with_one_warning(caplog):
    tensors = random_qkv(8, 100, largest=400.0)
    prepared = get_backend("windowed").prepare(
        LinearBias(POWERS), range(100), range(100), dtype=torch.float32, device=CPU
    )
    with caplog.at_level(logging.WARNING):
        first = attend(*tensors, prepared)
        attend(*tensors, prepared)
    assert len(caplog.records) == 1 and "too large" in caplog.text
    assert rms(first, exact(*twins(tensors), POWERS)) < 1e-4


def test_the_derivatives_are_those_of_the_formula():
    """Numerically, of output and log-sum-exp, by every input; blocks of four, uneven ends."""
    generator = torch.Generator().manual_seed(2)
    q = torch.randn(1, 2, 6, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    k, v = (
        torch.randn(1, 2, 9, 3, generator=generator, dtype=torch.float64, requires_grad=True)
        for _ in range(2)
    )
    terms = torch.randn(2, 40, generator=generator, dtype=torch.float64)
    terms[:, :20] = -torch.inf  # keys after the query
    terms.requires_grad_()
    call = TiledCall((HeadGroup(slice(0, 2), 4, 12, 0),), 3, 0.7)
    assert torch.autograd.gradcheck(
        lambda q, k, v, terms: tiled_attention(q, k, v, Distances(terms, -20), call),
        (q, k, v, terms),
    )


@pytest.mark.parametrize("length", [50, 300])
def test_a_learned_bias_gets_its_gradient(length):
    slopes = torch.tensor([0.3, 0.02, 0.1]).requires_grad_()
    bias = DistanceBias(lambda d, m: -m * d.sqrt(), per_head(slopes), is_learned=True)
    q, k, v = (each.detach() for each in random_qkv(3, length))
    prepared = get_backend("windowed").prepare(
        bias, range(length), range(length), dtype=torch.float32, device=CPU
    )
    out = attend(q, k, v, prepared)
    out.square().sum().backward()
    twin = slopes.detach().double().requires_grad_()
    distance = (torch.arange(length)[:, None] - torch.arange(length)).double()
    scores = q.double() @ k.double().transpose(-1, -2) / 4
    scores = scores - twin[:, None, None] * distance.clamp(min=0).sqrt()
    scores = scores.masked_fill(distance < 0, -torch.inf)
    expected = torch.softmax(scores, -1) @ v.double()
    assert rms(out, expected) < 1e-6
    expected.square().sum().backward()
    torch.testing.assert_close(slopes.grad.double(), twin.grad, rtol=1e-4, atol=1e-4)


def dropped(rate, seed, length=256):
    """Weights after dropout: with values of the unit matrix the output is the weights."""
    torch.manual_seed(seed)
    q = torch.zeros(1, 1, length, length)
    v = torch.eye(length)[None, None].requires_grad_()
    prepared = get_backend("windowed").prepare(
        ZeroBias(1), range(length), range(length), rule=BIDIRECTIONAL, dtype=q.dtype, device=CPU
    )
    return attend(q, q, v, prepared, dropout_p=rate), v


def test_dropout_is_settled_by_the_seed_and_keeps_the_mean():
    rate, length = 0.3, 256
    weights, _ = dropped(rate, seed=1)
    again, _ = dropped(rate, seed=1)
    other, _ = dropped(rate, seed=2)
    assert torch.equal(weights, again) and not torch.equal(weights, other)
    kept = weights[weights > 0]
    torch.testing.assert_close(
        kept, torch.full_like(kept, 1 / length / (1 - rate)), rtol=1e-4, atol=0
    )
    deviation = math.sqrt(rate * (1 - rate) / length**2)
    assert abs(len(kept) / length**2 - (1 - rate)) < 4 * deviation
    by_key = (weights > 0).float().mean((0, 1, 2))
    assert (by_key - (1 - rate)).abs().max() < 5 * math.sqrt(rate * (1 - rate) / length)
    # Neighbours are dropped independently.
    signs = (weights[0, 0] > 0).float() - (1 - rate)
    assert abs(float((signs[:, 1:] * signs[:, :-1]).mean())) < 4 * rate * (1 - rate) / length


def test_dropout_drops_the_same_weights_in_the_backward_pass():
    """With random values too, the gradient is that of the formula with the weights that were
    dropped in the forward pass, which another call with the same seed shows."""
    length, rate = 300, 0.2
    tensors = random_qkv(2, length)
    slopes = [0.5, 0.01]
    prepared = get_backend("windowed").prepare(
        LinearBias(slopes), range(length), range(length), dtype=torch.float32, device=CPU
    )
    others = twins(tensors)
    q, k, _ = (each.detach() for each in tensors)
    unit = torch.eye(length).expand(1, 2, length, length)
    # Wider or larger values would change windows, so weights are shown in pieces like them.
    largest = tensors[2].detach().abs().amax((0, 2, 3)).view(-1, 1, 1)
    shown = []
    for start in range(0, length, 16):
        torch.manual_seed(5)
        piece = torch.nn.functional.pad(unit[..., start : start + 16], (0, 0))
        wide = torch.nn.functional.pad(piece, (0, 16 - piece.size(-1)))
        shown.append(attend(q, k, wide * largest, prepared, dropout_p=rate)[..., : piece.size(-1)])
    kept = torch.cat(shown, -1) > 0  # far keys of steep heads count as dropped: they weigh nothing
    torch.manual_seed(5)
    out = attend(*tensors, prepared, dropout_p=rate)
    distance = (torch.arange(length)[:, None] - torch.arange(length)).double()
    scores = others[0] @ others[1].transpose(-1, -2) / 4
    scores = scores - torch.tensor(slopes).double()[:, None, None] * distance
    weights = torch.softmax(scores.masked_fill(distance < 0, -torch.inf), -1)
    expected = (weights * kept / (1 - round(rate * 65536) / 65536)) @ others[2]
    compare(out, tensors, expected, others)


@pytest.mark.parametrize("rate", [-0.1, 1.5])
def test_a_rate_that_is_none(rate):
    with pytest.raises(ValueError, match="must be between 0 and 1"):
        DropMask(rate, 0)


def test_everything_dropped():
    weights, v = dropped(1.0, seed=0)
    assert not weights.any()
    weights.sum().backward()
    assert not v.grad.any()


def test_terms_are_kept_for_the_next_forward_pass():
    backend = get_backend("windowed")
    bias, kwargs = LinearBias(SIX), {"dtype": torch.float32, "device": CPU}
    first = backend.prepare(bias, range(50), range(50), **kwargs)
    again = backend.prepare(bias, range(50), range(50), **kwargs)
    other = backend.prepare(bias, range(50), range(50), rule=BIDIRECTIONAL, **kwargs)
    assert first.distances.terms is again.distances.terms
    assert first.distances.terms is not other.distances.terms
    assert first.request.rule == CAUSAL


def test_windows_of_a_bias_that_does_not_tell():
    q, k, v = random_qkv(1, 5)
    bias = DistanceBias(lambda d, m: -m * d, per_head(torch.ones(1)))
    with pytest.raises(ValueError, match="does not say how steeply"):
        measure_windows(q, k, v, bias)
    with pytest.raises(ValueError, match="5 queries for 3 keys"):
        measure_windows(q, k[:, :, :3], v[:, :, :3], LinearBias([1.0]))
