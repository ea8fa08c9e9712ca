"""Datasets of token ids on disk, by their bytes."""

import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from fairseq.data import Dictionary, indexed_dataset
from fairseq.data.indexed_dataset import (
    IndexedCachedDataset,
    IndexedDataset,
    IndexedDatasetBuilder,
    IndexedRawTextDataset,
    MMapIndexedDataset,
    MMapIndexedDatasetBuilder,
    best_fitting_int_dtype,
    dataset_exists,
    infer_dataset_impl,
    make_builder,
    make_dataset,
)

GOLDEN = Path(__file__).parent.parent / "golden/invented/bin/main"

MMAP_IDX = bytes.fromhex(
    "4d4d49444944580000 0100000000000000 08 0200000000000000"
    "03000000 01000000 0000000000000000 0600000000000000"
)
MMAP_BIN = bytes.fromhex("0400 0500 0200 0200")
LEGACY_IDX = b"TNTIDX\0\0" + struct.pack("<13Q", 1, 4, 4, 2, 2, 0, 1, 2, 0, 3, 4, 3, 1)
LEGACY_BIN = bytes.fromhex("05000000 06000000 03000000 03000000")
ITEMS = [[4, 5, 2], [2]]

READERS = {"mmap": MMapIndexedDataset, "lazy": IndexedDataset, "cached": IndexedCachedDataset}


@pytest.fixture
def prefix(tmp_path):
    return tmp_path / "train"


def write(prefix, idx, data):
    for suffix, content in ((".idx", idx), (".bin", data)):
        if content is not None:
            Path(f"{prefix}{suffix}").write_bytes(content)


def build(prefix, impl, items, vocab_size=None):
    builder = make_builder(f"{prefix}.bin", impl, vocab_size)
    for item in items:
        builder.add_item(torch.tensor(item))
    builder.finalize(f"{prefix}.idx")


def files(prefix):
    return tuple(Path(f"{prefix}{suffix}").read_bytes() for suffix in (".idx", ".bin"))


@pytest.mark.parametrize(
    ("impl", "expected"),
    [
        ("mmap", (MMAP_IDX, MMAP_BIN)),
        ("lazy", (LEGACY_IDX, LEGACY_BIN)),
        ("cached", (LEGACY_IDX, LEGACY_BIN)),
    ],
)
def test_bytes(prefix, impl, expected):
    build(prefix, impl, ITEMS, vocab_size=16)
    assert files(prefix) == expected


@pytest.mark.parametrize("impl", READERS)
def test_reading(prefix, impl):
    write(prefix, *((MMAP_IDX, MMAP_BIN) if impl == "mmap" else (LEGACY_IDX, LEGACY_BIN)))
    dataset = make_dataset(prefix, impl, fix_lua_indexing=True)
    assert type(dataset) is READERS[impl]
    assert len(dataset) == 2 and dataset.sizes.tolist() == [3, 1]
    assert [dataset.num_tokens(0), dataset.size(1)] == [3, 1]
    assert dataset.supports_prefetch == (impl == "cached")
    for copy in (dataset, pickle.loads(pickle.dumps(dataset))):
        assert [copy[i].tolist() for i in range(2)] == ITEMS
        assert [copy.read(i).tolist() for i in range(2)] == ITEMS
    assert dataset[0].dtype == torch.int64 and dataset[-1].tolist() == [2]
    with pytest.raises(IndexError):
        dataset[2]
    dataset[0][0] = 9
    assert dataset[0].tolist() == ITEMS[0]


def test_the_older_format_keeps_its_shift_unless_told(prefix):
    write(prefix, LEGACY_IDX, LEGACY_BIN)
    assert make_dataset(prefix, "lazy")[0].tolist() == [5, 6, 3]


def test_prefetched_items_need_no_file(prefix):
    items = [[i] * (i % 4) for i in range(10)]
    build(prefix, "cached", items)
    dataset = make_dataset(prefix, "cached", fix_lua_indexing=True)
    dataset.prefetch(np.array([7, 2, 7, 0, 5]))
    dataset._ids = None
    assert [dataset[i].tolist() for i in (7, 0, 2, 5)] == [items[i] for i in (7, 0, 2, 5)]
    dataset.prefetch([5, 2])
    assert dataset[7].tolist() == items[7]
    dataset = make_dataset(prefix, "cached", fix_lua_indexing=True)
    dataset.prefetch([3])
    dataset.prefetch([9])
    assert [dataset[i].tolist() for i in (9, 3)] == [items[9], items[3]]


