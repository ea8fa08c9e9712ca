"""Text to the items of a dataset."""

import io
import itertools
import re
import tempfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairseq.binarizer import (
    BinarizeSummary,
    binarize_alignments,
    binarize_numbered,
    binarize_text,
)
from fairseq.data import Dictionary, text_encoding, text_file
from fairseq.data.indexed_dataset import make_builder, make_dataset
from fairseq.data.text_encoding import number_text

WORDS = ["a", "b", "é", "\U0001f600x"]
SPECIALS = ["<unk>", "<s>", "</s>", "<pad>"]
SPACES = [" ", "\t", "\n", "\r", "\r\n", "\u2028", "\x85", "\x0b", "\x1c", "\u3000", "a " * 30]
NO_SPACES = ["zz", "\ufeff", "\u200b", "\x00"]
NASTY = st.lists(
    st.sampled_from([*WORDS, *SPECIALS, *NO_SPACES, *SPACES, " ", "\n"]), min_size=1, max_size=40
).map("".join)


@pytest.fixture(scope="module")
def dictionary():
    dictionary = Dictionary()
    for word in WORDS:
        dictionary.add_symbol(word)
    return dictionary


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("binarized")


def binarize(folder, dictionary, data, **options):
    """Returns the items of a text and its summary."""
    (folder / "text.txt").write_bytes(data)
    with make_builder(folder / "out.bin", "mmap", len(dictionary)) as builder:
        summary = binarize_text(folder / "text.txt", dictionary, builder, **options)
        builder.finalize(folder / "out.idx")
    dataset = make_dataset(folder / "out", "mmap")
    return [dataset.read(i).tolist() for i in range(len(dataset))], summary


def binarize_in_numbers(folder, dictionary, data, workers=1):
    """The same, for a text whose words were numbered before the dictionary was there."""
    (folder / "text.txt").write_bytes(data)
    with tempfile.TemporaryFile() as file:
        text = number_text(folder / "text.txt", workers=workers, keep_in=file)
        with make_builder(folder / "out.bin", "mmap", len(dictionary)) as builder:
            summary = binarize_numbered(text, dictionary, builder)
            builder.finalize(folder / "out.idx")
    dataset = make_dataset(folder / "out", "mmap")
    return [dataset.read(i).tolist() for i in range(len(dataset))], summary


BOTH_WAYS = pytest.mark.parametrize("encode", [binarize, binarize_in_numbers])


