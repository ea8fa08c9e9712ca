"""The backend that shows weights: the same output as the formula, and true weights."""

from __future__ import annotations

import pytest
import torch
from naive_attention import naive_attention

from fairseq.attention import BACKENDS, LinearBias, attend
from fairseq.attention.backends.recording import RecordingBackend

SLOPES = [0.5, 0.125]


def qkv(rows, queries, keys, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, 2, n, 4, generator=generator) for n in (queries, keys, keys)]


def prepare(backend, queries, keys, **options):
    first = keys - queries
    options = {"dtype": torch.float32, "device": torch.device("cpu"), **options}
    return backend.prepare(LinearBias(SLOPES), range(first, keys), range(keys), **options)


def term(b, h, i, j):
    return -SLOPES[h] * abs(i - j)


def test_it_is_not_offered_for_models():
    assert RecordingBackend.name not in BACKENDS


@pytest.mark.parametrize("most_scores", [1, 40, 1 << 20])
def test_the_output_is_that_of_the_formula_whatever_the_blocks(most_scores):
    q, k, v = qkv(2, 7, 7)
    backend = RecordingBackend(most_scores=most_scores)
    found = attend(q, k, v, prepare(backend, 7, 7))
    expected = naive_attention(q, k, v, term, lambda b, i, j: j <= i)
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-5)


def test_blocks_hold_no_more_scores_than_allowed_and_cover_all_queries():
    seen = []
    backend = RecordingBackend(seen.append, most_scores=2 * 2 * 7 * 3)
    q, k, v = qkv(2, 7, 7)
    prepared = prepare(backend, 7, 7)
    attend(q, k, v, prepared)
    attend(q, k, v, prepared)
    assert [(each.layer, each.first_query) for each in seen] == [
        (0, 0), (0, 3), (0, 6), (1, 0), (1, 3), (1, 6)
    ]  # fmt: skip
    assert [each.weights.size(2) for each in seen[:3]] == [3, 3, 1]
    assert all(each.scores.numel() <= 2 * 2 * 7 * 3 for each in seen)


def test_weights_are_the_softmax_and_layers_count_from_prepare():
    seen = []
    backend = RecordingBackend(seen.append)
    q, k, v = qkv(1, 5, 5)
    attend(q, k, v, prepare(backend, 5, 5))
    attend(q, k, v, prepare(backend, 5, 5))
    assert [each.layer for each in seen] == [0, 0]
    scores = (q.double() @ k.double().transpose(-2, -1)) / 2
    for i in range(5):
        for h in range(2):
            row = [scores[0, h, i, j].item() + term(0, h, i, j) for j in range(i + 1)]
            expected = torch.softmax(torch.tensor(row, dtype=torch.float64), 0)
            torch.testing.assert_close(
                seen[0].weights[0, h, i, : i + 1].double(), expected, atol=1e-6, rtol=1e-5
            )
            assert seen[0].weights[0, h, i, i + 1 :].eq(0).all()


def test_padding_queries_and_blind_queries_are_marked():
    seen = []
    is_padding = torch.tensor([[False] * 4, [True, False, False, True]])
    backend = RecordingBackend(seen.append, most_scores=2 * 2 * 4 * 2)
    q, k, v = qkv(2, 4, 4)
    out = attend(q, k, v, prepare(backend, 4, 4, key_is_padding=is_padding))
    marked = torch.cat([each.is_left_out[:, 0, :, 0] for each in seen], dim=1)
    assert marked.tolist() == is_padding.tolist()
    assert out[1, :, 0].eq(0).all()


def test_documents_and_cached_keys():
    q, k, v = qkv(1, 3, 6)
    documents = torch.tensor([[0, 0, 1, 1, 1, 1]])
    backend = RecordingBackend(most_scores=1)
    prepared = prepare(backend, 3, 6, query_documents=documents[:, 3:], key_documents=documents)
    found = attend(q, k, v, prepared)
    expected = naive_attention(
        q, k, v, lambda b, h, i, j: term(b, h, i + 3, j), lambda b, i, j: 2 <= j <= i + 3
    )
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-5)


def test_dropout_is_refused():
    q, k, v = qkv(1, 2, 2)
    with pytest.raises(ValueError, match="eval"):
        attend(q, k, v, prepare(RecordingBackend(), 2, 2), dropout_p=0.1)
