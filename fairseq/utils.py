"""Small helpers that several rooms share. Importing this module loads no torch."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import functools
import gc
import importlib
import math
import multiprocessing
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = [
    "apply_to_sample",
    "end_with_parent",
    "eval_mode",
    "freeze_garbage",
    "get_perplexity",
    "import_user_module",
    "item",
    "keep_freed_memory",
    "local_part",
    "log_probs_of_targets",
    "log_softmax",
    "make_writable_folder",
    "move_to_cpu",
    "move_to_cuda",
    "on_host",
    "resolve_max_positions",
    "set_torch_seed",
    "softmax",
    "strip_pad",
    "tensors_in",
]

# Scores over a vocabulary that are there at a time: 4 MiB in float32 on a CPU, 64 MiB elsewhere.
_MOST_SCORES = {"cpu": 1 << 20}


def apply_to_sample(function: Callable[[torch.Tensor], Any], sample: Any) -> Any:
    """Applies a function to every tensor in nested dictionaries, lists, tuples and sets.

    Args:
        function: what takes the place of a tensor.
        sample: containers of these kinds are made anew, named tuples and those of transformers
            (`ModelOutput`) too; anything else stays.
    """
    import torch

    if isinstance(sample, torch.Tensor):
        return function(sample)
    kind = type(sample)
    if isinstance(sample, dict):
        values = {key: apply_to_sample(function, value) for key, value in sample.items()}
        return kind(**values) if dataclasses.is_dataclass(kind) else kind(values)
    if isinstance(sample, (list, tuple, set)):
        entries = [apply_to_sample(function, each) for each in sample]
        return kind(*entries) if hasattr(kind, "_fields") else kind(entries)
    return sample


def tensors_in(sample: Any) -> list[torch.Tensor]:
    """Returns the tensors that `apply_to_sample` would visit, in its order."""
    found: list[torch.Tensor] = []
    apply_to_sample(found.append, sample)
    return found


def move_to_cuda(sample: Any, device: Any = None) -> Any:
    """Moves the tensors of a batch to a GPU (the current one) without waiting for the copies.

    `on_host` gives back those of whole numbers from which these were copied.
    """
    import torch

    device = device or torch.device("cuda", torch.cuda.current_device())

    def move(tensor: torch.Tensor) -> torch.Tensor:
        moved = tensor.to(device=device, non_blocking=True)
        if moved is not tensor and not tensor.is_floating_point():
            _host_copies()[moved] = (tensor, _version(moved))
        return moved

    return apply_to_sample(move, sample)


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """Returns what a tensor was copied from by `move_to_cuda`; else the tensor itself.

    So ids can be looked at without waiting for the GPU. A tensor that was changed since is
    returned itself.
    """
    source, version = _host_copies().get(tensor, (tensor, None))
    is_same = version is not None and version == _version(tensor)
    return source if is_same else tensor


@functools.cache
def _host_copies() -> Any:
    """Returns what tensors were copied from, for as long as these are there, and their version."""
    from torch.utils.weak import WeakIdKeyDictionary

    return WeakIdKeyDictionary()


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def move_to_cpu(sample: Any) -> Any:
    """Moves the tensors of a batch to the CPU, half precision ones as float32."""
    import torch

    def move(tensor: torch.Tensor) -> torch.Tensor:
        is_half = tensor.dtype in (torch.float16, torch.bfloat16)
        return tensor.to(device="cpu", dtype=torch.float32 if is_half else None)

    return apply_to_sample(move, sample)


def freeze_garbage() -> None:
    """Takes what is alive now out of the garbage collector's rounds.

    To be called when models and data are there, before a loop that runs for long: modules and
    dictionaries live to the end, but a collection would look through all of them again.
    """
    gc.collect()
    gc.freeze()


def keep_freed_memory() -> bool:
    """Has the C library keep memory that is freed, for what is allocated next.

    glibc hands tensors of 32 MiB and more, and what is free at the heap's end, back to the system
    at once. To get them again takes longer than most operations on them: every page is cleared
    at its first use. To be called where the same sizes are needed over and over.

    Returns:
        Whether it does so from now on; not on systems without glibc.
    """
    library: Any = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(library, "mallopt"):
        return False
    trim_threshold, mmap_threshold = -1, -3  # malloc.h: M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
    return all(
        library.mallopt(option, value) == 1
        for option, value in ((mmap_threshold, 1 << 30), (trim_threshold, -1))
    )


def item(value: Any) -> Any:
    """Returns the number in a one-element tensor; anything else as it is."""
    return value.item() if hasattr(value, "item") else value


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Returns this worker's part of a sharded tensor, as a view; any other tensor as it is."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def get_perplexity(loss: Any, round: int | None = 2, base: int = 2) -> float:
    """Returns base ** loss, rounded; infinity where that overflows, 0 for None.

    Args:
        loss: mean loss per token, in bits for base 2.
        round: digits after the point; None does not round.
        base: 2 for a loss in bits.
    """
    import builtins

    if loss is None:
        return 0.0
    try:
        perplexity = float(base) ** float(loss)
    except OverflowError:
        return math.inf
    if round is None or not math.isfinite(perplexity):
        return perplexity
    return builtins.round(perplexity, round)


def set_torch_seed(seed: int) -> None:
    """Seeds torch's generators, on the CPU and on every GPU."""
    import torch

    if not isinstance(seed, int):
        raise TypeError(f"seed must be a whole number, not {seed!r}")
    torch.manual_seed(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)


