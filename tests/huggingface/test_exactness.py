"""Logits, loss and every gradient against ALiBi written out in float64."""

from __future__ import annotations

import pytest
import torch
from float64_alibi import alibi, bert_logits, gpt2_logits
from tiny_transformers import (
    HEADS,
    VOCABULARY,
    bert,
    gpt2,
    largest,
    llama,
    needs_5,
    roberta,
    tokens,
)

from fairseq.huggingface import apply_alibi

_TOLERANCE = 1e-11


def _bert(w, ids):
    return bert_logits(w, ids, 2, HEADS)


def _roberta(w, ids):
    return bert_logits(w, ids, 2, HEADS, name="roberta")


def _gpt2(w, ids):
    return gpt2_logits(w, ids, 2, HEADS)


@pytest.mark.parametrize(
    ("build", "formula", "shift"),
    [
        (gpt2, _gpt2, 1),
        pytest.param(bert, _bert, 0, marks=needs_5),
        pytest.param(roberta, _roberta, 0, marks=needs_5),
    ],
)
@pytest.mark.parametrize("underneath", ["sdpa", "eager"])
def test_logits_loss_and_gradients(build, formula, shift, underneath) -> None:
    model = build(attn_implementation=underneath).double()
    assert apply_alibi(model) == 2
    ids = tokens(length=21)  # Longer than the position table was.
    output = model(input_ids=ids, labels=ids)
    _loss(output.logits, ids, shift).backward()

    w = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    logits = formula(w, ids)
    loss = _loss(logits, ids, shift)
    loss.backward()

    assert largest(output.logits, logits) < _TOLERANCE * float(logits.detach().abs().max())
    assert largest(output.loss, loss) < 1e-5  # GPT-2 takes its loss in float32.
    for name, parameter in model.named_parameters():
        expected = w[name].grad if w[name].grad is not None else torch.zeros_like(w[name])
        found = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        assert largest(found, expected) < _TOLERANCE * (1 + float(expected.abs().max())), name


def _loss(logits: torch.Tensor, ids: torch.Tensor, shift: int) -> torch.Tensor:
    targets = ids[:, shift:].flatten()
    kept = logits[:, : ids.size(1) - shift].reshape(-1, VOCABULARY)
    return (kept.logsumexp(-1) - kept.gather(1, targets[:, None])[:, 0]).mean()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_at_4096_keys(dtype) -> None:
    # The form slope * key index is off by 1.4 (bfloat16) and 0.58 (float16) here.
    model = gpt2(num_hidden_layers=1)
    apply_alibi(model)
    module = model.transformer.h[0].attn
    length, width = 4096, 8
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, length, width, generator=generator) for _ in range(3))
    last = slice(length - 16, None)
    mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None, last]
    halves = (q[:, :, last].to(dtype), k.to(dtype), v.to(dtype))
    from transformers import AttentionInterface

    found, _ = AttentionInterface()["alibi"](module, *halves, mask)
    scores = q[:, :, last].double() @ k.double().mT / width**0.5 + _rows(length, 16)
    expected = (scores.softmax(-1) @ v.double()).transpose(1, 2)
    assert largest(found, expected) < 0.03


def _rows(length: int, last: int) -> torch.Tensor:
    queries = torch.arange(length - last, length, dtype=torch.float64)[:, None]
    distance = queries - torch.arange(length, dtype=torch.float64)
    slopes = 2.0 ** (-8.0 * torch.arange(1, HEADS + 1, dtype=torch.float64) / HEADS)
    bias = -slopes[:, None, None] * distance
    return bias.masked_fill(distance < 0, float("-inf"))


def test_grouped_heads_and_no_rotation() -> None:
    # One layer, its queries and keys taken from the model, everything else by formula.
    model = llama(num_hidden_layers=1).double()
    apply_alibi(model)
    ids = tokens(length=20)
    layer = model.model.layers[0]
    h = layer.input_layernorm(model.model.embed_tokens(ids))
    q, k, v = (
        getattr(layer.self_attn, f"{part}_proj")(h).view(2, 20, -1, 8).transpose(1, 2)
        for part in "qkv"
    )
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    scores = q @ k.mT / 8**0.5 + alibi(HEADS, 20, is_causal=True)
    expected = layer.self_attn.o_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 20, 32))
    caught = []
    layer.self_attn.register_forward_hook(lambda module, args, output: caught.append(output[0]))
    model(ids)
    assert largest(caught[0], expected) < 1e-12
