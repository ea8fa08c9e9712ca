"""The examples of docs/attention.md run, and compute what the document says."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from naive_attention import naive_attention

from fairseq import attention
from fairseq.attention import AttentionBias
from fairseq.positions import alibi_slopes
from fairseq.positions.documents import document_numbers

TEXT = (Path(__file__).parents[2] / "docs" / "attention.md").read_text()


def run_examples():
    """Returns what each example leaves behind; a later one goes on from the one before."""
    left, results = {}, []
    for block in re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL):
        exec(compile(block, "docs/attention.md", "exec"), left)
        results.append(dict(left))
    return results


def test_examples():
    torch.manual_seed(0)
    encoder, plain, windowed = run_examples()
    windows = windowed["windows"]
    # 2 ** -8 would need more than the 2,048 keys that there are, 1/2 some tens of them.
    assert windows.left[0] < 100 and windows.left[7] > 2048
    assert (windows.error <= 1e-6).all()
    slopes = alibi_slopes(8)
    q = encoder["q"][:, ::4, ::7]
    expected = naive_attention(
        q,
        encoder["k"][:, ::4],
        encoder["v"][:, ::4],
        lambda b, h, i, j: -slopes[4 * h] * abs(7 * i - j),
        lambda b, i, j: b == 0 or j < 20,
    )
    assert (encoder["out"][:, ::4, ::7].double() - expected).abs().max() < 2e-6
    q, k, v = (plain[name][:, ::4] for name in "qkv")
    expected = naive_attention(
        q[:, :, ::7],
        k,
        v,
        lambda b, h, i, j: -slopes[4 * h] * ((7 * i - j) if j <= 7 * i else 0.5 * (j - 7 * i)),
        lambda b, i, j: True,
    )
    assert (plain["out"][:, ::4, ::7].double() - expected).abs().max() < 2e-6


def test_every_bias_stands_in_the_table():
    public = [getattr(attention, name) for name in attention.__all__]
    biases = [each for each in public if isinstance(each, type) and issubclass(each, AttentionBias)]
    for bias in set(biases) - {AttentionBias}:
        assert f"| `{bias.__name__}(" in TEXT


def test_the_drawing_of_documents():
    rows = dict(
        line.strip().split(maxsplit=1)
        for line in re.search(r"  ```text\n(.*?)```", TEXT, flags=re.DOTALL)[1].splitlines()
        if line.strip()
    )
    words = rows["reads"].split()
    assert rows["predicts"] == rows["text"]
    assert words == ["</s>", *rows["text"].split()[:-1]]
    tokens = torch.tensor([[2 if word == "</s>" else 9 for word in words]])
    for kind in ("document", "line"):
        found = document_numbers(tokens, kind, eos_idx=2, padding_idx=1)
        assert (found - found[:, :1]).tolist() == [[int(n) for n in rows[kind].split()]]
