"""Backends that cannot serve everything: what they refuse, and what auto does then."""

from __future__ import annotations

import logging
import math
import sys
import types

import pytest
import torch

from fairseq.attention import (
    BIDIRECTIONAL,
    LinearBias,
    PrefixBias,
    SymmetricBias,
    ZeroBias,
    attend,
    get_backend,
)
from fairseq.attention.backends.flash import FlashBackend
from fairseq.attention.backends.flex import FlexBackend
from fairseq.attention.backends.request import Request
from fairseq.attention.rules import CAUSAL
from fairseq.positions.distance_bias import DistanceBias, per_head

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SLOPES = [0.5, 0.03, 0.3, 0.004]


def request_of(bias=None, queries=range(8), keys=range(8), **changes):
    bias = LinearBias(SLOPES) if bias is None else bias
    given = {
        "rule": bias.rule,
        "key_is_padding": None,
        "query_documents": None,
        "key_documents": None,
        "head_slice": None,
        "dtype": torch.float32,
        "device": CPU,
    }
    return Request(bias=bias, query_positions=queries, key_positions=keys, **{**given, **changes})


def random_qkv(length, width=16, dtype=torch.float32, keys=None):
    generator = torch.Generator().manual_seed(length)
    q = torch.randn(2, 4, length, width, generator=generator)
    k, v = torch.randn(2, 2, 4, keys or length, width, generator=generator)
    return [each.to(dtype) for each in (q, k, v)]


def exact(q, k, v, slopes=SLOPES, hidden=None):
    q, k, v = (each.double() for each in (q, k, v))
    distance = (torch.arange(q.size(2)) + k.size(2) - q.size(2))[:, None] - torch.arange(k.size(2))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.size(-1))
    scores = scores - torch.tensor(slopes).double()[:, None, None] * distance
    scores = scores.masked_fill(distance < 0, -torch.inf)
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    return torch.softmax(scores, -1).nan_to_num(0.0) @ v


def rms(found, expected):
    return float((found.double() - expected).square().mean().sqrt())


TABLE = DistanceBias(lambda d, m: -m * d.sqrt(), per_head(torch.ones(4)))


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("triangular", {"device": CUDA}, "made for the CPU"),
        ("triangular", {"dtype": torch.bfloat16}, "computes in float32"),
        ("windowed", {"device": CUDA}, "made for the CPU"),
        ("windowed", {"bias": PrefixBias(SLOPES, 3)}, "PrefixRule does not depend on distance"),
        ("windowed", {"queries": torch.arange(8)}, "do not follow one another"),
        ("windowed", {"queries": range(8, 16)}, "no key at its own position"),
        ("augmented", {"bias": SymmetricBias(SLOPES)}, "causal attention alone"),
        ("augmented", {"bias": TABLE}, "DistanceBias is not fixed and linear"),
        ("augmented", {"queries": torch.arange(8)}, "no key at its own position"),
        ("augmented", {"keys": range(70000)}, "more than 65536 keys"),
        ("flex", {}, "needs CUDA"),
        ("flex", {"device": CUDA, "rule": BIDIRECTIONAL}, "causal attention alone"),
        ("flex", {"device": CUDA, "bias": TABLE}, "DistanceBias is not fixed and linear"),
        ("flash", {}, "not installed"),
    ],
)
def test_by_name_it_says_why_not(name, changes, reason):
    request = request_of(**changes)
    with pytest.raises(ValueError, match=f"--attention-backend {name}: .*{reason}"):
        request.of(get_backend(name))


def test_two_backends_without_a_cause():
    assert get_backend("windowed").obstacle(request_of()) is None
    assert get_backend("augmented").obstacle(request_of()) is None
    assert get_backend("flex").obstacle(request_of(device=CUDA)) is None


# augmented


