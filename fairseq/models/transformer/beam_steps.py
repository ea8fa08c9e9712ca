"""Decoding token by token, in few and small operations.

For one token it takes longer to call modules than to compute what they compute. Here the weights
of a decoder are taken out of them, and keys and values of all layers lie in two tensors.

The beams of a sentence share those, so that nothing is copied when beams change places: a query is
compared with the keys of all beams of its sentence, and a table of 0 and -inf says which of them
its hypothesis consists of. That of the prompt is there once.

Shapes: `B` sentences, `M` beams of a sentence, `N` = B M hypotheses, `P` columns of the prompt, `S`
columns so far, `C` room for keys, `Y` layers, `H` heads, `K` head width, `D` width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from fairseq.attention.backends.auto import AutoBackend
from fairseq.attention.backends.base import Rotation
from fairseq.attention.backends.sdpa import SdpaBackend
from fairseq.modules import IncrementalState, TransformerDecoderLayer
from fairseq.modules.key_value_cache import KeyValueCache, as_dense
from fairseq.modules.multihead_attention import MultiheadAttention
from fairseq.positions import PositionMethod

__all__ = ["BeamSteps", "can_step"]

_SMALLEST = 64  # columns for which there is room at first

Norm = Callable[[torch.Tensor], torch.Tensor]
Projection = Callable[[torch.Tensor], torch.Tensor]


class _Layer(NamedTuple):
    """The parts of a layer, as functions without hooks."""

    is_before: bool  # whether norms stand before the parts
    attention_norm: Norm
    inputs: Callable[[torch.Tensor], tuple[torch.Tensor, ...]]  # queries, keys and values
    output: Projection
    norm: Norm
    fc1: Projection
    activation: Callable[[torch.Tensor], torch.Tensor]
    fc2: Projection


def can_step(decoder: Any) -> bool:
    """Tells whether `BeamSteps` computes what a decoder's modules compute.

    It does for layers that nothing was added to, such as hooks, dropout that stays on, quantised
    weights, or workers that share them; and where the attention backend is free to choose.
    """
    if not isinstance(decoder.backend, AutoBackend | SdpaBackend) or decoder.head_share is not None:
        return False
    return len(decoder.layers) > 0 and all(map(_is_plain_layer, decoder.layers))


def _is_plain_layer(layer: nn.Module) -> bool:
    if type(layer) is not TransformerDecoderLayer:
        return False
    if type(layer.self_attn) is not MultiheadAttention:
        return False
    linear = {layer.fc1, layer.fc2, *layer.self_attn.children()} - {layer.self_attn.dropout_module}
    if any(type(each) is not nn.Linear for each in linear):
        return False
    return all(map(_is_plain, layer.modules())) and all(
        type(weight) is nn.Parameter for weight in layer.parameters()
    )


def _is_plain(module: nn.Module) -> bool:
    has_hooks = module._forward_hooks or module._forward_pre_hooks
    return not has_hooks and getattr(module, "rate", 0.0) == 0.0


class BeamSteps:
    """Reads one token of each hypothesis after the other.

    Args:
        decoder: a `TransformerDecoder` for which `can_step`.
        state: incremental state of it, filled with the prompts.
        prompt: ids, (B, P), padded on the left.
        num_beams: M.
        sequence_length: see `TransformerDecoder.forward`.
    """

    def __init__(
        self,
        decoder: Any,
        state: IncrementalState,
        prompt: torch.Tensor,
        num_beams: int,
        sequence_length: int | None,
    ) -> None:
        self._decoder = decoder
        self._num_beams = num_beams
        self._length = sequence_length
        self._layers = [_parts(layer) for layer in decoder.layers]
        caches = [layer.self_attn.cache(state) for layer in decoder.layers]
        self._num_prompt = prompt.size(1)
        self._fill_with(caches)
        self._bias = self._bias_by_distance()
        is_padding = prompt.eq(decoder.padding_idx)
        self._hidden: torch.Tensor | None = None  # 0 or -inf, (N, C)
        if num_beams > 1 or bool(is_padding.any()):
            self._hidden = self._keys.new_full((len(prompt) * num_beams, self._room), -torch.inf)
            is_token = is_padding.logical_not().repeat_interleave(num_beams, dim=0)
            self._hidden[:, : self._num_prompt].masked_fill_(is_token, 0.0)

    def _fill_with(self, caches: list[KeyValueCache]) -> None:
        """Takes over keys and values of the prompts."""
        num_filled = self._num_prompt
        first = caches[0]["prev_key"]
        assert first is not None
        num_rows, num_heads, _, width = first.shape
        self._heads = num_heads, width
        self._num_filled = num_filled
        self._room = num_filled + max(num_filled, _SMALLEST * self._num_beams)
        shape = (len(caches), num_rows * num_heads)
        self._keys = first.new_zeros(*shape, width, self._room)  # (Y, B H, K, C)
        self._values = first.new_zeros(*shape, self._room, width)  # (Y, B H, C, K)
        for number, cache in enumerate(caches):
            k, v = cache["prev_key"], cache["prev_value"]
            assert k is not None and v is not None
            self._keys[number, :, :, :num_filled] = k.flatten(0, 1).transpose(1, 2)
            self._values[number, :, :num_filled] = v.flatten(0, 1)
        self._number_columns()

    def _number_columns(self) -> None:
        """Notes in which column of the hypothesis each key stands, (C,)."""
        slots = torch.arange(self._room, device=self._keys.device)
        later = self._num_prompt + (slots - self._num_prompt) // self._num_beams
        self._columns = slots.where(slots < self._num_prompt, later)

    def _bias_by_distance(self) -> Callable[[int], torch.Tensor] | None:
        """Returns what makes the bias of keys (H or 1, C), if only their distance counts."""
        method, decoder = self._decoder.positions, self._decoder
        bias = method.bias(self._length)
        if not (method.is_relative and bias.is_relative and decoder.document_mask == "none"):
            return None

        @functools.lru_cache(maxsize=1)
        def table(length: int) -> torch.Tensor:
            keys = range(length - 1, -1, -1)
            found = bias.dense(range(length - 1, length), keys, device=self._keys.device)
            return found.squeeze(1).to(self._keys.dtype)  # (H or 1, length)

        def of_keys(column: int) -> torch.Tensor:
            length = _SMALLEST
            while length <= column:
                length *= 2
            distance = column - self._columns[: self._num_filled]
            return table(length).index_select(1, distance)

        return of_keys

    def read(self, tokens: torch.Tensor) -> torch.Tensor:
        """Takes all tokens so far, (N, S); returns what the output layer reads, (N, 1, D)."""
        column = tokens.size(1) - 1
        new = range(column, column + 1)
        x = self._decoder.embed(tokens, new)
        start, end = self._make_room()
        mask, rotate = self._prepare(x, tokens, new)
        x = x.squeeze(1)
        keys, values = self._keys[..., :end].unbind(0), self._values[:, :, :end].unbind(0)
        places = self._keys[..., start:end].unbind(0), self._values[:, :, start:end].unbind(0)
        for layer, *memory in zip(self._layers, keys, values, *places, strict=True):
            x = self._layer(layer, x, memory, mask, rotate)
        features: torch.Tensor = self._decoder.after_layers(x.unsqueeze(1))
        return features

    def _make_room(self) -> tuple[int, int]:
        """Returns the range of the new keys."""
        start = self._num_filled
        self._num_filled = end = start + self._num_beams
        if end > self._room:
            self._room = 2 * end
            self._keys = F.pad(self._keys, (0, self._room - self._keys.size(3)))
            self._values = F.pad(self._values, (0, 0, 0, self._room - self._values.size(2)))
            self._number_columns()
            if self._hidden is not None:
                added = self._room - self._hidden.size(1)
                self._hidden = F.pad(self._hidden, (0, added), value=-torch.inf)
        if self._hidden is not None:
            own = self._hidden.view(-1, self._num_beams, self._room)[:, :, start:end]
            own.diagonal(dim1=1, dim2=2).zero_()
        return start, end

    def _prepare(
        self, x: torch.Tensor, tokens: torch.Tensor, new: range
    ) -> tuple[torch.Tensor, Rotation | None]:
        """Returns what is added to scores, (B H, M, keys), and how queries and keys are turned."""
        method = self._decoder.positions
        rotate: Rotation | None
        if self._bias is not None:
            mask = self._bias(new.start).unsqueeze(0)  # (1, H or 1, keys)
            rotate = None
            if type(method).rotate is not PositionMethod.rotate:
                rotate = functools.partial(
                    method.rotate, positions=new, sequence_length=self._length
                )
        else:
            prepared = self._decoder.prepare_attention(x, tokens, new, sequence_length=self._length)
            dense = as_dense(prepared).mask.squeeze(-2)  # (H, S) or (N, H, S)
            mask = dense.index_select(-1, self._columns[: self._num_filled])
            mask = mask if mask.dim() == 3 else mask.unsqueeze(0)
            rotate = prepared.rotate
        if self._hidden is not None:
            mask = mask + self._hidden[:, None, : self._num_filled]  # (N, H or 1, keys)
        num_heads, num_beams = self._heads[0], self._num_beams
        mask = mask.expand(len(tokens), num_heads, -1)
        mask = (
            mask.view(-1, num_beams, *mask.shape[1:])
            if self._hidden is not None
            else (mask.unsqueeze(1))
        )
        return mask.transpose(1, 2).flatten(0, 1), rotate

    def _layer(
        self,
        layer: _Layer,
        x: torch.Tensor,
        memory: list[torch.Tensor],
        mask: torch.Tensor,
        rotate: Rotation | None,
    ) -> torch.Tensor:
        """Transforms new tokens (N, D) as `TransformerDecoderLayer` does."""
        if layer.is_before:
            x = x + self._attend(layer, layer.attention_norm(x), memory, mask, rotate)
            return x + layer.fc2(layer.activation(layer.fc1(layer.norm(x))))
        x = layer.attention_norm(x + self._attend(layer, x, memory, mask, rotate))
        return layer.norm(x + layer.fc2(layer.activation(layer.fc1(x))))

    def _attend(
        self,
        layer: _Layer,
        x: torch.Tensor,
        memory: list[torch.Tensor],
        mask: torch.Tensor,
        rotate: Rotation | None,
    ) -> torch.Tensor:
        """Attends from new tokens (N, D) to all so far, and stores their keys and values."""
        keys, values, new_keys, new_values = memory
        num_heads, width = self._heads
        by_head = (-1, self._num_beams, num_heads, width)
        q, k, v = layer.inputs(x)  # (N, D) each
        if rotate is not None:
            q, k = (y.view(-1, num_heads, 1, width) for y in (q, k))
            q, k = rotate(q, k)
        q, k, v = (y.reshape(by_head).transpose(1, 2).flatten(0, 1) for y in (q, k, v))
        new_keys.copy_(k.transpose(1, 2))  # (B H, K, M)
        new_values.copy_(v)
        scores = torch.baddbmm(mask, q, keys, alpha=width**-0.5)  # (B H, M, keys)
        out = torch.bmm(scores.softmax(-1), values)  # (B H, M, K)
        out = out.view(-1, num_heads, self._num_beams, width).transpose(1, 2)
        return layer.output(out.reshape(len(x), -1))

    def reorder(self, order: torch.Tensor, stay: torch.Tensor | None) -> None:
        """Lets beams take the places of others, and forgets sentences.

        Args:
            order: for each new hypothesis the old one of its sentence that it continues, int64
                (new N,).
            stay: sentences that stay, as indices among those before, int64; None is all.
        """
        if stay is not None:
            self._keys, self._values = (self._of(stay, x) for x in (self._keys, self._values))
        if self._hidden is not None:
            self._hidden = self._hidden.index_select(0, order)

    def _of(self, sentences: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        by_sentence = x.view(len(x), -1, self._heads[0], *x.shape[2:])
        return by_sentence.index_select(1, sentences).flatten(1, 2)


def _parts(layer: Any) -> _Layer:
    attention = layer.self_attn
    return _Layer(
        layer.normalize_before,
        _norm(layer.self_attn_layer_norm),
        _inputs(attention),
        _linear(attention.out_proj),
        _norm(layer.final_layer_norm),
        _linear(layer.fc1),
        layer.activation_fn,
        _linear(layer.fc2),
    )


def _inputs(attention: MultiheadAttention) -> Callable[[torch.Tensor], tuple[torch.Tensor, ...]]:
    joint = attention.joint_weights()
    if joint is not None:
        return lambda x: F.linear(x, *joint).chunk(3, dim=-1)
    projections = [_linear(p) for p in (attention.q_proj, attention.k_proj, attention.v_proj)]
    return lambda x: tuple(project(x) for project in projections)


def _linear(module: nn.Linear) -> Projection:
    return functools.partial(F.linear, weight=module.weight, bias=module.bias)


def _norm(module: nn.LayerNorm) -> Norm:
    shape, weight, bias, eps = list(module.normalized_shape), module.weight, module.bias, module.eps
    return lambda x: torch.layer_norm(x, shape, weight, bias, eps)