def expected_of(text):
    """Encodes a text in the plainest way; returns the items and how many words are unknown."""
    ids = {word: i for i, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", *WORDS])}
    items, replaced = [], 0
    for line in io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8", newline=None):
        words = re.sub(r"\s+", " ", line).strip().split(" ")
        words = [] if words == [""] else words
        items.append([*(ids.get(word, 3) for word in words), 2])
        replaced += sum(word not in ids for word in words)
    return items, replaced


@BOTH_WAYS
@given(text=NASTY, chunk_bytes=st.sampled_from([1, 2, 3, 5, 8, 1 << 20]))
def test_any_text_in_any_chunks(folder, dictionary, encode, text, chunk_bytes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_file, "CHUNK_BYTES", chunk_bytes)
        items, summary = encode(folder, dictionary, text.encode())
    expected, replaced = expected_of(text)
    assert items == expected
    assert summary == BinarizeSummary(len(items), sum(map(len, items)), replaced)


@BOTH_WAYS
@pytest.mark.parametrize("workers", [1, 2, 3, 7])
@pytest.mark.parametrize(
    "text",
    [
        "a b\rb a\r\n\n a\u2028b <unk> zz\n" * 20 + "b",
        "a " * 300 + "\nb\nzz\n<pad>\n",
        "a b\r" * 50,
        "\r\n" * 20,
        " \n \r \r\n\x85 ",
    ],
)
def test_any_number_of_workers(folder, dictionary, monkeypatch, encode, workers, text):
    monkeypatch.setattr(text_file, "CHUNK_BYTES", 16)
    items, summary = encode(folder, dictionary, text.encode(), workers=workers)
    expected, replaced = expected_of(text)
    assert items == expected and summary.replaced == replaced


@pytest.mark.parametrize("workers", [1, 2])
def test_processes_that_forget_words(folder, dictionary, monkeypatch, workers):
    monkeypatch.setattr(text_file, "CHUNK_BYTES", 16)
    monkeypatch.setattr(text_encoding, "_MOST_WORDS", 2)
    text = "a b zz yy\nxx a\n" * 20
    items, _ = binarize_in_numbers(folder, dictionary, text.encode(), workers)
    assert items == expected_of(text)[0]


def test_characters_that_mark_the_ends_of_lines_may_stand_in_a_text(folder):
    words = list(text_encoding._MARKS[:12])
    dictionary = Dictionary()
    for word in words[6:]:
        dictionary.add_symbol(word)
    text = f"{' '.join(words[:6])}\n{' '.join(words[6:])}\n".encode()
    expected = [[3] * 6 + [2], [*range(4, 10), 2]]
    assert binarize(folder, dictionary, text)[0] == expected
    assert binarize_in_numbers(folder, dictionary, text)[0] == expected


def test_numbers_that_were_not_kept(folder):
    (folder / "text.txt").write_text("a b\n")
    with pytest.raises(ValueError, match="were not kept"):
        next(number_text(folder / "text.txt").chunks())


@pytest.mark.parametrize("chunk_bytes", [1, 4, 1 << 20])
def test_options(folder, dictionary, monkeypatch, chunk_bytes):
    monkeypatch.setattr(text_file, "CHUNK_BYTES", chunk_bytes)
    text = b"a b zz\n\nb a a"
    items, _ = binarize(folder, dictionary, text, append_eos=False)
    assert items == [[4, 5, 3], [], [5, 4, 4]]
    items, _ = binarize(folder, dictionary, text, reverse_order=True)
    assert items == [[3, 5, 4, 2], [2], [4, 4, 5, 2]]
    items, summary = binarize(folder, dictionary, text, tokenize=lambda line: list(line[::2]))
    assert items == [[4, 5, 3, 2], [2], [5, 4, 4, 2]] and summary.replaced == 1


def test_percentage():
    assert BinarizeSummary(1, 200, 3).percent_replaced == 1.5
    assert BinarizeSummary().percent_replaced == 0.0


class LetterDictionary(Dictionary):
    """Encodes letters, whatever the tokenizer says."""

    def encode_line(self, line, line_tokenizer=None, **options):
        return super().encode_line(line, line_tokenizer=list, **options)


def test_a_dictionary_with_an_encoding_of_its_own(folder, monkeypatch):
    monkeypatch.setattr(text_file, "CHUNK_BYTES", 1)
    dictionary = LetterDictionary()
    for letter in "abc":
        dictionary.add_symbol(letter)
    items, summary = binarize(folder, dictionary, b"ab\nbax")
    assert items == [[4, 5, 2], [5, 4, 3, 2]] and summary == BinarizeSummary(2, 7, 1)


def test_a_word_that_took_the_place_of_unk(folder):
    dictionary = Dictionary.load(io.StringIO("a 1\n<unk> 1 #fairseq:overwrite\n"))
    items, summary = binarize(folder, dictionary, b"a <unk> b\n")
    assert items == [[4, 5, 3, 2]] and summary.replaced == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_alignments(folder, monkeypatch, workers):
    monkeypatch.setattr(text_file, "CHUNK_BYTES", 8)
    path = folder / "align.txt"
    path.write_text("0-0 1-2 10-7\n\n3-0\n" * 5)
    with make_builder(folder / "align.bin", "mmap") as builder:
        assert binarize_alignments(path, builder, workers=workers) == 15
        builder.finalize(folder / "align.idx")
    dataset = make_dataset(folder / "align", "mmap")
    items = itertools.chain([[0, 0, 1, 2, 10, 7], [], [3, 0]] * 5)
    assert dataset.dtype == np.uint32
    assert [dataset.read(i).tolist() for i in range(len(dataset))] == list(items)


@pytest.mark.parametrize("pair", ["0", "0-", "a-b", "0-1-2", "-1-0"])
def test_what_is_no_alignment_is_named(folder, pair):
    path = folder / "align.txt"
    path.write_text(f"0-0 {pair}\n")
    with (
        make_builder(folder / "align.bin", "mmap") as builder,
        pytest.raises(ValueError, match=rf"align\.txt: found '{pair}'"),
    ):
        binarize_alignments(path, builder)
