"""The vocabulary and its file."""

import io
import subprocess
import sys

import numpy as np
import pytest
import torch

from fairseq.data import Dictionary, TruncatedDictionary, text_file
from fairseq.data.dictionary import DuplicateWordError, dummy_dictionary

TEXT = "b a a \n\nc\xa0d <unk> é\rx y\r\n a\x1cq <s> </s>\n z"
"""Six lines; the expectations on it were found by running the original with one worker."""


@pytest.fixture
def text_path(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT.encode())
    return path


@pytest.fixture
def counted(text_path):
    dictionary = Dictionary()
    Dictionary.add_file_to_dictionary(text_path, dictionary)
    return dictionary


def of_words(**counts):
    dictionary = Dictionary()
    for word, count in counts.items():
        dictionary.add_symbol(word, count)
    return dictionary


def load(text):
    return Dictionary.load(io.StringIO(text))


def test_special_words_come_first_with_count_one():
    dictionary = Dictionary()
    ids = dictionary.bos(), dictionary.pad(), dictionary.eos(), dictionary.unk()
    assert ids == (0, 1, 2, 3)
    assert dictionary.symbols == ["<s>", "<pad>", "</s>", "<unk>"]
    assert dictionary.count == [1, 1, 1, 1] and dictionary.nspecial == 4
    more = Dictionary(bos="B", extra_special_symbols=["<mask>"])
    assert more.index("<mask>") == 4 and more.nspecial == 5 and more[0] == "B"


def test_counts_of_a_text(counted):
    counts = dict(zip(counted.symbols, counted.count, strict=True))
    assert counts == {
        **{"<s>": 2, "<pad>": 1, "</s>": 8, "<unk>": 2},
        **{"a": 3, "b": 1, "c": 1, "d": 1, "q": 1, "x": 1, "y": 1, "z": 1, "é": 1},
    }


@pytest.mark.parametrize("chunk_bytes", [1, 2, 5, 11])
@pytest.mark.parametrize("workers", [1, 3])
def test_counts_depend_on_neither_chunks_nor_workers(
    counted, text_path, monkeypatch, chunk_bytes, workers
):
    monkeypatch.setattr(text_file, "CHUNK_BYTES", chunk_bytes)
    dictionary = Dictionary()
    Dictionary.add_file_to_dictionary(text_path, dictionary, num_workers=workers)
    assert (dictionary.symbols, dictionary.count) == (counted.symbols, counted.count)


def test_another_tokenizer_counts_by_lines(text_path, monkeypatch):
    monkeypatch.setattr(text_file, "CHUNK_BYTES", 1)
    dictionary = Dictionary()
    Dictionary.add_file_to_dictionary(text_path, dictionary, tokenize=lambda line: [line])
    assert dictionary.symbols[4:] == sorted(
        ["", " a\x1cq <s> </s>", " z", "b a a ", "c\xa0d <unk> é", "x y"]
    )
    assert dictionary.count[dictionary.eos()] == 1 + 6


def test_finalize_sorts_by_count_then_code_point_and_pads(counted):
    counted.finalize()
    assert counted.symbols[4:] == [
        *"abcdqxyzé",
        *("madeupword0000", "madeupword0001", "madeupword0002"),
    ]
    assert len(counted) == 16 and counted.count[13:] == [0, 0, 0]


def test_encoding(counted):
    counted.finalize()
    lines = ["b a a ", "", "c\xa0d <unk> é", "x y", " a\x1cq <s> </s>", " z"]
    assert [counted.encode_ids(line).tolist() for line in lines] == [
        *([5, 4, 4, 2], [2], [6, 7, 3, 12, 2], [9, 10, 2], [4, 8, 0, 2, 2], [11, 2]),
    ]
    encoded = counted.encode_line("b  <s> zz a </s> <pad>", add_if_not_exist=False)
    assert encoded.dtype == torch.int32 and encoded.tolist() == [5, 0, 3, 4, 2, 1, 2]


