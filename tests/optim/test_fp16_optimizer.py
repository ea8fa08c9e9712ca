import copy

import pytest
import torch
from torch import nn

from fairseq.dataclass.configs import FairseqConfig
from fairseq.optim import FP16Optimizer, MemoryEfficientFP16Optimizer

HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
SHAPES = [(3, 2), (4,), (2, 2)]


@pytest.fixture
def whole_config(optimizer_config):
    """Returns a function: (optimizer, common, **optimizer settings) -> configuration."""

    def make(name="nag", common=None, **settings):
        cfg = FairseqConfig()
        cfg.optimizer = optimizer_config(name, **settings)
        for key, value in {"fp16": True, "fp16_init_scale": 16, **(common or {})}.items():
            assert hasattr(cfg.common, key)
            setattr(cfg.common, key, value)
        cfg.distributed_training.distributed_world_size = 1
        return cfg

    return make


def half_params(dtype=torch.float16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in SHAPES]


def losses(params, num, seed=1):
    """Returns functions that compute linear losses, whose gradients are known."""
    generator = torch.Generator().manual_seed(seed)
    dtype = params[0].dtype
    for _ in range(num):
        weights = [torch.randn(p.shape, generator=generator).to(dtype) for p in params]
        yield (
            weights,
            lambda ps, ws=weights: sum(
                (p.float() * w.float()).sum() for p, w in zip(ps, ws, strict=True)
            ),
        )


def train(optimizer, params, num, *, clip=0.0, seed=1, factor=0.25):
    norms = []
    for _, loss in losses(params, num, seed):
        optimizer.zero_grad()
        optimizer.backward(loss(params))
        optimizer.multiply_grads(factor)
        norms.append(float(optimizer.clip_grad_norm(clip)))
        optimizer.step()
    return norms


def nag_in_float64(params, num, *, clip, epsilon, lr, momentum, factor=0.25):
    """Masters, momentum and norms by the rule, starting from the rounded parameters."""
    masters = [p.detach().double() for p in params]
    buffers = [torch.zeros_like(m) for m in masters]
    norms = []
    for weights, _ in losses(params, num):
        grads = [w.double() * factor for w in weights]
        norm = torch.cat([g.flatten() for g in grads]).norm().item()
        norms.append(norm)
        if clip > 0:
            grads = [g * min(1.0, clip / (norm + epsilon)) for g in grads]
        for m, v, g in zip(masters, buffers, grads, strict=True):
            m += momentum**2 * v - (1 + momentum) * lr * g
            v.mul_(momentum).sub_(lr * g)
    return masters, buffers, norms


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("clip", [0.0, 0.3, 100.0])
def test_masters_follow_the_rule_in_float32(whole_config, flat, clip):
    params = half_params()
    cfg = whole_config(common={"fp16_no_flatten_grads": not flat}, momentum=0.9)
    expected, buffers, norms = nag_in_float64(
        params, 4, clip=clip, epsilon=0.0, lr=0.1, momentum=0.9
    )
    optimizer = FP16Optimizer.build_optimizer(cfg, params)
    assert train(optimizer, params, 4, clip=clip) == pytest.approx(norms, rel=1e-6)
    masters = optimizer.master_state()
    state = optimizer.state_dict()["state"]
    if flat:
        assert list(state) == [0]
        found = [masters], [state[0]["momentum_buffer"]]
        expected, buffers = ([torch.cat([x.flatten() for x in xs])] for xs in (expected, buffers))
    else:
        found = masters, [entry["momentum_buffer"] for entry in state.values()]
    for own, rule in zip(found, (expected, buffers), strict=True):
        for x, y in zip(own, rule, strict=True):
            assert x.dtype == torch.float32
            torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-6)
    rounded = torch.cat([p.detach().flatten() for p in params])
    parts = torch.cat([m.flatten() for m in found[0]])
    assert torch.equal(rounded, parts.half())


def test_flat_and_single_masters_agree_to_the_bit(whole_config):
    results = []
    for no_flatten in (False, True):
        params = half_params()
        cfg = whole_config("adam", {"fp16_no_flatten_grads": no_flatten}, weight_decay=0.1)
        optimizer = FP16Optimizer.build_optimizer(cfg, params)
        train(optimizer, params, 5)
        masters = optimizer.master_state()
        results.append(torch.cat([m.flatten() for m in masters]) if no_flatten else masters)
    assert torch.equal(*results)


def test_bfloat16_has_no_scale_and_clips_with_epsilon(whole_config):
    params = half_params(torch.bfloat16)
    cfg = whole_config(common={"fp16": False, "bf16": True}, momentum=0.9)
    expected, _, norms = nag_in_float64(params, 3, clip=0.3, epsilon=1e-6, lr=0.1, momentum=0.9)
    optimizer = FP16Optimizer.build_optimizer(cfg, params)
    assert optimizer.scaler is None
    assert not optimizer.has_flat_params
    assert train(optimizer, params, 3, clip=0.3) == pytest.approx(norms, rel=1e-6)
    assert "loss_scale" not in optimizer.state_dict()
    for master, value, p in zip(optimizer.master_state(), expected, params, strict=True):
        torch.testing.assert_close(master.double(), value, rtol=1e-5, atol=1e-6)
        assert torch.equal(p, master.bfloat16())


