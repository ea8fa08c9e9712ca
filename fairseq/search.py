"""How the next tokens of hypotheses are chosen: beam search, its diverse relatives, sampling.

A strategy proposes candidates; the generator decides which of them end and which go on.

Shapes: `B` sentences, `M` beams of a sentence, `G` groups of beams, `C` candidates of a group,
`V` words. Scores are natural logarithms (nats).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = [
    "BeamSearch",
    "Candidates",
    "DiverseBeamSearch",
    "DiverseSiblingsSearch",
    "Sampling",
    "Search",
]


@dataclass(frozen=True)
class Candidates:
    """Continuations of hypotheses, the best of each group first.

    Attributes:
        scores: score of the hypothesis with the new token, (B, G, C); -inf where there is none.
        tokens: the new token, int64 (B, G, C).
        beams: which of the M beams it continues, int64 (B, G, C).
    """

    scores: torch.Tensor
    tokens: torch.Tensor
    beams: torch.Tensor


class Search:
    """Base class of strategies.

    Attributes:
        num_groups: groups G into which the beams are divided; a group holds M / G neighbours.
        explores_alone: whether every beam goes its own way from the start. Otherwise all beams of a
            group continue the same hypothesis at first, and must come to differ.
    """

    num_groups = 1
    explores_alone = False

    def step(self, log_probs: torch.Tensor, scores: torch.Tensor) -> Candidates:
        """Proposes continuations.

        Args:
            log_probs: of every next token, (B, M, V); -inf for those that are not allowed.
            scores: of the hypotheses so far, (B, M); -inf for beams that hold none.

        Returns:
            Candidates, at least one for each beam.
        """
        raise NotImplementedError

    def initial_scores(self, num_sentences: int, num_beams: int) -> torch.Tensor:
        """Returns scores (B, M) of beams before the first token: 0 for those that hold one."""
        scores = torch.zeros(num_sentences, self.num_groups, num_beams // self.num_groups)
        if not self.explores_alone:
            scores[:, :, 1:] = -torch.inf
        return scores.view(num_sentences, num_beams)


class BeamSearch(Search):
    """Proposes the 2 M best continuations of all beams.

    There are twice as many as beams so that enough go on if M of them end.
    """

    def step(self, log_probs: torch.Tensor, scores: torch.Tensor) -> Candidates:
        num_beams, num_words = log_probs.shape[1:]
        # The best of all are among the best of each; comparing rows first saves a sum over V.
        count = min(2 * num_beams, num_words)
        best, words = log_probs.topk(count, dim=-1)  # (B, M, 2M)
        return _best_of(best + scores.unsqueeze(-1), words, 2 * num_beams)


def _best_of(scores: torch.Tensor, words: torch.Tensor, count: int) -> Candidates:
    """Returns the best of each beam's continuations, (B, M, N) each, as one group."""
    num_per_beam = scores.size(2)
    top, index = scores.flatten(1).topk(min(count, scores[0].numel()), dim=-1)
    beams = index // num_per_beam
    tokens = words.flatten(1).gather(1, index)
    return Candidates(top.unsqueeze(1), tokens.unsqueeze(1), beams.unsqueeze(1))


class DiverseBeamSearch(Search):
    """Groups of beams choose one after another, each away from the words of those before.

    Before group g chooses, strength x (times that the groups before it chose a word in this step)
    is taken off the log-probability of the word. Scores keep the penalty.

    Args:
        num_groups: G; the number of beams must be a multiple.
        strength: nats for each earlier choice.

    Source: Vijayakumar et al. 2016, arXiv:1610.02424, with Hamming diversity.
    """

    def __init__(self, num_groups: int, strength: float) -> None:
        self.num_groups = num_groups
        self.strength = strength
        self._beam_search = BeamSearch()

    def step(self, log_probs: torch.Tensor, scores: torch.Tensor) -> Candidates:
        num_sentences, num_beams, num_words = log_probs.shape
        size = num_beams // self.num_groups
        times_chosen = log_probs.new_zeros(num_sentences, 1, num_words)
        groups = []
        for first in range(0, num_beams, size):
            own = slice(first, first + size)
            penalised = log_probs[:, own] - self.strength * times_chosen
            found = self._beam_search.step(penalised, scores[:, own])
            groups.append((found.scores, found.tokens, found.beams + first))
            chosen = found.tokens[:, :, :size]  # (B, 1, M / G)
            is_real = found.scores[:, :, :size].isfinite().to(times_chosen.dtype)
            times_chosen.scatter_add_(2, chosen, is_real)
        return Candidates(*(torch.cat(parts, dim=1) for parts in zip(*groups, strict=True)))


