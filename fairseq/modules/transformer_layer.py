"""One layer of a transformer decoder."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fairseq.attention import Prepared
from fairseq.modules.basic import FairseqDropout, LayerNorm, get_activation_fn
from fairseq.modules.feed_forward import relu_feed_forward
from fairseq.modules.incremental_state import IncrementalState
from fairseq.modules.multihead_attention import MultiheadAttention

__all__ = ["TransformerDecoderLayer", "attention_dropout"]


def attention_dropout(layers: nn.ModuleList) -> float:
    """Returns the rate at which a model's layers drop attention weights now."""
    if len(layers) == 0:
        return 0.0
    first: Any = layers[0]
    rate: float = first.self_attn.dropout_module.rate
    return rate


class TransformerDecoderLayer(nn.Module):
    """Self-attention and a feed-forward net, each with layer norm, dropout and a residual sum.

    The norms stand before the two parts if `decoder_normalize_before`, else after the sums.

    Args:
        cfg: settings with the names of `TransformerLanguageModelConfig`.
    """

    def __init__(self, cfg: Any) -> None:
        super().__init__()
        width = cfg.decoder_embed_dim
        self.embed_dim = width
        self.normalize_before = cfg.decoder_normalize_before
        self.activation_fn = get_activation_fn(cfg.activation_fn)
        self.dropout_module = FairseqDropout(cfg.dropout, type(self).__name__)
        self.activation_dropout_module = FairseqDropout(
            cfg.activation_dropout or cfg.relu_dropout or 0.0, type(self).__name__
        )
        self.self_attn = MultiheadAttention(
            width, cfg.decoder_attention_heads, dropout=cfg.attention_dropout
        )
        self.self_attn_layer_norm = LayerNorm(width)
        self.fc1 = nn.Linear(width, cfg.decoder_ffn_embed_dim)
        self.fc2 = nn.Linear(cfg.decoder_ffn_embed_dim, width)
        self.final_layer_norm = LayerNorm(width)

    def forward(
        self,
        x: torch.Tensor,
        prepared: Prepared,
        incremental_state: IncrementalState | None = None,
        *,
        num_last: int | None = None,
    ) -> torch.Tensor:
        """Transforms tokens.

        Args:
            x: (B, T, D).
            prepared: handed on to the attention, like the state.
            incremental_state: see `MultiheadAttention`.
            num_last: how many of the tokens, the last ones, are wanted, N; None is all. All are
                attended to.

        Returns:
            (B, T, D), or (B, N, D).
        """
        options = {} if num_last is None else {"num_last": num_last}
        rest = x if num_last is None else x[:, -num_last:]
        if self.normalize_before:
            y = self.self_attn(self.self_attn_layer_norm(x), prepared, incremental_state, **options)
            x = self._add(rest, y)
            return self._add(x, self._feed_forward(self.final_layer_norm(x)))
        y = self.self_attn(x, prepared, incremental_state, **options)
        x = self.self_attn_layer_norm(self._add(rest, y))
        return self.final_layer_norm(self._add(x, self._feed_forward(x)))

    def _add(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Returns the residual sum of `x` and what is left of `y` after dropout."""
        total: torch.Tensor = self.dropout_module(y, add_to=x)
        return total

    def _feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.activation_fn is F.relu:
            return relu_feed_forward(x, self.fc1, self.fc2, self.activation_dropout_module.rate)
        y = self.activation_dropout_module(self.activation_fn(self.fc1(x)))
        out: torch.Tensor = self.fc2(y)
        return out
