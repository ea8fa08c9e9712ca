"""Generation against a search written with lists, and against enumeration."""

import itertools
import math

import pytest
import torch
from toy_models import (
    EOS,
    PAD,
    UNK,
    TableModel,
    Words,
    all_sequences,
    batch,
    naive_beam_search,
)

from fairseq.search import BeamSearch, DiverseBeamSearch, DiverseSiblingsSearch, Sampling
from fairseq.sequence_generator import SequenceGenerator

V = 9


def generator(*models, **options):
    return SequenceGenerator(models or (TableModel(V),), Words(V), **options)


def outputs(found):
    return [[(round(float(h["score"]), 4), h["tokens"].tolist()) for h in each] for each in found]


def rounded(expected):
    return [(round(score, 4), tokens) for score, tokens in expected]


@pytest.mark.parametrize("beam", [1, 2, 5, 8])
@pytest.mark.parametrize("len_penalty", [0.0, 1.0, 2.0])
def test_beam_search(beam, len_penalty):
    model = TableModel(V)
    options = {"beam_size": beam, "max_len_b": 6, "len_penalty": len_penalty}
    found = generator(model, **options).generate(None, batch([5, EOS], [6, 7, EOS]))
    expected = naive_beam_search(model.log_probs, V, beam, 6, len_penalty=len_penalty)
    assert outputs(found) == [rounded(expected)] * 2


def test_a_wide_beam_finds_the_best_of_all_sequences():
    model = TableModel(5, seed=3)
    options = {"beam_size": 200, "max_len_b": 3, "normalize_scores": False}
    search = SequenceGenerator([model], Words(5), **options)
    search.beam_size = 200  # more than words are no use but for this
    best = search.generate(None, batch([4, EOS]))[0][0]
    score, tokens = all_sequences(model, 3)[0]
    assert best["tokens"].tolist() == tokens
    assert float(best["score"]) == pytest.approx(score, abs=1e-5)


def test_scores_of_tokens_add_up():
    model = TableModel(V)
    for hypothesis in generator(model, beam_size=4, max_len_b=7).generate(None, batch([5]))[0]:
        tokens = [EOS, *hypothesis["tokens"].tolist()]
        expected = [model.log_probs(tokens[:end])[tokens[end]] for end in range(1, len(tokens))]
        assert hypothesis["positional_scores"].tolist() == pytest.approx(expected, abs=1e-5)
        mean = sum(expected) / len(expected)
        assert float(hypothesis["score"]) == pytest.approx(mean, abs=1e-5)
        assert hypothesis["attention"] is None and hypothesis["alignment"] is None


def test_scores_are_sums_when_unnormalized():
    found = generator(beam_size=3, max_len_b=5, normalize_scores=False).generate(None, batch([5]))
    for hypothesis in found[0]:
        assert float(hypothesis["score"]) == pytest.approx(
            float(hypothesis["positional_scores"].sum()), abs=1e-5
        )


def test_results_can_be_changed_in_place():
    hypothesis = generator(max_len_b=3).generate(None, batch([5]))[0][0]
    before = hypothesis["positional_scores"].tolist()
    hypothesis["positional_scores"].div_(2)
    assert hypothesis["positional_scores"].tolist() == pytest.approx([x / 2 for x in before])


@pytest.mark.parametrize("beam", [1, 3])
@pytest.mark.parametrize(
    "prefixes",
    [
        [[5, 6], [7, 4]],
        [[5, 6, 4, 4], [7, PAD, PAD, PAD]],
        [[PAD], [7]],
        [[UNK, 5], [5, 5]],
    ],
)
def test_prefixes(prefixes, beam):
    model = TableModel(V)
    found = generator(model, beam_size=beam, max_len_b=6).generate(
        None, batch([5], [6]), prefix_tokens=torch.tensor(prefixes)
    )
    expected = [
        rounded(
            naive_beam_search(
                model.log_probs, V, beam, 6, prefix=tuple(t for t in prefix if t != PAD)
            )
        )
        for prefix in prefixes
    ]
    assert outputs(found) == expected


def test_a_prefix_that_ends_the_sentence():
    found = generator(beam_size=3, max_len_b=6).generate(
        None, batch([5], [6]), prefix_tokens=torch.tensor([[5, EOS, 6], [5, 4, 6]])
    )
    assert [h["tokens"].tolist() for h in found[0]] == [[5, EOS]]
    assert all(h["tokens"].tolist()[:3] == [5, 4, 6] for h in found[1])
    assert len(found[1]) == 3


