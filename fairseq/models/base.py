"""What every model has in common: building, loading, and the calls that criterions make.

Shapes: `B` rows, `T` tokens, `D` width, `V` words.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fairseq import utils
from fairseq.models.upgrade import prune_layers, upgrade_state_dict
from fairseq.modules.incremental_state import IncrementalState

__all__ = [
    "BaseFairseqModel",
    "FairseqDecoder",
    "FairseqIncrementalDecoder",
    "FairseqLanguageModel",
    "check_type",
]


def check_type(module: Any, expected: type | tuple[type, ...]) -> None:
    """Checks what a plug-in returns.

    Raises:
        TypeError: the module is of another class.
    """
    if not isinstance(module, expected):
        raise TypeError(f"expected {expected}, got {type(module).__name__}")


class BaseFairseqModel(nn.Module):
    """Base class of models."""

    @classmethod
    def build_model(cls, cfg: Any, task: Any) -> BaseFairseqModel:
        """Builds a model.

        Args:
            cfg: the model's config dataclass, or a namespace.
            task: gives the dictionaries.
        """
        raise NotImplementedError(f"{cls.__name__} must implement build_model(cfg, task)")

    @classmethod
    def from_pretrained(
        cls,
        model_name_or_path: str,
        checkpoint_file: str = "model.pt",
        data_name_or_path: str = ".",
        **kwargs: Any,
    ) -> Any:
        """Loads checkpoints as an object that takes text; see `fairseq.hub_utils`."""
        from fairseq.hub_utils import from_pretrained

        return from_pretrained(model_name_or_path, checkpoint_file, data_name_or_path, **kwargs)

    def get_targets(self, sample: Mapping[str, Any], net_output: Any) -> torch.Tensor:
        """Returns the ids that the model should predict, (B, T)."""
        target: torch.Tensor = sample["target"]
        return target

    def get_normalized_probs(
        self, net_output: Any, log_probs: bool, sample: Mapping[str, Any] | None = None
    ) -> torch.Tensor:
        """Turns the output of a forward pass into probabilities, in float32.

        Args:
            net_output: what the model returned; its first part is the logits or features.
            log_probs: return logarithms, in nats.
            sample: the batch; an adaptive softmax then fills only what its targets need.

        Returns:
            (B, T, V).
        """
        decoder: Any = getattr(self, "decoder", None)
        if decoder is not None:
            probs: torch.Tensor = decoder.get_normalized_probs(net_output, log_probs, sample)
            return probs
        logits = net_output[0] if isinstance(net_output, tuple) else net_output
        normalize = utils.log_softmax if log_probs else utils.softmax
        return normalize(logits, dim=-1)

    def extract_features(self, *args: Any, **kwargs: Any) -> Any:
        """Returns features, as `forward` does before the output layer."""
        return self(*args, **kwargs)

    def max_positions(self) -> Any:
        """Returns the longest input that training and validation let through; None is any."""
        return None

    def load_state_dict(
        self,
        state_dict: Mapping[str, Any],
        strict: bool = True,
        model_cfg: Any = None,
        args: Any = None,
    ) -> Any:
        """Loads parameters, after bringing those of older versions up to date.

        Args:
            state_dict: names and tensors; not changed.
            strict: missing or superfluous names are an error.
            model_cfg: settings of the model to load into; its `decoder_layers_to_keep` says which
                layers of the checkpoint are used, and is cleared then.
            args: an older name of `model_cfg`.
        """
        state = dict(state_dict)
        self.upgrade_state_dict(state)
        state = prune_layers(state, model_cfg if model_cfg is not None else args)
        return super().load_state_dict(state, strict)

    def upgrade_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Brings the state dict of an older version up to date, in place."""
        self.upgrade_state_dict_named(state_dict, "")

    def upgrade_state_dict_named(self, state_dict: dict[str, Any], name: str) -> None:
        """Brings a state dict up to date, in which this model's names start with `name`."""
        upgrade_state_dict(self, state_dict, name)

    def set_num_updates(self, num_updates: int) -> None:
        """Tells every part that asks for it how many updates were made."""
        module: Any
        for module in self.modules():
            if module is not self and hasattr(module, "set_num_updates"):
                module.set_num_updates(num_updates)

    def prepare_for_inference_(self, cfg: Any) -> None:
        """Readies the model for generation and evaluation, as `cfg.generation` says."""
        generation = getattr(cfg, "generation", None)
        self.make_generation_fast_(
            retain_dropout=getattr(generation, "retain_dropout", False),
            retain_dropout_modules=getattr(generation, "retain_dropout_modules", None),
        )

    def make_generation_fast_(self, **options: Any) -> None:
        """Calls `make_generation_fast_(name=..., **options)` of every part that has it, and
        switches to evaluation."""
        module: Any
        for name, module in self.named_modules():
            if module is not self and hasattr(module, "make_generation_fast_"):
                module.make_generation_fast_(name=name, **options)
        self.eval()


