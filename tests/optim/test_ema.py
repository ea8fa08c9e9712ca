import pytest
import torch
from torch import nn

from fairseq.dataclass.configs import EMAConfig
from fairseq.optim.ema import EMA, build_ema


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor([1.0, 2.0]))
        self.b = nn.Parameter(torch.tensor([[4.0]]))
        self.tied = self.a
        self.register_buffer("count", torch.zeros(1, dtype=torch.long))

    def move(self, value):
        with torch.no_grad():
            self.a.fill_(value)
            self.b.fill_(-value)
        self.count += 1
        return self


def config(**settings):
    return EMAConfig(store_ema=True, **{"ema_decay": 0.75, **settings})


def test_average_by_its_formula():
    model = Model()
    ema = EMA(model, config())
    expected = 1.0
    for updates, value in enumerate([3.0, -1.0, 5.0], start=1):
        ema.step(model.move(value), updates)
        expected = 0.75 * expected + 0.25 * value
    average = ema.get_model()
    assert average.a[0].item() == pytest.approx(expected, rel=1e-6)
    assert average.tied is average.a
    assert average.count.item() == 3
    assert not average.a.requires_grad
    assert model.a.tolist() == [5.0, 5.0]


def test_until_the_start_the_average_is_the_model():
    model = Model()
    ema = EMA(model, config(ema_start_update=3))
    ema.step(model.move(7.0), 2)
    assert (ema.get_decay(), ema.get_model().a[0].item()) == (0.0, 7.0)
    ema.step(model.move(3.0), 3)
    assert (ema.get_decay(), ema.get_model().a[0].item()) == (0.75, 6.0)


def test_every_few_updates_enter():
    model = Model()
    ema = EMA(model, config(ema_update_freq=2))
    for updates in (1, 2, 3):
        ema.step(model.move(float(updates)), updates)
    assert ema.get_model().b.item() == 0.75 * 4.0 - 0.25 * 2.0
    ema.step(model.move(8.0))
    assert ema.get_model().b.item() == 0.75 * 2.5 - 0.25 * 8.0


def test_small_changes_are_kept_in_float32():
    model = Model().half()
    coarse = EMA(model, config(ema_decay=0.9999))
    fine = EMA(model, config(ema_decay=0.9999, ema_fp32=True))
    expected = 1.0
    model.move(2.0)
    for updates in range(1, 11):
        coarse.step(model, updates)
        fine.step(model, updates)
        expected = 0.9999 * expected + 0.0001 * 2.0
    assert fine.fp32_params["a"][0].item() == pytest.approx(expected, rel=1e-6)
    assert fine.get_model().a.dtype == torch.float16
    assert fine.get_model().a[0].item() == torch.tensor(expected).half().item() > 1.0
    assert coarse.get_model().a[0].item() == 1.0


@pytest.mark.parametrize("fp32", [False, True])
def test_resuming_is_exact(fp32):
    model = Model().half() if fp32 else Model()
    first = EMA(model, config(ema_fp32=fp32))
    for updates in (1, 2, 3):
        first.step(model.move(1.1 * updates), updates)
    second = EMA(model, config(ema_fp32=fp32))
    second.restore({**first.get_model().state_dict(), **first.fp32_params})
    model.move(0.3)
    first.step(model, 4)
    second.step(model, 4)
    for name, value in first.get_model().state_dict().items():
        assert torch.equal(value, second.get_model().state_dict()[name])
    assert list(second.fp32_params) == (["a", "b"] if fp32 else [])
    for name, value in first.fp32_params.items():
        assert torch.equal(value, second.fp32_params[name])


def test_seed_model(tmp_path):
    seed = Model().move(9.0)
    torch.save({"model": seed.state_dict(), "args": None}, tmp_path / "seed.pt")
    cfg = config(ema_seed_model=str(tmp_path / "seed.pt"))
    assert build_ema(Model(), cfg).get_model().a.tolist() == [9.0, 9.0]
    with pytest.raises(FileNotFoundError, match="--ema-seed-model"):
        build_ema(Model(), config(ema_seed_model=str(tmp_path / "none.pt")))
    torch.save({}, tmp_path / "empty.pt")
    with pytest.raises(ValueError, match="--ema-seed-model"):
        build_ema(Model(), config(ema_seed_model=str(tmp_path / "empty.pt")))


@pytest.mark.parametrize(
    ("settings", "flag"),
    [({"ema_decay": 1.5}, "--ema-decay"), ({"ema_update_freq": 0}, "--ema-update-freq")],
)
def test_settings_out_of_range_are_refused(settings, flag):
    with pytest.raises(ValueError, match=flag):
        EMA(Model(), config(**settings))


def test_another_model_is_refused():
    with pytest.raises(ValueError, match="other parameters"):
        EMA(Model(), config()).step(nn.Linear(2, 2), 1)
    with pytest.raises(ValueError, match="a, b"):
        EMA(Model(), config(ema_fp32=True)).build_fp32_params({})
