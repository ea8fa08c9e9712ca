"""Training from a plain script, whose workers hold weights, gradients and optimizer state."""

import copy
import gc
import multiprocessing

import parallelize_cases
import pytest
import tensor_cases
import torch
from parallelize_cases import BlockPolicy, block_model

from fairseq.model_parallel.parallelize import parallelize

UPDATES = 4
BEFORE_LOADING = 2
CLIP = 0.5
EPS = 1e-4  # keys' biases have no gradient but rounding, which must not become steps


def batch(step):
    tokens = tensor_cases.tokens_of(2, 7, seed=step, vocab_size=99)
    return {"input_ids": tokens, "labels": tokens}


def groups(model):
    params = list(model.parameters())
    decayed = [param for param in params if param.dim() > 1]
    return [
        {"params": decayed, "weight_decay": 0.1},
        {"params": [param for param in params if param.dim() <= 1], "weight_decay": 0.0},
    ]


def train(model, optimizer, schedule, clip, steps):
    """An ordinary loop, of one process or of several."""
    found = []
    for step in steps:
        loss = model(**batch(step)).loss
        optimizer.zero_grad()
        loss.backward()
        norm = clip(CLIP)
        optimizer.step()
        schedule.step()
        found.append((loss.item(), norm.item(), schedule.get_last_lr()))
    return found


def scheduled(optimizer):
    return torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, total_iters=3)


@pytest.fixture(scope="module")
def trained():
    """What one process does, and what workers do, who start again in the middle."""
    multiprocessing.set_forkserver_preload([parallelize_cases.__name__])
    one = tensor_cases.hugging_face_model("gpt2")  # in evaluation mode, without dropout
    for module in one.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    model = copy.deepcopy(one)
    wanted = torch.optim.AdamW(groups(one), lr=1e-2, eps=EPS)
    schedule = scheduled(wanted)

    def clip(max_norm):
        return torch.nn.utils.clip_grad_norm_(one.parameters(), max_norm)

    found = {"one": one, "model": model}
    found["lines wanted"] = train(one, wanted, schedule, clip, range(BEFORE_LOADING))
    found["state wanted"] = copy.deepcopy(wanted.state_dict())
    found["weights wanted"] = {n: p.clone() for n, p in one.state_dict().items()}
    rest = range(BEFORE_LOADING, UPDATES)
    found["lines wanted"] += train(one, wanted, schedule, clip, rest)
    embedded = torch.randn(2, 5, 24, requires_grad=True)
    one(inputs_embeds=embedded).logits.square().sum().backward()
    found["of inputs wanted"] = embedded.grad.clone()
    with parallelize(model, num_gpus=2, seed=2) as handle:
        optimizer = handle.optimizer(torch.optim.AdamW, groups(model), lr=1e-2, eps=EPS)
        schedule = scheduled(optimizer)
        lines = train(model, optimizer, schedule, handle.clip_grad_norm_, range(BEFORE_LOADING))
        found["state"] = optimizer.state_dict()
        found["weights"] = model.state_dict()
        again = handle.optimizer(torch.optim.AdamW, groups(model), lr=1.0)
        again.load_state_dict(found["state"])
        found["rates loaded"] = [group["lr"] for group in again.param_groups]
        schedule.optimizer = again
        lines += train(model, again, schedule, handle.clip_grad_norm_, rest)
        model.zero_grad()
        embedded.grad = None
        model(inputs_embeds=embedded).logits.square().sum().backward()
        found["lines"], found["of inputs"] = lines, embedded.grad
        model.train()
        found["with dropout"] = [model(**batch(0)).loss.item() for _ in range(2)]
        model.eval()
        inputs = {"input_ids": batch(0)["input_ids"], "do_sample": True, "max_new_tokens": 8}
        model(**batch(0))  # passes on the mode
        found["sampled"] = handle._pool.call("invoke", "generate", (), inputs, everyone=True)
    return found


def test_losses_norms_and_rates_are_those_of_one_process(trained):
    for line, wanted in zip(trained["lines"], trained["lines wanted"], strict=True):
        assert line[:2] == pytest.approx(wanted[:2], rel=1e-4)
        assert line[2] == pytest.approx(wanted[2])


def test_weights_come_back_trained(trained):
    pairs = zip(trained["one"].named_parameters(), trained["model"].parameters(), strict=True)
    for (name, wanted), param in pairs:
        torch.testing.assert_close(param, wanted, atol=1e-4, rtol=1e-4, msg=name)
    assert trained["model"].lm_head.weight is trained["model"].transformer.wte.weight