DTYPES = ["u1", "i1", "i2", "i4", "i8", "f8", "f8", "u2", "u4", "u8"]


@pytest.mark.parametrize(("code", "dtype"), list(enumerate(DTYPES, start=1)))
def test_every_element_type_is_read(prefix, code, dtype):
    size = np.dtype(dtype).itemsize
    header = struct.pack("<QBQ2i2q", 1, code, 2, 3, 1, 0, 3 * size)
    data = np.array([4, 5, 2, 2], dtype="<" + dtype).tobytes()
    write(prefix, b"MMIDIDX\0\0" + header, data)
    assert [make_dataset(prefix, "mmap")[i].tolist() for i in range(2)] == ITEMS
    header = struct.pack("<13Q", 1, code, size, 2, 2, 0, 1, 2, 0, 3, 4, 3, 1)
    write(prefix, b"TNTIDX\0\0" + header, data)
    assert [make_dataset(prefix, "lazy")[i].tolist() for i in range(2)] == ITEMS


def test_floats_of_lua_have_four_bytes(prefix):
    header = struct.pack("<13Q", 1, 6, 4, 2, 2, 0, 1, 2, 0, 3, 4, 3, 1)
    write(prefix, b"TNTIDX\0\0" + header, np.array([4, 5, 2, 2], dtype="<f4").tobytes())
    assert make_dataset(prefix, "lazy")[0].tolist() == [4, 5, 2]


@pytest.mark.parametrize(
    ("vocab_size", "dtype", "code"),
    [
        (None, np.uint32, 9),
        (16, np.uint16, 8),
        (65499, np.uint16, 8),
        (65500, np.uint32, 9),
        (2**32 - 2, np.uint32, 9),
        (2**32 - 1, np.int64, 5),
    ],
)
def test_element_type_for_a_vocabulary(prefix, vocab_size, dtype, code):
    assert best_fitting_int_dtype(vocab_size) is dtype
    build(prefix, "mmap", ITEMS, vocab_size)
    assert files(prefix)[0][17] == code
    assert [make_dataset(prefix, "mmap")[i].tolist() for i in range(2)] == ITEMS


def test_builders_write_other_element_types(prefix):
    for builder_class, offset, code in (
        (MMapIndexedDatasetBuilder, 17, {np.int64: 5, np.float64: 6, np.uint8: 1}),
        (IndexedDatasetBuilder, 16, {np.int64: 5, np.uint8: 1}),
    ):
        for dtype, expected in code.items():
            builder = builder_class(f"{prefix}.bin", dtype=dtype)
            builder.add_item([4, 5, 2])
            builder.finalize(f"{prefix}.idx")
            assert files(prefix)[0][offset] == expected
    with pytest.raises(ValueError, match="float16 has no code"):
        MMapIndexedDatasetBuilder(f"{prefix}.bin", dtype=np.float16)


def test_ids_that_do_not_fit_are_refused(prefix):
    with (
        make_builder(f"{prefix}.bin", "mmap", 100) as builder,
        pytest.raises(ValueError, match="65536 does not fit into uint16"),
    ):
        builder.add_item([1, 65536])
    with (
        make_builder(f"{prefix}.bin", "lazy") as builder,
        pytest.raises(ValueError, match="does not fit into int32"),
    ):
        builder.add_item(np.array([2**31 - 1]))
    with (
        make_builder(f"{prefix}.bin", "mmap", 100) as builder,
        pytest.raises(ValueError, match="shape"),
    ):
        builder.add_item(torch.zeros(2, 2))


@pytest.mark.parametrize("impl", READERS)
def test_merging(tmp_path, impl):
    items = [[4, 5], [], [6], [7, 8, 9]]
    build(tmp_path / "all", impl, items, 16)
    build(tmp_path / "part", impl, items[2:], 16)
    builder = make_builder(tmp_path / "merged.bin", impl, 16)
    for item in items[:2]:
        builder.add_item(item)
    builder.merge_file_(tmp_path / "part")
    builder.finalize(tmp_path / "merged.idx")
    assert files(tmp_path / "merged") == files(tmp_path / "all")


def test_merging_needs_one_element_type(tmp_path):
    build(tmp_path / "small", "mmap", ITEMS, 16)
    with (
        make_builder(tmp_path / "large.bin", "mmap", 70000) as builder,
        pytest.raises(ValueError, match=r"small has elements of uint16, .*large\.bin of uint32"),
    ):
        builder.merge_file_(tmp_path / "small")


