"""How a line falls into tokens."""

import re
import sys

import pytest

from fairseq.tokenizer import post_process, tokenize_line


def test_every_code_point_separates_words_exactly_if_the_regular_expression_says_so():
    is_space = re.compile(r"\s").match
    for code_point in range(sys.maxunicode + 1):
        character = chr(code_point)
        expected = ["a", "b"] if is_space(character) else [f"a{character}b"]
        assert tokenize_line(f"a{character}b") == expected, hex(code_point)


def test_runs_of_space_and_spaces_at_the_ends_make_no_empty_tokens():
    assert tokenize_line(" \ta \u3000\xa0 b\x1c\n") == ["a", "b"]
    assert tokenize_line(" \t ") == []


@pytest.mark.parametrize(
    ("symbol", "sentence", "expected"),
    [
        (None, "a@@ b c", "a@@ b c"),
        ("none", "a@@ b c", "a@@ b c"),
        ("subword_nmt", "a@@ b c d@@", "ab c d"),
        ("@@ ", "a@@ b c", "ab c"),
        ("sentencepiece", "\u2581a b \u2581c", "ab c"),
        ("wordpiece", "_a b _c", " ab c"),
        ("letter", "a b | c |", "ab c "),
        ("_EOW", "a b_EOW c_EOW", "ab c "),
    ],
)
def test_pieces_are_joined(symbol, sentence, expected):
    assert post_process(sentence, symbol) == expected


def test_an_unknown_symbol_is_refused():
    with pytest.raises(NotImplementedError, match="sentencepiece"):
        post_process("a", "bytes")
