"""Adaptive input and softmax: shapes, sharing, probabilities, limits."""

from __future__ import annotations

import pytest
import torch

from fairseq.modules import AdaptiveInput, AdaptiveSoftmax
from fairseq.modules.cutoffs import band_limits, parse_cutoffs

WIDTH = 16


def make_input(vocab_size=50, cutoffs=(10, 30)):
    return AdaptiveInput(vocab_size, 1, WIDTH, 2.0, WIDTH, list(cutoffs))


def make_softmax(kind="untied", dropout=0.0):
    torch.manual_seed(2)
    if kind == "untied":
        return AdaptiveSoftmax(50, WIDTH, [10, 30], dropout, factor=2.0)
    return AdaptiveSoftmax(
        50,
        WIDTH,
        [10, 30],
        dropout,
        factor=2.0,
        adaptive_inputs=make_input(),
        tie_proj=kind == "tied",
    )


def shapes(module):
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def full_log_probs(softmax, x):
    """log p(class) + log p(word | class), word by word, in float64."""
    state = {name: tensor.double() for name, tensor in softmax.state_dict().items()}
    x = x.double()
    if "head.weight" in state:
        head = x @ state["head.weight"].T
    else:
        head = torch.cat(
            [x @ state["head.word_proj.weight"].T, x @ state["head.class_proj.weight"].T], -1
        )
    head = torch.log_softmax(head, -1)
    parts = [head[..., :10]]
    for i in range(2):
        first = state[f"tail.{i}.0.weight"]
        inner = x @ (first if first.size(0) == WIDTH else first.T)
        tail = torch.log_softmax(inner @ state[f"tail.{i}.2.weight"].T, -1)
        parts.append(tail + head[..., 10 + i, None])
    return torch.cat(parts, -1)


def test_input_embeds_band_by_band():
    torch.manual_seed(0)
    module = make_input()
    tokens = torch.tensor([[0, 9, 10], [29, 30, 49]])
    found = module(tokens)
    for row, column, band, relative in [
        (0, 0, 0, 0),
        (0, 1, 0, 9),
        (0, 2, 1, 0),
        (1, 0, 1, 19),
        (1, 1, 2, 0),
        (1, 2, 2, 19),
    ]:
        table, projection = module.weights_for_band(band)
        torch.testing.assert_close(found[row, column], projection @ table[relative])


def test_input_shapes():
    assert shapes(make_input()) == {
        "_float_tensor": (1,),
        "embeddings.0.0.weight": (10, 16),
        "embeddings.0.1.weight": (16, 16),
        "embeddings.1.0.weight": (20, 8),
        "embeddings.1.1.weight": (16, 8),
        "embeddings.2.0.weight": (20, 4),
        "embeddings.2.1.weight": (16, 4),
    }


def test_input_with_a_band_of_one_word():
    embed = make_input(vocab_size=31, cutoffs=(10, 30))
    assert [len(embed.weights_for_band(band)[0]) for band in range(3)] == [10, 20, 1]
    out = embed(torch.tensor([[9, 11, 30]]))
    # The second word of a band begins as zeros.
    assert [bool(each.any()) for each in out[0]] == [True, False, True]


def test_input_gives_padding_no_gradient():
    module = make_input()
    module(torch.tensor([[1, 1, 11]])).sum().backward()
    assert not module.embeddings[0][0].weight.grad.any()
    assert module.embeddings[1][0].weight.grad[1].any()


def test_input_follows_the_dtype_of_its_weights():
    assert make_input().half()(torch.tensor([[3, 12, 40]])).dtype == torch.float16


def test_untied_shapes():
    assert shapes(make_softmax()) == {
        "version": (1,),
        "head.weight": (12, 16),
        "tail.0.0.weight": (8, 16),
        "tail.0.2.weight": (20, 8),
        "tail.1.0.weight": (4, 16),
        "tail.1.2.weight": (20, 4),
    }


def test_tied_shapes_and_sharing():
    inputs = make_input()
    softmax = AdaptiveSoftmax(
        50, WIDTH, [10, 30], 0.0, factor=2.0, adaptive_inputs=inputs, tie_proj=True
    )
    assert shapes(softmax) == {
        "version": (1,),
        "head._float_tensor": (1,),
        "head.word_proj.weight": (10, 16),
        "head.class_proj.weight": (2, 16),
        "tail.0.0.weight": (16, 8),
        "tail.0.2.weight": (20, 8),
        "tail.1.0.weight": (16, 4),
        "tail.1.2.weight": (20, 4),
    }
    assert softmax.head.word_proj.weight is inputs.embeddings[0][0].weight
    for i in range(2):
        assert softmax.tail[i][0].weight is inputs.embeddings[i + 1][1].weight
        assert softmax.tail[i][2].weight is inputs.embeddings[i + 1][0].weight


def test_weights_tied_but_projections_not():
    softmax = make_softmax("tables")
    assert softmax.tail[0][0].weight.shape == (8, 16)
    assert softmax.tail[0][2].weight.shape == (20, 8)


def test_tied_head_projects_features_of_another_width():
    softmax = AdaptiveSoftmax(50, 24, [10, 30], 0.0, factor=2.0, adaptive_inputs=make_input())
    assert softmax.head.word_proj[0].weight.shape == (16, 24)
    assert softmax.get_log_prob(torch.randn(1, 2, 24), None).shape == (1, 2, 50)


