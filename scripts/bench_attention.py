"""Measures the attention backends against causal attention without any bias.

    python scripts/bench_attention.py --lengths 512 2048 8192 --backward --dropout 0.1
    python scripts/bench_attention.py --checkpoint checkpoint_best.pt data-bin --lengths 512 2048
    python scripts/bench_attention.py --only errors --backward --lengths 512 16384
    python scripts/bench_attention.py --only errors --dtype bfloat16
    python scripts/bench_attention.py --only memory --backward --lengths 512 16384
    python scripts/bench_attention.py --auto --lengths 32 128 512 1024 2048 4096

All forms are called in turn, several times, in one process; ratios are of medians. Forms:

* causal: `scaled_dot_product_attention(is_causal=True)`, without any bias, what the others are
  compared with; never with dropout.
* plain: as the original computes it, two batched products and a mask of T x T for every row and
  head. Left out where its mask would not fit (--most-plain).
* backends by name.

Errors are root mean squares against float64, of the output and, with --backward, of gradients
for random gradients of the output; beyond --most-exact of 64 queries, whose outputs alone have
gradients. In half precision that of rounding is told beside, and that of the kernel without bias.
Memory is what a call adds to the peak of a process of its own. --auto measures every backend that
`auto` may choose over a grid of calls, and tells where it lost. Ends with one line of JSON.
Shapes: `B` rows, `H` heads, `T` tokens, `K` head width.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
import torch.nn.functional as F
from attention_grid import measure_grid

from fairseq import utils
from fairseq.attention import AttentionBias, LinearBias, ZeroBias, attend, get_backend
from fairseq.attention.windows import measure_windows
from fairseq.positions.alibi_slopes import alibi_slopes

DENSE = ("reference", "sdpa", "triangular")
"""Backends with a mask of T x T."""

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Form = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def main() -> None:
    """Runs the command."""
    args = parser().parse_args()
    torch.set_num_threads(args.threads)
    utils.keep_freed_memory()  # as fairseq-train does
    if args.auto:
        print(json.dumps({"auto": measure_grid(args.lengths, args.runs)}))
        return
    results = []
    for length in args.lengths:
        for source, tensors, bias in sources(args, length):
            found = {"length": length, "source": source}
            print(f"T = {length}, {source}", flush=True)
            if args.only in (None, "time"):
                found |= windows_of(tensors, bias)
                print("  windows " + json.dumps(found["windows"]), flush=True)
                found["passes"] = {}
                for name in ["forward", "forward+backward"][: 2 if args.backward else 1]:
                    found["passes"][name] = measure(args, tensors, bias, name)
            if args.only in (None, "errors"):
                found["errors"] = errors(args, tensors, bias)
            if args.only == "memory":
                found["MiB"] = memory(args, tensors, bias)
            results.append(found)
    settings = {"dtype": args.dtype, "threads": args.threads, "dropout": args.dropout}
    print(json.dumps({**settings, "torch": torch.__version__, "results": results}))


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--lengths", type=int, nargs="+", default=[512, 2048])
    made.add_argument("--heads", type=int, default=8)
    made.add_argument("--width", type=int, default=64, help="of a head")
    made.add_argument("--rows", type=int, default=1)
    made.add_argument("--largest-score", type=float, default=7.0, help="R of random q and k")
    made.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    made.add_argument("--device", default="cpu")
    made.add_argument("--backward", action="store_true", help="measure training too")
    made.add_argument("--dropout", type=float, default=0.0, help="of attention weights")
    made.add_argument("--runs", type=int, default=5)
    made.add_argument("--threads", type=int, default=1)
    made.add_argument(
        "--backends",
        nargs="+",
        default=["reference", "sdpa", "augmented", "triangular", "windowed"],
    )
    made.add_argument("--most-plain", type=int, default=4096, help="longest T of forms with a mask")
    made.add_argument(
        "--most-exact", type=int, default=2048, help="longest T with errors of every query"
    )
    made.add_argument("--only", choices=["time", "errors", "memory"], help="default: not memory")
    made.add_argument("--auto", action="store_true", help="what auto chooses, over a grid")
    made.add_argument(
        "--checkpoint", nargs=2, metavar=("PATH", "DATA"), help="trained q, k, v of every layer"
    )
    return made


def sources(args: argparse.Namespace, length: int) -> list[tuple[str, Tensors, AttentionBias]]:
    """Returns queries, keys and values: random ones, or those of each layer of a trained model."""
    if args.checkpoint is not None:
        return trained(*args.checkpoint, length)
    generator = torch.Generator().manual_seed(length)
    shape = (args.rows, length, args.heads, args.width)
    q, k, v = (torch.randn(shape, generator=generator).transpose(1, 2) for _ in range(3))
    bound = q.norm(dim=-1).amax() * k.norm(dim=-1).amax() / math.sqrt(args.width)
    factor = (args.largest_score / bound).sqrt()
    dtype = getattr(torch, args.dtype)
    tensors = tuple(x.to(args.device, dtype) for x in (q * factor, k * factor, v))
    return [("random", tensors, LinearBias(alibi_slopes(args.heads)))]  # type: ignore[list-item]


def trained(path: str, data: str, length: int) -> list[tuple[str, Tensors, AttentionBias]]:
    """Returns what each layer of a trained model is called with, on the first tokens of `valid`."""
    from fairseq import checkpoint_utils

    overrides = {"data": data, "attention_backend": "reference"}
    models, _, task = checkpoint_utils.load_model_ensemble_and_task([path], overrides)
    task.load_dataset("valid")
    stream = []
    for index in range(len(task.dataset("valid"))):
        stream.append(task.dataset("valid")[index]["source"])
        if sum(map(len, stream)) >= length:
            break
    tokens = torch.cat(stream)[:length][None]
    model: Any = models[0].eval()
    backend, kept = model.decoder.backend, []
    compute = backend.attend

    def keep(q: Any, k: Any, v: Any, prepared: Any, **options: Any) -> Any:
        kept.append((q.detach(), k.detach(), v.detach()))
        return compute(q, k, v, prepared, **options)

    backend.attend = keep
    with torch.no_grad():
        model.decoder.extract_features(tokens)
    bias = model.decoder.positions.bias(tokens.size(1))
    return [(f"layer {layer}", tensors, bias) for layer, tensors in enumerate(kept)]


def windows_of(tensors: Tensors, bias: AttentionBias) -> dict[str, Any]:
    """Returns R, windows, and the bound; and what leaving out really changes, up to T = 4096."""
    windows = measure_windows(*tensors, bias)
    found: dict[str, Any] = {
        "R": round(float(windows.scores.largest.max()), 2),
        "windows": windows.left.tolist(),
        "bound": float(windows.error.max()),
    }
    length = tensors[0].size(2)
    if length <= 4096:
        found["moved"] = max(
            moved_by_window(*(x[:, h : h + 1] for x in tensors), bias, h, int(steps))
            for h, steps in enumerate(windows.left)
        )
        found["bound held"] = found["moved"] <= found["bound"] + 1e-12
    return found


def moved_by_window(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: AttentionBias,
    head: int,
    steps: int,
) -> float:
    """Returns how far leaving out keys moves an output element of one head, in float64."""
    scores, distance = scores64(q, k, bias.heads(slice(head, head + 1)))
    whole = torch.softmax(scores, -1) @ v.double()
    cut = torch.softmax(scores.masked_fill(distance > steps, -torch.inf), -1) @ v.double()
    return float((whole - cut).abs().max())


def scores64(
    q: torch.Tensor, k: torch.Tensor, bias: AttentionBias, positions: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns scores with bias and causal mask in float64, and distances (T, S)."""
    places = torch.arange(k.size(2), device=q.device)
    distance = (places if positions is None else positions)[:, None] - places
    scores = q.double() @ k.double().transpose(-1, -2) / math.sqrt(q.size(-1))
    slopes = bias.linear_slopes()
    assert slopes is not None
    scores = scores - slopes.left.to(q.device).double()[:, None, None] * distance
    return scores.masked_fill(distance < 0, -torch.inf), distance


