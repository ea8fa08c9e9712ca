"""What started processes compute of a sequence that they share; they import it by name.

Every case runs in float64 and is compared with one process, in the same process: with softmax
written out for attention, and with the model as it was for models.
"""

from __future__ import annotations

import functools
import os
import sys
import traceback
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # every optimizer imports it: once, before a fork
import torch.distributed as dist
import torch.distributed.fsdp
from sequence_evaluation import evaluation_cases, refusal
from sequence_memory import trains_in_little_memory
from sequence_training import training_cases
from tiny_models import TINY, build, tiny_wiki103

from fairseq.attention import (
    BIDIRECTIONAL,
    CAUSAL,
    AttentionBias,
    LinearBias,
    MaskRule,
    PrefixRule,
    SplitHeadsRule,
    get_backend,
)
from fairseq.attention.coordinates import at_columns, signed_distance
from fairseq.criterions.adaptive_loss import AdaptiveLoss
from fairseq.criterions.cross_entropy import CrossEntropyCriterion
from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterion
from fairseq.model_parallel import block_attention
from fairseq.model_parallel.collectives import (
    RingOfProcesses,
    gather_columns,
    swap_heads_and_columns,
    total,
)
from fairseq.model_parallel.layout import SequenceLayout
from fairseq.model_parallel.sequence_attention import sequence_backend
from fairseq.model_parallel.sequence_parallel import SequenceParallelContextManager
from fairseq.positions import METHODS

# Loaded once, for all the processes that are started.
transformers_cases = None
if find_spec("transformers") is not None:
    from sequence_transformers import transformers_cases

SCHEMES = ("allgather", "ring", "ulysses")
LAYOUTS = ("contiguous", "zigzag")
WORDS = 100
ROWS, HEADS, WIDTH = 2, 4, 3


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


# ---- exchanges ----


def exchanges() -> dict[str, Any]:
    """Each exchange, with its gradient against the whole computation on this process."""
    group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    found: dict[str, Any] = {}
    columns = 3
    whole = normal(2, 4, size * columns, 5)
    own = whole[:, :, rank * columns : (rank + 1) * columns].clone().requires_grad_()
    # Every process has a loss of its own, and its gradient arrives with permuted strides.
    weights = [normal(size * columns, 2, 5, 4, seed=1 + r).permute(1, 3, 0, 2) for r in range(size)]
    gathered = gather_columns(own, group, 2)
    (gathered * weights[rank]).sum().backward()
    expected = sum(weights)[:, :, rank * columns : (rank + 1) * columns]
    found["gather"] = same(gathered, whole)
    found["gather's gradient"] = same(own.grad, expected)

    own = own.detach().clone().requires_grad_()
    swapped = swap_heads_and_columns(own, group, to_heads=True)
    each = 4 // size
    found["swap"] = same(swapped, whole[:, rank * each : (rank + 1) * each])
    back = swap_heads_and_columns(swapped, group, to_heads=False)
    found["swap and back"] = same(back, own)
    (
        swapped
        * normal(4, 2, size * columns, 5, seed=9).transpose(0, 1)[:, rank * each :][:, :each]
    ).sum().backward()
    expected = normal(4, 2, size * columns, 5, seed=9).transpose(0, 1)
    found["swap's gradient"] = same(own.grad, expected[:, :, rank * columns : (rank + 1) * columns])

    x = torch.tensor([1.0 + rank], dtype=torch.float64, requires_grad=True)
    summed = total(x, group)
    (summed * (2.0 + rank)).sum().backward()
    found["total"] = same(summed, torch.tensor([sum(1.0 + r for r in range(size))]).double())
    found["total's gradient"] = same(
        x.grad, torch.tensor([sum(2.0 + r for r in range(size))]).double()
    )
    ring = RingOfProcesses(group)
    held = torch.tensor([float(rank)])
    for step in range(1, size + 1):
        held = ring.hand_on(held).wait()
        found[f"ring {step}"] = held.item() == ring.owner(step) == (rank - step) % size
    return found


def same(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-10) -> bool:
    return found.shape == expected.shape and bool((found - expected).abs().max() <= tolerance)


# ---- attention ----


