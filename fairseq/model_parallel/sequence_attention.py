"""Attention backends for a sequence that is cut over several processes.

A process computes the queries of its columns. `prepare` is told where its T queries and all S keys
of the sequence stand; `attend` gets the keys and values of its own columns and brings those of the
others in, in one of three ways:

* `allgather`: every process gets all keys and values, and attends with any other backend. It keeps
  its own alone for the backward pass, which gathers and attends once more.
* `ulysses`: every process gets all columns of some heads, and attends with any other backend
  (Jacobs et al. 2023, DeepSpeed Ulysses, arXiv:2309.14509).
* `ring`: keys and values go round, see `fairseq/model_parallel/ring_attention.py`.

Shapes: `B` rows, `H` heads, `G` processes, `T` columns of one of them, `S` = G T, `K` head width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from fairseq.attention import (
    AttentionBackend,
    AttentionBias,
    AttentionRule,
    Positions,
    Prepared,
)
from fairseq.attention.backends.request import Request
from fairseq.model_parallel.block_attention import BlockScores, Places
from fairseq.model_parallel.collectives import (
    RingOfProcesses,
    gather_columns,
    swap_heads_and_columns,
)
from fairseq.model_parallel.layout import SequenceLayout
from fairseq.model_parallel.ring_attention import RingPlan, ring_attention

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "SCHEMES",
    "AllGatherBackend",
    "RingBackend",
    "SequenceParallelBackend",
    "UlyssesBackend",
    "sequence_backend",
]


@dataclass(frozen=True)
class Part:
    """A run of queries and heads that the other backend computes at once.

    Attributes:
        rows: which of the T queries.
        num_keys: of the S keys the first ones, that these queries may see.
        prepared: what the other backend attends with.
    """

    rows: slice
    num_keys: int
    prepared: Prepared


@dataclass(kw_only=True)
class GatherPrepared(Prepared):
    """What is computed at once, for each run of heads whose keys are gathered at once."""

    runs: Sequence[Sequence[Part]]


@dataclass(kw_only=True)
class UlyssesPrepared(Prepared):
    """What the other backend prepared for some heads of the whole sequence."""

    inner: Prepared


@dataclass(kw_only=True)
class RingPrepared(Prepared):
    """The plan of a ring, and what its scores are made of."""

    plan: RingPlan
    bias: AttentionBias
    rule: AttentionRule


class SequenceParallelBackend(AttentionBackend):
    """What the three ways share.

    Args:
        inner: computes attention where all keys are there.
        group: the processes that share a sequence.
        layout: which columns each of them holds.
    """

    def __init__(
        self, inner: AttentionBackend, group: ProcessGroup, layout: SequenceLayout
    ) -> None:
        self.inner = inner
        self.group = group
        self.layout = layout
        self.rank = dist.get_rank(group)

    def prepare_request(self, request: Request) -> Prepared:
        """See `AttentionBackend.prepare`.

        Args:
            request: with the positions of this process's T queries, as the layout says, and those
                of all S keys, in the order of the sequence.

        Raises:
            ValueError: the queries are not this process's part of the keys.
        """
        num_queries, num_keys = _length(request.query_positions), _length(request.key_positions)
        if num_queries * self.layout.size != num_keys:
            raise ValueError(
                f"{num_queries} queries are given for {num_keys} keys, but each of "
                f"{self.layout.size} processes computes an equal part of a sequence; give whole "
                "sequences, padded to a multiple, with `columns`, and no incremental state"
            )
        keys = Places(request.key_positions, request.key_is_padding, request.key_documents)
        num_heads = request.bias.num_heads
        which = request.head_slice
        heads = slice(0, num_heads, 1) if which is None else slice(*which.indices(num_heads))
        return self._prepare(request, keys, heads)

    @abstractmethod
    def _prepare(self, request: Request, keys: Places, heads: slice) -> Prepared:
        """Prepares for all keys, in the order of the sequence; the queries stand among them."""

    def _in_order(self, x: torch.Tensor) -> torch.Tensor:
        """Puts columns (..., S, K) that came from process 0, 1, ... in the order of the sequence.

        Positions are a range then, which more backends take than positions one by one.
        """
        if self.layout.num_segments == 1:
            return x
        return x.index_select(-2, self.layout.order(x.size(-2)).argsort().to(x.device))

    def _inner_prepare(
        self, request: Request, queries: Places, keys: Places, heads: slice
    ) -> Prepared:
        """Returns what the other backend makes of the request for other places and heads."""
        return replace(
            request,
            query_positions=queries.positions,
            key_positions=keys.positions,
            key_is_padding=keys.is_padding,
            query_documents=queries.documents,
            key_documents=keys.documents,
            head_slice=None if heads == slice(0, request.bias.num_heads, 1) else heads,
        ).of(self.inner)


class AllGatherBackend(SequenceParallelBackend):
    """Gathers keys and values, all heads at once or a few at a time.

    Args:
        inner: computes attention of T queries to S keys.
        group: the processes.
        layout: which columns each of them holds.
        heads_k_stride: heads that are gathered at once; None is all of them. Fewer need less memory
            for keys and values of the whole sequence, in more exchanges.

    Raises:
        ValueError: the stride is not positive.
    """

    name = "allgather"

    def __init__(
        self,
        inner: AttentionBackend,
        group: ProcessGroup,
        layout: SequenceLayout,
        heads_k_stride: int | None = None,
    ) -> None:
        super().__init__(inner, group, layout)
        if heads_k_stride is not None and heads_k_stride < 1:
            raise ValueError(f"heads_k_stride is {heads_k_stride}; it must be 1 or more")
        self.heads_k_stride = heads_k_stride

    def _prepare(self, request: Request, keys: Places, heads: slice) -> GatherPrepared:
        return GatherPrepared(
            self,
            key_is_padding=keys.is_padding,
            runs=[self._parts(request, keys, some) for some in self._runs(heads)],
        )

    def _parts(self, request: Request, keys: Places, heads: slice) -> list[Part]:
        """Returns the parts of a run of heads: a part for each run of successive columns."""
        length, parts, first = _length(keys.positions), [], 0
        for segment in self.layout.segments(self.rank, length):
            # Where columns are in order of time, no query sees what follows its own segment.
            ends = request.is_causal and isinstance(keys.positions, range)
            num_keys = segment.stop if ends else length
            prepared = self._inner_prepare(
                request, keys.at(segment), keys.at(range(num_keys)), heads
            )
            rows = slice(first, first + len(segment))
            parts.append(Part(rows, num_keys, prepared))
            first = rows.stop
        return parts

    def _runs(self, heads: slice) -> list[slice]:
        num_heads = heads.stop - heads.start
        stride = self.heads_k_stride or num_heads
        if num_heads % stride:
            raise ValueError(
                f"heads_k_stride {stride} does not divide the {num_heads} heads; use "
                f"{_divisors(num_heads)}"
            )
        return [slice(i, i + stride, 1) for i in range(heads.start, heads.stop, stride)]

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        prepared: Prepared,
        *,
        dropout_p: float = 0.0,
        scale: float | None = None,
    ) -> torch.Tensor:
        assert isinstance(prepared, GatherPrepared)
        runs, outs = prepared.runs, []
        for parts, *some in zip(runs, *(x.chunk(len(runs), dim=1) for x in (q, k, v)), strict=True):
            if torch.is_grad_enabled() and any(x.requires_grad for x in some):
                # What is gathered would be kept for the backward pass, 2 B S D numbers a layer.
                out = checkpoint(
                    self._gather_and_attend,
                    *(some, parts, dropout_p, scale),
                    use_reentrant=False,
                    preserve_rng_state=dropout_p > 0,
                )
            else:
                out = self._gather_and_attend(some, parts, dropout_p, scale)
            outs.append(out)
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)

    def _gather_and_attend(
        self,
        some: Sequence[torch.Tensor],
        parts: Sequence[Part],
        dropout_p: float,
        scale: float | None,
    ) -> torch.Tensor:
        """Attends with some heads of queries, keys and values."""
        q, k, v = some
        both = gather_columns(torch.stack([k, v]), self.group, -2)
        all_k, all_v = self._in_order(both).unbind()  # (B, H, S, K)
        outs = [
            self.inner.attend(
                q[:, :, part.rows],
                all_k[:, :, : part.num_keys],
                all_v[:, :, : part.num_keys],
                part.prepared,
                dropout_p=dropout_p,
                scale=scale,
            )
            for part in parts
        ]
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)


class UlyssesBackend(SequenceParallelBackend):
    """Exchanges columns for heads before attention, and back after it."""

    name = "ulysses"

    def _prepare(self, request: Request, keys: Places, heads: slice) -> UlyssesPrepared:
        num_heads = heads.stop - heads.start
        if num_heads % self.layout.size:
            raise ValueError(
                f"ulysses shares out the heads, but {self.layout.size} processes do not divide "
                f"{num_heads}; use {_divisors(num_heads)} processes for a sequence, or "
                "--sequence-parallel-attention allgather or ring"
            )
        each = num_heads // self.layout.size
        first = heads.start + self.rank * each
        inner = self._inner_prepare(request, keys, keys, slice(first, first + each, 1))
        return UlyssesPrepared(self, key_is_padding=keys.is_padding, inner=inner)

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        prepared: Prepared,
        *,
        dropout_p: float = 0.0,
        scale: float | None = None,
    ) -> torch.Tensor:
        assert isinstance(prepared, UlyssesPrepared)
        together = swap_heads_and_columns(torch.stack([q, k, v]), self.group, to_heads=True)
        q, k, v = self._in_order(together).unbind()  # (B, H / G, S, K)
        out = self.inner.attend(q, k, v, prepared.inner, dropout_p=dropout_p, scale=scale)
        if self.layout.num_segments > 1:
            out = out.index_select(-2, self.layout.order(out.size(-2)).to(out.device))
        return swap_heads_and_columns(out, self.group, to_heads=False)


class RingBackend(SequenceParallelBackend):
    """Hands keys and values round; computes attention itself, in tiles."""

    name = "ring"

    def _prepare(self, request: Request, keys: Places, heads: slice) -> RingPrepared:
        length = _length(keys.positions)
        held = [self.layout.segments(rank, length) for rank in range(self.layout.size)]
        each = len(held[0][0])
        runs = [range(i * each, (i + 1) * each) for i in range(len(held[0]))]
        plan = RingPlan(
            RingOfProcesses(self.group),
            places=[[keys.at(segment) for segment in segments] for segments in held],
            runs=runs,
        )
        bias, rule = request.bias, request.rule
        is_all = heads == slice(0, bias.num_heads, 1)
        return RingPrepared(
            self,
            key_is_padding=keys.is_padding,
            plan=plan,
            bias=bias if is_all else bias.heads(heads),
            rule=rule if is_all else rule.heads(heads),
        )

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        prepared: Prepared,
        *,
        dropout_p: float = 0.0,
        scale: float | None = None,
    ) -> torch.Tensor:
        assert isinstance(prepared, RingPrepared)
        block = BlockScores(
            bias=prepared.bias,
            rule=prepared.rule,
            scale=q.size(-1) ** -0.5 if scale is None else scale,
            dropout_p=dropout_p,
        )
        return ring_attention(q, k, v, prepared.plan, block)


SCHEMES: dict[str, type[SequenceParallelBackend]] = {
    "allgather": AllGatherBackend,
    "ring": RingBackend,
    "ulysses": UlyssesBackend,
    # Names of ring-flash-attention: the first gathers keys and values too, the second is a ring.
    "varlen_llama3": AllGatherBackend,
    "batch_ring": RingBackend,
}


def sequence_backend(
    scheme: str,
    inner: AttentionBackend,
    group: ProcessGroup,
    layout: SequenceLayout,
    *,
    heads_k_stride: int | None = None,
) -> SequenceParallelBackend:
    """Makes the backend of one of `SCHEMES`.

    Raises:
        ValueError: no scheme has that name, or a stride is given to one that does not gather.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"ring_attn_func is {scheme!r}; it must be one of {', '.join(SCHEMES)}")
    kind = SCHEMES[scheme]
    if kind is AllGatherBackend:
        return AllGatherBackend(inner, group, layout, heads_k_stride)
    if heads_k_stride is not None:
        raise ValueError(
            f"heads_k_stride {heads_k_stride} is given, but {scheme} gathers no keys; leave it "
            "out, or use ring_attn_func allgather"
        )
    return kind(inner, group, layout)


def _length(positions: Positions) -> int:
    return len(positions) if isinstance(positions, range) else positions.size(-1)


def _divisors(number: int) -> str:
    return ", ".join(str(each) for each in range(1, number + 1) if number % each == 0)
