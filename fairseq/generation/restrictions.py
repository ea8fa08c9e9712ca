"""Which words may come next.

Shapes: `B` sentences, `M` beams of a sentence, `N` = B M hypotheses, `V` words.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fairseq.generation.ngrams import block_repeated_ngrams
from fairseq.generation.prompts import Prompt

__all__ = ["Restrictions"]


class _Columns:
    """A column for each sentence, with the first and the last of them known on the host."""

    def __init__(self, columns: list[int], device: torch.device) -> None:
        self._earliest, self._latest = min(columns), max(columns)
        self._columns = torch.tensor(columns, device=device)  # (B,)

    def are_after(self, column: int) -> torch.Tensor | bool:
        """Tells for which sentences it comes after a column: bool (B,), or the same for all."""
        if column < self._earliest or column >= self._latest:
            return column < self._earliest
        return self._columns > column

    def keep(self, stay: torch.Tensor) -> None:
        """Goes on with some of the sentences."""
        self._columns = self._columns[stay]


class Restrictions:
    """Makes words impossible, by what the caller asked for.

    Columns are counted from the token after the start symbol; where prompts are padded on the left
    to end together, from that of the longest.

    Args:
        prompt: what hypotheses begin with.
        most: for each sentence the most tokens before eos.
        fewest: for each sentence the fewest tokens before eos.
        num_beams: beams of a sentence, M.
        pad: id of padding, which never comes.
        eos: id of the last token.
        unk: id of the unknown word.
        unk_penalty: nats taken off the unknown word.
        no_repeat_ngram_size: n-grams of this size occur once; 0 is off.

    Attributes:
        last_column: the latest in which a hypothesis may end.
    """

    def __init__(
        self,
        prompt: Prompt,
        most: Sequence[int],
        fewest: Sequence[int],
        *,
        num_beams: int,
        pad: int,
        eos: int,
        unk: int,
        unk_penalty: float = 0.0,
        no_repeat_ngram_size: int = 0,
    ) -> None:
        self.pad = pad
        self.eos = eos
        self.unk = unk
        self.num_beams = num_beams
        self.unk_penalty = unk_penalty
        self.no_repeat_ngram_size = no_repeat_ngram_size
        device = prompt.tokens.device
        lasts = [skip + count for skip, count in zip(prompt.skipped, most, strict=True)]
        opens = [skip + count for skip, count in zip(prompt.skipped, fewest, strict=True)]
        self.last_column = max(lasts)
        self._last = _Columns(lasts, device)
        self._open = _Columns(opens, device)
        self._forced = prompt.forced
        self._skipped = torch.tensor(prompt.skipped, device=device)

    def is_last(self, column: int) -> torch.Tensor | bool:
        """Tells whether hypotheses must end in a column: bool, or (B,)."""
        goes_on = self._last.are_after(column)
        return not goes_on if isinstance(goes_on, bool) else goes_on.logical_not()

    def keep(self, stay: torch.Tensor) -> None:
        """Goes on with some of the sentences alone, given by their indices."""
        self._last.keep(stay)
        self._open.keep(stay)
        self._skipped = self._skipped[stay]
        self._forced = None if self._forced is None else self._forced[stay]

    def apply(self, log_probs: torch.Tensor, tokens: torch.Tensor, column: int) -> None:
        """Sets what may not come to -inf.

        Args:
            log_probs: of each next word, (N, V); changed in place.
            tokens: hypotheses so far without the first column, int64 (N, column).
            column: in which the word comes.
        """
        # A softmax over something that is no number has none; one word of each row tells.
        if bool(log_probs[:, self.eos].isnan().any()):
            log_probs.masked_fill_(log_probs.isnan(), -torch.inf)
        log_probs[:, self.pad] = -torch.inf
        if self.unk_penalty:
            log_probs[:, self.unk] -= self.unk_penalty
        forced = self._forced_words(column)
        kept = None if forced is None else log_probs.gather(1, forced.unsqueeze(1))
        is_last = self.is_last(column)
        at_end = None if is_last is False else log_probs[:, self.eos].clone()
        if self.no_repeat_ngram_size:
            skipped = self._skipped.repeat_interleave(self.num_beams)
            block_repeated_ngrams(log_probs, tokens, self.no_repeat_ngram_size, skipped)
        self._hold_open(log_probs, column)
        if forced is not None and kept is not None:
            rows = forced.ne(self.pad).nonzero().squeeze(1)
            _allow_only(log_probs, rows, forced[rows], kept[rows, 0])
        if at_end is not None:
            rows = self._rows(is_last, len(log_probs), log_probs.device)
            _allow_only(log_probs, rows, torch.full_like(rows, self.eos), at_end[rows])

    def _forced_words(self, column: int) -> torch.Tensor | None:
        """Returns the token that must come in each row, int64 (N,); padding where any may."""
        if self._forced is None or column >= self._forced.size(1):
            return None
        return self._forced[:, column].repeat_interleave(self.num_beams)

    def _hold_open(self, log_probs: torch.Tensor, column: int) -> None:
        is_held = self._open.are_after(column)
        if is_held is True:
            log_probs[:, self.eos] = -torch.inf
        elif is_held is not False:
            rows = self._rows(is_held, len(log_probs), log_probs.device)
            log_probs[rows, self.eos] = -torch.inf

    def _rows(
        self, is_chosen: torch.Tensor | bool, num_rows: int, device: torch.device
    ) -> torch.Tensor:
        """Returns the rows of the chosen sentences, bool (B,); True is every one."""
        if not isinstance(is_chosen, torch.Tensor):
            return torch.arange(num_rows, device=device)
        return is_chosen.repeat_interleave(self.num_beams).nonzero().squeeze(1)


def _allow_only(
    log_probs: torch.Tensor, rows: torch.Tensor, words: torch.Tensor, kept: torch.Tensor
) -> None:
    """Leaves one word to each of some rows, with the log-probability that it had."""
    log_probs[rows] = -torch.inf
    log_probs[rows, words] = kept
