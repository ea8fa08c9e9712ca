"""The tokenizer of the Moses toolkit, by the library sacremoses."""

from __future__ import annotations

from dataclasses import dataclass, field

from fairseq.data.encoders.libraries import load_library
from fairseq.dataclass import FairseqDataclass
from fairseq.registry import TOKENIZERS

__all__ = ["MosesTokenizer", "MosesTokenizerConfig"]


@dataclass
class MosesTokenizerConfig(FairseqDataclass):
    """Settings of `moses`."""

    source_lang: str = field(default="en", metadata={"help": "language of the text that is read"})
    target_lang: str = field(
        default="en", metadata={"help": "language of the text that is written"}
    )
    moses_no_dash_splits: bool = field(
        default=False, metadata={"help": "leave hyphens inside of words alone"}
    )
    moses_no_escape: bool = field(
        default=False, metadata={"help": "write quotes and brackets as they are"}
    )


@TOKENIZERS.register("moses", dataclass=MosesTokenizerConfig)
class MosesTokenizer:
    """Splits text into words by rules for its language.

    Raises:
        ImportError: sacremoses is not installed.
    """

    def __init__(self, cfg: MosesTokenizerConfig) -> None:
        library = load_library("sacremoses", "sacremoses", "--tokenizer moses")
        self.cfg = cfg
        self._tokenizer = library.MosesTokenizer(cfg.source_lang or "en")
        self._detokenizer = library.MosesDetokenizer(cfg.target_lang or "en")

    def encode(self, text: str) -> str:
        """Returns the words of a line, separated by single spaces."""
        words: str = self._tokenizer.tokenize(
            text,
            aggressive_dash_splits=not self.cfg.moses_no_dash_splits,
            return_str=True,
            escape=not self.cfg.moses_no_escape,
        )
        return words

    def decode(self, text: str) -> str:
        """Joins words to text."""
        joined: str = self._detokenizer.detokenize(text.split())
        return joined
