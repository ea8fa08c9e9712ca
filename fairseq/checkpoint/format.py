"""The layout of a checkpoint file.

A checkpoint is one dictionary of plain Python values and CPU tensors that the original reads as its
own. What the original does not know stands under the one further key `alibi`:

| key under `alibi` | content |
|---|---|
| version | 1 |
| position_method | registered name, such as `alibi` |
| slope_rule, bias_max | how slopes follow from the number of heads, for methods that have them |
| train_length | tokens per sample the model was trained on last |
| dictionary | {size, sha256 of the symbols in order} |
| extensions | section -> field -> value of settings the original does not have |
| parts | name of the folder with the large tensors, in checkpoints in parts |
| anything else | what the trainer adds, such as float32 masters |

Damage is noticed by the checksum that every part of the (zip) file has.
"""

from __future__ import annotations

import argparse
import enum
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from fairseq.dataclass.configs import FairseqConfig
from fairseq.dataclass.legacy import config_to_dict, extension_fields
from fairseq.positions import find_method
from fairseq.positions.alibi_slopes import SLOPE_RULE

__all__ = ["ALIBI_KEY", "FORMAT_VERSION", "dictionary_fingerprint", "pack", "to_plain"]

ALIBI_KEY = "alibi"
FORMAT_VERSION = 1
_HALF = (torch.float16, torch.bfloat16)


def pack(
    *,
    cfg: FairseqConfig,
    model_state: Mapping[str, torch.Tensor],
    criterion_state: Mapping[str, torch.Tensor] | None,
    optimizer_history: list[dict[str, Any]],
    task_state: Mapping[str, Any],
    extra_state: Mapping[str, Any],
    optimizer_state: Mapping[str, Any] | None = None,
    alibi: Mapping[str, Any] | None = None,
    dictionary: Any = None,
) -> dict[str, Any]:
    """Returns the dictionary a checkpoint file holds, keys in the original's order.

    Half precision tensors become float32, everything goes to the CPU; float32 CPU tensors are not
    copied, so write the result before training goes on, or take a `writing.snapshot` of it.

    Args:
        cfg: the configuration of the run.
        model_state: parameter and buffer names -> tensors.
        criterion_state: the criterion's, None if it has no parameters.
        optimizer_history: entries of the runs before this one, then {criterion_name,
            optimizer_name, lr_scheduler_state, num_updates} of this one.
        task_state: the task's, {} for language modelling.
        extra_state: metrics, previous_training_time (s), train_iterator, val_loss, best.
        optimizer_state: torch's {state, param_groups}, with loss_scale in half precision; None
            leaves the key out.
        alibi: more for the key of that name.
        dictionary: the source dictionary; its symbols are recorded as a checksum.
    """
    state: dict[str, Any] = {
        "args": None,
        "cfg": to_plain(config_to_dict(cfg)),
        "model": to_plain(_with_bookkeeping(model_state, cfg)),
        "criterion": to_plain(criterion_state) if criterion_state else None,
        "optimizer_history": to_plain(optimizer_history),
        "task_state": to_plain(task_state or {}),
        "extra_state": to_plain(extra_state),
    }
    if optimizer_state is not None:
        state["last_optimizer_state"] = to_plain(optimizer_state)
    state[ALIBI_KEY] = to_plain({**_alibi_of(cfg, dictionary), **(alibi or {})})
    return state


def _alibi_of(cfg: FairseqConfig, dictionary: Any) -> dict[str, Any]:
    record: dict[str, Any] = {
        "version": FORMAT_VERSION,
        "position_method": getattr(cfg.model, "position_method", None) or "alibi",
        "train_length": train_length_of(cfg),
        "extensions": extension_fields(cfg),
    }
    if "alibi_bias_max" in find_method(record["position_method"]).settings:
        record["slope_rule"] = SLOPE_RULE
        record["bias_max"] = getattr(cfg.model, "alibi_bias_max", 8.0)
    if dictionary is not None:
        record["dictionary"] = dictionary_fingerprint(dictionary)
    return record


def train_length_of(cfg: FairseqConfig) -> int | None:
    """Returns the tokens per sample that a configuration was trained with."""
    for section in (cfg.task, cfg.model):
        length = getattr(section, "tokens_per_sample", None)
        if length is not None:
            return int(length)
    return None


def dictionary_fingerprint(dictionary: Any) -> dict[str, Any]:
    """Returns {size, sha256} of a dictionary; counts do not matter, order does."""
    text = "\n".join(dictionary.symbols)
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return {"size": len(dictionary.symbols), "sha256": digest}


_POSITIONS = "decoder.embed_positions."


def _with_bookkeeping(
    model_state: Mapping[str, torch.Tensor], cfg: FairseqConfig
) -> dict[str, torch.Tensor]:
    """Adds the bookkeeping entry that the original expects of its (unused) sinusoidal table."""
    state = dict(model_state)
    has_table = any(name.startswith(_POSITIONS) for name in state)
    left_out = getattr(cfg.model, "no_token_positional_embeddings", True)
    if not has_table and not left_out and not getattr(cfg.model, "decoder_learned_pos", False):
        state[f"{_POSITIONS}_float_tensor"] = torch.zeros(1)
    return state


def to_plain(value: Any) -> Any:
    """Returns nested values as plain containers, Python numbers and float32 or integer tensors.

    Raises:
        TypeError: something of another kind, which a checkpoint must not hold.
    """
    if isinstance(value, torch.Tensor):
        return _plain_tensor(value)
    if isinstance(value, Mapping):
        return {to_plain(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(to_plain(item) for item in value)
    if isinstance(value, (list, set, frozenset)):
        return [to_plain(item) for item in value]
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, argparse.Namespace):
        return to_plain(vars(value))
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        return value
    raise TypeError(
        f"a checkpoint holds numbers, strings, containers and tensors, not the "
        f"{type(value).__name__} {value!r}"
    )


def _plain_tensor(tensor: torch.Tensor) -> torch.Tensor:
    if hasattr(tensor, "to_local"):  # a DTensor, of which each process writes its part
        return tensor.detach()
    dtype = torch.float32 if tensor.dtype in _HALF else tensor.dtype
    plain = tensor.detach().to(device="cpu", dtype=dtype)
    # A view would take the whole storage it looks into along into the file.
    is_view = plain.untyped_storage().nbytes() > plain.numel() * plain.element_size()
    return plain.clone() if is_view else plain