class FairseqDecoder(nn.Module):
    """Base class of decoders.

    Args:
        dictionary: of the words it predicts.
    """

    def __init__(self, dictionary: Any) -> None:
        super().__init__()
        self.dictionary = dictionary

    def forward(self, prev_output_tokens: torch.Tensor, **kwargs: Any) -> tuple[Any, Any]:
        """Returns (logits (B, T, V), anything else)."""
        features, extra = self.extract_features(prev_output_tokens, **kwargs)
        return self.output_layer(features), extra

    def extract_features(
        self, prev_output_tokens: torch.Tensor, **kwargs: Any
    ) -> tuple[torch.Tensor, Any]:
        """Returns (features (B, T, D), anything else)."""
        raise NotImplementedError

    def output_layer(self, features: torch.Tensor) -> torch.Tensor:
        """Turns features (B, T, D) into logits (B, T, V)."""
        raise NotImplementedError

    def get_normalized_probs(
        self, net_output: Any, log_probs: bool, sample: Mapping[str, Any] | None = None
    ) -> torch.Tensor:
        """See `BaseFairseqModel.get_normalized_probs`."""
        features = net_output[0]
        adaptive_softmax = getattr(self, "adaptive_softmax", None)
        if adaptive_softmax is not None:
            target = None if sample is None else sample["target"]
            out: torch.Tensor = adaptive_softmax.get_log_prob(features, target, dtype=torch.float32)
            return out if log_probs else out.exp()
        normalize = utils.log_softmax if log_probs else utils.softmax
        return normalize(features, dim=-1)

    def max_positions(self) -> Any:
        """Returns the longest input that training and validation let through; None is any."""
        return None


class FairseqIncrementalDecoder(FairseqDecoder):
    """Base class of decoders that can go on from an incremental state.

    A call with `incremental_state={}` and the tokens so far fills the state; the next call takes
    all tokens so far again and computes only those that are new.
    """

    def reorder_incremental_state(
        self, incremental_state: IncrementalState, new_order: torch.Tensor
    ) -> None:
        """Selects and reorders rows of the state, as beam search does.

        Args:
            incremental_state: changed in place.
            new_order: int64 (new B,), for each new row the old one it continues.
        """
        module: Any
        for module in self.modules():
            if module is not self and hasattr(module, "reorder_incremental_state"):
                module.reorder_incremental_state(incremental_state, new_order)

    def reorder_incremental_state_scripting(
        self, incremental_state: IncrementalState, new_order: torch.Tensor
    ) -> None:
        """Does what `reorder_incremental_state` does; generators of upstream fairseq call it so."""
        self.reorder_incremental_state(incremental_state, new_order)

    def set_beam_size(self, beam_size: int) -> None:
        """Tells every part that asks for it how many hypotheses a sentence has."""
        module: Any
        for module in self.modules():
            if module is not self and hasattr(module, "set_beam_size"):
                module.set_beam_size(beam_size)


class FairseqLanguageModel(BaseFairseqModel):
    """Base class of models that are one decoder.

    Args:
        decoder: predicts each next token.

    Raises:
        TypeError: the decoder is none.
    """

    def __init__(self, decoder: FairseqDecoder) -> None:
        super().__init__()
        check_type(decoder, FairseqDecoder)
        self.decoder = decoder

    def forward(self, src_tokens: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        """Computes the output for every token.

        Args:
            src_tokens: ids, (B, T), each row padded to T.
            **kwargs: for the decoder, such as `src_lengths` and `incremental_state`.

        Returns:
            (logits (B, T, V), or features (B, T, D) if there is an adaptive softmax; extra).
        """
        output: tuple[torch.Tensor, Any] = self.decoder(src_tokens, **kwargs)
        return output

    def forward_decoder(self, prev_output_tokens: torch.Tensor, **kwargs: Any) -> Any:
        """Calls the decoder."""
        return self.decoder(prev_output_tokens, **kwargs)

    def extract_features(self, src_tokens: torch.Tensor, **kwargs: Any) -> Any:
        """Returns (features (B, T, D), extra)."""
        return self.decoder.extract_features(src_tokens, **kwargs)

    def output_layer(self, features: torch.Tensor) -> torch.Tensor:
        """Turns features (B, T, D) into logits (B, T, V)."""
        return self.decoder.output_layer(features)

    def max_positions(self) -> Any:
        """Returns the longest input that training and validation let through."""
        return self.decoder.max_positions()

    def max_decoder_positions(self) -> Any:
        """Returns the longest input that training and validation let through."""
        return self.decoder.max_positions()

    @property
    def supported_targets(self) -> set[str]:
        """Kinds of targets that the language modelling task may ask for."""
        return {"future"}
