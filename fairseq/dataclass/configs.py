"""The sections of the configuration that belong to no component.

Names, defaults and the order of the fields are those of the original, because checkpoints record
them; fields marked `extension` are this project's or newer upstream's and are recorded apart.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

from fairseq.dataclass.base import II, FairseqDataclass

__all__ = [
    "BmufConfig",
    "CheckpointConfig",
    "CommonConfig",
    "CommonEvalConfig",
    "DatasetConfig",
    "DistributedTrainingConfig",
    "EMAConfig",
    "EvalLMConfig",
    "FairseqConfig",
    "GenerationConfig",
    "InteractiveConfig",
    "OptimizationConfig",
]

_LARGEST_SEED = 2**32 - 1  # what numpy takes
_NO_HYDRA = "there is no Hydra entry point; use --config FILE.yaml"
_NO_PLASMA = "block indices are small here and need no shared-memory server"
_NO_PIPELINE = "pipeline parallelism is not provided"
_NO_SLOWMO = "SlowMo is not provided; use --ddp-backend legacy_ddp, c10d or fully_sharded"
_NO_BMUF = "block-wise model update filtering is not provided"
_NO_TPU = "TPUs are not supported"
_NO_AMP = "torch AMP is not provided; use --bf16 or --fp16"
_NO_EFFECT = "it has no effect in the original either; drop the flag"
_NO_REPLACEMENT = "unknown words of a source are not kept in binarized data; use subwords"
_NO_REFINEMENT = "models that refine their output are not provided"
_FLAT_FSDP = "FSDP2 shards each parameter by itself and has no flat parameters"


def _option(default: Any, help: str, **metadata: Any) -> Any:
    """Returns a dataclass field with its help text; a list default is copied for each instance."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help, **metadata})
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class CommonConfig(FairseqDataclass):
    """Logging, seed, precision: what every command shares."""

    no_progress_bar: bool = _option(False, "print lines instead of a progress bar")
    log_interval: int = _option(100, "updates between progress lines", minimum=1)
    log_format: str | None = _option(
        None, "format of the progress", choices=["json", "none", "simple", "tqdm"]
    )
    tensorboard_logdir: str | None = _option(
        None, "folder for TensorBoard events (needs the package tensorboard)"
    )
    wandb_project: str | None = _option(None, "Weights & Biases project (needs the package wandb)")
    azureml_logging: bool = _option(
        False, "log to AzureML", unsupported="use --tensorboard-logdir or --wandb-project"
    )
    seed: int = _option(1, "base of all pseudo random numbers", minimum=0, maximum=_LARGEST_SEED)
    cpu: bool = _option(False, "run on the CPU even if there is a GPU")
    tpu: bool = _option(False, "run on a TPU", unsupported=_NO_TPU)
    bf16: bool = _option(False, "bfloat16 with float32 masters; on a CPU float32 is used instead")
    memory_efficient_bf16: bool = _option(False, "bfloat16 without float32 masters")
    fp16: bool = _option(
        False, "half precision with float32 masters; on a CPU float32 is used instead"
    )
    memory_efficient_fp16: bool = _option(False, "half precision without float32 masters")
    fp16_no_flatten_grads: bool = _option(
        False, "keep one float32 master per parameter, not one flat vector"
    )
    fp16_init_scale: int = _option(2**7, "first loss scale", minimum=1)
    fp16_scale_window: int | None = _option(
        None, "updates without overflow before the loss scale doubles", minimum=1
    )
    fp16_scale_tolerance: float = _option(
        0.0,
        "share of overflowing updates that is tolerated before the loss scale halves",
        minimum=0,
        maximum=1,
    )
    min_loss_scale: float = _option(
        1e-4, "training ends when the loss scale gets this small", minimum=0
    )
    threshold_loss_scale: float | None = _option(
        None, "the loss scale does not fall below this", minimum=0
    )
    user_dir: str | None = _option(None, "folder of a Python package with plug-ins")
    empty_cache_freq: int = _option(
        0, "updates between emptyings of the CUDA cache (0: never)", minimum=0
    )
    all_gather_list_size: int = _option(
        16384, "most bytes of an object that the workers gather from each other", minimum=1
    )
    model_parallel_size: int = _option(
        1, "Megatron model parallelism", unsupported="the Megatron package is not part of this"
    )
    quantization_config_path: str | None = _option(
        None, "product quantization", unsupported="quantization is not provided"
    )
    profile: bool = _option(
        False, "NVTX ranges for the autograd profiler", unsupported="use torch.profiler"
    )
    reset_logging: bool = _option(False, "set up logging again", unsupported=_NO_HYDRA)
    suppress_crashes: bool = _option(False, "return instead of failing", unsupported=_NO_HYDRA)
    use_plasma_view: bool = _option(False, "share block indices", unsupported=_NO_PLASMA)
    plasma_path: str = _option("/tmp/plasma", "socket of the server", unsupported=_NO_PLASMA)
    log_file: str | None = _option(
        None, "file to which the log is appended as well", extension=True
    )
    cpu_half: bool = _option(
        False,
        "really use half precision on a CPU (many times slower than float32 there)",
        extension=True,
    )
    aim_repo: str | None = _option(
        None, "Aim repository", extension=True, unsupported="use --tensorboard-logdir"
    )
    aim_run_hash: str | None = _option(
        None, "Aim run", extension=True, unsupported="use --tensorboard-logdir"
    )
    on_cpu_convert_precision: bool = _option(
        False,
        "convert the precision of inputs on the CPU",
        extension=True,
        unsupported="inputs are token ids, there is nothing to convert",
    )
    amp: bool = _option(False, "automatic mixed precision", extension=True, unsupported=_NO_AMP)
    amp_batch_retries: int = _option(
        2, "tries of a batch that overflows", extension=True, unsupported=_NO_AMP
    )
    amp_init_scale: int = _option(2**7, "first scale", extension=True, unsupported=_NO_AMP)
    amp_scale_window: int | None = _option(
        None, "updates before the scale grows", extension=True, unsupported=_NO_AMP
    )


