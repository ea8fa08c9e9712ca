"""The word tokenizer of the library NLTK."""

from __future__ import annotations

from typing import Any

from fairseq.data.encoders.libraries import load_library
from fairseq.registry import TOKENIZERS

__all__ = ["NLTKTokenizer"]


@TOKENIZERS.register("nltk")
class NLTKTokenizer:
    """Splits text by `nltk.tokenize.word_tokenize`; nothing joins it again.

    Raises:
        ImportError: nltk is not installed.
    """

    def __init__(self, cfg: Any = None) -> None:
        self._module = load_library("nltk.tokenize", "nltk", "--tokenizer nltk")

    def encode(self, text: str) -> str:
        """Returns the words of a line, separated by single spaces.

        Raises:
            FileNotFoundError: the library lacks the data that it splits sentences by.
        """
        try:
            return " ".join(self._module.word_tokenize(text))
        except LookupError as error:
            raise FileNotFoundError(
                "--tokenizer nltk needs data of NLTK's: python -m nltk.downloader punkt_tab"
            ) from error

    def decode(self, text: str) -> str:
        """Returns the text as it is."""
        return text
