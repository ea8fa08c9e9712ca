"""Predicting lines of one language from those of another."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fairseq import utils
from fairseq.data.data_utils import split_paths
from fairseq.data.dictionary import Dictionary
from fairseq.data.encoders import build_tokenizer
from fairseq.data.language_pair_dataset import LanguagePairDataset, check_special_symbols
from fairseq.data.language_pairs import TruncatedLines, infer_language_pair, load_language_pair
from fairseq.dataclass import II, FairseqDataclass, is_interpolated
from fairseq.dataclass.configs import GenerationConfig
from fairseq.registry import TOKENIZERS
from fairseq.scoring.validation import add_counts, log_bleu
from fairseq.tasks import LegacyFairseqTask, register_task

__all__ = ["TranslationConfig", "TranslationTask"]

logger = logging.getLogger(__name__)

_NO_ALIGNMENT_LOSS = "no criterion here reads alignments; they serve --replace-unk dictionaries"


@dataclass
class TranslationConfig(FairseqDataclass):
    """Which pairs a model is trained or evaluated on."""

    data: str | None = field(
        default=None,
        metadata={"help": "folder of the binarized data; several (a:b:c) take turns over epochs"},
    )
    source_lang: str | None = field(
        default=None,
        metadata={
            "help": "language that is read (default: found in the names of files)",
            "argparse_alias": "-s",
        },
    )
    target_lang: str | None = field(
        default=None,
        metadata={
            "help": "language that is predicted (default: found in the names of files)",
            "argparse_alias": "-t",
        },
    )
    load_alignments: bool = field(
        default=False,
        metadata={"help": "load alignments of words", "unsupported": _NO_ALIGNMENT_LOSS},
    )
    left_pad_source: bool = field(
        default=True, metadata={"help": "pad sources behind, instead of in front as by default"}
    )
    left_pad_target: bool = field(
        default=False, metadata={"help": "pad targets in front, instead of behind"}
    )
    max_source_positions: int = field(
        default=1024, metadata={"help": "longest source, in tokens", "minimum": 1}
    )
    max_target_positions: int = field(
        default=1024, metadata={"help": "longest target, in tokens", "minimum": 1}
    )
    upsample_primary: int = field(
        default=-1,
        metadata={
            "help": "how often train counts where train1, train2, ... are there too (-1: once)",
            "minimum": -1,
        },
    )
    truncate_source: bool = field(
        default=False, metadata={"help": "cut sources to max-source-positions"}
    )
    num_batch_buckets: int = field(
        default=0,
        metadata={
            "help": "lengths that rows are padded to",
            "unsupported": "it serves TPUs; rows are padded to the longest of their batch",
        },
    )
    eval_bleu: bool = field(
        default=False, metadata={"help": "generate in validation and report BLEU"}
    )
    eval_bleu_args: str | None = field(
        default="{}",
        metadata={"help": 'options of generation as JSON, such as {"beam": 4, "lenpen": 0.6}'},
    )
    eval_bleu_detok: str = field(
        default="space",
        metadata={
            "help": "tokenizer that puts text together for BLEU; space leaves it as it stands",
            "choices": ["space", "moses", "nltk"],
        },
    )
    eval_bleu_detok_args: str | None = field(
        default="{}",
        metadata={"help": 'options of that tokenizer as JSON, such as {"target_lang": "de"}'},
    )
    eval_tokenized_bleu: bool = field(
        default=False, metadata={"help": "words for BLEU are what spaces separate"}
    )
    eval_bleu_remove_bpe: str | None = field(
        default=None,
        metadata={
            "help": "undo a segmentation into subwords before BLEU (bare: '@@ ')",
            "argparse_const": "@@ ",
        },
    )
    eval_bleu_print_samples: bool = field(
        default=False, metadata={"help": "log an output of each validation batch"}
    )
    train_subset: str = II("dataset.train_subset")
    dataset_impl: str | None = II("dataset.dataset_impl")


@register_task("translation", dataclass=TranslationConfig)
class TranslationTask(LegacyFairseqTask):
    """Trains and evaluates models that turn a source into a target.

    Args:
        args: settings, with the fields of `TranslationConfig`, both languages among them.
        src_dict: dictionary of the source.
        tgt_dict: dictionary of the target.
    """

    def __init__(self, args: Any, src_dict: Dictionary, tgt_dict: Dictionary) -> None:
        super().__init__(args)
        self.src_dict = src_dict
        self.tgt_dict = tgt_dict
        self._generator: Any = None
        self._detokenizer: Any = None

    @classmethod
    def setup_task(cls, cfg: Any, **kwargs: Any) -> TranslationTask:
        """Makes the task with the dictionaries of its data.

        Raises:
            FileNotFoundError: there is no data folder, or no dictionary in it.
            ValueError: no data folder is given, its languages cannot be told, or settings do not
                go together.
        """
        if not cfg.data:
            raise ValueError("no data folder is given; name the folder fairseq-preprocess wrote")
        _check_bleu_options(cfg)
        folder = split_paths(cfg.data)[0]
        if not os.path.isdir(folder):
            raise FileNotFoundError(
                f"{folder}: there is no such folder; give the one that fairseq-preprocess wrote "
                "(its --destdir)"
            )
        if cfg.source_lang is None or cfg.target_lang is None:
            found = infer_language_pair(folder)
            if found is None:
                raise ValueError(_no_languages(folder))
            cfg.source_lang = cfg.source_lang or found[0]
            cfg.target_lang = cfg.target_lang or found[1]
        dictionaries = []
        for language in (cfg.source_lang, cfg.target_lang):
            path = os.path.join(folder, f"dict.{language}.txt")
            if not os.path.isfile(path):
                raise FileNotFoundError(
                    f"{path}: there is no dictionary; give the folder that fairseq-preprocess "
                    "wrote (its --destdir), or other --source-lang and --target-lang"
                )
            dictionaries.append(cls.load_dictionary(path))
            logger.info(f"[{language}] dictionary: {len(dictionaries[-1])} types")
        check_special_symbols(*dictionaries)
        return cls(cfg, *dictionaries)

    def load_dataset(
        self, split: str, epoch: int = 1, combine: bool = False, task_cfg: Any = None, **kwargs: Any
    ) -> None:
        """Loads a split as pairs.

        Training data come from the data folders in turn, other splits from the first.

        Raises:
            FileNotFoundError: there is no such split.
            ValueError: it is empty, or its sides differ in their number of lines.
        """
        args = self.args
        folders = split_paths(args.data)
        train_subset = self._setting("train_subset", "train")
        folder = folders[(epoch - 1) % len(folders)] if split == train_subset else folders[0]
        source, target = load_language_pair(
            folder,
            split,
            (args.source_lang, self.src_dict),
            (args.target_lang, self.tgt_dict),
            combine=combine,
            dataset_impl=self._setting("dataset_impl"),
            upsample_primary=args.upsample_primary,
            needs_target=not split.startswith("test"),
        )
        if len(source) == 0:
            raise ValueError(f"{folder}: the split {split} is empty (0 lines)")
        if args.truncate_source:
            source = TruncatedLines(source, args.max_source_positions, self.src_dict.eos())
        self.datasets[split] = LanguagePairDataset(
            source,
            source.sizes,
            self.src_dict,
            target,
            None if target is None else target.sizes,
            self.tgt_dict,
            left_pad_source=args.left_pad_source,
            left_pad_target=args.left_pad_target,
            shuffle=split != "test",
        )

    def _setting(self, name: str, default: Any = None) -> Any:
        """Returns a setting of another section; the default where nobody has filled it in."""
        value = getattr(self.args, name, default)
        return default if value is None or is_interpolated(value) else value

    def build_dataset_for_inference(
        self, src_tokens: Sequence[torch.Tensor], src_lengths: Sequence[int], **kwargs: Any
    ) -> LanguagePairDataset:
        """Makes a dataset of sources alone.

        Args:
            src_tokens: vectors of token ids, each ending in `</s>`.
            src_lengths: their lengths.

        Raises:
            NotImplementedError: constraints are given.
        """
        if kwargs.get("constraints") is not None:
            raise NotImplementedError("outputs cannot be constrained to given words")
        return LanguagePairDataset(
            src_tokens,
            src_lengths,
            self.src_dict,
            tgt_dict=self.tgt_dict,
            left_pad_source=self.args.left_pad_source,
            left_pad_target=self.args.left_pad_target,
        )

    def valid_step(
        self, sample: dict[str, Any], model: Any, criterion: Any
    ) -> tuple[torch.Tensor, Any, dict[str, Any]]:
        """Runs a batch forward, and counts what its BLEU is made of if that is asked for."""
        loss, sample_size, logging_output = super().valid_step(sample, model, criterion)
        if self.args.eval_bleu:
            outputs, references = self._generate(sample, model)
            add_counts(
                logging_output, outputs, references, is_tokenized=self.args.eval_tokenized_bleu
            )
        return loss, sample_size, logging_output

    def _generate(self, sample: dict[str, Any], model: Any) -> tuple[list[str], list[str]]:
        """Returns outputs and references of a batch as text."""
        # Not above: torch takes half a second to import what it shards with.
        from fairseq.distributed.fsdp import is_sharded

        if is_sharded(model):
            raise ValueError(
                "--eval-bleu does not work with --ddp-backend fully_sharded; use legacy_ddp or c10d"
            )
        model = getattr(model, "module", model)
        if self._generator is None:
            given = _bleu_options(self.args)
            self._generator = self.build_generator([model], argparse.Namespace(**given))
            self._detokenizer = _detokenizer(self.args)
        found = self.inference_step(self._generator, [model], sample)
        pad = self.tgt_dict.pad()
        outputs = [self._text(best[0]["tokens"], "UNKNOWNTOKENINHYP") for best in found]
        references = [
            self._text(utils.strip_pad(row, pad), "UNKNOWNTOKENINREF") for row in sample["target"]
        ]
        if self.args.eval_bleu_print_samples:
            logger.info(f"example hypothesis: {outputs[0]}")
            logger.info(f"example reference: {references[0]}")
        return outputs, references

    def _text(self, tokens: torch.Tensor, unknown: str) -> str:
        # Unknown words of output and reference are told apart: they never match.
        remove_bpe = self.args.eval_bleu_remove_bpe
        text = self.tgt_dict.string(tokens.int().cpu(), remove_bpe, unk_string=unknown)
        decoded: str = self._detokenizer.decode(text)
        return decoded

    def logging_outputs_can_be_summed(self, criterion: Any) -> bool:  # type: ignore[override]
        """Tells whether logging outputs may be summed over workers.

        Those of validation have more keys with `--eval-bleu`; then workers send them whole.
        """
        return not self.args.eval_bleu and bool(criterion.logging_outputs_can_be_summed())

    def reduce_metrics(self, logging_outputs: list[dict[str, Any]], criterion: Any) -> None:
        """Logs what all batches of an update, or of a validation, report together."""
        super().reduce_metrics(logging_outputs, criterion)
        if self.args.eval_bleu:
            log_bleu(logging_outputs)

    def max_positions(self) -> tuple[int, int]:
        """Returns the longest source and target that the task allows."""
        return self.args.max_source_positions, self.args.max_target_positions

    @property
    def source_dictionary(self) -> Dictionary:
        """The dictionary of the source."""
        return self.src_dict

    @property
    def target_dictionary(self) -> Dictionary:
        """The dictionary of the target."""
        return self.tgt_dict


def _no_languages(folder: str) -> str:
    if os.path.isfile(os.path.join(folder, "dict.txt")):
        return (
            f"{folder} holds data of one text (dict.txt), as language models read it, but this is "
            "--task translation; give --task language_modeling"
        )
    return (
        f"{folder}: no file name tells the languages, as train.en-de.en does; give --source-lang "
        "and --target-lang"
    )


def _check_bleu_options(cfg: Any) -> None:
    """Checks, before a training that needs them only at its end, the options of its BLEU."""
    given = {
        "--eval-bleu-args": _bleu_options(cfg),
        "--eval-bleu-detok-args": _detok_options(cfg),
    }
    if cfg.eval_bleu:
        _detokenizer(cfg)
        return
    for flag in (flag for flag, options in given.items() if options):
        raise ValueError(f"{flag} needs --eval-bleu")


def _bleu_options(cfg: Any) -> dict[str, Any]:
    return _read_options("--eval-bleu-args", cfg.eval_bleu_args, GenerationConfig)


def _detok_options(cfg: Any) -> dict[str, Any]:
    return _read_options("--eval-bleu-detok-args", cfg.eval_bleu_detok_args, _tokenizer(cfg))


def _read_options(flag: str, text: str | None, config: type[FairseqDataclass]) -> dict[str, Any]:
    """Reads options given as a JSON object, whose keys are fields of `config`."""
    try:
        given = json.loads(text or "{}")
    except ValueError as error:
        raise ValueError(f"{flag}: {text!r} is no JSON: {error}") from None
    known = {each.name for each in dataclasses.fields(config)} - {"_name"}
    if not isinstance(given, dict) or set(given) - known:
        raise ValueError(
            f"{flag}: {text!r} is not an object whose keys are among {', '.join(sorted(known))}"
        )
    return given


def _tokenizer(cfg: Any) -> type[FairseqDataclass]:
    """Returns the settings of the tokenizer that is chosen for BLEU."""
    TOKENIZERS.find(cfg.eval_bleu_detok)
    return TOKENIZERS.dataclass_of(cfg.eval_bleu_detok) or FairseqDataclass


def _detokenizer(cfg: Any) -> Any:
    config = _tokenizer(cfg)
    return build_tokenizer(config(_name=cfg.eval_bleu_detok, **_detok_options(cfg)))
