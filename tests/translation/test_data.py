"""Pairs of lines: order, batches, files and their names."""

from __future__ import annotations

import argparse
import logging

import numpy as np
import pytest
import torch
from tiny_translation import Words, run_command, write_pairs

from fairseq import utils
from fairseq.data.data_utils import numpy_seed
from fairseq.data.language_pair_dataset import LanguagePairDataset
from fairseq.data.language_pairs import infer_language_pair, load_language_pair
from fairseq.tasks.translation import TranslationConfig, TranslationTask
from fairseq_cli import preprocess

LENGTHS = [(3, 2), (5, 6), (3, 4), (2, 2), (3, 2)]


class Lines(list):
    """Vectors of ids that end in </s>."""

    def __init__(self, lengths):
        rows = [[*range(10 + 10 * n, 9 + 10 * n + size), 2] for n, size in enumerate(lengths)]
        super().__init__(torch.tensor(row) for row in rows)
        self.sizes = np.array(lengths)


def pairs(**options):
    source, target = (Lines(side) for side in zip(*LENGTHS, strict=True))
    words = Words(100)
    return LanguagePairDataset(source, source.sizes, words, target, target.sizes, words, **options)


def test_sizes():
    dataset = pairs()
    assert dataset.size(1) == (5, 6) and dataset.num_tokens(1) == 6
    assert dataset.num_tokens_vec(np.array([0, 2])).tolist() == [3, 4]
    assert dataset.sizes.tolist() == [list(each) for each in LENGTHS]


def test_order_is_by_source_then_target_then_chance():
    assert pairs(shuffle=False).ordered_indices().tolist() == [3, 0, 4, 2, 1]
    with numpy_seed(1):
        first = list(np.random.permutation(5))
    with numpy_seed(1):
        found = pairs().ordered_indices().tolist()
    assert found == sorted(range(5), key=lambda i: (LENGTHS[i], first.index(i)))


@pytest.mark.parametrize(
    ("limits", "kept"),
    [((3, 3), [0, 3, 4]), ((None, 2), [0, 3, 4]), ((3, None), [0, 2, 3, 4]), (4, [0, 2, 3, 4])],
)
def test_pairs_that_are_too_long_are_left_out(limits, kept):
    found, left_out = pairs().filter_indices_by_size(np.arange(5), limits)
    assert found.tolist() == kept
    assert sorted([*found, *left_out]) == [0, 1, 2, 3, 4]


def test_a_batch():
    dataset = pairs()
    batch = dataset.collater([dataset[0], dataset[1]])
    assert batch["id"].tolist() == [1, 0]  # the longest source first
    assert batch["nsentences"] == 2 and batch["ntokens"] == 8
    net_input = batch["net_input"]
    assert net_input["src_tokens"].tolist() == [[20, 21, 22, 23, 2], [1, 1, 10, 11, 2]]
    assert net_input["src_lengths"].tolist() == [5, 3]
    assert batch["target"].tolist() == [[20, 21, 22, 23, 24, 2], [10, 2, 1, 1, 1, 1]]
    expected = [[2, 20, 21, 22, 23, 24], [2, 10, 1, 1, 1, 1]]
    assert net_input["prev_output_tokens"].tolist() == expected


def test_padding_goes_to_the_other_side_if_asked():
    dataset = pairs(left_pad_source=False, left_pad_target=True)
    batch = dataset.collater([dataset[0], dataset[1]])
    assert batch["net_input"]["src_tokens"][1].tolist() == [10, 11, 2, 1, 1]
    assert batch["target"][1].tolist() == [1, 1, 1, 1, 10, 2]
    assert batch["net_input"]["prev_output_tokens"][1].tolist() == [1, 1, 1, 1, 2, 10]


def test_sources_alone():
    source = Lines([3, 2])
    dataset = LanguagePairDataset(source, source.sizes, Words(100))
    batch = dataset.collater([dataset[0], dataset[1]])
    assert batch["target"] is None and "prev_output_tokens" not in batch["net_input"]
    assert batch["ntokens"] == 5 and dataset.size(0) == (3, 0)
    assert dataset.collater([]) == {}


