"""The layers of a transformer with an encoder and a decoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fairseq.attention import Prepared
from fairseq.modules.basic import FairseqDropout, LayerNorm, get_activation_fn
from fairseq.modules.encoder_attention import EncoderAttention, Memory
from fairseq.modules.incremental_state import IncrementalState
from fairseq.modules.multihead_attention import MultiheadAttention

__all__ = ["TransformerCrossDecoderLayer", "TransformerEncoderLayer"]

Part = Callable[[torch.Tensor], torch.Tensor]


class _Layer(nn.Module):
    """Self-attention and a feed-forward net, each with layer norm, dropout and a residual sum.

    The norms stand before the parts if `<side>_normalize_before`, else after the sums.

    Args:
        cfg: settings with the names of `TransformerConfig`.
    """

    side: str

    def __init__(self, cfg: Any) -> None:
        super().__init__()
        width = self._setting(cfg, "embed_dim")
        inner_width = self._setting(cfg, "ffn_embed_dim")
        heads = self._setting(cfg, "attention_heads")
        self.embed_dim = width
        self.normalize_before = self._setting(cfg, "normalize_before")
        self.activation_fn = get_activation_fn(cfg.activation_fn)
        self.dropout_module = FairseqDropout(cfg.dropout, type(self).__name__)
        self.activation_dropout_module = FairseqDropout(
            cfg.activation_dropout or cfg.relu_dropout or 0.0, type(self).__name__
        )
        # In the order in which parameters stand in checkpoints.
        self.self_attn = MultiheadAttention(width, heads, dropout=cfg.attention_dropout)
        self.self_attn_layer_norm = LayerNorm(width)
        self._add_parts(cfg)
        self.fc1 = nn.Linear(width, inner_width)
        self.fc2 = nn.Linear(inner_width, width)
        self.final_layer_norm = LayerNorm(width)

    def _setting(self, cfg: Any, name: str) -> Any:
        return getattr(cfg, f"{self.side}_{name}")

    def _add_parts(self, cfg: Any) -> None:
        """Makes what stands between self-attention and the feed-forward net."""

    def _residual(self, x: torch.Tensor, norm: nn.Module, part: Part) -> torch.Tensor:
        if self.normalize_before:
            return x + self.dropout_module(part(norm(x)))
        total: torch.Tensor = norm(x + self.dropout_module(part(x)))
        return total

    def _feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc2(
            self.activation_dropout_module(self.activation_fn(self.fc1(x)))
        )
        return out


class TransformerEncoderLayer(_Layer):
    """A layer of an encoder: what tokens see is said by what is prepared for all layers."""

    side = "encoder"

    def forward(self, x: torch.Tensor, prepared: Prepared) -> torch.Tensor:
        """Transforms (B, S, D); `prepared` is handed on to the attention."""
        x = self._residual(x, self.self_attn_layer_norm, lambda y: self.self_attn(y, prepared))
        return self._residual(x, self.final_layer_norm, self._feed_forward)


class TransformerCrossDecoderLayer(_Layer):
    """A layer of a decoder that also attends to the encoder's output."""

    side = "decoder"

    def _add_parts(self, cfg: Any) -> None:
        self.encoder_attn = EncoderAttention(
            cfg.decoder_embed_dim,
            cfg.decoder_attention_heads,
            cfg.encoder_embed_dim,
            dropout=cfg.attention_dropout,
        )
        self.encoder_attn_layer_norm = LayerNorm(cfg.decoder_embed_dim)

    def forward(
        self,
        x: torch.Tensor,
        prepared: Prepared,
        incremental_state: IncrementalState | None,
        memory: Memory,
    ) -> torch.Tensor:
        """Transforms (B, T, D); what is prepared and the state are handed on to the attentions."""

        def attend_to_tokens(y: torch.Tensor) -> torch.Tensor:
            return self.self_attn(y, prepared, incremental_state)

        def attend_to_source(y: torch.Tensor) -> torch.Tensor:
            return self.encoder_attn(y, memory, incremental_state)

        x = self._residual(x, self.self_attn_layer_norm, attend_to_tokens)
        x = self._residual(x, self.encoder_attn_layer_norm, attend_to_source)
        return self._residual(x, self.final_layer_norm, self._feed_forward)
