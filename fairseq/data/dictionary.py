"""The vocabulary: words, their ids and counts, and the file `dict.txt`.

Ids 0 to 3 are `<s>`, `<pad>`, `</s>` and `<unk>`; they stand in no file. `dict.txt` has one line
`word count` per further word, most frequent first, words of equal count by code point.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from fairseq.data.text_encoding import NumberedText, number_text
from fairseq.data.text_file import split_lines
from fairseq.tokenizer import post_process, tokenize_line

if TYPE_CHECKING:
    import torch

__all__ = ["Dictionary", "DuplicateWordError", "TruncatedDictionary", "dummy_dictionary"]

_OVERWRITE = "#fairseq:overwrite"

Tokenizer = Callable[[str], list[str]]


class DuplicateWordError(ValueError, RuntimeError):
    """A word stands twice in a dictionary file. A RuntimeError too, as in the original."""


class Dictionary:
    """A mapping from words to consecutive ids.

    Args:
        bos: spelling of the beginning of a sentence.
        pad: spelling of padding.
        eos: spelling of the end of a sentence.
        unk: spelling of every word that has no id.
        extra_special_symbols: further words that stand in no file.
        add_special_symbols: False: the four special words are looked for in the file instead.
    """

    def __init__(
        self,
        *,
        bos: str = "<s>",
        pad: str = "<pad>",
        eos: str = "</s>",
        unk: str = "<unk>",
        extra_special_symbols: Iterable[str] | None = None,
        add_special_symbols: bool = True,
    ) -> None:
        self.bos_word, self.pad_word, self.eos_word, self.unk_word = bos, pad, eos, unk
        self.symbols: list[str] = []
        self.count: list[int] = []
        self.indices: dict[str, int] = {}
        self.bos_index, self.pad_index, self.eos_index, self.unk_index = range(4)
        if add_special_symbols:
            for word in (bos, pad, eos, unk, *(extra_special_symbols or ())):
                self.add_symbol(word)
        self.nspecial = len(self.symbols)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Dictionary) and self.indices == other.indices

    __hash__ = None  # type: ignore[assignment]

    def __getitem__(self, index: int) -> str:
        """Returns the word with an id, the spelling of unknown words if there is none."""
        return self.symbols[index] if 0 <= index < len(self.symbols) else self.unk_word

    def __len__(self) -> int:
        return len(self.symbols)

    def __contains__(self, word: object) -> bool:
        return word in self.indices

    def get_count(self, index: int) -> int:
        """Returns how often the word with an id was counted."""
        return self.count[index]

    def index(self, word: str) -> int:
        """Returns the id of a word, that of unknown words if it has none.

        Raises:
            TypeError: `word` is no string.
        """
        if not isinstance(word, str):
            raise TypeError(f"a word is a string, not {word!r}; dictionary[id] finds a word")
        return self.indices.get(word, self.unk_index)

    def bos(self) -> int:
        """Returns the id of the beginning of a sentence."""
        return self.bos_index

    def pad(self) -> int:
        """Returns the id of padding."""
        return self.pad_index

    def eos(self) -> int:
        """Returns the id of the end of a sentence."""
        return self.eos_index

    def unk(self) -> int:
        """Returns the id of unknown words."""
        return self.unk_index

    def unk_string(self, escape: bool = False) -> str:
        """Returns the spelling of unknown words; escaped, it differs from the word in a text."""
        return f"<{self.unk_word}>" if escape else self.unk_word

    def string(
        self,
        tensor: torch.Tensor | np.ndarray | Sequence[Any],
        bpe_symbol: str | None = None,
        escape_unk: bool = False,
        extra_symbols_to_ignore: Iterable[int] | None = None,
        unk_string: str | None = None,
        include_eos: bool = False,
        separator: str = " ",
    ) -> str:
        """Returns the text that ids stand for, one line per row.

        Args:
            tensor: ids, one row or several.
            bpe_symbol: what `fairseq.tokenizer.post_process` takes to join the pieces of words.
            escape_unk: print unknown words as `<<unk>>`.
            extra_symbols_to_ignore: ids to leave out, as those of the beginning and end are.
            unk_string: print unknown words so.
            include_eos: do print the ends of sentences.
            separator: what stands between words.
        """
        ids = tensor.tolist() if hasattr(tensor, "tolist") else list(tensor)
        if ids and np.ndim(ids[0]) > 0:
            options = (bpe_symbol, escape_unk, extra_symbols_to_ignore, unk_string, include_eos)
            return "\n".join(self.string(row, *options, separator) for row in ids)
        left_out = {self.bos_index, *(extra_symbols_to_ignore or ())}
        if not include_eos:
            left_out.add(self.eos_index)
        unknown = self.unk_string(escape_unk) if unk_string is None else unk_string
        words = (
            unknown if index == self.unk_index else self[index]
            for index in map(int, ids)
            if index not in left_out
        )
        return post_process(separator.join(words), bpe_symbol)

    def add_symbol(self, word: str, n: int = 1, overwrite: bool = False) -> int:
        """Adds to the count of a word, giving it an id first if it has none; returns the id.

        Args:
            word: any string.
            n: how often it was seen.
            overwrite: give a word that has an id already a new one; the old entry stays.
        """
        if word in self.indices and not overwrite:
            index = self.indices[word]
            self.count[index] += n
            return index
        index = len(self.symbols)
        self.indices[word] = index
        self.symbols.append(word)
        self.count.append(n)
        return index

    def update(self, new_dict: Dictionary) -> None:
        """Adds the words and counts of another dictionary, new words in its order."""
        for word, index in new_dict.indices.items():
            self.add_symbol(word, new_dict.count[index])

    def finalize(self, threshold: int = -1, nwords: int = -1, padding_factor: int = 8) -> None:
        """Sorts the words by count, falling, then by code point; drops rare ones; pads the size.

        Args:
            threshold: words seen less often are dropped.
            nwords: most words to keep, the special ones included; not positive: all.
            padding_factor: the size becomes a multiple of it; 1 or less: no padding.
        """
        if nwords <= 0:
            nwords = len(self)
        specials = list(zip(self.symbols, self.count, strict=True))[: self.nspecial]
        others = dict(
            sorted(zip(self.symbols[self.nspecial :], self.count[self.nspecial :], strict=True))
        )
        ranked = sorted(others.items(), key=lambda entry: entry[1], reverse=True)
        ranked = ranked[: max(0, nwords - self.nspecial)]
        kept = [entry for entry in ranked if entry[1] >= threshold]
        self.symbols = [word for word, _ in specials + kept]
        self.count = [count for _, count in specials + kept]
        self.indices = {word: index for index, word in enumerate(self.symbols)}
        self.pad_to_multiple_(padding_factor)

    def pad_to_multiple_(self, padding_factor: int) -> None:
        """Adds words `madeupword0000`, ... until the size is a multiple of the factor."""
        number = 0
        while padding_factor > 1 and len(self) % padding_factor != 0:
            self.add_symbol(f"madeupword{number:04d}", n=0)
            number += 1

    @classmethod
    def load(cls, f: str | Path | IO[str], add_special_symbols: bool = True) -> Dictionary:
        """Reads a dictionary file.

        Args:
            f: path or open text file.
            add_special_symbols: False: the file itself has the four special words.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is empty, not UTF-8, or has a line of another form.
            DuplicateWordError: a word stands there twice.
        """
        dictionary = cls(add_special_symbols=add_special_symbols)
        dictionary.add_from_file(f)
        if not add_special_symbols:
            dictionary._find_special_symbols(_name_of(f))
        return dictionary

    def _find_special_symbols(self, source: str) -> None:
        for name in ("bos", "pad", "eos", "unk"):
            word = getattr(self, f"{name}_word")
            if word not in self.indices:
                raise ValueError(f"{source}: has no line for the special word {word}")
            setattr(self, f"{name}_index", self.indices[word])

    def add_from_file(self, f: str | Path | IO[str]) -> None:
        """Adds the words of a dictionary file; raises what `load` raises."""
        if isinstance(f, (str, Path)):
            lines = _read_lines(f)
        else:
            lines = [line.removesuffix("\n") for line in f]
        for number, line in enumerate(lines, start=1):
            self._add_from_line(line, f"{_name_of(f)}, line {number}")

    def _add_from_line(self, line: str, place: str) -> None:
        word, separator, count = line.rstrip().rpartition(" ")
        overwrite = count == _OVERWRITE
        if overwrite:
            word, separator, count = word.rpartition(" ")
        if not separator or not _is_integer(count):
            raise ValueError(
                "Incorrect dictionary format, expected '<token> <cnt> [flags]': "
                f"{place}: found {line[:100]!r}; mend the line, or rebuild the dataset"
            )
        if word in self.indices and not overwrite:
            raise DuplicateWordError(
                f"Duplicate word found when loading Dictionary: '{word}'. {place}; remove one of "
                f"the two lines, or end this one with {_OVERWRITE} if it is to replace the other"
            )
        self.add_symbol(word, n=int(count), overwrite=overwrite)

    def save(self, f: str | Path | IO[str]) -> None:
        """Writes the words that are not special, with their counts.

        Args:
            f: path, whose folder is made if need be, or open text file.
        """
        if isinstance(f, (str, Path)):
            os.makedirs(os.path.dirname(f) or ".", exist_ok=True)
            with open(f, "w", encoding="utf-8", newline="\n") as file:
                self.save(file)
            return
        for word, count in zip(
            self.symbols[self.nspecial :], self.count[self.nspecial :], strict=True
        ):
            f.write(f"{word} {count}\n")

    def encode_ids(
        self,
        line: str | Sequence[str],
        line_tokenizer: Tokenizer = tokenize_line,
        *,
        add_if_not_exist: bool = False,
        consumer: Callable[[str, int], object] | None = None,
        append_eos: bool = True,
        reverse_order: bool = False,
    ) -> np.ndarray:
        """Returns the ids of a line.

        Args:
            line: a text, or its tokens.
            line_tokenizer: splits a text.
            add_if_not_exist: give new words an id instead of that of unknown words.
            consumer: called with each word and its id.
            append_eos: end with the id of the end of a sentence.
            reverse_order: last word first (the end stays at the end).

        Returns:
            int32 vector.
        """
        words = line_tokenizer(line) if isinstance(line, str) else list(line)
        to_id = self.add_symbol if add_if_not_exist else self.index
        ids = []
        for word in reversed(words) if reverse_order else words:
            ids.append(to_id(word))
            if consumer is not None:
                consumer(word, ids[-1])
        if append_eos:
            ids.append(self.eos_index)
        return np.array(ids, dtype=np.int32)

    def encode_line(
        self,
        line: str,
        line_tokenizer: Tokenizer = tokenize_line,
        add_if_not_exist: bool = True,
        consumer: Callable[[str, int], object] | None = None,
        append_eos: bool = True,
        reverse_order: bool = False,
    ) -> torch.Tensor:
        """Returns what `encode_ids` does as a torch.IntTensor, by default adding new words."""
        import torch

        ids = self.encode_ids(
            line,
            line_tokenizer,
            add_if_not_exist=add_if_not_exist,
            consumer=consumer,
            append_eos=append_eos,
            reverse_order=reverse_order,
        )
        return torch.from_numpy(ids)

    @staticmethod
    def add_file_to_dictionary(
        filename: str | Path,
        dict: Dictionary,
        tokenize: Tokenizer = tokenize_line,
        num_workers: int = 1,
        on_progress: Callable[[int], object] | None = None,
    ) -> None:
        """Counts the words of a text file, and one end of a sentence for each line.

        Args:
            filename: UTF-8 text.
            dict: takes up the words, in order of their code points.
            tokenize: splits a line.
            num_workers: most processes to use; the result does not depend on it.
            on_progress: called with the number of bytes done since the last call.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it is empty or not UTF-8.
        """
        dict.add_text(
            number_text(filename, tokenize=tokenize, workers=num_workers, on_progress=on_progress)
        )

    def add_text(self, text: NumberedText) -> None:
        """Takes up the words of a text in order of their code points, and the ends of its lines."""
        words, counts = [], []
        for word, count in sorted(text.counts(self.eos_word).items()):
            if word in self.indices:
                self.add_symbol(word, count)
            else:
                words.append(word)
                counts.append(count)
        # In one go: there can be hundreds of thousands.
        first = len(self.symbols)
        self.indices.update(zip(words, range(first, first + len(words)), strict=True))
        self.symbols += words
        self.count += counts


class TruncatedDictionary(Dictionary):
    """A dictionary of which only the first words count: for outputs over frequent words.

    Args:
        wrapped_dict: the whole dictionary, which shares its entries.
        length: number of words to keep.
    """

    def __init__(self, wrapped_dict: Dictionary, length: int) -> None:
        vars(self).update(vars(wrapped_dict))
        self.wrapped_dict = wrapped_dict
        self.length = min(len(wrapped_dict), length)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> str:
        return self.wrapped_dict[index] if index < self.length else self.wrapped_dict.unk_word


def dummy_dictionary(vocab_size: int, prefix: str = "token_") -> Dictionary:
    """Returns a dictionary of made-up words, for trials and tests.

    Args:
        vocab_size: number of words beside the special ones.
        prefix: what each word starts with.
    """
    dictionary = Dictionary()
    for number in range(vocab_size):
        dictionary.add_symbol(f"{prefix}{number}")
    dictionary.finalize(padding_factor=1)
    return dictionary


def _read_lines(path: str | Path) -> list[str]:
    if not os.path.exists(path):
        raise FileNotFoundError(f"there is no dictionary {path}; fairseq-preprocess writes one")
    with open(path, "rb") as file:
        data = file.read()
    if not data:
        raise ValueError(
            f"{path} is empty, but a dictionary has a line '<token> <cnt>' per word: copy it anew, "
            "or rebuild the dataset"
        )
    try:
        lines = split_lines(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8 at byte {error.start} (0x{data[error.start]:02x}); "
            "it is no dictionary, or damaged: rebuild the dataset"
        ) from None
    return lines if lines[-1] else lines[:-1]


def _name_of(f: str | Path | IO[str]) -> str:
    return str(f) if isinstance(f, (str, Path)) else str(getattr(f, "name", "dictionary"))


def _is_integer(text: str) -> bool:
    try:
        int(text)
    except ValueError:
        return False
    return True
