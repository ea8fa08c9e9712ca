"""The forward pass of a decoder, written out in float64 from its formulas.

Nothing here is shared with the code under test: slopes are from the paper's formula, the bias is
added pair by pair in the absolute form slope * key position, and every position looks back over
the keys it may see.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch

State = dict[str, torch.Tensor]
BAND = re.compile(r"decoder\.embed_tokens\.embeddings\.\d\.0\.weight")


def slopes(heads: int) -> list[float]:
    def power_of_two(n: int) -> list[float]:
        return [2 ** (-8 * (k + 1) / n) for k in range(n)]

    below = 2 ** math.floor(math.log2(heads))
    return power_of_two(below) + power_of_two(2 * below)[::2][: heads - below]


def layer_norm(x: torch.Tensor, state: State, name: str) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    variance = (centred**2).mean(-1, keepdim=True)
    weight, bias = state[name + ".weight"], state[name + ".bias"]
    return centred / torch.sqrt(variance + 1e-5) * weight + bias


def linear(x: torch.Tensor, state: State, name: str) -> torch.Tensor:
    return x @ state[name + ".weight"].T + state[name + ".bias"]


def attention(x: torch.Tensor, is_pad: torch.Tensor, state: State, name: str, heads: int) -> Any:
    batch, length, width = x.shape
    head_width = width // heads
    q, k, v = (
        linear(x, state, f"{name}.{part}_proj").view(batch, length, heads, head_width)
        for part in "qkv"
    )
    scores = torch.einsum("bihk,bjhk->bhij", q, k) / math.sqrt(head_width)
    for head, slope in enumerate(slopes(heads)):
        scores[:, head] += slope * torch.arange(length, dtype=torch.float64)
    future = torch.ones(length, length).triu(1).bool()
    scores = scores.masked_fill(future | is_pad[:, None, None, :], -1e30)
    out = torch.einsum("bhij,bjhk->bihk", torch.softmax(scores, -1), v)
    return linear(out.reshape(batch, length, width), state, f"{name}.out_proj")


def embed(tokens: torch.Tensor, state: State) -> torch.Tensor:
    if "decoder.embed_tokens.weight" in state:
        x = state["decoder.embed_tokens.weight"][tokens]
        if "decoder.project_in_dim.weight" in state:
            x = x @ state["decoder.project_in_dim.weight"].T
        return x
    bands = sorted(key[: -len(".0.weight")] for key in state if BAND.fullmatch(key))
    rows = [state[f"{band}.0.weight"] @ state[f"{band}.1.weight"].T for band in bands]
    return torch.cat(rows)[tokens]


def log_probs(x: torch.Tensor, state: State) -> torch.Tensor:
    if "decoder.output_projection.weight" in state:
        return torch.log_softmax(x @ state["decoder.output_projection.weight"].T, -1)
    name = "decoder.adaptive_softmax"
    head = f"{name}.head"
    if f"{head}.weight" in state:
        top = x @ state[f"{head}.weight"].T
    else:
        words = x @ state[f"{head}.word_proj.weight"].T
        top = torch.cat([words, x @ state[f"{head}.class_proj.weight"].T], -1)
    top = torch.log_softmax(top, -1)
    num_tails = sum(key.startswith(f"{name}.tail.") for key in state) // 2
    num_words = top.size(-1) - num_tails
    parts = [top[..., :num_words]]
    for i in range(num_tails):
        first, last = state[f"{name}.tail.{i}.0.weight"], state[f"{name}.tail.{i}.2.weight"]
        # Shared with the input it is stored as (D, d), of its own as (d, D).
        inner = x @ (first if first.size(0) == x.size(-1) else first.T)
        tail = torch.log_softmax(inner @ last.T, -1)
        parts.append(tail + top[..., num_words + i, None])
    return torch.cat(parts, -1)


def forward(tokens: torch.Tensor, state: State, cfg: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (features (B, T, D), log-probabilities (B, T, V)) of tokens (B, T)."""
    is_pad = tokens == 1
    x = embed(tokens, state) * math.sqrt(cfg.decoder_embed_dim)
    activate = {"relu": torch.relu, "gelu": exact_gelu}[cfg.activation_fn]
    for i in range(cfg.decoder_layers):
        name = f"decoder.layers.{i}"

        def attend(y: torch.Tensor, name: str = name) -> torch.Tensor:
            return attention(y, is_pad, state, f"{name}.self_attn", cfg.decoder_attention_heads)

        def feed_forward(y: torch.Tensor, name: str = name) -> torch.Tensor:
            return linear(activate(linear(y, state, f"{name}.fc1")), state, f"{name}.fc2")

        first, second = f"{name}.self_attn_layer_norm", f"{name}.final_layer_norm"
        if cfg.decoder_normalize_before:
            x = x + attend(layer_norm(x, state, first))
            x = x + feed_forward(layer_norm(x, state, second))
        else:
            x = layer_norm(x + attend(x), state, first)
            x = layer_norm(x + feed_forward(x), state, second)
    if "decoder.layer_norm.weight" in state:
        x = layer_norm(x, state, "decoder.layer_norm")
    if "decoder.project_out_dim.weight" in state:
        x = x @ state["decoder.project_out_dim.weight"].T
    return x, log_probs(x, state)


def exact_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def doubles(state: State) -> State:
    return {name: tensor.double() for name, tensor in state.items()}
