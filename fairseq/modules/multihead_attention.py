"""Self-attention with its four projections.

Shapes: `B` rows, `T` new tokens, `S` tokens so far, `D` width, `H` heads, `K` = D / H head width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from fairseq.attention import Prepared, attend
from fairseq.modules.basic import FairseqDropout, is_plain_linear
from fairseq.modules.incremental_state import IncrementalState, StatefulModule
from fairseq.modules.key_value_cache import KeyValueCache

__all__ = ["MultiheadAttention"]

# For fewer it takes longer to copy the weights than one product saves.
_MANY_TOKENS = 256


class MultiheadAttention(StatefulModule):
    """Projects tokens to queries, keys and values, attends, and projects back.

    Args:
        embed_dim: width D.
        num_heads: heads H; D must be a multiple of it.
        dropout: probability that an attention weight is dropped in training.
        bias: whether the projections have biases.

    Attributes:
        attend: computes what stands between the projections; a compiler is kept away from it.

    Raises:
        ValueError: the heads do not divide the width.
    """

    def __init__(
        self, embed_dim: int, num_heads: int, *, dropout: float = 0.0, bias: bool = True
    ) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim % num_heads:
            divisors = [str(n) for n in range(1, min(embed_dim, 64) + 1) if embed_dim % n == 0]
            raise ValueError(
                f"--decoder-attention-heads {num_heads} does not divide --decoder-embed-dim "
                f"{embed_dim}; possible numbers of heads are {', '.join(divisors)}"
            )
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.dropout_module = FairseqDropout(dropout, type(self).__name__)
        # In the order in which random numbers are drawn.
        self.k_proj = nn.Linear(embed_dim, embed_dim, bias)
        self.v_proj = nn.Linear(embed_dim, embed_dim, bias)
        self.q_proj = nn.Linear(embed_dim, embed_dim, bias)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias)
        self.attend: Callable[..., torch.Tensor] = _attend
        self._joint: tuple[torch.Tensor, torch.Tensor | None] | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weights; q, k and v as parts of one projection, three times as wide."""
        for projection in (self.k_proj, self.v_proj, self.q_proj):
            nn.init.xavier_uniform_(projection.weight, gain=2**-0.5)
        nn.init.xavier_uniform_(self.out_proj.weight)
        if self.out_proj.bias is not None:
            nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        x: torch.Tensor,
        prepared: Prepared,
        incremental_state: IncrementalState | None = None,
        *,
        num_last: int | None = None,
    ) -> torch.Tensor:
        """Attends from new tokens to all tokens so far.

        Args:
            x: new tokens, (B, T, D).
            prepared: bias and mask for T queries and S keys.
            incremental_state: keys and values of earlier tokens; those of the new ones are added.
            num_last: attend from so many of the new tokens, the last N, for which `prepared` is
                then; None is all.

        Returns:
            (B, T, D), or (B, N, D).
        """
        q, k, v = map(self._split_heads, self._project(x, num_last))  # (B, H, T, K)
        out = self.attend(self, q, k, v, prepared, incremental_state)  # (B, H, T, K)
        merged: torch.Tensor = self.out_proj(out.transpose(1, 2).flatten(2))
        return merged

    def _project(self, x: torch.Tensor, num_last: int | None) -> tuple[torch.Tensor, ...]:
        """Returns queries (B, N, D), and keys and values (B, T, D)."""
        parts = (self.q_proj, self.k_proj, self.v_proj)
        joint = None if num_last is not None or torch.is_grad_enabled() else self.joint_weights()
        if joint is not None:
            return F.linear(x, *joint).chunk(3, dim=-1)
        num_tokens = x.numel() // self.embed_dim
        is_joint = (
            num_last is None and num_tokens >= _MANY_TOKENS and all(map(is_plain_linear, parts))
        )
        if not is_joint:
            rest = x if num_last is None else x[:, -num_last:]
            return self.q_proj(rest), self.k_proj(x), self.v_proj(x)
        # One product instead of three. The weights stay three parameters.
        weight = torch.cat([part.weight for part in parts])
        bias = None if parts[0].bias is None else torch.cat([part.bias for part in parts])
        return F.linear(x, weight, bias).split([len(part.weight) for part in parts], dim=-1)

    def _split_heads(self, x: torch.Tensor) -> torch.Tensor:
        # The number of heads is left open: a worker may hold the projections of some heads only.
        return x.view(*x.shape[:-1], -1, self.head_dim).transpose(1, 2)

    def cache(
        self, incremental_state: IncrementalState, new: KeyValueCache | None = None
    ) -> KeyValueCache:
        """Returns the keys and values of earlier tokens, made if there are none.

        Args:
            incremental_state: where they lie.
            new: takes their place.
        """
        stored = self.get_incremental_state(incremental_state, "attn_state")
        if stored is None or new is not None:
            stored = KeyValueCache() if new is None else new
            self.set_incremental_state(incremental_state, "attn_state", stored)
        assert isinstance(stored, KeyValueCache)
        return stored

    def num_cached(self, incremental_state: IncrementalState | None) -> int:
        """Returns how many tokens the incremental state has seen."""
        stored = self.get_incremental_state(incremental_state, "attn_state")
        return stored.num_tokens if isinstance(stored, KeyValueCache) else 0

    def join_projections(self) -> None:
        """Lays the weights of queries, keys and values beside each other, for generation.

        They become parts of one matrix, stored by input channel, which is the faster way for few
        tokens. The parameters keep their names, shapes and values; what replaces their storage,
        such as a change of type, undoes it.
        """
        parts = (self.q_proj, self.k_proj, self.v_proj)
        if not all(map(is_plain_linear, parts)):
            return
        with torch.no_grad():
            weight = torch.cat([part.weight for part in parts]).t().contiguous().t()  # (3 D, D)
            bias = None if parts[0].bias is None else torch.cat([part.bias for part in parts])
            sizes = [len(part.weight) for part in parts]
            for part, view in zip(parts, weight.split(sizes), strict=True):
                part.weight.data = view
            if bias is not None:
                for part, view in zip(parts, bias.split(sizes), strict=True):
                    part.bias.data = view
        self._joint = (weight, bias)

    def joint_weights(self) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """Returns weight (3 D, D) and bias (3 D,) that `join_projections` made; None if undone."""
        is_current = (
            self._joint is not None and self._joint[0].data_ptr() == self.q_proj.weight.data_ptr()
        )
        return self._joint if is_current else None

    def upgrade_state_dict_named(self, state_dict: dict[str, torch.Tensor], name: str) -> None:
        """Splits a joint projection of old checkpoints into q, k and v."""
        prefix = name + "." if name else ""
        for kind in ("weight", "bias"):
            joint = state_dict.pop(f"{prefix}in_proj_{kind}", None)
            if joint is not None:
                for part, tensor in zip("qkv", joint.chunk(3), strict=True):
                    state_dict[f"{prefix}{part}_proj.{kind}"] = tensor


def _attend(
    module: MultiheadAttention,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    prepared: Prepared,
    incremental_state: IncrementalState | None,
) -> torch.Tensor:
    """Attends from new queries (B, H, T, K) to all keys so far."""
    q, k = prepared.rotate(q, k)
    rate = module.dropout_module.rate
    if incremental_state is None:
        return attend(q, k, v, prepared, dropout_p=rate)
    return module.cache(incremental_state).attend(q, k, v, prepared, dropout_p=rate)