def test_offsets_beyond_two_gigabytes(prefix):
    """20 items of 400 MB, in a file with holes instead of their contents."""
    size = 200_000_000
    builder = make_builder(f"{prefix}.bin", "mmap", 16)
    builder._num_tokens = 20 * size
    builder.end_items(np.full(20, size))
    builder.finalize(f"{prefix}.idx")
    os.truncate(f"{prefix}.bin", 20 * size * 2)
    with open(f"{prefix}.bin", "r+b") as file:
        file.seek((7 * size + 3) * 2)
        file.write(b"\x09\x00")
    index = Path(f"{prefix}.idx").read_bytes()
    offsets = np.frombuffer(index[26 + 4 * 20 :], dtype="<i8")
    assert offsets.tolist() == [400_000_000 * i for i in range(20)]
    dataset = make_dataset(prefix, "mmap")
    assert dataset.read(7)[3] == 9 and dataset.read(7)[:3].tolist() == [0, 0, 0]


def test_an_item_is_not_longer_than_its_size_can_say(prefix):
    with (
        make_builder(f"{prefix}.bin", "mmap", 16) as builder,
        pytest.raises(ValueError, match="an item has 2147483648 ids"),
    ):
        builder.end_items(np.array([2**31]))


@pytest.mark.parametrize("impl", READERS)
@pytest.mark.parametrize("items", [[], [[], []]])
def test_a_bin_file_without_bytes(prefix, impl, items):
    build(prefix, impl, items)
    dataset = make_dataset(prefix, impl)
    assert len(dataset) == len(items) and [dataset[i].tolist() for i in range(len(items))] == items


def changed(content, position, value):
    return content[:position] + bytes([value]) + content[position + 1 :]


@pytest.mark.parametrize(
    ("idx", "data", "message"),
    [
        (b"", MMAP_BIN, r"train\.idx: index does not match the mmap format: it starts with b''"),
        (b"PK\3\4" * 9, MMAP_BIN, r"starts with b'PK.*instead of b'MMIDIDX.*--dataset-impl"),
        (LEGACY_IDX, LEGACY_BIN, r"starts with b'TNTIDX"),
        (MMAP_IDX[:15], MMAP_BIN, r"train\.idx: 15 bytes, but its mmap header asks for 17"),
        (MMAP_IDX[:-1], MMAP_BIN, r"train\.idx: 49 bytes, but its mmap header asks for 50"),
        (MMAP_IDX + b"\0" * 8, MMAP_BIN, r"train\.idx: 58 bytes, .* describes 50"),
        (changed(MMAP_IDX, 9, 2), MMAP_BIN, r"train\.idx: version 2"),
        (changed(MMAP_IDX, 17, 11), MMAP_BIN, r"train\.idx: element type code 11, .* 1 to 10"),
        (changed(MMAP_IDX, 17, 0), MMAP_BIN, r"train\.idx: element type code 0"),
        (changed(MMAP_IDX, 25, 255), MMAP_BIN, r"train\.idx: 50 bytes"),
        (changed(MMAP_IDX, 42, 4), MMAP_BIN, r"item 1 has size 1 and byte offset 4, but 6"),
        (changed(MMAP_IDX, 29, 255), MMAP_BIN, r"train\.idx: item 0 has size -"),
        (MMAP_IDX, MMAP_BIN[:-1], r"train\.bin: 7 bytes, but .*train\.idx describes 8"),
        (MMAP_IDX, MMAP_BIN + b"\0\0", r"train\.bin: 10 bytes, but .*train\.idx describes 8"),
        (MMAP_IDX, b"", r"train\.bin: 0 bytes, but .*train\.idx describes 8"),
    ],
)
def test_damaged_mmap_files_are_named(prefix, idx, data, message):
    write(prefix, idx, data)
    with pytest.raises(ValueError, match=message):
        make_dataset(prefix, "mmap")


