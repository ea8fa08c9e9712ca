"""One update after another: batches in, parameters changed, numbers logged.

`Trainer` owns the model, the optimizer, the schedule and the count of updates. The order of epochs,
validation and stopping is `fairseq_cli/train.py`; what goes into a checkpoint and comes back is
`fairseq/trainer_state.py`.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import nn

from fairseq import checkpoint_utils, trainer_state, utils
from fairseq import trainer_reports as reports
from fairseq.attention.random_bits import set_dropout_worker
from fairseq.distributed import utils as distributed_utils
from fairseq.distributed.data_parallel import DistributedFairseqModel, is_fully_sharded
from fairseq.distributed.statistics import StatisticsSum, check_gradient_norms
from fairseq.distributed.watchdog import Heartbeat
from fairseq.logging import metrics
from fairseq.nan_detector import NanDetector
from fairseq.optim import FP16Optimizer, MemoryEfficientFP16Optimizer, build_optimizer
from fairseq.optim.ema import build_ema
from fairseq.optim.lr_scheduler import build_lr_scheduler

__all__ = ["Trainer"]

logger = logging.getLogger(__name__)


class Trainer:
    """Trains one model on this worker's share of the data.

    Args:
        cfg: whole configuration.
        task: gives data, and what a training step does with model and criterion.
        model: on the CPU, in float32; moved and converted here.
        criterion: likewise.

    Attributes:
        best: best validation figure that a checkpoint recorded, None before.
        ema: the moving average of the parameters (`--store-ema`), None without.
        is_asked_to_stop: tells whether this worker is asked to end training; never, unless set.
        optimizer_history: what earlier runs recorded, see `fairseq/checkpoint/format.py`.
    """

    def __init__(self, cfg: Any, task: Any, model: nn.Module, criterion: nn.Module) -> None:
        self.cfg = cfg
        self.task = task
        self.cuda = torch.cuda.is_available() and not cfg.common.cpu
        self.device = (
            torch.device("cuda", torch.cuda.current_device()) if self.cuda else torch.device("cpu")
        )
        self.half_type = reports.settle_precision(cfg, self.cuda)
        self._check_sharding(criterion)
        self._criterion: Any = self._prepare(criterion)
        self._model: Any = self._cut(self._prepare(model))
        if cfg.optimization.compile:
            self._compile()
        reports.log_shared_parameters(model)

        self._wrapped: dict[str, nn.Module] = {}
        self._optimizer: Any = None
        self._lr_scheduler: Any = None
        self.ema = build_ema(self._model, cfg.ema, self.device) if cfg.ema.store_ema else None
        self._sequence_sharing = self._share_sequences()
        self._num_updates = 0
        self.optimizer_history: list[dict[str, Any]] = []
        self._gathered: dict[str, Any] | None = None
        self._dummy_batch: Any = None
        self._warned: set[str] = set()
        self.best: float | None = None
        self.runs_without_improvement = 0
        self.best_of_patience: float | None = None

        self.is_asked_to_stop: Callable[[], bool] = lambda: False
        self._is_stop_agreed = False
        self._statistics = StatisticsSum(
            self.gradient_process_group,
            self.device,
            summable=self._outputs_can_be_summed(),
            max_size=cfg.common.all_gather_list_size,
        )
        timeout_s = cfg.distributed_training.heartbeat_timeout
        self._heartbeat = Heartbeat(timeout_s) if timeout_s > 0 else None
        self._start_time = time.time()
        self._previous_training_time = 0.0
        self._cumulative_training_time: float | None = None
        if self.cuda:
            reports.log_gpus(
                self.device, self.data_parallel_process_group, cfg.common.all_gather_list_size
            )
        metrics.log_start_time("wall", priority=790, round=0)

    # ---- who this worker is ----

    @property
    def data_parallel_process_group(self) -> Any:
        """The workers that train on other batches; None if there are none."""
        return distributed_utils.get_data_parallel_group()

    @property
    def data_parallel_world_size(self) -> int:
        """Number of workers, each with its shard of the data."""
        return distributed_utils.get_data_parallel_world_size()

    @property
    def data_parallel_rank(self) -> int:
        """This worker's shard, from 0."""
        return distributed_utils.get_data_parallel_rank()

    @property
    def gradient_process_group(self) -> Any:
        """The workers whose gradients are summed: of other batches, or parts of sequences."""
        return distributed_utils.get_gradient_group()

    @property
    def gradient_world_size(self) -> int:
        """Number of workers whose gradients are summed."""
        return distributed_utils.get_world_size(self.gradient_process_group)

    @property
    def is_data_parallel_master(self) -> bool:
        """Whether this worker speaks for all others."""
        return distributed_utils.get_rank(distributed_utils.get_global_group()) == 0

    @property
    def is_fsdp(self) -> bool:
        """Whether parameters are cut over the workers whose gradients are summed.

        Under tensor parallelism also if there is one such worker: half precision is torch's then.
        """
        is_shared = self.gradient_world_size > 1 or self.tensor_parallel_group is not None
        return is_fully_sharded(self.cfg.distributed_training) and is_shared

    @property
    def tensor_parallel_group(self) -> Any:
        """The workers that share the weights of a copy of the model; None if there are none."""
        mesh = distributed_utils.get_mesh()
        return None if mesh is None else mesh.group("tp")

    @property
    def is_cut(self) -> bool:
        """Whether parameters are cut over any workers."""
        return self.is_fsdp or self.tensor_parallel_group is not None

    @property
    def should_save_checkpoint_on_current_rank(self) -> bool:
        """Whether this worker writes files."""
        return self.is_data_parallel_master

    @property
    def always_call_state_dict_during_save_checkpoint(self) -> bool:
        """Whether every worker must take part in making a checkpoint."""
        return self.is_cut

    @property
    def saves_in_parts(self) -> bool:
        """Whether every worker writes its parts of a checkpoint (`--use-sharded-state`)."""
        return bool(self.cfg.distributed_training.use_sharded_state)

    @property
    def checkpoint_suffix(self) -> str:
        """What `--checkpoint-suffix` adds to the names of files."""
        return self.cfg.checkpoint.checkpoint_suffix or ""

    @property
    def must_stop(self) -> bool:
        """Whether training is to end now, because this or another worker is asked to end it.

        Several workers know of each other's requests from the last numbers they have added up, so
        that the answer is the same on all.
        """
        if distributed_utils.get_world_size(distributed_utils.get_global_group()) == 1:
            return self.is_asked_to_stop()
        return self._is_stop_agreed

    def wait_for_others(self) -> None:
        """Returns when every worker has called this."""
        group = distributed_utils.get_global_group()
        distributed_utils.gather_and_sum([0.0], self.device, group)

    # ---- model, criterion, optimizer, schedule ----

    def _check_sharding(self, criterion: nn.Module) -> None:
        if self.is_cut and (_has_parameters(criterion) or self.cfg.ema.store_ema):
            what = "--store-ema" if self.cfg.ema.store_ema else "a criterion with parameters"
            raise ValueError(
                f"{what} does not work with --ddp-backend fully_sharded, --data-parallel fsdp2 or "
                "--tensor-parallel-size; use --ddp-backend legacy_ddp or c10d alone"
            )
        if self.saves_in_parts and self.cfg.checkpoint.write_checkpoints_asynchronously:
            raise ValueError(
                "--use-sharded-state has all processes write at once, so it does not go with "
                "--write-checkpoints-asynchronously; leave out one of them"
            )
        if self.is_cut and not self.is_fsdp and self.half_type is not None:
            raise ValueError(
                "--tensor-parallel-size with half precision keeps float32 shards, which "
                "--data-parallel ddp does not; leave that out, or give --data-parallel fsdp2"
            )

    def _compile(self) -> None:
        """Has the layers compiled at the first update."""
        if self.is_cut or distributed_utils.get_mesh() is not None:
            raise ValueError(
                "--compile does not work with --ddp-backend fully_sharded, --data-parallel fsdp2, "
                "--tensor-parallel-size or --sequence-parallel-size; leave it out"
            )
        from fairseq.models import compiled

        compiled.check_compiler(self.device)
        compiled.compile_layers(self._model)

    def _cut(self, model: nn.Module) -> nn.Module:
        """Cuts the model's weights over the workers that share a copy of it."""
        mesh = distributed_utils.get_mesh()
        if mesh is not None and mesh.group("tp") is not None:
            from fairseq.model_parallel.tensor_parallel import apply_tensor_parallel

            apply_tensor_parallel(model, mesh.submesh("tp"))
        return model

    def _share_sequences(self) -> Any:
        """Has the model compute its part of every sequence, where workers share them."""
        mesh = distributed_utils.get_mesh()
        if mesh is None or mesh.group("sp") is None:
            return None
        from fairseq.model_parallel.sequence_parallel import SequenceParallelContextManager

        distributed = self.cfg.distributed_training
        return SequenceParallelContextManager(
            self._model,
            ring_attn_func=distributed.sequence_parallel_attention,
            layout=distributed.sequence_parallel_layout,
            device_mesh=mesh.device_mesh,
        ).__enter__()

    def _prepare(self, module: nn.Module) -> nn.Module:
        """Moves a module to the device; converts it, unless sharding will do that."""
        if self.half_type is not None and not self.is_fsdp:
            module = module.to(dtype=self.half_type)
        return module.to(device=self.device)

    def get_model(self) -> Any:
        """Returns the model without the wrapper of data parallelism."""
        return self._model

    def get_criterion(self) -> Any:
        """Returns the criterion without the wrapper of data parallelism."""
        return self._criterion

    @property
    def model(self) -> Any:
        """The model as it is trained, wrapped when it is first asked for."""
        if "model" not in self._wrapped:
            self._wrapped["model"] = self._wrap(self._model)
        return self._wrapped["model"]

    @property
    def criterion(self) -> Any:
        """The criterion as it is trained: wrapped if it has parameters."""
        if "criterion" not in self._wrapped:
            has_parameters = _has_parameters(self._criterion)
            self._wrapped["criterion"] = (
                self._wrap(self._criterion) if has_parameters else self._criterion
            )
        return self._wrapped["criterion"]

    def _wrap(self, module: nn.Module) -> nn.Module:
        if self.gradient_world_size == 1 and not self.is_fsdp:
            return module
        options: dict[str, Any] = {}
        if self.is_fsdp:
            options["compute_dtype"] = self.half_type
            options["min_layer_params"] = _min_layer_params(self.cfg.model)
        return DistributedFairseqModel(
            self.cfg.distributed_training,
            module,
            self.gradient_process_group,
            self.device,
            **options,
        )

    @property
    def optimizer(self) -> Any:
        """The optimizer, built when it is first asked for."""
        if self._optimizer is None:
            self.build_optimizer()
        return self._optimizer

    @property
    def lr_scheduler(self) -> Any:
        """The schedule of the learning rate, built with the optimizer."""
        if self._lr_scheduler is None:
            self.build_optimizer()
        return self._lr_scheduler

    def build_optimizer(self) -> None:
        """Makes optimizer and schedule afresh."""
        modules = chain(self.model.parameters(), self.criterion.parameters())
        params = [param for param in modules if param.requires_grad]
        if self.tensor_parallel_group is not None:
            from fairseq.model_parallel.tensor_parallel import mark_copies

            mark_copies(params)
        self._optimizer = self._optimizer_for(params)
        # At once, so that the first rate is the schedule's.
        self._lr_scheduler = build_lr_scheduler(self.cfg.lr_scheduler, self._optimizer)
        self._lr_scheduler.step_update(0)

    def _optimizer_for(self, params: list[nn.Parameter]) -> Any:
        common = self.cfg.common
        reports.note_on_precision(self.device, self.half_type)
        if self.is_fsdp:
            # Sharded parameters are float32 masters already; only fp16 needs a loss scale.
            if common.fp16:
                return MemoryEfficientFP16Optimizer.build_optimizer(
                    self.cfg, params, allow_unsupported=True
                )
            return build_optimizer(self.cfg.optimizer, params)
        if not (common.fp16 or common.bf16):
            return build_optimizer(self.cfg.optimizer, params)
        if common.memory_efficient_fp16 or common.memory_efficient_bf16:
            return MemoryEfficientFP16Optimizer.build_optimizer(self.cfg, params)
        return FP16Optimizer.build_optimizer(self.cfg, params)

    def _outputs_can_be_summed(self) -> bool:
        can = getattr(self.task, "logging_outputs_can_be_summed", None)
        if can is not None:
            return bool(can(self._criterion))
        return bool(type(self._criterion).logging_outputs_can_be_summed())

    # ---- checkpoints ----

    def consolidate_optimizer(self) -> None:
        """Puts sharded parameters and optimizer state together; every worker must call it."""
        if self.is_cut and not self.saves_in_parts:
            self._gathered = trainer_state.gather(self)

    def state_dict(self) -> dict[str, Any]:
        """Returns the content of a checkpoint."""
        return trainer_state.checkpoint_content(self, self._gathered)

    def save_checkpoint(self, filename: str, extra_state: dict[str, Any]) -> None:
        """Writes a checkpoint; under `--use-sharded-state` every worker must call it.

        Args:
            filename: path of the file.
            extra_state: position in the data and best value, beside what the trainer knows.
        """
        logger.info(f"Saving checkpoint to {filename}")
        state = self.state_dict()
        state["extra_state"].update(extra_state)
        if self.saves_in_parts:
            trainer_state.save_in_parts(self, state, filename)
        elif self.should_save_checkpoint_on_current_rank:
            checkpoint_utils.torch_persistent_save(
                state, filename, async_write=self.cfg.checkpoint.write_checkpoints_asynchronously
            )
        self._gathered = None
        logger.info(f"Finished saving checkpoint to {filename}")

    def load_checkpoint(
        self,
        filename: str,
        reset_optimizer: bool = False,
        reset_lr_scheduler: bool = False,
        optimizer_overrides: dict[str, Any] | None = None,
        reset_meters: bool = False,
    ) -> dict[str, Any] | None:
        """Goes on from a checkpoint.

        Args:
            filename: path of the file.
            reset_optimizer: keep only the parameters; updates count from 0.
            reset_lr_scheduler: leave the schedule's state out.
            optimizer_overrides: settings that replace those in the file.
            reset_meters: leave the averages out.

        Returns:
            The file's `extra_state`; None if there is no such file.

        Raises:
            ValueError: the parameters or the optimizer in the file are not this model's.
        """
        return trainer_state.restore(
            self,
            filename,
            reset_optimizer=reset_optimizer,
            reset_lr_scheduler=reset_lr_scheduler,
            optimizer_overrides=optimizer_overrides,
            reset_meters=reset_meters,
        )

    # ---- data ----

    def get_train_iterator(
        self,
        epoch: int,
        combine: bool = True,
        load_dataset: bool = True,
        data_selector: Any = None,
        shard_batch_itr: bool = True,
        disable_iterator_cache: bool = False,
    ) -> Any:
        """Returns the batches of this worker, from the given epoch on.

        Args:
            epoch: first epoch, from 1.
            combine: join `train`, `train1`, ...
            load_dataset: load the data first (again).
            data_selector: handed on to the task.
            shard_batch_itr: take this worker's share only.
            disable_iterator_cache: make the batches anew.
        """
        dataset_cfg = self.cfg.dataset
        if load_dataset:
            logger.info(f"loading train data for epoch {epoch}")
            self.task.load_dataset(
                dataset_cfg.train_subset, epoch=epoch, combine=combine, data_selector=data_selector
            )
        return self._batches_of(
            dataset_cfg.train_subset,
            max_tokens=dataset_cfg.max_tokens,
            max_sentences=dataset_cfg.batch_size,
            max_positions=utils.resolve_max_positions(
                self.task.max_positions(), self._model.max_positions(), dataset_cfg.max_tokens
            ),
            ignore_invalid_inputs=True,
            num_shards=self.data_parallel_world_size if shard_batch_itr else 1,
            shard_id=self.data_parallel_rank if shard_batch_itr else 0,
            epoch=epoch,
            disable_iterator_cache=disable_iterator_cache,
            **self._newer_iterator_options(),
        )

    def _newer_iterator_options(self) -> dict[str, bool]:
        """Returns what is switched on of the options that tasks of plug-ins need not know."""
        options = {
            "skip_remainder_batch": self.cfg.optimization.skip_remainder_batch,
            "grouped_shuffling": self.cfg.dataset.grouped_shuffling,
            "update_ordered_indices_seed": self.cfg.dataset.update_ordered_indices_seed,
        }
        return {name: True for name, is_on in options.items() if is_on}

    def get_valid_iterator(self, subset: str, disable_iterator_cache: bool = False) -> Any:
        """Returns the batches of this worker of a validation split."""
        dataset_cfg = self.cfg.dataset
        return self._batches_of(
            subset,
            max_tokens=dataset_cfg.max_tokens_valid,
            max_sentences=dataset_cfg.batch_size_valid,
            max_positions=utils.resolve_max_positions(
                self.task.max_positions(), self._model.max_positions()
            ),
            ignore_invalid_inputs=dataset_cfg.skip_invalid_size_inputs_valid_test,
            num_shards=self.data_parallel_world_size,
            shard_id=self.data_parallel_rank,
            epoch=1,
            disable_iterator_cache=disable_iterator_cache,
        )

    def _batches_of(self, subset: str, **options: Any) -> Any:
        dataset_cfg = self.cfg.dataset
        iterator = self.task.get_batch_iterator(
            dataset=self.task.dataset(subset),
            required_batch_size_multiple=dataset_cfg.required_batch_size_multiple,
            seed=self.cfg.common.seed,
            num_workers=dataset_cfg.num_workers,
            data_buffer_size=dataset_cfg.data_buffer_size,
            **options,
        )
        self.reset_dummy_batch(iterator.first_batch)
        return iterator

    def reset_dummy_batch(self, batch: Any) -> None:
        """Sets what a worker computes, without counting it, when it has no batch of its own."""
        self._dummy_batch = batch

    def begin_epoch(self, epoch: int) -> None:
        """Called before the first batch of each epoch."""
        logger.info(f"begin training epoch {epoch}")
        self.lr_step_begin_epoch(epoch)
        self.task.begin_epoch(epoch, self._model)

    def begin_valid_epoch(self, epoch: int) -> None:
        """Called before each validation."""
        self.task.begin_valid_epoch(epoch, self._model)

    def _prepare_sample(self, sample: Any) -> tuple[Any, bool]:
        """Returns a batch on the device, and whether it is a stand-in for a missing one."""
        is_dummy = sample is None or len(sample) == 0
        if is_dummy:
            sample = self._dummy_batch
            assert sample, "workers without a batch need a dummy batch"
        if self._sequence_sharing is not None:
            sample = self._sequence_sharing.cut(sample)
        if self.cuda:
            sample = utils.move_to_cuda(sample, device=self.device)
        if self.half_type is not None:
            sample = utils.apply_to_sample(self._to_half, sample)
        return sample, is_dummy

    def _to_half(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(dtype=self.half_type) if tensor.dtype is torch.float32 else tensor

    # ---- one update ----

    def train_step(self, samples: list[Any], raise_oom: bool = False) -> Mapping[str, Any] | None:
        """Does one update.

        Args:
            samples: the micro-batches of this worker whose gradients are added up.
            raise_oom: fail when a GPU has not enough memory, instead of leaving the batches out.

        Returns:
            What was logged; None if nothing was updated (overflow of half precision, or out of
            memory).

        Raises:
            FloatingPointError: the gradient is not finite, or differs between workers.
        """
        with metrics.aggregate("train"):
            self._beat()
            self._seed()
            set_dropout_worker(distributed_utils.get_rank(self.gradient_process_group))
            self.model.train()
            self.criterion.train()
            self.zero_grad()
            metrics.log_start_time("train_wall", priority=800, round=0)
            logged = self._train_step(samples, raise_oom)
            metrics.log_stop_time("train_wall")
            return logged

    def _train_step(self, samples: list[Any], raise_oom: bool) -> Mapping[str, Any] | None:
        outputs, sample_size, ooms = self._accumulate_gradients(samples, raise_oom)
        if ooms and self.gradient_world_size == 1:
            return None
        outputs, counts = self._sum_statistics(
            outputs,
            {"sample_size": sample_size, "ooms": ooms, "time": self._local_training_time()},
        )
        if self.gradient_world_size > 1:
            self._cumulative_training_time = counts["time"] / self.gradient_world_size
        if counts["ooms"] >= self.gradient_world_size:
            logger.warning("out of memory on every worker, no update is done")
            self.zero_grad()
            return None
        grad_norm = self._update_parameters(samples, counts["sample_size"])
        logged = None
        if grad_norm is not None:
            self.set_num_updates(self._num_updates + 1)
            self._update_ema()
            logged = self._log_statistics(outputs, counts["sample_size"], grad_norm)
            self._empty_cache_if_due()
        if self.cfg.common.fp16:
            scale = self.optimizer.scaler.loss_scale
            metrics.log_scalar("loss_scale", scale, priority=700, round=4, weight=0)
        return logged

    def _sum_statistics(
        self, outputs: list[dict[str, Any]], counts: dict[str, float]
    ) -> tuple[list[dict[str, Any]], dict[str, float]]:
        """Sums over the workers, who learn on the way whether any of them is asked to stop."""
        outputs, sums = self._statistics(outputs, {**counts, "stop": self.is_asked_to_stop()})
        stop = sums.pop("stop")
        if self.tensor_parallel_group is not None:
            group = self.tensor_parallel_group
            stop = distributed_utils.gather_and_sum([stop], self.device, group)[0]
        self._is_stop_agreed |= stop > 0
        return outputs, sums

    def _seed(self) -> None:
        """Seeds random numbers for this update."""
        seed = self.cfg.common.seed + self._num_updates
        if self._sequence_sharing is None:
            utils.set_torch_seed(seed)
        else:
            self._sequence_sharing.seed(seed)

    def _accumulate_gradients(
        self, samples: list[Any], raise_oom: bool
    ) -> tuple[list[dict[str, Any]], float, int]:
        """Goes forward and backward; returns outputs and sample size of real batches, and OOMs."""
        outputs: list[dict[str, Any]] = []
        sample_size: float = 0
        ooms = 0
        for i, sample in enumerate(samples):
            try:
                with self._without_sync() if i < len(samples) - 1 else contextlib.nullcontext():
                    size, output, is_dummy = self._forward_backward(sample)
            except RuntimeError as error:
                if not _is_out_of_memory(error) or raise_oom or not self._may_skip_batches():
                    raise
                ooms = 1
                outputs, sample_size = [], 0
                self._recover_from_oom(error)
                continue
            if not is_dummy:
                outputs.append(output)
                sample_size += size
            if self.cuda and self._num_updates == 0:
                # The first batch leaves blocks of odd sizes behind.
                torch.cuda.empty_cache()
        return outputs, sample_size, ooms

    def _forward_backward(self, sample: Any) -> tuple[float, dict[str, Any], bool]:
        sample, is_dummy = self._prepare_sample(sample)
        _, size, output = self.task.train_step(
            sample=sample,
            model=self.model,
            criterion=self.criterion,
            optimizer=self.optimizer,
            update_num=self._num_updates,
            ignore_grad=is_dummy,
        )
        self._statistics.expect_keys(output)
        return utils.item(size), output, is_dummy

    def _without_sync(self) -> contextlib.AbstractContextManager[Any]:
        """Keeps gradients on this worker until the last micro-batch, where the wrapper can."""
        can = self.gradient_world_size > 1 and hasattr(self.model, "no_sync")
        return self.model.no_sync() if can else contextlib.nullcontext()

    def _may_skip_batches(self) -> bool:
        """Whether this worker can leave a backward pass out without stopping the others."""
        if distributed_utils.get_mesh() is not None:
            return False
        backend = self.cfg.distributed_training.ddp_backend
        return self.gradient_world_size == 1 or backend in ("legacy_ddp", "no_c10d")

    def _recover_from_oom(self, error: Exception) -> None:
        self._log_oom(error)
        logger.warning("attempting to recover from OOM in forward/backward pass")
        self.zero_grad()
        if self.cuda:
            torch.cuda.empty_cache()

    def _log_oom(self, error: Exception) -> None:
        logger.warning(f"OOM: Ran out of memory with exception: {error}")
        if self.cuda:
            logger.warning(torch.cuda.memory_summary(device=self.device))

    def _update_parameters(self, samples: list[Any], sample_size: float) -> torch.Tensor | None:
        """Combines and applies gradients; returns their norm, None after an overflow."""
        try:
            self.optimizer.all_reduce_grads(self.model)
            if self.criterion is not self._criterion:
                self.optimizer.all_reduce_grads(self.criterion)
            # Gradients are means over workers of sums over tokens.
            self.optimizer.multiply_grads(self.gradient_world_size / (sample_size or 1.0))
            grad_norm = self.clip_grad_norm(self.cfg.optimization.clip_norm)
            check_gradient_norms(grad_norm, self.gradient_process_group)
            if not torch.isfinite(grad_norm).all():
                raise FloatingPointError("gradients are Nan/Inf")
            self.task.optimizer_step(self.optimizer, model=self.model, update_num=self._num_updates)
        except FloatingPointError:
            self._locate_non_finite(samples)
            raise
        except OverflowError as error:
            logger.info(f"NOTE: gradient overflow detected, ignoring gradient, {error}")
            self.zero_grad()
            return None
        except RuntimeError as error:
            if _is_out_of_memory(error):
                self._log_oom(error)
                logger.error("OOM during optimization, irrecoverable")
            raise
        return grad_norm

    def _locate_non_finite(self, samples: list[Any]) -> None:
        """Repeats the batches and logs which module makes them go wrong."""
        self.zero_grad()
        self._seed()
        with NanDetector(self._model):
            for sample in samples:
                self._forward_backward(sample)

    def zero_grad(self) -> None:
        """Drops all gradients."""
        self.optimizer.zero_grad()

    def clip_grad_norm(self, clip_norm: float) -> torch.Tensor:
        """Clips gradients; returns their norm before that."""
        if not self.is_cut:
            return self.optimizer.clip_grad_norm(clip_norm)
        from fairseq.distributed.fsdp import local_grad_norm_aggregator

        is_spread = self.is_fsdp and self.gradient_world_size > 1
        groups = [self.gradient_process_group] if is_spread else []
        groups += [self.tensor_parallel_group] if self.tensor_parallel_group is not None else []
        aggregate = local_grad_norm_aggregator(groups, self.device)
        return self.optimizer.clip_grad_norm(clip_norm, aggregate_norm_fn=aggregate)

    def _update_ema(self) -> None:
        if self.ema is None:
            return
        self.ema.step(self._model, self._num_updates)
        metrics.log_scalar("ema_decay", self.ema.get_decay(), priority=10000, round=5, weight=0)

    def _empty_cache_if_due(self) -> None:
        period = self.cfg.common.empty_cache_freq
        if self.cuda and period > 0 and (self._num_updates + period - 1) % period == 0:
            torch.cuda.empty_cache()

    # ---- validation ----

    @torch.no_grad()
    def valid_step(self, sample: Any, raise_oom: bool = False) -> Mapping[str, Any]:
        """Computes the loss of one batch of validation data.

        Args:
            sample: this worker's batch.
            raise_oom: fail when a GPU has not enough memory, instead of trying once more.
        """
        with metrics.aggregate("valid"):
            self._beat()
            self.model.eval()
            self.criterion.eval()
            on_device, is_dummy = self._prepare_sample(sample)
            try:
                _, size, output = self.task.valid_step(on_device, self.model, self.criterion)
            except RuntimeError as error:
                may_repeat = distributed_utils.get_mesh() is None
                if not _is_out_of_memory(error) or raise_oom or not may_repeat:
                    raise
                self._recover_from_oom(error)
                return self.valid_step(sample, raise_oom=True)
            self._statistics.expect_keys(output)
            outputs, counts = self._sum_statistics(
                [] if is_dummy else [output], {"sample_size": 0 if is_dummy else utils.item(size)}
            )
            return self._log_statistics(outputs, counts["sample_size"])

    # ---- learning rate, updates, time ----

    def lr_step_begin_epoch(self, epoch: int) -> float:
        """Tells the schedule that an epoch begins; returns the learning rate."""
        self.lr_scheduler.step_begin_epoch(epoch)
        return self.lr_step_update()

    def lr_step(self, epoch: int, val_loss: float | None = None) -> float:
        """Tells the schedule that an epoch has ended; returns the learning rate."""
        self.lr_scheduler.step(epoch, val_loss)
        return self.lr_step_update()

    def lr_step_update(self) -> float:
        """Sets and returns the learning rate of the next update."""
        new_lr: float = self.lr_scheduler.step_update(self._num_updates)
        metrics.log_scalar("lr", new_lr, weight=0, priority=300)
        return new_lr

    def get_lr(self) -> float:
        """Returns the learning rate of the next update."""
        return self.optimizer.get_lr()

    def get_num_updates(self) -> int:
        """Returns the number of updates done so far."""
        return self._num_updates

    def set_num_updates(self, num_updates: int) -> None:
        """Sets the number of updates, and with it the learning rate."""
        self._num_updates = num_updates
        self.lr_step_update()
        metrics.log_scalar("num_updates", num_updates, weight=0, priority=200)

    def _local_training_time(self) -> float:
        return time.time() - self._start_time + self._previous_training_time

    def cumulative_training_time(self) -> float:
        """Returns the seconds of training so far, runs before a resume included."""
        if self._cumulative_training_time is None:
            return self._local_training_time()
        return self._cumulative_training_time

    def set_previous_training_time(self, seconds: float) -> None:
        """Sets the time that earlier runs took, and starts counting this one's."""
        self._previous_training_time = seconds
        self._start_time = time.time()

    def close(self) -> None:
        """Ends what runs beside the training, and leaves the model as it was."""
        if self._sequence_sharing is not None:
            self._sequence_sharing.__exit__()
            self._sequence_sharing = None
        if self._heartbeat is not None:
            self._heartbeat.close()

    def _beat(self) -> None:
        if self._heartbeat is not None:
            self._heartbeat.beat()

    # ---- logging ----

    def _log_statistics(
        self,
        outputs: list[dict[str, Any]],
        sample_size: float,
        grad_norm: torch.Tensor | None = None,
    ) -> Mapping[str, Any]:
        """Turns logging outputs into metrics."""
        if grad_norm is not None:
            self._log_update(grad_norm)
        with metrics.aggregate() as logged:
            self.task.reduce_metrics(outputs, self._criterion)
            if "loss" not in logged:
                self._warn_once(
                    "the criterion's reduce_metrics logs no 'loss', which checkpoints and "
                    "schedules may need"
                )
                metrics.log_scalar("loss", -1)
        return reports.LoggedValues(logged, sample_size)

    def _log_update(self, grad_norm: torch.Tensor) -> None:
        clip_norm = self.cfg.optimization.clip_norm
        metrics.log_speed("ups", 1.0, priority=100, round=2)
        metrics.log_scalar("gnorm", grad_norm, priority=400, round=3)
        if clip_norm > 0:
            clipped = (grad_norm > clip_norm).to(grad_norm.dtype) * 100
            metrics.log_scalar("clip", clipped, priority=500, round=1)
        if self.cuda:
            self._log_free_memory()

    def _log_free_memory(self) -> None:
        used = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        total = torch.cuda.get_device_properties(self.device).total_memory
        metrics.log_scalar("gb_free", (total - used) / 2**30, priority=1500, round=1, weight=0)

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(message)


def _has_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _min_layer_params(cfg_model: Any) -> int:
    """Returns `--min-params-to-wrap` where it was set: its default suits flat parameters only."""
    default = 100_000_000
    value = int(getattr(cfg_model, "min_params_to_wrap", default))
    return 0 if value == default else value


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)
