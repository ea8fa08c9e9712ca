"""What models with an encoder and a decoder have in common.

Shapes: `B` rows, `S` source tokens, `T` target tokens, `D` width, `V` words.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from fairseq.models.base import BaseFairseqModel, FairseqDecoder, check_type

__all__ = ["EncoderOut", "FairseqEncoder", "FairseqEncoderDecoderModel"]


class EncoderOut(NamedTuple):
    """What an encoder makes of source tokens.

    Attributes:
        encoder_out: (B, S, D).
        encoder_padding_mask: bool (B, S), True at padding; None where there is none.
        encoder_states: output of every layer, (B, S, D) each; empty if not asked for.
    """

    encoder_out: torch.Tensor
    encoder_padding_mask: torch.Tensor | None = None
    encoder_states: tuple[torch.Tensor, ...] = ()


class FairseqEncoder(nn.Module):
    """Base class of encoders.

    Args:
        dictionary: of the words it reads.
    """

    def __init__(self, dictionary: Any) -> None:
        super().__init__()
        self.dictionary = dictionary

    def forward(
        self, src_tokens: torch.Tensor, src_lengths: torch.Tensor | None = None, **kwargs: Any
    ) -> Any:
        """Reads source tokens (B, S); returns what the decoder attends to."""
        raise NotImplementedError

    def forward_torchscript(self, net_input: Mapping[str, Any]) -> Any:
        """Reads what a batch holds for the encoder; generators of upstream fairseq call it so."""
        return self(**{k: v for k, v in net_input.items() if k != "prev_output_tokens"})

    def reorder_encoder_out(self, encoder_out: Any, new_order: torch.Tensor) -> Any:
        """Selects and reorders rows, as beam search does.

        Args:
            encoder_out: what `forward` returned.
            new_order: int64 (new B,), for each new row the old one.
        """
        raise NotImplementedError

    def max_positions(self) -> Any:
        """Returns the longest source that training and validation let through; None is any."""
        return None


class FairseqEncoderDecoderModel(BaseFairseqModel):
    """Base class of models in which a decoder attends to an encoder.

    Args:
        encoder: reads the source.
        decoder: predicts each next target token.

    Raises:
        TypeError: one of them is of another kind.
    """

    def __init__(self, encoder: FairseqEncoder, decoder: FairseqDecoder) -> None:
        super().__init__()
        check_type(encoder, FairseqEncoder)
        check_type(decoder, FairseqDecoder)
        self.encoder = encoder
        self.decoder = decoder

    def forward(
        self,
        src_tokens: torch.Tensor,
        src_lengths: torch.Tensor | None,
        prev_output_tokens: torch.Tensor,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, Any]:
        """Computes the output for every target token.

        Args:
            src_tokens: source ids, (B, S).
            src_lengths: tokens of each source without padding, (B,).
            prev_output_tokens: target ids, shifted right by one, (B, T).
            **kwargs: for the decoder.

        Returns:
            (logits (B, T, V), or features if there is an adaptive softmax; extra).
        """
        encoder_out = self.encoder(src_tokens, src_lengths=src_lengths)
        output: tuple[torch.Tensor, Any] = self.decoder(
            prev_output_tokens, encoder_out=encoder_out, **kwargs
        )
        return output

    def forward_decoder(self, prev_output_tokens: torch.Tensor, **kwargs: Any) -> Any:
        """Calls the decoder."""
        return self.decoder(prev_output_tokens, **kwargs)

    def extract_features(
        self,
        src_tokens: torch.Tensor,
        src_lengths: torch.Tensor | None,
        prev_output_tokens: torch.Tensor,
        **kwargs: Any,
    ) -> Any:
        """Returns (features (B, T, D), extra)."""
        encoder_out = self.encoder(src_tokens, src_lengths=src_lengths)
        return self.decoder.extract_features(prev_output_tokens, encoder_out=encoder_out, **kwargs)

    def output_layer(self, features: torch.Tensor) -> torch.Tensor:
        """Turns features (B, T, D) into logits (B, T, V)."""
        return self.decoder.output_layer(features)

    def max_positions(self) -> tuple[Any, Any]:
        """Returns the longest source and target that training and validation let through."""
        return self.encoder.max_positions(), self.decoder.max_positions()

    def max_decoder_positions(self) -> Any:
        """Returns the longest target that training and validation let through."""
        return self.decoder.max_positions()