def test_a_prompt_longer_than_the_output_is_cut_with_a_warning(caplog):
    found = generator(max_len_b=2).generate(
        None, batch([5]), prefix_tokens=torch.tensor([[5, 6, 7]])
    )
    assert found[0][0]["tokens"].tolist() == [5, 6, EOS]
    assert "leaves no room" in caplog.text and "--max-len-b" in caplog.text


def test_sentences_of_a_batch_do_not_matter_to_each_other():
    prefixes = torch.tensor([[5, PAD], [4, 6], [8, PAD], [7, 7]])
    search = generator(beam_size=3, max_len_b=8)
    together = outputs(search.generate(None, batch([5], [5], [5], [5]), prefix_tokens=prefixes))
    for prefix, expected in zip(prefixes, together, strict=True):
        alone = search.generate(None, batch([5]), prefix_tokens=prefix[None])
        assert outputs(alone) == [expected]


@pytest.mark.parametrize("min_len", [1, 3, 5])
def test_min_len(min_len):
    model = TableModel(V)
    found = generator(model, beam_size=4, max_len_b=5, min_len=min_len).generate(None, batch([5]))
    expected = naive_beam_search(model.log_probs, V, 4, 5, min_len=min_len)
    assert outputs(found) == [rounded(expected)]


def test_max_len_a_counts_the_source():
    # The least likely end: eos is never chosen before it must be.
    model = TableModel(V)
    model.decoder.logits[:, :, EOS] = -50
    sources = batch([5, 6, 7, EOS], [5, 6, EOS])
    found = generator(model, max_len_a=1.5, max_len_b=1).generate(None, sources)
    assert [len(each[0]["tokens"]) for each in found] == [8, 8]
    found = generator(model, max_len_a=1.5, max_len_b=1, max_len=3).generate(None, sources)
    assert [len(each[0]["tokens"]) for each in found] == [4, 4]


def test_match_source_len():
    search = generator(beam_size=2, match_source_len=True)
    found = search.generate(None, batch([5, 6, 7, EOS], [5, EOS], [5, 6, EOS]))
    assert [[len(h["tokens"]) for h in each] for each in found] == [[4, 4], [2, 2], [3, 3]]
    assert all(h["tokens"][-1] == EOS for each in found for h in each)


def test_no_ngram_is_repeated():
    model = TableModel(V)
    model.decoder.logits[:] = 0
    model.decoder.logits[:, 5, 6] = model.decoder.logits[:, 6, 5] = 9  # it loves to repeat
    model.decoder.logits[:, :, EOS] = -9
    for size in (1, 2, 3):
        options = {"beam_size": 2, "max_len_b": 7, "no_repeat_ngram_size": size}
        found = generator(model, **options).generate(
            None, batch([5]), prefix_tokens=torch.tensor([[5]])
        )
        for hypothesis in found[0]:
            tokens = hypothesis["tokens"].tolist()
            ngrams = list(zip(*(tokens[i:] for i in range(size)), strict=False))
            assert len(set(ngrams)) == len(ngrams)
    free = generator(model, max_len_b=7).generate(
        None, batch([5]), prefix_tokens=torch.tensor([[5]])
    )
    assert free[0][0]["tokens"].tolist() == [5, 6, 5, 6, 5, 6, 5, EOS]


def test_a_prefix_may_repeat_itself():
    options = {"max_len_b": 6, "no_repeat_ngram_size": 2}
    found = generator(**options).generate(
        None, batch([5], [5]), prefix_tokens=torch.tensor([[5, 6, 5, 6], [5, 6, PAD, PAD]])
    )
    assert found[0][0]["tokens"][:4].tolist() == [5, 6, 5, 6]
    assert torch.isfinite(found[0][0]["positional_scores"]).all()


def test_unknown_words_are_penalised():
    model = TableModel(V)
    model.decoder.logits[:, :, UNK] = 8
    plain = generator(model, max_len_b=4).generate(None, batch([5]))[0][0]
    assert UNK in plain["tokens"].tolist()
    other = generator(model, max_len_b=4, unk_penalty=50).generate(None, batch([5]))[0][0]
    assert UNK not in other["tokens"].tolist()
    forced = generator(model, max_len_b=4, unk_penalty=2.5).generate(
        None, batch([5]), prefix_tokens=torch.tensor([[UNK, 5]])
    )[0][0]
    expected = model.log_probs([EOS])[UNK] - 2.5
    assert float(forced["positional_scores"][0]) == pytest.approx(expected, abs=1e-5)