@dataclass
class CommonEvalConfig(FairseqDataclass):
    """What the commands that read a checkpoint share."""

    path: str | None = _option(None, "checkpoint file(s), separated by colons")
    post_process: str | None = _option(
        None,
        "undo a segmentation into subwords before words are reported (bare: subword_nmt)",
        argparse_const="subword_nmt",
        argparse_alias="--remove-bpe",
    )
    quiet: bool = _option(
        False,
        "print only the final scores",
        unsupported="fairseq-generate has it; elsewhere LOGLEVEL=WARNING hides the log",
    )
    model_overrides: str = _option(
        "{}", "Python dictionary of settings that replace those stored in the checkpoint"
    )
    results_path: str | None = _option(
        None,
        "folder for results",
        unsupported="fairseq-generate, fairseq-extrapolate and fairseq-diagnose have it; elsewhere "
        "the last lines printed are the result",
    )


@dataclass
class DistributedTrainingConfig(FairseqDataclass):
    """How many processes there are and how they share the work."""

    distributed_world_size: int = _option(1, "number of processes over all machines", minimum=1)
    distributed_rank: int = _option(0, "rank of this process", minimum=0)
    distributed_backend: str = _option(
        "nccl", "backend of torch.distributed; without CUDA gloo is used for nccl"
    )
    distributed_init_method: str | None = _option(
        None, "URL at which the processes meet, such as tcp://host:port"
    )
    distributed_port: int = _option(
        -1, "port for processes that Slurm starts", minimum=-1, maximum=65535
    )
    device_id: int = _option(
        0,
        "GPU of this process (LOCAL_RANK, if set, is its default)",
        argparse_alias="--local_rank",
        minimum=0,
    )
    distributed_no_spawn: bool = _option(False, "start no processes for further GPUs")
    ddp_backend: str = _option(
        "pytorch_ddp",
        "how gradients are combined",
        choices=[
            "c10d",
            "fully_sharded",
            "legacy_ddp",
            "no_c10d",
            "pytorch_ddp",
            "slow_mo",
        ],
        unsupported_values={"slow_mo": "use legacy_ddp, c10d or fully_sharded"},
    )
    bucket_cap_mb: int = _option(25, "MiB of a bucket of gradients (c10d)", minimum=1)
    fix_batches_to_gpus: bool = _option(
        False, "shuffle batches within each worker only (cached data)"
    )
    find_unused_parameters: bool = _option(False, "look for parameters without gradient (c10d)")
    fast_stat_sync: bool = _option(
        False, "no effect in the original either", unsupported="drop the flag, it does nothing"
    )
    heartbeat_timeout: int = _option(
        -1, "seconds without progress after which the process is ended (-1: never)", minimum=-1
    )
    broadcast_buffers: bool = _option(False, "copy buffers between workers (c10d)")
    slowmo_momentum: float | None = _option(None, "SlowMo momentum", unsupported=_NO_SLOWMO)
    slowmo_algorithm: str = _option("LocalSGD", "SlowMo algorithm", unsupported=_NO_SLOWMO)
    localsgd_frequency: int = _option(3, "LocalSGD frequency", unsupported=_NO_SLOWMO)
    nprocs_per_node: int = _option(1, "processes on each machine (default: its GPUs)", minimum=1)
    pipeline_model_parallel: bool = _option(False, "pipeline", unsupported=_NO_PIPELINE)
    pipeline_balance: str | None = _option(None, "pipeline", unsupported=_NO_PIPELINE)
    pipeline_devices: str | None = _option(None, "pipeline", unsupported=_NO_PIPELINE)
    pipeline_chunks: int = _option(0, "pipeline", unsupported=_NO_PIPELINE)
    pipeline_encoder_balance: str | None = _option(None, "pipeline", unsupported=_NO_PIPELINE)
    pipeline_encoder_devices: str | None = _option(None, "pipeline", unsupported=_NO_PIPELINE)
    pipeline_decoder_balance: str | None = _option(None, "pipeline", unsupported=_NO_PIPELINE)
    pipeline_decoder_devices: str | None = _option(None, "pipeline", unsupported=_NO_PIPELINE)
    pipeline_checkpoint: str = _option(
        "never",
        "pipeline",
        choices=["always", "never", "except_last"],
        unsupported=_NO_PIPELINE,
    )
    zero_sharding: str = _option(
        "none",
        "sharded optimizer state",
        choices=["none", "os"],
        unsupported="use --ddp-backend fully_sharded",
    )
    fp16: bool = II("common.fp16")
    memory_efficient_fp16: bool = II("common.memory_efficient_fp16")
    tpu: bool = II("common.tpu")
    no_reshard_after_forward: bool = _option(
        False, "keep whole parameters between forward and backward (fully_sharded)"
    )
    fp32_reduce_scatter: bool = _option(False, "reduce gradients in float32 (fully_sharded)")
    cpu_offload: bool = _option(False, "keep shards on the CPU (fully_sharded)")
    distributed_num_procs: int = _option(0, "processes started on this machine (0: all)", minimum=0)
    ddp_comm_hook: str = _option(
        "none",
        "compression of gradients on their way (c10d)",
        choices=["none", "fp16"],
        extension=True,
    )
    gradient_as_bucket_view: bool = _option(
        False, "let gradients be views of the buckets (c10d)", extension=True
    )
    slowmo_base_algorithm: str = _option(
        "localsgd", "SlowMo base algorithm", extension=True, unsupported=_NO_SLOWMO
    )
    use_sharded_state: bool = _option(
        False,
        "each process writes its parts of a checkpoint, into a folder beside a small file, on a "
        "disk that all see; the last is one whole file at the end of the run",
        extension=True,
    )
    not_fsdp_flatten_parameters: bool = _option(
        False, "no flat parameters", extension=True, unsupported=_FLAT_FSDP
    )
    data_parallel: str | None = _option(
        None,
        "ddp: each worker has a copy of the weights; fsdp2: the copies are cut over the workers "
        "(default: as ddp-backend says)",
        choices=["ddp", "fsdp2"],
        extension=True,
    )
    tensor_parallel_size: int = _option(
        1, "processes that share the weights of one copy of the model", extension=True, minimum=1
    )
    sequence_parallel_size: int = _option(
        1, "processes that share each sequence", extension=True, minimum=1
    )
    sequence_parallel_attention: str = _option(
        "allgather",
        "how they attend to each other's tokens: allgather has all keys come to each, ring hands "
        "them round (least memory), ulysses exchanges columns for heads",
        choices=["allgather", "ring", "ulysses"],
        extension=True,
    )
    sequence_parallel_layout: str = _option(
        "contiguous",
        "which tokens each of them holds: successive ones, or zigzag, an early and a late part, "
        "which balances the work of causal attention in a ring",
        choices=["contiguous", "zigzag"],
        extension=True,
    )


