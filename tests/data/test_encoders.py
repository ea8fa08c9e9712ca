"""Tokenizers and subword encodings."""

import argparse
import json
import sys
import types

import pytest

from fairseq.data import encoders
from fairseq.registry import BPES, TOKENIZERS


def made(registry, name, **settings):
    config = registry.dataclass_of(name)
    section = argparse.Namespace(_name=name) if config is None else config(name, **settings)
    build = encoders.build_bpe if registry is BPES else encoders.build_tokenizer
    return build(section)


def test_none_is_chosen():
    assert encoders.build_bpe(None) is None
    assert encoders.build_tokenizer(argparse.Namespace(tokenizer=None)) is None


def test_space():
    assert made(TOKENIZERS, "space").encode("  a\tb ") == "a b"


def test_characters():
    bpe = made(BPES, "characters")
    assert bpe.encode("ab c") == "a b \u2581 c"
    assert bpe.decode("a b \u2581 c") == "ab c"


def test_sentencepiece(tmp_path):
    library = pytest.importorskip("sentencepiece")
    (tmp_path / "text").write_text("the cat sat on the mat\nthe dog sat\n" * 20)
    library.SentencePieceTrainer.Train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "m"), vocab_size=16,
        minloglevel=9,
    )  # fmt: skip
    bpe = made(BPES, "sentencepiece", sentencepiece_model=str(tmp_path / "m.model"))
    pieces = bpe.encode("the dog sat")
    assert bpe.decode(pieces) == "the dog sat" and "\u2581" in pieces
    assert bpe.is_beginning_of_word("\u2581the") and not bpe.is_beginning_of_word("og")


def write_bytes_bpe(folder):
    """Bytes a, b, c and a space, and two merges; written by hand."""
    vocab = {"a": 0, "b": 1, "c": 2, "\u0120": 3, "ab": 4, "\u0120c": 5}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n\u0120 c\n")
    return str(folder / "vocab.json"), str(folder / "merges.txt")


def test_byte_level(tmp_path):
    pytest.importorskip("tokenizers")
    vocab, merges = write_bytes_bpe(tmp_path)
    bpe = made(BPES, "hf_byte_bpe", bpe_vocab=vocab, bpe_merges=merges)
    assert bpe.encode("abc ca") == "ab c \u0120c a"
    assert bpe.decode("ab c \u0120c a") == "abc ca"
    assert bpe.is_beginning_of_word("\u0120c") and not bpe.is_beginning_of_word("ab")
    gpt2 = made(BPES, "gpt2", gpt2_encoder_json=vocab, gpt2_vocab_bpe=merges)
    assert gpt2.encode("abc ca") == "4 2 5 0"
    assert gpt2.decode("4 2 5 0") == "abc ca"
    assert gpt2.is_beginning_of_word("5") and not gpt2.is_beginning_of_word("4")


@pytest.mark.parametrize(
    ("registry", "name", "package", "module"),
    [
        (TOKENIZERS, "moses", "sacremoses", "sacremoses"),
        (TOKENIZERS, "nltk", "nltk", "nltk.tokenize"),
        (BPES, "subword_nmt", "subword-nmt", "subword_nmt.apply_bpe"),
        (BPES, "sentencepiece", "sentencepiece", "sentencepiece"),
        (BPES, "hf_byte_bpe", "tokenizers", "tokenizers"),
    ],
)
def test_a_missing_library_is_named(registry, name, package, module, tmp_path, monkeypatch):
    vocab, merges = write_bytes_bpe(tmp_path)
    settings = {
        "subword_nmt": {"bpe_codes": merges},
        "sentencepiece": {"sentencepiece_model": merges},
        "hf_byte_bpe": {"bpe_vocab": vocab, "bpe_merges": merges},
    }.get(name, {})
    monkeypatch.setitem(sys.modules, module.partition(".")[0], None)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f"pip install {package}"):
        made(registry, name, **settings)


def test_moses_is_called_as_its_library_wants(monkeypatch):
    calls = []

    class Splitter:
        def __init__(self, lang):
            self.lang = lang

        def tokenize(self, text, **options):
            calls.append((self.lang, options))
            return text.replace(",", " ,")

        def detokenize(self, words):
            return " ".join(words).replace(" ,", ",")

    library = types.ModuleType("sacremoses")
    library.MosesTokenizer = library.MosesDetokenizer = Splitter
    monkeypatch.setitem(sys.modules, "sacremoses", library)
    moses = made(TOKENIZERS, "moses", source_lang="de", moses_no_dash_splits=True)
    assert moses.encode("a, b") == "a , b" and moses.decode("a , b") == "a, b"
    expected = {"aggressive_dash_splits": False, "return_str": True, "escape": True}
    assert calls == [("de", expected)]


def test_moses():
    pytest.importorskip("sacremoses", reason="pip install sacremoses")
    text = 'Hello, world! It\'s a well-known "fact" & more [x].'
    moses = made(TOKENIZERS, "moses")
    assert moses.encode(text) == (
        "Hello , world ! It &apos;s a well @-@ known &quot; fact &quot; &amp; more &#91; x &#93; ."
    )
    assert moses.decode(moses.encode(text)) == text
    plain = made(TOKENIZERS, "moses", moses_no_dash_splits=True, moses_no_escape=True)
    assert plain.encode(text) == 'Hello , world ! It \'s a well-known " fact " & more [ x ] .'
    assert plain.decode(plain.encode(text)) == text


def test_subword_nmt(tmp_path):
    pytest.importorskip("subword_nmt", reason="pip install subword-nmt")
    codes = tmp_path / "codes"
    codes.write_text("#version: 0.2\nl o\nw e\nlo w</w>\nwe r</w>\n")
    bpe = made(BPES, "subword_nmt", bpe_codes=str(codes))
    assert bpe.encode("low lower new") == "low lo@@ wer n@@ e@@ w"
    assert bpe.decode("low lo@@ wer n@@ e@@ w") == "low lower new"
    other = made(BPES, "subword_nmt", bpe_codes=str(codes), bpe_separator="##")
    assert other.encode("lower") == "lo## wer" and other.decode("lo## wer") == "lower"


def test_nltk(monkeypatch, tmp_path):
    nltk = pytest.importorskip("nltk", reason="pip install nltk")
    tokenizer = made(TOKENIZERS, "nltk")
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    with pytest.raises(FileNotFoundError, match=r"python -m nltk\.downloader punkt_tab"):
        tokenizer.encode("Hello, world.")
    # Splitting sentences needs that data; splitting one into words does not.
    words = nltk.tokenize.word_tokenize
    monkeypatch.setattr(
        nltk.tokenize, "word_tokenize", lambda text: words(text, preserve_line=True)
    )
    assert tokenizer.encode("It isn't, (really).") == "It is n't , ( really ) ."


@pytest.mark.parametrize(
    ("name", "settings", "error", "message"),
    [
        ("sentencepiece", {}, ValueError, "--sentencepiece-model is needed"),
        ("subword_nmt", {"bpe_codes": "nowhere"}, FileNotFoundError, "--bpe-codes: there is no"),
        ("gpt2", {}, ValueError, "--gpt2-encoder-json is needed"),
    ],
)
def test_files_that_are_missing(name, settings, error, message):
    with pytest.raises(error, match=message):
        made(BPES, name, **settings)


def test_names_that_do_not_exist():
    with pytest.raises(ValueError, match="unknown bpe 'sentencepeice'; known are sentencepiece"):
        encoders.build_bpe("sentencepeice")
    with pytest.raises(ValueError, match="is not supported"):
        encoders.build_bpe("fastbpe")