@pytest.mark.parametrize("precision", HALF)
@pytest.mark.parametrize("name", ["nag", "adam", "adamax", "adafactor"])
def test_memory_efficient_steps_round_float32_steps(whole_config, name, precision):
    dtype = HALF[precision]
    flags = {"fp16": precision == "fp16", "bf16": precision == "bf16"}
    params = half_params(dtype)
    optimizer = MemoryEfficientFP16Optimizer.build_optimizer(whole_config(name, flags), params)
    masters = half_params(dtype)
    reference = FP16Optimizer.build_optimizer(
        whole_config(name, {**flags, "fp16_no_flatten_grads": True}), masters
    )
    train(optimizer, params, 1)
    train(reference, masters, 1)
    assert all(torch.equal(p, q) for p, q in zip(params, masters, strict=True))
    states = [t for e in optimizer.state_dict()["state"].values() for t in e.values()]
    assert all(t.dtype == torch.float32 for t in states if torch.is_tensor(t))


def test_memory_efficient_refuses_other_optimizers(whole_config):
    cfg = whole_config("sgd", {"memory_efficient_fp16": True})
    with pytest.raises(ValueError, match="Unsupported optimizer: SGD"):
        MemoryEfficientFP16Optimizer.build_optimizer(cfg, half_params())
    optimizer = MemoryEfficientFP16Optimizer.build_optimizer(
        cfg, half_params(torch.float32), allow_unsupported=True
    )
    params = optimizer.half_params
    before = [p.detach().clone() for p in params]
    (weights, _), *_ = losses(params, 1)
    train(optimizer, params, 1)
    for p, q, w in zip(params, before, weights, strict=True):
        torch.testing.assert_close(p.detach(), q - 0.1 * 0.25 * w)


@pytest.mark.parametrize("name", ["adagrad", "adafactor"])
def test_optimizers_that_look_at_shapes_need_single_masters(whole_config, name):
    with pytest.raises(ValueError, match="--fp16-no-flatten-grads"):
        FP16Optimizer.build_optimizer(whole_config(name), half_params())
    cfg = whole_config(name, {"fp16_no_flatten_grads": True})
    params = half_params()
    before = [p.detach().clone() for p in params]
    train(FP16Optimizer.build_optimizer(cfg, params), params, 1)
    assert not any(torch.equal(p, q) for p, q in zip(params, before, strict=True))


@pytest.mark.parametrize("cls", [FP16Optimizer, MemoryEfficientFP16Optimizer])
def test_overflow_lowers_the_scale_and_leaves_everything_else(whole_config, cls):
    params = half_params()
    optimizer = cls.build_optimizer(whole_config(), params)
    before = [p.detach().clone() for p in params]
    optimizer.zero_grad()
    optimizer.backward((params[0].float() * 1e6).sum())
    with pytest.raises(OverflowError, match=r"setting loss scale to: 8\.0"):
        optimizer.clip_grad_norm(1.0)
    assert optimizer.scaler.loss_scale == 8.0
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    # After zero_grad the next update is one of scale 8, as if nothing had happened.
    fresh = half_params()
    other = cls.build_optimizer(whole_config(common={"fp16_init_scale": 8}), fresh)
    assert train(optimizer, params, 2) == train(other, fresh, 2)
    assert all(torch.equal(p, q) for p, q in zip(params, fresh, strict=True))


def test_an_exploding_loss_ends_training(whole_config):
    cfg = whole_config(common={"min_loss_scale": 10.0})
    params = half_params()
    optimizer = FP16Optimizer.build_optimizer(cfg, params)
    optimizer.backward((params[0].float() * 1e6).sum())
    with pytest.raises(FloatingPointError, match="Minimum loss scale reached"):
        optimizer.clip_grad_norm(0.0)


def test_gradients_of_micro_batches_add_up(whole_config):
    params = half_params()
    optimizer = FP16Optimizer.build_optimizer(whole_config(), params)
    optimizer.zero_grad()
    for _ in range(2):
        optimizer.backward(params[1].float().sum())
    assert float(optimizer.clip_grad_norm(0.0)) == 4.0  # four gradients of 2
    optimizer.zero_grad()
    assert params[1].grad is None
    assert optimizer.fp32_params.grad is None


def test_parameters_without_gradient_have_gradient_zero(whole_config):
    params = half_params()
    optimizer = FP16Optimizer.build_optimizer(whole_config(momentum=0.5), params)
    for used in (params[0], params[1]):
        optimizer.zero_grad()
        optimizer.backward(used.float().sum())
        optimizer.clip_grad_norm(0.0)
        optimizer.step()
    buffer = optimizer.state_dict()["state"][0]["momentum_buffer"]
    # Momentum -0.1 after the first step, halved by the second, which had no gradient for it.
    assert buffer.tolist() == pytest.approx([-0.05] * 6 + [-0.1] * 4 + [0.0] * 4)


