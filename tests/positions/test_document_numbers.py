"""Which document a token belongs to, against a loop over tokens."""

from __future__ import annotations

import pytest
import torch

from fairseq.positions import table_rows
from fairseq.positions.documents import document_numbers

PAD, EOS = 1, 2
IDS = {"eos_idx": EOS, "padding_idx": PAD}


def by_loop(row, kind):
    """Returns the documents of a row as lists of columns, without padding."""
    documents, before = [[]], None
    for column, token in enumerate(row):
        if token == PAD:
            continue
        if token == EOS and (kind == "line" or before == EOS) and documents[-1]:
            documents.append([])
        documents[-1].append(column)
        before = token
    return documents


def random_rows(seed=0):
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(0, 5, (40, 30), generator=generator)
    return torch.tensor([PAD, EOS, EOS, 7, 8])[chosen]


def test_documents_end_with_an_empty_line():
    #     </s> a  b </s> </s>  c </s>  d </s> </s> </s>  e, which predict a b </s> </s> c ...
    row = [EOS, 5, 6, EOS, EOS, 7, EOS, 8, EOS, EOS, EOS, 9]
    documents = document_numbers(torch.tensor([row]), "document", **IDS)
    assert documents.tolist() == [[0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 3, 3]]
    lines = document_numbers(torch.tensor([row]), "line", **IDS)
    assert lines.tolist() == [[1, 1, 1, 2, 3, 3, 4, 4, 5, 6, 7, 7]]


def test_padding_is_passed_over():
    rows = [[PAD, PAD, EOS, 5, EOS, EOS, 6], [EOS, 5, EOS, PAD, PAD, EOS, 6]]
    documents = document_numbers(torch.tensor(rows), "document", **IDS)
    assert documents.tolist() == [[0, 0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 1, 1]]


@pytest.mark.parametrize("kind", ["document", "line"])
def test_documents_and_positions_by_a_loop(kind):
    tokens = random_rows()
    numbers = document_numbers(tokens, kind, **IDS)
    rows = table_rows(tokens, PAD, numbers)
    for row, found, places in zip(tokens.tolist(), numbers.tolist(), rows.tolist(), strict=True):
        documents = by_loop(row, kind)
        of_loop = [{found[column] for column in document} for document in documents]
        assert all(len(numbers) <= 1 for numbers in of_loop)
        assert len(set.union(*of_loop)) == len([d for d in documents if d])
        expected = [PAD] * len(row)
        for document in documents:
            for place, column in enumerate(document):
                expected[column] = PAD + 1 + place
        assert places == expected


@pytest.mark.parametrize("kind", ["document", "line"])
def test_numbers_depend_on_earlier_tokens_alone(kind):
    tokens = random_rows(seed=1)
    whole = document_numbers(tokens, kind, **IDS)
    for end in range(1, tokens.size(1)):
        assert torch.equal(document_numbers(tokens[:, :end], kind, **IDS), whole[:, :end])


def test_unknown_kind():
    with pytest.raises(ValueError, match="--document-mask is 'lines'; it must be one of none, doc"):
        document_numbers(torch.zeros(1, 1, dtype=torch.int64), "lines", **IDS)
