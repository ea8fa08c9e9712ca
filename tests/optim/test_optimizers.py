import math

import pytest
import torch
from torch import nn

from fairseq.optim import FairseqOptimizer, build_optimizer, float32_step
from fairseq.optim.adafactor import Adafactor
from fairseq.optim.adam import Adam, fused_update, number_pair
from fairseq.optim.adamax import Adamax
from fairseq.optim.nag import NAG
from fairseq.registry import OPTIMIZERS

SHAPES = [(5, 3), (4,), (2, 3, 4)]
RATES = [0.1, 0.2, 0.2, 0.05, 0.0, 0.03]


def take_steps(optimizer, params, grads, rates=RATES):
    for rate, step_grads in zip(rates, grads, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for p, g in zip(params, step_grads, strict=True):
            p.grad = None if g is None else g.to(p.dtype)
        optimizer.step()


def random_run(seed=0, dtype=torch.float32):
    """Returns parameters and, for each step, gradients; one parameter has none at first."""
    generator = torch.Generator().manual_seed(seed)
    params = [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in SHAPES]
    grads = [[torch.randn(s, generator=generator) for s in SHAPES] for _ in RATES]
    grads[0][1] = None
    return params, grads


def nag_loop(params, grads, momentum, decay, lr_old):
    """The rule of NAG, one parameter at a time; works in the parameters' precision."""
    buffers = [torch.zeros_like(p) for p in params]
    for lr, step_grads in zip(RATES, grads, strict=True):
        rescale = lr / lr_old if lr_old > 0 else lr
        for p, v, g in zip(params, buffers, step_grads, strict=True):
            if g is None:
                continue
            g = g.to(p.dtype)
            if decay:
                p.mul_(1 - lr * decay)
            p.add_(v, alpha=momentum * momentum * rescale)
            p.add_(g, alpha=-(1 + momentum) * lr)
            v.mul_(momentum * rescale).add_(g, alpha=-lr)
        lr_old = lr
    return params, buffers


def adam_loop(params, grads, betas, eps, decay):
    """The rule of Adam, one parameter at a time."""
    b1, b2 = betas
    first, second = ([torch.zeros_like(p) for p in params] for _ in range(2))
    counts = [0] * len(params)
    for lr, step_grads in zip(RATES, grads, strict=True):
        for i, (p, g) in enumerate(zip(params, step_grads, strict=True)):
            if g is None:
                continue
            g = g.to(p.dtype)
            counts[i] += 1
            first[i].mul_(b1).add_(g, alpha=1 - b1)
            second[i].mul_(b2).addcmul_(g, g, value=1 - b2)
            size = lr * math.sqrt(1 - b2 ** counts[i]) / (1 - b1 ** counts[i])
            if decay:
                p.add_(p, alpha=-decay * lr)
            p.addcdiv_(first[i], second[i].sqrt().add_(eps), value=-size)
    return params, first, second


def copies(params, dtype):
    return [p.detach().clone().to(dtype) for p in params]


# The tables: rates, gradients, values (and momentum) after each step, as the original had them.
NAG_TABLE = [
    (0.1, (0.5, 1.0), (0.904, -2.188), (-0.05, -0.1)),
    (0.2, (-0.25, 0.5), (0.9161921, -2.535624), (-0.04, -0.28)),
    (0.2, (1.0, 0.0), (0.5019597, -2.7573528), (-0.236, -0.252)),
    (0.05, (0.1, -0.1), (0.4444187, -2.7975039), (-0.0581, -0.0517)),
]
ADAM_TABLE = [
    ((0.5, 1.0), (0.8990014, -2.0979993)),
    ((-0.25, 0.5), (0.871392, -2.1893883)),
    ((1.0, 0.0), (0.8050696, -2.2598155)),
]


def test_nag_reproduces_the_original(optimizer_config):
    p = nn.Parameter(torch.tensor([1.0, -2.0]))
    cfg = optimizer_config("nag", lr=[0.5], momentum=0.9, weight_decay=0.01)
    optimizer = build_optimizer(cfg, [p])
    for lr, grad, value, momentum in NAG_TABLE:
        optimizer.set_lr(lr)
        p.grad = torch.tensor(grad)
        optimizer.step()
        assert p.tolist() == pytest.approx(value, abs=5e-8)
        buffer = optimizer.optimizer.state[p]["momentum_buffer"]
        assert buffer.tolist() == pytest.approx(momentum, abs=5e-8)
        assert optimizer.param_groups[0]["lr_old"] == lr


def test_adam_reproduces_the_original(optimizer_config):
    p = nn.Parameter(torch.tensor([1.0, -2.0]))
    cfg = optimizer_config("adam", adam_betas="(0.9, 0.98)", adam_eps=1e-6, weight_decay=0.01)
    optimizer = build_optimizer(cfg, [p])
    for grad, value in ADAM_TABLE:
        p.grad = torch.tensor(grad)
        optimizer.step()
        assert p.tolist() == pytest.approx(value, abs=1e-7)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_nag_equals_its_rule(decay):
    params, grads = random_run()
    loop, loop_buffers = nag_loop(copies(params, torch.float32), grads, 0.99, decay, 0.5)
    exact, _ = nag_loop(copies(params, torch.float64), grads, 0.99, decay, 0.5)
    optimizer = NAG(params, lr=0.5, momentum=0.99, weight_decay=decay)
    take_steps(optimizer, params, grads)
    for p, q, v, e in zip(params, loop, loop_buffers, exact, strict=True):
        assert torch.equal(p, q)
        assert torch.equal(optimizer.state[p]["momentum_buffer"], v)
        torch.testing.assert_close(p.double(), e, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adam_equals_its_rule(decay):
    params, grads = random_run()
    loop, first, second = adam_loop(copies(params, torch.float32), grads, (0.9, 0.98), 1e-6, decay)
    exact, _, _ = adam_loop(copies(params, torch.float64), grads, (0.9, 0.98), 1e-6, decay)
    optimizer = Adam(params, lr=0.5, betas=(0.9, 0.98), eps=1e-6, weight_decay=decay)
    take_steps(optimizer, params, grads)
    for p, q, m, s, e in zip(params, loop, first, second, exact, strict=True):
        assert torch.equal(p, q)
        assert torch.equal(optimizer.state[p]["exp_avg"], m)
        assert torch.equal(optimizer.state[p]["exp_avg_sq"], s)
        torch.testing.assert_close(p.double(), e, rtol=1e-5, atol=1e-6)
    assert optimizer.state[params[1]]["step"] == len(RATES) - 1


def test_the_fused_kernel_follows_the_rule():
    """The kernel a GPU takes, run on the CPU; a large epsilon shows where it is added."""
    params, grads = random_run()
    params, grads = params[:1], [step[:1] for step in grads]
    exact, _, _ = adam_loop(copies(params, torch.float64), grads, (0.9, 0.98), 0.1, 0.1)
    group = {"betas": (0.9, 0.98), "eps": 0.1, "weight_decay": 0.1}
    zeros = torch.zeros_like(params[0])
    state = {"step": 0, "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
    with torch.no_grad():
        for lr, step_grads in zip(RATES, grads, strict=True):
            state["step"] += 1
            fused_update({**group, "lr": lr}, [state], params, step_grads)
    torch.testing.assert_close(params[0].double(), exact[0], rtol=1e-5, atol=1e-6)


def test_buckets_do_not_change_numbers(monkeypatch):
    monkeypatch.setitem(float32_step.MAX_BUCKET_ELEMENTS, "cpu", 6)
    params, grads = random_run()
    loop, _, _ = adam_loop(copies(params, torch.float32), grads, (0.9, 0.98), 1e-8, 0.0)
    take_steps(Adam(params, lr=0.5, betas=(0.9, 0.98)), params, grads)
    assert all(torch.equal(p, q) for p, q in zip(params, loop, strict=True))


def adamax_step(p, g, m, u, t, lr, correct):
    """One number in plain Python: betas 0.9 and 0.98, eps 1e-3, decay 0.1."""
    m, u = 0.9 * m + 0.1 * g, max(0.98 * u, abs(g))
    p -= 0.1 * lr * p
    return p - lr / (1 - 0.9**t if correct else 1) * m / (u + 1e-3), m, u


@pytest.mark.parametrize("correct", [True, False])
def test_adamax_equals_its_rule(correct):
    p = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    optimizer = Adamax([p], betas=(0.9, 0.98), eps=1e-3, weight_decay=0.1, bias_correction=correct)
    grads = [[torch.tensor(g)] for g in ([0.5, 1.0], [-0.25, 0.5], [1.0, 0.0])]
    take_steps(optimizer, [p], grads, RATES[:3])
    for i, value in enumerate((1.0, -2.0)):
        m = u = 0.0
        for t, (lr, (g,)) in enumerate(zip(RATES[:3], grads, strict=True), start=1):
            value, m, u = adamax_step(value, g[i].item(), m, u, t, lr, correct)
        assert p[i].item() == pytest.approx(value, rel=1e-12)


def rms(values):
    return math.sqrt(sum(x * x for x in values) / len(values))


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("beta1", [None, 0.8])
def test_adafactor_equals_its_rule(scale, beta1):
    """A 2 x 2 matrix in plain Python: factored moments, clipping, scale, first moment, decay."""
    p = nn.Parameter(torch.tensor([[1.0, -2.0], [0.5, 0.25]], dtype=torch.float64))
    value = [x for row in p.tolist() for x in row]
    optimizer = Adafactor(
        [p],
        lr=0.5,
        eps=(1e-30, 1e-3),
        clip_threshold=0.7,
        decay_rate=-0.8,
        beta1=beta1,
        weight_decay=0.1,
        scale_parameter=scale,
    )
    grads = [[[0.5, 1.0], [-1.0, 2.0]], [[0.1, -0.2], [3.0, 0.4]], [[1.0, 1.0], [0.1, 0.2]]]
    double = torch.float64
    take_steps(optimizer, [p], [[torch.tensor(g, dtype=double)] for g in grads], RATES[:3])
    row, col, first = [0.0, 0.0], [0.0, 0.0], [0.0] * 4
    for t, (lr, g) in enumerate(zip(RATES[:3], grads, strict=True), start=1):
        if scale:
            lr *= max(1e-3, rms(value))
        b2 = 1 - t**-0.8
        for i in range(2):
            row[i] = b2 * row[i] + (1 - b2) * (g[i][0] ** 2 + g[i][1] ** 2) / 2
            col[i] = b2 * col[i] + (1 - b2) * (g[0][i] ** 2 + g[1][i] ** 2) / 2
        mean = sum(row) / 2
        update = [g[i][j] / math.sqrt(row[i] * col[j] / mean) for i in range(2) for j in range(2)]
        clip = max(1.0, rms(update) / 0.7)
        update = [lr * x / clip for x in update]
        if beta1 is not None:
            update = first = [
                beta1 * m + (1 - beta1) * x for m, x in zip(first, update, strict=True)
            ]
        value = [x - 0.1 * lr * x - u for x, u in zip(value, update, strict=True)]
    assert p.flatten().tolist() == pytest.approx(value, rel=1e-10)


@pytest.mark.parametrize(("warmup", "rate"), [(False, 1e-2), (True, 1e-6)])
def test_adafactor_relative_step(warmup, rate):
    p = nn.Parameter(torch.tensor([1.0, 1.0], dtype=torch.float64))
    optimizer = Adafactor(
        [p], lr=9.0, scale_parameter=False, relative_step=True, warmup_init=warmup
    )
    p.grad = torch.tensor([2.0, -2.0], dtype=torch.float64)
    optimizer.step()
    # The first step's decay is 0, so the update is the gradient's sign times the rate.
    assert p.tolist() == pytest.approx([1 - rate, 1 + rate], rel=1e-12)


def test_adafactor_warmup_needs_relative_step():
    with pytest.raises(ValueError, match="--relative-step"):
        Adafactor([nn.Parameter(torch.zeros(1))], lr=0.1, warmup_init=True)


TORCH_CLASSES = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}, {}),
    "adagrad": (torch.optim.Adagrad, {"weight_decay": 0.1}, {}),
    "adadelta": (
        torch.optim.Adadelta,
        {"weight_decay": 0.1},
        {"rho": ("adadelta_rho", 0.8), "eps": ("adadelta_eps", 1e-5)},
    ),
}