def test_states_on_the_way_are_those_of_one_process(trained):
    for name, wanted in trained["weights wanted"].items():
        torch.testing.assert_close(trained["weights"][name], wanted, atol=1e-5, rtol=1e-4)
    state, wanted = trained["state"], trained["state wanted"]
    assert [g["params"] for g in state["param_groups"]] == [
        g["params"] for g in wanted["param_groups"]
    ]
    assert state["state"].keys() == wanted["state"].keys()
    for index, entries in wanted["state"].items():
        for kind, value in entries.items():
            own = state["state"][index][kind]
            torch.testing.assert_close(own, value, atol=1e-6, rtol=1e-3)
    assert trained["rates loaded"] == [g["lr"] for g in wanted["param_groups"]]


def test_gradients_of_inputs_come_back(trained):
    torch.testing.assert_close(
        trained["of inputs"], trained["of inputs wanted"], rtol=1e-3, atol=1e-4
    )


def test_workers_sample_alike_after_drawing_numbers_of_their_own(trained):
    assert trained["with dropout"][0] != trained["with dropout"][1]
    first, second = trained["sampled"]
    assert first.shape == (2, 15) and torch.equal(first, second)


@pytest.fixture(scope="module")
def blocks():
    """A small model with its workers."""
    multiprocessing.set_forkserver_preload([parallelize_cases.__name__])
    model = block_model()
    one = copy.deepcopy(model)
    with parallelize(model, num_gpus=2, custom_policies=BlockPolicy) as handle:
        yield handle, model, one


def kept_graphs(handle):
    return {each["graphs"] for each in handle._memory().values()}


def norm_of(model):
    return torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])


def test_several_results_at_a_time_have_graphs_of_their_own(blocks):
    handle, model, one = blocks
    inputs = [torch.randn(2, 6), torch.randn(3, 6)]
    for each in (model, one):
        each.zero_grad()
        losses = [each(x)["x"].square().sum() for x in inputs]
        (losses[0] + 3 * losses[1]).backward()
    assert handle.clip_grad_norm_(0.0).item() == pytest.approx(norm_of(one).item(), rel=1e-5)
    for each in (model, one):  # gradients add up until they are dropped
        each(inputs[0])["x"].sum().backward()
    assert handle.clip_grad_norm_(0.0).item() == pytest.approx(norm_of(one).item(), rel=1e-5)
    assert kept_graphs(handle) == {0}


def test_a_result_that_is_dropped_frees_its_graph(blocks):
    handle, model, _ = blocks
    first, second = model(torch.randn(2, 6)), model(torch.randn(2, 6))
    assert kept_graphs(handle) == {2}
    del first
    gc.collect()
    assert kept_graphs(handle) == {1}
    with torch.no_grad():
        assert not model(torch.randn(2, 6))["x"].requires_grad
    assert kept_graphs(handle) == {1}
    second["x"].sum().backward()
    assert kept_graphs(handle) == {0}


def test_a_second_backward_pass_says_what_to_do(blocks):
    _, model, _ = blocks
    output = model(torch.randn(2, 6))["x"]
    output.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"second time on one result .* call the model again"):
        output.sum().backward()


def test_modes_are_passed_on(blocks):
    handle, model, one = blocks
    x = torch.randn(2, 6)
    for each in (model, one):
        each.zero_grad()
        each.blocks[0].down.requires_grad_(False)
        each(x)["x"].sum().backward()
    has_grad = [p.grad is not None for p in one.parameters()]
    assert has_grad.count(False) == 2
    params = [p for p in one.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in params]).item()
    assert handle.clip_grad_norm_(0.0).item() == pytest.approx(norm, rel=1e-5)
    model.requires_grad_(False)
    assert not model(x)["x"].requires_grad
    model.requires_grad_(True)
    one.requires_grad_(True)
    assert model(x)["is_training"] and not model.eval()(x)["is_training"]


def test_an_optimizer_of_parameters_without_values_is_refused(blocks):
    _, model, _ = blocks
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match=r"lie with the workers; make it by .*optimizer\(SGD"):
        optimizer.step()
    stranger = torch.nn.Parameter(torch.ones(1))
    stranger.grad = torch.ones(1)
    torch.optim.SGD([stranger], lr=0.5).step()
    assert stranger.item() == 0.5


def test_parameters_of_another_model_are_refused(blocks):
    handle, _, one = blocks
    with pytest.raises(ValueError, match="parameters that are not the model's"):
        handle.optimizer(torch.optim.SGD, one.parameters(), lr=0.1)


def test_a_closure_is_called_before_the_step(blocks):
    handle, model, one = blocks
    x = torch.randn(2, 6)
    losses = []
    for each, optimizer in (
        (model, handle.optimizer(torch.optim.SGD, lr=0.1)),
        (one, torch.optim.SGD(one.parameters(), lr=0.1)),
    ):

        def closure(each=each, optimizer=optimizer):
            optimizer.zero_grad()
            loss = each(x)["x"].square().mean()
            loss.backward()
            return loss

        losses.append([optimizer.step(closure).item() for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