def test_sides_must_fit():
    with pytest.raises(ValueError, match="2 sources and 1 targets"):
        words = Words(9)
        LanguagePairDataset(Lines([2, 2]), [2, 2], words, Lines([2]), [2], words)
    other = argparse.Namespace(pad=lambda: 0, eos=lambda: 2, unk=lambda: 3)
    with pytest.raises(ValueError, match="give pad the ids 1 and 0"):
        LanguagePairDataset(Lines([2]), [2], Words(9), Lines([2]), [2], other)


def test_limits_of_pairs_and_numbers_together():
    assert utils.resolve_max_positions((5, None), (7, 3), 4) == (4, 3)
    assert utils.resolve_max_positions((None, None), None) == (None, None)


# ---- files ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Binarized data: train and train1, valid, and a test split."""
    base = tmp_path_factory.mktemp("pairs")
    counts = {"train": 30, "valid": 8, "test": 6}
    write_pairs(base, counts, dict.fromkeys(counts, (1, 6)))
    with pytest.MonkeyPatch.context() as patch:
        code = run_command(
            patch,
            preprocess,
            f"-s src -t tgt --trainpref {base}/train --validpref {base}/valid",
            f"--testpref {base}/test --destdir {base}/bin --padding-factor 1",
        )
    assert code == 0
    for side in ("src", "tgt"):
        for suffix in ("bin", "idx"):
            data = (base / f"bin/valid.src-tgt.{side}.{suffix}").read_bytes()
            (base / f"bin/train1.src-tgt.{side}.{suffix}").write_bytes(data)
    return base / "bin"


def make_task(folder, **given):
    return TranslationTask.setup_task(TranslationConfig(data=str(folder), **given))


def test_what_was_binarized_is_read_back(folder):
    task = make_task(folder)
    assert (task.args.source_lang, task.args.target_lang) == ("src", "tgt")
    task.load_dataset("test")
    dataset = task.dataset("test")
    lines = {
        side: (folder.parent / f"test.{side}").read_text().splitlines() for side in ("src", "tgt")
    }
    for n in range(6):
        assert task.source_dictionary.string(dataset[n]["source"]) == lines["src"][n]
        assert task.target_dictionary.string(dataset[n]["target"]) == lines["tgt"][n]
        assert int(dataset[n]["source"][-1]) == 2
    assert not dataset.shuffle and task.max_positions() == (1024, 1024)


def test_languages_the_other_way_round(folder):
    task = make_task(folder, source_lang="tgt", target_lang="src")
    task.load_dataset("test")
    first = (folder.parent / "test.tgt").read_text().splitlines()[0]
    assert task.source_dictionary.string(task.dataset("test")[0]["source"]) == first


def test_parts_are_joined_and_the_first_may_count_more(folder):
    task = make_task(folder, upsample_primary=3)
    task.load_dataset("train", combine=False)
    assert len(task.dataset("train")) == 30
    task.load_dataset("train", combine=True)
    assert len(task.dataset("train")) == 3 * 30 + 8
    assert task.dataset("train")[30]["source"].equal(task.dataset("train")[0]["source"])


def test_sources_are_cut_if_asked(folder):
    task = make_task(folder, truncate_source=True, max_source_positions=3)
    task.load_dataset("valid")
    dataset = task.dataset("valid")
    assert max(dataset.src_sizes) == 3 and max(dataset.tgt_sizes) > 3
    assert all(int(dataset[n]["source"][-1]) == 2 for n in range(8))