class TrainedBias(AttentionBias):
    """A number for each head and query position, times the key's; tells queries from keys."""

    is_learned = True

    def __init__(self, numbers: torch.Tensor) -> None:
        self.numbers = numbers  # (H, 2)
        self.num_heads = len(numbers)

    def dense(self, query_positions, key_positions, *, device=None):
        distance = signed_distance(query_positions, key_positions, device).unsqueeze(-3)
        left, right = self.numbers.unbind(1)
        term = left.view(-1, 1, 1) * distance.clamp(min=0).sqrt()
        return term + right.view(-1, 1, 1) * distance.clamp(max=0).abs().sqrt()

    def heads(self, which: slice) -> TrainedBias:
        return TrainedBias(self.numbers[which])


RULES = {
    "causal": CAUSAL,
    "symmetric": BIDIRECTIONAL,
    "window": MaskRule(window=4),
    "split heads": SplitHeadsRule.halves(HEADS),
    "prefix": PrefixRule((3, 5)),
}


def naive(q, k, v, term, is_seen):
    """Softmax written out; a query that sees nothing gets zeros."""
    scores = torch.einsum("bhtc,bhsc->bhts", q, k) / WIDTH**0.5 + term.double()
    weights = torch.where(is_seen, (scores - scores.detach().amax()).exp(), 0.0)
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)
    return torch.einsum("bhts,bhsc->bhtc", weights, v)


def attention_cases() -> dict[str, Any]:
    found = {}
    for scheme in SCHEMES:
        for layout in LAYOUTS:
            for rule in RULES:
                found[f"{scheme} {layout} {rule}"] = attention_case(scheme, layout, rule)
            packed = attention_case(scheme, layout, "causal", packed=True)
            found[f"{scheme} {layout} packed"] = packed
            both = attention_case(scheme, layout, "symmetric", packed=True)
            found[f"{scheme} {layout} symmetric packed"] = both
    found["allgather stride"] = attention_case("allgather", "zigzag", "causal", heads_k_stride=2)
    before, block_attention.TILE_ELEMENTS = block_attention.TILE_ELEMENTS, 50
    found["ring in small tiles"] = attention_case("ring", "zigzag", "causal", packed=True)
    block_attention.TILE_ELEMENTS = before
    return found


