"""Reading without running: what is refused, and what old files may hold."""

from __future__ import annotations

import argparse
import collections
import enum
import os
import pathlib
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from fairseq.checkpoint.safe_pickle import UnsafeCheckpointError, load_pickled

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "invented"


class _Calls:
    """Pickles as a call of any function."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def _saved(tmp_path, obj, **options) -> Path:
    path = tmp_path / "file.pt"
    torch.save(obj, path, **options)
    return path


@pytest.mark.parametrize(
    "options",
    [{}, {"_use_new_zipfile_serialization": False}, {"pickle_protocol": 4}],
    ids=["zip", "before torch 1.6", "protocol 4"],
)
@pytest.mark.parametrize(
    ("function", "name"),
    [(os.mkdir, "mkdir"), (eval, "eval"), (pickle.loads, "loads"), (torch.load, "load")],
)
def test_a_file_that_wants_to_run_code_is_refused_by_name(tmp_path, options, function, name):
    marker = tmp_path / "it_ran"
    argument = str(marker) if function is os.mkdir else f"open({str(marker)!r}, 'w')"
    path = _saved(tmp_path, {"model": {}, "x": _Calls(function, argument)}, **options)
    with pytest.raises(UnsafeCheckpointError, match=rf"\.{name}\b") as caught:
        load_pickled(path)
    assert str(path) in str(caught.value)
    assert not marker.exists()


def test_a_file_that_hides_a_call_behind_an_allowed_name_is_refused(tmp_path):
    class Evil(argparse.Namespace):
        def __reduce__(self):
            return getattr, (argparse.Namespace, "__init__")

    path = _saved(tmp_path, {"args": Evil()})
    with pytest.raises(UnsafeCheckpointError, match=r"builtins\.getattr"):
        load_pickled(path)


@pytest.mark.parametrize("new_format", [True, False])
def test_what_old_checkpoints_hold_comes_back_as_plain_data(tmp_path, new_format):
    weights = torch.arange(6.0).reshape(2, 3)
    path = _saved(
        tmp_path,
        {
            "args": argparse.Namespace(arch="transformer_lm", lr=[0.5], data=pathlib.Path("a/b")),
            "model": collections.OrderedDict(w=weights, tied=weights),
            "best": np.float64(1.25),
            "count": np.int64(7),
            "flag": np.bool_(True),
            "array": np.array([[1, 2], [3, 4]], dtype=np.int32),
            "columns": np.asfortranarray(np.array([[1.5, 2.5], [3.5, 4.5]])),
            "size": torch.Size([2, 3]),
            "raw": b"\xff\x00",
        },
        _use_new_zipfile_serialization=new_format,
    )
    state = load_pickled(path)
    assert vars(state["args"]) == {"arch": "transformer_lm", "lr": [0.5], "data": "a/b"}
    assert torch.equal(state["model"]["w"], weights)
    assert state["model"]["w"].data_ptr() == state["model"]["tied"].data_ptr()
    assert (state["best"], state["count"], state["flag"]) == (1.25, 7, True)
    assert type(state["best"]) is float
    assert state["array"].tolist() == [[1, 2], [3, 4]]
    assert state["columns"].tolist() == [[1.5, 2.5], [3.5, 4.5]]
    assert state["size"] == torch.Size([2, 3])
    assert state["raw"] == b"\xff\x00"


def _module(monkeypatch, name, *classes):
    module = types.ModuleType(name)
    for cls in classes:
        cls.__module__, cls.__qualname__ = name, cls.__name__
        setattr(module, cls.__name__, cls)
    parent, _, child = name.rpartition(".")
    if parent and parent not in sys.modules:
        _module(monkeypatch, parent)
    monkeypatch.setitem(sys.modules, name, module)
    if parent:
        monkeypatch.setattr(sys.modules[parent], child, module, raising=False)


def test_choices_of_fairseq_become_strings(tmp_path, monkeypatch):
    Choices = enum.Enum("Choices", {"c10d": "c10d", "no_c10d": "no_c10d"})
    _module(monkeypatch, "fairseq.dataclass.constants", Choices)
    path = _saved(tmp_path, {"cfg": {"ddp_backend": Choices("no_c10d")}})
    assert load_pickled(path) == {"cfg": {"ddp_backend": "no_c10d"}}


def test_meters_that_were_stored_as_objects_become_dictionaries(tmp_path, monkeypatch):
    class AverageMeter:
        def __init__(self):
            self.sum, self.count = 12.0, 3

    _module(monkeypatch, "fairseq.meters", AverageMeter)
    path = _saved(tmp_path, {"extra_state": {"train_meters": {"loss": AverageMeter()}}})
    meters = load_pickled(path)["extra_state"]["train_meters"]
    assert meters == {"loss": {"sum": 12.0, "count": 3}}


def test_a_configuration_of_omegaconf_becomes_a_dictionary(tmp_path, monkeypatch):
    class AnyNode:
        def __init__(self, value):
            self.__dict__.update(_val=value, _metadata=ContainerMetadata())

    class ContainerMetadata:
        def __init__(self):
            self.ref_type, self.object_type = object, CommonConfig

    class DictConfig:
        def __init__(self, **content):
            self.__dict__.update(_content=content, _parent=self, _metadata=ContainerMetadata())

    class ListConfig(DictConfig):
        def __init__(self, *content):
            self.__dict__.update(_content=list(content), _parent=None)

    class CommonConfig:
        pass

    _module(monkeypatch, "omegaconf.dictconfig", DictConfig)
    _module(monkeypatch, "omegaconf.listconfig", ListConfig)
    _module(monkeypatch, "omegaconf.nodes", AnyNode)
    _module(monkeypatch, "omegaconf.base", ContainerMetadata)
    _module(monkeypatch, "fairseq.tasks.old_task", CommonConfig)
    cfg = DictConfig(common=DictConfig(seed=AnyNode(3)), lr=ListConfig(AnyNode(0.5)))
    path = _saved(tmp_path, {"cfg": cfg})
    assert load_pickled(path) == {"cfg": {"common": {"seed": 3}, "lr": [0.5]}}


@pytest.mark.parametrize("memory_map", [False, True])
def test_a_checkpoint_of_the_original_reads_as_torch_reads_it(memory_map):
    path = GOLDEN / "ckpt" / "gpt_tiny" / "checkpoint_last.pt"
    expected = torch.load(path, weights_only=True)
    state = load_pickled(path, memory_map=memory_map)
    assert list(state) == list(expected)
    assert state["cfg"] == expected["cfg"]
    assert list(state["model"]) == list(expected["model"])
    for name, tensor in expected["model"].items():
        assert torch.equal(state["model"][name].nan_to_num(), tensor.nan_to_num())
    group = expected["last_optimizer_state"]["param_groups"][0]
    assert state["last_optimizer_state"]["param_groups"][0] == group


def test_the_list_of_allowed_names_is_not_left_behind(tmp_path):
    load_pickled(_saved(tmp_path, {"args": argparse.Namespace(a=1)}))
    assert argparse.Namespace not in torch.serialization.get_safe_globals()
