"""The language modelling task: dictionaries, splits, and what is wrong with them."""

from __future__ import annotations

import dataclasses
import logging
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from fairseq.data.dictionary import dummy_dictionary
from fairseq.data.mmap_indexed_dataset import MMapIndexedDatasetBuilder
from fairseq.tasks import TASK_REGISTRY, get_task, setup_task
from fairseq.tasks.language_modeling import LanguageModelingConfig, LanguageModelingTask

INVENTED = Path(__file__).parents[1] / "golden" / "invented"
MAIN = INVENTED / "bin" / "main"


def config_of(data=MAIN, **options):
    options.setdefault("tokens_per_sample", 64)
    return LanguageModelingConfig(_name="language_modeling", data=str(data), **options)


def task_of(data=MAIN, **options):
    return setup_task(config_of(data, **options))


def write_split(folder, name, lines, dtype=np.uint16):
    builder = MMapIndexedDatasetBuilder(str(folder / f"{name}.bin"), dtype=dtype)
    for line in lines:
        builder.add_item(np.array(line))
    builder.finalize(str(folder / f"{name}.idx"))


@pytest.fixture
def folder(tmp_path):
    shutil.copy(MAIN / "dict.txt", tmp_path)
    return tmp_path


# configuration


def test_every_field_of_the_originals_checkpoint_is_a_field():
    path = INVENTED / "ckpt" / "wiki103_tiny" / "checkpoint_last.pt"
    recorded = torch.load(path, weights_only=True)["cfg"]["task"]
    fields = dataclasses.fields(LanguageModelingConfig)
    assert [f.name for f in fields if not f.metadata.get("extension")] == list(recorded)
    defaults = LanguageModelingConfig()
    for name, value in recorded.items():
        if name in ("_name", "data", "tokens_per_sample"):
            continue
        default = getattr(defaults, name)
        assert default == value or str(default).startswith("${"), name


def test_the_task_is_found_by_name():
    assert get_task("language_modeling") is LanguageModelingTask
    assert TASK_REGISTRY["language_modeling"] is LanguageModelingTask
    task = task_of()
    assert isinstance(task, LanguageModelingTask)
    assert task.state_dict() == {}
    assert task.max_positions() is None
    with pytest.raises(ValueError, match="unknown task 'language_modelling'; known are language_m"):
        setup_task(LanguageModelingConfig(_name="language_modelling"))
    with pytest.raises(ValueError, match="--task"):
        setup_task(LanguageModelingConfig())


# dictionaries and targets


def test_the_dictionary_is_that_of_the_first_folder(folder, caplog):
    caplog.set_level(logging.INFO)
    task = task_of(f"{MAIN}:{folder}/nothing")
    words = len((MAIN / "dict.txt").read_text().splitlines())
    assert len(task.source_dictionary) == words + 4
    assert task.target_dictionary is task.source_dictionary
    assert f"dictionary: {words + 4} types" in caplog.messages
    assert task.has_sharded_data("train")
    assert not task_of().has_sharded_data("train")


def test_an_output_dictionary_of_the_most_frequent_words():
    task = task_of(output_dictionary_size=100)
    assert len(task.target_dictionary) == 100
    assert len(task.source_dictionary) > 100
    task.load_dataset("valid")
    whole = task_of()
    whole.load_dataset("valid")
    item, original = task.dataset("valid")[3], whole.dataset("valid")[3]
    assert item["source"].tolist() == original["source"].tolist()
    expected = [i if i < 100 else 3 for i in original["target"].tolist()]
    assert item["target"].tolist() == expected
    assert expected != original["target"].tolist()
    with pytest.raises(ValueError, match="--output-dictionary-size is 3"):
        task_of(output_dictionary_size=3)


@pytest.mark.parametrize(
    ("flags", "targets"),
    [
        ({}, ["future"]),
        ({"self_target": True}, ["self"]),
        ({"past_target": True, "self_target": True, "future_target": True}, None),
    ],
)
def test_targets_come_from_the_flags(flags, targets):
    assert task_of(**flags).targets == (targets or ["self", "future", "past"])


def test_old_settings_exclude_the_self_target():
    config = config_of(self_target=True)
    config.exclude_self_target = True
    assert setup_task(config).targets == ["future"]


def test_a_model_must_be_able_to_predict_the_targets(monkeypatch):
    class Model:
        supported_targets = {"future"}  # noqa: RUF012

    monkeypatch.setattr("fairseq.models.build_model", lambda cfg, task: Model(), raising=False)
    assert isinstance(task_of().build_model(None), Model)
    with pytest.raises(ValueError, match=r"^Unsupported language modeling target: past"):
        task_of(past_target=True).build_model(None)


# splits


