"""The contract of tasks."""

from __future__ import annotations

import argparse
import functools
import logging
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fairseq.data.data_utils import numpy_seed, split_paths
from fairseq.data.dictionary import Dictionary
from fairseq.data.fairseq_dataset import FairseqDataset
from fairseq.data.iterators import EpochBatchIterator
from fairseq.logging import metrics

__all__ = ["FairseqTask", "LegacyFairseqTask"]

logger = logging.getLogger(__name__)


class FairseqTask:
    """Holds dictionaries and datasets, makes batches, and says what a training step is.

    Args:
        cfg: the task's section of the configuration.

    Attributes:
        datasets: split -> dataset loaded.
        dataset_to_epoch_iter: dataset -> the epoch iterator that goes on over epochs.
    """

    def __init__(self, cfg: Any, **kwargs: Any) -> None:
        self.cfg = cfg
        self.datasets: dict[str, Any] = {}
        self.dataset_to_epoch_iter: dict[Any, EpochBatchIterator] = {}

    @classmethod
    def add_args(cls, parser: argparse.ArgumentParser) -> None:
        """Adds options, for a task that has no config dataclass."""

    @staticmethod
    def logging_outputs_can_be_summed(criterion: Any) -> bool:
        """Tells whether logging outputs may be summed over workers."""
        return bool(criterion.logging_outputs_can_be_summed())

    @classmethod
    def setup_task(cls, cfg: Any, **kwargs: Any) -> FairseqTask:
        """Makes the task, loading what it needs."""
        return cls(cfg, **kwargs)

    @classmethod
    def load_dictionary(cls, filename: str) -> Dictionary:
        """Reads a dictionary."""
        return Dictionary.load(filename)

    def has_sharded_data(self, split: str) -> bool:
        """Tells whether epochs of a split take turns over several data folders."""
        return len(split_paths(getattr(self.cfg, "data", None) or "")) > 1

    def load_dataset(
        self, split: str, epoch: int = 1, combine: bool = False, task_cfg: Any = None, **kwargs: Any
    ) -> None:
        """Loads a split into `datasets`.

        Args:
            split: its name.
            epoch: chooses the data folder where there are several, from 1.
            combine: whether `split1`, `split2`, ... belong to it.
            task_cfg: the task's section in a checkpoint, for tasks that load data as it says.
        """
        raise NotImplementedError

    def dataset(self, split: str) -> Any:
        """Returns a split that has been loaded.

        Raises:
            KeyError: it has not been loaded.
            TypeError: it is no `FairseqDataset`.
        """
        if split not in self.datasets:
            raise KeyError(f"Dataset not loaded: {split}")
        if not isinstance(self.datasets[split], FairseqDataset):
            raise TypeError("Datasets are expected to be of type FairseqDataset")
        return self.datasets[split]

    def filter_indices_by_size(
        self,
        indices: np.ndarray,
        dataset: Any,
        max_positions: int | Sequence[int] | None = None,
        ignore_invalid_inputs: bool = False,
    ) -> np.ndarray:
        """Leaves out items that are longer than the model takes.

        Args:
            indices: items.
            dataset: what they are items of.
            max_positions: the longest allowed.
            ignore_invalid_inputs: whether longer ones are left out with a warning.

        Raises:
            ValueError: an item is too long, and those are not to be left out.
        """
        indices, ignored = dataset.filter_indices_by_size(indices, max_positions)
        if not ignored:
            return np.asarray(indices)
        if not ignore_invalid_inputs:
            raise ValueError(
                f"Size of sample #{ignored[0]} is invalid (={dataset.size(ignored[0])}) since "
                f"max_positions={max_positions}, skip this example with "
                "--skip-invalid-size-inputs-valid-test"
            )
        logger.warning(
            f"{len(ignored):,} samples have invalid sizes and will be skipped, "
            f"max_positions={max_positions}, first few sample ids={ignored[:10]}"
        )
        return np.asarray(indices)

    def can_reuse_epoch_itr(self, dataset: Any) -> bool:
        """Tells whether one epoch iterator serves all epochs of a dataset."""
        return bool(getattr(dataset, "can_reuse_epoch_itr_across_epochs", False))

    def get_batch_iterator(
        self,
        dataset: Any,
        max_tokens: int | None = None,
        max_sentences: int | None = None,
        max_positions: int | Sequence[int] | None = None,
        ignore_invalid_inputs: bool = False,
        required_batch_size_multiple: int = 1,
        seed: int = 1,
        num_shards: int = 1,
        shard_id: int = 0,
        num_workers: int = 0,
        epoch: int = 1,
        data_buffer_size: int = 0,
        disable_iterator_cache: bool = False,
        skip_remainder_batch: bool = False,
        grouped_shuffling: bool = False,
        update_epoch_batch_itr: bool = False,
        *,
        update_ordered_indices_seed: bool = False,
        allow_oversized: bool = False,
    ) -> EpochBatchIterator:
        """Returns the iterator over epochs of a dataset.

        The batches are made once: items by length, equal ones in an order drawn from the seed,
        those too long left out, cut into batches. Every epoch shuffles the list of batches. The
        iterator of a dataset is kept and returned again, unless the data change between epochs.

        Args:
            dataset: a `FairseqDataset`.
            max_tokens: most tokens (rows times longest row) in a batch.
            max_sentences: most rows in a batch.
            max_positions: the longest item the model takes; None for any length.
            ignore_invalid_inputs: whether longer items are left out, instead of an error.
            required_batch_size_multiple: rows are a multiple of this, or fewer.
            seed: of the order of items and batches.
            num_shards: data-parallel workers.
            shard_id: this worker, from 0.
            num_workers: processes that load data.
            epoch: the first epoch, from 1.
            data_buffer_size: batches read ahead.
            disable_iterator_cache: whether a new iterator is made in any case.
            skip_remainder_batch: see `EpochBatchIterator`.
            grouped_shuffling: see `EpochBatchIterator`.
            update_epoch_batch_itr: whether a new iterator is made for every epoch.
            update_ordered_indices_seed: whether every epoch makes its batches anew, from an order
                of equally long items drawn with `seed + epoch`.
            allow_oversized: whether an item longer than `max_tokens` is a batch of its own,
                instead of an error.
        """
        may_reuse = (
            not disable_iterator_cache
            and not update_epoch_batch_itr
            and self.can_reuse_epoch_itr(dataset)
        )
        if may_reuse and dataset in self.dataset_to_epoch_iter:
            logger.debug("reusing EpochBatchIterator for epoch %d", epoch)
            return self.dataset_to_epoch_iter[dataset]
        dataset.set_epoch(epoch)
        limits = {
            "max_tokens": max_tokens,
            "max_sentences": max_sentences,
            "required_batch_size_multiple": required_batch_size_multiple,
        }
        if allow_oversized:
            limits["allow_oversized"] = True
        make_batches = functools.partial(
            self._make_batches, dataset, max_positions, ignore_invalid_inputs, limits
        )
        batch_sampler: Any
        if update_ordered_indices_seed:

            def batch_sampler(epoch: int) -> list[np.ndarray]:
                return make_batches(seed + epoch)
        else:
            batch_sampler = make_batches(seed)
        epoch_iter = EpochBatchIterator(
            dataset=dataset,
            collate_fn=dataset.collater,
            batch_sampler=batch_sampler,
            seed=seed,
            num_shards=num_shards,
            shard_id=shard_id,
            num_workers=num_workers,
            epoch=epoch,
            buffer_size=data_buffer_size,
            skip_remainder_batch=skip_remainder_batch,
            grouped_shuffling=grouped_shuffling,
        )
        if may_reuse:
            self.dataset_to_epoch_iter[dataset] = epoch_iter
        return epoch_iter

    def _make_batches(
        self,
        dataset: Any,
        max_positions: int | Sequence[int] | None,
        ignore_invalid_inputs: bool,
        limits: dict[str, Any],
        seed: int,
    ) -> list[np.ndarray]:
        with numpy_seed(seed):
            indices = dataset.ordered_indices()
        if max_positions is not None:
            indices = self.filter_indices_by_size(
                indices, dataset, max_positions, ignore_invalid_inputs
            )
        batches: list[np.ndarray] = dataset.batch_by_size(indices, **limits)
        return batches

    def build_model(self, cfg: Any) -> Any:
        """Makes the model that its section of the configuration describes."""
        from fairseq import models

        return models.build_model(cfg, self)

    def build_criterion(self, cfg: Any) -> Any:
        """Makes the criterion that its section of the configuration describes."""
        from fairseq import criterions

        return criterions.build_criterion(cfg, self)

    def build_generator(
        self,
        models: Sequence[Any],
        args: Any,
        seq_gen_cls: Any = None,
        extra_gen_cls_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Makes the generator of this task's outputs.

        Args:
            models: what generates.
            args: options of generation; those that are missing have their defaults.
            seq_gen_cls: another class than `SequenceGenerator`.
            extra_gen_cls_kwargs: further arguments of its constructor.

        Raises:
            ValueError: options contradict each other or are out of range.
        """
        from fairseq.generation.build import build_generator

        return build_generator(
            models, self.target_dictionary, args, seq_gen_cls, extra_gen_cls_kwargs
        )

    def inference_step(
        self,
        generator: Any,
        models: Sequence[Any],
        sample: dict[str, Any],
        prefix_tokens: torch.Tensor | None = None,
        constraints: torch.Tensor | None = None,
    ) -> list[list[dict[str, Any]]]:
        """Generates, or scores, the outputs of a batch.

        Args:
            generator: made by `build_generator`.
            models: what generates.
            sample: the batch.
            prefix_tokens: first tokens of the outputs, (B, P).
            constraints: has to be None, unless a plug-in's generator takes them.

        Returns:
            For each row its hypotheses, best first; see `SequenceGenerator.generate`.
        """
        found: list[list[dict[str, Any]]] = generator.generate(
            models, sample, prefix_tokens=prefix_tokens, constraints=constraints
        )
        return found

    def build_dataset_for_inference(
        self, src_tokens: Sequence[torch.Tensor], src_lengths: Sequence[int], **kwargs: Any
    ) -> Any:
        """Makes a dataset of lines whose outputs are to be generated or scored."""
        raise NotImplementedError(f"{type(self).__name__} has no dataset of single lines")

    def train_step(
        self,
        sample: dict[str, Any],
        model: Any,
        criterion: Any,
        optimizer: Any,
        update_num: int,
        ignore_grad: bool = False,
    ) -> tuple[torch.Tensor, Any, dict[str, Any]]:
        """Runs a batch forward and backward.

        Args:
            sample: the batch.
            model: in training afterwards.
            criterion: gives the loss.
            optimizer: does the backward pass, scaled if it needs to.
            update_num: updates done before.
            ignore_grad: whether the batch is a dummy whose loss counts nothing.

        Returns:
            The loss summed in nats, the number it is to be divided by, and what is to be logged.
        """
        model.train()
        model.set_num_updates(update_num)
        with torch.autograd.profiler.record_function("forward"):
            loss, sample_size, logging_output = criterion(model, sample)
        if ignore_grad:
            loss *= 0
        with torch.autograd.profiler.record_function("backward"):
            optimizer.backward(loss)
        return loss, sample_size, logging_output

    def valid_step(
        self, sample: dict[str, Any], model: Any, criterion: Any
    ) -> tuple[torch.Tensor, Any, dict[str, Any]]:
        """Runs a batch forward, without gradients; returns what `train_step` does."""
        model.eval()
        with torch.no_grad():
            loss, sample_size, logging_output = criterion(model, sample)
        return loss, sample_size, logging_output

    def optimizer_step(self, optimizer: Any, model: Any, update_num: int) -> None:
        """Takes the optimizer's step."""
        optimizer.step()

    def begin_epoch(self, epoch: int, model: Any) -> None:
        """Is called before each training epoch."""

    def begin_valid_epoch(self, epoch: int, model: Any) -> None:
        """Is called before each validation."""

    def reduce_metrics(self, logging_outputs: list[dict[str, Any]], criterion: Any) -> None:
        """Logs what all batches of an update, or of a validation, report together."""
        if any("ntokens" in log for log in logging_outputs):
            ntokens = sum(log.get("ntokens", 0) for log in logging_outputs)
            metrics.log_scalar("wpb", ntokens, priority=180, round=1)
            metrics.log_speed("wps", ntokens, priority=90, round=1)
        else:
            warnings.warn("the criterion logs no ntokens: no wpb and no wps", stacklevel=2)
        if any("nsentences" in log for log in logging_outputs):
            nsentences = sum(log.get("nsentences", 0) for log in logging_outputs)
            metrics.log_scalar("bsz", nsentences, priority=190, round=1)
        else:
            warnings.warn("the criterion logs no nsentences: no bsz", stacklevel=2)
        criterion.__class__.reduce_metrics(logging_outputs)

    def state_dict(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps of the task."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes in what a checkpoint kept of the task."""

    def max_positions(self) -> Any:
        """Returns the longest item the task allows; None for any length."""
        return None

    @property
    def source_dictionary(self) -> Any:
        """The dictionary of the input, if there is one."""
        return None

    @property
    def target_dictionary(self) -> Any:
        """The dictionary of the output, if there is one."""
        return None


class LegacyFairseqTask(FairseqTask):
    """A task that keeps its settings in `args`, as a flat namespace or a config dataclass."""

    def __init__(self, args: Any, **kwargs: Any) -> None:
        super().__init__(args, **kwargs)
        self.args = args