@pytest.mark.parametrize("kind", ["untied", "tied", "tables"])
def test_probabilities(kind):
    softmax = make_softmax(kind)
    x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1))
    target = torch.tensor([[3, 10, 29, 30, 49], [0, 1, 2, 45, 9]])
    expected = full_log_probs(softmax, x)
    everything = softmax.get_log_prob(x, None)
    assert (everything.double() - expected).abs().max() < 1e-5
    asked = softmax.get_log_prob(x, target).gather(-1, target[..., None]).squeeze(-1)
    wanted = expected.gather(-1, target[..., None]).squeeze(-1)
    assert (asked.double() - wanted).abs().max() < 1e-5
    alone = softmax.get_target_log_prob(x, target)
    assert (alone.double() - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["untied", "tied", "tables"])
@pytest.mark.parametrize("way", ["bands", "targets", "everything", "target alone"])
def test_gradients(kind, way):
    softmax = make_softmax(kind)
    x = torch.randn(1, 6, WIDTH, generator=torch.Generator().manual_seed(1))
    target = torch.tensor([[3, 10, 29, 30, 49, 3]])
    twin = x.double().requires_grad_()
    full_log_probs(softmax, twin).gather(-1, target[..., None]).sum().backward()
    x.requires_grad_()
    if way == "bands":
        logits, parts = softmax(x, target)
        score = -sum(
            torch.nn.functional.cross_entropy(row, part, reduction="sum")
            for row, part in zip(logits, parts, strict=True)
        )
    elif way == "target alone":
        score = softmax.get_target_log_prob(x, target).sum()
    else:
        given = target if way == "targets" else None
        score = softmax.get_log_prob(x, given).gather(-1, target[..., None]).sum()
    score.backward()
    torch.testing.assert_close(x.grad.double(), twin.grad, atol=1e-5, rtol=1e-4)


def test_bands_without_targets_are_left_out():
    softmax = make_softmax()
    logits, parts = softmax(torch.randn(1, 3, WIDTH), torch.tensor([[30, 4, 49]]))
    assert [None if row is None else tuple(row.shape) for row in logits] == [(3, 12), None, (2, 20)]
    assert parts[0].tolist() == [11, 4, 11]
    assert parts[1] is None and parts[2].tolist() == [0, 19]


def test_half_precision_can_be_normalised_in_float32():
    softmax = make_softmax().half()
    x = torch.randn(1, 4, WIDTH).half()
    assert softmax.get_log_prob(x, None).dtype == torch.float16
    probs = softmax.get_log_prob(x, None, dtype=torch.float32)
    torch.testing.assert_close(probs.exp().sum(-1), torch.ones(1, 4), atol=1e-6, rtol=0)
    target = torch.tensor([[3, 12, 40, 5]])
    assert softmax.get_target_log_prob(x, target).dtype == torch.float32


def test_dropout_is_for_training_and_for_the_loss():
    softmax = make_softmax(dropout=0.5)
    x, target = torch.randn(1, 4, WIDTH), torch.tensor([[3, 12, 40, 5]])
    torch.manual_seed(0)
    first = softmax(x, target)[0][0]
    assert not torch.equal(first, softmax(x, target)[0][0])
    softmax.eval()
    assert torch.equal(softmax(x, target)[0][0], softmax(x, target)[0][0])
    torch.testing.assert_close(softmax(x, target)[0][0], softmax.head(x[0]))


def test_vocabulary_that_ends_at_the_last_cutoff():
    softmax = AdaptiveSoftmax(30, WIDTH, [10, 30], 0.0, factor=2.0)
    assert softmax.head.weight.shape == (11, 16) and len(softmax.tail) == 1
    assert softmax.get_log_prob(torch.randn(1, 2, WIDTH), None).shape == (1, 2, 30)


def test_cutoffs_beyond_the_vocabulary():
    message = (
        r"--adaptive-input-cutoff 20000,60000 .*vocabulary, which has 6424 words.*smaller cutoffs"
    )
    with pytest.raises(ValueError, match=message):
        AdaptiveInput(6424, 1, WIDTH, 2.0, WIDTH, [20000, 60000])
    with pytest.raises(ValueError, match=r"--adaptive-softmax-cutoff 20000,60000"):
        AdaptiveSoftmax(6424, WIDTH, [20000, 60000], 0.0)


def test_factor_that_is_not_positive():
    with pytest.raises(ValueError, match="--adaptive-input-factor is 0; it must be larger than 0"):
        AdaptiveInput(50, 1, 16, 0.0, 16, [10, 30])


def test_factor_that_leaves_no_width():
    with pytest.raises(ValueError, match=r"--adaptive-input-factor 8 .*band 2 .*width 16"):
        AdaptiveInput(50, 1, WIDTH, 8.0, WIDTH, [10, 30])


@pytest.mark.parametrize("text", ["20000,60000", "20000, 60000", "[20000, 60000]"])
def test_cutoffs_are_read(text):
    assert parse_cutoffs(text, "--flag") == [20000, 60000]


def test_one_cutoff():
    assert parse_cutoffs("7", "--flag") == [7]
    assert band_limits([7], 9, "--flag") == [7, 9]


@pytest.mark.parametrize("text", ["", "a,b", "5,5", "9,3", "0,4", "1.5,2", "()", "exit()"])
def test_bad_cutoffs(text):
    with pytest.raises(ValueError, match=r"--flag .*not a list of ascending positive"):
        parse_cutoffs(text, "--flag")
