"""A language model of this project as a `PreTrainedModel`: our own decoder inside.

Shapes: `B` rows, `T` new tokens, `S` tokens so far, `V` symbols.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from fairseq.export import build_model, tied_names
from fairseq.huggingface.configuration import FairseqAlibiConfig

__all__ = ["FairseqAlibiCache", "FairseqAlibiForCausalLM"]

_REGISTER_PARAMETER = nn.Module.register_parameter
_TIES_BY_SOURCE = int(transformers.__version__.partition(".")[0]) >= 5


class FairseqAlibiCache:
    """Tokens so far, and their keys and values.

    Args:
        decoder: whose layers keep their keys and values here.
    """

    is_compileable = False

    def __init__(self, decoder: Any) -> None:
        self._decoder = decoder
        self.state: dict[str, Any] = {}
        self.tokens: torch.Tensor | None = None

    def append(self, tokens: torch.Tensor) -> torch.Tensor:
        """Adds ids (B, T) and returns all so far, (B, S)."""
        known = self.tokens
        self.tokens = tokens if known is None else torch.cat([known, tokens], dim=1)
        return self.tokens

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Returns S."""
        return 0 if self.tokens is None else self.tokens.size(1)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Selects and reorders rows, as beam search does; `beam_idx` is int64 (new B,)."""
        if self.tokens is not None:
            self.tokens = self.tokens.index_select(0, beam_idx.to(self.tokens.device))
        self._decoder.reorder_incremental_state(self.state, beam_idx)


class FairseqAlibiForCausalLM(PreTrainedModel, GenerationMixin):
    """A transformer language model with ALiBi or another of our position methods.

    With an adaptive softmax the logits are log-probabilities over the whole vocabulary (a softmax
    leaves them as they are); without one they are the output layer's scores.

    Args:
        config: from `from_pretrained` or `fairseq-export`.

    Raises:
        ValueError: the configuration does not describe a model.
    """

    config_class = FairseqAlibiConfig
    main_input_name = "input_ids"
    _supports_cache_class = True

    def __init__(self, config: FairseqAlibiConfig) -> None:
        super().__init__(config)
        with _real_tensors():
            self.decoder = build_model(config.fairseq).decoder
        self._ties = tied_names(self)
        form: Any = dict if _TIES_BY_SOURCE else list
        self._tied_weights_keys = form(self._ties)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Leaves everything as the decoder has drawn it."""

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Makes the tied parameters one again, after they were loaded one by one."""
        if _TIES_BY_SOURCE:
            super().tie_weights(*args, **kwargs)
            return
        for name, source in self._ties.items():
            owner, _, attribute = name.rpartition(".")
            setattr(self.get_submodule(owner), attribute, self.get_parameter(source))

    def get_input_embeddings(self) -> nn.Module:
        """Returns the input embeddings, a table or an adaptive input."""
        embeddings: nn.Module = self.decoder.embed_tokens
        return embeddings

    def get_output_embeddings(self) -> nn.Module | None:
        """Returns the output layer; None if it is an adaptive softmax."""
        projection: nn.Module | None = self.decoder.output_projection
        return projection

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """Refuses: the vocabulary is the dictionary's.

        Raises:
            ValueError: always.
        """
        raise ValueError("the vocabulary of a fairseq_alibi model is its dictionary's and is fixed")

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # it brings its own

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: FairseqAlibiCache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Scores the next token after each.

        Args:
            input_ids: ids of the new tokens, (B, T).
            attention_mask: (B, S), or (B, T) for the new ones alone: 0 is padding, on either side.
            past_key_values: what an earlier call returned.
            labels: ids, (B, T), -100 for none; the loss compares each with the scores before it.
            use_cache: return a cache; by default as in the configuration, but not with labels.
            output_hidden_states: return the embeddings and the output of each layer.
            return_dict: False returns a tuple.
            logits_to_keep: score the last so many tokens only; 0 is all.
            num_items_in_batch: what the summed loss is divided by; None is the number of labels.

        Returns:
            loss (nats per label), logits (B, T, V), past_key_values, hidden_states.

        Raises:
            TypeError: the cache is of another class.
            ValueError: labels and logits_to_keep are both given.
        """
        if past_key_values is not None and not isinstance(past_key_values, FairseqAlibiCache):
            raise TypeError(
                f"past_key_values is a {type(past_key_values).__name__}; a fairseq_alibi model "
                "takes only the cache that it returned itself"
            )
        if labels is not None and logits_to_keep:
            raise ValueError("labels need the logits of all tokens; leave out logits_to_keep")
        if use_cache is None:
            use_cache = bool(self.config.use_cache) and labels is None
        cache = past_key_values
        if cache is None and use_cache:
            cache = FairseqAlibiCache(self.decoder)
        tokens = _with_padding(input_ids, attention_mask, self.decoder.padding_idx)
        features, extra = self.decoder.extract_features(
            tokens if cache is None else cache.append(tokens),
            incremental_state=None if cache is None else cache.state,
            return_all_hiddens=bool(output_hidden_states),
        )
        logits = self._scores(features[:, -logits_to_keep:])
        loss = None if labels is None else _loss(logits, labels, num_items_in_batch)
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=cast(Any, cache),
            hidden_states=tuple(extra["inner_states"]) if output_hidden_states else None,
        )
        is_tuple = return_dict is False or (return_dict is None and not self._wants_dict())
        return output.to_tuple() if is_tuple else output

    def _wants_dict(self) -> bool:
        name = "return_dict" if _TIES_BY_SOURCE else "use_return_dict"
        return bool(getattr(self.config, name, True))

    def _scores(self, features: torch.Tensor) -> torch.Tensor:
        """Turns features (B, T, D) into logits (B, T, V)."""
        adaptive = self.decoder.adaptive_softmax
        if adaptive is None:
            return self.decoder.output_layer(features)
        log_probs: torch.Tensor = adaptive.get_log_prob(features, None, dtype=torch.float32)
        return log_probs

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: torch.Tensor,
        past_key_values: FairseqAlibiCache | None = None,
        attention_mask: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Returns what `forward` is called with in a step of generation."""
        known = 0 if past_key_values is None else past_key_values.get_seq_length()
        inputs = {
            "input_ids": input_ids[:, known:],
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
        }
        if kwargs.get("logits_to_keep"):
            inputs["logits_to_keep"] = kwargs["logits_to_keep"]
        return inputs


@contextlib.contextmanager
def _real_tensors() -> Iterator[None]:
    """Lets a model be built with tensors that hold something.

    transformers builds on the meta device before it loads, version 4 by a `register_parameter` of
    its own, which parts what is tied. But ties and what a model computes when it is built count.
    """
    replaced = nn.Module.register_parameter
    nn.Module.register_parameter = _REGISTER_PARAMETER  # type: ignore[method-assign]
    try:
        with torch.device("cpu"):
            yield
    finally:
        nn.Module.register_parameter = replaced  # type: ignore[method-assign]


def _with_padding(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, padding_idx: int
) -> torch.Tensor:
    """Marks padding by its id, which is how the decoder knows it."""
    if attention_mask is None:
        return input_ids
    is_padding = attention_mask[:, -input_ids.size(1) :] == 0
    return input_ids.masked_fill(is_padding.to(input_ids.device), padding_idx)


def _loss(
    logits: torch.Tensor, labels: torch.Tensor, num_items: torch.Tensor | int | None
) -> torch.Tensor:
    """Returns the mean cross entropy of each label under the scores before it, in nats."""
    scores = logits[:, :-1].flatten(0, 1).float()
    targets = labels[:, 1:].flatten().to(scores.device)
    if num_items is None:
        return F.cross_entropy(scores, targets, ignore_index=-100)
    return F.cross_entropy(scores, targets, ignore_index=-100, reduction="sum") / num_items
