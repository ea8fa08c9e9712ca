"""A transformer encoder: source tokens in, one state for each of them out.

As in the decoder the bias is made once, before the layer loop. Here it goes both ways.

Shapes: `B` rows, `S` source tokens, `D` width, `H` heads.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import nn

from fairseq.attention import Positions, Prepared, get_backend
from fairseq.models import upgrade
from fairseq.models.encoder_decoder import EncoderOut, FairseqEncoder
from fairseq.modules import (
    FairseqDropout,
    LayerDropModuleList,
    LayerNorm,
    PositionalEmbedding,
    checkpoint_wrapper,
)
from fairseq.modules.encoder_decoder_layers import TransformerEncoderLayer
from fairseq.modules.transformer_layer import attention_dropout
from fairseq.positions import PositionMethod, Surroundings, find_method, table_rows
from fairseq.positions.encoders import encoder_method, encoder_rule
from fairseq.utils import on_host

__all__ = ["TransformerEncoder"]


class TransformerEncoder(FairseqEncoder):
    """Embeds source tokens and transforms them layer by layer.

    Args:
        cfg: settings with the names of `TransformerConfig`.
        dictionary: of the words it reads.
        embed_tokens: input embeddings.

    Attributes:
        sequence_length: for position methods that adapt to length, the length of sources; None is
            that of the longest in a batch.

    Raises:
        ValueError: settings contradict each other; the message names the options.
    """

    def __init__(self, cfg: Any, dictionary: Any, embed_tokens: nn.Embedding) -> None:
        super().__init__(dictionary)
        # 3 says that there is a final norm where the settings want one, see `upgrade`.
        self.version: torch.Tensor
        self.register_buffer("version", torch.full((1,), 3.0))
        width = cfg.encoder_embed_dim
        self.padding_idx: int = dictionary.pad()
        self.max_source_positions = cfg.max_source_positions
        self.dropout_module = FairseqDropout(cfg.dropout, type(self).__name__)
        self.embed_tokens = embed_tokens
        self.embed_scale = 1.0 if cfg.no_scale_embedding else math.sqrt(width)
        self.embed_positions = self._build_position_table(cfg)
        self.layernorm_embedding = LayerNorm(width) if cfg.layernorm_embedding else None
        self.layers = self._build_layers(cfg)
        self.layer_norm: nn.LayerNorm | None = (
            LayerNorm(width) if cfg.encoder_normalize_before else None
        )
        self.positions = self._build_position_method(cfg)
        self.rule = encoder_rule(self.positions, cfg.encoder_attention_heads)
        self.sequence_length: int | None = None
        self.backend = get_backend(cfg.attention_backend)

    def _build_position_table(self, cfg: Any) -> Any:
        """Makes the table that checkpoints have a key for, whether the method reads it or not."""
        method = find_method(cfg.position_method)
        if cfg.no_token_positional_embeddings or not method.has_table:
            return None
        learned = method.is_table_learned
        learned = cfg.encoder_learned_pos if learned is None else learned
        if cfg.max_source_positions is None and learned:
            raise ValueError("learned position embeddings need a size; set --max-source-positions")
        limit = cfg.max_source_positions or 0  # a table of sines grows when it is read
        return PositionalEmbedding(limit, cfg.encoder_embed_dim, self.padding_idx, learned)

    def _build_position_method(self, cfg: Any) -> PositionMethod:
        surroundings = Surroundings(
            num_heads=cfg.encoder_attention_heads,
            padding_idx=self.padding_idx,
            table=self.embed_positions,
            head_dim=cfg.encoder_embed_dim // cfg.encoder_attention_heads,
            settings=cfg,
            train_length=cfg.train_length,
        )
        return encoder_method(cfg.position_method, surroundings, cfg.encoder_alibi_variant)

    def _build_layers(self, cfg: Any) -> nn.ModuleList:
        layerdrop = cfg.encoder_layerdrop
        layers = LayerDropModuleList(layerdrop) if layerdrop > 0 else nn.ModuleList()
        for _ in range(cfg.encoder_layers):
            layer = self.build_encoder_layer(cfg)
            if cfg.checkpoint_activations or cfg.offload_activations:
                layer = checkpoint_wrapper(layer, cfg.offload_activations)
            layers.append(layer)
        return layers

    def build_encoder_layer(self, cfg: Any) -> nn.Module:
        """Makes one layer."""
        return TransformerEncoderLayer(cfg)

    def forward(  # type: ignore[override]
        self,
        src_tokens: torch.Tensor,
        src_lengths: torch.Tensor | None = None,
        return_all_hiddens: bool = False,
    ) -> EncoderOut:
        """Computes a state for every source token.

        Args:
            src_tokens: ids, (B, S), padded at either end.
            src_lengths: not needed, since padding is known by its id; part of every batch.
            return_all_hiddens: collect the embeddings and the output of every layer.

        Returns:
            The states; those at padding mean nothing.
        """
        x = self.embed(src_tokens)  # (B, S, D)
        prepared = self.prepare_attention(x, src_tokens)
        states = [x]
        for layer in self.layers:
            x = layer(x, prepared)
            states.append(x)
        if self.layer_norm is not None:
            x = self.layer_norm(x)
        return EncoderOut(x, prepared.key_is_padding, tuple(states) if return_all_hiddens else ())

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embeds tokens (B, S), as (B, S, D)."""
        x = self.embed_scale * self.embed_tokens(tokens)
        x = self.positions.embed(x, tokens)
        if self.layernorm_embedding is not None:
            x = self.layernorm_embedding(x)
        return self.dropout_module(x)

    def prepare_attention(self, x: torch.Tensor, tokens: torch.Tensor) -> Prepared:
        """Makes, once for all layers, what is added to attention scores.

        Args:
            x: embeddings, (B, S, D).
            tokens: their ids, (B, S).
        """
        is_padding = tokens.eq(self.padding_idx)  # (B, S)
        has_padding = bool(on_host(tokens).eq(self.padding_idx).any())
        key_is_padding = is_padding if has_padding else None
        places: Positions = range(tokens.size(1))
        if key_is_padding is not None and not self.positions.is_relative:
            rows = table_rows(tokens, self.padding_idx)  # (B, S)
            places = (rows - self.padding_idx - 1).clamp_(min=0)
        length = self._sequence_length(tokens)
        prepared = self.backend.prepare(
            self.positions.bias(length),
            places,
            places,
            rule=self.rule,
            key_is_padding=key_is_padding,
            dropout_p=attention_dropout(self.layers),
            dtype=x.dtype,
            device=x.device,
        )
        prepared.rotate = functools.partial(
            self.positions.rotate, positions=places, sequence_length=length
        )
        return prepared

    def _sequence_length(self, tokens: torch.Tensor) -> int | None:
        if not self.positions.depends_on_length:
            return None
        return self.sequence_length or tokens.size(1)

    def reorder_encoder_out(self, encoder_out: EncoderOut, new_order: torch.Tensor) -> EncoderOut:
        """Selects and reorders rows, as beam search does.

        Args:
            encoder_out: what `forward` returned.
            new_order: int64 (new B,), for each new row the old one.
        """
        mask = encoder_out.encoder_padding_mask
        return EncoderOut(
            encoder_out.encoder_out.index_select(0, new_order),
            None if mask is None else mask.index_select(0, new_order),
            tuple(state.index_select(0, new_order) for state in encoder_out.encoder_states),
        )

    def max_positions(self) -> int | None:
        """Returns the longest source that training and validation let through."""
        limits = [self.max_source_positions]
        if self.positions.uses_table:
            limits.append(getattr(self.embed_positions, "max_positions", None))
        return min((limit for limit in limits if limit is not None), default=None)

    def upgrade_state_dict_named(self, state_dict: dict[str, Any], name: str) -> None:
        """Brings a state dict up to date, in which this encoder's names start with `name`."""
        upgrade.fit_position_table(
            state_dict, f"{name}.embed_positions", self.embed_positions, self.positions.uses_table
        )
        upgrade.rename_layer_norms(state_dict, name, "encoder")
        version = state_dict.get(f"{name}.version")
        if version is None or float(version.reshape(-1)[0]) < 2:
            self.layer_norm = None
            state_dict[f"{name}.version"] = torch.ones(1)