def forms(args: argparse.Namespace, tensors: Tensors, bias: AttentionBias) -> dict[str, Form]:
    """Returns what is to be measured, by name; masks are made beforehand."""
    q = tensors[0]
    rows, heads, length, width = q.shape
    made: dict[str, Form] = {
        "causal": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)
    }
    if length <= args.most_plain:
        slopes = bias.linear_slopes()
        assert slopes is not None
        keys = torch.arange(length, device=q.device)
        mask = slopes.left.to(q.device)[:, None, None] * keys
        mask = mask + torch.full((length, length), -torch.inf, device=q.device).triu_(1)
        mask = mask.to(q.dtype).repeat(rows, 1, 1)  # (B H, T, T)

        def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            q, k, v = (x.reshape(rows * heads, length, width) for x in (q, k, v))
            scores = torch.bmm(q * width**-0.5, k.transpose(1, 2)) + mask
            weights = F.dropout(torch.softmax(scores, -1, dtype=torch.float32), args.dropout)
            return torch.bmm(weights.to(q.dtype), v).view(rows, heads, length, width)

        made["plain"] = plain
    for name in args.backends:
        if name in DENSE and length > args.most_plain:
            continue
        prepared = get_backend(name).prepare(
            bias, range(length), range(length), dtype=q.dtype, device=q.device
        )
        made[name] = lambda q, k, v, prepared=prepared: attend(  # type: ignore[misc]
            q, k, v, prepared, dropout_p=args.dropout
        )
    return made


def measure(
    args: argparse.Namespace, tensors: Tensors, bias: AttentionBias, name: str
) -> dict[str, Any]:
    """Returns milliseconds and ratios to causal attention without bias; prints them."""
    given = torch.randn_like(tensors[0])
    made = forms(args, tensors, bias)
    times: dict[str, list[float]] = {form: [] for form in made}
    for run in range(args.runs + 1):
        for form, function in made.items():
            start = clock(args)
            if name == "forward":
                with torch.no_grad():
                    function(*tensors)
            else:
                leaves = [x.detach().requires_grad_() for x in tensors]
                function(*leaves).backward(given)
            if run > 0:
                times[form].append(clock(args) - start)
    medians = {form: statistics.median(each) for form, each in times.items()}
    ratios = {form: round(each / medians["causal"], 3) for form, each in medians.items()}
    for form, ratio in ratios.items():
        print(f"  {name:17s} {form:10s} {1e3 * medians[form]:9.2f} ms  {ratio:7.3f}", flush=True)
    return {"ms": {form: round(1e3 * each, 3) for form, each in medians.items()}, "ratio": ratios}


