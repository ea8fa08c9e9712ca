"""What outputs attend to, and how it is printed."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_translation import tiny_transformer, tokens_of

from fairseq.generation.alignment import add_alignments, alignment_text, hard_alignment
from fairseq.sequence_generator import SequenceGenerator

PAD, EOS = 1, 2


def naive_attention(model, source, previous):
    """Weights of the last layer, from the formula in float64, for one sentence without padding."""
    inputs = []
    attention = model.decoder.layers[-1].encoder_attn
    handle = attention.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    encoded = model.encoder(source[None])
    model.decoder(previous[None], encoder_out=encoded)
    handle.remove()
    q = torch.nn.functional.linear(
        inputs[0].double()[0], attention.q_proj.weight.double(), attention.q_proj.bias.double()
    )
    k = torch.nn.functional.linear(
        encoded.encoder_out.double()[0],
        attention.k_proj.weight.double(),
        attention.k_proj.bias.double(),
    )
    heads, width = attention.num_heads, attention.head_dim
    total = torch.zeros(len(q), len(k), dtype=torch.float64)
    for head in range(heads):
        own = slice(head * width, (head + 1) * width)
        total += torch.softmax(q[:, own] @ k[:, own].T / math.sqrt(width), dim=-1)
    return total / heads


def batch_of(*lengths):
    rows = [[PAD] * (max(lengths) - n) + tokens_of(n, seed=n).tolist() + [EOS] for n in lengths]
    return {"src_tokens": torch.tensor(rows), "src_lengths": torch.tensor([n + 1 for n in lengths])}


@torch.no_grad()
@pytest.mark.parametrize("backend", ["auto", "sdpa", "reference"])
def test_attention_is_that_of_the_formula(backend):
    model = tiny_transformer(attention_backend=backend)
    net_input = batch_of(7, 3)
    outputs = [[11, 12, 13, EOS], [14, EOS], [15, 16, EOS]]
    found = [[{"tokens": torch.tensor(o)} for o in each] for each in (outputs[:2], outputs[2:])]
    add_alignments([model], net_input, found, pad=PAD, eos=EOS)
    for row, tokens, hypothesis in zip((0, 0, 1), outputs, found[0] + found[1], strict=True):
        source = net_input["src_tokens"][row]
        previous = torch.tensor([EOS, *tokens[:-1]])
        expected = naive_attention(model, source[source.ne(PAD)], previous).float()
        own = hypothesis["attention"]
        torch.testing.assert_close(own[:, source.ne(PAD)], expected, atol=1e-5, rtol=0)
        assert not own[:, source.eq(PAD)].any()
        words = expected[:-1, :-1].argmax(dim=1).tolist()
        assert hypothesis["alignment"] == [(place, n) for n, place in enumerate(words)]


def test_models_are_averaged():
    models = [tiny_transformer(), tiny_transformer(cross_attention_bias="aligned")]
    net_input = batch_of(5)

    def attention(*chosen):
        hypothesis = {"tokens": torch.tensor([11, 12, EOS])}
        add_alignments(chosen, net_input, [[hypothesis]], pad=PAD, eos=EOS)
        return hypothesis["attention"]

    both = attention(*models)
    torch.testing.assert_close(both, (attention(models[0]) + attention(models[1])) / 2)
    torch.testing.assert_close(both.sum(dim=1), torch.ones(3))


def test_special_tokens_do_not_count_in_pairs():
    weights = torch.tensor([[0.7, 0.1, 0.2, 0.0], [0.1, 0.2, 0.3, 0.4], [0.0, 0.1, 0.5, 0.4]])
    source = torch.tensor([PAD, 8, 9, EOS])
    pairs = hard_alignment(weights, source, torch.tensor([5, 6, EOS]), pad=PAD, eos=EOS)
    assert pairs == [(1, 0), (1, 1)]
    hypothesis = {"attention": weights, "alignment": pairs}
    assert alignment_text(hypothesis, "hard", source, PAD) == "1-0 1-1"
    assert alignment_text(hypothesis, "soft", source, PAD) == (
        "0.100000,0.200000,0.000000 0.200000,0.300000,0.400000 0.100000,0.500000,0.400000"
    )
    nothing = torch.tensor([PAD, PAD, PAD, EOS])
    assert hard_alignment(weights, nothing, torch.tensor([5, 6, EOS]), pad=PAD, eos=EOS) == []


def test_results_of_the_generator_are_filled_in():
    model = tiny_transformer()
    net_input = batch_of(6, 4)
    search = SequenceGenerator([model], model.decoder.dictionary, beam_size=3, max_len_b=8)
    found = search.generate(None, {"net_input": net_input})
    assert all(h["attention"] is None and h["alignment"] is None for each in found for h in each)
    add_alignments([model], net_input, found, pad=PAD, eos=EOS)
    for each in found:
        for hypothesis in each:
            count = len(hypothesis["tokens"])
            assert hypothesis["attention"].shape == (count, 7)
            hypothesis["attention"].mul_(1)  # can be changed in place


def test_language_models_have_no_source():
    with pytest.raises(ValueError, match="--print-alignment needs"):
        add_alignments([torch.nn.Linear(1, 1)], {"src_tokens": torch.ones(1, 1)}, [], pad=1, eos=2)
