"""Byte pair encoding by the library subword-nmt (Sennrich et al. 2016)."""

from __future__ import annotations

from dataclasses import dataclass, field

from fairseq.data.encoders.libraries import load_library, needed_file
from fairseq.dataclass import FairseqDataclass
from fairseq.registry import BPES
from fairseq.tokenizer import post_process

__all__ = ["SubwordNMTBPE", "SubwordNMTConfig"]


@dataclass
class SubwordNMTConfig(FairseqDataclass):
    """Settings of `subword_nmt`."""

    bpe_codes: str | None = field(default=None, metadata={"help": "file of the merges"})
    bpe_separator: str = field(
        default="@@", metadata={"help": "what marks a piece that the word goes on after"}
    )


@BPES.register("subword_nmt", dataclass=SubwordNMTConfig)
class SubwordNMTBPE:
    """Segments words by a list of merges.

    Raises:
        ValueError: no merges are given.
        FileNotFoundError: their file is not there.
        ImportError: subword-nmt is not installed.
    """

    def __init__(self, cfg: SubwordNMTConfig) -> None:
        path = needed_file(cfg.bpe_codes, "--bpe-codes")
        library = load_library("subword_nmt.apply_bpe", "subword-nmt", "--bpe subword_nmt")
        self._mark = cfg.bpe_separator + " "
        with open(path, encoding="utf-8") as codes:
            self._bpe = library.BPE(codes, separator=cfg.bpe_separator)

    def encode(self, text: str) -> str:
        """Returns the pieces of a text, separated by single spaces."""
        pieces: str = self._bpe.process_line(text)
        return pieces

    def decode(self, text: str) -> str:
        """Joins pieces to words."""
        if self._mark == "@@ ":
            return post_process(text, "subword_nmt")
        return (text + " ").replace(self._mark, "").rstrip()
