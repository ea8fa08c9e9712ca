"""Byte pair encoding of bytes, as of GPT-2, by the library tokenizers."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from fairseq.data.encoders.libraries import load_library, needed_file
from fairseq.dataclass import FairseqDataclass
from fairseq.registry import BPES

__all__ = ["GPT2BPE", "GPT2BPEConfig", "HuggingFaceByteLevelBPE", "HuggingFaceByteLevelBPEConfig"]


@dataclass
class HuggingFaceByteLevelBPEConfig(FairseqDataclass):
    """Settings of `hf_byte_bpe`."""

    bpe_merges: str | None = field(default=None, metadata={"help": "merges.txt"})
    bpe_vocab: str | None = field(default=None, metadata={"help": "vocab.json"})
    bpe_add_prefix_space: bool = field(
        default=False, metadata={"help": "put a space before the first word"}
    )


@BPES.register("hf_byte_bpe", dataclass=HuggingFaceByteLevelBPEConfig)
class HuggingFaceByteLevelBPE:
    """Segments text into pieces of bytes, and writes each piece with one character for a byte.

    Raises:
        ValueError: a file is not given.
        FileNotFoundError: it is not there.
        ImportError: tokenizers is not installed.
    """

    def __init__(self, cfg: HuggingFaceByteLevelBPEConfig) -> None:
        self._bpe = _load(
            needed_file(cfg.bpe_vocab, "--bpe-vocab"),
            needed_file(cfg.bpe_merges, "--bpe-merges"),
            "--bpe hf_byte_bpe",
            cfg.bpe_add_prefix_space,
        )

    def encode(self, text: str) -> str:
        """Returns the pieces of a text, separated by single spaces."""
        return " ".join(self._bpe.encode(text).tokens)

    def decode(self, text: str) -> str:
        """Joins pieces to text."""
        ids = [self._bpe.token_to_id(piece) for piece in text.split()]
        joined: str = self._bpe.decode([each for each in ids if each is not None])
        return joined

    def is_beginning_of_word(self, piece: str) -> bool:
        """Tells whether a piece starts with a space."""
        return self.decode(piece).startswith(" ")


@dataclass
class GPT2BPEConfig(FairseqDataclass):
    """Settings of `gpt2`."""

    gpt2_encoder_json: str | None = field(default=None, metadata={"help": "encoder.json"})
    gpt2_vocab_bpe: str | None = field(default=None, metadata={"help": "vocab.bpe"})


@BPES.register("gpt2", dataclass=GPT2BPEConfig)
class GPT2BPE:
    """Segments text as GPT-2 does, and writes each piece as its number.

    Raises:
        ValueError: a file is not given.
        FileNotFoundError: it is not there.
        ImportError: tokenizers is not installed.
    """

    def __init__(self, cfg: GPT2BPEConfig) -> None:
        self._bpe = _load(
            needed_file(cfg.gpt2_encoder_json, "--gpt2-encoder-json"),
            needed_file(cfg.gpt2_vocab_bpe, "--gpt2-vocab-bpe"),
            "--bpe gpt2",
        )

    def encode(self, text: str) -> str:
        """Returns the numbers of the pieces, separated by single spaces."""
        return " ".join(map(str, self._bpe.encode(text).ids))

    def decode(self, text: str) -> str:
        """Joins pieces, given by their numbers, to text; other words stand for themselves."""
        joined = ""
        ids: list[int] = []
        for word in text.split():
            if word.isdecimal():
                ids.append(int(word))
            else:
                joined, ids = joined + self._bpe.decode(ids) + word, []
        return joined + str(self._bpe.decode(ids))

    def is_beginning_of_word(self, piece: str) -> bool:
        """Tells whether the piece of that number starts with a space."""
        return self.decode(piece).startswith(" ")


def _load(vocab: str, merges: str, flag: str, add_prefix_space: bool = False) -> Any:
    library = load_library("tokenizers", "tokenizers", flag)
    with open(vocab, encoding="utf-8") as file:
        words: dict[str, int] = json.load(file)
    with open(merges, encoding="utf-8") as file:
        lines = [line.rstrip("\n") for line in file if not line.startswith("#version")]
    pairs = [tuple(line.split(" ")) for line in lines if line]
    bpe = library.Tokenizer(library.models.BPE(vocab=words, merges=pairs))
    bpe.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    bpe.decoder = library.decoders.ByteLevel()
    return bpe
