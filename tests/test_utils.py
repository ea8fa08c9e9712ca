"""Small helpers, and plug-in folders."""

import argparse
import ctypes
import dataclasses
import math
import subprocess
import sys
from collections import OrderedDict
from typing import NamedTuple

import pytest
import torch

from fairseq import utils


def test_perplexity():
    assert utils.get_perplexity(3) == 8.0
    assert utils.get_perplexity(6.916) == 120.76  # 2 ** 6.916 = 120.7602...
    assert utils.get_perplexity(None) == 0.0
    assert utils.get_perplexity(1e6) == math.inf
    assert utils.get_perplexity(0.5, round=None) == 2**0.5
    assert utils.get_perplexity(2, base=10) == 100


def test_samples_are_moved_as_a_whole():
    half = torch.ones(2, dtype=torch.float16)
    sample = {"a": [half, "text"], "b": (torch.zeros(1, dtype=torch.long), None)}
    moved = utils.move_to_cpu(sample)
    assert moved["a"][0].dtype == torch.float32 and moved["a"][1] == "text"
    assert moved["b"][0].dtype == torch.long and isinstance(moved["b"], tuple)


def test_ids_can_be_looked_at_without_the_device():
    ids, reals = torch.tensor([[3, 1]]), torch.ones(2)
    moved = utils.move_to_cuda({"ids": ids, "reals": reals}, device="meta")  # has no values
    assert moved["ids"].device.type == "meta"
    assert utils.on_host(moved["ids"]) is ids
    assert utils.on_host(moved["reals"]) is moved["reals"]
    assert utils.on_host(ids) is ids
    moved["ids"].add_(1)  # what it was copied from is out of date
    assert utils.on_host(moved["ids"]) is moved["ids"]
    assert utils.move_to_cuda(ids, device="cpu") is ids


def test_max_positions_and_pads():
    assert utils.resolve_max_positions(None, 512, 64) == 64
    assert utils.resolve_max_positions(None) is None
    assert utils.strip_pad(torch.tensor([4, 1, 5, 1]), 1).tolist() == [4, 5]


def test_eval_mode_restores():
    model = torch.nn.Dropout()
    with utils.eval_mode(model):
        assert not model.training
    assert model.training


def folder_with(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("LOADED = True\n")
    return argparse.Namespace(user_dir=str(tmp_path / name))


def test_user_dir_is_imported_once(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    args = folder_with(tmp_path, "my_plug_in_once")
    utils.import_user_module(args)
    utils.import_user_module(args)
    assert sys.modules["my_plug_in_once"].LOADED


def test_user_dir_that_is_missing_or_not_unique_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="--user-dir: there is no nowhere"):
        utils.import_user_module(argparse.Namespace(user_dir="nowhere"))
    with pytest.raises(ImportError, match="must be unique"):
        utils.import_user_module(folder_with(tmp_path, "argparse"))


FAULTS = """
import resource, torch
from fairseq import utils
if {keep}:
    assert utils.keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 24)  # 64 MiB, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(min(faults() for _ in range(60)))  # where the first ones lie is up to the C library
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_freed_memory_is_kept_for_the_next_tensor():
    found = [
        int(subprocess.check_output([sys.executable, "-c", FAULTS.format(keep=keep)]))
        for keep in (False, True)
    ]
    assert found[0] > 10 * max(found[1], 1)  # without it every page is given anew


class Pair(NamedTuple):
    """As a batch may hold."""

    first: object
    second: object


@dataclasses.dataclass
class Output(OrderedDict):
    """Built like a `ModelOutput` of transformers, which takes keywords alone."""

    logits: object = None

    def __post_init__(self):
        self["logits"] = self.logits


def test_tensors_of_every_container():
    x, y = torch.ones(2), torch.zeros(1)
    sample = {
        "list": [x, None, "text"],
        "tuple": (x, Pair(y, 3)),
        "size": torch.Size([2, 3]),
        "ordered": OrderedDict(inner=y),
        "output": Output(logits=x),
        "set": {1, 2},
    }
    doubled = utils.apply_to_sample(lambda tensor: tensor + 1, sample)
    assert [tensor.tolist() for tensor in utils.tensors_in(doubled)] == [
        *([2, 2], [2, 2], [1]),
        *([1], [2, 2]),
    ]
    kinds = {key: type(value) for key, value in sample.items()}
    assert {key: type(value) for key, value in doubled.items()} == kinds
    assert doubled["tuple"][1].second == 3 and doubled["output"].logits.tolist() == [2, 2]
    assert doubled["list"][1:] == [None, "text"] and doubled["set"] == {1, 2}
    assert sample["tuple"][1].first is y
