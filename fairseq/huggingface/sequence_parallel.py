"""Models of transformers under ALiBi that compute a part of every sequence.

Used by `SequenceParallelContextManager`: a model is given whole batches, of which each process
computes its columns; its attention meets that of the others in a backend of
`fairseq/model_parallel/sequence_attention.py`, which is told where all tokens stand.

Shapes: `B` rows, `H` heads, `T` columns of one process, `S` of the whole batch, `K` head width.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from fairseq.attention import Positions, Prepared, get_backend
from fairseq.attention.coordinates import at_columns
from fairseq.huggingface.attention import IMPLEMENTATIONS
from fairseq.huggingface.bias import ScoreBias
from fairseq.huggingface.requirements import import_transformers
from fairseq.model_parallel.collectives import total
from fairseq.model_parallel.sequence_attention import sequence_backend
from fairseq.model_parallel.sequence_batch import cut_batch, kept_columns, local_columns
from fairseq.model_parallel.sequence_outputs import gather_kept

if TYPE_CHECKING:
    from fairseq.model_parallel.sequence_parallel import SequenceParallelContextManager

__all__ = ["SharedModel", "find_models"]

NAME = "alibi_sequence_parallel"
"""Under which transformers knows this attention."""

_GATHERED = ("logits", "last_hidden_state")


def find_models(model: nn.Module) -> Iterable[nn.Module]:
    """Yields the outermost model of transformers in a module whose attention has ALiBi."""
    for module in model.modules():
        implementation = getattr(getattr(module, "config", None), "_attn_implementation", None)
        if implementation in IMPLEMENTATIONS.values():
            yield module
            return


@dataclass
class _Batch:
    """What attention knows of the batch that is computed.

    Attributes:
        length: S without the columns that were added for the cut.
        columns: this process's.
        positions: of all columns.
        is_padding: bool (B, S), None where nothing is.
        documents: (B, S), None where all is one.
        kept: columns whose logits are wanted.
        prepared: made for one kind of attention module, for all layers.
    """

    length: int
    columns: Positions
    positions: Positions
    is_padding: torch.Tensor | None
    documents: torch.Tensor | None
    kept: torch.Tensor
    prepared: dict[Any, Prepared] = field(default_factory=dict)


class SharedModel:
    """Makes a model compute its process's columns, until it is undone.

    Args:
        model: of transformers, after `apply_alibi`.
        how: group, layout and the rest.

    Raises:
        ValueError: the model attends to another sequence too.
    """

    def __init__(self, model: nn.Module, how: SequenceParallelContextManager) -> None:
        assert how.group is not None
        self.model = model
        self.how = how
        self.group = how.group
        self.padding_idx = 0
        self.batch: _Batch | None = None
        self.backend = sequence_backend(
            how.scheme,
            get_backend("auto"),
            how.group,
            how.layout,
            heads_k_stride=how.heads_k_stride,
        )
        self._attention: list[Any] = [each for each in model.modules() if hasattr(each, "alibi")]
        if any(each.alibi.kind == "cross" for each in self._attention):
            raise ValueError(
                f"{type(model).__name__} attends to another sequence, which cannot be cut along; "
                "sequence parallelism is for decoders and encoders alone"
            )
        _register()
        parts: list[Any] = [each for each in model.modules() if _has_alibi(each)]
        configs = {id(each.config): each.config for each in parts}
        self._implementations = [(each, each._attn_implementation) for each in configs.values()]
        for config, _ in self._implementations:
            config._attn_implementation = NAME
        for module in self._attention:
            module.sequence_sharing = self
        self._names = list(inspect.signature(model.forward).parameters)
        self._handles = [
            model.register_forward_pre_hook(self._cut, with_kwargs=True),
            model.register_forward_hook(self._join),
        ]

    def undo(self) -> None:
        """Leaves the model as it was."""
        for handle in self._handles:
            handle.remove()
        for config, implementation in self._implementations:
            config._attn_implementation = implementation
        for module in self._attention:
            del module.sequence_sharing

    def _cut(self, _: nn.Module, args: Any, kwargs: Any) -> tuple[tuple[()], dict[str, Any]]:
        batch = {**dict(zip(self._names, args, strict=False)), **kwargs}
        if batch.get("past_key_values") is not None:
            raise ValueError(
                "a cache (past_key_values) is given, but its sequence would have to be cut too; "
                "generate outside of the sequence-parallel context"
            )
        self.batch = self._describe(batch)
        documents = batch.pop("document_ids", None)
        assert documents is None or self.batch.documents is not None
        steps = self.how.gradient_accumulation_steps
        cut = cut_batch(batch, self.how.layout, self.how.rank, accumulation=steps)
        # Padding is told to attention by the backend.
        cut.update(attention_mask=None, return_dict=True)
        if "use_cache" in self._names:
            cut["use_cache"] = False
        taken = inspect.signature(self.model.forward).parameters.values()
        if not any(each.kind is each.VAR_KEYWORD for each in taken):
            cut = {name: value for name, value in cut.items() if name in self._names}
        return (), cut

    def _describe(self, batch: dict[str, Any]) -> _Batch:
        tokens = batch["input_ids"] if batch.get("input_ids") is not None else None
        first = batch["inputs_embeds"] if tokens is None else tokens
        length = first.size(1)
        padded = self.how.layout.padded(length)
        added = padded - length
        mask = batch.get("attention_mask")
        is_padding = None
        if mask is not None or added:
            seen = torch.ones(first.shape[:2], device=first.device) if mask is None else mask
            is_padding = F.pad(seen, (0, added)).eq(0)
        ids, documents = batch.get("position_ids"), batch.get("document_ids")
        positions: Positions = range(padded)
        if ids is not None:
            ids = ids.expand(first.size(0), -1)
            if documents is None:
                documents = ids.diff(dim=1, prepend=ids[:, :1] - 1).ne(1).cumsum(1)
            positions = F.pad(ids, (0, added), value=int(ids.max()) + 1)
        return _Batch(
            length,
            self.how.layout.columns(self.how.rank, padded),
            positions,
            is_padding,
            None if documents is None else F.pad(documents, (0, added), value=-1),
            kept_columns(batch.get("logits_to_keep", 0), length),
        )

    def _join(self, _: nn.Module, args: Any, output: Any) -> Any:
        """Sums the loss, and gathers outputs where that is wanted."""
        if self.batch is None or not self.batch.prepared:
            raise ValueError(
                f"{type(self.model).__name__} computed no attention of ALiBi, so each process "
                "attended to its own part of the sequence alone; do not change the model's "
                "attention implementation within the sequence-parallel context"
            )
        if getattr(output, "loss", None) is not None:
            output.loss = total(output.loss, self.group)
        if self.how.gather_outputs:
            own = local_columns(self.batch.kept, self.batch.columns)
            for name in _GATHERED:
                x = getattr(output, name, None)
                if x is not None:
                    is_cut = x.size(1) == len(own)
                    x = x if is_cut else x.index_select(1, own.to(x.device))
                    length = self.how.layout.padded(self.batch.length)
                    x = gather_kept(x, self.group, self.how.layout, self.batch.kept, length)
                    setattr(output, name, x)
        return output

    def attend(
        self,
        bias: ScoreBias,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        dropout: float,
        scaling: float | None,
    ) -> torch.Tensor:
        """Attends from this process's queries (B, H, T, K) to all keys; returns (B, H, T, K)."""
        batch = self.batch
        assert batch is not None
        groups = query.size(1) // key.size(1)
        if groups > 1:
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        which = (id(bias), query.dtype, query.device)
        if which not in batch.prepared:
            term = bias.linear_bias(batch.length)
            documents = batch.documents
            batch.prepared[which] = self.backend.prepare(
                term,
                at_columns(batch.positions, batch.columns),
                batch.positions,
                rule=term.rule,
                key_is_padding=batch.is_padding,
                query_documents=None if documents is None else at_columns(documents, batch.columns),
                key_documents=documents,
                dtype=query.dtype,
                device=query.device,
            )
        prepared = batch.prepared[which]
        return self.backend.attend(query, key, value, prepared, dropout_p=dropout, scale=scaling)


def _has_alibi(module: nn.Module) -> bool:
    config = getattr(module, "config", None)
    return getattr(config, "_attn_implementation", None) in IMPLEMENTATIONS.values()


def _register() -> None:
    functions = import_transformers("modeling_utils").AttentionInterface
    masks = import_transformers("masking_utils").AttentionMaskInterface
    IMPLEMENTATIONS.setdefault(NAME, NAME)
    functions.register(NAME, _attention)
    masks.register(NAME, _no_mask)


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Computes attention as transformers calls it, (B, T, H, K)."""
    for extra in ("softcap", "s_aux"):
        if kwargs.get(extra) is not None:
            raise ValueError(f"sequence-parallel attention has no {extra}, which this model needs")
    sharing: SharedModel = module.sequence_sharing  # type: ignore[assignment]
    bias: ScoreBias = module.alibi  # type: ignore[assignment]
    out = sharing.attend(bias, query, key, value, dropout=dropout, scaling=scaling)
    return out.transpose(1, 2).contiguous(), None


def _no_mask(**kwargs: Any) -> None:
    """Makes no mask of transformers: who may see whom is told to the backend."""
