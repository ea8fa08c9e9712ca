"""Attention of some queries to a block of keys, forward and backward, in tiles of bounded size.

The whole is put together from blocks as in Liu et al. 2023 (Ring Attention, arXiv:2310.01889): a
block's output counts in proportion to the exponential of the log-sum-exp of its scores. The
backward pass forms the scores again, from the log-sum-exp over all blocks (Dao et al. 2022,
FlashAttention, arXiv:2205.14135, appendix B).

Shapes: `B` rows, `H` heads, `T` queries, `S` keys of the block, `K` head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from fairseq.attention import AttentionBias, AttentionRule, MaskRule, Positions
from fairseq.attention.coordinates import at_columns
from fairseq.attention.mask import hidden_keys, join

__all__ = [
    "BlockScores",
    "Gradients",
    "Known",
    "Places",
    "RunningSoftmax",
    "Tile",
    "accumulate_gradients",
    "sum_type",
    "tiles",
]

TILE_ELEMENTS = 1 << 21
"""Most scores that are held at once, 8 MiB in float32."""


@dataclass(frozen=True)
class Places:
    """Where some queries or keys stand.

    Attributes:
        positions: as a backend's `prepare` takes them.
        is_padding: bool (B, T), None where no one is.
        documents: (T,) or (B, T), None where all are of one.
    """

    positions: Positions
    is_padding: torch.Tensor | None = None
    documents: torch.Tensor | None = None

    def at(self, columns: Positions) -> Places:
        """Returns the places of some columns."""
        return Places(
            at_columns(self.positions, columns),
            None if self.is_padding is None else at_columns(self.is_padding, columns),
            None if self.documents is None else at_columns(self.documents, columns),
        )


@dataclass(frozen=True)
class Tile:
    """Some successive queries against a block of keys.

    Attributes:
        rows: which of the T queries.
        queries: where those stand.
        keys: where the S keys stand.
    """

    rows: slice
    queries: Places
    keys: Places


@dataclass(frozen=True)
class BlockScores:
    """What a score is made of, besides queries and keys.

    Attributes:
        bias: what is added.
        rule: who may see whom.
        scale: factor of the products.
        dropout_p: probability that a weight is dropped.
        generator: draws which; a backward pass needs one seeded alike.
    """

    bias: AttentionBias
    rule: AttentionRule
    scale: float
    dropout_p: float = 0.0
    generator: torch.Generator | None = None

    def can_see(self, queries: Places, keys: Places) -> bool:
        """Tells whether some query may see some key, as far as that is known without data."""
        if not (isinstance(self.rule, MaskRule) and self.rule.is_causal):
            return True
        query, key = queries.positions, keys.positions
        if not (isinstance(query, range) and isinstance(key, range)):
            return True
        return len(query) > 0 and len(key) > 0 and key[0] <= query[-1]

    def scores(self, q: torch.Tensor, k: torch.Tensor, tile: Tile) -> torch.Tensor:
        """Returns scores (B, H, T, S) in the type of sums, -inf where a key is not seen."""
        dtype = sum_type(q)
        scores = torch.matmul(q.to(dtype) * self.scale, k.to(dtype).transpose(-2, -1))
        scores += join(
            self.bias,
            self.rule,
            tile.queries.positions,
            tile.keys.positions,
            dtype=dtype,
            device=q.device,
        )
        keys = tile.keys
        is_hidden = hidden_keys(keys.is_padding, tile.queries.documents, keys.documents)
        return scores if is_hidden is None else scores.masked_fill_(is_hidden, -torch.inf)

    def kept(self, like: torch.Tensor) -> torch.Tensor | None:
        """Draws which weights stay, 0 or 1 / (1 - p); None if all do."""
        if self.dropout_p == 0:
            return None
        draws = torch.rand(like.shape, generator=self.generator, device=like.device)
        return (draws >= self.dropout_p).to(like.dtype).div_(1 - self.dropout_p)


def sum_type(x: torch.Tensor) -> torch.dtype:
    """Returns the type that scores and sums are computed in: float32, or float64."""
    return torch.promote_types(x.dtype, torch.float32)


def tiles(num_queries: int, scores_per_query: int) -> Iterator[range]:
    """Cuts queries into runs whose scores are at most `TILE_ELEMENTS`, one query at least."""
    each = max(1, TILE_ELEMENTS // max(1, scores_per_query))
    for start in range(0, num_queries, each):
        yield range(start, min(start + each, num_queries))


class RunningSoftmax:
    """Output and log-sum-exp of queries over the blocks of keys so far.

    Args:
        q: the queries, (B, H, T, K).

    Attributes:
        out: (B, H, T, K), float32 or float64.
        lse: (B, H, T), -inf for queries that have seen no key.
    """

    def __init__(self, q: torch.Tensor) -> None:
        self.out = q.new_zeros(q.shape, dtype=sum_type(q))
        self.lse = self.out.new_full(q.shape[:-1], -torch.inf)

    def add(
        self, tile: Tile, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: BlockScores
    ) -> None:
        """Takes a block of keys and values (B, H, S, K) into account, for a tile of queries."""
        here = tile.rows
        weights = block.scores(q[:, :, here], k, tile)  # (B, H, t, S)
        lse = torch.logsumexp(weights, dim=-1)
        weights.sub_(_finite(lse).unsqueeze(-1)).exp_()
        kept = block.kept(weights)
        if kept is not None:
            weights.mul_(kept)
        out = torch.matmul(weights, v.to(weights.dtype))
        before = self.lse[:, :, here]
        joint = torch.logaddexp(before, lse)
        for total, share in ((self.out[:, :, here], before), (out, lse)):
            total.mul_(torch.exp(share - _finite(joint)).unsqueeze(-1))
        self.out[:, :, here] += out
        self.lse[:, :, here] = joint


@dataclass
class Gradients:
    """Sums that grow tile by tile.

    Attributes:
        q: of the queries, (B, H, T, K).
        k: of the keys of this block, (B, H, S, K).
        v: of its values.
        learned: of the bias's learned tensors.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    learned: Sequence[torch.Tensor] = ()


