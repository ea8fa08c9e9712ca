"""Attention to parts of the keys, joined, against the whole in float64."""

from __future__ import annotations

import itertools

import pytest
import torch

from fairseq.attention import BIDIRECTIONAL, CAUSAL, LinearBias, attend_with_lse, merge_parts

SLOPES = [0.5, 0.0625, 0.3]
LENGTH, WIDTH = 24, 8


def random_qkv(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return list(torch.randn(3, 2, 3, LENGTH, WIDTH, generator=generator).to(dtype))


def whole(q, k, v, is_causal, is_padding=None):
    """Output and log-sum-exp over all keys, in float64, by the formula."""
    distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    scores = torch.einsum("bhik,bhjk->bhij", q, k) / WIDTH**0.5
    scores = scores - torch.tensor(SLOPES).double()[:, None, None] * distance.abs()
    if is_causal:
        scores = scores.masked_fill(distance < 0, -torch.inf)
    if is_padding is not None:
        scores = scores.masked_fill(is_padding[:, None, None, :], -torch.inf)
    return torch.softmax(scores, -1) @ v, scores.logsumexp(-1)


def in_parts(q, k, v, cuts, **options):
    """Every block of queries against every block of keys, positions as ranges."""
    blocks = [slice(a, b) for a, b in itertools.pairwise(cuts)]
    found = []
    for rows in blocks:
        parts = [
            attend_with_lse(
                q[:, :, rows],
                k[:, :, columns],
                v[:, :, columns],
                LinearBias(SLOPES),
                range(rows.start, rows.stop),
                range(columns.start, columns.stop),
                **{
                    name: value[:, columns] if name == "key_is_padding" else value
                    for name, value in options.items()
                },
            )
            for columns in blocks
        ]
        found.append(merge_parts(parts))
    return torch.cat([out for out, _ in found], 2), torch.cat([lse for _, lse in found], 2)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("cuts", [[0, 24], [0, 8, 16, 24], [0, 5, 6, 24]])
def test_parts_give_the_whole_and_its_gradients(is_causal, cuts):
    tensors = [each.requires_grad_() for each in random_qkv()]
    twins = [each.detach().double().requires_grad_() for each in tensors]
    out, lse = in_parts(*tensors, cuts, rule=CAUSAL if is_causal else BIDIRECTIONAL)
    expected_out, expected_lse = whole(*twins, is_causal)
    torch.testing.assert_close(out.double(), expected_out, atol=2e-6, rtol=0)
    torch.testing.assert_close(lse.double(), expected_lse, atol=2e-6, rtol=0)
    (out.square().sum() + lse.sin().sum()).backward()
    (expected_out.square().sum() + expected_lse.sin().sum()).backward()
    for found, expected in zip(tensors, twins, strict=True):
        torch.testing.assert_close(found.grad.double(), expected.grad, atol=1e-5, rtol=1e-5)


def test_a_query_that_sees_no_key():
    q, k, v = (each.requires_grad_() for each in random_qkv())
    is_padding = torch.zeros(2, LENGTH, dtype=torch.bool)
    is_padding[0, :3] = is_padding[1] = True
    out, lse = in_parts(q, k, v, [0, 7, 24], key_is_padding=is_padding)
    assert (lse[0, :, :3] == -torch.inf).all() and (lse[1] == -torch.inf).all()
    assert not out[0, :, :3].any() and not out[1].any()
    exact = [each.detach().double() for each in (q, k, v)]
    expected, _ = whole(*exact, True, is_padding)
    torch.testing.assert_close(out[0, :, 3:].double(), expected[0, :, 3:], atol=2e-6, rtol=0)
    (out.square().sum() + lse[0, :, 3:].sum()).backward()
    assert all(each.grad.isfinite().all() for each in (q, k, v)) and not k.grad[1].any()


def test_some_of_the_heads_in_bfloat16():
    q, k, v = random_qkv(torch.bfloat16)
    positions = range(LENGTH)
    out, lse = attend_with_lse(
        q[:, 1:], k[:, 1:], v[:, 1:], LinearBias(SLOPES), positions, positions,
        head_slice=slice(1, 3),
    )  # fmt: skip
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    expected, expected_lse = whole(q.double(), k.double(), v.double(), True)
    assert (out.double() - expected[:, 1:]).abs().max() < 3e-2
    torch.testing.assert_close(lse.double(), expected_lse[:, 1:], atol=2e-6, rtol=0)


def test_dropout_changes_the_output_and_not_its_mean():
    torch.manual_seed(0)
    q = torch.zeros(1, 1, 64, 64)
    v = torch.eye(64).expand(1, 1, 64, 64)
    out, lse = attend_with_lse(
        q, q, v, LinearBias([0.0]), range(64), range(64), rule=BIDIRECTIONAL, dropout_p=0.25
    )
    torch.testing.assert_close(lse, torch.full_like(lse, 64).log())
    kept = out[out > 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / 64 / 0.75))
    assert abs(len(kept) / 64**2 - 0.75) < 0.03


def test_no_part():
    with pytest.raises(ValueError, match="at least one part"):
        merge_parts([])
