"""Biases for encoders, prefixes, chunks and cross attention against loops in float64.

Every bias is written down a second time as a function of one query and one key, over backends,
dtypes, padding, packed documents, offsets, slices of the heads, and gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from naive_attention import ON_CPU, naive_attention, prepare_or_skip

from fairseq.attention import (
    BIDIRECTIONAL,
    CAUSAL,
    ChunkBias,
    CrossBias,
    LinearBias,
    PrefixBias,
    SplitHeadsBias,
    SymmetricBias,
    TwoSlopeBias,
    attend,
    get_backend,
)

CPU = torch.device("cpu")
ROWS, HEADS, WIDTH, LENGTH = 2, 4, 8, 9
SLOPES = [0.5, 0.0625, 0.3, 0.01]
RIGHT = [0.1, 0.7, 0.2, 0.4]
TOLERANCE = {torch.float32: 3e-6, torch.float16: 5e-3, torch.bfloat16: 3e-2}
CHUNKS = [[0, 0, 0, 1, 1, 1, 1, 2, 2], [5, 5, 5, 5, 5, 5, 0, 0, 0]]
PREFIXES = [5, 2]


@dataclass
class Case:
    """A bias, and the same in words of one row, head, query position and key position."""

    bias: Any
    term: Any  # (row, head, i, j) -> number
    sees: Any  # (row, head, i, j) -> bool


def everything(b, h, i, j):
    return True


def backwards(b, h, i, j):
    return j <= i


def place_in_chunk(row, position):
    """Returns (start of the chunk, position in it); the last chunk has no end."""
    ids = row + [row[-1]] * 100
    start = position
    while start > 0 and ids[start - 1] == ids[position]:
        start -= 1
    return start, position - start


def chunk_term(row, h, i, j, slopes=SLOPES):
    return -slopes[h] * abs(place_in_chunk(row, i)[1] - place_in_chunk(row, j)[1])


def chunk_term_within(row, h, i, j):
    if place_in_chunk(row, i)[0] != place_in_chunk(row, j)[0]:
        return -0.25
    return -SLOPES[h] * abs(i - j)


def two_slopes(b, h, i, j):
    return -SLOPES[h] * (i - j) if j <= i else -RIGHT[h] * (j - i)


def at_query(offset, scale):
    return lambda b, h, i, j: -SLOPES[h] * abs(offset[b] + scale[b] * i - j)


def distance(b, h, i, j):
    return -SLOPES[h] * abs(i - j)


CASES = {
    "symmetric": lambda: Case(SymmetricBias(SLOPES), distance, everything),
    "heads split left and right": lambda: Case(
        SplitHeadsBias(SLOPES), distance, lambda b, h, i, j: j <= i if h < 2 else j >= i
    ),
    "heads split in turn": lambda: Case(
        SplitHeadsBias(SLOPES, [False, True, False, True]),
        distance,
        lambda b, h, i, j: j <= i if h in (1, 3) else j >= i,
    ),
    "two slopes": lambda: Case(TwoSlopeBias(SLOPES, RIGHT), two_slopes, everything),
    "prefix": lambda: Case(PrefixBias(SLOPES, 4), distance, lambda b, h, i, j: j <= i or j < 4),
    "prefix of each row": lambda: Case(
        PrefixBias(SLOPES, torch.tensor(PREFIXES)),
        distance,
        lambda b, h, i, j: j <= i or j < PREFIXES[b],
    ),
    "chunks": lambda: Case(
        ChunkBias.of_lengths(LinearBias(SLOPES), [3, 4, 2]),
        lambda b, h, i, j: chunk_term(CHUNKS[0], h, i, j),
        backwards,
    ),
    "chunks of each row": lambda: Case(
        ChunkBias(LinearBias(SLOPES), torch.tensor(CHUNKS)),
        lambda b, h, i, j: chunk_term(CHUNKS[b], h, i, j),
        backwards,
    ),
    "chunks with a constant between": lambda: Case(
        ChunkBias(SymmetricBias(SLOPES), torch.tensor(CHUNKS), across=-0.25),
        lambda b, h, i, j: chunk_term_within(CHUNKS[b], h, i, j),
        everything,
    ),
    "cross with an offset": lambda: Case(
        CrossBias(SymmetricBias(SLOPES), offset=3), at_query([3, 3], [1, 1]), everything
    ),
    "cross with an offset of each row": lambda: Case(
        CrossBias(SymmetricBias(SLOPES), offset=torch.tensor([-2.0, 1.5])),
        at_query([-2.0, 1.5], [1, 1]),
        everything,
    ),
    "cross stretched": lambda: Case(
        CrossBias.stretched(SymmetricBias(SLOPES), 6, 9),
        at_query([0.25] * 2, [1.5] * 2),
        everything,
    ),
    "cross stretched in each row": lambda: Case(
        CrossBias.stretched(SymmetricBias(SLOPES), 6, torch.tensor([9, 3])),
        at_query([0.25, -0.25], [1.5, 0.5]),
        everything,
    ),
    "cross of two slopes": lambda: Case(
        CrossBias(TwoSlopeBias(SLOPES, RIGHT), offset=2),
        lambda b, h, i, j: two_slopes(b, h, i + 2, j),
        everything,
    ),
}


@pytest.fixture(params=ON_CPU)
def backend(request):
    return get_backend(request.param)


@pytest.fixture(params=list(CASES))
def case(request):
    return CASES[request.param]()


def random_qkv(num_queries=LENGTH, num_keys=LENGTH, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(ROWS, HEADS, num_queries, WIDTH, generator=generator)
    k, v = torch.randn(2, ROWS, HEADS, num_keys, WIDTH, generator=generator)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def by_loops(q, k, v, case, queries=range(LENGTH), keys=range(LENGTH), heads=range(HEADS), **also):
    """Returns what the words of the case say; one head at a time, since heads may see unlike."""
    also_sees = also.get("also_sees", lambda b, i, j: True)
    parts = [
        naive_attention(
            q[:, n : n + 1],
            k[:, n : n + 1],
            v[:, n : n + 1],
            lambda b, _, i, j, h=h: case.term(b, h, queries[i], keys[j]),
            lambda b, i, j, h=h: case.sees(b, h, queries[i], keys[j]) and also_sees(b, i, j),
        )
        for n, h in enumerate(heads)
    ]
    return torch.cat(parts, 1)


def prepare(backend, case, queries=range(LENGTH), keys=range(LENGTH), dtype=torch.float32, **also):
    return prepare_or_skip(
        backend, case.bias, queries, keys, rule=case.bias.rule, dtype=dtype, device=CPU, **also
    )


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_the_whole(backend, case, dtype):
    q, k, v = random_qkv(dtype=dtype)
    found = attend(q, k, v, prepare(backend, case, dtype=dtype))
    assert found.dtype == dtype
    assert (found.double() - by_loops(q, k, v, case)).abs().max() < TOLERANCE[dtype]


@pytest.mark.parametrize("queries", [range(3, 5), range(8, 9), range(11, 14)])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_some_queries(backend, case, queries, as_tensor):
    """As in incremental decoding, on a part of the sequence, and beyond the last key."""
    q, k, v = random_qkv(num_queries=len(queries))
    positions = torch.tensor(list(queries)) if as_tensor else queries
    found = attend(q, k, v, prepare(backend, case, queries=positions))
    expected = by_loops(q, k, v, case, queries)
    assert (found.double() - expected).abs().max() < 3e-6


def test_keys_that_all_lie_after_the_queries(backend, case):
    """Heads that see none of them give zeros."""
    q, k, v = random_qkv(2, 4)
    queries, keys = range(2), range(4, 8)
    found = attend(q, k, v, prepare(backend, case, queries, keys))
    assert (found.double() - by_loops(q, k, v, case, queries, keys)).abs().max() < 3e-6


def test_padding_and_documents(backend, case):
    is_padding = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
    is_padding[0, :2] = is_padding[1, 7:] = True
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 2], [0, 0, 0, 0, 0, 0, 1, 2, 2]])
    q, k, v = random_qkv()
    prepared = prepare(
        backend,
        case,
        key_is_padding=is_padding,
        query_documents=documents,
        key_documents=documents,
    )
    expected = by_loops(
        q,
        k,
        v,
        case,
        also_sees=lambda b, i, j: documents[b, i] == documents[b, j] and not is_padding[b, j],
    )
    found = attend(q, k, v, prepared)
    assert (found.double() - expected).abs().max() < 3e-6
    assert not found[1, :, 7:].any()


def test_gradients(backend, case):
    tensors = [tensor.requires_grad_() for tensor in random_qkv(5, 7)]
    twins = [tensor.detach().double().requires_grad_() for tensor in tensors]
    is_padding = torch.zeros(ROWS, 7, dtype=torch.bool)
    is_padding[0, 0] = is_padding[1, 5:] = True
    queries, keys = range(2, 7), range(7)
    prepared = prepare(backend, case, queries, keys, key_is_padding=is_padding)
    attend(*tensors, prepared).square().sum().backward()
    out = by_loops(*twins, case, queries, keys, also_sees=lambda b, i, j: not is_padding[b, j])
    out.square().sum().backward()
    for found, expected in zip(tensors, twins, strict=True):
        torch.testing.assert_close(found.grad.double(), expected.grad, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("queries", [range(LENGTH), range(4, 6)])
@pytest.mark.parametrize("which", [slice(0, 1), slice(1, 4), slice(2, 4)])
def test_some_of_the_heads(backend, case, queries, which):
    q, k, v = random_qkv(num_queries=len(queries))
    prepared = prepare(backend, case, queries=queries, head_slice=which)
    parts = q[:, which], k[:, which], v[:, which]
    heads = range(which.start, which.stop)
    expected = by_loops(*parts, case, queries, heads=heads)
    assert (attend(*parts, prepared).double() - expected).abs().max() < 3e-6


def test_longer_and_shorter_inputs_by_turns(backend, case):
    """What a backend keeps of one length serves the others."""
    for length in (7, 4, 9, 5):
        q, k, v = random_qkv(length, length)
        found = attend(q, k, v, prepare(backend, case, range(length), range(length)))
        expected = by_loops(q, k, v, case, range(length), range(length))
        assert (found.double() - expected).abs().max() < 3e-6


def test_each_bias_names_its_rule():
    assert LinearBias(SLOPES).rule == CAUSAL
    assert SymmetricBias(SLOPES).rule == BIDIRECTIONAL == TwoSlopeBias(SLOPES, RIGHT).rule
    assert SplitHeadsBias([1.0] * 5).rule.looks_left == (True, True, True, False, False)
    assert PrefixBias(SLOPES, 3).rule.lengths == 3
    assert CrossBias(LinearBias(SLOPES)).rule == BIDIRECTIONAL
    assert ChunkBias.of_lengths(SymmetricBias(SLOPES), [2, 1]).rule == BIDIRECTIONAL


def test_two_equal_slopes_are_the_symmetric_bias():
    both = TwoSlopeBias(SLOPES, SLOPES).dense(range(3, 6), range(8))
    assert torch.equal(both, SymmetricBias(SLOPES).dense(range(3, 6), range(8)))


def test_masks_that_all_rows_share_are_kept():
    backend = get_backend("sdpa")
    for name in ("symmetric", "heads split left and right", "prefix", "chunks", "cross stretched"):
        case = CASES[name]()
        first, second = prepare(backend, case).mask, prepare(backend, case).mask
        assert first.data_ptr() == second.data_ptr(), name


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TwoSlopeBias(SLOPES, [0.1]), "right_slopes has 1 values for 4 heads"),
        (lambda: SplitHeadsBias(SLOPES, [True]), "looks_left has 1 values for 4 heads"),
    ],
)
def test_numbers_of_heads_that_do_not_fit(make, message):
    with pytest.raises(ValueError, match=message):
        make()
