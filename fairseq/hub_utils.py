"""Checkpoints as objects that take text: sample, score, generate.

Scores are natural logarithms (nats).
"""

from __future__ import annotations

import argparse
import copy
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fairseq import checkpoint_utils, utils
from fairseq.data import encoders
from fairseq.data.data_utils import split_paths
from fairseq.dataclass.arguments import fill_dataclass
from fairseq.dataclass.configs import GenerationConfig
from fairseq.generation.layout import lay_out_for_generation
from fairseq.registry import BPES, TOKENIZERS, Registry

__all__ = ["GeneratorHubInterface", "from_pretrained"]

logger = logging.getLogger(__name__)

# Files beside a checkpoint that an encoding reads -> the setting that names them.
_CODES = {
    "code": "bpe_codes",
    "bpecodes": "bpe_codes",
    "sentencepiece.bpe.model": "sentencepiece_model",
    "merges.txt": "bpe_merges",
    "vocab.json": "bpe_vocab",
}


def from_pretrained(
    model_name_or_path: str,
    checkpoint_file: str = "model.pt",
    data_name_or_path: str = ".",
    **overrides: Any,
) -> GeneratorHubInterface:
    """Loads checkpoints, with the dictionary and the encodings that belong to them.

    Args:
        model_name_or_path: folder of the checkpoints, or the name of a published one.
        checkpoint_file: name of a file in the folder; several, separated by colons, make an
            ensemble.
        data_name_or_path: folder with the dictionary; one that begins with "." is looked for in
            the folder of the checkpoints.
        **overrides: settings that replace the stored ones; `bpe` and `tokenizer` name encodings.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a name is unknown, or a file does not fit.
    """
    from fairseq.checkpoint.download import PUBLISHED, published_checkpoint, published_data

    folder = Path(model_name_or_path)
    if model_name_or_path in PUBLISHED and not folder.exists():
        files = [str(published_checkpoint(model_name_or_path))]
        data = str(published_data(model_name_or_path, data_name_or_path))
    else:
        files = _files(folder, checkpoint_file)
        is_beside = data_name_or_path.startswith(".")
        data = str(folder / data_name_or_path) if is_beside else data_name_or_path
    names = {kind: overrides.pop(kind, None) for kind in ("bpe", "tokenizer")}
    codes = {
        setting: str(folder / file) for file, setting in _CODES.items() if (folder / file).exists()
    }
    settings = {**codes, **overrides}
    known = {name for name in overrides if name not in _settings_of_encodings()}
    models, cfg, task = checkpoint_utils.load_model_ensemble_and_task(
        files, {"data": data, **{name: overrides[name] for name in known}}
    )
    cfg.bpe = _section(BPES, names["bpe"], cfg.bpe, settings)
    cfg.tokenizer = _section(TOKENIZERS, names["tokenizer"], cfg.tokenizer, settings)
    return GeneratorHubInterface(cfg, task, models)


def _files(folder: Path, names: str) -> list[str]:
    files = [folder / name for name in split_paths(names)]
    for file in files:
        if not file.is_file():
            there = sorted(path.name for path in folder.glob("*.pt")) if folder.is_dir() else []
            has = f"it has {', '.join(there)}" if there else "there is no checkpoint in it"
            if not folder.is_dir():
                has = "there is no such folder, and no published checkpoint of that name"
            raise FileNotFoundError(f"{file}: no such checkpoint in {folder}; {has}")
    return [str(file) for file in files]


def _settings_of_encodings() -> set[str]:
    sections: list[Any] = [r.dataclass_of(name) for r in (BPES, TOKENIZERS) for name in r]
    return {name for section in sections if section is not None for name in section.field_types()}


def _section(registry: Registry, name: str | None, stored: Any, settings: dict[str, Any]) -> Any:
    """Returns the settings of an encoding, None if none is chosen."""
    name = name or getattr(stored, "_name", None) or (stored if isinstance(stored, str) else None)
    if name is None:
        return None
    registry.find(name)
    config = registry.dataclass_of(name)
    if config is None:
        return argparse.Namespace(_name=name)
    values = {**vars(stored), **settings} if hasattr(stored, "__dict__") else settings
    return fill_dataclass(config, argparse.Namespace(**values), name=name)


