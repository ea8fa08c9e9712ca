"""Folders that `from_pretrained` loads, made of checkpoints, and back."""

from __future__ import annotations

from pathlib import Path

from fairseq.export import ExportedModel
from fairseq.huggingface.configuration import FairseqAlibiConfig
from fairseq.huggingface.modeling import FairseqAlibiForCausalLM
from fairseq.huggingface.tokenization import FairseqAlibiTokenizer
from fairseq.models.transformer_lm import TransformerLanguageModel

__all__ = ["read_pretrained", "to_pretrained", "write_pretrained"]


def to_pretrained(exported: ExportedModel) -> FairseqAlibiForCausalLM:
    """Returns the model as transformers has it; parameters are copied."""
    wrapped = FairseqAlibiForCausalLM(FairseqAlibiConfig(fairseq=exported.settings))
    wrapped.decoder.load_state_dict(exported.model.decoder.state_dict())
    return wrapped.eval()


def write_pretrained(exported: ExportedModel, folder: Path, dictionary: Path) -> None:
    """Writes model, configuration and tokenizer.

    Args:
        exported: the model.
        folder: where they go.
        dictionary: the `dict.txt` of the model.
    """
    to_pretrained(exported).save_pretrained(folder)
    FairseqAlibiTokenizer(str(dictionary)).save_pretrained(folder)


def read_pretrained(folder: Path) -> ExportedModel:
    """Reads what `write_pretrained` or `save_pretrained` wrote.

    Raises:
        FileNotFoundError: there is no configuration.
        ValueError: it is the folder of another kind of model.
    """
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"{folder} has no config.json, so it is no Hugging Face folder")
    config = FairseqAlibiConfig.from_pretrained(folder)
    if not config.fairseq:
        raise ValueError(f"{folder} holds a model that did not come from fairseq-export")
    wrapped = FairseqAlibiForCausalLM.from_pretrained(folder, config=config)
    return ExportedModel(config.fairseq, TransformerLanguageModel(wrapped.decoder).float())