@dataclass
class DatasetConfig(FairseqDataclass):
    """Which data, in which batches, and when to validate."""

    num_workers: int = _option(1, "processes that load data (0: this one)", minimum=0)
    skip_invalid_size_inputs_valid_test: bool = _option(
        False, "leave over-long items of validation data out instead of failing"
    )
    max_tokens: int | None = _option(
        None, "most tokens (rows times longest row) in a batch", minimum=1
    )
    batch_size: int | None = _option(
        None, "most rows in a batch", argparse_alias="--max-sentences", minimum=1
    )
    required_batch_size_multiple: int = _option(
        8, "rows of a batch are a multiple of this, or fewer", minimum=1
    )
    required_seq_len_multiple: int = _option(
        1, "pad rows to a multiple", unsupported="it has no effect on language models"
    )
    dataset_impl: str | None = _option(
        None,
        "format of the binarized data",
        choices=["raw", "lazy", "cached", "mmap", "fasta"],
        unsupported_values={"fasta": "FASTA holds biological sequences, not token ids"},
    )
    data_buffer_size: int = _option(10, "batches loaded ahead", minimum=0)
    train_subset: str = _option("train", "split to train on")
    valid_subset: str = _option("valid", "splits to validate on, separated by commas")
    validate_interval: int = _option(1, "epochs between validations", minimum=1)
    validate_interval_updates: int = _option(
        0, "updates between validations (0: epochs only)", minimum=0
    )
    validate_after_updates: int = _option(
        0, "no checkpoints by interval before this update", minimum=0
    )
    fixed_validation_seed: int | None = _option(
        None, "seed set before each validation", minimum=0, maximum=_LARGEST_SEED
    )
    disable_validation: bool = _option(False, "do not validate")
    max_tokens_valid: int | None = _option(
        None, "most tokens in a batch of validation data (default: max-tokens)", minimum=1
    )
    batch_size_valid: int | None = _option(
        None,
        "most rows in a batch of validation data (default: batch-size)",
        argparse_alias="--max-sentences-valid",
        minimum=1,
    )
    max_valid_steps: int | None = _option(
        None, "validation stops after this many batches and one", argparse_alias="--nval", minimum=0
    )
    curriculum: int = _option(0, "first epochs whose batches are not shuffled", minimum=0)
    gen_subset: str = _option("test", "split to evaluate")
    num_shards: int = _option(1, "number of shards the split is evaluated in", minimum=1)
    shard_id: int = _option(0, "shard to evaluate, from 0", minimum=0)
    combine_valid_subsets: bool | None = _option(
        None,
        "join the validation splits (valid, valid1, ...) into one",
        argparse_alias="--combine-val",
        extension=True,
    )
    ignore_unused_valid_subsets: bool | None = _option(
        False, "do not fail when a split valid1, valid2, ... is there but unused", extension=True
    )
    grouped_shuffling: bool = _option(
        False, "shuffle groups of as many batches as there are workers", extension=True
    )
    update_epoch_batch_itr: bool = _option(
        False,
        "make the batches anew each epoch",
        extension=True,
        unsupported="batches of a language model stay the same over epochs",
    )
    update_ordered_indices_seed: bool = _option(
        False, "order rows of equal length anew each epoch", extension=True
    )