class DiverseSiblingsSearch(Search):
    """Continuations of the same hypothesis are ranked, and lose `rate` for each rank.

    The best continuation of a beam has rank 1. Scores keep the penalty.

    Args:
        rate: nats for each rank.

    Source: Li, Monroe, Jurafsky 2016, arXiv:1611.08562.
    """

    def __init__(self, rate: float) -> None:
        self.rate = rate

    def step(self, log_probs: torch.Tensor, scores: torch.Tensor) -> Candidates:
        num_beams, num_words = log_probs.shape[1:]
        best, words = log_probs.topk(min(2 * num_beams, num_words), dim=-1)  # (B, M, 2M)
        rank = torch.arange(1, best.size(2) + 1, dtype=best.dtype, device=best.device)
        return _best_of(best + scores.unsqueeze(-1) - self.rate * rank, words, 2 * num_beams)


class Sampling(Search):
    """Draws one continuation for each beam.

    The score is the logarithm of the word's probability among all words, whichever were left out.

    Args:
        topk: draw among the k most likely words; -1 is all.
        topp: draw among the fewest words, most likely first, whose probabilities sum to p or more;
            -1 is all.
        generator: source of random numbers; None is torch's global one.

    Raises:
        ValueError: a number out of range, or both.

    Source: top-p sampling, Holtzman et al. 2020, arXiv:1904.09751.
    """

    explores_alone = True

    def __init__(
        self, topk: int = -1, topp: float = -1.0, *, generator: torch.Generator | None = None
    ) -> None:
        if topk != -1 and topk < 1:
            raise ValueError(f"--sampling-topk is {topk}; it must be at least 1, or -1 for all")
        if topp != -1 and not 0 < topp <= 1:
            raise ValueError(f"--sampling-topp is {topp}; it must be above 0 and at most 1, or -1")
        if topk > 0 and topp > 0:
            raise ValueError("--sampling-topk and --sampling-topp exclude each other; choose one")
        self.topk = topk
        self.topp = topp
        self.generator = generator

    def step(self, log_probs: torch.Tensor, scores: torch.Tensor) -> Candidates:
        num_sentences, num_beams, _ = log_probs.shape
        probs = torch.softmax(log_probs, dim=-1).nan_to_num_(nan=1.0)  # where no word is possible
        probs, words = self._choices(probs)
        drawn = torch.multinomial(probs.flatten(0, 1), 1, generator=self.generator)  # (B M, 1)
        drawn = drawn.view(num_sentences, num_beams, 1)
        tokens = drawn if words is None else words.gather(2, drawn)
        chosen = log_probs.gather(2, tokens).squeeze(2)  # (B, M)
        beams = torch.arange(num_beams, device=tokens.device).expand(num_sentences, -1)
        return Candidates(
            (scores + chosen).unsqueeze(1), tokens.view(num_sentences, 1, -1), beams.unsqueeze(1)
        )

    def _choices(self, probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns what may be drawn: probabilities, and their words if not all of them in order."""
        if self.topk > 0:
            return probs.topk(min(self.topk, probs.size(-1)), dim=-1)
        if self.topp <= 0:
            return probs, None
        probs, words = probs.sort(dim=-1, descending=True)
        mass_before = probs.cumsum(dim=-1) - probs
        # Rounding must not leave out the most likely word.
        is_out = mass_before >= self.topp
        is_out[..., 0] = False
        return probs.masked_fill(is_out, 0.0), words
