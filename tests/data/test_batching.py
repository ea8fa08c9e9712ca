"""Batches, against the rule as it is written down, step by step."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq.data.batching import batch_by_size


def batch_plainly(lengths, max_tokens, max_sentences, multiple):
    """The rule with lists: an open batch, and a tail that waits to complete the multiple."""
    batches, committed, tail = [], [], []
    for item, length in enumerate(lengths):
        rows = len(committed) + len(tail) + 1
        longest = max([lengths[i] for i in committed + tail] + [length])
        too_many_rows = max_sentences is not None and rows > max_sentences
        too_many_tokens = max_tokens is not None and rows * longest > max_tokens
        overflows = too_many_rows or too_many_tokens
        if overflows:
            batches.append(committed)
            tail_longest = max([lengths[i] for i in tail] + [length])
            if max_tokens is not None and (len(tail) + 1) * tail_longest > max_tokens:
                batches.append(tail)
                tail = []
            committed, tail = [*tail, item], []
        else:
            tail.append(item)
            if rows < multiple or rows % multiple == 0:
                committed, tail = committed + tail, []
    return [batch for batch in [*batches, committed, tail] if batch]


def batch(lengths, max_tokens=None, max_sentences=None, multiple=1, **options):
    batches = batch_by_size(
        np.arange(len(lengths)),
        num_tokens_vec=lengths,
        max_tokens=max_tokens,
        max_sentences=max_sentences,
        required_batch_size_multiple=multiple,
        **options,
    )
    return [b.tolist() for b in batches]


def rows(lengths, *limits, **options):
    return [len(b) for b in batch(lengths, *limits, **options)]


def test_examples_of_the_original():
    assert rows([512] * 100, 9216, None, 1) == [18] * 5 + [10]
    assert rows([512] * 100, 9216, None, 8) == [16] * 6 + [4]
    assert rows([300] + [512] * 40, 9216, None, 8) == [16, 16, 8, 1]
    assert rows([512] * 21, 9216, 5, 8) == [5, 5, 5, 5, 1]


@settings(max_examples=400, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 20), max_size=60),
    max_tokens=st.none() | st.integers(20, 120),
    max_sentences=st.none() | st.integers(1, 20),
    multiple=st.integers(1, 9),
    is_sorted=st.booleans(),
)
def test_equals_the_rule(lengths, max_tokens, max_sentences, multiple, is_sorted):
    lengths = sorted(lengths) if is_sorted else lengths
    batches = batch(lengths, max_tokens, max_sentences, multiple)
    assert batches == batch_plainly(lengths, max_tokens, max_sentences, multiple)
    assert [i for b in batches for i in b] == list(range(len(lengths)))
    for b in batches:
        assert b
        assert max_sentences is None or len(b) <= max_sentences
        assert max_tokens is None or len(b) * max(lengths[i] for i in b) <= max_tokens


def test_lengths_may_come_from_a_function():
    order = [3, 1, 2]
    by_function = batch_by_size(order, num_tokens_fn=lambda i: 10 * i, max_tokens=40)
    assert [b.tolist() for b in by_function] == [[3], [1, 2]]


def test_nothing_makes_no_batches():
    assert batch([], 10) == []


def test_an_oversized_item_is_an_error_or_alone():
    lengths = [2, 3, 50, 4, 60]
    with pytest.raises(ValueError, match="should not exceed max_tokens=9: item 2"):
        batch(lengths, 9)
    assert batch(lengths, 9, allow_oversized=True) == [[0, 1], [2], [3], [4]]
    assert batch([2, 3], 9, allow_oversized=True) == [[0, 1]]


def test_limits_are_positive():
    with pytest.raises(ValueError, match="--max-tokens is 0"):
        batch([1], 0)
    with pytest.raises(ValueError, match="--batch-size is -1"):
        batch([1], None, -1)
    with pytest.raises(ValueError, match="--required-batch-size-multiple is 0"):
        batch([1], None, None, 0)
    with pytest.raises(TypeError, match="num_tokens"):
        batch_by_size([1])
    with pytest.raises(ValueError, match="2 indices but 1 lengths"):
        batch_by_size([1, 2], num_tokens_vec=[1])


def test_a_million_equal_blocks():
    lengths = np.full(1_000_003, 512)
    assert rows(lengths, 9216, None, 8) == [16] * 62_500 + [3]
