import argparse
import math

import pytest
import torch
from torch import nn

from fairseq.criterions import FairseqCriterion, build_criterion, register_criterion
from fairseq.criterions.adaptive_loss import AdaptiveLoss, AdaptiveLossConfig
from fairseq.criterions.cross_entropy import CrossEntropyCriterion, CrossEntropyCriterionConfig
from fairseq.criterions.label_smoothed_cross_entropy import (
    LabelSmoothedCrossEntropyCriterion,
    LabelSmoothedCrossEntropyCriterionConfig,
)
from fairseq.distributed import utils as distributed_utils
from fairseq.logging import metrics
from fairseq.modules.adaptive_softmax import AdaptiveSoftmax as AdaptiveSoftmaxOfModels
from fairseq.registry import CRITERIONS

PAD = 1


class Dictionary:
    def pad(self):
        return PAD


class Task:
    target_dictionary = Dictionary()


class LanguageModel(nn.Module):
    """Any model: one row of logits for each token id."""

    def __init__(self, num_words, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.rows = nn.Parameter(torch.randn(num_words, num_words))

    def forward(self, src_tokens):
        return self.rows[src_tokens], {}

    def get_targets(self, sample, net_output):
        return sample["target"]

    def get_normalized_probs(self, net_output, log_probs, sample=None):
        assert log_probs
        return torch.log_softmax(net_output[0], dim=-1, dtype=torch.float32)


class AdaptiveSoftmax(nn.Module):
    """Bands [0, 4), [4, 9), [9, 12) with plain matrices."""

    cutoffs = (4, 9, 12)

    def __init__(self, width):
        super().__init__()
        self.head = nn.Linear(width, 4 + 2, bias=False)
        self.tails = nn.ModuleList([nn.Linear(width, 5), nn.Linear(width, 3)])

    def forward(self, features, target):
        features = features.reshape(-1, features.size(-1))
        head_target = target.clone()
        logits, targets = [self.head(features)], [head_target]
        for i, tail in enumerate(self.tails):
            low, high = self.cutoffs[i], self.cutoffs[i + 1]
            inside = (target >= low) & (target < high)
            head_target[inside] = 4 + i
            logits.append(tail(features[inside]) if inside.any() else None)
            targets.append(target[inside] - low if inside.any() else None)
        return logits, targets


class AdaptiveModel(nn.Module):
    def __init__(self, width=6, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(12, width)
        self.decoder = nn.Module()
        self.decoder.adaptive_softmax = AdaptiveSoftmax(width)

    def forward(self, src_tokens):
        return self.embed(src_tokens), {}

    def get_targets(self, sample, net_output):
        return sample["target"]


def make_sample(source, target):
    source, target = torch.tensor(source), torch.tensor(target)
    return {
        "net_input": {"src_tokens": source},
        "target": target,
        "ntokens": int((target != PAD).sum()),
        "nsentences": target.size(0),
    }


def band_of(word):
    return 0 if word < 4 else 1 if word < 9 else 2


def word_nll(model, source, word, *, skip_second_of_band):
    """-log p(word | source) in float64, from the definition of an adaptive softmax."""
    softmax = model.decoder.adaptive_softmax
    hidden = model.embed.weight[source]
    band = band_of(word)
    head = torch.log_softmax(softmax.head(hidden), dim=0)
    if band == 0:
        return -head[word]
    nll = -head[3 + band]
    relative = word - softmax.cutoffs[band - 1]
    if not (skip_second_of_band and relative == 1):
        nll = nll - torch.log_softmax(softmax.tails[band - 1](hidden), dim=0)[relative]
    return nll


# 5 and 10 are the second words of their bands; 1 is padding.
SOURCE = [[2, 5, 10, 7, 3], [4, 9, 0, 6, 6]]
TARGET = [[5, 10, 7, 3, 2], [9, 0, 6, 5, 1]]


@pytest.mark.parametrize("criterion_class", [AdaptiveLoss, CrossEntropyCriterion])
def test_adaptive_softmax_loss_and_gradient_match_a_float64_loop(criterion_class):
    model = AdaptiveModel()
    exact = AdaptiveModel().double()
    skip = criterion_class is AdaptiveLoss
    expected = sum(
        word_nll(exact, s, t, skip_second_of_band=skip)
        for s_row, t_row in zip(SOURCE, TARGET, strict=True)
        for s, t in zip(s_row, t_row, strict=True)
        if t != PAD
    )
    expected.backward()
    loss, sample_size, log = criterion_class(Task())(model, make_sample(SOURCE, TARGET))
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert sample_size == 9
    assert {k: float(v) for k, v in log.items()} == {
        "loss": loss.item(),
        "ntokens": 9,
        "nsentences": 2,
        "sample_size": 9,
    }
    for (name, p), q in zip(model.named_parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(p.grad.double(), q.grad, rtol=1e-5, atol=1e-6, msg=name)


def test_words_that_adaptive_loss_leaves_out_get_no_tail_gradient():
    model = AdaptiveModel()
    AdaptiveLoss(Task())(model, make_sample([[2, 3]], [[5, 10]]))[0].backward()
    for tail in model.decoder.adaptive_softmax.tails:
        assert tail.weight.grad.abs().max() == 0
    assert model.decoder.adaptive_softmax.head.weight.grad.abs().max() > 0


@pytest.mark.parametrize("criterion_class", [AdaptiveLoss, CrossEntropyCriterion])
def test_adaptive_losses_by_position(criterion_class):
    model = AdaptiveModel()
    skip = criterion_class is AdaptiveLoss
    loss, _, _ = criterion_class(Task())(model, make_sample(SOURCE, TARGET), reduce=False)
    expected = [
        0.0 if t == PAD else word_nll(model, s, t, skip_second_of_band=skip).item()
        for s_row, t_row in zip(SOURCE, TARGET, strict=True)
        for s, t in zip(s_row, t_row, strict=True)
    ]
    torch.testing.assert_close(loss.tolist(), expected, rtol=1e-6, atol=1e-6)


def test_a_batch_without_rare_words_needs_no_tails():
    model = AdaptiveModel()
    loss, _, _ = AdaptiveLoss(Task())(model, make_sample([[0, 3]], [[2, 3]]))
    loss.backward()
    assert model.decoder.adaptive_softmax.tails[0].weight.grad is None


class RealAdaptiveModel(AdaptiveModel):
    """The same with the project's adaptive softmax."""

    def __init__(self):
        super().__init__()
        self.decoder.adaptive_softmax = AdaptiveSoftmaxOfModels(12, 6, [4, 9], 0.0, factor=2.0)

    def get_normalized_probs(self, net_output, log_probs, sample=None):
        return self.decoder.adaptive_softmax.get_log_prob(net_output[0], None)


def test_every_criterion_works_with_the_adaptive_softmax_of_models():
    model, sample = RealAdaptiveModel(), make_sample(SOURCE, TARGET)
    lprobs = model.get_normalized_probs(model(**sample["net_input"]), log_probs=True).double()
    rows = lprobs.view(-1, 12).detach()
    targets = [t for row in TARGET for t in row]
    nll = [-row[t].item() for row, t in zip(rows, targets, strict=True) if t != PAD]
    loss, _, _ = CrossEntropyCriterion(Task())(model, sample)
    assert loss.item() == pytest.approx(sum(nll), rel=1e-6)
    tails = {
        5: model.decoder.adaptive_softmax.tail[0],
        10: model.decoder.adaptive_softmax.tail[1],
    }
    left_out = sum(
        -torch.log_softmax(tails[t](model.embed.weight[s]), dim=0)[1].item()
        for s, t in zip((s for row in SOURCE for s in row), targets, strict=True)
        if t in tails
    )
    adaptive, _, _ = AdaptiveLoss(Task())(model, sample)
    assert adaptive.item() == pytest.approx(sum(nll) - left_out, rel=1e-6)
    criterion = LabelSmoothedCrossEntropyCriterion(Task(), label_smoothing=0.1)
    smooth, _, _ = criterion(model, sample)
    expected = sum(smoothed(row, t, 0.1) for row, t in zip(rows, targets, strict=True) if t != PAD)
    assert smooth.item() == pytest.approx(expected, rel=1e-6)
    for value in (loss, adaptive, smooth):
        model.zero_grad()
        value.backward()
        assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(("sentence_avg", "expected"), [(False, 9), (True, 2)])
@pytest.mark.parametrize("criterion_class", [AdaptiveLoss, CrossEntropyCriterion])
def test_sample_size_is_tokens_or_rows(criterion_class, sentence_avg, expected):
    criterion = criterion_class(Task(), sentence_avg=sentence_avg)
    assert criterion(AdaptiveModel(), make_sample(SOURCE, TARGET))[1] == expected


def test_adaptive_loss_of_a_large_half_precision_batch_is_finite():
    model = AdaptiveModel().half()
    with torch.no_grad():
        model.decoder.adaptive_softmax.head.weight.mul_(200)
    sample = make_sample([[2, 5, 3, 4]] * 1000, [[0, 3, 3, 0]] * 1000)
    loss, _, _ = AdaptiveLoss(Task())(model, sample)
    assert loss.dtype == torch.float32
    assert 65504 < loss.item() < math.inf


def test_adaptive_loss_needs_an_adaptive_softmax():
    with pytest.raises(ValueError, match="--adaptive-softmax-cutoff"):
        AdaptiveLoss(Task())(LanguageModel(5), make_sample([[2]], [[3]]))


@pytest.mark.parametrize("backend", ["c10d", "pytorch_ddp"])
def test_adaptive_loss_refuses_torch_ddp_only_on_several_workers(monkeypatch, backend):
    cfg = AdaptiveLossConfig(_name="adaptive_loss", sentence_avg=False, ddp_backend=backend)
    assert isinstance(build_criterion(cfg, Task()), AdaptiveLoss)
    monkeypatch.setattr(distributed_utils, "get_world_size", lambda group: 2)
    with pytest.raises(ValueError, match="--ddp-backend legacy_ddp"):
        build_criterion(cfg, Task())
    cfg.ddp_backend = "legacy_ddp"
    assert isinstance(build_criterion(cfg, Task()), AdaptiveLoss)


def test_cross_entropy_matches_a_float64_loop():
    model = LanguageModel(7)
    source, target = [[0, 2, 3], [4, 5, 6]], [[2, 3, 4], [5, 6, PAD]]
    rows = model.rows.detach().double()
    nll = {
        (s, t): (torch.logsumexp(rows[s], 0) - rows[s, t]).item()
        for s in range(7)
        for t in range(7)
    }
    expected = nll[0, 2] + nll[2, 3] + nll[3, 4] + nll[4, 5] + nll[5, 6]
    criterion = CrossEntropyCriterion(Task())
    loss, sample_size, log = criterion(model, make_sample(source, target))
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert (sample_size, log["ntokens"], log["nsentences"]) == (5, 5, 2)
    each, _, _ = criterion(model, make_sample(source, target), reduce=False)
    assert each.tolist() == pytest.approx(
        [nll[0, 2], nll[2, 3], nll[3, 4], nll[4, 5], nll[5, 6], 0.0], rel=1e-6
    )


def smoothed(row, target, epsilon):
    """Cross entropy of a float64 row of log-probabilities with the smoothed distribution."""
    probabilities = [epsilon / (len(row) - 1)] * len(row)
    probabilities[target] = 1 - epsilon
    return -sum(q * lp for q, lp in zip(probabilities, row.tolist(), strict=True))


def test_label_smoothing_matches_its_definition():
    model = LanguageModel(7)
    source, target = [[0, 2, 3], [4, 5, 6]], [[2, 3, 4], [5, 6, PAD]]
    lprobs = torch.log_softmax(model.rows.detach().double(), dim=-1)
    pairs = [(0, 2), (2, 3), (3, 4), (4, 5), (5, 6)]
    criterion = LabelSmoothedCrossEntropyCriterion(
        Task(), label_smoothing=0.1, report_accuracy=True
    )
    loss, sample_size, log = criterion(model, make_sample(source, target))
    expected = sum(smoothed(lprobs[s], t, 0.1) for s, t in pairs)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert log["nll_loss"].item() == pytest.approx(-sum(lprobs[p].item() for p in pairs), rel=1e-6)
    hits = sum(int(lprobs[s].argmax()) == t for s, t in pairs)
    assert (sample_size, int(log["n_correct"]), int(log["total"])) == (5, hits, 5)


def test_label_smoothing_leaves_prefixes_out():
    model = LanguageModel(7)
    lprobs = torch.log_softmax(model.rows.detach().double(), dim=-1)
    criterion = LabelSmoothedCrossEntropyCriterion(
        Task(), label_smoothing=0.2, ignore_prefix_size=2
    )
    loss, _, _ = criterion(model, make_sample([[0, 2, 3]], [[2, 3, 4]]))
    assert loss.item() == pytest.approx(smoothed(lprobs[3], 4, 0.2), rel=1e-6)


@pytest.mark.parametrize(
    ("options", "flag"),
    [({"label_smoothing": 1.0}, "--label-smoothing"), ({"ignore_prefix_size": -1}, "--ignore-pre")],
)
def test_label_smoothing_refuses_values_out_of_range(options, flag):
    with pytest.raises(ValueError, match=flag):
        LabelSmoothedCrossEntropyCriterion(Task(), **options)


def reduced(criterion_class, logs):
    with metrics.aggregate() as aggregator:
        criterion_class.reduce_metrics(logs)
    return aggregator.get_smoothed_values()


@pytest.mark.parametrize("criterion_class", [AdaptiveLoss, CrossEntropyCriterion])
def test_metrics_in_bits_per_token(criterion_class):
    logs = [
        {"loss": torch.tensor(100.0), "ntokens": 20, "nsentences": 2, "sample_size": 20},
        {"loss": torch.tensor(110.0), "ntokens": 30, "nsentences": 3, "sample_size": 30},
    ]
    values = reduced(criterion_class, logs)
    # 210 nats / 50 tokens / ln 2 = 6.0593 bits; e^4.2 = 66.686...
    assert values == {"loss": 6.059, "ppl": 66.69}


def test_metrics_per_row_report_the_loss_per_token_too():
    logs = [{"loss": torch.tensor(100.0), "ntokens": 20, "nsentences": 2, "sample_size": 2}]
    values = reduced(CrossEntropyCriterion, logs)
    # 100 / 2 / ln 2, 100 / 20 / ln 2, e^5
    assert values == {"loss": 72.135, "nll_loss": 7.213, "ppl": 148.41}


def test_metrics_of_nothing_are_finite():
    assert reduced(CrossEntropyCriterion, [{}])["loss"] == 0.0


def test_metrics_of_label_smoothing():
    logs = [
        {
            "loss": 30.0,
            "nll_loss": 20.0,
            "ntokens": 10,
            "sample_size": 10,
            "n_correct": 3,
            "total": 9,
        }
    ]
    values = reduced(LabelSmoothedCrossEntropyCriterion, logs)
    # 3 / ln 2, 2 / ln 2, e^2, 100 / 3
    assert values["loss"] == 4.328
    assert values["nll_loss"] == 2.885
    assert values["ppl"] == 7.39
    assert values["accuracy"] == 33.333


def test_configs_have_the_fields_checkpoints_have():
    def fields(cls):
        return list(cls.__dataclass_fields__)

    assert fields(CrossEntropyCriterionConfig) == ["_name", "sentence_avg"]
    assert fields(AdaptiveLossConfig) == ["_name", "sentence_avg", "ddp_backend"]
    assert fields(LabelSmoothedCrossEntropyCriterionConfig) == [
        "_name",
        "label_smoothing",
        "report_accuracy",
        "ignore_prefix_size",
        "sentence_avg",
    ]


def test_build_fills_parameters_by_name():
    cfg = LabelSmoothedCrossEntropyCriterionConfig(
        _name="label_smoothed_cross_entropy", sentence_avg=True, label_smoothing=0.3
    )
    criterion = build_criterion(cfg, Task())
    assert (criterion.eps, criterion.sentence_avg, criterion.padding_idx) == (0.3, True, PAD)
    flat = argparse.Namespace(criterion="cross_entropy", sentence_avg=True)
    assert build_criterion(flat, Task()).sentence_avg is True


@pytest.fixture
def plug_in():
    @register_criterion("plug_in_for_test")
    class PlugIn(FairseqCriterion):
        def __init__(self, task, margin, power=2):
            super().__init__(task)
            self.margin, self.power = margin, power

    yield "plug_in_for_test"
    CRITERIONS._classes.pop("plug_in_for_test")


def test_build_of_a_plug_in_without_dataclass(plug_in):
    criterion = build_criterion(argparse.Namespace(criterion=plug_in, margin=3), Task())
    assert (criterion.margin, criterion.power) == (3, 2)
    with pytest.raises(TypeError, match="'margin'"):
        build_criterion(argparse.Namespace(criterion=plug_in), Task())


def test_build_names_what_is_wrong():
    with pytest.raises(ValueError, match="--criterion"):
        build_criterion(argparse.Namespace(criterion=None), Task())
    with pytest.raises(ValueError, match="cross_entropy"):
        build_criterion(argparse.Namespace(criterion="cross_entropi"), Task())


def test_padding_is_optional():
    assert FairseqCriterion(object()).padding_idx == -100