@dataclass(frozen=True)
class Known:
    """What a backward pass knows of all blocks together.

    Attributes:
        lse: log-sum-exp of the scores, (B, H, T).
        grad_out: gradient of the output, (B, H, T, K), in the type of sums.
        mean_grad: product of output and its gradient, summed over K, (B, H, T).
        learned: the bias's learned tensors, as leaves.
    """

    lse: torch.Tensor
    grad_out: torch.Tensor
    mean_grad: torch.Tensor
    learned: Sequence[torch.Tensor] = ()


def accumulate_gradients(
    tile: Tile,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block: BlockScores,
    known: Known,
    into: Gradients,
) -> None:
    """Adds the gradients of a block of keys, for a tile of queries.

    Args:
        tile: which of the T queries, and where they and the S keys stand.
        q: (B, H, T, K).
        k: (B, H, S, K).
        v: (B, H, S, K).
        block: as in the forward pass, with a generator in the same state.
        known: of all blocks.
        into: what is added to.
    """
    here = tile.rows
    dtype = sum_type(q)
    q_rows, grad_rows = q[:, :, here].to(dtype), known.grad_out[:, :, here]
    k, v = k.to(dtype), v.to(dtype)
    weights = block.scores(q_rows, k, tile)  # (B, H, t, S)
    weights.sub_(_finite(known.lse[:, :, here]).unsqueeze(-1)).exp_()
    grad = torch.matmul(grad_rows, v.transpose(-2, -1))
    kept = block.kept(weights)
    dropped = weights if kept is None else weights * kept
    into.v += torch.matmul(dropped.transpose(-2, -1), grad_rows)
    if kept is not None:
        grad.mul_(kept)
    grad.sub_(known.mean_grad[:, :, here].unsqueeze(-1)).mul_(weights)  # of the scores
    into.q[:, :, here] += torch.matmul(grad, k).mul_(block.scale)
    into.k += torch.matmul(grad.transpose(-2, -1), q_rows).mul_(block.scale)
    if known.learned:
        _accumulate_learned(grad, block, tile, known.learned, into.learned)


def _accumulate_learned(
    grad: torch.Tensor,
    block: BlockScores,
    tile: Tile,
    learned: Sequence[torch.Tensor],
    into: Sequence[torch.Tensor],
) -> None:
    with torch.enable_grad():
        query_positions, key_positions = tile.queries.positions, tile.keys.positions
        term = block.bias.dense(query_positions, key_positions, device=grad.device)
    grad_term = grad.sum_to_size(*([1] * (4 - term.dim())), *term.shape).view(term.shape)
    grads = torch.autograd.grad(term, learned, grad_term.to(term.dtype), allow_unused=True)
    for each, found in zip(into, grads, strict=True):
        if found is not None:
            each += found


def _finite(lse: torch.Tensor) -> torch.Tensor:
    """Returns 0 for -inf, so that a query without keys gets weights of 0 instead of NaN."""
    return lse.where(lse > -torch.inf, 0.0)