@dataclass
class OptimizationConfig(FairseqDataclass):
    """How long to train, and with which rate."""

    max_epoch: int = _option(0, "stop after this epoch (0: none)", minimum=0)
    max_update: int = _option(0, "stop after this update (0: none)", minimum=0)
    stop_time_hours: float = _option(
        0, "stop after this many hours of training in all (0: none)", minimum=0
    )
    clip_norm: float = _option(0.0, "largest norm of the gradient (0: any)")
    sentence_avg: bool = _option(False, "divide gradients by rows instead of tokens")
    update_freq: list[int] = _option(
        [1], "batches per update, one value or one for each epoch", minimum=1
    )
    lr: list[float] = _option(
        [0.25], "learning rate; several values where the schedule takes them", minimum=0
    )
    stop_min_lr: float = _option(-1.0, "stop at the end of an epoch whose rate is not above this")
    use_bmuf: bool = _option(False, "BMUF", unsupported=_NO_BMUF)
    skip_remainder_batch: bool = _option(
        False, "leave out the last, smaller batches of an epoch", extension=True
    )
    compile: bool = _option(
        False,
        "compile the layers of a language model with torch.compile (needs a C++ compiler)",
        extension=True,
    )


@dataclass
class CheckpointConfig(FairseqDataclass):
    """Which checkpoints are written, kept and read."""

    save_dir: str = _option("checkpoints", "folder of the checkpoints")
    restore_file: str = _option(
        "checkpoint_last.pt", "checkpoint to go on from (the default is looked up in save-dir)"
    )
    finetune_from_model: str | None = _option(
        None, "checkpoint whose parameters training starts from, with everything else fresh"
    )
    reset_dataloader: bool = _option(False, "start the data from epoch 1")
    reset_lr_scheduler: bool = _option(False, "start the learning rate schedule afresh")
    reset_meters: bool = _option(False, "forget the averages in the checkpoint")
    reset_optimizer: bool = _option(False, "forget the optimizer's state in the checkpoint")
    optimizer_overrides: str = _option(
        "{}", "Python dictionary of optimizer settings that replace the stored ones"
    )
    save_interval: int = _option(1, "epochs between checkpoints", minimum=1)
    save_interval_updates: int = _option(
        0, "updates between checkpoints (0: epochs only)", minimum=0
    )
    keep_interval_updates: int = _option(
        -1, "newest checkpoints by update to keep (-1: all)", minimum=-1
    )
    keep_last_epochs: int = _option(-1, "newest checkpoints by epoch to keep (-1: all)", minimum=-1)
    keep_best_checkpoints: int = _option(
        -1, "best checkpoints to keep (-1: none by score)", minimum=-1
    )
    no_save: bool = _option(False, "write no checkpoints")
    no_epoch_checkpoints: bool = _option(False, "write only the last and the best checkpoint")
    no_last_checkpoints: bool = _option(False, "do not write checkpoint_last.pt")
    no_save_optimizer_state: bool = _option(False, "leave the optimizer's state out")
    best_checkpoint_metric: str = _option("loss", "validation figure that decides what is best")
    maximize_best_checkpoint_metric: bool = _option(False, "larger is better")
    patience: int = _option(
        -1, "stop after this many validations without improvement (-1: never)", minimum=-1
    )
    checkpoint_suffix: str = _option("", "added to the names of checkpoints")
    checkpoint_shard_count: int = _option(
        1,
        "files a checkpoint consists of",
        unsupported="a checkpoint is one whole file, or with --use-sharded-state a folder with as "
        "many parts as processes",
    )
    load_checkpoint_on_all_dp_ranks: bool = _option(
        False, "every worker reads the file itself, rank 0 does not send it"
    )
    write_checkpoints_asynchronously: bool = _option(
        False, "write checkpoints in the background", argparse_alias="--save-async"
    )
    model_parallel_size: int = II("common.model_parallel_size")
    keep_interval_updates_pattern: int = _option(
        -1,
        "checkpoints by interval whose update is a multiple of this are kept",
        extension=True,
        minimum=-1,
    )
    continue_once: str | None = _option(
        None, "go on from this checkpoint unless save-dir has a newer one", extension=True
    )


