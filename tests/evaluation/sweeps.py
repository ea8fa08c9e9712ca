"""Made-up checkpoints and rows of a sweep."""

from __future__ import annotations

from fairseq.evaluation.extrapolation import CheckpointInfo, Row, Window


def checkpoint(path: str, method: str = "alibi", **changes: object) -> CheckpointInfo:
    """Returns what is known of a checkpoint trained on 64 tokens."""
    known = {
        "path": path, "digest": f"digest of {path}", "position_method": method,
        "train_length": 64, "seed": 1, "updates": 600, "experiment": f"settings of {method}",
        "num_params": 1234, "width": 8, "layers": 2, "position_limit": None,
    }  # fmt: skip
    return CheckpointInfo(**{**known, **changes})


def row(info: CheckpointInfo, length: int, perplexity: float, stride: int | str = "length") -> Row:
    """Returns a row; all but the perplexity is the same in all."""
    return Row(
        checkpoint=info.path,
        position_method=info.position_method,
        train_length=info.train_length,
        eval_length=length,
        stride=stride,
        context_window=Window(length, stride).context,
        subset="valid",
        tokens=5000,
        loss_bits=2.5,
        perplexity=perplexity,
        seconds=2.0,
        tokens_per_s=2500.0,
        peak_memory_mib=300.4,
    )
