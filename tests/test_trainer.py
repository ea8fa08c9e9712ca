"""One update: what is computed, what is counted, what is logged, what goes wrong."""

import logging
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fairseq.criterions.fairseq_criterion import FairseqCriterion
from fairseq.dataclass.configs import FairseqConfig
from fairseq.logging import metrics
from fairseq.optim.adam import FairseqAdamConfig
from fairseq.optim.lr_scheduler.fixed_schedule import FixedLRScheduleConfig
from fairseq.optim.nag import FairseqNAGConfig
from fairseq.tasks.fairseq_task import FairseqTask
from fairseq.trainer import Trainer


class Line(nn.Module):
    """y = a x + b, with a second name for a."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor([2.0]))
        self.b = nn.Parameter(torch.tensor([0.0]))
        self.same_as_a = self.a
        self.num_updates = None

    def forward(self, x):
        return self.a * x + self.b

    def set_num_updates(self, num_updates):
        self.num_updates = num_updates

    def max_positions(self):
        return 8

    def load_state_dict(self, state_dict, strict=True, model_cfg=None):
        return super().load_state_dict(state_dict, strict)


class HalfSquare(FairseqCriterion):
    """Sum of (prediction - target)^2 / 2."""

    fails_with = None

    def forward(self, model, sample, reduce=True):
        if self.fails_with is not None:
            error, HalfSquare.fails_with = self.fails_with, None
            raise error
        difference = model(sample["x"]) - sample["y"]
        loss = 0.5 * difference.float().square().sum()
        n = len(sample["x"])
        log = {"loss": loss.detach(), "ntokens": n, "nsentences": 1, "sample_size": n}
        return loss, n, log

    @staticmethod
    def reduce_metrics(outputs):
        size = sum(log["sample_size"] for log in outputs)
        metrics.log_scalar("loss", sum(log["loss"] for log in outputs) / size, size, round=3)

    @staticmethod
    def logging_outputs_can_be_summed():
        return True


def make_trainer(*, lr=0.1, clip_norm=0.0, adam=False, **common):
    metrics.reset()
    cfg = FairseqConfig()
    cfg.common.cpu = True
    for name, value in common.items():
        setattr(cfg.common, name, value)
    cfg.optimization.clip_norm = clip_norm
    optimizer = FairseqAdamConfig if adam else FairseqNAGConfig
    cfg.optimizer = optimizer(_name="adam" if adam else "nag", lr=[lr])
    if not adam:
        cfg.optimizer.momentum = 0.0
    cfg.lr_scheduler = FixedLRScheduleConfig(_name="fixed", lr=[lr])
    task = FairseqTask(SimpleNamespace())
    return Trainer(cfg, task, Line(), HalfSquare(task))


def batch(x, y):
    return {"x": torch.tensor(x), "y": torch.tensor(y)}


# With a = 2, b = 0: differences are 1, 2, 3, so the sums of gradients are 1*1 + 2*2 + 3*3 = 14 for
# a and 6 for b, over 3 tokens.
WHOLE = [batch([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])]
PARTS = [batch([1.0], [1.0]), batch([2.0, 3.0], [2.0, 3.0])]
NORM = ((14 / 3) ** 2 + 2**2) ** 0.5


@pytest.mark.parametrize("samples", [WHOLE, PARTS])
def test_an_update_is_the_gradient_per_token(samples):
    trainer = make_trainer(clip_norm=100)
    logged = trainer.train_step(samples)
    assert trainer.get_model().a.item() == pytest.approx(2 - 0.1 * 14 / 3)
    assert trainer.get_model().b.item() == pytest.approx(-0.1 * 2)
    assert trainer.get_num_updates() == 1
    assert dict(logged) == {"loss": pytest.approx(14 / 2 / 3, abs=5e-4), "sample_size": 3}
    values = metrics.get_smoothed_values("train")
    assert values["gnorm"] == pytest.approx(NORM, abs=5e-4)
    assert list(values) == [
        "loss", "wps", "ups", "wpb", "bsz", "num_updates", "lr", "gnorm", "clip", "train_wall"
    ]  # fmt: skip
    assert values["wpb"] == 3 and values["bsz"] == len(samples) and values["clip"] == 0


def test_a_large_gradient_is_clipped_and_logged_as_it_was():
    trainer = make_trainer(clip_norm=1.0)
    trainer.train_step(WHOLE)
    assert trainer.get_model().a.item() == pytest.approx(2 - 0.1 * 14 / 3 / NORM, rel=1e-5)
    values = metrics.get_smoothed_values("train")
    assert values["clip"] == 100 and values["gnorm"] == pytest.approx(NORM, abs=5e-4)


def test_the_model_knows_the_update_and_dropout_follows_it():
    trainer = make_trainer()
    draws = []
    for _ in range(3):
        trainer.train_step(WHOLE)
        draws.append(torch.rand(()).item())
    assert trainer.get_model().num_updates == 2
    torch.manual_seed(1 + 2)
    assert draws[2] == torch.rand(()).item()


def test_a_batch_that_is_missing_counts_nothing():
    trainer = make_trainer()
    trainer.reset_dummy_batch(batch([5.0], [0.0]))
    # As on a worker whose share of the data is one batch short.
    trainer.train_step([*WHOLE, {}])
    assert trainer.get_model().a.item() == pytest.approx(2 - 0.1 * 14 / 3)
    assert metrics.get_smoothed_values("train")["wpb"] == 3


def test_shared_parameters_are_named_once(caplog):
    with caplog.at_level(logging.INFO):
        make_trainer()
    found = [r.getMessage() for r in caplog.records if "shared" in r.getMessage()]
    assert found == ["detected shared parameter: a <- same_as_a"]


def test_half_precision_without_gpu_is_float32_with_one_warning(caplog):
    trainer = make_trainer(fp16=True, memory_efficient_fp16=True)
    assert trainer.get_model().a.dtype is torch.float32
    assert [r.levelname for r in caplog.records if "--cpu-half" in r.getMessage()] == ["WARNING"]
    trainer.train_step(WHOLE)
    assert type(trainer.optimizer).__name__ == "FairseqNAG"


@pytest.mark.parametrize("flag", ["fp16", "bf16"])
def test_cpu_half_trains_in_half_precision(flag):
    trainer = make_trainer(cpu_half=True, **{flag: True})
    assert trainer.get_model().a.dtype in (torch.float16, torch.bfloat16)
    trainer.train_step(WHOLE)
    assert trainer.get_model().a.item() == pytest.approx(2 - 0.1 * 14 / 3, abs=0.01)
    assert ("loss_scale" in metrics.get_smoothed_values("train")) == (flag == "fp16")


def test_overflow_leaves_the_update_out_and_lowers_the_scale(caplog):
    trainer = make_trainer(cpu_half=True, fp16=True, fp16_init_scale=2**7)
    with caplog.at_level(logging.INFO):
        assert trainer.train_step([batch([60000.0], [0.0])]) is None
    assert trainer.get_num_updates() == 0
    assert trainer.get_model().a.item() == 2
    assert (
        "NOTE: gradient overflow detected, ignoring gradient, setting loss scale to: 64.0"
        in caplog.text
    )
    assert metrics.get_smoothed_values("train")["loss_scale"] == 64
    assert trainer.train_step(WHOLE) is not None


def test_nan_names_the_module_and_ends_training(caplog):
    trainer = make_trainer()
    with pytest.raises(FloatingPointError, match="gradients are Nan/Inf"):
        trainer.train_step([batch([float("nan")], [0.0])])
    assert "NaN detected in output of the model (Line), shape: (1,), forward" in caplog.text
    assert "gradients that are not finite: a, b" in caplog.text
    assert trainer.get_model().a.item() == 2


def test_out_of_memory_leaves_the_update_out(caplog, monkeypatch):
    trainer = make_trainer()
    monkeypatch.setattr(HalfSquare, "fails_with", torch.OutOfMemoryError("CUDA out of memory"))
    assert trainer.train_step(WHOLE) is None
    assert "attempting to recover from OOM in forward/backward pass" in caplog.text
    assert trainer.train_step(WHOLE) is not None
    assert trainer.get_num_updates() == 1


def test_other_errors_are_not_swallowed(monkeypatch):
    trainer = make_trainer()
    monkeypatch.setattr(HalfSquare, "fails_with", RuntimeError("shapes do not fit"))
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        trainer.train_step(WHOLE)


def test_validation_changes_nothing_and_tries_again_after_oom(monkeypatch):
    trainer = make_trainer()
    monkeypatch.setattr(HalfSquare, "fails_with", torch.OutOfMemoryError("CUDA out of memory"))
    with metrics.aggregate(new_root=True) as logged:
        trainer.valid_step(WHOLE[0])
        trainer.valid_step(batch([1.0], [2.0]))
    assert trainer.get_model().a.grad is None
    # (1 + 4 + 9 + 0) / 2 over four tokens.
    assert logged.get_smoothed_values()["loss"] == 1.75
    assert "gnorm" not in logged


def test_moving_average_starts_at_the_first_weights():
    metrics.reset()
    trainer = make_trainer()
    cfg = trainer.cfg
    cfg.ema.store_ema, cfg.ema.ema_decay = True, 0.5
    trainer = Trainer(cfg, trainer.task, Line(), HalfSquare(trainer.task))
    trainer.train_step(WHOLE)
    assert trainer.ema.get_model().a.item() == pytest.approx(2 - 0.5 * 0.1 * 14 / 3)


def test_averages_come_without_loss_if_the_criterion_logs_none(caplog, monkeypatch):
    monkeypatch.setattr(HalfSquare, "reduce_metrics", staticmethod(lambda outputs: None))
    trainer = make_trainer()
    trainer.train_step(WHOLE)
    trainer.train_step(WHOLE)
    assert metrics.get_smoothed_values("train")["loss"] == -1
    assert sum("logs no 'loss'" in r.getMessage() for r in caplog.records) == 1


def saved(trainer, path, **changes):
    position = {"version": 2, "epoch": 1, "iterations_in_epoch": 1, "shuffle": True, **changes}
    trainer.save_checkpoint(str(path), {"train_iterator": position, "val_loss": None})
    return str(path)


def test_a_restored_trainer_goes_on_counting(tmp_path):
    trainer = make_trainer(adam=True)
    for _ in range(3):
        trainer.train_step(WHOLE)
    trainer.set_previous_training_time(50.0)
    path = saved(trainer, tmp_path / "a.pt")
    trainer.train_step(WHOLE)
    again = make_trainer(adam=True)
    extra_state = again.load_checkpoint(path)
    assert extra_state["train_iterator"]["iterations_in_epoch"] == 1
    assert again.get_num_updates() == 3
    assert 50 <= again.cumulative_training_time() < 60
    # The clock of the run goes on too, although the one in the file has stopped.
    assert metrics.get_meter("default", "wall").elapsed_time > 0
    assert metrics.get_meter("train", "loss").count == 9
    again.train_step(WHOLE)
    assert torch.equal(again.get_model().a, trainer.get_model().a)


def test_averages_start_anew_at_the_start_of_an_epoch(tmp_path):
    trainer = make_trainer()
    trainer.train_step(WHOLE)
    path = saved(trainer, tmp_path / "a.pt", epoch=2, iterations_in_epoch=0)
    again = make_trainer()
    again.load_checkpoint(path)
    assert metrics.get_meter("train", "loss") is None


def test_without_optimizer_state_updates_count_from_zero(tmp_path):
    trainer = make_trainer()
    trainer.cfg.checkpoint.no_save_optimizer_state = True
    trainer.train_step(WHOLE)
    path = saved(trainer, tmp_path / "a.pt")
    again = make_trainer()
    again.load_checkpoint(path)
    assert again.get_num_updates() == 0
    assert torch.equal(again.get_model().a, trainer.get_model().a)
    assert "last_optimizer_state" not in torch.load(path, weights_only=True)


def test_another_loss_or_optimizer_needs_a_reset(tmp_path):
    trainer = make_trainer()
    trainer.train_step(WHOLE)
    path = saved(trainer, tmp_path / "a.pt")
    other = make_trainer(adam=True)
    with pytest.raises(ValueError, match=r"optimizer FairseqNAG.*FairseqAdam.*--reset-optimizer"):
        other.load_checkpoint(path)
    assert other.load_checkpoint(path, reset_optimizer=True) is not None
    assert make_trainer().load_checkpoint(str(tmp_path / "none.pt")) is None