def test_norms_of_shards_are_aggregated(whole_config):
    params = half_params()
    optimizer = FP16Optimizer.build_optimizer(whole_config(), params)
    optimizer.backward(params[1].float().sum())
    norm = optimizer.clip_grad_norm(0.0, aggregate_norm_fn=lambda local: local * 3)
    assert float(norm) == 6.0


def resume(cls, cfg, params, optimizer):
    """Rebuilds as from a checkpoint: weights rounded, then optimizer state and masters."""
    restored = [nn.Parameter(p.detach().clone()) for p in params]
    rebuilt = cls.build_optimizer(cfg, restored)
    rebuilt.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    rebuilt.load_master_state(optimizer.master_state())
    if optimizer.scaler is not None:
        rebuilt.scaler.load_state_dict(optimizer.scaler.state_dict())
    return rebuilt, restored


@pytest.mark.parametrize("cls", [FP16Optimizer, MemoryEfficientFP16Optimizer])
@pytest.mark.parametrize("precision", HALF)
@pytest.mark.parametrize("no_flatten", [False, True])
def test_resuming_is_exact(whole_config, cls, precision, no_flatten):
    flags = {
        "fp16": precision == "fp16",
        "bf16": precision == "bf16",
        "fp16_no_flatten_grads": no_flatten,
        "fp16_scale_window": 2,
    }
    cfg = whole_config("adam", flags)
    params = half_params(HALF[precision])
    optimizer = cls.build_optimizer(cfg, params)
    train(optimizer, params, 3)
    other, restored = resume(cls, cfg, params, optimizer)
    train(optimizer, params, 3, seed=2)
    train(other, restored, 3, seed=2)
    assert all(torch.equal(p, q) for p, q in zip(params, restored, strict=True))
    for a, b in zip(
        optimizer.state_dict()["state"].values(), other.state_dict()["state"].values(), strict=True
    ):
        assert a["step"] == b["step"] == 6
        assert torch.equal(a["exp_avg_sq"], b["exp_avg_sq"])
    if precision == "fp16":
        assert other.scaler.loss_scale == optimizer.scaler.loss_scale > 16
    first, second = optimizer.master_state(), other.master_state()
    if first is not None:
        pairs = [(first, second)] if torch.is_tensor(first) else zip(first, second, strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_masters_fit_either_layout(whole_config):
    params = half_params()
    flat = FP16Optimizer.build_optimizer(whole_config(), params)
    train(flat, params, 2)
    others = half_params(seed=5)
    single = FP16Optimizer.build_optimizer(
        whole_config(common={"fp16_no_flatten_grads": True}), others
    )
    single.load_master_state(flat.master_state())
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))
    again = FP16Optimizer.build_optimizer(whole_config(), half_params(seed=6))
    again.load_master_state(single.master_state())
    assert torch.equal(again.master_state(), flat.master_state())
    with pytest.raises(ValueError, match="another model"):
        again.load_master_state(torch.zeros(3))


def test_masters_go_into_float32_parameters_too(optimizer_config):
    from fairseq.optim import build_optimizer

    params = half_params(torch.float32)
    build_optimizer(optimizer_config("nag"), params).load_master_state(torch.arange(14.0))
    assert torch.equal(torch.cat([p.detach().flatten() for p in params]), torch.arange(14.0))


def test_a_state_of_the_other_layout_is_refused(whole_config):
    flat = FP16Optimizer.build_optimizer(whole_config(), half_params())
    single = FP16Optimizer.build_optimizer(
        whole_config(common={"fp16_no_flatten_grads": True}), half_params()
    )
    with pytest.raises(ValueError, match="--fp16-no-flatten-grads"):
        flat.load_state_dict(single.state_dict())


def test_the_scale_window_follows_the_amount_of_data(whole_config):
    cfg = whole_config()
    cfg.distributed_training.distributed_world_size = 4
    cfg.optimization.update_freq = [8]
    assert FP16Optimizer.build_optimizer(cfg, half_params()).scaler.scale_window == 512
    cfg.optimization.update_freq = [2**20]
    assert FP16Optimizer.build_optimizer(cfg, half_params()).scaler.scale_window == 1
    cfg.optimization.update_freq = [1, 2]
    with pytest.raises(ValueError, match="--fp16-scale-window"):
        FP16Optimizer.build_optimizer(cfg, half_params())
    cfg.common.fp16_scale_window = 7
    assert FP16Optimizer.build_optimizer(cfg, half_params()).scaler.scale_window == 7


def test_the_learning_rate_is_that_of_the_wrapped_optimizer(whole_config):
    optimizer = FP16Optimizer.build_optimizer(whole_config(lr=[0.5]), half_params())
    assert optimizer.get_lr() == 0.5
    optimizer.set_lr(0.25)
    assert optimizer.fp32_optimizer.get_lr() == optimizer.param_groups[0]["lr"] == 0.25
