"""A transformer decoder that attends to an encoder.

It is the decoder of language models with one attention more in each layer. What that attention
needs is prepared once as well, before the layer loop.

Shapes: `B` rows, `T` new target tokens, `N` target tokens so far, `S` source tokens, `E` width of
the encoder, `H` heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fairseq.attention import (
    BIDIRECTIONAL,
    AttentionBias,
    CrossBias,
    Positions,
    SymmetricBias,
    ZeroBias,
    get_backend,
)
from fairseq.models.encoder_decoder import EncoderOut
from fairseq.models.transformer.transformer_decoder import TransformerDecoder
from fairseq.modules.encoder_attention import Memory
from fairseq.modules.encoder_decoder_layers import TransformerCrossDecoderLayer
from fairseq.modules.transformer_layer import attention_dropout
from fairseq.positions import alibi_slopes

__all__ = ["TransformerCrossDecoder"]


class TransformerCrossDecoder(TransformerDecoder):
    """Scores the next target token, given those so far and the encoder's output.

    Args:
        cfg: settings with the names of `TransformerConfig`.
        dictionary: of the words it predicts.
        embed_tokens: input embeddings.
    """

    def __init__(self, cfg: Any, dictionary: Any, embed_tokens: nn.Embedding) -> None:
        super().__init__(cfg, dictionary, embed_tokens)
        # A backend keeps a mask of one kind; that of self-attention is another.
        self.cross_backend = get_backend(cfg.attention_backend)
        self._cross_bias_kind = cfg.cross_attention_bias
        heads = cfg.decoder_attention_heads
        self._cross_bias: AttentionBias = ZeroBias(heads)
        if self._cross_bias_kind != "none":
            self._cross_bias = SymmetricBias(alibi_slopes(heads, cfg.alibi_bias_max))

    def build_decoder_layer(self, cfg: Any) -> nn.Module:
        """Makes one layer."""
        return TransformerCrossDecoderLayer(cfg)

    def prepare_memory(
        self, x: torch.Tensor, tokens: torch.Tensor, new: Positions, encoder_out: Any
    ) -> tuple[Memory]:
        """Makes, once for all layers, what they attend to beside the tokens so far.

        Args:
            x: embeddings of the new tokens, (B, T, D).
            tokens: ids of all target tokens so far, (B, N).
            new: columns of the new tokens.
            encoder_out: an `EncoderOut`.

        Raises:
            ValueError: there is no output of an encoder.
        """
        if encoder_out is None:
            raise ValueError("encoder_out is missing: this decoder attends to an encoder")
        states, is_padding = encoder_out.encoder_out, encoder_out.encoder_padding_mask
        prepared = self.cross_backend.prepare(
            self.cross_bias(tokens, encoder_out),
            new,
            range(states.size(1)),
            rule=BIDIRECTIONAL,
            key_is_padding=is_padding,
            dropout_p=attention_dropout(self.layers),
            dtype=x.dtype,
            device=x.device,
        )
        return (Memory(states, prepared),)

    def source_attention(self, tokens: torch.Tensor, encoder_out: EncoderOut) -> torch.Tensor:
        """Returns what each target token attends to in the last layer, averaged over heads.

        Args:
            tokens: ids of the target tokens, (B, T).
            encoder_out: output of the encoder for S source tokens.

        Returns:
            Weights of the source tokens, float32 (B, T, S); they sum to 1.
        """
        last: Any = self.layers[-1]
        found: list[torch.Tensor] = []

        def note(attention: Any, given: tuple[Any, ...], out: torch.Tensor) -> None:
            found.append(attention.weights(*given[:2]).mean(dim=1))

        handle = last.encoder_attn.register_forward_hook(note)
        try:
            self.extract_features(tokens, encoder_out)
        finally:
            handle.remove()
        return found[0]

    def cross_bias(self, tokens: torch.Tensor, encoder_out: EncoderOut) -> AttentionBias:
        """Returns what is added to the scores of target tokens against source tokens.

        Places count from the first token that is no padding. Query i stands, among the keys, at
        place i (`--cross-attention-bias aligned`) or at S + i (`continued`).

        Args:
            tokens: ids of all target tokens so far, (B, N).
            encoder_out: output of the encoder for S source tokens.
        """
        if self._cross_bias_kind == "none":
            return self._cross_bias
        is_source = _is_token(encoder_out)  # (B, S)
        is_target = tokens.ne(self.padding_idx)  # (B, N)
        offset = (_first_column(is_source) - _first_column(is_target)).float()  # (B,)
        if self._cross_bias_kind == "continued":
            offset += is_source.sum(dim=1)
        return CrossBias(self._cross_bias, offset)


def _is_token(encoder_out: EncoderOut) -> torch.Tensor:
    is_padding = encoder_out.encoder_padding_mask
    if is_padding is not None:
        return is_padding.logical_not()
    states = encoder_out.encoder_out
    return torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)


def _first_column(is_token: torch.Tensor) -> torch.Tensor:
    """Returns for each row where its first token stands, int64 (B,)."""
    return is_token.int().argmax(dim=1)