@pytest.mark.parametrize("length", [1, 31, 500, 2000])
def test_augmented_in_float32(length):
    q, k, v = random_qkv(length)
    prepared = request_of(queries=range(length), keys=range(length)).of(get_backend("augmented"))
    assert rms(attend(q, k, v, prepared), exact(q, k, v)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_augmented_in_half_precision(dtype):
    """The error is that of rounding the output, and of the same kernel without bias."""
    length = 1300
    q, k, v = random_qkv(length, dtype=dtype)
    backend = get_backend("augmented")
    positions = {"queries": range(length), "keys": range(length), "dtype": dtype}
    found = attend(q, k, v, request_of(**positions).of(backend))
    expected = exact(q, k, v)
    without = attend(q, k, v, request_of(ZeroBias(4), **positions).of(backend))
    kernel = rms(without, exact(q, k, v, [0.0] * 4))
    assert rms(found, expected) < 1.5 * (rms(expected.to(dtype), expected) + kernel)


def test_augmented_with_gradients_padding_documents_and_offset():
    length, keys = 150, 200
    tensors = [each.requires_grad_() for each in random_qkv(length, keys=keys)]
    is_padding = torch.zeros(2, keys, dtype=torch.bool)
    is_padding[0, :60] = is_padding[1] = True
    documents = torch.arange(keys) // 90
    prepared = request_of(
        queries=range(50, 200),
        keys=range(keys),
        key_is_padding=is_padding,
        query_documents=documents[50:],
        key_documents=documents,
    ).of(get_backend("augmented"))
    hidden = is_padding[:, None, None] | (documents[50:, None] != documents)
    twins = [each.detach().requires_grad_() for each in tensors]
    found, expected = attend(*tensors, prepared), exact(*twins, hidden=hidden)
    assert rms(found.detach(), expected.detach()) < 1e-6
    found.square().sum().backward()
    expected.square().sum().backward()
    for each, twin in zip(tensors, twins, strict=True):
        torch.testing.assert_close(each.grad, twin.grad, atol=2e-5, rtol=1e-4)


# flex, by its eager form, which computes on a CPU


def eager_flex(*args, **kwargs):
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(*args, **kwargs)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("queries", [300, 40])
@pytest.mark.parametrize("has_more", [False, True])
def test_flex_forward(queries, has_more):
    keys = 300
    q, k, v = random_qkv(queries, keys=keys)
    documents = (torch.arange(keys) // 130)[None].expand(2, -1)
    is_padding = torch.zeros(2, keys, dtype=torch.bool)
    is_padding[0, :20] = True
    more = {
        "key_is_padding": is_padding,
        "query_documents": documents[:, keys - queries :],
        "key_documents": documents,
    }
    hidden = is_padding[:, None, None] | (
        documents[:, None, keys - queries :, None] != documents[:, None, None]
    )
    request = request_of(
        queries=range(keys - queries, keys), keys=range(keys), **(more if has_more else {})
    )
    prepared = request.of(FlexBackend(eager_flex))
    expected = exact(q, k, v, hidden=hidden if has_more else None)
    assert rms(attend(q, k, v, prepared), expected) < 1e-6
    assert rms(attend(q, k, v, prepared), expected) < 1e-6 and len(prepared.masks) == 1


def test_flex_skips_blocks_of_steep_heads():
    length = 2048
    q, k, v = random_qkv(length, width=8)
    prepared = request_of(queries=range(length), keys=range(length)).of(
        FlexBackend(lambda q, k, v, **kwargs: q)
    )
    attend(q, k, v, prepared)
    (mask,) = prepared.masks.values()
    counts = mask.kv_num_blocks[0]  # (H, 16 blocks of queries)
    assert counts[0].tolist() == [1] + [2] * 15  # slope 0.5 looks less than one block back
    assert counts[3].tolist() == list(range(1, 17))  # slope 0.004 looks back to the beginning
    assert mask.kv_indices[0, 0, 9, :2].tolist() == [8, 9]


def test_flex_has_no_dropout():
    prepared = request_of().of(FlexBackend(eager_flex))
    with pytest.raises(ValueError, match="no attention dropout"):
        attend(*random_qkv(8), prepared, dropout_p=0.1)


# flash, by a stand-in with the call signature that flash-attn documents


@pytest.fixture
def flash_attn(monkeypatch):
    calls = []

    def flash_attn_func(
        q,
        k,
        v,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
    ):
        calls.append((dropout_p, softmax_scale, causal))
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))  # from (B, T, H, K)
        slopes = [0.0] * q.size(1) if alibi_slopes is None else alibi_slopes.tolist()
        return exact(q, k, v, slopes).transpose(1, 2)

    module = types.ModuleType("flash_attn")
    module.__spec__ = types.SimpleNamespace(name="flash_attn")
    module.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    return calls


class HereFlash(FlashBackend):
    """As if the CPU were such a device."""

    def obstacle(self, request):
        return None


@pytest.mark.parametrize("bias", [LinearBias(SLOPES), ZeroBias(4)])
def test_flash_is_called_as_documented(flash_attn, bias):
    q, k, v = random_qkv(5, keys=9)
    prepared = request_of(bias, range(4, 9), range(9)).of(HereFlash())
    found = attend(q, k, v, prepared, dropout_p=0.1, scale=0.25)
    expected = exact(q, k, v, SLOPES if isinstance(bias, LinearBias) else [0.0] * 4)
    torch.testing.assert_close(found, expected)
    assert flash_attn == [(0.1, 0.25, True)]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": CPU}, "needs CUDA"),
        ({"dtype": torch.float32}, "half precision"),
        ({"bias": TABLE}, "not fixed and linear"),
        ({"bias": PrefixBias(SLOPES, 2)}, "no other rule"),
        ({"key_is_padding": torch.zeros(1, 8, dtype=torch.bool)}, "no padding"),
        ({"queries": range(4)}, "last query must stand at the last key"),
        ({}, None),
    ],
)
def test_what_flash_cannot(flash_attn, changes, reason):
    request = request_of(**{"device": CUDA, "dtype": torch.float16, **changes})
    found = FlashBackend().obstacle(request)
    assert found is None if reason is None else reason in found


# auto