@dataclass
class BmufConfig(FairseqDataclass):
    """Block-wise model update filtering, which is not provided."""

    block_lr: float = _option(1, "BMUF", unsupported=_NO_BMUF)
    block_momentum: float = _option(0.875, "BMUF", unsupported=_NO_BMUF)
    global_sync_iter: int = _option(50, "BMUF", unsupported=_NO_BMUF)
    warmup_iterations: int = _option(500, "BMUF", unsupported=_NO_BMUF)
    use_nbm: bool = _option(False, "BMUF", unsupported=_NO_BMUF)
    average_sync: bool = _option(False, "BMUF", unsupported=_NO_BMUF)
    distributed_world_size: int = II("distributed_training.distributed_world_size")


@dataclass
class GenerationConfig(FairseqDataclass):
    """Beam search and sampling."""

    beam: int = _option(5, "hypotheses that are kept for each sentence", minimum=1)
    nbest: int = _option(1, "hypotheses that are printed for each sentence", minimum=1)
    max_len_a: float = _option(
        0, "longest output is a x + b tokens, x those of the source: a", minimum=0
    )
    max_len_b: int = _option(
        200, "longest output is a x + b tokens, x those of the source: b", minimum=0
    )
    min_len: int = _option(1, "fewest tokens of an output, without </s>", minimum=0)
    match_source_len: bool = _option(False, "outputs are as long as their sources")
    unnormalized: bool = _option(False, "compare scores without dividing by length")
    no_early_stop: bool = _option(False, "search on", unsupported=_NO_EFFECT)
    no_beamable_mm: bool = _option(False, "another product", unsupported=_NO_EFFECT)
    lenpen: float = _option(1, "scores are divided by length ** this: below 1 favours short ones")
    unkpen: float = _option(0, "nats taken off unknown words; below 0 gives them more")
    replace_unk: str | None = _option(
        None, "dictionary for unknown words", argparse_const="@@ ", unsupported=_NO_REPLACEMENT
    )
    sacrebleu: bool = _option(False, "score with sacrebleu", unsupported="use --scoring sacrebleu")
    score_reference: bool = _option(False, "score the references instead of generating")
    prefix_size: int = _option(0, "tokens of the reference that are given", minimum=0)
    no_repeat_ngram_size: int = _option(
        0, "n-grams of this size occur once in an output (0: any number of times)", minimum=0
    )
    sampling: bool = _option(False, "draw tokens at random instead of searching")
    sampling_topk: int = _option(-1, "draw among the k most likely words (-1: all)", minimum=-1)
    sampling_topp: float = _option(
        -1.0,
        "draw among the most likely words that have this probability together (-1: all)",
        minimum=-1,
        maximum=1,
    )
    constraints: str | None = _option(
        None,
        "words that have to occur",
        choices=["ordered", "unordered"],
        argparse_const="ordered",
        unsupported="outputs cannot be constrained to given words; --prefix-size gives first ones",
    )
    temperature: float = _option(
        1.0, "above 1 draws more evenly, below 1 more of what is likely (0 is not allowed)"
    )
    diverse_beam_groups: int = _option(-1, "groups of a diverse beam search (-1: none)", minimum=-1)
    diverse_beam_strength: float = _option(
        0.5, "nats that a word loses for each group that chose it in the same step"
    )
    diversity_rate: float = _option(
        -1.0, "nats that continuations of one hypothesis lose by rank (-1: none)"
    )
    print_alignment: str | None = _option(
        None,
        "print what outputs attend to in the source: hard, the source token with the highest "
        "weight for each output token; soft, all weights",
        choices=["hard", "soft"],
        argparse_const="hard",
    )
    print_step: bool = _option(False, "print steps", unsupported=_NO_REFINEMENT)
    lm_path: str | None = _option(
        None, "language model whose log-probabilities are added to those of the model"
    )
    lm_weight: float = _option(0.0, "weight of the language model")
    iter_decode_eos_penalty: float = _option(0.0, "refinement", unsupported=_NO_REFINEMENT)
    iter_decode_max_iter: int = _option(10, "refinement", unsupported=_NO_REFINEMENT)
    iter_decode_force_max_iter: bool = _option(False, "refinement", unsupported=_NO_REFINEMENT)
    iter_decode_with_beam: int = _option(1, "refinement", unsupported=_NO_REFINEMENT)
    iter_decode_with_external_reranker: bool = _option(
        False, "refinement", unsupported=_NO_REFINEMENT
    )
    retain_iter_history: bool = _option(False, "refinement", unsupported=_NO_REFINEMENT)
    retain_dropout: bool = _option(False, "keep dropout on")
    retain_dropout_modules: list[str] | None = _option(
        None, "classes of modules that keep dropout on, separated by commas (default: all)"
    )
    decoding_format: str | None = _option(
        None,
        "refinement",
        choices=["unigram", "ensemble", "vote", "dp", "bs"],
        unsupported=_NO_REFINEMENT,
    )
    no_seed_provided: bool = _option(
        False, "do not seed", unsupported="--seed counts always; give another one for other samples"
    )
    cache_error: float | None = _option(
        None,
        "forget keys so far back that a head's attention weights for them sum to less than this "
        "(ALiBi; default: forget nothing)",
        minimum=0,
        maximum=1,
        extension=True,
    )


