import math

import pytest
import torch

from fairseq.optim import DynamicLossScaler


def drive(scaler, overflows):
    """Calls the scaler as updates do; True is an overflow. Returns scales and messages."""
    scales, messages = [], []
    for is_overflow in overflows:
        try:
            scaler.check_overflow(math.inf if is_overflow else 1.0)
            scaler.update()
            messages.append(None)
        except OverflowError as error:
            messages.append(str(error))
        scales.append(scaler.loss_scale)
    return scales, messages


def test_the_original_sequence():
    calls = [i in (5, 6) for i in range(12)]
    scales, messages = drive(DynamicLossScaler(init_scale=128, scale_window=4), calls)
    assert scales == [128, 128, 128, 256, 256, 128, 64, 64, 64, 64, 128, 128]
    assert messages[5:7] == ["setting loss scale to: 128.0", "setting loss scale to: 64.0"]
    assert messages.count(None) == 10


def test_nan_counts_as_overflow_and_tensors_are_taken():
    with pytest.raises(OverflowError):
        DynamicLossScaler(init_scale=4).check_overflow(torch.tensor(math.nan))


def test_rare_overflows_are_tolerated():
    scaler = DynamicLossScaler(init_scale=128, scale_window=1000, tolerance=0.25)
    # The first is 1 of 6 calls since the start: let pass. The next is 2 of 7, more than a quarter.
    scales, messages = drive(scaler, [False] * 5 + [True, True])
    assert scales[5:] == [128, 64]
    assert messages[5:] == ["setting loss scale to: 128.0", "setting loss scale to: 64.0"]


def test_the_scale_stays_above_the_threshold():
    scaler = DynamicLossScaler(init_scale=4, threshold=3.0)
    assert drive(scaler, [True, True])[0] == [3.0, 3.0]


def test_a_scale_that_would_be_too_low_ends_training():
    scaler = DynamicLossScaler(init_scale=4, min_loss_scale=1.0)
    assert drive(scaler, [True])[0] == [2.0]
    with pytest.raises(FloatingPointError, match=r"Minimum loss scale reached \(1.0\)"):
        scaler.check_overflow(math.inf)
    assert scaler.loss_scale == 2.0


def test_an_empty_window_counts_as_one_update():
    assert drive(DynamicLossScaler(init_scale=2, scale_window=0), [False, False])[0] == [4, 8]


def test_the_state_resumes_the_sequence():
    calls = [i in (5, 6) for i in range(12)]
    whole, _ = drive(DynamicLossScaler(init_scale=128, scale_window=4), calls)
    first = DynamicLossScaler(init_scale=128, scale_window=4)
    scales, _ = drive(first, calls[:6])
    second = DynamicLossScaler(init_scale=1, scale_window=4)
    second.load_state_dict(first.state_dict())
    assert scales + drive(second, calls[6:])[0] == whole


def test_losses_are_multiplied():
    assert DynamicLossScaler(init_scale=8).scale(torch.tensor(0.5)).item() == 4.0
