"""The documents of the passkey and copy tasks, and who counts as right."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch

from fairseq.data.dictionary import Dictionary
from fairseq.evaluation.passkey import (
    copy_document,
    documents,
    evaluate,
    passkey_document,
    shortest_length,
    vocabulary,
)


@pytest.mark.parametrize("length", [10, 11, 64, 300])
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_a_passkey_document(length, depth):
    found = passkey_document(random.Random(3), length, depth)
    words = found.words
    assert len(words) == length - 1  # the end of the line before is a token too
    assert found.num_answer == 3
    at = words.index("remember")
    key = words[at + 1 : at + 4]
    assert all(word.isdigit() for word in key)
    assert words[at + 4] == "."
    assert words[-4:] == ["recall", *key]
    num_filler = length - 10
    assert at == pytest.approx(depth * num_filler, abs=0.5)
    filler = words[:at] + words[at + 5 : -4]
    assert len(filler) == num_filler
    assert not any(word.isdigit() or word in ("remember", "recall", ".") for word in filler)
    # Filler goes on behind the key where it stopped before: it is one text of period 18.
    assert all(a == b for a, b in zip(filler, filler[18:], strict=False))


def test_keys_are_drawn_evenly():
    rng = random.Random(0)
    digits = Counter()
    for _ in range(2000):
        digits.update(passkey_document(rng, 12, 0.5).words[-3:])
    assert sorted(digits) == [str(n) for n in range(10)]
    # 6000 draws: 600 each with a standard deviation of 23.
    assert all(500 < count < 700 for count in digits.values())


@pytest.mark.parametrize("length", [5, 6, 64, 131])
def test_a_copy_document(length):
    found = copy_document(random.Random(1), length)
    words = found.words
    assert len(words) == length - 1
    number = found.num_answer
    assert number == (length - 3) // 2
    assert words[-number - 1] == "again"
    assert words[-2 * number - 2] == "copy"
    text = words[-2 * number - 1 : -number - 1]
    assert text == words[-number:]
    assert len(set(text)) == number


def test_training_documents_have_all_lengths_and_depths_and_the_same_seed_makes_them_again():
    made = list(documents("passkey", 400, 40, seed=5))
    lengths = {len(each.words) + 1 for each in made}
    assert lengths == set(range(shortest_length("passkey"), 41))
    places = [each.words.index("remember") / max(1, len(each.words) - 9) for each in made]
    assert min(places) < 0.05
    assert max(places) > 0.95
    assert made == list(documents("passkey", 400, 40, seed=5))
    assert made != list(documents("passkey", 400, 40, seed=6))
    copies = {len(each.words) + 1 for each in documents("copy", 200, 20, seed=1)}
    assert copies == set(range(5, 21))


def test_every_word_is_in_the_vocabulary_once():
    words = vocabulary()
    assert len(words) == len(set(words))
    for task in ("passkey", "copy"):
        for each in documents(task, 50, 60, seed=2):
            assert set(each.words) <= set(words)


def test_what_cannot_be_made_is_refused():
    rng = random.Random(0)
    with pytest.raises(ValueError, match="at least 10 tokens, not 9"):
        passkey_document(rng, 9, 0.5)
    with pytest.raises(ValueError, match=r"0 .at the start. to 1"):
        passkey_document(rng, 20, 1.5)
    with pytest.raises(ValueError, match="at least 5 tokens, not 4"):
        copy_document(rng, 4)
    with pytest.raises(ValueError, match="132 at most"):
        copy_document(rng, 133)


def dictionary_of(words):
    dictionary = Dictionary()
    for word in words:
        dictionary.add_symbol(word)
    return dictionary


class Oracle(torch.nn.Module):
    """Knows the answer by looking it up; forgets keys that lie further back than it sees."""

    def __init__(self, dictionary, sees=10**6, wrong_token=None):
        super().__init__()
        self.dictionary, self.sees, self.wrong_token = dictionary, sees, wrong_token
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.decoder = self
        self.lengths = set()

    def extract_features(self, tokens):
        self.lengths.add(tokens.size(1))
        assert tokens[:, 0].eq(self.dictionary.eos()).all()
        start = self.dictionary.index("remember")
        out = torch.zeros(*tokens.shape, len(self.dictionary))
        for row, ids in enumerate(tokens.tolist()):
            at = ids.index(start) if start in ids else ids.index(self.dictionary.index("copy"))
            asked = self.dictionary.index("recall" if start in ids else "again")
            first = ids.index(asked)
            for column in range(first, len(ids)):
                token = at + 1 + column - first
                is_seen = column - token < self.sees and column - first != self.wrong_token
                out[row, column, ids[token] if is_seen else 0] = 1.0
        return out, None

    def output_layer(self, features):
        return features

    def get_normalized_probs(self, output, log_probs):
        return output[0].log_softmax(-1)


def test_a_model_that_knows_everything_is_always_right():
    dictionary = dictionary_of(vocabulary())
    for task in ("passkey", "copy"):
        model = Oracle(dictionary)
        rows = list(evaluate(model, dictionary, task, lengths=[20, 33], num_documents=7))
        assert len(rows) == (10 if task == "passkey" else 2)
        assert all((row.exact, row.tokens) == (1.0, 1.0) for row in rows)
        assert [row.length for row in rows] == sorted([20, 33] * (len(rows) // 2))
        assert model.lengths == {19, 32}  # the last token is predicted, not read


def test_a_model_that_sees_a_window_finds_keys_within_it():
    dictionary = dictionary_of(vocabulary())
    # 40 tokens of filler; at depth d the first key token is 6 + 40 (1 - d) before its prediction.
    rows = evaluate(
        Oracle(dictionary, sees=27), dictionary, "passkey", lengths=[50], num_documents=5
    )
    assert {row.depth: row.exact for row in rows} == {0: 0, 0.25: 0, 0.5: 1, 0.75: 1, 1: 1}


def test_one_wrong_token_makes_an_answer_wrong_and_batches_do_not_matter():
    dictionary = dictionary_of(vocabulary())
    model = Oracle(dictionary, wrong_token=1)
    for most_tokens in (1, 60, 8192):
        rows = list(
            evaluate(
                model,
                dictionary,
                "passkey",
                lengths=[20],
                depths=[0.5],
                num_documents=6,
                most_tokens=most_tokens,
            )
        )
        assert [(row.exact, row.num_documents) for row in rows] == [(0.0, 6)]
        assert rows[0].tokens == pytest.approx(2 / 3)


def test_another_dictionary_is_refused():
    dictionary = dictionary_of(word for word in vocabulary() if word != "recall")
    with pytest.raises(ValueError, match="lacks words of the passkey task, such as 'recall'"):
        next(evaluate(Oracle(dictionary), dictionary, "passkey", lengths=[20]))
    rows = evaluate(Oracle(dictionary), dictionary, "copy", lengths=[20], num_documents=2)
    assert next(rows).exact == 1.0
