"""Files that are no checkpoints, each with one message that names it."""

from __future__ import annotations

import shutil
import struct
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch

from fairseq.checkpoint.reading import read_checkpoint
from fairseq.checkpoint.writing import save_atomically

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "invented"
ORIGINAL = GOLDEN / "ckpt" / "wiki103_tiny" / "checkpoint_last.pt"


def test_a_missing_file(tmp_path):
    path = tmp_path / "nope.pt"
    with pytest.raises(FileNotFoundError, match=r"Model file not found: .*nope\.pt"):
        read_checkpoint(path)


def test_a_folder(tmp_path):
    with pytest.raises(ValueError, match="is a folder"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"<html>not found</html>", "is no torch file"),
        (safetensors.torch.save({"w": torch.ones(2)}), "is a safetensors file.*--from safetensors"),
        (ORIGINAL.read_bytes()[:200_000], "is truncated: it ends after 200,000 bytes"),
    ],
)
def test_files_of_another_kind(tmp_path, content, message):
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path}.*{message}"):
        read_checkpoint(path)


def test_a_zip_file_of_something_else(tmp_path):
    path = tmp_path / "text.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(ValueError, match=r"not one that torch\.save wrote"):
        read_checkpoint(path)


def test_a_truncated_file_of_the_format_before_torch_1_6(tmp_path):
    path = tmp_path / "old.pt"
    torch.save({"model": {"w": torch.zeros(1000)}}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=rf"{path} cannot be read as a checkpoint"):
        read_checkpoint(path)


def test_a_torch_file_without_a_dictionary(tmp_path):
    path = tmp_path / "tensor.pt"
    torch.save([torch.zeros(2)], path)
    with pytest.raises(ValueError, match="holds a list"):
        read_checkpoint(path)


@pytest.mark.parametrize("whose", ["the original's", "ours"])
def test_damage_anywhere_in_a_tensor_is_noticed(tmp_path, whose):
    path = tmp_path / "damaged.pt"
    if whose == "ours":
        save_atomically({"model": {"w": torch.randn(100_000)}}, path)
    else:
        shutil.copy(ORIGINAL, path)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4] = bytes(byte ^ 0x40 for byte in content[middle : middle + 4])
    path.write_bytes(content)
    torch.load(path, weights_only=True)  # torch itself does not notice
    with pytest.raises(ValueError, match=rf"{path} is damaged: the checksum of its part"):
        read_checkpoint(path)


def test_a_file_written_without_checksums_is_read(tmp_path):
    path = tmp_path / "unchecked.pt"
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"model": {"w": torch.arange(3)}}, path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_checkpoint(path)["model"]["w"].tolist() == [0, 1, 2]


def _parts(path):
    """Returns name -> (place of the content, size) of a zip file's parts."""
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
    places = {}
    for record in records:
        name, extra = struct.unpack_from("<HH", content, record.header_offset + 26)
        places[record.filename] = (record.header_offset + 30 + name + extra, record.file_size)
    return places


def _flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def _state():
    generator = torch.Generator().manual_seed(0)
    weights = {f"w{i}": torch.randn(50, generator=generator) for i in range(4)}
    return {"model": weights, "cfg": {"task": {"data": "here"}}}


def test_one_bit_of_any_part_is_noticed(tmp_path):
    """First, middle and last byte of every tensor, of the pickle and of torch's own notes."""
    path, damaged = tmp_path / "whole.pt", tmp_path / "damaged.pt"
    save_atomically(_state(), path)
    parts = _parts(path)
    assert sum("/data/" in name for name in parts) == 4
    for name, (place, size) in parts.items():
        for offset in {0, size // 2, size - 1} if size else ():
            shutil.copy(path, damaged)
            _flip(damaged, place + offset)
            with pytest.raises(ValueError, match=rf"checksum of its part {name} does not fit"):
                read_checkpoint(damaged)


def test_one_bit_of_the_list_of_parts_is_noticed_or_does_no_harm(tmp_path):
    """The list at the end says where each part lies, and holds the checksums."""
    path, damaged = tmp_path / "whole.pt", tmp_path / "damaged.pt"
    save_atomically(_state(), path)
    whole = read_checkpoint(path)
    content = path.read_bytes()
    beginning = content.index(b"PK\x01\x02")
    refused = 0
    for place in range(beginning, len(content), 3):
        shutil.copy(path, damaged)
        _flip(damaged, place)
        try:
            found = read_checkpoint(damaged)
        except ValueError as error:
            refused += str(damaged) in str(error)
            continue
        assert found["cfg"] == whole["cfg"]
        assert all(torch.equal(found["model"][n], w) for n, w in whole["model"].items())
    assert refused > (len(content) - beginning) / 6


def test_the_format_before_torch_1_6_has_no_checksum(tmp_path):
    """It is read, and damage in its tensors is not noticed: nothing in it could tell."""
    path = tmp_path / "old.pt"
    torch.save({"model": {"w": torch.zeros(1000)}}, path, _use_new_zipfile_serialization=False)
    assert read_checkpoint(path)["model"]["w"].tolist() == [0.0] * 1000
    _flip(path, path.stat().st_size - 1000)
    assert read_checkpoint(path)["model"]["w"].count_nonzero() == 1