def test_folders_take_turns_in_training_alone(folder, tmp_path):
    for name in ("dict.src.txt", "dict.tgt.txt"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    for side in ("src", "tgt"):
        for suffix in ("bin", "idx"):
            data = (folder / f"valid.src-tgt.{side}.{suffix}").read_bytes()
            (tmp_path / f"train.src-tgt.{side}.{suffix}").write_bytes(data)
    task = make_task(f"{folder}:{tmp_path}")
    sizes = []
    for epoch in (1, 2, 3):
        task.load_dataset("train", epoch=epoch)
        sizes.append(len(task.dataset("train")))
    assert sizes == [30, 8, 30]
    task.load_dataset("valid", epoch=2)
    assert len(task.dataset("valid")) == 8


def test_missing_files_are_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"valid7.*this folder has test src-tgt, train src"):
        make_task(folder).load_dataset("valid7")
    with pytest.raises(ValueError, match="no file name tells the languages"):
        make_task(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"dict\.de\.txt: there is no dictionary"):
        make_task(folder, source_lang="de")
    with pytest.raises(FileNotFoundError, match="nowhere: there is no such folder; give the one"):
        make_task(tmp_path / "nowhere")
    (tmp_path / "dict.txt").write_text("a 1\n")
    with pytest.raises(ValueError, match=r"\(dict\.txt\), as .*; give --task language_modeling"):
        make_task(tmp_path)
    assert infer_language_pair(tmp_path) is None
    words = ("a", Words(9)), ("b", Words(9))
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        load_language_pair(str(tmp_path / "x"), "train", *words)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"eval_bleu": True, "eval_bleu_args": "{"}, "is no JSON"),
        ({"eval_bleu": True, "eval_bleu_args": '{"beams": 3}'}, "keys are among beam, cache_error"),
        ({"eval_bleu": True, "eval_bleu_args": "[1]"}, "not an object"),
        ({"eval_bleu": True, "eval_bleu_detok_args": '{"x": 3}'}, "--eval-bleu-detok-args.*object"),
        ({"eval_bleu_detok_args": '{"target_lang": "de"}', "eval_bleu_detok": "moses"}, "needs"),
        ({"eval_bleu_args": '{"beam": 3}'}, "--eval-bleu-args needs --eval-bleu"),
    ],
)
def test_options_of_bleu_are_read_before_training(folder, given, message):
    with pytest.raises(ValueError, match=message):
        make_task(folder, **given)


def test_constraints_are_refused(folder):
    task = make_task(folder)
    line = torch.tensor([5, 2])
    assert len(task.build_dataset_for_inference([line], [2])) == 1
    with pytest.raises(NotImplementedError, match="constrained"):
        task.build_dataset_for_inference([line], [2], constraints=[line])


# ---- fairseq-preprocess for pairs ----


def test_a_joined_dictionary_counts_both_sides(tmp_path, monkeypatch, caplog):
    (tmp_path / "train.a").write_text("x y x\n")
    (tmp_path / "train.b").write_text("y z y y\n")
    with caplog.at_level(logging.INFO):
        code = run_command(
            monkeypatch,
            preprocess,
            f"-s a -t b --trainpref {tmp_path}/train --destdir {tmp_path}/bin",
            "--joined-dictionary --padding-factor 1",
        )
    assert code == 0
    texts = [(tmp_path / f"bin/dict.{side}.txt").read_text() for side in "ab"]
    assert texts == ["y 4\nx 2\nz 1\n"] * 2


def test_each_side_has_limits_of_its_own(tmp_path, monkeypatch):
    (tmp_path / "train.a").write_text("p p p q q r\n")
    (tmp_path / "train.b").write_text("u u u v v w\n")
    code = run_command(
        monkeypatch,
        preprocess,
        f"-s a -t b --trainpref {tmp_path}/train --destdir {tmp_path}/bin --padding-factor 1",
        "--thresholdsrc 2 --nwordstgt 5",
    )
    assert code == 0
    # Four special symbols are among the words of --nwordstgt.
    assert (tmp_path / "bin/dict.a.txt").read_text() == "p 3\nq 2\n"
    assert (tmp_path / "bin/dict.b.txt").read_text() == "u 3\n"


def test_alignments_and_the_source_alone(tmp_path, monkeypatch):
    (tmp_path / "train.a").write_text("p q\nq\n")
    (tmp_path / "train.b").write_text("v u\nv\n")
    (tmp_path / "train.align").write_text("0-1 1-0\n0-0\n")
    base = f"--trainpref {tmp_path}/train --padding-factor 1"
    code = run_command(
        monkeypatch,
        preprocess,
        f"-s a -t b {base} --destdir {tmp_path}/both --align-suffix align",
        f"--alignfile {tmp_path}/train.align",
    )
    assert code == 0
    assert (tmp_path / "both/alignment.a-b.txt").read_text() == "p u\nq v\n"
    assert (tmp_path / "both/train.align.a-b.idx").exists()
    code = run_command(
        monkeypatch, preprocess, f"-s a --only-source {base} --destdir {tmp_path}/one"
    )
    assert code == 0
    found = {path.name for path in (tmp_path / "one").iterdir()}
    assert found == {
        "dict.a.txt",
        "preprocess.log",
        "train.a-None.a.bin",
        "train.a-None.a.idx",
    }
