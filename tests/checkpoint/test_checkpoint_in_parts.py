"""Checkpoints whose tensors lie in a folder beside them: what is kept, refused and cleaned up."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
from pathlib import Path

import pytest
import torch

from fairseq.checkpoint.index import (
    is_index,
    join,
    remove_unused,
    split,
    write_in_parts,
)
from fairseq.checkpoint.reading import read_checkpoint, read_index
from fairseq.checkpoint.sharded import read_tensors, stored_tensors, write_tensors
from fairseq.model_parallel.sharded_checkpoint import (
    load_sharded,
    save_sharded,
    whole_from_sharded,
)

SCRIPT = Path(__file__).parents[2] / "scripts" / "whole_checkpoint.py"


def content() -> dict:
    numbers = torch.arange(2400, dtype=torch.float32)
    tied = numbers.view(60, 40)
    return {
        "args": None,
        "model": {"a.weight": tied, "b.weight": tied, "bias": torch.ones(3)},
        "last_optimizer_state": {
            "state": {0: {"step": 4, "exp_avg": numbers.double().view(40, 60) / 7}},
            "param_groups": [{"lr": 0.5, "betas": (0.9, 0.98)}],
        },
        "extra_state": {"train_iterator": {"epoch": 2}},
        "alibi": {"version": 1},
    }


def saved(folder: Path, name: str = "checkpoint_last.pt") -> Path:
    write_in_parts(content(), folder / name, stem="checkpoint_1_4")
    return folder / name


def assert_same(found, wanted, keys=()):
    if isinstance(wanted, dict):
        assert list(found) == list(wanted), keys
        for key, value in wanted.items():
            assert_same(found[key], value, (*keys, key))
    elif isinstance(wanted, torch.Tensor):
        assert found.dtype == wanted.dtype
        assert torch.equal(found, wanted), keys
    else:
        assert found == wanted, keys


def test_what_is_written_is_read(tmp_path):
    path = saved(tmp_path)
    state = read_checkpoint(path)
    assert_same(state, content())
    assert state["model"]["a.weight"] is state["model"]["b.weight"]
    assert path.stat().st_size < 6000 < 4 * 2400
    stored = stored_tensors(tmp_path / "checkpoint_1_4.parts")
    assert {name: tuple(each.size) for name, each in stored.items()} == {
        "model.a.weight": (60, 40),
        "last_optimizer_state.state.0.exp_avg": (40, 60),
    }
    assert is_index(read_index(path))
    assert not is_index(state)


def test_torch_reads_the_folder_by_its_own_list(tmp_path):
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    saved(tmp_path)
    dcp_to_torch_save(tmp_path / "checkpoint_1_4.parts", tmp_path / "torch.pt")
    found = torch.load(tmp_path / "torch.pt", weights_only=True)
    assert torch.equal(found["model.a.weight"], content()["model"]["a.weight"])


def test_sizes_alone_need_no_memory(tmp_path):
    state = read_checkpoint(saved(tmp_path), place=lambda keys, like: like)
    weight = state["model"]["a.weight"]
    assert (weight.device.type, tuple(weight.shape)) == ("meta", (60, 40))


def test_the_script_makes_one_file(tmp_path):
    spec = importlib.util.spec_from_file_location("whole_checkpoint", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.main([str(saved(tmp_path)), str(tmp_path / "whole.pt")])
    assert_same(torch.load(tmp_path / "whole.pt", weights_only=True), content())


def test_folders_that_no_checkpoint_names_go(tmp_path):
    first, second = saved(tmp_path, "checkpoint1.pt"), saved(tmp_path, "checkpoint2.pt")
    (tmp_path / "checkpoint_9_9.parts.tmp").mkdir()
    (tmp_path / "notes").mkdir()
    remove_unused(tmp_path)
    folders = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert folders == {"checkpoint_1_4.parts", "checkpoint_1_4.2.parts", "notes"}
    first.unlink()
    remove_unused(tmp_path)
    folders = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert folders == {"checkpoint_1_4.2.parts", "notes"}
    assert_same(read_checkpoint(second), content())


def test_nothing_goes_while_a_checkpoint_cannot_be_read(tmp_path, caplog):
    saved(tmp_path).write_bytes(b"no torch file")
    remove_unused(tmp_path)
    assert (tmp_path / "checkpoint_1_4.parts").is_dir()
    assert "checkpoint_last.pt cannot be read" in caplog.text


# ---- what is refused ----


class Malicious:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_the_pickled_list_of_parts_is_never_read(tmp_path):
    path = saved(tmp_path)
    (metadata,) = tmp_path.glob("*.parts/.metadata")
    metadata.write_bytes(pickle.dumps(Malicious(tmp_path / "run")))
    assert_same(read_checkpoint(path), content())
    assert not (tmp_path / "run").exists()


def test_code_in_the_place_of_a_tensor_is_refused(tmp_path):
    """The list of parts is made to fit, so that nothing but the restricted reader is in the way."""
    path = saved(tmp_path)
    torch.save(Malicious(tmp_path / "run"), tmp_path / "bad.pt")
    (parts,) = tmp_path.glob("*.parts")
    (parts / "__0_0.distcp").write_bytes((tmp_path / "bad.pt").read_bytes().ljust(30000, b"\0"))
    size = (tmp_path / "bad.pt").stat().st_size
    change_list(parts, lambda part: part.update(start=0, length=size), sizes=False)
    with pytest.raises(ValueError, match="parts"):
        read_checkpoint(path)
    assert not (tmp_path / "run").exists()


def change_list(parts, change, sizes=True):
    """Changes every part in the list and makes its checksum fit."""
    from fairseq.checkpoint.sharded import _checksum

    listed = json.loads((parts / "parts.json").read_text())["tensors"]
    for tensor in listed.values():
        if not sizes:
            tensor["size"] = [1]
        for part in tensor["parts"]:
            if not sizes:
                part["sizes"], part["offsets"] = [1], [0]
            change(part)
    text = json.dumps({"checksum": _checksum(listed), "tensors": listed})
    (parts / "parts.json").write_text(text)


def test_the_restricted_reader_refuses_code_in_a_tensor_of_the_right_size(tmp_path):
    torch.save(Malicious(tmp_path / "run"), tmp_path / "bad.pt")
    write_tensors(tmp_path / "x", {"a": torch.zeros(1)})
    data = (tmp_path / "bad.pt").read_bytes()
    (tmp_path / "x" / "__0_0.distcp").write_bytes(data)
    change_list(tmp_path / "x", lambda part: part.update(start=0, length=len(data)))
    with pytest.raises(ValueError, match=r"(?s)cannot be read.*mkdir"):
        read_tensors(tmp_path / "x", {"a": torch.zeros(1)})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"file": "../secret"}, "no file of parts"),
        ({"file": "/etc/passwd"}, "no file of parts"),
        ({"start": 10**9}, "truncated"),
        ({"sizes": [10**7, 10**7]}, "claims more numbers"),
        ({"sizes": [1, 1]}, "not the whole"),
        ({"start": -5}, "claims more numbers"),
        ({"length": "x"}, "damaged"),
    ],
)
def test_lists_that_claim_what_is_not_there(tmp_path, change, message):
    path = saved(tmp_path)
    change_list(tmp_path / "checkpoint_1_4.parts", lambda part: part.update(change))
    with pytest.raises(ValueError, match=message):
        read_checkpoint(path)


def test_every_damaged_byte_is_noticed(tmp_path):
    """A changed byte of any file leads to the same tensors or to a message."""
    path = saved(tmp_path)
    refused = 0
    for file in sorted(tmp_path.glob("*.parts/*")):
        good = file.read_bytes()
        for place in range(0, len(good), max(1, len(good) // 60)):
            file.write_bytes(good[:place] + bytes([good[place] ^ 0x11]) + good[place + 1 :])
            try:
                assert_same(read_checkpoint(path), content())
            except ValueError:
                refused += 1
        if file.name != ".metadata":
            file.write_bytes(good[: len(good) // 2])
            with pytest.raises(ValueError, match="parts"):
                read_checkpoint(path)
        file.write_bytes(good)
    assert_same(read_checkpoint(path), content())
    assert refused > 80


def test_a_folder_that_is_not_there_or_anothers(tmp_path):
    path = saved(tmp_path)
    (tmp_path / "checkpoint_1_4.parts").rename(tmp_path / "elsewhere.parts")
    with pytest.raises(FileNotFoundError, match="keep the two together"):
        read_checkpoint(path)
    write_tensors(tmp_path / "checkpoint_1_4.parts", {"model.a.weight": torch.zeros(40, 60)})
    with pytest.raises(ValueError, match=r"does not have the model\.a\.weight"):
        read_checkpoint(path)
    index, _ = split(content(), "../checkpoint_1_4.parts")
    with pytest.raises(ValueError, match="is none of parts"):
        join(index, path)


# ---- models of one's own ----


def trained_model():
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, betas=(0.8, 0.9))
    model(torch.ones(1, 5)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def test_model_and_optimizer_without_a_run(tmp_path):
    model, optimizer = trained_model()
    save_sharded(tmp_path / "saved", model, optimizer)
    other = torch.nn.Linear(5, 4)
    state = torch.optim.Adam(other.parameters())
    load_sharded(tmp_path / "saved", other, state)
    assert torch.equal(other.weight, model.weight)
    assert state.param_groups[0]["betas"] == (0.8, 0.9)
    moment = state.state[other.weight]["exp_avg_sq"]
    assert torch.equal(moment, optimizer.state[model.weight]["exp_avg_sq"])
    whole_from_sharded(tmp_path / "saved", tmp_path / "whole.pt")
    whole = torch.load(tmp_path / "whole.pt", weights_only=True)["model"]
    assert torch.equal(whole["weight"], model.weight)
    save_sharded(tmp_path / "model", model)
    with pytest.raises(ValueError, match="holds no optimizer"):
        load_sharded(tmp_path / "model", other, state)
    with pytest.raises(ValueError, match=r"model.weight is \(4, 5\), not \(4, 6\)"):
        load_sharded(tmp_path / "model", torch.nn.Linear(6, 4))
    with pytest.raises(ValueError, match=r"has no tensor model\.bias"):
        save_sharded(tmp_path / "bare", torch.nn.Linear(5, 4, bias=False))
        load_sharded(tmp_path / "bare", other)