def test_encoding_options():
    dictionary = of_words(a=1, b=1)
    seen = []
    options = {"reverse_order": True, "append_eos": False}
    ids = dictionary.encode_ids(["a", "b", "c"], consumer=lambda *e: seen.append(e), **options)
    assert ids.tolist() == [3, 5, 4] and ids.dtype == np.int32
    assert seen == [("c", 3), ("b", 5), ("a", 4)]
    assert dictionary.encode_line("c-a", lambda line: line.split("-")).tolist() == [6, 4, 2]
    assert dictionary.index("c") == 6


def test_threshold_and_size_hold_before_padding():
    dictionary = of_words(e=1, d=2, c=2, b=3, a=5)
    dictionary.finalize(threshold=2, nwords=7, padding_factor=6)
    assert dictionary.symbols[4:] == ["a", "b", "c", *(f"madeupword000{n}" for n in range(5))]
    dictionary = of_words(e=1, d=2)
    dictionary.finalize(threshold=2, padding_factor=1)
    assert dictionary.symbols[4:] == ["d"]
    dictionary.finalize(nwords=2, padding_factor=0)
    assert len(dictionary) == 4


def test_padding_passes_over_words_that_exist():
    dictionary = of_words(madeupword0000=2, a=1)
    dictionary.finalize(padding_factor=8)
    assert dictionary.symbols[4:] == ["madeupword0000", "a", "madeupword0001", "madeupword0002"]


def test_lookup():
    dictionary = of_words(a=7)
    assert dictionary.index("a") == 4 and dictionary.index("b") == 3
    assert dictionary[4] == "a" and dictionary[5] == "<unk>"
    assert "a" in dictionary and "b" not in dictionary
    assert dictionary.get_count(4) == 7
    with pytest.raises(TypeError, match="string"):
        dictionary.index(4)


def test_equality_is_that_of_the_ids():
    assert of_words(a=1) == of_words(a=2)
    assert of_words(a=1, b=1) != of_words(b=1, a=1)
    assert of_words() != 4


def test_update_adds_counts_and_new_words():
    dictionary = of_words(a=1, b=2)
    dictionary.update(of_words(c=3, a=4))
    assert dictionary.symbols[4:] == ["a", "b", "c"] and dictionary.count[4:] == [5, 2, 3]
    assert dictionary.count[0] == 2


@pytest.mark.parametrize("make", [torch.tensor, np.array, list])
def test_text_of_ids(make):
    dictionary = of_words(**{"a@@": 1, "b": 1})
    ids = make([0, 4, 5, 3, 1, 2])
    assert dictionary.string(ids) == "a@@ b <unk> <pad>"
    assert dictionary.string(ids, bpe_symbol="@@ ") == "ab <unk> <pad>"
    assert dictionary.string(ids, escape_unk=True) == "a@@ b <<unk>> <pad>"
    assert dictionary.string(ids, unk_string="?") == "a@@ b ? <pad>"
    assert dictionary.string(ids, extra_symbols_to_ignore=[1, 5]) == "a@@ <unk>"
    assert dictionary.string(ids, include_eos=True) == "a@@ b <unk> <pad> </s>"
    assert dictionary.string(ids, separator="|") == "a@@|b|<unk>|<pad>"
    assert dictionary.string(make([[4, 2], [5, 2]])) == "a@@\nb"
    assert dictionary.string(make([])) == ""


def test_file_of_words_and_counts(tmp_path):
    dictionary = of_words(**{"b": 2, "a": 2, "\u2581é": 1, " ": 1})
    dictionary.save(tmp_path / "new" / "dict.txt")
    written = (tmp_path / "new" / "dict.txt").read_bytes()
    assert written == "b 2\na 2\n\u2581é 1\n  1\n".encode()
    read = Dictionary.load(tmp_path / "new" / "dict.txt")
    assert (read.symbols, read.count) == (dictionary.symbols, dictionary.count)
    buffer = io.StringIO()
    read.save(buffer)
    assert buffer.getvalue().encode() == written


def test_reading_takes_any_line_end_and_needs_none_at_the_end(tmp_path):
    (tmp_path / "dict.txt").write_bytes(b"a 1\r\nb 2 \rc\xc2\x85d 3")
    dictionary = Dictionary.load(tmp_path / "dict.txt")
    assert dictionary.symbols[4:] == ["a", "b", "c\x85d"] and dictionary.count[4:] == [1, 2, 3]


