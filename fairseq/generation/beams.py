"""The hypotheses of a search: what they consist of, how they end and how they go on.

Shapes: `B` sentences that are not done, `M` beams of a sentence, `N` = B M, `G` groups of beams,
`C` candidates of a group, `S` tokens so far, start symbol included. Scores are in nats.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fairseq.search import Candidates

__all__ = ["Beams", "Hypothesis"]

Hypothesis = dict[str, Any]


class Beams:
    """Hypotheses under way and those that have ended.

    Args:
        start: first tokens of each sentence, int64 (B, S).
        given: log-probabilities of those after the first, (B, S - 1).
        initial_scores: (B, M), 0 or -inf, see `Search.initial_scores`.
        skipped: first columns of each sentence that are padding.
        most_tokens: longest hypothesis, start symbol and last token included.
        pad: id of padding.
        eos: id of the last token of a hypothesis.

    Attributes:
        tokens: ids so far, int64 (N, S).
        length: columns so far, S.
        sentences: number of each sentence that is not done, int64 (B,).
        ended: for each sentence, the hypotheses that have ended, with their scores not normalised.
    """

    def __init__(
        self,
        start: torch.Tensor,
        given: torch.Tensor,
        initial_scores: torch.Tensor,
        *,
        skipped: Sequence[int],
        most_tokens: int,
        pad: int,
        eos: int,
    ) -> None:
        num_sentences, self.length = start.shape
        self.num_beams = initial_scores.size(1)
        self._skipped = skipped
        self.eos = eos
        self.sentences = torch.arange(num_sentences, device=start.device)
        self.ended: list[list[Hypothesis]] = [[] for _ in range(num_sentences)]
        num_rows = num_sentences * self.num_beams
        self._tokens = start.new_full((num_rows, most_tokens), pad)
        self._tokens[:, : self.length] = start.repeat_interleave(self.num_beams, dim=0)
        # Column s is the score of the tokens up to s; the start symbol has none.
        self._scores = given.new_zeros(num_rows, most_tokens)
        self._scores[:, 1 : self.length] = given.cumsum(dim=1).repeat_interleave(
            self.num_beams, dim=0
        )
        self._scores[:, self.length - 1] += initial_scores.view(-1).to(given)

    @property
    def tokens(self) -> torch.Tensor:
        """All tokens so far, int64 (N, S)."""
        return self._tokens[:, : self.length]

    @property
    def scores(self) -> torch.Tensor:
        """Scores of the hypotheses, (B, M); -inf for a beam that holds none."""
        return self._scores[:, self.length - 1].view(-1, self.num_beams)

    def advance(
        self, candidates: Candidates, is_last: torch.Tensor | bool
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Ends hypotheses whose token is the last one, and puts candidates in place of the others.

        A sentence is done when M hypotheses have ended, when none is left, or when this was the
        last step; its rows are removed.

        Args:
            candidates: continuations of the hypotheses.
            is_last: whether every hypothesis has to end now, bool or (B,).

        Returns:
            (for each row now the one it continues, int64 (new N,), None if all stay where they
            are; the sentences that stay, as indices among those before, None if all do).
        """
        num_sentences, num_groups = candidates.tokens.shape[:2]
        size = self.num_beams // num_groups
        is_end = candidates.tokens.eq(self.eos) & candidates.scores.isfinite()  # (B, G, C)
        some_end = bool(is_end[:, :, :size].any())
        if some_end:
            self._end(candidates, is_end[:, :, :size])
        chosen = _first_that_go_on(candidates, is_end, size) if bool(is_end.any()) else candidates
        scores = chosen.scores[:, :, :size].reshape(num_sentences, -1)  # (B, M)
        tokens = chosen.tokens[:, :, :size].reshape(num_sentences, -1)
        beams = chosen.beams[:, :, :size].reshape(num_sentences, -1)
        first_rows = torch.arange(0, len(self._tokens), self.num_beams, device=beams.device)
        order = beams + first_rows.unsqueeze(1)
        stay = self._that_stay(scores, is_last) if some_end or is_last is not False else None
        if stay is not None:
            scores, tokens, order = scores[stay], tokens[stay], order[stay]
            self.sentences = self.sentences[stay]
        order = order.reshape(-1)
        moved = None if _is_identity(order, len(self._tokens)) else order
        self._append(moved, tokens.reshape(-1), scores.reshape(-1))
        return moved, stay

    def _append(
        self, order: torch.Tensor | None, tokens: torch.Tensor, scores: torch.Tensor
    ) -> None:
        if order is not None:
            self._tokens, self._scores = self._tokens[order], self._scores[order]
        self._tokens[:, self.length] = tokens
        self._scores[:, self.length] = scores
        self.length += 1

    def _that_stay(self, scores: torch.Tensor, is_last: torch.Tensor | bool) -> torch.Tensor | None:
        """Returns the indices of sentences that are not done, None if none is done."""
        num_ended = torch.tensor([len(self.ended[s]) for s in self.sentences.tolist()])
        is_done = num_ended.to(scores.device) >= self.num_beams
        is_done |= scores.isneginf().all(dim=1)
        is_done |= torch.as_tensor(is_last, device=scores.device)
        return is_done.logical_not().nonzero().squeeze(1) if bool(is_done.any()) else None

    def _end(self, candidates: Candidates, is_end: torch.Tensor) -> None:
        """Keeps the candidates that end, best first, M for each sentence at most."""
        sentences = self.sentences.tolist()
        for sentence, group, place in is_end.nonzero().tolist():
            ended = self.ended[sentences[sentence]]
            if len(ended) == self.num_beams:
                continue
            at = (sentence, group, place)
            row = sentence * self.num_beams + int(candidates.beams[at])
            first = self._skipped[sentences[sentence]]
            scores = self._scores[row, first : self.length + 1].clone()
            scores[-1] = candidates.scores[at]
            tokens = self._tokens[row, first + 1 : self.length + 1].clone()
            tokens[-1] = self.eos
            ended.append({"tokens": tokens, "score": scores[-1], "positional": scores.diff()})


def _first_that_go_on(candidates: Candidates, is_end: torch.Tensor, size: int) -> Candidates:
    """Returns the first candidates of each group that do not end, and -inf where there are none."""
    scores = candidates.scores.masked_fill(is_end, -torch.inf)
    # Sorting booleans stably keeps the candidates in order.
    place = is_end.to(torch.uint8).sort(dim=-1, stable=True).indices[:, :, :size]
    return Candidates(
        scores.gather(2, place),
        candidates.tokens.gather(2, place),
        candidates.beams.gather(2, place),
    )


def _is_identity(order: torch.Tensor, num_rows: int) -> bool:
    if len(order) != num_rows:
        return False
    return bool(torch.equal(order, torch.arange(num_rows, device=order.device)))