def clock(args: argparse.Namespace) -> float:
    """Returns seconds, after everything on the device has ended."""
    if args.device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def errors(args: argparse.Namespace, tensors: Tensors, bias: AttentionBias) -> dict[str, Any]:
    """Returns root mean square errors against float64: output, then gradients of q, k, v."""
    found: dict[str, Any] = {}
    is_half = tensors[0].dtype.itemsize < 4
    names = [name for name in args.backends if not (is_half and name == "triangular")]
    exact = exact_results(args, tensors, bias)
    if is_half:
        rounded = rms(exact[0].to(tensors[0].dtype), exact[0])
        without = exact_results(args, tensors, ZeroBias(bias.num_heads))
    for name in names:
        found[name] = [
            rms(*pair) for pair in zip(results(args, tensors, bias, name), exact, strict=True)
        ]
        line = f"  error {name:10s} " + " ".join(f"{each:.1e}" for each in found[name])
        if is_half:
            unbiased = rms(results(args, tensors, ZeroBias(bias.num_heads), name)[0], without[0])
            limit = 1.5 * rounded + unbiased
            line += f"  rounding {rounded:.1e} without bias {unbiased:.1e} limit {limit:.1e}"
            found[name] = {"errors": found[name], "rounding": rounded, "without bias": unbiased}
        print(line, flush=True)
    return found


def rms(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns the root mean square of a difference."""
    return float((found.double() - expected).square().mean().sqrt())


def chosen_queries(args: argparse.Namespace, length: int) -> torch.Tensor:
    """Returns the queries whose results are compared: all, or 64 of a long sequence."""
    if length <= args.most_exact:
        return torch.arange(length)
    return torch.linspace(0, length - 1, 64).long()


def results(
    args: argparse.Namespace, tensors: Tensors, bias: AttentionBias, name: str
) -> list[torch.Tensor]:
    """Returns output and gradients of q of the chosen queries, and gradients of k and v."""
    q = tensors[0]
    length, chosen = q.size(2), chosen_queries(args, q.size(2))
    prepared = get_backend(name).prepare(
        bias, range(length), range(length), dtype=q.dtype, device=q.device
    )
    leaves = [x.detach().requires_grad_(args.backward) for x in tensors]
    out = attend(*leaves, prepared)
    if not args.backward:
        return [out[:, :, chosen]]
    given = torch.zeros_like(q)
    given[:, :, chosen] = gradient_of(q, chosen)
    out.backward(given)
    dq, dk, dv = (each.grad for each in leaves)
    assert dq is not None and dk is not None and dv is not None
    return [out.detach()[:, :, chosen], dq[:, :, chosen], dk, dv]


def exact_results(
    args: argparse.Namespace, tensors: Tensors, bias: AttentionBias
) -> list[torch.Tensor]:
    """Returns the same by the formula in float64, head by head."""
    chosen = chosen_queries(args, tensors[0].size(2))
    given, by_head = gradient_of(tensors[0], chosen).double(), []
    for head in range(bias.num_heads):
        which = slice(head, head + 1)
        q, k, v = (x[:, which].detach().double().requires_grad_(args.backward) for x in tensors)
        scores, _ = scores64(q[:, :, chosen], k, bias.heads(which), chosen)
        out = torch.softmax(scores, -1) @ v
        made = [out.detach()]
        if args.backward:
            out.backward(given[:, which])
            made += [q.grad[:, :, chosen], k.grad, v.grad]  # type: ignore[index,list-item]
        by_head.append(made)
    return [torch.cat(each, dim=1) for each in zip(*by_head, strict=True)]


def gradient_of(q: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Returns random gradients of the output of the chosen queries, the same in each call."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(q[:, :, chosen].shape, generator=generator).to(q)


def memory(args: argparse.Namespace, tensors: Tensors, bias: AttentionBias) -> dict[str, int]:
    """Returns how many MiB a call adds to the peak of a process of its own, by backend."""
    found = {}
    for name in args.backends:
        if name in DENSE and tensors[0].size(2) > args.most_plain:
            continue
        with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
            found[name] = pool.submit(added_memory, args, tensors, bias, name).result()
        print(f"  {name:10s} {found[name]:6d} MiB", flush=True)
    return found


def added_memory(args: argparse.Namespace, tensors: Tensors, bias: AttentionBias, name: str) -> int:
    """Returns how many MiB a call adds to the peak of this process; a short one comes first."""
    args.most_exact = 0
    results(args, tuple(x[:, :, :256] for x in tensors), bias, name)  # type: ignore[arg-type]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    results(args, tensors, bias, name)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024


if __name__ == "__main__":
    main()
