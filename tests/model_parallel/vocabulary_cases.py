"""Losses from scores in parts, in started processes; compared with plain formulas."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from tensor_cases import PAD, Words, batch, compared, language_model, mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fairseq.criterions.adaptive_loss import AdaptiveLoss
from fairseq.criterions.cross_entropy import CrossEntropyCriterion
from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterion
from fairseq.distributed.vocabulary_scores import ScoresInParts
from fairseq.model_parallel.tensor_parallel import apply_tensor_parallel
from fairseq.sequence_scorer import target_log_probs

TASK = SimpleNamespace(target_dictionary=Words())
CRITERIONS = {
    "cross_entropy": CrossEntropyCriterion(TASK),
    "label_smoothed": LabelSmoothedCrossEntropyCriterion(
        TASK, label_smoothing=0.1, ignore_prefix_size=2, report_accuracy=True
    ),
    "adaptive_loss": AdaptiveLoss(TASK),
}
PAIRS = [
    ("shared", "cross_entropy"),
    ("shared", "label_smoothed"),
    ("adaptive_tied", "adaptive_loss"),
    ("adaptive", "adaptive_loss"),
    ("adaptive_tied_tables", "cross_entropy"),
]


def sample() -> dict[str, Any]:
    inputs, targets = batch()
    return {
        "id": torch.arange(3),
        "nsentences": 3,
        "ntokens": int(targets.ne(PAD).sum()),
        "net_input": {"src_tokens": inputs, "src_lengths": inputs.ne(PAD).sum(1)},
        "target": targets,
    }


class LargestTensor(TorchDispatchMode):
    """Notes how many numbers the largest tensor has that is made on this process."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for each in tree_leaves(made):
            if isinstance(each, torch.Tensor) and not isinstance(each, DTensor):
                self.largest = max(self.largest, each.numel())
        return made


def formula() -> dict[str, Any]:
    """Log-probabilities, their sums, gradients and best words, against float64 formulas."""
    found = {}
    for num_cut, num_shared, dtype in [
        (101, 0, torch.float32),
        (101, 3, torch.float32),
        (5, 2, torch.float64),  # on four processes the last one has no word
        (101, 3, torch.bfloat16),
    ]:
        size, rank = dist.get_world_size(), dist.get_rank()
        generator = torch.Generator().manual_seed(num_cut)
        whole = torch.randn(7, num_cut + num_shared, generator=generator) * 4
        whole[3, 2] = whole[3, 4] = 30.0  # two of the same size, perhaps on two processes
        whole = whole.to(dtype).double().requires_grad_()
        target = torch.randint(num_cut + num_shared, (7,), generator=generator)
        target[0] = num_cut + num_shared - 1
        weights = torch.randn(2, 7, generator=generator)
        log_probs = torch.log_softmax(whole, 1)
        wanted = [log_probs[torch.arange(7), target], log_probs.sum(1)]
        (torch.stack(wanted) * weights).sum().backward()
        rows = -(-num_cut // size)
        first = min(rank * rows, num_cut)
        words = slice(first, min(first + rows, num_cut))
        own = whole.detach()[:, words].to(dtype).requires_grad_()
        shared = whole.detach()[:, num_cut:].to(dtype).requires_grad_() if num_shared else None
        scores = ScoresInParts(own, dist.group.WORLD, first, num_cut, shared)
        got = scores.log_probs(target)
        (torch.stack(got) * weights).sum().backward()
        pairs = zip(got, wanted, strict=True)
        differences = [float(((a - b).abs() / (1 + b.abs())).max().detach()) for a, b in pairs]
        grads = [(own.grad, whole.grad[:, words])]
        grads += [(shared.grad, whole.grad[:, num_cut:])] if num_shared else []
        scale = whole.grad.abs().max()
        differences += [float((a - b).abs().amax() / scale) for a, b in grads if a.numel()]
        found[f"{num_cut} + {num_shared} {dtype}"] = {
            "differences": differences,
            "best": scores.best().tolist(),
            "best wanted": whole.argmax(1).tolist(),
        }
    return found


def criterions() -> dict[str, Any]:
    """Each criterion with the models it is for: losses, logged figures, and gradients."""
    found: dict[str, Any] = {}
    for kind, name in PAIRS:
        logged: list[dict[str, float]] = []

        def loss_of(
            model: Any, criterion: Any = CRITERIONS[name], logged: Any = logged
        ) -> torch.Tensor:
            loss, size, log = criterion(model, sample())
            logged.append({k: float(v) for k, v in {**log, "size": size}.items()})
            by_token = criterion(model, sample(), reduce=False)[0]
            logged[-1]["sum of tokens"] = float(by_token.sum())
            return loss

        found[f"{kind} {name}"] = compared(language_model(kind), loss_of)
        found[f"{kind} {name}"]["logged"] = logged[:2]
    return found


def sizes() -> dict[str, Any]:
    """The largest tensor of a training pass; scores of all tokens and words are 27 x 101."""
    found = {}
    for kind, name in PAIRS[:2]:
        cut = language_model(kind)
        apply_tensor_parallel(cut, mesh())
        with LargestTensor() as largest:
            CRITERIONS[name](cut, sample())[0].backward()
        found[f"{kind} {name}"] = largest.largest
    return found


def evaluation() -> dict[str, Any]:
    """What evaluation computes, and the whole distribution that generation asks for."""
    found = {}
    for kind in ("shared", "adaptive_tied"):
        whole = language_model(kind)
        cut = copy.deepcopy(whole)
        apply_tensor_parallel(cut, mesh())
        is_scored = sample()["target"].ne(PAD)
        with torch.no_grad():
            scores = [target_log_probs(m, sample(), is_scored, 5)[0] for m in (whole, cut)]
            probs = [
                m.get_normalized_probs(m(**sample()["net_input"]), log_probs=False)
                for m in (whole, cut)
            ]
        found[kind] = [float((a - b).abs().max()) for a, b in (scores, probs)]
    return found