class GeneratorHubInterface(nn.Module):
    """Models with what turns text into ids and back.

    Args:
        cfg: configuration of the models.
        task: gives dictionaries and generators.
        models: an ensemble; they are made ready for generation.

    Attributes:
        src_dict: dictionary of the input.
        tgt_dict: dictionary of the output.
        tokenizer: None where there is none.
        bpe: None where there is none.
        max_positions: the longest input that training took.
    """

    def __init__(self, cfg: Any, task: Any, models: Sequence[nn.Module]) -> None:
        super().__init__()
        self.cfg = cfg
        self.task = task
        self.models = nn.ModuleList(models)
        self.src_dict = task.source_dictionary
        self.tgt_dict = task.target_dictionary
        model: Any
        for model in models:
            model.prepare_for_inference_(cfg)
        lay_out_for_generation(list(self.models))
        self.tokenizer = encoders.build_tokenizer(cfg.tokenizer)
        self.bpe = encoders.build_bpe(cfg.bpe)
        self.max_positions = utils.resolve_max_positions(
            task.max_positions(), *(each.max_positions() for each in list[Any](models))
        )
        self.register_buffer("_float_tensor", torch.zeros(1), persistent=False)

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        where: Any = self._float_tensor
        device: torch.device = where.device
        return device

    def translate(
        self, sentences: str | list[str], beam: int = 5, verbose: bool = False, **kwargs: Any
    ) -> Any:
        """Returns the best output for each sentence; see `sample`."""
        return self.sample(sentences, beam, verbose, **kwargs)

    def sample(
        self, sentences: str | list[str], beam: int = 1, verbose: bool = False, **kwargs: Any
    ) -> Any:
        """Continues, or translates, text.

        Args:
            sentences: one, or several.
            beam: hypotheses that are kept.
            verbose: log what `generate` logs.
            **kwargs: options of generation, such as `sampling`, `sampling_topk`, `temperature`,
                `max_len_b`.

        Returns:
            The best output as text; a list of them for a list.
        """
        if isinstance(sentences, str):
            return self.sample([sentences], beam, verbose, **kwargs)[0]
        tokens = [self.encode(sentence) for sentence in sentences]
        found = self.generate(tokens, beam, verbose, **kwargs)
        return [self.decode(hypotheses[0]["tokens"]) for hypotheses in found]

    def score(self, sentences: str | list[str], **kwargs: Any) -> Any:
        """Scores text.

        Args:
            sentences: one, or several.
            **kwargs: as of `generate`.

        Returns:
            For each sentence a dictionary: `tokens` (int64), `positional_scores` (nats, one for
            each token; `</s>` is not scored), `score` (their mean). The perplexity is
            `positional_scores.mean().neg().exp()`.
        """
        if isinstance(sentences, str):
            return self.score([sentences], **kwargs)[0]
        tokens = [self.encode(sentence) for sentence in sentences]
        return [each[0] for each in self.generate(tokens, score_reference=True, **kwargs)]

    @torch.no_grad()
    def generate(
        self,
        tokenized_sentences: Any,
        beam: int = 5,
        verbose: bool = False,
        skip_invalid_size_inputs: bool = False,
        inference_step_args: dict[str, Any] | None = None,
        prefix_allowed_tokens_fn: None = None,
        **kwargs: Any,
    ) -> Any:
        """Generates from ids.

        Args:
            tokenized_sentences: int64 vectors, or one of them.
            beam: hypotheses that are kept.
            verbose: log sources, hypotheses and scores.
            skip_invalid_size_inputs: leave out inputs that are too long.
            inference_step_args: further arguments of the task's `inference_step`.
            prefix_allowed_tokens_fn: has to be None.
            **kwargs: options of generation.

        Returns:
            For each input its hypotheses, best first, see `SequenceGenerator.generate`; those of
            the one input if it was one.

        Raises:
            ValueError: options contradict each other, or an input is too long.
            TypeError: an option is unknown.
        """
        if prefix_allowed_tokens_fn is not None:
            raise ValueError("prefix_allowed_tokens_fn is not supported; leave it out")
        if torch.is_tensor(tokenized_sentences) and tokenized_sentences.dim() == 1:
            return self.generate([tokenized_sentences], beam, verbose, **kwargs)[0]
        options = copy.deepcopy(getattr(self.cfg, "generation", None) or GenerationConfig())
        for name, value in {"beam": beam, **kwargs}.items():
            if name not in GenerationConfig.field_types():
                raise TypeError(f"{name} is no option of generation")
            setattr(options, name, value)
        generator = self.task.build_generator(list(self.models), options)
        found: dict[int, Any] = {}
        for batch in self._batches(tokenized_sentences, skip_invalid_size_inputs):
            sample = utils.apply_to_sample(lambda tensor: tensor.to(self.device), batch)
            hypotheses = self.task.inference_step(
                generator, list(self.models), sample, **(inference_step_args or {})
            )
            found.update(zip(batch["id"].tolist(), hypotheses, strict=True))
        ordered = [found[row] for row in sorted(found)]
        if verbose:
            self._tell(tokenized_sentences, found)
        return ordered

    def _batches(self, tokens: Any, skip_invalid: bool) -> Iterator[dict[str, Any]]:
        lengths = [each.numel() for each in tokens]
        dataset = self.task.build_dataset_for_inference(list(tokens), lengths)
        limits = [self.task.max_positions()]
        model: Any
        for model in self.models:
            decoder: Any = getattr(model, "decoder", None)
            is_free = not hasattr(model, "encoder") and hasattr(decoder, "position_limit")
            limits.append(decoder.position_limit if is_free else model.max_positions())
        batches: Iterator[dict[str, Any]] = self.task.get_batch_iterator(
            dataset=dataset,
            max_tokens=self.cfg.dataset.max_tokens,
            max_sentences=self.cfg.dataset.batch_size,
            max_positions=utils.resolve_max_positions(*limits),
            ignore_invalid_inputs=skip_invalid,
            disable_iterator_cache=True,
            allow_oversized=True,
        ).next_epoch_itr(shuffle=False)
        return batches

    def _tell(self, tokens: Any, found: dict[int, Any]) -> None:
        for row, hypotheses in sorted(found.items()):
            logger.info(f"S\t{self.string(tokens[row])}")
            for hypothesis in hypotheses:
                scores = " ".join(f"{each:.4f}" for each in hypothesis["positional_scores"])
                logger.info(f"H\t{hypothesis['score']}\t{self.decode(hypothesis['tokens'])}")
                logger.info(f"P\t{scores}")

    def encode(self, sentence: str) -> torch.Tensor:
        """Returns a sentence as ids, int64, `</s>` at its end."""
        return self.binarize(self.apply_bpe(self.tokenize(sentence)))

    def decode(self, tokens: torch.Tensor) -> str:
        """Returns ids as a sentence."""
        return self.detokenize(self.remove_bpe(self.string(tokens)))

    def tokenize(self, sentence: str) -> str:
        """Returns the words of a sentence, separated by spaces."""
        return sentence if self.tokenizer is None else str(self.tokenizer.encode(sentence))

    def detokenize(self, sentence: str) -> str:
        """Undoes `tokenize`."""
        return sentence if self.tokenizer is None else str(self.tokenizer.decode(sentence))

    def apply_bpe(self, sentence: str) -> str:
        """Returns the pieces of words, separated by spaces."""
        return sentence if self.bpe is None else str(self.bpe.encode(sentence))

    def remove_bpe(self, sentence: str) -> str:
        """Undoes `apply_bpe`."""
        return sentence if self.bpe is None else str(self.bpe.decode(sentence))

    def binarize(self, sentence: str) -> torch.Tensor:
        """Returns the ids of pieces, int64, `</s>` at their end."""
        ids: torch.Tensor = self.src_dict.encode_line(sentence, add_if_not_exist=False).long()
        return ids

    def string(self, tokens: torch.Tensor) -> str:
        """Returns the pieces that ids stand for."""
        text: str = self.tgt_dict.string(tokens)
        return text
