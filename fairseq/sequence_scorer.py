"""Scores of given target tokens under one model or an ensemble.

B: rows, T: columns, N: scored positions of all rows together, D: width, V: vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fairseq import utils

__all__ = ["Scores", "SequenceScorer", "scores_of", "target_log_probs"]


@dataclass(frozen=True)
class Scores:
    """Log-probabilities of a batch's scored tokens.

    Attributes:
        values: (N,) float32, nats, row after row.
        is_scored: (B, T) which positions of the batch they belong to.
        attention: (B, T, S) mean attention over the models that return it, else None.
    """

    values: torch.Tensor
    is_scored: torch.Tensor
    attention: torch.Tensor | None = None

    def rows(self, sample: dict[str, Any]) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yields for each row its id, its scored tokens (int64) and their scores (float32)."""
        is_scored = self.is_scored.cpu()
        values = self.values.cpu().numpy()
        tokens = sample["target"].cpu()[is_scored].numpy()
        ends = np.cumsum(is_scored.sum(dim=1).numpy())
        start = 0
        for row_id, end in zip(sample["id"].tolist(), ends.tolist(), strict=False):
            yield row_id, tokens[start:end], values[start:end]
            start = end


class SequenceScorer:
    """Scores the target tokens of batches.

    Args:
        tgt_dict: dictionary of the targets.
        softmax_batch: most positions whose distribution over the vocabulary is made at once; less
            is taken where memory says so.
        compute_alignment: must be False: there is no encoder to align with.
        eos: id of the end of sentence; by default the dictionary's.
        symbols_to_strip_from_output: ids left out when hypotheses are printed, beside eos.
        score_pad: a padding symbol inside a row counts as a token like others; how long rows are
            is then read from `src_lengths`. False scores no padding symbol anywhere.
    """

    def __init__(
        self,
        tgt_dict: Any,
        softmax_batch: int | None = None,
        compute_alignment: bool = False,
        eos: int | None = None,
        symbols_to_strip_from_output: set[int] | None = None,
        *,
        score_pad: bool = False,
    ) -> None:
        if softmax_batch is not None and softmax_batch < 1:
            raise ValueError(f"--softmax-batch is {softmax_batch}; it must be at least 1")
        if compute_alignment:
            raise ValueError("language models have no encoder whose words could be aligned")
        self.pad = tgt_dict.pad()
        self.eos = tgt_dict.eos() if eos is None else eos
        self.softmax_batch = softmax_batch
        self.symbols_to_strip_from_output = {self.eos, *(symbols_to_strip_from_output or ())}
        self.score_pad = score_pad

    @torch.no_grad()
    def score(self, models: Sequence[Any], sample: dict[str, Any]) -> Scores:
        """Scores a batch.

        Args:
            models: their probabilities are averaged.
            sample: a batch; `start_indices`, if there, says where in each row scoring starts.

        Returns:
            The log-probability of every scored target token.
        """
        is_scored = self._scored_positions(sample)
        results = []
        attentions = []
        for model in models:
            model.eval()
            values, attention = target_log_probs(model, sample, is_scored, self.softmax_batch)
            results.append(values)
            if attention is not None:
                attentions.append(attention)
        attention = torch.stack(attentions).mean(dim=0) if attentions else None
        return scores_of(results, is_scored, attention)

    def _scored_positions(self, sample: dict[str, Any]) -> torch.Tensor:
        """Returns (B, T) bool: the row's own target tokens, without context and padding."""
        target = sample["target"]
        columns = torch.arange(target.size(1), device=target.device)
        starts = torch.zeros(target.size(0), dtype=torch.int64)
        given = sample.get("start_indices")
        if given is not None:
            starts[: len(given)] = torch.as_tensor(given)
        is_own: torch.Tensor = columns >= starts.to(target.device)[:, None]
        if not self.score_pad:
            is_own &= target.ne(self.pad)
            return is_own
        lengths = torch.zeros(target.size(0), dtype=torch.int64, device=target.device)
        src_lengths = sample["net_input"]["src_lengths"]
        lengths[: len(src_lengths)] = src_lengths.to(target.device)
        is_own &= columns < lengths[:, None]
        return is_own

    @torch.no_grad()
    def generate(
        self, models: Sequence[Any], sample: dict[str, Any], **kwargs: Any
    ) -> list[list[dict[str, Any]]]:
        """Scores a batch in the form of a generator's result.

        Args:
            models: their probabilities are averaged.
            sample: a batch; see `score`.
            **kwargs: what generators take besides (prefixes); the targets say it all here.

        Returns:
            For each row a list with one dictionary: `tokens` (the scored targets), `score` (mean
            of their log-probabilities in nats), `positional_scores` (each of them), `attention`
            (T, S) if the models return it, `alignment` None.
        """
        scores = self.score(models, sample)
        counts = scores.is_scored.sum(dim=1).tolist()
        tokens = torch.split(sample["target"][scores.is_scored], counts)
        values = torch.split(scores.values, counts)
        return [
            [
                {
                    "tokens": tokens[row],
                    "score": values[row].mean() if counts[row] else values[row].sum(),
                    "attention": None if scores.attention is None else scores.attention[row],
                    "alignment": None,
                    "positional_scores": values[row],
                }
            ]
            for row in range(len(sample["id"]))
        ]


