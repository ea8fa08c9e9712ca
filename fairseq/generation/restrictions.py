"""Which words may come next.

Shapes: `B` sentences, `M` beams of a sentence, `N` = B M hypotheses, `P` tokens of a prefix, `V`
words.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fairseq.generation.ngrams import block_repeated_ngrams

__all__ = ["Restrictions"]


@dataclass
class Restrictions:
    """Makes words impossible, by what the caller asked for.

    Attributes:
        pad: id of padding, which never comes.
        eos: id of the last token.
        unk: id of the unknown word.
        num_beams: beams of a sentence, M.
        min_len: fewest tokens before eos.
        max_len: most tokens before eos.
        unk_penalty: nats taken off the unknown word.
        no_repeat_ngram_size: n-grams of this size occur once; 0 is off.
        prefix: tokens that have to come first, int64 (B, P); padding lets a row free.
        lengths: tokens before eos of each sentence, int64 (B,), if they are given.
    """

    pad: int
    eos: int
    unk: int
    num_beams: int
    min_len: int
    max_len: int
    unk_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    prefix: torch.Tensor | None = None
    lengths: torch.Tensor | None = None

    def is_last(self, step: int) -> torch.Tensor | bool:
        """Tells whether hypotheses must end with token number `step`, from 0: bool, or (B,)."""
        if self.lengths is None or step >= self.max_len:
            return step >= self.max_len
        return self.lengths <= step

    def keep(self, stay: torch.Tensor) -> None:
        """Goes on with some of the sentences alone, given by their indices."""
        self.prefix = None if self.prefix is None else self.prefix[stay]
        self.lengths = None if self.lengths is None else self.lengths[stay]

    def apply(self, log_probs: torch.Tensor, tokens: torch.Tensor, step: int) -> None:
        """Sets what may not come to -inf.

        Args:
            log_probs: of each next word, (N, V); changed in place.
            tokens: hypotheses so far without their start symbol, int64 (N, step).
            step: tokens so far.
        """
        # A softmax over something that is no number has none; one word of each row tells.
        if bool(log_probs[:, self.eos].isnan().any()):
            log_probs.masked_fill_(log_probs.isnan(), -torch.inf)
        log_probs[:, self.pad] = -torch.inf
        if self.unk_penalty:
            log_probs[:, self.unk] -= self.unk_penalty
        forced = self._forced(step)
        kept = None if forced is None else log_probs.gather(1, forced.unsqueeze(1))
        at_end = log_probs[:, self.eos].clone()
        if self.no_repeat_ngram_size:
            block_repeated_ngrams(log_probs, tokens, self.no_repeat_ngram_size)
        self._hold_open(log_probs, step)
        if forced is not None and kept is not None:
            rows = forced.ne(self.pad).nonzero().squeeze(1)
            _allow_only(log_probs, rows, forced[rows], kept[rows, 0])
        is_last = self.is_last(step)
        if is_last is not False:
            rows = self._rows(is_last, len(log_probs))
            _allow_only(log_probs, rows, torch.full_like(rows, self.eos), at_end[rows])

    def _forced(self, step: int) -> torch.Tensor | None:
        """Returns the token that must come in each row, int64 (N,); padding where any may."""
        if self.prefix is None or step >= self.prefix.size(1):
            return None
        return self.prefix[:, step].repeat_interleave(self.num_beams)

    def _hold_open(self, log_probs: torch.Tensor, step: int) -> None:
        if self.lengths is not None:
            log_probs[self._rows(self.lengths > step, len(log_probs)), self.eos] = -torch.inf
        elif step < self.min_len:
            log_probs[:, self.eos] = -torch.inf

    def _rows(self, is_chosen: torch.Tensor | bool, num_rows: int) -> torch.Tensor:
        """Returns the rows of the chosen sentences, bool (B,); True is every one."""
        if not isinstance(is_chosen, torch.Tensor):
            return torch.arange(num_rows)
        return is_chosen.repeat_interleave(self.num_beams).nonzero().squeeze(1)


def _allow_only(
    log_probs: torch.Tensor, rows: torch.Tensor, words: torch.Tensor, kept: torch.Tensor
) -> None:
    """Leaves one word to each of some rows, with the log-probability that it had."""
    rows, words = rows.to(log_probs.device), words.to(log_probs.device)
    log_probs[rows] = -torch.inf
    log_probs[rows, words] = kept