def log_softmax(x: torch.Tensor, dim: int, onnx_trace: bool = False) -> torch.Tensor:
    """Returns log softmax in float32."""
    import torch

    return torch.log_softmax(x, dim=dim, dtype=torch.float32)


def softmax(x: torch.Tensor, dim: int, onnx_trace: bool = False) -> torch.Tensor:
    """Returns softmax in float32."""
    import torch

    return torch.softmax(x, dim=dim, dtype=torch.float32)


def log_probs_of_targets(
    score: Callable[[torch.Tensor], torch.Tensor],
    features: torch.Tensor,
    target: torch.Tensor,
    num_classes: int,
    *,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Returns log softmax at the targets alone, a few rows of scores at a time.

    So memory does not grow with N times V, and on a CPU scores stay in the cache.

    Args:
        score: turns features (n, D) into scores (n, V).
        features: (N, D).
        target: (N,), each in [0, V).
        num_classes: V.
        dtype: of the softmax and the result; None is that of the scores.

    Returns:
        (N,) nats.
    """
    import torch

    from fairseq.distributed.vocabulary_scores import ScoresInParts, scores_in_parts

    most = _MOST_SCORES.get(features.device.type, 1 << 24)
    size = max(1, most // num_classes)
    chosen = []
    for rows, goals in zip(features.split(size), target.split(size), strict=True):
        with scores_in_parts():
            scores: Any = score(rows)
        if isinstance(scores, ScoresInParts):
            chosen.append(scores.log_probs(goals)[0])
            continue
        scores = scores if dtype is None else scores.to(dtype)
        at_goals = scores.gather(1, goals[:, None]).squeeze(1)
        chosen.append(at_goals - torch.logsumexp(scores, dim=1))
    return torch.cat(chosen)


def get_activation_fn(activation: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns the activation function of that name: relu, gelu, gelu_fast, gelu_accurate, tanh,
    linear."""
    from fairseq.modules import basic

    return basic.get_activation_fn(activation)


def clip_grad_norm_(params: Any, max_norm: float, aggregate_norm_fn: Any = None) -> torch.Tensor:
    """Clips gradients in place; returns their norm before that."""
    from fairseq.optim.grad_norm import clip_grad_norm_ as clip

    return clip(params, max_norm, aggregate_norm_fn)


def strip_pad(tensor: torch.Tensor, pad: int) -> torch.Tensor:
    """Returns the elements of a vector of token ids that are not padding."""
    return tensor[tensor.ne(pad)]


def resolve_max_positions(*limits: Any) -> Any:
    """Returns the smallest of the limits that are set, None if none is.

    Args:
        *limits: each a number, None, or one of them for source and target each, as a tuple. A
            number beside tuples limits both.

    Returns:
        A tuple if one of the limits is one.
    """
    pairs = [limit for limit in limits if isinstance(limit, tuple)]
    if pairs:
        columns = [limit if limit in pairs else (limit,) * len(pairs[0]) for limit in limits]
        return tuple(resolve_max_positions(*each) for each in zip(*columns, strict=True))
    given = [limit for limit in limits if limit is not None]
    return min(given) if given else None


@contextlib.contextmanager
def eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Switches a model to evaluation mode and back to what it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def import_user_module(args: argparse.Namespace | Any) -> None:
    """Imports the plug-in folder that `args.user_dir` names, once.

    Raises:
        FileNotFoundError: there is no such folder.
        ImportError: a module of that name is imported already from elsewhere.
    """
    user_dir = getattr(args, "user_dir", None)
    if user_dir is None:
        return
    given = Path(user_dir)
    package = Path(__file__).resolve().parent
    candidates = [given.absolute(), package / given, package.parent / given]
    path = next((candidate for candidate in candidates if candidate.exists()), None)
    if path is None:
        tried = ", ".join(dict.fromkeys(str(candidate) for candidate in candidates))
        raise FileNotFoundError(f"--user-dir: there is no {user_dir} (looked for {tried})")
    path = path.resolve()
    name = path.stem
    loaded = sys.modules.get(name)
    if loaded is not None:
        if _origin(loaded) in (path, path.with_suffix(".py"), path / "__init__.py"):
            return
        raise ImportError(
            f"--user-dir: cannot import {path}, a module {name!r} is loaded already; rename the "
            "folder, its name must be unique"
        )
    sys.path.insert(0, str(path.parent))
    importlib.import_module(name)
    for folder in ("tasks", "models"):
        if (path / folder / "__init__.py").exists():
            importlib.import_module(f"{name}.{folder}")


def make_writable_folder(path: str | os.PathLike[str], flag: str) -> Path:
    """Makes a folder for results, before the work for them, and tests that files can be written.

    Args:
        path: the folder; it may exist.
        flag: the option that names it, for the message.

    Raises:
        OSError: they cannot.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        message = f"{flag}: cannot write there: {error.strerror}"
        raise OSError(error.errno, message, str(path)) from error
    return folder


def end_with_parent() -> None:
    """Ends this process when the one that started it is gone, even if it was killed."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def _origin(module: Any) -> Path | None:
    if getattr(module, "__file__", None):
        return Path(module.__file__).resolve()
    locations = list(getattr(module, "__path__", []))
    return Path(locations[0]).resolve() if locations else None