@pytest.mark.parametrize("name", TORCH_CLASSES)
def test_torch_optimizers_get_their_settings(optimizer_config, name):
    cls, same, renamed = TORCH_CLASSES[name]
    params, grads = random_run()
    own = [nn.Parameter(p.detach().clone()) for p in params]
    settings = same | dict(renamed.values())
    optimizer = build_optimizer(optimizer_config(name, lr=[0.3], **settings), own)
    take_steps(optimizer, own, grads)
    take_steps(
        cls(params, lr=0.3, **same, **{k: v for k, (_, v) in renamed.items()}), params, grads
    )
    assert all(torch.equal(p, q) for p, q in zip(params, own, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cls", [NAG, Adam, Adamax])
def test_half_precision_parameters_are_updated_in_float32(cls, dtype):
    params, grads = random_run(dtype=dtype)
    single = [nn.Parameter(p.detach().float()) for p in params]
    grads = [[g if g is None else g.to(dtype) for g in step] for step in grads][:1]
    take_steps(cls(params, lr=0.1), params, grads, RATES[:1])
    optimizer = cls(single, lr=0.1)
    take_steps(optimizer, single, grads, RATES[:1])
    for p, q in zip(params, single, strict=True):
        assert torch.equal(p, q.to(dtype))
    states = (v for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v))
    assert all(state.dtype == torch.float32 for state in states)


@pytest.mark.parametrize("name", ["nag", "adam", "adamax", "sgd"])
def test_step_divides_gradients_by_the_scale(optimizer_config, name):
    params, grads = random_run()
    scaled = [nn.Parameter(p.detach().clone()) for p in params]
    plain = build_optimizer(optimizer_config(name), params)
    other = build_optimizer(optimizer_config(name), scaled)
    for p, q, g in zip(params, scaled, grads[1], strict=True):
        p.grad, q.grad = g.clone(), g * 8
    plain.step()
    other.step(scale=8.0)
    assert all(torch.equal(p, q) for p, q in zip(params, scaled, strict=True))


def test_small_half_precision_gradients_survive_a_large_scale():
    p = nn.Parameter(torch.zeros(1, dtype=torch.float16))
    optimizer = NAG([p], lr=1.0)
    p.grad = torch.tensor([1e-4], dtype=torch.float16)
    optimizer.step(scale=1e5)
    # 1e-9 is zero in float16, but not in the momentum.
    assert optimizer.state[p]["momentum_buffer"].item() == pytest.approx(-1e-9, rel=1e-3)


SUPPORT = {
    "nag": (True, True),
    "adam": (True, True),
    "adamax": (True, True),
    "adafactor": (True, False),
    "sgd": (False, True),
    "adadelta": (False, True),
    "adagrad": (False, False),
}


@pytest.mark.parametrize("name", SUPPORT)
def test_what_optimizers_support(optimizer_config, name):
    optimizer = build_optimizer(optimizer_config(name), [nn.Parameter(torch.zeros(2))])
    support = (optimizer.supports_memory_efficient_fp16, optimizer.supports_flat_params)
    assert support == SUPPORT[name]


NAMES_IN_CHECKPOINTS = {
    "nag": "FairseqNAG",
    "adam": "FairseqAdam",
    "adamax": "FairseqAdamax",
    "adafactor": "FairseqAdafactor",
    "sgd": "SGD",
    "adagrad": "Adagrad",
    "adadelta": "Adadelta",
}


def test_class_names_are_those_in_checkpoints():
    assert {name: OPTIMIZERS[name].__name__ for name in OPTIMIZERS} == NAMES_IN_CHECKPOINTS


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_has_its_short_name(name):
    field = OPTIMIZERS.dataclass_of(name).__dataclass_fields__["weight_decay"]
    assert field.metadata["argparse_alias"] == "--wd"


def test_contract(optimizer_config):
    p, q = (nn.Parameter(torch.tensor([v])) for v in (3.0, 4.0))
    frozen = nn.Parameter(torch.zeros(1), requires_grad=False)
    optimizer = build_optimizer(optimizer_config("sgd", lr=[0.5, 0.1]), [p, frozen, q])
    assert isinstance(optimizer, FairseqOptimizer)
    assert list(optimizer.params) == [p, q]
    assert optimizer.get_lr() == 0.5
    optimizer.set_lr(0.25)
    optimizer.backward((p * 3 + q * 4).sum())
    assert optimizer.clip_grad_norm(0).item() == 5.0
    optimizer.multiply_grads(torch.tensor(2.0))
    assert (p.grad.item(), q.grad.item()) == (6.0, 8.0)
    optimizer.step()
    assert (p.item(), q.item()) == (1.5, 2.0)
    optimizer.zero_grad()
    assert p.grad is None and q.grad is None
    assert optimizer.master_state() is None


def test_parameters_in_dictionaries(optimizer_config):
    p, q = (nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = build_optimizer(optimizer_config("sgd"), [{"a": p}, {"b": q}])
    assert list(optimizer.params) == [p, q]


def test_overrides_replace_settings_and_refuse_unknown_ones(optimizer_config):
    optimizer = build_optimizer(optimizer_config("nag"), [nn.Parameter(torch.zeros(1))])
    optimizer.load_state_dict(optimizer.state_dict(), {"momentum": 0.5})
    assert optimizer.param_groups[0]["momentum"] == 0.5
    with pytest.raises(ValueError, match=r"'momentun'.*momentum"):
        optimizer.load_state_dict(optimizer.state_dict(), {"momentun": 0.5})


def test_state_of_another_model_is_refused(optimizer_config):
    one = build_optimizer(optimizer_config("nag"), [nn.Parameter(torch.zeros(1))])
    two = build_optimizer(optimizer_config("nag"), [nn.Parameter(torch.zeros(1)) for _ in range(2)])
    with pytest.raises(ValueError, match="--reset-optimizer"):
        one.load_state_dict(two.state_dict())


def test_betas_are_literals_and_nothing_else():
    assert number_pair("(0.9,0.98)", "--adam-betas") == (0.9, 0.98)
    assert number_pair([0.9, 0.98], "--adam-betas") == (0.9, 0.98)
    for text in ("(0.9,)", "0.9", "__import__('os').getpid()", "(0.9, 'x')"):
        with pytest.raises(ValueError, match="--adam-betas"):
            number_pair(text, "--adam-betas")


@pytest.mark.parametrize("name", ["adam", "adamax"])
def test_betas_out_of_range_are_refused(optimizer_config, name):
    cfg = optimizer_config(name, **{f"{name}_betas": "(0.9, 1.0)"})
    with pytest.raises(ValueError, match=f"--{name}-betas"):
        build_optimizer(cfg, [nn.Parameter(torch.zeros(1))])


def test_an_optimizer_must_be_chosen():
    import argparse

    with pytest.raises(ValueError, match="optimizer is required!"):
        build_optimizer(argparse.Namespace(optimizer=None), [])
    with pytest.raises(ValueError, match="apex"):
        build_optimizer(argparse.Namespace(optimizer="lamb"), [])


def test_sparse_gradients_are_refused():
    p = nn.Parameter(torch.zeros(3, 2))
    p.grad = torch.sparse_coo_tensor([[1]], torch.ones(1, 2), (3, 2), check_invariants=True)
    with pytest.raises(ValueError, match="sparse"):
        NAG([p], lr=0.1).step()