def test_a_split_is_cut_into_blocks(caplog):
    caplog.set_level(logging.INFO)
    task = task_of()
    task.load_dataset("train")
    dataset = task.dataset("train")
    sizes = np.fromfile(MAIN / "train.bin", dtype=np.uint16).size
    assert len(dataset) == -(-sizes // 64)
    assert dataset.sizes.sum() == sizes
    assert any(m.endswith(f"examples from: {MAIN}/train") for m in caplog.messages)
    with pytest.raises(KeyError, match="Dataset not loaded: valid"):
        task.dataset("valid")
    task.datasets["odd"] = [1, 2]
    with pytest.raises(TypeError, match="FairseqDataset"):
        task.dataset("odd")


def test_a_split_can_be_sent_to_another_process():
    task = task_of()
    task.load_dataset("valid")
    dataset = task.dataset("valid")
    sent = pickle.loads(pickle.dumps(dataset))
    assert [i["target"].tolist() for i in sent] == [i["target"].tolist() for i in dataset]


def test_epochs_take_turns_over_the_folders(folder):
    for name, token in (("a", 10), ("b", 11)):
        (folder / name).mkdir()
        shutil.copy(MAIN / "dict.txt", folder / name)
        write_split(folder / name, "train", [[token, 2]])
    task = task_of(f"{folder}/a:{folder}/b")
    found = []
    for epoch in (1, 2, 3):
        task.load_dataset("train", epoch=epoch)
        found.append(task.dataset("train")[0]["target"].tolist())
    assert found == [[10, 2], [11, 2], [10, 2]]


@pytest.mark.parametrize("flag", [False, True])
def test_continuations_of_a_split(folder, flag):
    write_split(folder, "train", [[10, 2]])
    write_split(folder, "train1", [[11, 2]])
    task = task_of(folder)
    task.load_dataset("train", combine=flag)
    target = task.dataset("train")[0]["target"].tolist()
    assert target == ([10, 2, 11, 2] if flag else [10, 2])


def test_a_bos_token_counts_for_the_length_of_a_row(folder):
    write_split(folder, "train", [[10, 11, 12, 13, 2]])
    task = task_of(folder, tokens_per_sample=3, add_bos_token=True, pad_to_fixed_length=True)
    task.load_dataset("train")
    dataset = task.dataset("train")
    batch = dataset.collater([dataset[i] for i in range(3)])
    assert batch["target"].tolist() == [[0, 10, 11], [0, 12, 13], [0, 2, 1]]
    assert batch["net_input"]["src_tokens"].tolist() == [[0, 2, 10], [0, 11, 12], [0, 13, 1]]
    assert dataset.sizes.tolist() == [3, 3, 2]
    task = task_of(folder, tokens_per_sample=1, add_bos_token=True)
    with pytest.raises(ValueError, match="--add-bos-token"):
        task.load_dataset("train")


def test_shortened_lines(folder):
    write_split(folder, "train", [[10, 11, 12, 13, 2], [14, 2]])
    task = task_of(folder, tokens_per_sample=3, shorten_method="truncate")
    task.load_dataset("train")
    assert task.dataset("train")[0]["target"].tolist() == [10, 11, 12]
    assert task.dataset("train")[1]["target"].tolist() == [14, 2]
    task = task_of(folder, tokens_per_sample=3, shorten_method="random_crop")
    task.load_dataset("train")
    assert task.dataset("train").sizes.tolist() == [3, 2]


def test_batches_of_fixed_shape(folder):
    write_split(folder, "train", [[10, 11, 2]])
    write_split(folder, "valid", [[10, 11, 2]])
    fixed = {"pad_to_fixed_bsz": True, "pad_to_fixed_length": True, "tokens_per_sample": 5}
    task = task_of(folder, batch_size=4, batch_size_valid=2, **fixed)
    for split, rows in (("train", 4), ("valid", 2)):
        task.load_dataset(split)
        dataset = task.dataset(split)
        assert dataset.collater([dataset[0]])["target"].shape == (rows, 5)
    with pytest.raises(ValueError, match=r"--pad-to-fixed-bsz.*--batch-size-valid"):
        task_of(folder, batch_size=4, batch_size_valid=None, **fixed).load_dataset("valid")


# what is wrong


def test_no_dictionary(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path}/dict.txt: .*fairseq-preprocess"):
        task_of(tmp_path)
    config = config_of()
    config.data = None
    with pytest.raises(ValueError, match="no data folder"):
        setup_task(config)


def test_no_such_split(folder):
    message = rf"Dataset not found: dev \({folder}/dev\); this folder has no data"
    with pytest.raises(FileNotFoundError, match=message):
        task_of(folder).load_dataset("dev")
    with pytest.raises(FileNotFoundError, match="this folder has test, train, valid"):
        task_of().load_dataset("dev")
    task = task_of(f"{folder}:{folder}/nowhere")
    with pytest.raises(FileNotFoundError, match=rf"there is no folder {folder}/nowhere"):
        task.load_dataset("train", epoch=2)
    with pytest.raises(FileNotFoundError, match="another format than --dataset-impl raw"):
        task_of(dataset_impl="raw").load_dataset("train")


def test_an_empty_split_is_refused_by_name(folder):
    write_split(folder, "valid", [])
    with pytest.raises(ValueError, match=rf"{folder}/valid"):
        task_of(folder).load_dataset("valid")


def test_an_id_beyond_the_dictionary(folder):
    write_split(folder, "train", [[10, 2], [60_000, 2]])
    task = task_of(folder)
    task.load_dataset("train")
    size = len(task.dictionary)
    with pytest.raises(ValueError, match=rf"{folder}/train\.bin: token id 60000 .*has {size} "):
        task.dataset("train")[0]


def test_blocks_of_no_tokens():
    with pytest.raises(ValueError, match="--tokens-per-sample must be at least 1"):
        task_of(tokens_per_sample=0).load_dataset("train")


# evaluation


def evaluated(task, split="valid", **options):
    batches = task.eval_lm_dataloader(task.dataset(split), num_workers=0, **options)
    return [batch for batch in batches if batch]


@pytest.mark.parametrize("mode", ["none", "complete", "eos"])
@pytest.mark.parametrize("context_window", [0, 16])
def test_every_token_is_evaluated_once(mode, context_window):
    task = task_of(tokens_per_sample=48, sample_break_mode=mode)
    task.load_dataset("valid")
    stream = np.fromfile(MAIN / "valid.bin", dtype=np.uint16).tolist()
    rows = {}
    for batch in evaluated(task, max_tokens=100, context_window=context_window):
        lengths = batch["net_input"]["src_lengths"].tolist()
        starts = batch.get("start_indices", [0] * len(lengths))
        for index, target, start, length in zip(
            batch["id"].tolist(), batch["target"].tolist(), starts, lengths, strict=True
        ):
            rows[index] = target[start:length]
    assert sorted(rows) == list(range(len(task.dataset("valid"))))
    assert [token for index in sorted(rows) for token in rows[index]] == stream


def test_a_block_over_max_tokens_is_alone_and_none_is_left_out(folder, caplog):
    write_split(folder, "valid", [[10, 2], [11] * 30 + [2], [12, 13, 2], [14, 2]])
    task = task_of(folder, tokens_per_sample=8, sample_break_mode="eos")
    task.load_dataset("valid")
    found = [batch["id"].tolist() for batch in evaluated(task, max_tokens=9)]
    assert sorted(map(sorted, found)) == [[0, 2, 3], [1]]
    assert not caplog.messages
    found = [batch["id"].tolist() for batch in evaluated(task, max_tokens=9, max_positions=8)]
    assert sorted(map(sorted, found)) == [[0, 2, 3]]
    message = "1 samples have invalid sizes and will be skipped, max_positions=8, first few sample"
    assert caplog.messages == [f"{message} ids=[1]"]


def test_shards_of_an_evaluation():
    task = task_of()
    task.load_dataset("valid")
    seen = []
    for shard in range(3):
        for batch in evaluated(task, batch_size=4, num_shards=3, shard_id=shard):
            seen.extend(batch["id"].tolist())
    assert sorted(seen) == list(range(len(task.dataset("valid"))))


def test_the_context_counts_for_max_tokens():
    task = task_of(tokens_per_sample=8)
    task.load_dataset("valid")
    batches = evaluated(task, max_tokens=120, context_window=16)
    assert {batch["target"].numel() for batch in batches[:-1]} == {120}


# inference


def test_lines_for_scoring_and_continuing():
    dictionary = dummy_dictionary(26)
    task = LanguageModelingTask(LanguageModelingConfig(), dictionary)
    lines = [torch.tensor([2, 10, 11, 12, 2]), torch.tensor([13, 2]), torch.tensor([2])]
    dataset = task.build_dataset_for_inference(lines, [5, 2, 1])
    batch = dataset.collater([dataset[i] for i in range(3)])
    assert batch["id"].tolist() == [0, 1, 2]
    assert batch["net_input"]["src_tokens"].tolist() == [
        [2, 10, 11, 12],
        [2, 13, 1, 1],
        [2, 1, 1, 1],
    ]
    assert batch["net_input"]["src_lengths"].tolist() == [4, 2, 1]
    assert batch["target"].tolist() == [[10, 11, 12, 1], [13, 1, 1, 1], [1, 1, 1, 1]]
    assert dataset.sizes.tolist() == [5, 2, 1]
    task.args.add_bos_token = True
    assert task.build_dataset_for_inference(lines, [5, 2, 1])[1]["source"].tolist() == [0, 13]
    with pytest.raises(NotImplementedError, match="Constraints"):
        task.build_dataset_for_inference(lines, [5, 2, 1], constraints=[])