def attention_case(
    scheme: str, layout: str, rule_name: str, packed: bool = False, **options: Any
) -> bool:
    """Output and every gradient of this process equal those of softmax over the whole."""
    group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    how = SequenceLayout(size, layout)
    length = how.padded(17)
    q, k, v = (normal(ROWS, HEADS, length, WIDTH, seed=i).requires_grad_() for i in range(3))
    grad = normal(ROWS, length, HEADS, WIDTH, seed=3).transpose(1, 2)
    numbers = (0.3 * normal(HEADS, 2, seed=4)).requires_grad_()
    places = torch.arange(length)
    is_padding = (places >= 17).expand(ROWS, -1).clone()
    is_padding[0, :2] = True  # the first queries of this row see nothing
    documents = (places >= 5).long() + (places >= 13).long()
    documents = torch.stack([documents, places // 6])
    # In one process, from formulas.
    distance = (places.unsqueeze(1) - places).double()
    term = numbers[:, :1, None] * distance.clamp(min=0).sqrt()
    term = term + numbers[:, 1:, None] * distance.clamp(max=0).abs().sqrt()
    is_seen = seen_by(rule_name, distance) & ~is_padding[:, None, None, :]
    if packed:
        is_seen = is_seen & (documents.unsqueeze(2) == documents.unsqueeze(1)).unsqueeze(1)
    expected = naive(q, k, v, term, is_seen)
    expected_grads = torch.autograd.grad(expected, (q, k, v, numbers), grad)
    # This process's columns.
    columns = how.columns(rank, length)
    which = torch.as_tensor(list(columns))
    own = [each.detach()[:, :, which].requires_grad_() for each in (q, k, v)]
    own_numbers = numbers.detach().clone().requires_grad_()
    backend = sequence_backend(scheme, get_backend("auto"), group, how, **options)
    prepared = backend.prepare(
        TrainedBias(own_numbers),
        columns,
        range(length),
        rule=RULES[rule_name],
        key_is_padding=is_padding,
        query_documents=at_columns(documents, columns) if packed else None,
        key_documents=documents if packed else None,
        dtype=torch.float64,
        device=torch.device("cpu"),
    )
    out = backend.attend(*own, prepared)
    grads = torch.autograd.grad(out, (*own, own_numbers), grad[:, :, which])
    numbers_grad = grads[3].clone()
    dist.all_reduce(numbers_grad)
    are_same = [same(out, expected[:, :, which], 1e-6)]
    are_same += [
        same(a, b[:, :, which], 1e-5) for a, b in zip(grads[:3], expected_grads[:3], strict=True)
    ]
    return all([*are_same, same(numbers_grad, expected_grads[3], 1e-5)])


def seen_by(rule: str, distance: torch.Tensor) -> torch.Tensor:
    """Returns what a rule lets be seen, written out, (B or 1, H or 1, T, T)."""
    if rule == "symmetric":
        return torch.ones_like(distance, dtype=torch.bool)[None, None]
    if rule == "window":
        return ((distance >= 0) & (distance < 4))[None, None]
    if rule == "split heads":
        return torch.stack([distance >= 0] * 2 + [distance <= 0] * 2)[None]
    if rule == "prefix":
        keys = torch.arange(distance.size(0))
        return torch.stack([(keys < n) | (distance >= 0) for n in (3, 5)])[:, None]
    return (distance >= 0)[None, None]


# ---- models ----


class Task:
    """As much of a task as a criterion needs."""

    class target_dictionary:
        @staticmethod
        def pad() -> int:
            return 1


def model_of(method: str, **given: Any) -> Any:
    torch.manual_seed(1)
    given.setdefault("max_target_positions", 32)
    make = tiny_wiki103 if given.pop("adaptive", False) else None
    options = {"dropout": 0.0, "attention_dropout": 0.0, **given, "position_method": method}
    if make is not None:
        return make(**options).double().eval()
    return build("transformer_lm", WORDS, **TINY, **options).double().eval()


def sample_of(length: int = 13) -> dict[str, Any]:
    """Rows of different lengths, padded on the right as the tasks do."""
    tokens = torch.randint(4, WORDS, (3, length + 1), generator=generator(5))
    tokens[:, 4] = tokens[1, 9] = 2
    source, target = tokens[:, :-1].clone(), tokens[:, 1:].clone()
    for row, missing in ((1, 2), (2, 5)):
        source[row, -missing:] = target[row, -missing:] = 1
    return {
        "id": torch.arange(3),
        "nsentences": 3,
        "ntokens": int(source.ne(1).sum()),
        "net_input": {"src_tokens": source, "src_lengths": source.ne(1).sum(1)},
        "target": target,
    }


def results_of(model: Any, criterion: Any, sample: Any) -> dict[str, Any]:
    model.zero_grad()
    loss, sample_size, log = criterion(model, sample)
    loss.backward()
    grads = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }
    return {"loss": loss.detach(), "size": sample_size, "log": log, "grads": grads}


def is_one_process(model: Any, criterion: Any, scheme: str, layout: str, sample: Any) -> str:
    """Returns what differs from one process, "" if nothing does."""
    expected = results_of(model, criterion, sample)
    size = dist.get_world_size()
    with SequenceParallelContextManager(
        model, size, ring_attn_func=scheme, layout=layout
    ) as sequence:
        found = results_of(model, criterion, sequence.cut(sample))
    # Criterions compute the softmax in float32.
    if not same(sequence.total(found["loss"]), expected["loss"], 1e-6 * float(expected["loss"])):
        return f"loss {sequence.total(found['loss'])} not {expected['loss']}"
    for name in ("ntokens", "nsentences", "sample_size"):
        number = sequence.total(torch.tensor(float(found["log"][name])))
        if number != expected["log"][name]:
            return f"{name} {number} not {expected['log'][name]}"
    for name, grad in found["grads"].items():
        dist.all_reduce(grad)
        if not same(grad, expected["grads"][name], 1e-6 * (1 + float(grad.abs().max()))):
            return f"gradient of {name}: {grad} not {expected['grads'][name]}"
    return ""


def model_cases() -> dict[str, str]:
    """Every method with every scheme on 2 processes; with one on more, where a case takes long."""
    found = {}
    is_whole = dist.get_world_size() == 2
    task = Task()
    plain = CrossEntropyCriterion(task)
    for number, method in enumerate(METHODS):
        extra = {"alibi_learned_slopes": True} if method == "alibi" else {}
        # Documents with one scheme for each method, since both are one code for all.
        one, other = (SCHEMES[(number + step) % len(SCHEMES)] for step in range(2))
        for mask, schemes in (("none", SCHEMES if is_whole else [other]), ("line", [one])):
            model = model_of(method, document_mask=mask, **extra)
            for scheme in schemes:
                layout = LAYOUTS[scheme != "ring"]
                found[f"{method} {mask} {scheme}"] = is_one_process(
                    model, plain, scheme, layout, sample_of()
                )
    adaptive = model_of("alibi", adaptive=True)
    smooth = LabelSmoothedCrossEntropyCriterion(task, label_smoothing=0.1, ignore_prefix_size=3)
    by_rows = CrossEntropyCriterion(task, sentence_avg=True)
    linear = {"alibi_interpolation": "linear", "alibi_train_length": 8}
    for scheme in SCHEMES:
        for layout in LAYOUTS if is_whole else LAYOUTS[1:]:
            for name, model, criterion in (
                ("adaptive", adaptive, AdaptiveLoss(task)),
                ("whole adaptive", adaptive, CrossEntropyCriterion(task)),
                ("smoothed", model_of("alibi"), smooth),
                ("by rows", model_of("alibi"), by_rows),
                ("interpolated", model_of("alibi", **linear), plain),
                ("checkpointed", model_of("t5", checkpoint_activations=True), plain),
            ):
                found[f"{name} {scheme} {layout}"] = is_one_process(
                    model, criterion, scheme, layout, sample_of()
                )
    return found


def gathered_outputs() -> dict[str, Any]:
    """Outputs of all columns, and gradients of losses that every process computes alike."""
    found = {}
    size = dist.get_world_size()
    for layout in LAYOUTS:
        model = model_of("alibi")
        tokens = sample_of()["net_input"]["src_tokens"]
        expected = model(tokens)[0]
        expected.square().sum().backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        with SequenceParallelContextManager(
            [model], context_parallel_size=size, gather_outputs=True, layout=layout
        ):
            out = model(tokens)[0]
            out.square().sum().backward()
        # Averaged, as data parallelism averages.
        are_same = []
        for name, p in model.named_parameters():
            mean = p.grad.clone()
            dist.all_reduce(mean)
            are_same.append(same(mean / size, grads[name], 1e-5))
        found[f"outputs {layout}"] = same(out, expected, 1e-6)
        found[f"gradients {layout}"] = all(are_same)
        found[f"as before {layout}"] = torch.equal(model(tokens)[0], expected)
    # Two models in one context, called in turn with other lengths.
    other, shorter = model_of("sinusoidal"), tokens[:, :6]
    lengths = [model(tokens)[0], other(shorter)[0], model(tokens)[0]]
    with SequenceParallelContextManager([model, other], size, gather_outputs=True):
        outs = [model(tokens)[0], other(shorter)[0], model(tokens)[0]]
    found["two models"] = all(same(a, b, 1e-6) for a, b in zip(outs, lengths, strict=True))
    try:
        SequenceParallelContextManager(torch.nn.Linear(2, 2), size).__enter__()
    except ValueError as error:
        found["foreign attention is refused"] = "attends neither by a backend" in str(error)
    return found


def dropout_cases() -> dict[str, Any]:
    """Ranks differ in dropout, agree in which layers are left out, and repeat with the seed."""
    rank, size = dist.get_rank(), dist.get_world_size()
    found: dict[str, Any] = {}
    model = build("transformer_lm", WORDS, **TINY, dropout=0.0, attention_dropout=0.3)
    model = model.double().train()
    sample = sample_of()
    for scheme in SCHEMES:
        with SequenceParallelContextManager(model, size, ring_attn_func=scheme) as sequence:
            losses = []
            for seed in (1, 1, 2):
                sequence.seed(seed)
                losses.append(
                    results_of(model, CrossEntropyCriterion(Task()), sequence.cut(sample))
                )
        first, again, other = (sequence.total(each["loss"]).item() for each in losses)
        found[f"{scheme} repeats"] = first == again and first != other
        if scheme == "ring":
            found["ring's gradient"] = dropped_ring_gradient()
    with SequenceParallelContextManager(model, size) as sequence:
        sequence.seed(1)
        draws = torch.rand(1)
        others = [torch.empty(1) for _ in range(size)]
        dist.all_gather(others, draws)
        found["draws differ"] = len({float(each) for each in others}) == size
    layers = build("transformer_lm", WORDS, **TINY, decoder_layerdrop=0.5, dropout=0.1).train()
    with SequenceParallelContextManager(layers, size) as sequence:
        counts = []
        for seed in range(6):
            sequence.seed(seed)
            counts.append(sum(1 for _ in layers.decoder.layers))
            layers(**sequence.cut(sample)["net_input"])
        everywhere = torch.tensor(counts)
        dist.all_reduce(everywhere)
        found["layers agree"] = everywhere.tolist() == [size * n for n in counts]
        found["layers are left out"] = len(set(counts)) > 1
    found["rank"] = rank
    return found


def dropped_ring_gradient() -> bool:
    """The hand-written backward pass draws the same weights: compared with finite differences."""
    group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    how = SequenceLayout(size)
    length = 3 * size
    backend = sequence_backend("ring", get_backend("auto"), group, how)
    prepared = backend.prepare(
        LinearBias([0.5, 0.25]),
        how.columns(rank, length),
        range(length),
        dtype=torch.float64,
        device=torch.device("cpu"),
    )
    own = [normal(1, 2, 3, 4, seed=10 * rank + i).requires_grad_() for i in range(3)]
    weights = normal(1, 2, 3, 4, seed=99)

    def loss(tensors: list[torch.Tensor]) -> torch.Tensor:
        torch.manual_seed(7)
        return (backend.attend(*tensors, prepared, dropout_p=0.4) * weights).sum()

    grads = torch.autograd.grad(loss(own), own)
    right = True
    for source in range(size):
        for i in range(3):
            moved = [each.detach().clone() for each in own]
            sides = []
            for step in (1e-6, -1e-6):
                change = [each.clone() for each in moved]
                if rank == source:
                    change[i][0, 1, 1, 2] += step
                everywhere = loss(change).detach()
                dist.all_reduce(everywhere)
                sides.append(float(everywhere))
            slope = (sides[0] - sides[1]) / 2e-6
            if rank == source:
                right &= abs(slope - float(grads[i][0, 1, 1, 2])) < 1e-6
    return right


def everything(cfg: Any, folder: str) -> None:
    """All of the above in one start of processes."""
    torch.set_num_threads(1)
    size = dist.get_world_size()
    parts = {
        "exchanges": exchanges,
        "attention": attention_cases,
        "models": model_cases,
        "gathered": gathered_outputs,
        "dropout": dropout_cases,
        "training": functools.partial(training_cases, size),
        "evaluation": lambda: {"losses": evaluation_cases(), "refusal": refusal()},
    }
    if transformers_cases is not None:
        parts["transformers"] = transformers_cases
    if size == 4 and sys.platform == "linux":
        parts["memory"] = trains_in_little_memory
    for name, part in parts.items():
        try:
            found = part()
        except Exception:
            found = {"error": traceback.format_exc()}
        torch.save(found, Path(folder) / f"{name}.{dist.get_rank()}.pt")
    dist.barrier()
    os._exit(0)


def fails_on_rank_one(cfg: Any) -> None:
    """Rank 1 fails between two exchanges; rank 0 waits for its keys."""
    model = model_of("alibi")
    with SequenceParallelContextManager(model, dist.get_world_size(), ring_attn_func="ring"):
        if dist.get_rank() == 1:
            model.decoder.layers[1].register_forward_pre_hook(_fail)
        model(sample_of()["net_input"]["src_tokens"])


def _fail(*_: Any) -> None:
    raise ValueError("this layer is not here")
