"""Predicting the next token."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fairseq.data.context_windows import LMContextWindowDataset
from fairseq.data.data_utils import available_splits, load_indexed_dataset, split_paths
from fairseq.data.dictionary import Dictionary, TruncatedDictionary
from fairseq.data.inference_dataset import LMInferenceDataset
from fairseq.data.iterators import CountingIterator
from fairseq.data.monolingual_dataset import MonolingualDataset
from fairseq.data.shorten_dataset import maybe_shorten_dataset
from fairseq.data.token_block_dataset import BREAK_MODES, TokenBlockDataset
from fairseq.dataclass import II, FairseqDataclass, is_interpolated
from fairseq.positions.documents import DOCUMENT_MASKS
from fairseq.tasks import LegacyFairseqTask, register_task

__all__ = ["LanguageModelingConfig", "LanguageModelingTask", "check_document_mask"]

logger = logging.getLogger(__name__)


@dataclass
class LanguageModelingConfig(FairseqDataclass):
    """What a language model is trained or evaluated on."""

    data: str | None = field(
        default=None,
        metadata={"help": "folder of the binarized data; several (a:b:c) take turns over epochs"},
    )
    sample_break_mode: str = field(
        default="none",
        metadata={
            "help": "where blocks end: none: after tokens-per-sample tokens; complete: at the end "
            "of a line; complete_doc: also at an empty line; eos: after every line",
            "choices": list(BREAK_MODES),
        },
    )
    tokens_per_sample: int = field(
        default=1024, metadata={"help": "most tokens in a block", "minimum": 1}
    )
    output_dictionary_size: int = field(
        default=-1,
        metadata={
            "help": "predict only so many words, the others as <unk> (-1: all)",
            "minimum": -1,
        },
    )
    self_target: bool = field(default=False, metadata={"help": "predict the token read"})
    future_target: bool = field(default=False, metadata={"help": "predict the next token"})
    past_target: bool = field(default=False, metadata={"help": "predict the token before"})
    add_bos_token: bool = field(
        default=False,
        metadata={"help": "start every row with <s>, which counts for tokens-per-sample"},
    )
    max_target_positions: int | None = field(
        default=None,
        metadata={"help": "longest row the model takes (default: tokens-per-sample)", "minimum": 1},
    )
    shorten_method: str = field(
        default="none",
        metadata={
            "help": "shorten lines longer than tokens-per-sample before cutting blocks",
            "choices": ["none", "truncate", "random_crop"],
        },
    )
    shorten_data_split_list: str = field(
        default="", metadata={"help": "splits to shorten, separated by commas (default: all)"}
    )
    pad_to_fixed_length: bool = field(
        default=False, metadata={"help": "pad rows to tokens-per-sample"}
    )
    pad_to_fixed_bsz: bool = field(default=False, metadata={"help": "pad batches to batch-size"})
    document_mask: str | None = field(
        default=None,
        metadata={
            "help": "attention and positions restart at each document (after an empty line), at "
            "each line, or nowhere; stored with the model (default: none; in evaluation as in "
            "training)",
            "choices": DOCUMENT_MASKS,
            "extension": True,
        },
    )
    seed: int = II("common.seed")
    batch_size: int | None = II("dataset.batch_size")
    batch_size_valid: int | None = II("dataset.batch_size_valid")
    dataset_impl: str | None = II("dataset.dataset_impl")
    data_buffer_size: int = II("dataset.data_buffer_size")
    tpu: bool = II("common.tpu")
    use_plasma_view: bool = II("common.use_plasma_view")
    plasma_path: str = II("common.plasma_path")


@register_task("language_modeling", dataclass=LanguageModelingConfig)
class LanguageModelingTask(LegacyFairseqTask):
    """Trains and evaluates a language model on blocks of text.

    Args:
        args: settings, with the fields of `LanguageModelingConfig`.
        dictionary: of the input.
        output_dictionary: of the output; by default the same.
        targets: any of self, future, past; by default future.
    """

    def __init__(
        self,
        args: Any,
        dictionary: Dictionary,
        output_dictionary: Dictionary | None = None,
        targets: Sequence[str] | None = None,
    ) -> None:
        super().__init__(args)
        self.dictionary = dictionary
        self.output_dictionary = output_dictionary or dictionary
        self.targets = list(targets or ["future"])

    @classmethod
    def setup_dictionary(cls, args: Any) -> tuple[Dictionary, Dictionary]:
        """Reads the dictionary of the first data folder.

        Returns:
            The dictionaries of input and output.

        Raises:
            FileNotFoundError: there is none.
            ValueError: no data folder is given.
        """
        if not args.data:
            raise ValueError("no data folder is given; name the folder fairseq-preprocess wrote")
        path = os.path.join(split_paths(args.data)[0], "dict.txt")
        if not os.path.isfile(path):
            raise FileNotFoundError(
                f"{path}: there is no dictionary; give the folder that fairseq-preprocess wrote "
                "(its --destdir), or copy the dict.txt the data were binarized with into it"
            )
        dictionary = cls.load_dictionary(path)
        logger.info(f"dictionary: {len(dictionary)} types")
        size = getattr(args, "output_dictionary_size", -1)
        if size < 0:
            return dictionary, dictionary
        if size <= dictionary.unk():
            raise ValueError(
                f"--output-dictionary-size is {size}; it counts the {dictionary.nspecial} special "
                "symbols too, and must be larger (or -1 for the whole dictionary)"
            )
        return dictionary, TruncatedDictionary(dictionary, size)

    @classmethod
    def setup_task(cls, cfg: Any, **kwargs: Any) -> LanguageModelingTask:
        """Makes the task with the dictionary of its data.

        Raises:
            FileNotFoundError: there is no dictionary.
            ValueError: settings that do not go together.
        """
        check_document_mask(getattr(cfg, "document_mask", None), cfg)
        dictionary, output_dictionary = cls.setup_dictionary(cfg)
        wanted = {
            # `exclude_self_target` is how old checkpoints say it.
            "self": getattr(cfg, "self_target", False)
            and not getattr(cfg, "exclude_self_target", False),
            "future": getattr(cfg, "future_target", False),
            "past": getattr(cfg, "past_target", False),
        }
        targets = [name for name, is_wanted in wanted.items() if is_wanted]
        return cls(cfg, dictionary, output_dictionary, targets=targets)

    def build_model(self, cfg: Any) -> Any:
        """Makes the model.

        Raises:
            ValueError: it is no language model, or cannot predict one of the task's targets.
        """
        model = super().build_model(cfg)
        if not hasattr(model, "supported_targets"):
            raise ValueError(_no_language_model(model))
        for target in self.targets:
            if target not in model.supported_targets:
                raise ValueError(
                    f"Unsupported language modeling target: {target}; this model predicts "
                    f"{', '.join(sorted(model.supported_targets))}"
                )
        return model

    def load_dataset(
        self, split: str, epoch: int = 1, combine: bool = False, task_cfg: Any = None, **kwargs: Any
    ) -> None:
        """Loads a split as blocks of source and target tokens.

        The task's own settings decide; those in a checkpoint (`task_cfg`) do not.

        Raises:
            FileNotFoundError: there is no such split.
            ValueError: it is empty, or a setting does not fit.
        """
        paths = split_paths(self.args.data)
        folder = paths[(epoch - 1) % len(paths)]
        path = os.path.join(folder, split)
        impl = self._setting("dataset_impl")
        lines = load_indexed_dataset(path, self.dictionary, impl, combine=combine)
        if lines is None:
            raise FileNotFoundError(_not_found(split, path, folder, impl))
        if len(lines) == 0:
            raise ValueError(
                f"{path}: the split {split} is empty (0 lines); preprocess a text that is not, or "
                "leave the split out"
            )
        self.datasets[split] = self._make_rows(split, lines)

    def _make_rows(self, split: str, lines: Any) -> MonolingualDataset:
        args = self.args
        lines = maybe_shorten_dataset(
            lines,
            split,
            args.shorten_data_split_list,
            args.shorten_method,
            args.tokens_per_sample,
            self._setting("seed", 1),
        )
        blocks = TokenBlockDataset(
            lines,
            lines.sizes,
            # <s> is one of a row's tokens.
            args.tokens_per_sample - int(args.add_bos_token),
            pad=self.dictionary.pad(),
            eos=self.dictionary.eos(),
            break_mode=args.sample_break_mode,
            include_targets=True,
            num_symbols=len(self.dictionary),
        )
        return MonolingualDataset(
            blocks,
            blocks.sizes,
            self.dictionary,
            self.output_dictionary,
            add_eos_for_other_targets=args.sample_break_mode not in (None, "none"),
            shuffle=True,
            targets=self.targets,
            add_bos_token=args.add_bos_token,
            fixed_pad_length=args.tokens_per_sample if args.pad_to_fixed_length else None,
            pad_to_bsz=self._fixed_batch_size(split),
        )

    def _fixed_batch_size(self, split: str) -> int | None:
        if not self.args.pad_to_fixed_bsz:
            return None
        name = "batch_size_valid" if "valid" in split else "batch_size"
        batch_size = self._setting(name)
        if batch_size is None:
            raise ValueError(
                f"--pad-to-fixed-bsz pads batches of {split} to --{name.replace('_', '-')}, which "
                "is not given"
            )
        return int(batch_size)

    def _setting(self, name: str, default: Any = None) -> Any:
        """Returns a setting of another section; the default where nobody has filled it in."""
        value = getattr(self.args, name, default)
        return default if is_interpolated(value) else value

    def build_dataset_for_inference(
        self, src_tokens: Sequence[torch.Tensor], src_lengths: Sequence[int], **kwargs: Any
    ) -> LMInferenceDataset:
        """Makes a dataset of lines to be scored or continued.

        Args:
            src_tokens: vectors of token ids.
            src_lengths: their lengths.

        Raises:
            NotImplementedError: constraints are given.
        """
        if kwargs.get("constraints") is not None:
            raise NotImplementedError(
                "Constraints are not supported with the language_modeling task"
            )
        dictionary = self.source_dictionary
        return LMInferenceDataset(
            src_tokens,
            src_lengths,
            pad=dictionary.pad(),
            eos=dictionary.eos(),
            first=dictionary.bos() if self.args.add_bos_token else dictionary.eos(),
        )

    def inference_step(
        self,
        generator: Any,
        models: Sequence[Any],
        sample: dict[str, Any],
        prefix_tokens: torch.Tensor | None = None,
        constraints: torch.Tensor | None = None,
    ) -> list[list[dict[str, Any]]]:
        """Continues the rows of a batch, or scores them.

        Outputs start with a row's own tokens, unless a prefix is given; a start symbol that a row
        begins with is not repeated.

        Raises:
            NotImplementedError: constraints are given.
        """
        if constraints is not None:
            raise NotImplementedError(
                "Constraints are not supported with the language_modeling task"
            )
        dictionary = self.source_dictionary
        start = dictionary.bos() if self.args.add_bos_token else dictionary.eos()
        source = sample["net_input"]["src_tokens"]
        if prefix_tokens is None and source.nelement():
            prefix_tokens = _without_start(source, start, dictionary.pad())
        found: list[list[dict[str, Any]]] = generator.generate(
            models, sample, prefix_tokens=prefix_tokens, bos_token=start
        )
        return found

    def eval_lm_dataloader(
        self,
        dataset: MonolingualDataset,
        max_tokens: int | None = 36000,
        batch_size: int | None = None,
        max_positions: int | None = None,
        num_shards: int = 1,
        shard_id: int = 0,
        num_workers: int = 1,
        data_buffer_size: int = 10,
        context_window: int = 0,
    ) -> CountingIterator:
        """Returns the batches of an evaluation, unshuffled.

        Without a context window blocks come by length, equal ones in an order drawn with seed 1;
        with one they come in their natural order. Every block is evaluated unless
        `max_positions` is given; one that alone is longer than `max_tokens` is a batch of its own.

        Args:
            dataset: the split.
            max_tokens: most tokens (rows times longest row, context included) in a batch.
            batch_size: most rows in a batch.
            max_positions: leave out blocks longer than this, with a warning.
            num_shards: parts the evaluation is done in.
            shard_id: this part, from 0.
            num_workers: processes that load data.
            data_buffer_size: batches read ahead.
            context_window: tokens of context before each block; the task's `tokens_per_sample` is
                the length of a block without it.
        """
        rows: Any = dataset
        if context_window > 0:
            rows = LMContextWindowDataset(
                dataset,
                tokens_per_sample=self.args.tokens_per_sample,
                context_window=context_window,
                pad_idx=self.source_dictionary.pad(),
            )
        return self.get_batch_iterator(
            rows,
            max_tokens=max_tokens,
            max_sentences=batch_size,
            max_positions=max_positions,
            ignore_invalid_inputs=True,
            num_shards=num_shards,
            shard_id=shard_id,
            num_workers=num_workers,
            data_buffer_size=data_buffer_size,
            disable_iterator_cache=True,
            allow_oversized=True,
        ).next_epoch_itr(shuffle=False)

    @property
    def source_dictionary(self) -> Dictionary:
        """The dictionary of the input."""
        return self.dictionary

    @property
    def target_dictionary(self) -> Dictionary:
        """The dictionary of the output."""
        return self.output_dictionary


def check_document_mask(kind: str | None, cfg: Any, context_window: int = 0) -> None:
    """Checks that documents can be told apart in the rows that a task makes.

    Args:
        kind: value of `--document-mask` that is in effect.
        cfg: the task's settings.
        context_window: tokens of context before each row.

    Raises:
        ValueError: they cannot.
    """
    if kind in (None, "none"):
        return
    if cfg.add_bos_token:
        raise ValueError(
            f"--document-mask {kind} goes by the </s> that every line starts with, but with "
            "--add-bos-token rows start with <s>, which belongs to none; leave one of them out"
        )
    if kind == "document" and cfg.sample_break_mode == "complete_doc" and context_window > 0:
        raise ValueError(
            "--sample-break-mode complete_doc leaves out the empty lines between documents, so "
            "that --document-mask document cannot tell them apart in the "
            f"{context_window} tokens of --context-window; use --sample-break-mode complete or none"
        )


def _without_start(rows: torch.Tensor, start: int, pad: int) -> torch.Tensor:
    """Returns rows (B, T), padded on either side, with padding for the symbols they start with."""
    first = rows.ne(pad).int().argmax(dim=1, keepdim=True)  # (B, 1)
    token = rows.gather(1, first)
    return rows.scatter(1, first, token.masked_fill(token.eq(start), pad))


def _no_language_model(model: Any) -> str:
    kind = type(model).__name__
    if hasattr(model, "encoder"):
        return (
            f"this is a translation model ({kind}: encoder and decoder), not a language model; "
            "fairseq-train, fairseq-validate, fairseq-generate and fairseq-interactive take it, "
            "with --task translation and data of two languages"
        )
    return f"this is a {kind}, not a language model; give one such as --arch transformer_lm"


def _not_found(split: str, path: str, folder: str, impl: str | None) -> str:
    message = f"Dataset not found: {split} ({path})"
    if not os.path.isdir(folder):
        return f"{message}; there is no folder {folder}"
    there = available_splits(folder)
    if split in there:
        return f"{message}; there is data of another format than --dataset-impl {impl}"
    return f"{message}; this folder has {', '.join(there) or 'no data'}"
