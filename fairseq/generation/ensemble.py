"""Models that read hypotheses together and say how likely each next word is.

Shapes: `N` hypotheses, `S` tokens so far, `P` tokens of a prompt, `D` width, `V` words.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

__all__ = ["Ensemble"]

# A distribution over words is made for so many elements at a time: 64 MiB in float32.
_MOST_PROBS = 1 << 24


class _Reader:
    """One model with the state of its hypotheses."""

    def __init__(
        self,
        model: Any,
        net_input: Mapping[str, Any],
        temperature: float,
        sequence_length: int,
        cache_error: float | None,
    ) -> None:
        self.model = model
        self.decoder = getattr(model, "decoder", model)
        self.temperature = temperature
        self.state: dict[str, Any] | None = {} if _is_incremental(self.decoder) else None
        self.encoder_out = _encode(model, net_input)
        self._call, self._project = _halves(model, self.decoder)
        self._sequence_length: dict[str, int] = {}
        if "sequence_length" in inspect.signature(self.decoder.forward).parameters:
            self._sequence_length = {"sequence_length": sequence_length}
        self._windows: list[Any] = []
        if cache_error is not None:
            self._windows = _forget_far_keys(self.decoder, self.state, cache_error, sequence_length)

    @property
    def largest_error(self) -> float:
        """Largest sum of attention weights that a query may have lost."""
        return max((cache.largest_error for cache in self._windows), default=0.0)

    def read(self, tokens: torch.Tensor) -> torch.Tensor:
        """Takes all tokens so far, (N, S); returns what the output layer reads, of new ones."""
        given: dict[str, Any] = dict(self._sequence_length)
        if self.state is not None:
            given["incremental_state"] = self.state
        if self.encoder_out is not None:
            given["encoder_out"] = self.encoder_out
        features: torch.Tensor = self._call(tokens, **given)[0]
        return features

    def log_probs(self, features: torch.Tensor) -> torch.Tensor:
        """Returns log-probabilities (N, T, V) of the words after each of T tokens."""
        output = (self._project(features), None)
        found: torch.Tensor = self.model.get_normalized_probs(output, log_probs=True, sample=None)
        if self.temperature == 1.0:
            return found
        return torch.log_softmax(found / self.temperature, dim=-1)

    def reorder(self, order: torch.Tensor) -> None:
        """Selects and reorders the hypotheses whose state is kept."""
        if self.state:
            self.decoder.reorder_incremental_state(self.state, order)
        if self.encoder_out is not None:
            self.encoder_out = self.model.encoder.reorder_encoder_out(self.encoder_out, order)


class Ensemble:
    """Averages the probabilities of models, which keep states of the same hypotheses.

    Args:
        models: language models, or models with an encoder and a decoder.
        net_input: what the models are given of a batch; an encoder reads all of it but
            `prev_output_tokens`.
        temperature: T; each model's probabilities are raised to 1 / T and normalised again, which
            is a softmax of logits / T, with an adaptive softmax too.
        sequence_length: most tokens that hypotheses will have, prompt included; position methods
            that adapt to length take it from the start.
        cache_error: let heads forget keys whose weights sum to less than this; None forgets none.

    Raises:
        ValueError: keys cannot be forgotten by one of the models.
    """

    def __init__(
        self,
        models: Sequence[Any],
        net_input: Mapping[str, Any],
        *,
        temperature: float = 1.0,
        sequence_length: int,
        cache_error: float | None = None,
    ) -> None:
        self._readers = [
            _Reader(model, net_input, temperature, sequence_length, cache_error) for model in models
        ]

    @property
    def largest_error(self) -> float:
        """Largest sum of attention weights that a query of a head may have lost so far."""
        return max(reader.largest_error for reader in self._readers)

    def read_prompt(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Reads the first tokens at once.

        Args:
            tokens: ids, (N, P), of which the first is the start symbol.

        Returns:
            (log-probabilities of the tokens after the first, float32 (N, P - 1); those of every
            word after the last, float32 (N, V)).
        """
        features = [reader.read(tokens) for reader in self._readers]
        given = [
            _chosen(reader.log_probs, each[:, :-1], tokens[:, 1:])
            for reader, each in zip(self._readers, features, strict=True)
        ]
        return _average(given), self._next_log_probs(features)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Reads the last of all tokens so far, (N, S).

        Returns:
            Log-probabilities of every next word, float32 (N, V).
        """
        return self._next_log_probs([reader.read(tokens) for reader in self._readers])

    def reorder(self, order: torch.Tensor) -> None:
        """Selects and reorders hypotheses.

        Args:
            order: int64 (new N,), for each new hypothesis the old one it continues.
        """
        for reader in self._readers:
            reader.reorder(order)

    def _next_log_probs(self, features: list[torch.Tensor]) -> torch.Tensor:
        return _average(
            [
                reader.log_probs(each[:, -1:]).squeeze(1)
                for reader, each in zip(self._readers, features, strict=True)
            ]
        )


def _average(log_probs: list[torch.Tensor]) -> torch.Tensor:
    if len(log_probs) == 1:
        return log_probs[0]
    return torch.logsumexp(torch.stack(log_probs), dim=0) - math.log(len(log_probs))


def _chosen(
    log_probs: Callable[[torch.Tensor], torch.Tensor],
    features: torch.Tensor,
    targets: torch.Tensor,
) -> torch.Tensor:
    """Returns the log-probabilities of targets (N, T) alone, of which few are made at once."""
    num_columns = targets.size(1)
    parts: list[torch.Tensor] = []
    start, size = 0, 1
    while start < num_columns:
        columns = slice(start, start + size)
        found = log_probs(features[:, columns])  # (N, size, V)
        parts.append(found.gather(2, targets[:, columns, None]).squeeze(2))
        start += size
        size = max(1, _MOST_PROBS // found[:, :1].numel())
    return torch.cat(parts, dim=1) if parts else features.new_zeros(targets.shape).float()


def _is_incremental(decoder: Any) -> bool:
    has_method = hasattr(decoder, "reorder_incremental_state")
    return has_method and "incremental_state" in inspect.signature(decoder.forward).parameters


def _forget_far_keys(
    decoder: Any, state: dict[str, Any] | None, error: float, sequence_length: int
) -> list[Any]:
    if state is None or not hasattr(decoder, "forget_far_keys"):
        raise ValueError(
            f"--cache-error: {type(decoder).__name__} cannot forget keys; leave it out"
        )
    windows: list[Any] = decoder.forget_far_keys(state, error, sequence_length)
    return windows


def _encode(model: Any, net_input: Mapping[str, Any]) -> Any:
    if not hasattr(model, "encoder"):
        return None
    given = {name: value for name, value in net_input.items() if name != "prev_output_tokens"}
    return model.encoder(**given)


def _halves(model: Any, decoder: Any) -> tuple[Callable[..., Any], Callable[[Any], Any]]:
    """Returns a decoder as (what ends before the output layer, the output layer).

    One that comes from elsewhere may have a forward pass of its own kind, which is called whole.
    """
    names = ("forward", "extract_features", "output_layer")
    methods = [getattr(type(decoder), name, None) for name in names]
    if all(getattr(m, "__module__", "").startswith("fairseq.models.") for m in methods):
        return decoder.extract_features, decoder.output_layer
    return decoder, lambda output: output
