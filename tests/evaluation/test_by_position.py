"""Losses by position, against plain loops."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
import torch

from fairseq.evaluation.by_position import LossByPosition
from fairseq.sequence_scorer import Scores


def _bins(losses, window):
    return {(b.first, b.last): b for b in losses.bins(window)}


def test_every_position_to_eight_has_a_bin_then_four_to_an_octave():
    losses = LossByPosition()
    losses.add_losses(np.arange(1, 65), np.ones(64))
    found = list(_bins(losses, 64))
    assert found[:8] == [(n, n) for n in range(1, 9)]
    assert [last for _, last in found[8:]] == [10, 11, 13, 16, 19, 23, 27, 32, 38, 45, 54, 64]
    # No gap, no overlap.
    assert [first for first, _ in found] == [1, *(last + 1 for _, last in found[:-1])]


def test_the_last_bin_ends_with_the_window():
    losses = LossByPosition()
    losses.add_losses(np.arange(1, 31), np.ones(30))
    assert list(_bins(losses, 30))[-1] == (28, 30)


def test_figures_of_a_bin():
    losses = LossByPosition()
    nats = [1.0, 2.5, 4.0]
    losses.add_losses(np.array([9, 10, 10]), np.array(nats))
    losses.add_losses(np.array([3]), np.array([0.5]))
    losses.add_losses(np.zeros(0, dtype=np.int64), np.zeros(0))
    bins = _bins(losses, 64)
    assert set(bins) == {(3, 3), (9, 10)}
    wide = bins[9, 10]
    assert wide.tokens == 3
    assert wide.position == pytest.approx(29 / 3)
    assert wide.bits == pytest.approx(statistics.fmean(nats) / math.log(2))
    error = statistics.stdev(nats) / math.sqrt(3) / math.log(2)
    assert wide.std_error == pytest.approx(error)
    assert bins[3, 3].std_error is None


def _scores(values, is_scored):
    return Scores(torch.tensor(values), torch.tensor(is_scored))


def test_positions_are_columns_from_one():
    losses = LossByPosition()
    #        context, context, own     own, own, padding
    scored = [[False, False, True], [True, True, False]]
    losses.add({"target": torch.zeros(2, 3)}, _scores([-3.0, -1.0, -2.0], scored))
    bits = {n: b.bits * math.log(2) for (n, _), b in _bins(losses, 3).items()}
    assert bits == pytest.approx({1: 1.0, 2: 2.0, 3: 3.0})


def test_impossible_tokens_and_a_given_target_are_left_out():
    losses = LossByPosition(unscored=0)
    sample = {"target": torch.tensor([[0, 5, 6, 7]])}
    losses.add(sample, _scores([-9.0, -1.0, -math.inf, -2.0], [[True] * 4]))
    assert {n: b.tokens for (n, _), b in _bins(losses, 4).items()} == {2: 1, 4: 1}


def test_sums_are_kept_as_lists_and_added_up():
    first, second = LossByPosition(), LossByPosition()
    first.add_losses(np.array([1, 2]), np.array([1.0, 3.0]))
    second.add_losses(np.array([2, 40]), np.array([5.0, 7.0]))
    total = LossByPosition.from_lists(first.to_lists(), second.to_lists())
    bits = {n: (b.tokens, b.bits * math.log(2)) for (n, _), b in _bins(total, 64).items()}
    assert bits == {1: (1, 1.0), 2: (2, pytest.approx(4.0)), 39: (1, pytest.approx(7.0))}
    assert list(LossByPosition.from_lists().bins(64)) == []
