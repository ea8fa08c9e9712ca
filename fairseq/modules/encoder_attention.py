"""Attention of a decoder to what an encoder has made of the source.

Shapes: `B` rows, `T` new tokens, `S` source tokens, `D` width, `E` width of the encoder, `H` heads,
`K` = D / H head width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from fairseq.attention import Prepared, attend
from fairseq.attention.backends.reference import ReferenceBackend
from fairseq.modules.basic import FairseqDropout
from fairseq.modules.incremental_state import IncrementalState
from fairseq.modules.key_value_cache import as_dense
from fairseq.modules.multihead_attention import MultiheadAttention

__all__ = ["EncoderAttention", "Memory"]

_STATE = "encoder_state"


class Memory(NamedTuple):
    """What every layer of a decoder attends to beside the tokens so far.

    Attributes:
        states: output of the encoder, (B, S, E).
        prepared: bias and mask for T queries and S keys, made once for all layers.
    """

    states: torch.Tensor
    prepared: Prepared


class EncoderAttention(MultiheadAttention):
    """Queries from the decoder, keys and values from the encoder.

    With an incremental state the first call stores keys and values, and later ones take them.

    Args:
        embed_dim: width D.
        num_heads: heads H; D must be a multiple of it.
        key_dim: width E.
        dropout: probability that an attention weight is dropped in training.
    """

    def __init__(
        self, embed_dim: int, num_heads: int, key_dim: int, *, dropout: float = 0.0
    ) -> None:
        super().__init__(embed_dim, num_heads, dropout=dropout)
        # The name by which --retain-dropout-modules knows all attention.
        self.dropout_module = FairseqDropout(dropout, MultiheadAttention.__name__)
        if key_dim != embed_dim:
            self.k_proj = nn.Linear(key_dim, embed_dim)
            self.v_proj = nn.Linear(key_dim, embed_dim)
            for projection in (self.k_proj, self.v_proj, self.q_proj):
                nn.init.xavier_uniform_(projection.weight)

    def forward(  # type: ignore[override]
        self,
        x: torch.Tensor,
        memory: Memory,
        incremental_state: IncrementalState | None = None,
    ) -> torch.Tensor:
        """Attends from new tokens (B, T, D) to the source; returns (B, T, D)."""
        q = self._split_heads(self.q_proj(x))  # (B, H, T, K)
        k, v = self._keys_and_values(memory.states, incremental_state)  # (B, H, S, K)
        out = attend(q, k, v, memory.prepared, dropout_p=self.dropout_module.rate)
        merged: torch.Tensor = self.out_proj(out.transpose(1, 2).flatten(2))
        return merged

    def weights(self, x: torch.Tensor, memory: Memory) -> torch.Tensor:
        """Returns how much each of the tokens (B, T, D) attends to the source, (B, H, T, S).

        Computed apart from `forward`, whose kernels keep no weights; without dropout.
        """
        q, k = self._split_heads(self.q_proj(x)), self._split_heads(self.k_proj(memory.states))
        scores = ReferenceBackend().scores(q, k, as_dense(memory.prepared))
        return torch.softmax(scores, dim=-1, dtype=torch.float32)

    def _keys_and_values(
        self, states: torch.Tensor, incremental_state: IncrementalState | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        stored = self.get_incremental_state(incremental_state, _STATE)
        if stored is not None:
            k, v = stored["key"], stored["value"]
            assert k is not None and v is not None
            return k, v
        k, v = (self._split_heads(project(states)) for project in (self.k_proj, self.v_proj))
        if incremental_state is not None:
            self.set_incremental_state(incremental_state, _STATE, {"key": k, "value": v})
        return k, v
