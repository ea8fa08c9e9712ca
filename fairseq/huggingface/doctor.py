"""Is a saved Hugging Face model's ALiBi really in effect?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fairseq.checkpoint.format import train_length_of
from fairseq.evaluation.doctor import FAIL, PASS, Finding, Patient, examine
from fairseq.export import config_of
from fairseq.huggingface.alibi import is_alibi
from fairseq.huggingface.bias import AlibiSettings
from fairseq.huggingface.loading import install
from fairseq.huggingface.probe import biases_of, probe, whole_models
from fairseq.huggingface.requirements import import_transformers
from fairseq.huggingface.surgery import MARKER

__all__ = ["examine_folder"]


def examine_folder(folder: Path) -> Iterator[Finding]:
    """Checks a folder that `save_pretrained` or fairseq-export wrote, one thing after the other.

    A language model of this project goes through the checks of `fairseq.evaluation.doctor`.

    Raises:
        FileNotFoundError: it is no such folder.
    """
    if not (folder / "config.json").exists():
        raise FileNotFoundError(
            f"--hf {folder}: there is no config.json; give a folder that save_pretrained wrote"
        )
    transformers = import_transformers()
    install()
    from fairseq.huggingface.configuration import FairseqAlibiConfig
    from fairseq.huggingface.registration import register

    register()
    config = transformers.AutoConfig.from_pretrained(folder)
    if isinstance(config, FairseqAlibiConfig):
        yield from _examine_own(folder)
        return
    noted = getattr(config, MARKER, None)
    if noted is None:
        text = f"{config.model_type} without ALiBi: its configuration has no {MARKER}"
        yield Finding("ALiBi is noted", FAIL, text)
        return
    yield Finding("ALiBi is noted", PASS, _describe(AlibiSettings(**noted)))
    try:
        model = _load(transformers, config, folder)
    except (RuntimeError, ValueError) as error:
        yield Finding("the model loads", FAIL, str(error))
        return
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    yield Finding("the model loads", PASS, f"{type(model).__name__}, {num_parameters:,} parameters")
    kinds = sorted({bias.kind for bias in biases_of(model).values()})
    status = PASS if is_alibi(model) else FAIL
    text = f"{len(biases_of(model))} attention modules, {', '.join(kinds)}"
    yield Finding("attention has a bias", status, text)
    for whole in whole_models(model):
        for name, is_so, text in probe(whole):
            yield Finding(name, PASS if is_so else FAIL, text)


def _examine_own(folder: Path) -> Iterator[Finding]:
    """Checks a folder with a language model of this project."""
    from fairseq.huggingface.export import read_pretrained

    try:
        exported = read_pretrained(folder)
    except (OSError, RuntimeError, ValueError) as error:
        yield Finding("the model loads", FAIL, str(error))
        return
    model = exported.model.eval()
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    text = f"a language model of this project, {num_parameters:,} parameters"
    yield Finding("the model loads", PASS, text)
    cfg = config_of(exported.settings)
    patient = Patient.of(
        model,
        cfg.model,
        train_length=train_length_of(cfg),
        stored_method=cfg.model.position_method or "alibi",
        stored_reason="as config.json says",
    )
    yield from examine(patient)


def _load(transformers: Any, config: Any, folder: Path) -> Any:
    names = config.architectures or []
    kind = getattr(transformers, names[0], None) if names else None
    return (kind or transformers.AutoModel).from_pretrained(folder)


def _describe(settings: AlibiSettings) -> str:
    parts = [f"gentlest slope 2**-{settings.bias_max:g}"]
    if settings.variant:
        parts.append(settings.variant)
    if settings.interpolation:
        parts.append(f"interpolation {dict(settings.interpolation)}")
    return ", ".join(parts)
