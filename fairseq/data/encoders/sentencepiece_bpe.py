"""Pieces of the library sentencepiece."""

from __future__ import annotations

from dataclasses import dataclass, field

from fairseq.data.encoders.libraries import load_library, needed_file
from fairseq.dataclass import FairseqDataclass
from fairseq.registry import BPES
from fairseq.tokenizer import post_process

__all__ = ["SentencepieceBPE", "SentencepieceConfig"]


@dataclass
class SentencepieceConfig(FairseqDataclass):
    """Settings of `sentencepiece`."""

    sentencepiece_model: str | None = field(
        default=None, metadata={"help": "model file of sentencepiece"}
    )


@BPES.register("sentencepiece", dataclass=SentencepieceConfig)
class SentencepieceBPE:
    """Segments text by a model of sentencepiece.

    Raises:
        ValueError: no model is given.
        FileNotFoundError: it is not there.
        ImportError: sentencepiece is not installed.
    """

    def __init__(self, cfg: SentencepieceConfig) -> None:
        path = needed_file(cfg.sentencepiece_model, "--sentencepiece-model")
        library = load_library("sentencepiece", "sentencepiece", "--bpe sentencepiece")
        self._model = library.SentencePieceProcessor()
        self._model.Load(path)

    def encode(self, text: str) -> str:
        """Returns the pieces of a text, separated by single spaces."""
        return " ".join(self._model.EncodeAsPieces(text))

    def decode(self, text: str) -> str:
        """Joins pieces to text."""
        return post_process(text, "sentencepiece")

    def is_beginning_of_word(self, piece: str) -> bool:
        """Tells whether a piece is the first of a word, or a special symbol."""
        return piece in ("<unk>", "<s>", "</s>", "<pad>") or piece.startswith("\u2581")
