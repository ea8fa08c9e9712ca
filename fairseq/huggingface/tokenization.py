"""A dictionary of this project as a tokenizer of transformers."""

from __future__ import annotations

import os
from typing import Any

from transformers import PreTrainedTokenizer

from fairseq.data.dictionary import Dictionary
from fairseq.export import DICTIONARY_FILE
from fairseq.tokenizer import tokenize_line

__all__ = ["FairseqAlibiTokenizer"]


class FairseqAlibiTokenizer(PreTrainedTokenizer):
    """Words between blanks, as fairseq-preprocess reads text.

    The end of a line is `</s>`; no further symbols are added. A word that the dictionary does not
    know is `<unk>`.

    Args:
        vocab_file: a `dict.txt`.
        **kwargs: for the base class.
    """

    vocab_files_names = {"vocab_file": DICTIONARY_FILE}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(self, vocab_file: str, **kwargs: Any) -> None:
        self.dictionary = Dictionary.load(vocab_file)
        special = {
            "bos_token": self.dictionary.eos_word,
            "eos_token": self.dictionary.eos_word,
            "unk_token": self.dictionary.unk_word,
            "pad_token": self.dictionary.pad_word,
            # Words that look like special ones are words, as they are when text is binarized.
            "split_special_tokens": True,
            "clean_up_tokenization_spaces": False,
        }
        super().__init__(**{**special, **kwargs})

    @property
    def vocab_size(self) -> int:
        """Number of symbols."""
        return len(self.dictionary)

    def get_vocab(self) -> dict[str, int]:
        """Returns word -> id."""
        return {**self.dictionary.indices, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        words: list[str] = []
        for number, line in enumerate(text.split("\n")):
            if number:
                words.append(self.dictionary.eos_word)
            words += tokenize_line(line)
        return words

    def _convert_token_to_id(self, token: str) -> int:
        return self.dictionary.index(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self.dictionary[index]

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Returns the ids as they are, one text after the other."""
        return [*token_ids_0, *(token_ids_1 or [])]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Joins words by blanks; the end of a line is a line end."""
        lines = " ".join(tokens).split(self.dictionary.eos_word)
        return "\n".join(line.strip() for line in lines)

    def save_vocabulary(
        self, save_directory: str, filename_prefix: str | None = None
    ) -> tuple[str, ...]:
        """Writes the dictionary; returns its path."""
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        path = os.path.join(save_directory, prefix + DICTIONARY_FILE)
        self.dictionary.save(path)
        return (path,)
