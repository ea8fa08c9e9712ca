"""Generates sequences with one model or an ensemble, by beam search or sampling.

Shapes: `B` sentences, `M` beams of a sentence, `N` = B M hypotheses, `P` tokens of a prefix, `V`
words. Scores are natural logarithms (nats).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fairseq.generation.beams import Beams, Hypothesis
from fairseq.generation.ensemble import Ensemble
from fairseq.generation.layout import kernels_for_few_tokens
from fairseq.generation.prompts import Prompt
from fairseq.generation.restrictions import Restrictions
from fairseq.search import BeamSearch, Search

__all__ = ["SequenceGenerator"]

logger = logging.getLogger(__name__)


class SequenceGenerator:
    """Generates sequences.

    The longest output has max_len_a x + max_len_b tokens for a source of x tokens, padding and
    `</s>` at its end included; a prefix counts as output, the `</s>` that ends it does not. It is
    shorter where a model has no more positions.

    Args:
        models: language models, or models with an encoder and a decoder; the probabilities of
            several are averaged.
        tgt_dict: dictionary of the output.
        beam_size: hypotheses of a sentence, M.
        max_len_a: see above.
        max_len_b: see above.
        max_len: a further limit; 0 is none.
        min_len: fewest tokens before `</s>`; a prefix is never changed.
        normalize_scores: divide the score of a hypothesis by (its tokens) ** `len_penalty`.
        len_penalty: below 1 favours short outputs, above 1 long ones.
        unk_penalty: nats taken off unknown words.
        temperature: above 1 flattens the distribution, below 1 sharpens it.
        match_source_len: outputs have as many tokens as their sources, `</s>` not counted.
        no_repeat_ngram_size: no n-gram of this size occurs twice in what is generated; 0 is off.
        search_strategy: how tokens are chosen; None is beam search.
        eos: id of the end of sentence; None is the dictionary's.
        symbols_to_strip_from_output: ids left out when hypotheses are printed, beside eos.
        lm_model: a language model whose log-probabilities are added, times `lm_weight`.
        lm_weight: see above.
        cache_error: let ALiBi's heads forget keys so far back that their attention weights sum to
            less than this; None forgets nothing.

    Raises:
        ValueError: a number is out of range; the message names its flag.
    """

    def __init__(
        self,
        models: Sequence[Any],
        tgt_dict: Any,
        beam_size: int = 1,
        max_len_a: float = 0.0,
        max_len_b: int = 200,
        max_len: int = 0,
        min_len: int = 1,
        normalize_scores: bool = True,
        len_penalty: float = 1.0,
        unk_penalty: float = 0.0,
        temperature: float = 1.0,
        match_source_len: bool = False,
        no_repeat_ngram_size: int = 0,
        search_strategy: Search | None = None,
        eos: int | None = None,
        symbols_to_strip_from_output: set[int] | None = None,
        lm_model: Any = None,
        lm_weight: float = 1.0,
        *,
        cache_error: float | None = None,
    ) -> None:
        self.models = list(models)
        self.pad = tgt_dict.pad()
        self.unk = tgt_dict.unk()
        self.eos = tgt_dict.eos() if eos is None else eos
        self.symbols_to_strip_from_output = {self.eos, *(symbols_to_strip_from_output or ())}
        if beam_size < 1:
            raise ValueError(f"--beam is {beam_size}; it must be at least 1")
        if not temperature > 0:
            raise ValueError(f"--temperature is {temperature:g}; it must be above 0")
        if no_repeat_ngram_size < 0:
            raise ValueError(
                f"--no-repeat-ngram-size is {no_repeat_ngram_size}; it must be at least 1, or 0"
            )
        self.search = search_strategy or BeamSearch()
        self._num_words = len(tgt_dict)
        # The padding symbol is never chosen.
        self.beam_size = min(beam_size, self._num_words - 1)
        if self.beam_size % self.search.num_groups:
            raise ValueError(
                f"--beam {self.beam_size} is not a multiple of --diverse-beam-groups "
                f"{self.search.num_groups}"
            )
        self.max_len_a = max_len_a
        self.max_len_b = max_len_b
        self.max_len = max_len
        self.min_len = min_len
        self.normalize_scores = normalize_scores
        self.len_penalty = len_penalty
        self.unk_penalty = unk_penalty
        self.temperature = temperature
        self.match_source_len = match_source_len
        self.no_repeat_ngram_size = no_repeat_ngram_size
        self.lm_model = lm_model
        self.lm_weight = lm_weight
        self.cache_error = cache_error
        for model in (*self.models, *([] if lm_model is None else [lm_model])):
            model.eval()

    def generate(
        self,
        models: Sequence[Any] | None,
        sample: Mapping[str, Any],
        prefix_tokens: torch.Tensor | None = None,
        constraints: Any = None,
        bos_token: int | None = None,
    ) -> list[list[Hypothesis]]:
        """Generates outputs for a batch.

        Args:
            models: they take the place of those given at first; None is those.
            sample: a batch, of which `net_input` is read.
            prefix_tokens: first tokens of the outputs, int64 (B, P); where one is padding, the row
                is free from there on.
            constraints: has to be None.
            bos_token: id of the symbol that hypotheses start with; None is that of eos.

        Returns:
            For each sentence its hypotheses, best first, each a dictionary: `tokens` (int64, with
            eos at the end), `score` (nats, normalised by length unless switched off),
            `positional_scores` (nats, one for each token), `attention` and `alignment` (None).

        Raises:
            ValueError: constraints are given, or a length is impossible.
            FloatingPointError: the models give no probability to any output.
        """
        if constraints is not None:
            raise ValueError("outputs cannot be constrained to given words; leave constraints out")
        start = self.eos if bos_token is None else bos_token
        models = models or self.models
        with torch.inference_mode(), kernels_for_few_tokens(models):
            ended = self._search(models, sample["net_input"], prefix_tokens, start)
        # Tensors made in inference mode could not be changed in place.
        return [sorted(map(self._finished, each), key=_by_score) for each in ended]

    def _search(
        self,
        models: Sequence[Any],
        net_input: Mapping[str, Any],
        prefix: torch.Tensor | None,
        start: int,
    ) -> list[list[Hypothesis]]:
        source = net_input["src_tokens"]
        most, fewest = self._lengths(models, source)
        ensembles = self._ensembles(models, net_input, max(most) + 1)
        is_aligned = all(ensemble.takes_left_padding for ensemble, _ in ensembles)
        prompt = self._prompt(source, prefix, start, most, is_aligned=is_aligned)
        limits = self._restrictions(prompt, most, fewest)
        beams, log_probs = self._begin(ensembles, prompt, limits.last_column + 2)
        first_column = prompt.tokens.size(1) - 1
        for column in range(first_column, limits.last_column + 1):
            if column > first_column:
                (log_probs,) = _join(ensembles, [each.step(beams.tokens) for each, _ in ensembles])
            limits.apply(log_probs, beams.tokens[:, 1:], column)
            words = log_probs.view(-1, self.beam_size, log_probs.size(-1))
            candidates = self.search.step(words, beams.scores)
            order, stay = beams.advance(candidates, limits.is_last(column))
            if stay is not None:
                if len(stay) == 0:
                    break
                limits.keep(stay)
            if order is not None:
                for ensemble, _ in ensembles:
                    ensemble.reorder(order, stay)
        if not all(beams.ended):
            raise FloatingPointError(
                "no output has a probability above 0: the model's scores are not numbers, or a "
                "prefix holds a word that cannot occur"
            )
        self._tell_error(ensembles[0][0].largest_error)
        return beams.ended

    def _tell_error(self, largest: float) -> None:
        if self.cache_error is not None and largest > self.cache_error:
            logger.warning(
                f"--cache-error {self.cache_error:g}: scores grew after keys were forgotten, so "
                f"that weights that sum to {min(largest, 1.0):.3g} may be lost; give a smaller one"
            )

    def _begin(
        self, ensembles: Sequence[tuple[Ensemble, float]], prompt: Prompt, most_tokens: int
    ) -> tuple[Beams, torch.Tensor]:
        """Reads the prompts; returns hypotheses and log-probabilities of what follows (N, V)."""
        tokens = prompt.tokens
        given, log_probs = _join(
            ensembles, *zip(*(each.read_prompt(tokens) for each, _ in ensembles), strict=True)
        )
        column = torch.arange(1, tokens.size(1), device=tokens.device)
        skipped = torch.tensor(prompt.skipped, device=tokens.device).unsqueeze(1)
        given = given - self.unk_penalty * tokens[:, 1:].eq(self.unk)
        beams = Beams(
            tokens,
            given.masked_fill(column <= skipped, 0.0),
            self.search.initial_scores(len(tokens), self.beam_size),
            skipped=prompt.skipped,
            most_tokens=most_tokens,
            pad=self.pad,
            eos=self.eos,
        )
        for ensemble, _ in ensembles:
            ensemble.begin(tokens, self.beam_size)
        return beams, log_probs.repeat_interleave(self.beam_size, dim=0)

    def _restrictions(
        self, prompt: Prompt, most: Sequence[int], fewest: Sequence[int]
    ) -> Restrictions:
        return Restrictions(
            prompt,
            most,
            fewest,
            num_beams=self.beam_size,
            pad=self.pad,
            eos=self.eos,
            unk=self.unk,
            unk_penalty=self.unk_penalty,
            no_repeat_ngram_size=self.no_repeat_ngram_size,
        )

    def _lengths(self, models: Sequence[Any], source: torch.Tensor) -> tuple[list[int], list[int]]:
        """Returns for each sentence the most and the fewest tokens before eos."""
        most = self._max_len(models, source.size(1))
        if not self.match_source_len:
            return [most] * len(source), [self.min_len] * len(source)
        lengths = (source.ne(self.pad) & source.ne(self.eos)).sum(dim=1).tolist()
        return [min(most, length) for length in lengths], lengths

    def _max_len(self, models: Sequence[Any], source_len: int) -> int:
        longest = int(self.max_len_a * source_len + self.max_len_b)
        limits = [_most_positions(model) for model in models]
        limits.append(self.max_len + 1 if self.max_len else None)
        longest = min([longest, *(limit - 1 for limit in limits if limit is not None)])
        if self.min_len > longest and not self.match_source_len:
            raise ValueError(
                f"--min-len {self.min_len} is above the longest output, {longest} tokens, which "
                "--max-len-a, --max-len-b and the model's positions allow"
            )
        return longest

    def _prompt(
        self,
        source: torch.Tensor,
        prefix: torch.Tensor | None,
        start: int,
        most: list[int],
        *,
        is_aligned: bool,
    ) -> Prompt:
        if prefix is None:
            return Prompt(source.new_full((len(source), 1), start), [0] * len(source))
        if prefix.size(1) >= max(most):
            logger.warning(
                f"a prompt of {prefix.size(1)} tokens leaves no room for new ones: outputs have at "
                f"most {max(most)}, prompt included; see --max-len-a and --max-len-b"
            )
        return Prompt.of(prefix, start, most, pad=self.pad, eos=self.eos, is_aligned=is_aligned)

    def _ensembles(
        self, models: Sequence[Any], net_input: Mapping[str, Any], sequence_length: int
    ) -> list[tuple[Ensemble, float]]:
        """Returns what has a say, each with the weight of its log-probabilities."""
        ensemble = Ensemble(
            models,
            net_input,
            num_words=self._num_words,
            temperature=self.temperature,
            sequence_length=sequence_length,
            cache_error=self.cache_error,
        )
        if self.lm_model is None:
            return [(ensemble, 1.0)]
        language_model = Ensemble(
            [self.lm_model], {}, num_words=self._num_words, sequence_length=sequence_length
        )
        return [(ensemble, 1.0), (language_model, self.lm_weight)]

    def _finished(self, hypothesis: Hypothesis) -> Hypothesis:
        positional = hypothesis["positional"].clone()
        score = hypothesis["score"].clone()
        if self.normalize_scores:
            score = score / len(positional) ** self.len_penalty
        return {
            "tokens": hypothesis["tokens"].clone(),
            "score": score,
            "attention": None,
            "alignment": None,
            "positional_scores": positional,
        }


def _join(
    ensembles: Sequence[tuple[Ensemble, float]], *log_probs: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Adds up, with their weights, what each of the ensembles says."""
    joined = []
    for each in log_probs:
        total = each[0]
        for (_, weight), other in zip(ensembles[1:], each[1:], strict=True):
            total = total + weight * other
        joined.append(total)
    return joined


def _most_positions(model: Any) -> int | None:
    """Returns the most tokens that a model can read.

    A decoder may tell a limit beyond which nothing can be computed from that of training, which is
    none for generation.
    """
    decoder: Any = getattr(model, "decoder", None)
    if hasattr(decoder, "position_limit"):
        limit: int | None = decoder.position_limit
        return limit
    if not hasattr(model, "max_decoder_positions"):
        return None
    longest: int | None = model.max_decoder_positions()
    return longest


def _by_score(hypothesis: Hypothesis) -> float:
    return -float(hypothesis["score"])
