"""Models that read hypotheses together and say how likely each next word is.

Shapes: `B` sentences, `N` hypotheses, `S` tokens so far, `P` columns of prompts, `D` width, `V`
words.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

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
        self.takes_left_padding: bool = getattr(self.decoder, "takes_left_padding", False)
        self._call, self._project = _halves(model, self.decoder)
        self._sequence_length: dict[str, int] = {}
        if "sequence_length" in inspect.signature(self.decoder.forward).parameters:
            self._sequence_length = {"sequence_length": sequence_length}
        self._can_step = cache_error is None and hasattr(self.decoder, "begin_steps")
        self._steps: Any = None  # what reads the tokens after the prompts
        self._windows: list[Any] = []
        if cache_error is not None:
            self._windows = _forget_far_keys(self.decoder, self.state, cache_error, sequence_length)

    @property
    def largest_error(self) -> float:
        """Largest sum of attention weights that a query may have lost."""
        return max((cache.largest_error for cache in self._windows), default=0.0)

    def read(self, tokens: torch.Tensor) -> torch.Tensor:
        """Takes all tokens so far, (N, S); returns what the output layer reads, of new ones."""
        if self._steps is not None:
            features: torch.Tensor = self._steps.read(tokens)
            return features
        given: dict[str, Any] = dict(self._sequence_length)
        if self.state is not None:
            given["incremental_state"] = self.state
        if self.encoder_out is not None:
            given["encoder_out"] = self.encoder_out
        features = self._call(tokens, **given)[0]
        return features

    def begin(self, prompt: torch.Tensor, num_beams: int) -> None:
        """Lets hypotheses go on from prompts (B, P), so many from each."""
        if self._can_step and self.state:
            self._steps = self.decoder.begin_steps(
                self.state, prompt, num_beams, **self._sequence_length
            )
        if self._steps is not None:
            self.state = None
        elif num_beams > 1:
            order = torch.arange(len(prompt), device=prompt.device)
            self.reorder(order.repeat_interleave(num_beams), None)

    def log_probs(self, features: torch.Tensor) -> torch.Tensor:
        """Returns log-probabilities (N, T, V) of the words after each of T tokens."""
        output = (self._project(features), None)
        found: torch.Tensor = self.model.get_normalized_probs(output, log_probs=True, sample=None)
        if self.temperature == 1.0:
            return found
        return torch.log_softmax(found / self.temperature, dim=-1)

    def reorder(self, order: torch.Tensor, stay: torch.Tensor | None) -> None:
        """Selects and reorders the hypotheses whose state is kept; see `Ensemble.reorder`."""
        if self._steps is not None:
            self._steps.reorder(order, stay)
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
        num_words: V.
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
        num_words: int,
        temperature: float = 1.0,
        sequence_length: int,
        cache_error: float | None = None,
    ) -> None:
        self._num_words = num_words
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
            tokens: ids, (B, P), of which the first is the start symbol.

        Returns:
            (log-probabilities of the tokens after the first, float32 (B, P - 1); those of every
            word after the last, float32 (B, V)).
        """
        features = [reader.read(tokens) for reader in self._readers]
        found = [
            _of_prompt(reader.log_probs, each, tokens, self._num_words)
            for reader, each in zip(self._readers, features, strict=True)
        ]
        given, following = zip(*found, strict=True)
        return _average(given), _average(following)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Reads the last of all tokens so far, (N, S).

        Returns:
            Log-probabilities of every next word, float32 (N, V).
        """
        return _average(
            [reader.log_probs(reader.read(tokens)[:, -1:]).squeeze(1) for reader in self._readers]
        )

    @property
    def takes_left_padding(self) -> bool:
        """Whether all models give the same for prompts padded on the left."""
        return all(reader.takes_left_padding for reader in self._readers)

    def begin(self, prompt: torch.Tensor, num_beams: int) -> None:
        """Lets hypotheses go on from prompts that were read.

        Args:
            prompt: ids, (B, P).
            num_beams: hypotheses of each, M; from now on N = B M.
        """
        for reader in self._readers:
            reader.begin(prompt, num_beams)

    def reorder(self, order: torch.Tensor, stay: torch.Tensor | None) -> None:
        """Selects and reorders hypotheses.

        Args:
            order: int64 (new N,), for each new hypothesis the old one that it continues, of the
                same sentence.
            stay: the sentences that stay, as indices among those before; None is all.
        """
        for reader in self._readers:
            reader.reorder(order, stay)


def _average(log_probs: Sequence[torch.Tensor]) -> torch.Tensor:
    if len(log_probs) == 1:
        return log_probs[0]
    return torch.logsumexp(torch.stack(list(log_probs)), dim=0) - math.log(len(log_probs))


def _of_prompt(
    log_probs: Callable[[torch.Tensor], torch.Tensor],
    features: torch.Tensor,
    tokens: torch.Tensor,
    num_words: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns log-probabilities of the tokens after the first, and of every word after the last.

    Distributions are made for few columns at a time, if there are many words.
    """
    targets = F.pad(tokens[:, 1:], (0, 1))  # the last column's is not known yet
    size = max(1, _MOST_PROBS // (len(tokens) * num_words))
    given = []
    for part, wanted in zip(features.split(size, dim=1), targets.split(size, dim=1), strict=True):
        found = log_probs(part)  # (B, size, V)
        given.append(found.gather(2, wanted.unsqueeze(2)).squeeze(2))
    # What is a view would keep the distributions of all columns.
    return torch.cat(given, dim=1)[:, :-1], found[:, -1].clone()


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