def test_a_word_may_have_spaces_inside():
    dictionary = load("  999\nNew York 7\n")
    assert dictionary.index(" ") == 4 and dictionary.index("New York") == 5


def test_overwriting():
    dictionary = load(
        "<unk> 999 #fairseq:overwrite\n<s> 999 #fairseq:overwrite\n</s> 999 #fairseq:overwrite\n"
        ", 999\n\u2581de 999\n"
    )
    assert [dictionary.index(word) for word in ("<unk>", "<s>", "</s>", ",")] == [4, 5, 6, 7]
    assert dictionary.index("<pad>") == 1 and len(dictionary) == 9
    assert dictionary.unk() == 3


def test_duplicates_are_refused(tmp_path):
    (tmp_path / "dict.txt").write_text("a 1\nb 1\na 2\n")
    with pytest.raises(DuplicateWordError) as raised:
        Dictionary.load(tmp_path / "dict.txt")
    message = str(raised.value)
    assert message.startswith("Duplicate word found when loading Dictionary: 'a'.")
    assert "dict.txt, line 3" in message and "#fairseq:overwrite" in message
    assert isinstance(raised.value, RuntimeError) and isinstance(raised.value, ValueError)
    with pytest.raises(DuplicateWordError, match="'<s>'"):
        load("<s> 1\n")


@pytest.mark.parametrize("line", ["a", "", "a b", "a 1.5", "a 1 #fairseq:overwritten", "\ufeff"])
def test_a_line_of_another_form_is_named(tmp_path, line):
    (tmp_path / "dict.txt").write_text(f"ok 1\n{line}\n", encoding="utf-8")
    with pytest.raises(ValueError) as raised:
        Dictionary.load(tmp_path / "dict.txt")
    message = str(raised.value)
    assert "Incorrect dictionary format, expected '<token> <cnt> [flags]'" in message
    assert "dict.txt, line 2" in message and repr(line) in message


def test_files_that_are_no_dictionary(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"):
        Dictionary.load(tmp_path / "missing.txt")
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match=r"empty\.txt is empty"):
        Dictionary.load(tmp_path / "empty.txt")
    (tmp_path / "binary.txt").write_bytes(b"a 1\n\x80\n")
    with pytest.raises(ValueError, match=r"binary.txt: not UTF-8 at byte 4 .*rebuild the dataset"):
        Dictionary.load(tmp_path / "binary.txt")


def test_special_words_may_stand_in_the_file():
    text = "<pad> 1\n<s> 2\na 3\n</s> 4\n<unk> 5\n"
    dictionary = Dictionary.load(io.StringIO(text), add_special_symbols=False)
    ids = dictionary.bos(), dictionary.pad(), dictionary.eos(), dictionary.unk()
    assert ids == (1, 0, 3, 4) and dictionary.index("zz") == 4
    buffer = io.StringIO()
    dictionary.save(buffer)
    assert buffer.getvalue() == text
    with pytest.raises(ValueError, match="no line for the special word </s>"):
        Dictionary.load(io.StringIO("<s> 1\n<pad> 1\n"), add_special_symbols=False)


def test_truncated_dictionary():
    whole = of_words(a=1, b=1, c=1)
    truncated = TruncatedDictionary(whole, 6)
    assert len(truncated) == 6 and len(whole) == 7
    assert truncated[5] == "b" and truncated[6] == "<unk>"
    assert truncated.string([4, 6]) == "a <unk>"
    assert truncated.eos() == 2 and truncated.index("c") == 6
    assert len(TruncatedDictionary(whole, 100)) == 7


def test_dummy_dictionary():
    dictionary = dummy_dictionary(3)
    assert dictionary.symbols[4:] == ["token_0", "token_1", "token_2"]


def test_the_package_face_needs_no_torch():
    code = (
        "import sys, fairseq.data\n"
        "from fairseq.data import Dictionary, indexed_dataset\n"
        "Dictionary().finalize()\n"
        "assert 'torch' not in sys.modules\n"
        "try:\n    fairseq.data.NoSuchThing\n"
        "except AttributeError:\n    print('done')\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "done\n", result.stderr


def test_the_package_face_has_what_it_lists():
    import fairseq.data

    for name in fairseq.data.__all__:
        assert getattr(fairseq.data, name) is not None
