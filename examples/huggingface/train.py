#!/usr/bin/env python3
"""Trains a small GPT-2 of transformers on the documentation in this Python's standard library.

Three ways are compared: learned positions at the full length, ALiBi at the full length, and ALiBi
on rows cut to a quarter of it. Each run adds a line to the results; `--table` makes them a table.

    python examples/huggingface/train.py --out /tmp/hf --seeds 1 2 3
    python examples/huggingface/train.py --out /tmp/hf --table
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

ARMS = {
    "learned positions": (False, 1.0),
    "ALiBi": (True, 1.0),
    "ALiBi, scaling 0.25": (True, 0.25),
}
WARMUP_UPDATES = 50


def read_bytes(out: Path) -> dict[str, torch.Tensor]:
    """Returns training and validation text as bytes; writes the text once."""
    folder = out / "text"
    if not (folder / "valid.txt").exists():
        path = Path(__file__).resolve().parents[2] / "scripts" / "demo.py"
        spec = importlib.util.spec_from_file_location("demo", path)
        demo = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(demo)
        demo.write_python_text(folder, 1_000_000)
    texts = {split: (folder / f"{split}.txt").read_bytes() for split in ("train", "valid")}
    return {split: torch.tensor(list(text)) for split, text in texts.items()}


def build(options: argparse.Namespace) -> Any:
    """Returns a GPT-2 with learned positions up to the full length."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=256,
            n_positions=options.length,
            n_embd=options.width,
            n_layer=options.layers,
            n_head=4,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
            use_cache=False,
        )
    )


def peak_mib() -> float:
    """Returns the most memory that this process has held, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def perplexity(model: Any, ids: torch.Tensor, length: int, num_tokens: int) -> float:
    """Returns the perplexity per byte of consecutive rows; the first byte of each is given."""
    rows = ids[: num_tokens // length * length].view(-1, length)
    model.eval()
    with torch.no_grad():
        losses = [float(model(input_ids=r, labels=r).loss) for r in rows.split(4096 // length)]
    return math.exp(statistics.fmean(losses))


def train(arm: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Trains one model and returns what was measured."""
    from fairseq.huggingface import Alibi

    uses_alibi, scaling = ARMS[arm]
    texts = read_bytes(options.out)
    torch.manual_seed(seed)
    model = build(options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.01)
    schedule = Alibi(options.length, scaling)
    if uses_alibi:
        schedule.prepare(model, optimizer)
    warmup = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda n: min((n + 1) / WARMUP_UPDATES, 1 - 0.9 * n / options.updates),
    )
    generator = torch.Generator().manual_seed(seed)
    model.train()
    memory_before = peak_mib()
    started_at = time.process_time()
    for update in range(options.updates):
        starts = torch.randint(
            len(texts["train"]) - options.length, (options.rows,), generator=generator
        )
        ids = torch.stack([texts["train"][s : s + options.length] for s in starts.tolist()])
        batch = schedule({"input_ids": ids, "labels": ids}, update)
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        warmup.step()
        optimizer.zero_grad()
        if update % 100 == 0:
            print(f"{arm}, seed {seed}: update {update}, loss {loss:.3f}", file=sys.stderr)
    found: dict[str, Any] = {
        "arm": arm,
        "seed": seed,
        "train_s": time.process_time() - started_at,
        "peak_mib": peak_mib() - memory_before,
    }
    for length in (options.length, 4 * options.length):
        if uses_alibi or length <= options.length:
            found[f"ppl_{length}"] = perplexity(model, texts["valid"], length, options.valid_tokens)
    return found


def table(results: list[dict[str, Any]], length: int) -> str:
    """Returns the results as a table in Markdown: mean over seeds and largest deviation from it."""
    names = (f"ppl_{length}", f"ppl_{4 * length}", "train_s", "peak_mib")
    lines = [
        f"| | seeds | ppl at {length} | at {4 * length} | processor s of training | MiB for it |",
        "|---|---|---|---|---|---|",
    ]
    for arm in ARMS:
        rows = [result for result in results if result["arm"] == arm]
        if not rows:
            continue
        cells = [_mean([row[name] for row in rows if name in row]) for name in names]
        lines.append(f"| {arm} | {len(rows)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean(values: list[float]) -> str:
    if not values:
        return "cannot be run"
    mean = statistics.fmean(values)
    spread = max(abs(value - mean) for value in values)
    return f"{mean:.3f} +- {spread:.3f}" if mean < 50 else f"{mean:.0f} +- {spread:.0f}"


def main() -> None:
    """Runs what is missing, one process for each run, or prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of text and results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--arm", choices=ARMS, help="run this one only, in this process")
    parser.add_argument("--length", type=int, default=256, help="full length, bytes")
    parser.add_argument("--rows", type=int, default=8, help="rows of the full length in an update")
    parser.add_argument("--updates", type=int, default=380)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--valid-tokens", type=int, default=1 << 15)
    parser.add_argument("--table", action="store_true", help="print a table of the results")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "results.jsonl"
    if options.arm:
        found = train(options.arm, options.seeds[0], options)
        with path.open("a") as file:
            print(json.dumps(found), file=file)
        return
    results = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if options.table:
        print(table(results, options.length))
        return
    done = {(result["arm"], result["seed"]) for result in results}
    for seed in options.seeds:
        for arm in ARMS:
            if (arm, seed) not in done:
                given = [*sys.argv[1:], "--arm", arm, "--seeds", str(seed)]
                subprocess.run([sys.executable, __file__, *given], check=True)


if __name__ == "__main__":
    main()