def test_an_ensemble_averages_probabilities():
    models = [TableModel(V, seed) for seed in (1, 2, 3)]

    def mean(tokens):
        columns = zip(*(model.log_probs(tokens) for model in models), strict=True)
        return [math.log(sum(map(math.exp, column)) / 3) for column in columns]

    found = generator(*models, beam_size=3, max_len_b=5).generate(
        None, batch([5]), prefix_tokens=torch.tensor([[7, 8]])
    )
    expected = naive_beam_search(mean, V, 3, 5, prefix=(7, 8))
    assert outputs(found) == [rounded(expected)]


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_divides_logits(temperature):
    model = TableModel(V)
    found = generator(model, beam_size=3, max_len_b=5, temperature=temperature).generate(
        None, batch([5]), prefix_tokens=torch.tensor([[7, 8]])
    )
    expected = naive_beam_search(
        lambda tokens: model.log_probs(tokens, temperature), V, 3, 5, prefix=(7, 8)
    )
    assert outputs(found) == [rounded(expected)]


def test_a_language_model_is_added():
    model, other = TableModel(V, 1), TableModel(V, 2)

    def sum_of(tokens):
        pairs = zip(model.log_probs(tokens), other.log_probs(tokens), strict=True)
        return [one + 0.3 * two for one, two in pairs]

    options = {"lm_model": other, "lm_weight": 0.3, "beam_size": 3, "max_len_b": 5}
    found = generator(model, **options).generate(
        None, batch([5]), prefix_tokens=torch.tensor([[7]])
    )
    assert outputs(found) == [rounded(naive_beam_search(sum_of, V, 3, 5, prefix=(7,)))]


def test_another_start_symbol():
    model = TableModel(V)
    model.decoder.logits[EOS, 4] = model.decoder.logits[EOS, EOS]  # what follows it at first
    found = generator(model, max_len_b=1).generate(None, batch([5]), bos_token=4)
    first = found[0][0]["positional_scores"][0]
    word = int(found[0][0]["tokens"][0])
    assert float(first) == pytest.approx(model.log_probs([EOS, 4])[word], abs=1e-5)


def test_one_group_without_rate_is_beam_search():
    expected = outputs(generator(beam_size=4, max_len_b=6).generate(None, batch([5])))
    for search in (DiverseBeamSearch(1, 0.7), DiverseSiblingsSearch(0.0)):
        options = {"beam_size": 4, "max_len_b": 6, "search_strategy": search}
        assert outputs(generator(**options).generate(None, batch([5]))) == expected


def test_groups_without_strength_find_the_same():
    options = {"beam_size": 4, "max_len_b": 6, "search_strategy": DiverseBeamSearch(2, 0.0)}
    found = outputs(generator(**options).generate(None, batch([5])))[0]
    expected = outputs(generator(beam_size=2, max_len_b=6).generate(None, batch([5])))[0]
    assert found[0] == found[1] == expected[0]


def test_groups_choose_away_from_each_other():
    log_probs = torch.log_softmax(torch.tensor([[[0.0, 1.0, 3.0, 2.9]] * 2]), dim=-1)
    found = DiverseBeamSearch(2, 0.5).step(log_probs, torch.zeros(1, 2))
    assert found.tokens[0, :, 0].tolist() == [2, 3]
    assert found.beams[0, :, 0].tolist() == [0, 1]
    # The second group sees word 2 half a nat lower, below word 3.
    assert found.tokens[0, 1].tolist()[:2] == [3, 2]
    penalised = float(log_probs[0, 1, 2]) - 0.5
    assert float(found.scores[0, 1, 1]) == pytest.approx(penalised)


def test_siblings_lose_by_rank():
    log_probs = torch.tensor([[[-1.0, -1.1, -9.0, -9.0], [-9.0, -9.0, -0.2, -0.3]]])
    scores = torch.tensor([[0.0, -1.2]])
    found = DiverseSiblingsSearch(0.4).step(log_probs, scores)
    # By hand: -1 - .4, -1.4 - .4, -1.1 - .8, -1.5 - .8.
    assert found.scores[0, 0].tolist() == pytest.approx([-1.4, -1.8, -1.9, -2.3])
    assert found.tokens[0, 0].tolist() == [0, 2, 1, 3]
    assert found.beams[0, 0].tolist() == [0, 1, 0, 1]
    assert BeamSearch().step(log_probs, scores).tokens[0, 0].tolist() == [0, 1, 2, 3]


