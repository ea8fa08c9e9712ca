"""The contract of tasks: batches, steps, metrics, plug-ins."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fairseq.data.data_utils import numpy_seed
from fairseq.data.fairseq_dataset import FairseqDataset
from fairseq.logging import metrics
from fairseq.tasks import FairseqTask, LegacyFairseqTask, register_task, setup_task


class Items(FairseqDataset):
    def __init__(self, sizes):
        self.sizes = np.array(sizes)
        self.epoch = None

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, index):
        return int(index)

    def collater(self, samples):
        return {"id": samples}

    def ordered_indices(self):
        return np.lexsort([np.random.permutation(len(self)), self.sizes])

    def set_epoch(self, epoch):
        self.epoch = epoch


@pytest.fixture
def task():
    return FairseqTask(SimpleNamespace(data="one"))


def ids(iterator):
    return [batch["id"] for batch in iterator]


def test_batches_are_made_once_from_the_seed(task):
    dataset = Items([2, 3, 2, 2, 3, 2])
    epochs = task.get_batch_iterator(dataset, max_tokens=6, seed=7)
    with numpy_seed(7):
        order = dataset.ordered_indices().tolist()
    shuffled = [order[:3], order[3:5], order[5:]]
    assert [b.tolist() for b in epochs.frozen_batches] == shuffled
    np.random.RandomState(7 + 1).shuffle(shuffled)
    assert ids(epochs.next_epoch_itr()) == shuffled
    assert dataset.epoch == 1


def test_the_iterator_of_a_dataset_is_kept(task):
    dataset = Items([1, 1])
    first = task.get_batch_iterator(dataset, max_tokens=2)
    assert task.get_batch_iterator(dataset, max_tokens=2) is first
    for option in ("disable_iterator_cache", "update_epoch_batch_itr"):
        assert task.get_batch_iterator(dataset, max_tokens=2, **{option: True}) is not first
    assert task.get_batch_iterator(dataset, max_tokens=2) is first
    assert task.get_batch_iterator(Items([1, 1]), max_tokens=2) is not first


def test_an_order_of_equal_items_for_each_epoch(task):
    dataset = Items([1] * 8)
    epochs = task.get_batch_iterator(
        dataset, max_sentences=4, seed=3, update_ordered_indices_seed=True
    )
    for epoch in (1, 2, 3):
        with numpy_seed(3 + epoch):
            order = dataset.ordered_indices().tolist()
        batches = [order[:4], order[4:]]
        np.random.RandomState(3 + epoch).shuffle(batches)
        assert ids(epochs.next_epoch_itr()) == batches


def test_sharding_grouping_and_leaving_out_the_rest(task):
    options = {"max_sentences": 1, "num_shards": 2, "grouped_shuffling": True}
    shards = [
        ids(
            task.get_batch_iterator(
                Items([1, 2, 3, 4, 5]), shard_id=i, skip_remainder_batch=True, **options
            ).next_epoch_itr()
        )
        for i in range(2)
    ]
    assert sorted(zip(*shards, strict=True)) == [([0], [1]), ([2], [3])]


def test_items_too_long_for_the_model(task, caplog):
    dataset = Items([2, 9, 3, *[8] * 12])
    with pytest.raises(
        ValueError, match=r"^Size of sample #1 is invalid \(=9\) since max_positions=8"
    ):
        task.filter_indices_by_size(np.arange(3), dataset, 8)
    with pytest.raises(ValueError, match=r"--skip-invalid-size-inputs-valid-test$"):
        task.get_batch_iterator(dataset, max_positions=4)
    epochs = task.get_batch_iterator(dataset, max_positions=4, ignore_invalid_inputs=True)
    assert [b.tolist() for b in epochs.frozen_batches] == [[0, 2]]
    assert caplog.record_tuples[0][:2] == ("fairseq.tasks.fairseq_task", logging.WARNING)
    assert caplog.messages[0].startswith(
        "13 samples have invalid sizes and will be skipped, max_positions=4, first few sample ids=["
    )
    assert caplog.messages[0].count(",") == 2 + 9
    epochs = task.get_batch_iterator(Items([9]), max_positions=4, ignore_invalid_inputs=True)
    with pytest.raises(ValueError, match=r"^The dataset is empty\."):
        _ = epochs.first_batch


class Model(torch.nn.Linear):
    def __init__(self):
        super().__init__(1, 1, bias=False)
        torch.nn.init.constant_(self.weight, 2.0)
        self.update_num = None

    def set_num_updates(self, update_num):
        self.update_num = update_num


class Criterion:
    def __call__(self, model, sample):
        loss = model(sample["x"]).sum()
        return loss, 3, {"loss": loss.item()}


class Optimizer:
    stepped = False

    def backward(self, loss):
        loss.backward()

    def step(self):
        self.stepped = True


def test_a_training_step(task):
    model, optimizer = Model().eval(), Optimizer()
    sample = {"x": torch.full((4, 1), 5.0)}
    loss, sample_size, log = task.train_step(sample, model, Criterion(), optimizer, 17)
    assert (loss.item(), sample_size, log) == (40.0, 3, {"loss": 40.0})
    assert model.training
    assert model.update_num == 17
    assert model.weight.grad.item() == 20.0
    loss, _, _ = task.train_step(sample, model, Criterion(), optimizer, 18, ignore_grad=True)
    assert loss.item() == 0.0
    assert model.weight.grad.item() == 20.0
    task.optimizer_step(optimizer, model, 18)
    assert optimizer.stepped


def test_a_validation_step(task):
    model = Model().train()
    loss, _, _ = task.valid_step({"x": torch.ones(2, 1)}, model, Criterion())
    assert loss.item() == 4.0
    assert not loss.requires_grad
    assert not model.training


def test_what_is_logged_of_an_update(task):
    class Logs:
        reduced = None

        @classmethod
        def reduce_metrics(cls, logging_outputs):
            cls.reduced = logging_outputs

    outputs = [{"ntokens": 7, "nsentences": 2}, {"ntokens": 5, "nsentences": 1}]
    with metrics.aggregate("update", new_root=True) as meters:
        task.reduce_metrics(outputs, Logs())
    values = meters.get_smoothed_values()
    assert (values["wpb"], values["bsz"]) == (12, 3)
    assert list(values) == ["wps", "wpb", "bsz"]
    assert Logs.reduced is outputs
    with pytest.warns(UserWarning, match="no ntokens"):
        task.reduce_metrics([{"nsentences": 1}], Logs())
    with pytest.warns(UserWarning, match="no nsentences"):
        task.reduce_metrics([{"ntokens": 1}], Logs())


def test_a_task_of_a_plug_in():
    @register_task("count_to_ten")
    class CountToTen(LegacyFairseqTask):
        @classmethod
        def setup_task(cls, args, **kwargs):
            return cls(args)

    made = setup_task(SimpleNamespace(task="count_to_ten", limit=10))
    assert isinstance(made, CountToTen)
    assert made.args.limit == 10
    with pytest.raises(ValueError, match="duplicate task"):
        register_task("count_to_ten")(CountToTen)
    with pytest.raises(ValueError, match="must extend FairseqTask"):
        register_task("count_to_eleven")(object)
    with pytest.raises(NotImplementedError):
        made.load_dataset("train")
