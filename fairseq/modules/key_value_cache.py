"""What attention remembers of earlier tokens in incremental decoding.

Shapes: `B` rows, `H` heads, `T` new tokens, `S` tokens so far, `C` room for tokens, `K` head width.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from fairseq.attention import Prepared, attend
from fairseq.attention.backends.auto import AutoPrepared
from fairseq.attention.backends.dense import DensePrepared
from fairseq.attention.backends.sdpa import SdpaBackend

__all__ = ["KeyValueCache", "WindowedCache", "as_dense", "window_of"]

_SMALLEST = 64  # tokens for which there is room at first


class KeyValueCache(dict[str, torch.Tensor | None]):
    """Keys and values of one layer, in buffers that double when they are full.

    As a dictionary it holds `prev_key` and `prev_value`, (B, H, S, K), and `prev_key_padding_mask`,
    bool (B, S) or None.

    Attributes:
        num_tokens: tokens that were added, S.
    """

    def __init__(self) -> None:
        super().__init__(prev_key=None, prev_value=None, prev_key_padding_mask=None)
        self.num_tokens = 0
        self._keys: torch.Tensor | None = None  # (B, H, C, K)
        self._values: torch.Tensor | None = None
        self._num_kept = 0

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        prepared: Prepared,
        *,
        dropout_p: float = 0.0,
    ) -> torch.Tensor:
        """Adds new tokens and attends from them to all so far; (B, H, T, K) each."""
        k, v = self.append(k, v)
        self["prev_key_padding_mask"] = prepared.key_is_padding
        return attend(q, k, v, prepared, dropout_p=dropout_p)

    def append(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds keys and values (B, H, T, K); returns all that are kept."""
        self.num_tokens += k.size(2)
        if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
            return self._append_for_backward(k, v)
        start, self._num_kept = self._num_kept, self._num_kept + k.size(2)
        end = self._num_kept
        if self._keys is None or self._values is None or end > self._keys.size(2):
            self._keys = _larger(self._keys, k, start, end)
            self._values = _larger(self._values, v, start, end)
        self._keys[:, :, start:end] = k
        self._values[:, :, start:end] = v
        k, v = self._keys[:, :, :end], self._values[:, :, :end]
        self["prev_key"], self["prev_value"] = k, v
        return k, v

    def _append_for_backward(
        self, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What is written to in place has no gradient."""
        before = self["prev_key"], self["prev_value"]
        if before[0] is not None and before[1] is not None:
            k, v = torch.cat([before[0], k], dim=2), torch.cat([before[1], v], dim=2)
        self._keys, self._values, self._num_kept = k, v, k.size(2)
        self["prev_key"], self["prev_value"] = k, v
        return k, v

    def keep_last(self, count: int) -> None:
        """Forgets all but the last `count` tokens."""
        start, end = self._num_kept - count, self._num_kept
        if start <= 0 or self._keys is None or self._values is None:
            return
        # Room for as many again, so that copying costs less than one token for each new one.
        keys, values = self._keys[:, :, start:end], self._values[:, :, start:end]
        self._keys = _larger(keys, keys, count, count)
        self._values = _larger(values, values, count, count)
        self._num_kept = count

    @property
    def num_kept(self) -> int:
        """Tokens whose keys are there."""
        return self._num_kept

    def reorder(self, order: torch.Tensor) -> None:
        """Selects and reorders rows; `order` is int64 (new B,)."""
        mask = self["prev_key_padding_mask"]
        if mask is not None:
            self["prev_key_padding_mask"] = mask.index_select(0, order)
        if self._keys is None or self._values is None:
            return
        self._keys = _selected(self._keys, order, self._num_kept)
        self._values = _selected(self._values, order, self._num_kept)
        end = self._num_kept
        self["prev_key"], self["prev_value"] = self._keys[:, :, :end], self._values[:, :, :end]


def _larger(
    buffer: torch.Tensor | None, like: torch.Tensor, filled: int, needed: int
) -> torch.Tensor:
    room = max(2 * needed, _SMALLEST)
    new = like.new_empty((*like.shape[:2], room, like.size(3)))
    if buffer is not None:
        new[:, :, :filled] = buffer[:, :, :filled]
    return new


def _selected(buffer: torch.Tensor, order: torch.Tensor, filled: int) -> torch.Tensor:
    new = buffer.new_empty((len(order), *buffer.shape[1:]))
    new[:, :, :filled] = buffer[:, :, :filled].index_select(0, order)
    return new


def window_of(slope: float, largest_score: float, error: float) -> int:
    """Returns the distance beyond which the weights of an ALiBi head sum to less than `error`.

    With scores q k / sqrt(K) between -R and R, the weight of a key at distance d is at most
    exp(2 R - m d), since a query sees itself; those from D on sum to at most
    exp(2 R - m D) / (1 - exp(-m)), so that D = (2 R + ln(1 / (error (1 - exp(-m))))) / m.

    Args:
        slope: m, above 0.
        largest_score: R.
        error: above 0 and below 1.
    """
    nats = 2 * largest_score - math.log(error) - math.log(-math.expm1(-slope))
    return max(1, math.ceil(nats / slope))


class WindowedCache(KeyValueCache):
    """Keys and values of a layer with ALiBi, each head's as far back as its weights count.

    Every head forgets keys whose weights sum to less than `error`, by the largest score so far; see
    `window_of`. What larger scores of later tokens make of that bound is kept track of.

    Args:
        slopes: of the heads, (H,).
        error: largest sum of the weights that a query loses in a head.

    Attributes:
        largest_error: bound of what was really lost, over all heads and queries so far.
    """

    def __init__(self, slopes: torch.Tensor, error: float) -> None:
        super().__init__()
        self.slopes = slopes.double().tolist()
        self.error = error
        self.largest_error = 0.0
        self._heads = [KeyValueCache() for _ in self.slopes]
        self._scale = 1.0
        self._longest_query = [0.0] * len(self.slopes)
        self._longest_key = [0.0] * len(self.slopes)

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        prepared: Prepared,
        *,
        dropout_p: float = 0.0,
    ) -> torch.Tensor:
        dense = as_dense(prepared)
        self.num_tokens += k.size(2)
        self._measure(q, k)
        outputs = []
        for head, cache in enumerate(self._heads):
            own = slice(head, head + 1)
            self._forget(head, cache)
            keys, values = cache.append(k[:, own], v[:, own])
            of_head = _of_head(dense, head, keys.size(2))
            outputs.append(attend(q[:, own], keys, values, of_head, dropout_p=dropout_p))
        return torch.cat(outputs, dim=1)

    @property
    def num_kept(self) -> int:
        """Keys that are there, over all heads."""
        return sum(cache.num_kept for cache in self._heads)

    def reorder(self, order: torch.Tensor) -> None:
        for cache in self._heads:
            cache.reorder(order)

    def _measure(self, q: torch.Tensor, k: torch.Tensor) -> None:
        """Takes the longest query and key of each head."""
        for longest, new in ((self._longest_query, q), (self._longest_key, k)):
            norms = new.float().norm(dim=-1).amax(dim=(0, 2)).tolist()  # (H,)
            longest[:] = map(max, longest, norms)
        self._scale = q.size(-1) ** -0.5

    def _forget(self, head: int, cache: KeyValueCache) -> None:
        score = self._longest_query[head] * self._longest_key[head] * self._scale
        slope = self.slopes[head]
        window = window_of(slope, score, self.error)
        if cache.num_kept > 2 * window:
            cache.keep_last(window)
        if cache.num_kept < cache.num_tokens:
            # The next query stands one further from the last key.
            lost = 2 * score - slope * (cache.num_kept + 1) - math.log(-math.expm1(-slope))
            self.largest_error = max(self.largest_error, math.exp(min(lost, 700.0)))


def as_dense(prepared: Prepared) -> DensePrepared:
    """Returns what was prepared as a mask, made the first time it is asked for.

    Raises:
        ValueError: the attention backend has none.
    """
    if isinstance(prepared, AutoPrepared):
        prepared = prepared.form_for(SdpaBackend.name)
    if not isinstance(prepared, DensePrepared):
        raise ValueError(
            "--cache-error and --print-alignment need an attention backend that forms a mask; use "
            "--attention-backend auto, sdpa or reference"
        )
    return prepared


def _of_head(prepared: DensePrepared, head: int, num_keys: int) -> DensePrepared:
    """Returns what was prepared for all heads and keys, for one head and the last keys."""
    mask = prepared.mask
    heads = slice(head, head + 1) if mask.size(-3) > 1 else slice(0, 1)
    is_blind = prepared.is_blind
    if is_blind is not None and is_blind.size(1) > 1:
        is_blind = is_blind[:, heads]
    return dataclasses.replace(
        prepared, mask=mask[..., heads, :, mask.size(-1) - num_keys :], is_blind=is_blind
    )
