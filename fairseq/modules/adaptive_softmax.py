"""An output layer that is cheaper for rarer words (Grave et al. 2017).

The vocabulary is sorted by frequency and cut into bands. The head scores the words of the first
band and, as one class each, the other bands; the tail of a band scores its words:
log p(word) = log p(class of its band) + log p(word | band).
Shapes: `N` positions, `N_i` of them in band i, `D` width of the features, `V` words,
`C` words of the first band, `M` tails.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fairseq.distributed.vocabulary_scores import ScoresInParts
from fairseq.modules.adaptive_input import AdaptiveInput, band_width
from fairseq.modules.cutoffs import band_limits
from fairseq.modules.dropout import Dropout
from fairseq.utils import log_probs_of_targets

__all__ = ["AdaptiveSoftmax", "TiedHeadModule", "TiedLinear"]


class TiedLinear(nn.Module):
    """A linear map with the weight of another module.

    Args:
        weight: (out, in), or (in, out) if `transpose`.
        transpose: use the weight transposed.
    """

    def __init__(self, weight: nn.Parameter, transpose: bool) -> None:
        super().__init__()
        self.weight = weight
        self.transpose = transpose

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.t() if self.transpose else self.weight)


class TiedHeadModule(nn.Module):
    """The head of an adaptive softmax that shares the first band's table with the input.

    Args:
        weight: the table (C, d_0).
        input_dim: width D of the features; another width than d_0 is projected first.
        num_classes: number of tails M.
    """

    def __init__(self, weight: nn.Parameter, input_dim: int, num_classes: int) -> None:
        super().__init__()
        num_words, width = weight.shape
        words: nn.Module = TiedLinear(weight, transpose=False)
        if input_dim != width:
            words = nn.Sequential(nn.Linear(input_dim, width, bias=False), words)
        self.word_proj = words
        if num_classes > 0:
            self.class_proj = nn.Linear(input_dim, num_classes, bias=False)
        self.num_classes = num_classes
        self.out_dim = num_words + num_classes
        # Holds nothing; checkpoints have the key.
        self.register_buffer("_float_tensor", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor | ScoresInParts:
        """Scores features (N, D) as (N, C + M)."""
        if isinstance(self.word_proj, nn.Sequential) or not _is_whole(self.word_proj.weight):
            words = self.word_proj(x)
            if self.num_classes == 0:
                return words
            classes = self.class_proj(x)
            if isinstance(words, ScoresInParts):
                return words.with_shared(classes)
            return torch.cat([words, classes], -1)
        # The table is small beside the scores, so it is the table that is copied.
        weights: list[Any] = [self.word_proj.weight]
        if self.num_classes > 0:
            weights.append(self.class_proj.weight)
        return F.linear(x, torch.cat(weights))


def _is_whole(weight: Any) -> bool:
    """Tells whether this process holds all of a weight; of one in parts each scores its own."""
    return type(weight) is nn.Parameter


class AdaptiveSoftmax(nn.Module):
    """Head and tails of an adaptive softmax.

    Args:
        vocab_size: number of words V.
        input_dim: width D of the features.
        cutoff: first id of each band but the first.
        dropout: probability for features and the inner layer of tails, in training.
        factor: each tail is narrower than the one before by this factor.
        adaptive_inputs: input embeddings whose tables are shared; None shares nothing.
        tie_proj: share the projections of the input embeddings too.

    Raises:
        ValueError: the cutoffs go beyond the vocabulary, or a tail would have no width left.
    """

    def __init__(
        self,
        vocab_size: int,
        input_dim: int,
        cutoff: list[int],
        dropout: float,
        factor: float = 4.0,
        adaptive_inputs: AdaptiveInput | None = None,
        tie_proj: bool = False,
    ) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.cutoff = band_limits(cutoff, vocab_size, "--adaptive-softmax-cutoff")
        self.dropout_module = Dropout(dropout)
        self.num_tails = len(self.cutoff) - 1
        self.head: nn.Module
        if adaptive_inputs is None:
            self.head = nn.Linear(input_dim, self.cutoff[0] + self.num_tails, bias=False)
        else:
            words, _ = adaptive_inputs.weights_for_band(0)
            self.head = TiedHeadModule(words, input_dim, self.num_tails)
        self.tail = nn.ModuleList(
            self._make_tail(i, input_dim, dropout, factor, adaptive_inputs, tie_proj)
            for i in range(self.num_tails)
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
        self.register_buffer("version", torch.ones(1, dtype=torch.int64))

    def _make_tail(
        self,
        tail: int,
        input_dim: int,
        dropout: float,
        factor: float,
        adaptive_inputs: AdaptiveInput | None,
        tie_proj: bool,
    ) -> nn.Sequential:
        num_words = self.cutoff[tail + 1] - self.cutoff[tail]
        width = band_width(input_dim, factor, tail + 1, "--adaptive-softmax-factor")
        projection: nn.Module
        words: nn.Module
        if adaptive_inputs is None:
            projection = nn.Linear(input_dim, width, bias=False)
            words = nn.Linear(width, num_words, bias=False)
        else:
            table, shared = adaptive_inputs.weights_for_band(tail + 1)
            projection = (
                TiedLinear(shared, transpose=True)
                if tie_proj
                else nn.Linear(input_dim, table.size(1), bias=False)
            )
            words = TiedLinear(table, transpose=False)
        return nn.Sequential(projection, Dropout(dropout), words)

    def upgrade_state_dict_named(self, state_dict: dict[str, Any], name: str) -> None:
        """Refuses checkpoints of a time when the bands were laid out in another way.

        Raises:
            ValueError: the checkpoint has no version for this module.
        """
        if f"{name}.version" not in state_dict:
            raise ValueError(
                f"the checkpoint has no {name}.version: its adaptive softmax is of a form that "
                "fairseq gave up in 2018 and cannot be read"
            )

    def adapt_target(
        self, target: torch.Tensor
    ) -> tuple[list[torch.Tensor | None], list[torch.Tensor | None]]:
        """Splits word ids into what head and tails have to predict.

        Args:
            target: word ids, (N,).

        Returns:
            (rows, targets), one of each for the head and every tail. Rows are the positions in the
            band, int64 (N_i,), None for the head, which has them all. Targets count from the start
            of the band; in the head, class of tail i is C + i. Both are None for a tail without
            targets.
        """
        head_target = target.clone()
        rows: list[torch.Tensor | None] = [None]
        targets: list[torch.Tensor | None] = [head_target]
        for i, (start, end) in enumerate(zip(self.cutoff[:-1], self.cutoff[1:], strict=True)):
            here = ((target >= start) & (target < end)).nonzero().squeeze(1)  # (N_i,)
            head_target[here] = self.cutoff[0] + i
            is_empty = here.numel() == 0
            rows.append(None if is_empty else here)
            targets.append(None if is_empty else target[here] - start)
        return rows, targets

    def forward(
        self, features: torch.Tensor, target: torch.Tensor
    ) -> tuple[list[torch.Tensor | None], list[torch.Tensor | None]]:
        """Scores features for the loss; the whole vocabulary is never formed.

        Args:
            features: (..., D), N positions in all.
            target: word ids, N of them in any shape.

        Returns:
            (logits, targets): (N, C + M) and (N,) for the head, then (N_i, V_i) and (N_i,) for each
            tail, None and None for one without targets.
        """
        x = self.dropout_module(features.reshape(-1, features.size(-1)))  # (N, D)
        rows, targets = self.adapt_target(target.reshape(-1))
        logits: list[torch.Tensor | None] = [self.head(x)]
        for tail, here in zip(self.tail, rows[1:], strict=True):
            logits.append(None if here is None else tail(x.index_select(0, here)))
        return logits, targets

    def get_log_prob(
        self,
        features: torch.Tensor,
        target: torch.Tensor | None,
        *,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Computes log-probabilities over the vocabulary, in nats.

        Args:
            features: (B, T, D).
            target: word ids (B, T), to fill a tail only where the target is in it; elsewhere its
                columns are zero, and the target's own is always right. None fills everything.
            dtype: of the softmax and the result; None is that of the scores.

        Returns:
            (B, T, V).
        """
        x = features.reshape(-1, features.size(-1))  # (N, D)
        head = torch.log_softmax(self.head(x), dim=-1, dtype=dtype)  # (N, C + M)
        num_words = self.cutoff[0]
        out = head.new_zeros(x.size(0), self.vocab_size)
        out[:, :num_words] = head[:, :num_words]
        rows: list[torch.Tensor | None] = [None] * (self.num_tails + 1)
        if target is not None:
            rows, _ = self.adapt_target(target.reshape(-1))
        for i, tail in enumerate(self.tail):
            columns = slice(self.cutoff[i], self.cutoff[i + 1])
            log_class = head[:, num_words + i].unsqueeze(1)  # (N, 1)
            here = rows[i + 1]
            if target is None:
                out[:, columns] = torch.log_softmax(tail(x), dim=-1, dtype=dtype) + log_class
            elif here is not None:
                log_word = torch.log_softmax(tail(x[here]), dim=-1, dtype=dtype)
                out[here, columns] = log_word + log_class[here]
        return out.view(*features.shape[:-1], self.vocab_size)

    def get_target_log_prob(
        self,
        features: torch.Tensor,
        target: torch.Tensor,
        *,
        dtype: torch.dtype | None = torch.float32,
    ) -> torch.Tensor:
        """Computes the log-probability of each target alone, in nats.

        Needs no memory for the vocabulary beyond the scores of the bands that occur.

        Args:
            features: (B, T, D).
            target: word ids (B, T).
            dtype: of the softmax and the result; None is that of the scores.

        Returns:
            (B, T).
        """
        x = features.reshape(-1, features.size(-1))  # (N, D)
        rows, targets = self.adapt_target(target.reshape(-1))
        assert targets[0] is not None
        num_classes = self.cutoff[0] + self.num_tails
        out = log_probs_of_targets(self.head, x, targets[0], num_classes, dtype=dtype)  # (N,)
        for i, (here, relative) in enumerate(zip(rows[1:], targets[1:], strict=True)):
            if here is not None and relative is not None:
                num_words = self.cutoff[i + 1] - self.cutoff[i]
                log_word = log_probs_of_targets(
                    self.tail[i], x[here], relative, num_words, dtype=dtype
                )
                out = out.index_add(0, here, log_word)
        return out.view(target.shape)