@pytest.mark.parametrize(
    ("length", "dropout_p", "changes", "name"),
    [
        (64, 0.0, {}, "sdpa"),
        (64, 0.1, {}, "reference"),
        (2048, 0.0, {}, "windowed"),
        (384, 0.1, {}, "windowed"),
        (383, 0.1, {}, "triangular"),
        (96, 0.1, {}, "triangular"),
        (95, 0.1, {}, "reference"),
        (128, 0.1, {"dtype": torch.float16}, "reference"),
        (128, 0.1, {"rule": BIDIRECTIONAL}, "reference"),
        (383, 0.0, {}, "sdpa"),
        (2048, 0.0, {"bias": PrefixBias(SLOPES, 3)}, "sdpa"),
        (2048, 0.0, {"bias": ZeroBias(4)}, "augmented"),
        (64, 0.0, {"bias": ZeroBias(4), "rule": BIDIRECTIONAL}, "sdpa"),
        (64, 0.0, {"device": CUDA}, "sdpa"),
        (4096, 0.0, {"device": CUDA}, "flex"),
        (4096, 0.1, {"device": CUDA}, "sdpa"),
    ],
)
def test_what_auto_chooses(length, dropout_p, changes, name):
    request = request_of(queries=range(length), keys=range(length), **changes)
    assert get_backend("auto").choose(request, dropout_p) == name


@pytest.mark.parametrize(
    ("length", "has_gradients", "name"),
    [(384, True, "windowed"), (384, False, "sdpa"), (512, False, "windowed")],
)
def test_auto_takes_tiles_earlier_where_gradients_are_wanted(length, has_gradients, name):
    request = request_of(queries=range(length), keys=range(length))
    with torch.set_grad_enabled(has_gradients):
        assert get_backend("auto").choose(request) == name


@pytest.mark.parametrize(("rows", "name"), [(3, "reference"), (4, "triangular")])
def test_auto_takes_no_blocks_for_few_scores(rows, name):
    q, k, v = (x[:1].expand(rows, -1, -1, -1) for x in random_qkv(128))
    backend = get_backend("auto")
    prepared = request_of(queries=range(128), keys=range(128), dropout_p=0.1).of(backend)
    assert backend.name_for(q, k, prepared, 0.1) == name
    chosen = get_backend(name)
    plainly = request_of(queries=range(128), keys=range(128)).of(chosen)
    torch.manual_seed(3)
    found = attend(q, k, v, prepared, dropout_p=0.1)
    torch.manual_seed(3)
    assert torch.equal(found, attend(q, k, v, plainly, dropout_p=0.1))


@pytest.mark.parametrize(
    ("length", "rows", "width", "wants", "changes", "name"),
    [
        (256, 1, 128, True, {}, "triangular"),
        (256, 1, 128, False, {}, "sdpa"),
        (256, 1, 128, True, {"rule": BIDIRECTIONAL}, "reference"),
        (256, 1, 64, True, {}, "triangular"),
        (256, 1, 32, True, {}, "sdpa"),
        (128, 1, 64, True, {}, "reference"),
        (128, 4, 64, True, {}, "sdpa"),
        (128, 4, 128, True, {}, "reference"),
        (64, 1, 128, True, {}, "sdpa"),
        (256, 1, 128, True, {"dtype": torch.bfloat16}, "sdpa"),
    ],
)
def test_auto_leaves_gradients_of_wide_heads_to_others(length, rows, width, wants, changes, name):
    q = torch.empty(rows, 4, length, width, requires_grad=wants)
    request = request_of(queries=range(length), keys=range(length), **changes)
    q = q.to(request.dtype)
    backend = get_backend("auto")
    assert backend.name_for(q, q, request.of(backend), 0.0) == name


@pytest.mark.parametrize(("length", "name"), [(384, "windowed"), (511, "windowed"), (383, "sdpa")])
def test_auto_takes_tiles_later_where_keys_are_hidden(length, name):
    request = request_of(queries=range(length), keys=range(length))
    assert get_backend("auto").choose(request) == name
    padding = torch.zeros(1, length, dtype=torch.bool)
    hidden = request_of(queries=range(length), keys=range(length), key_is_padding=padding)
    assert get_backend("auto").choose(hidden) == "sdpa"


def test_auto_prefers_flash_in_half_precision(flash_attn):
    request = request_of(queries=range(4096), keys=range(4096), device=CUDA, dtype=torch.bfloat16)
    assert get_backend("auto").choose(request, 0.1) == "flash"


def test_auto_warns_once_where_a_long_call_takes_a_mask(caplog):
    backend = get_backend("auto")
    request = request_of(TABLE, range(4096), range(4096), device=CUDA, rule=CAUSAL)
    with caplog.at_level(logging.WARNING):
        assert backend.choose(request) == backend.choose(request) == "sdpa"
    assert len(caplog.records) == 1
    assert "flex: DistanceBias is not fixed" in caplog.text and "flash: the pack" in caplog.text


def test_auto_without_bias_is_the_kernels_own_causal_attention():
    q, k, v = random_qkv(50)
    prepared = request_of(ZeroBias(4), range(50), range(50)).of(get_backend("auto"))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.equal(attend(q, k, v, prepared), expected)