@dataclass
class EvalLMConfig(FairseqDataclass):
    """What fairseq-eval-lm reports, and in which windows."""

    output_word_probs: bool = _option(False, "print the log-probability of every word")
    output_word_stats: bool = _option(False, "print statistics for each word type")
    context_window: int = _option(
        0, "tokens of context before each window (sliding evaluation); below tokens-per-sample"
    )
    softmax_batch: int = _option(
        sys.maxsize, "most tokens whose whole distribution is computed at once", minimum=1
    )


@dataclass
class InteractiveConfig(FairseqDataclass):
    """Where fairseq-interactive reads from."""

    buffer_size: int = _option(0, "lines that are read before they are answered", minimum=0)
    input: str = _option("-", "file to read from, - for standard input")


@dataclass
class EMAConfig(FairseqDataclass):
    """An exponential moving average of the parameters, kept beside them."""

    store_ema: bool = _option(False, "keep a moving average of the parameters")
    ema_decay: float = _option(0.9999, "decay of the average for each update", minimum=0, maximum=1)
    ema_start_update: int = _option(0, "first update that enters the average", minimum=0)
    ema_seed_model: str | None = _option(None, "checkpoint the average starts from")
    ema_update_freq: int = _option(1, "updates between changes of the average", minimum=1)
    ema_fp32: bool = _option(False, "keep the average in float32")


@dataclass
class FairseqConfig(FairseqDataclass):
    """The whole configuration of a command."""

    common: CommonConfig = field(default_factory=CommonConfig)
    common_eval: CommonEvalConfig = field(default_factory=CommonEvalConfig)
    distributed_training: DistributedTrainingConfig = field(
        default_factory=DistributedTrainingConfig
    )
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    bmuf: BmufConfig = field(default_factory=BmufConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    eval_lm: EvalLMConfig = field(default_factory=EvalLMConfig)
    interactive: InteractiveConfig = field(default_factory=InteractiveConfig)
    ema: EMAConfig = field(default_factory=EMAConfig, metadata={"extension": True})
    model: Any = None
    task: Any = None
    criterion: Any = None
    optimizer: Any = None
    lr_scheduler: Any = None
    scoring: Any = None
    bpe: Any = None
    tokenizer: Any = None
    simul_type: Any = None