@pytest.mark.parametrize("impl", ["lazy", "cached"])
@pytest.mark.parametrize(
    ("idx", "data", "message"),
    [
        (MMAP_IDX, MMAP_BIN, r"train\.idx: index does not match the lazy/cached format"),
        (LEGACY_IDX[:-1], LEGACY_BIN, r"train\.idx: 111 bytes, .* asks for 112"),
        (LEGACY_IDX + b"\0", LEGACY_BIN, r"train\.idx: 113 bytes, .* describes 112"),
        (changed(LEGACY_IDX, 8, 2), LEGACY_BIN, r"train\.idx: version 2"),
        (changed(LEGACY_IDX, 16, 99), LEGACY_BIN, r"train\.idx: element type code 99"),
        (changed(LEGACY_IDX, 24, 8), LEGACY_BIN, r"elements of 8 bytes, but int32 has 4"),
        (changed(LEGACY_IDX, 39, 255), LEGACY_BIN, r"train\.idx: 112 bytes"),
        (changed(LEGACY_IDX, 56, 2), LEGACY_BIN, r"train\.idx: items are not vectors"),
        (changed(LEGACY_IDX, 80, 2), LEGACY_BIN, r"contradict each other"),
        (LEGACY_IDX, LEGACY_BIN[:-4], r"train\.bin: 12 bytes, but .*train\.idx describes 16"),
    ],
)
def test_damaged_older_files_are_named(prefix, impl, idx, data, message):
    write(prefix, idx, data)
    with pytest.raises(ValueError, match=message):
        make_dataset(prefix, impl)


@pytest.mark.parametrize(
    ("idx", "data", "missing"), [(MMAP_IDX, None, ".bin"), (None, MMAP_BIN, ".idx")]
)
def test_one_file_without_the_other(prefix, idx, data, missing):
    write(prefix, idx, data)
    for find in (infer_dataset_impl, lambda path: make_dataset(path, "mmap")):
        with pytest.raises(FileNotFoundError, match=rf"train\{missing} is missing"):
            find(prefix)
    assert not dataset_exists(prefix, "mmap")


def test_formats_are_told_by_the_files(prefix):
    assert infer_dataset_impl(prefix) is None
    assert make_dataset(prefix, "mmap") is None and make_dataset(prefix, "raw") is None
    write(prefix, MMAP_IDX, MMAP_BIN)
    assert infer_dataset_impl(prefix) == "mmap" and dataset_exists(prefix, "mmap")
    write(prefix, LEGACY_IDX, LEGACY_BIN)
    assert infer_dataset_impl(prefix) == "cached"
    prefix.mkdir()
    assert infer_dataset_impl(prefix) == "cached" and not dataset_exists(prefix, "raw")
    prefix.rmdir()
    prefix.write_text("a\n")
    assert infer_dataset_impl(prefix) == "raw" and dataset_exists(prefix, "raw")
    Path(f"{prefix}1.idx").touch()
    Path(f"{prefix}1.bin").touch()
    with pytest.raises(ValueError, match=r"train1\.idx: is no index: it starts with b''"):
        infer_dataset_impl(f"{prefix}1")


def test_unknown_formats_are_refused(prefix):
    assert indexed_dataset.get_available_dataset_impl() == ["raw", "lazy", "cached", "mmap"]
    for use in (make_dataset, make_builder, dataset_exists):
        with pytest.raises(ValueError, match="--dataset-impl fasta is not supported"):
            use(prefix, "fasta")
    with pytest.raises(ValueError, match="plain text"):
        make_builder(prefix, "raw")


def test_raw_text(prefix):
    dictionary = Dictionary()
    for word in ("a", "b"):
        dictionary.add_symbol(word)
    prefix.write_bytes(b"a b\r\n\nc  a\r b")
    dataset = make_dataset(prefix, "raw", dictionary=dictionary)
    assert [dataset[i].tolist() for i in range(4)] == [[4, 5, 2], [2], [3, 4, 2], [5, 2]]
    assert dataset[0].dtype == torch.int64
    assert dataset.sizes.tolist() == [3, 1, 3, 2] and len(dataset) == 4
    assert [dataset.get_original_text(i) for i in range(4)] == ["a b", "", "c  a", " b"]
    other = IndexedRawTextDataset(prefix, dictionary, append_eos=False, reverse_order=True)
    assert [other[i].tolist() for i in range(4)] == [[5, 4], [], [4, 3], [5]]
    with pytest.raises(ValueError, match="needs a dictionary"):
        make_dataset(prefix, "raw")
    prefix.write_bytes(b"")
    with pytest.raises(ValueError, match="train is empty"):
        make_dataset(prefix, "raw", dictionary=dictionary)


def test_the_originals_files_are_read():
    dataset = make_dataset(GOLDEN / "valid", infer_dataset_impl(GOLDEN / "valid"))
    dictionary = Dictionary.load(GOLDEN / "dict.txt")
    lines = (GOLDEN.parents[1] / "text/valid.txt").read_text(encoding="utf-8").splitlines()
    assert len(dataset) == len(lines) == 257 and int(dataset.sizes.sum()) == 5601
    for index, line in enumerate(lines):
        known = [word if word in dictionary else "<unk>" for word in line.split()]
        assert dictionary.string(dataset[index]) == " ".join(known)