def scores_of(
    results: Sequence[torch.Tensor], is_scored: torch.Tensor, attention: torch.Tensor | None = None
) -> Scores:
    """Returns the scores of an ensemble: its models' probabilities (N,) are averaged."""
    values = results[0]
    if len(results) > 1:
        values = torch.logsumexp(torch.stack(list(results)), dim=0) - math.log(len(results))
    return Scores(values, is_scored, attention)


def target_log_probs(
    model: Any,
    sample: dict[str, Any],
    is_scored: torch.Tensor,
    softmax_batch: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns log p of the target at chosen positions, without making whole distributions of more.

    Args:
        model: a language model; one with an output of its own kind is asked for its distribution.
        sample: a batch with `net_input` and `target` (B, T).
        is_scored: (B, T) bool, the positions.
        softmax_batch: most positions whose distribution is made at once.

    Returns:
        ((N,) float32 nats, attention (B, T, S) or None).
    """
    decoder = _plain_decoder(model)
    if decoder is None:
        return _from_distribution(model, sample, is_scored)
    features, attention = _features(model, decoder, sample)  # (B, N, D) of the last N columns
    num_last = features.size(1)
    is_scored, target = is_scored[:, -num_last:], sample["target"][:, -num_last:]
    features, target = features[is_scored], target[is_scored]  # of all rows together
    size = softmax_batch or max(1, len(target))
    chosen = [
        _log_probs_of(decoder, *rows)
        for rows in zip(features.split(size), target.split(size), strict=True)
        if len(rows[1])
    ]
    values = torch.cat(chosen) if chosen else features.new_zeros(0, dtype=torch.float32)
    return values, attention


def _features(
    model: Any, decoder: Any, sample: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns features of the last columns, those before which nothing is scored, and attention."""
    net_input = sample["net_input"]
    first = min(sample.get("start_indices") or [0])
    can_skip = first > 0 and set(net_input) <= {"src_tokens", "src_lengths"}
    if can_skip and hasattr(decoder, "extract_last_features"):
        tokens = net_input["src_tokens"]
        return decoder.extract_last_features(tokens, tokens.size(1) - first), None
    features, extra = model.extract_features(**net_input)
    return features, _attention_in(extra)


def _plain_decoder(model: Any) -> Any:
    """Returns the decoder if model and decoder make their output as this project's do."""
    decoder = getattr(model, "decoder", None)
    has_parts = all(hasattr(decoder, name) for name in ("extract_features", "output_layer"))
    if decoder is None or not has_parts or not hasattr(model, "extract_features"):
        return None
    for part in (model, decoder):
        for name in ("forward", "get_normalized_probs", "extract_features"):
            method = getattr(type(part), name, None)
            if not getattr(method, "__module__", "").startswith("fairseq.models."):
                return None
    return decoder


def _log_probs_of(decoder: Any, features: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Returns log p of each target (N,) given features (N, D), in float32."""
    if decoder.adaptive_softmax is None:
        return utils.log_probs_of_targets(
            decoder.output_layer, features, target, len(decoder.dictionary), dtype=torch.float32
        )
    by_row: torch.Tensor = decoder.adaptive_softmax.get_target_log_prob(
        features[None], target[None]
    )
    return by_row[0]


def _from_distribution(
    model: Any, sample: dict[str, Any], is_scored: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    net_output = model(**sample["net_input"])
    log_probs = model.get_normalized_probs(net_output, log_probs=True, sample=sample)
    chosen = log_probs.gather(2, sample["target"][..., None]).squeeze(2)
    extra = net_output[1] if isinstance(net_output, tuple) and len(net_output) > 1 else None
    return chosen[is_scored].float(), _attention_in(extra)


def _attention_in(extra: Any) -> torch.Tensor | None:
    attention = extra.get("attn") if isinstance(extra, dict) else None
    if isinstance(attention, (list, tuple)):
        attention = attention[0] if attention else None
    return attention