def frequencies(search, log_probs, count=4000):
    torch.manual_seed(0)
    rows = log_probs.expand(1, count, -1)
    found = search.step(rows, torch.zeros(1, count))
    chosen = log_probs.expand(count, -1).gather(1, found.tokens[0, 0, :, None])[:, 0]
    assert torch.equal(found.scores[0, 0], chosen)
    return torch.bincount(found.tokens[0, 0], minlength=log_probs.size(-1)) / count


PROBS = torch.tensor([0.05, 0.4, 0.25, 0.2, 0.1])


@pytest.mark.parametrize(
    ("search", "allowed"),
    [
        (Sampling(), [0, 1, 2, 3, 4]),
        (Sampling(topk=2), [1, 2]),
        (Sampling(topk=99), [0, 1, 2, 3, 4]),
        (Sampling(topp=0.39), [1]),
        (Sampling(topp=0.41), [1, 2]),
        (Sampling(topp=0.86), [1, 2, 3, 4]),
        (Sampling(topp=1.0), [0, 1, 2, 3, 4]),
    ],
)
def test_sampling_draws_by_probability(search, allowed):
    expected = torch.zeros(5)
    expected[allowed] = PROBS[allowed] / PROBS[allowed].sum()
    found = frequencies(search, PROBS.log())
    assert found[expected == 0].eq(0).all()
    # Four standard deviations of a share of 4000 draws.
    assert (found - expected).abs().max() < 4 * math.sqrt(0.25 / 4000)


def test_sampling_is_independent_for_each_beam_and_repeatable():
    search = generator(beam_size=5, max_len_b=6, search_strategy=Sampling())
    torch.manual_seed(4)
    first = outputs(search.generate(None, batch([5], [5])))
    torch.manual_seed(4)
    assert outputs(search.generate(None, batch([5], [5]))) == first
    assert all(len(each) == 5 for each in first)
    assert len({tuple(tokens) for each in first for _, tokens in each}) > 5
    model = TableModel(V)
    for _, tokens in itertools.chain(*first):
        assert tokens[-1] == EOS and PAD not in tokens
        assert math.isfinite(sum(model.log_probs([EOS, *tokens[:-1]])))


def test_a_cold_sample_is_the_most_likely_one():
    options = {"max_len_b": 6, "temperature": 0.01, "search_strategy": Sampling()}
    found = generator(**options).generate(None, batch([5]))[0][0]["tokens"].tolist()
    assert found == outputs(generator(max_len_b=6).generate(None, batch([5])))[0][0][1]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"beam_size": 0}, "--beam"),
        ({"temperature": 0.0}, "--temperature"),
        ({"no_repeat_ngram_size": -1}, "--no-repeat-ngram-size"),
        ({"beam_size": 5, "search_strategy": DiverseBeamSearch(2, 0.5)}, "--diverse-beam-groups"),
    ],
)
def test_numbers_out_of_range(options, named):
    with pytest.raises(ValueError, match=named):
        generator(**options)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"topk": 0}, "--sampling-topk"),
        ({"topp": 1.5}, "--sampling-topp"),
        ({"topk": 3, "topp": 0.5}, "exclude each other"),
    ],
)
def test_sampling_out_of_range(given, named):
    with pytest.raises(ValueError, match=named):
        Sampling(**given)


def test_impossible_lengths_and_constraints():
    with pytest.raises(ValueError, match=r"--min-len 4 is above the longest output, 3 tokens"):
        generator(min_len=4, max_len_b=3).generate(None, batch([5]))
    with pytest.raises(ValueError, match="constrained"):
        generator().generate(None, batch([5]), constraints=torch.zeros(1))


@pytest.mark.parametrize("beam", [1, 3])
@pytest.mark.parametrize("search", [None, Sampling(), DiverseSiblingsSearch(0.5)])
def test_scores_that_are_no_numbers(beam, search):
    model = TableModel(V)
    model.decoder.logits[:] = torch.nan
    options = {"beam_size": beam, "max_len_b": 3, "search_strategy": search}
    with pytest.raises(FloatingPointError, match="not numbers"):
        generator(model, **options).generate(None, batch([5]))


def test_a_beam_as_wide_as_the_vocabulary():
    found = generator(beam_size=50, max_len_b=3).generate(None, batch([5]))
    assert len(found[0]) == V - 1
