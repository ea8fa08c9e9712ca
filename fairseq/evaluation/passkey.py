"""Two tasks that need what lies far back: finding a key in a long text, and copying a text.

A passkey document is `remember 7 3 9 .` somewhere in filler text, and `recall 7 3 9` at its end
(after Mohtashami and Jaggi 2023, arXiv:2305.16300). A copy document is `copy x4 x9 ... again x4 x9
...`, in which no symbol stands twice before `again`. Everything but the answer is easy to predict
or cannot be, so that a model's accuracy on the answer alone says what it sees.

Lengths count the tokens of a row: the words of a document and the end of the line before it, with
which every row starts.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

__all__ = [
    "KEY_LENGTH",
    "TASKS",
    "Accuracy",
    "Document",
    "copy_document",
    "documents",
    "evaluate",
    "passkey_document",
    "shortest_length",
    "vocabulary",
]

TASKS = ("passkey", "copy")
KEY_LENGTH = 3
_DIGITS = [str(digit) for digit in range(10)]
_SYMBOLS = [f"x{number}" for number in range(64)]
_FILLER_TEXT = "the grass is green the sky is blue the sun is yellow here we go there and back"
_FILLER = _FILLER_TEXT.split()


@dataclass(frozen=True)
class Document:
    """A text whose last words are an answer that stands in it before.

    Attributes:
        words: all words.
        num_answer: how many of the last words are the answer.
    """

    words: list[str]
    num_answer: int


@dataclass(frozen=True)
class Accuracy:
    """How many answers were right.

    Attributes:
        task: passkey or copy.
        length: tokens that the model read.
        depth: where the key stood in the filler, from 0 (start) to 1 (end); None for copy.
        num_documents: documents asked about.
        exact: share of answers of which every token was right: what greedy decoding would get.
        tokens: share of right tokens, each predicted from the right tokens before it.
    """

    task: str
    length: int
    depth: float | None
    num_documents: int
    exact: float
    tokens: float


def vocabulary() -> list[str]:
    """Returns every word that occurs in documents."""
    words = [*_FILLER, *_DIGITS, *_SYMBOLS, ".", "remember", "recall", "copy", "again"]
    return list(dict.fromkeys(words))


def shortest_length(task: str) -> int:
    """Returns the fewest tokens of a document."""
    return 2 * KEY_LENGTH + 4 if task == "passkey" else 5


def passkey_document(rng: random.Random, length: int, depth: float) -> Document:
    """Makes a document with a random key.

    Args:
        rng: source of the key and of where the filler begins.
        length: tokens, at least `shortest_length`.
        depth: share of the filler that stands before the key, 0 to 1.

    Raises:
        ValueError: the length or the depth is out of range.
    """
    _check_length("passkey", length)
    if not 0 <= depth <= 1:
        raise ValueError(f"a depth is {depth}; it is 0 (at the start) to 1 (at the end)")
    num_filler = length - shortest_length("passkey")
    phase = rng.randrange(len(_FILLER))
    filler = [_FILLER[(phase + index) % len(_FILLER)] for index in range(num_filler)]
    before = math.floor(depth * num_filler + 0.5)
    key = rng.choices(_DIGITS, k=KEY_LENGTH)
    statement = ["remember", *key, "."]
    words = [*filler[:before], *statement, *filler[before:], "recall", *key]
    return Document(words, KEY_LENGTH)


def copy_document(rng: random.Random, length: int) -> Document:
    """Makes a document with a random text and its copy.

    Args:
        rng: source of the text.
        length: tokens, at least `shortest_length`; an even length has a filler word in front.

    Raises:
        ValueError: the length is out of range.
    """
    _check_length("copy", length)
    number = (length - 3) // 2
    if number > len(_SYMBOLS):
        raise ValueError(
            f"a copy document of {length} tokens needs {number} symbols, of which there are "
            f"{len(_SYMBOLS)}; its length is {2 * len(_SYMBOLS) + 4} at most"
        )
    text = rng.sample(_SYMBOLS, number)
    front = [_FILLER[0]] * (length % 2 == 0)
    return Document([*front, "copy", *text, "again", *text], number)


def _check_length(task: str, length: int) -> None:
    if length < shortest_length(task):
        raise ValueError(
            f"a {task} document has at least {shortest_length(task)} tokens, not {length}"
        )


def documents(task: str, number: int, length: int, seed: int) -> Iterator[Document]:
    """Makes documents to train on, of every length up to one and with keys at every depth.

    Args:
        task: passkey or copy.
        number: how many.
        length: tokens of the longest.
        seed: the same seed makes the same documents.
    """
    rng = random.Random(f"{task} {length} {seed}")
    shortest = shortest_length(task)
    _check_length(task, length)
    for _ in range(number):
        drawn = rng.randint(shortest, length)
        yield _document(rng, task, drawn, rng.random())


def _document(rng: random.Random, task: str, length: int, depth: float | None) -> Document:
    if task == "copy":
        return copy_document(rng, length)
    return passkey_document(rng, length, 0.0 if depth is None else depth)


def evaluate(
    model: Any,
    dictionary: Any,
    task: str,
    *,
    lengths: Iterable[int],
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    num_documents: int = 100,
    seed: int = 1,
    most_tokens: int = 8192,
) -> Iterator[Accuracy]:
    """Asks a model about new documents, in one pass over each.

    Each token of an answer is predicted from all that stands before it, and counts as right if it
    is the likeliest of all words.

    Args:
        model: a language model in evaluation mode.
        dictionary: that of its training.
        task: passkey or copy.
        lengths: tokens of the documents.
        depths: where the key stands; for passkey alone.
        num_documents: documents for each length and depth.
        seed: other documents with another seed.
        most_tokens: tokens of a batch, a document at least.

    Raises:
        ValueError: a word of the task is not in the dictionary, or the model cannot read so many
            tokens.
    """
    missing = [word for word in vocabulary() if word not in dictionary and _belongs(word, task)]
    if missing:
        raise ValueError(
            f"the dictionary lacks words of the {task} task, such as {missing[0]!r}; use the data "
            "that scripts/passkey.py generate wrote, binarized by fairseq-preprocess"
        )
    for length in lengths:
        for depth in depths if task == "passkey" else [None]:
            rng = random.Random(f"{task} {length} {depth} test {seed}")
            asked = [_document(rng, task, length, depth) for _ in range(num_documents)]
            right = _right_tokens(model, dictionary, asked, max(1, most_tokens // length))
            exact = right.all(-1).double().mean()
            yield Accuracy(
                task, length, depth, num_documents, float(exact), float(right.double().mean())
            )


def _belongs(word: str, task: str) -> bool:
    is_symbol = word in _SYMBOLS or word in ("copy", "again")
    return is_symbol if task == "copy" else not is_symbol


def _right_tokens(
    model: Any, dictionary: Any, asked: Sequence[Document], batch_size: int
) -> torch.Tensor:
    """Returns which tokens of the answers are predicted, bool (documents, tokens of an answer)."""
    rows = [[dictionary.eos(), *map(dictionary.index, each.words)] for each in asked]
    tokens = torch.tensor(rows, device=next(model.parameters()).device)
    number = asked[0].num_answer
    right = []
    with torch.no_grad():
        for batch in tokens.split(batch_size):
            features = model.decoder.extract_features(batch[:, :-1])[0][:, -number:]
            output = (model.decoder.output_layer(features), None)
            predicted = model.get_normalized_probs(output, log_probs=True).argmax(-1)
            right.append(predicted.eq(batch[:, -number:]).cpu())
    return torch.cat(right)
