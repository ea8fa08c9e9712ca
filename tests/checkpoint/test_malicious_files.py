"""Files that want to run code or to fill the memory are refused, whatever way they take."""

from __future__ import annotations

import io
import pickle
import resource
import struct
import zipfile
from pathlib import Path

import pytest
import torch

from fairseq.checkpoint.reading import read_checkpoint

MARKER = "it_ran"


def as_checkpoint(path: Path, pickled: bytes, compression=zipfile.ZIP_STORED, **records: bytes):
    """Writes what torch takes for a file of its own."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", b"3\n")
        for name, content in records.items():
            archive.writestr(f"archive/data/{name.removeprefix('_')}", content)
    return path


def call(module: bytes, name: bytes, argument: bytes) -> bytes:
    """Returns the pickle of a call with one string, in the oldest protocol."""
    return b"c" + module + b"\n" + name + b"\n(S'" + argument + b"'\ntR."


def stack_call(module: str, name: str, argument: str) -> bytes:
    """The same by STACK_GLOBAL, whose names are strings on the stack."""
    texts = b"".join(b"\x8c" + bytes([len(t)]) + t.encode() for t in (module, name))
    return (
        b"\x80\x04" + texts + b"\x93\x8c" + bytes([len(argument)]) + argument.encode() + b"\x85R."
    )


COMMANDS = {
    "os.system": call(b"os", b"system", b"touch it_ran"),
    "posix.system": call(b"posix", b"system", b"touch it_ran"),
    "eval": call(b"builtins", b"eval", b'open("it_ran","w")'),
    "exec by another name": call(b"__builtin__", b"exec", b'open("it_ran","w")'),
    "subprocess": call(b"subprocess", b"check_output", b"touch it_ran"),
    "getattr": b"cbuiltins\ngetattr\n(cos\nsystem\nS'__call__'\ntR.",
    "a dotted name": stack_call("torch", "os.system", "touch it_ran"),
    "a name in two steps": stack_call("torch.serialization", "os.system", "touch it_ran"),
    "importlib": call(b"importlib", b"import_module", b"it_ran"),
    "pickle in a pickle": call(b"pickle", b"loads", b"cos\\nsystem\\n(S\\'touch it_ran\\'\\ntR."),
    "old instance": b"(S'touch it_ran'\nios\nsystem\n.",
    "object": b"(cos\nsystem\nS'touch it_ran'\no.",
    "new object": b"\x80\x02cos\nsystem\nX\x0c\x00\x00\x00touch it_ran\x85\x81.",
    "state of a namespace": b"cargparse\nNamespace\n)R(S'__class__'\ncos\nsystem\ndb.",
    "an extension code": b"\x80\x02\x82\x01.",
    "a persistent id": b"\x80\x02cos\nsystem\nQ.",
    "torch.load": call(b"torch", b"load", b"it_ran"),
    "webbrowser": call(b"webbrowser", b"open", b"file:it_ran"),
}


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("kind", COMMANDS)
def test_nothing_is_run(kind, checked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = as_checkpoint(tmp_path / "c.pt", COMMANDS[kind])
    with pytest.raises(ValueError, match=r"c\.pt"):
        read_checkpoint(path, check=checked)
    wrapped = b"\x80\x02}X\x05\x00\x00\x00model" + COMMANDS[kind].removesuffix(b".") + b"s."
    with pytest.raises(ValueError, match=r"c\.pt"):
        read_checkpoint(as_checkpoint(path, wrapped), check=checked)
    assert not Path(MARKER).exists()


def memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def tensor_of(storage_size: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    """Returns the pickle of {"model": tensor} over a storage that claims a size."""
    out = io.BytesIO()
    pickler = pickle.Pickler(out, protocol=2)

    class Storage:
        pass

    pickler.persistent_id = lambda obj: (
        ("storage", torch.FloatStorage, "0", "cpu", storage_size)
        if isinstance(obj, Storage)
        else None
    )

    class Tensor:
        def __reduce__(self):
            arguments = (Storage(), 0, shape, stride, False, {})
            return torch._utils._rebuild_tensor_v2, arguments

    pickler.dump({"model": Tensor()})
    return out.getvalue()


HUGE = 1 << 33
BOMBS = {
    "a storage larger than its record": (tensor_of(HUGE, (HUGE,), (1,)), {"_0": bytes(64)}),
    "a tensor beyond its storage": (tensor_of(16, (HUGE,), (1,)), {"_0": bytes(64)}),
    "a string of 8 GiB": (b"\x80\x04\x8d" + struct.pack("<Q", HUGE) + b"x.", {}),
    "bytes of 8 GiB": (b"\x80\x04\x8e" + struct.pack("<Q", HUGE) + b"x.", {}),
    "a number of 2 GiB": (b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"x.", {}),
    "a frame of 8 GiB": (b"\x80\x04\x95" + struct.pack("<Q", HUGE) + b"x.", {}),
    "a huge memo key": (b"\x80\x02}r\xff\xff\xff\xff.", {}),
}


@pytest.mark.parametrize("kind", [name for name in BOMBS if name != "a huge memo key"])
def test_a_small_file_cannot_ask_for_much_memory(kind, tmp_path):
    pickled, records = BOMBS[kind]
    path = as_checkpoint(tmp_path / "c.pt", pickled, **records)
    before = memory()
    with pytest.raises(ValueError, match=r"c\.pt"):
        read_checkpoint(path)
    assert memory() - before < 64 << 20


def test_a_memo_key_is_only_a_key(tmp_path):
    path = as_checkpoint(tmp_path / "c.pt", BOMBS["a huge memo key"][0])
    before = memory()
    assert read_checkpoint(path) == {}
    assert memory() - before < 64 << 20


@pytest.mark.parametrize("checked", [True, False])
def test_compressed_parts_are_refused_unread(checked, tmp_path):
    pickled = tensor_of(1 << 26, (1 << 26,), (1,))
    records = {"_0": bytes(1 << 28)}
    path = as_checkpoint(tmp_path / "c.pt", pickled, zipfile.ZIP_DEFLATED, **records)
    assert path.stat().st_size < 1 << 19
    before = memory()
    with pytest.raises(ValueError, match="or holds compressed parts"):
        read_checkpoint(path, check=checked)
    assert memory() - before < 64 << 20


@pytest.mark.parametrize("kind", ["a name that is no text", "a part that claims to be encrypted"])
def test_damaged_lists_of_parts(kind, tmp_path):
    path = as_checkpoint(tmp_path / "c.pt", b"\x80\x02}.", **{"_\xe9": b"x"})
    content = path.read_bytes()
    if kind == "a name that is no text":
        content = content.replace("\xe9".encode(), b"\xc3\x28")
    else:
        at = content.index(b"PK\x01\x02") + 8  # the flags of the first part in the list
        content = content[:at] + bytes([content[at] | 1]) + content[at + 1 :]
        at = 6  # and before the part itself
        content = content[:at] + bytes([content[at] | 1]) + content[at + 1 :]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"c\.pt is damaged"):
        read_checkpoint(path)
