"""What a checkpoint holds: the keys of the original, and ours under one key."""

from __future__ import annotations

import argparse
import enum
from pathlib import Path

import numpy as np
import pytest
import torch

from fairseq.checkpoint.format import dictionary_fingerprint, pack, to_plain
from fairseq.checkpoint.reading import read_checkpoint
from fairseq.checkpoint.writing import save_atomically
from fairseq.data.dictionary import Dictionary
from fairseq.dataclass.legacy import config_from_dict

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "invented"
RUNS = ["wiki103_tiny", "gpt_tiny"]


def _repacked(original, **changes):
    return pack(
        **{
            "cfg": config_from_dict(original["cfg"]),
            "model_state": original["model"],
            "criterion_state": original["criterion"],
            "optimizer_history": original["optimizer_history"],
            "task_state": original["task_state"],
            "extra_state": original["extra_state"],
            "optimizer_state": original["last_optimizer_state"],
            **changes,
        }
    )


@pytest.fixture(params=RUNS)
def original(request):
    return read_checkpoint(GOLDEN / "ckpt" / request.param / "checkpoint_last.pt")


def _shape(value):
    """Returns the nested keys of dictionaries, and the kinds of what they hold."""
    if isinstance(value, dict):
        return {key: _shape(item) for key, item in value.items()}
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype
    return type(value).__name__


def test_the_originals_keys_and_kinds_come_out_again(original, tmp_path):
    save_atomically(_repacked(original), tmp_path / "ours.pt")
    ours = torch.load(tmp_path / "ours.pt", weights_only=True)
    assert list(ours) == [*original, "alibi"]
    for key in original:
        if key != "cfg":
            assert _shape(ours[key]) == _shape(original[key]), key
    assert list(ours["model"]) == list(original["model"])
    assert list(ours["cfg"]) == list(original["cfg"])
    for section, fields in original["cfg"].items():
        got = ours["cfg"][section]
        assert type(got) is type(fields), section
        if fields is not None and section != "_name":
            assert got == fields, section


def test_our_own_record(original):
    dictionary = Dictionary.load(str(GOLDEN / "bin" / "main" / "dict.txt"))
    state = _repacked(original, dictionary=dictionary, alibi={"fp32_masters": torch.ones(2)})
    record = state["alibi"]
    assert record["position_method"] == "alibi"
    assert record["train_length"] == 64
    assert record["dictionary"]["size"] == 4192
    assert record["fp32_masters"].tolist() == [1, 1]
    assert record["extensions"]["common"]["cpu_half"] is False


def test_the_unused_table_of_the_original_is_stood_in_for(original):
    model = {k: v for k, v in original["model"].items() if "embed_positions" not in k}
    packed = _repacked(original, model_state=model)["model"]
    assert packed["decoder.embed_positions._float_tensor"].tolist() == [0]


def test_without_optimizer_state_the_key_is_left_out(original):
    assert "last_optimizer_state" not in _repacked(original, optimizer_state=None)


def test_tensors_become_float32_of_their_own_size():
    whole = torch.arange(1000.0)
    plain = to_plain({"half": whole[:3].half(), "brain": whole[:2].bfloat16(), "view": whole[5:7]})
    assert {tensor.dtype for tensor in plain.values()} == {torch.float32}
    assert plain["view"].tolist() == [5, 6]
    assert plain["view"].untyped_storage().nbytes() == 8


def test_tied_float32_tensors_stay_one_in_the_file(tmp_path):
    weight = torch.zeros(1000)
    save_atomically(to_plain({"a": weight, "b": weight}), tmp_path / "tied.pt")
    assert (tmp_path / "tied.pt").stat().st_size < 2 * 4000


def test_other_values_become_plain_python():
    colour = enum.Enum("colour", {"red": "rouge"})
    plain = to_plain(
        {
            "loss": np.float64(1.5),
            "n": np.int64(3),
            "array": np.arange(2),
            "choice": colour.red,
            "args": argparse.Namespace(lr=[1]),
            "set": {4},
            "pair": (1, None),
        }
    )
    assert plain.pop("array").tolist() == [0, 1]
    assert plain == {
        "loss": 1.5,
        "n": 3,
        "choice": "rouge",
        "args": {"lr": [1]},
        "set": [4],
        "pair": (1, None),
    }
    assert type(plain["loss"]) is float


def test_objects_are_refused():
    with pytest.raises(TypeError, match="not the object"):
        to_plain({"task_state": object()})


def test_a_fingerprint_tells_order_and_symbols_but_not_counts():
    def fingerprint(*words):
        dictionary = Dictionary()
        for word in words:
            dictionary.add_symbol(word, n=len(words))
        return dictionary_fingerprint(dictionary)

    assert fingerprint("a", "b")["size"] == 6
    assert fingerprint("a", "b") != fingerprint("b", "a")
    assert fingerprint("a", "b") != fingerprint("a", "c")
    twice = Dictionary()
    for word in "abab":
        twice.add_symbol(word)
    assert dictionary_fingerprint(twice) == fingerprint("a", "b")
