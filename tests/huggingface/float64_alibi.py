"""GPT-2, BERT and RoBERTa with ALiBi, written out from their formulas.

`w` maps names of parameters to float64 tensors; shapes are B rows, T tokens, D width, H heads.
"""

from __future__ import annotations

import math

import torch


def alibi(num_heads: int, length: int, *, is_causal: bool) -> torch.Tensor:
    """-m_h |i - j|, (H, T, T), for a power of two of heads; minus infinity where not seen."""
    bias = torch.zeros(num_heads, length, length, dtype=torch.float64)
    for h in range(num_heads):
        for i in range(length):
            for j in range(length):
                slope = 2.0 ** (-8.0 * (h + 1) / num_heads)
                hidden = is_causal and j > i
                bias[h, i, j] = -math.inf if hidden else -slope * abs(i - j)
    return bias


def _norm(x, w, name, eps):
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).pow(2).mean(-1, keepdim=True)
    return (x - mean) / (variance + eps).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def _attend(q, k, v, bias):
    rows, length, width = q.shape
    heads = len(bias)
    q, k, v = (x.view(rows, length, heads, width // heads).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(width // heads) + bias
    return (scores.softmax(-1) @ v).transpose(1, 2).reshape(rows, length, width)


def gpt2_logits(w, ids, num_layers, num_heads):
    bias = alibi(num_heads, ids.size(1), is_causal=True)
    x = w["transformer.wte.weight"][ids]
    for layer in range(num_layers):
        p = f"transformer.h.{layer}"
        h = _norm(x, w, f"{p}.ln_1", 1e-5) @ w[f"{p}.attn.c_attn.weight"]
        h = _attend(*(h + w[f"{p}.attn.c_attn.bias"]).chunk(3, -1), bias)
        x = x + h @ w[f"{p}.attn.c_proj.weight"] + w[f"{p}.attn.c_proj.bias"]
        h = _norm(x, w, f"{p}.ln_2", 1e-5) @ w[f"{p}.mlp.c_fc.weight"] + w[f"{p}.mlp.c_fc.bias"]
        h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        x = x + h @ w[f"{p}.mlp.c_proj.weight"] + w[f"{p}.mlp.c_proj.bias"]
    return _norm(x, w, "transformer.ln_f", 1e-5) @ w["transformer.wte.weight"].T


def bert_logits(w, ids, num_layers, num_heads, *, name="bert"):
    """RoBERTa too, whose head has other names."""
    bias = alibi(num_heads, ids.size(1), is_causal=False)
    words = w[f"{name}.embeddings.word_embeddings.weight"]
    x = words[ids] + w[f"{name}.embeddings.token_type_embeddings.weight"][0]
    x = _norm(x, w, f"{name}.embeddings.LayerNorm", 1e-12)

    def linear(x, layer):
        return x @ w[f"{layer}.weight"].T + w[f"{layer}.bias"]

    def gelu(x):
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))

    for layer in range(num_layers):
        p = f"{name}.encoder.layer.{layer}"
        q, k, v = (linear(x, f"{p}.attention.self.{part}") for part in ("query", "key", "value"))
        h = linear(_attend(q, k, v, bias), f"{p}.attention.output.dense")
        x = _norm(x + h, w, f"{p}.attention.output.LayerNorm", 1e-12)
        h = linear(gelu(linear(x, f"{p}.intermediate.dense")), f"{p}.output.dense")
        x = _norm(x + h, w, f"{p}.output.LayerNorm", 1e-12)
    head = "cls.predictions.transform" if name == "bert" else "lm_head"
    norm = f"{head}.LayerNorm" if name == "bert" else f"{head}.layer_norm"
    last = "cls.predictions.bias" if name == "bert" else "lm_head.bias"
    return _norm(gelu(linear(x, f"{head}.dense")), w, norm, 1e-12) @ words.T + w[last]
