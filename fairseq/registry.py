"""What can be chosen by name on the command line, and where it lives.

One `Registry` per kind of component. The built-in names stand in the tables at the end of this
file with the module that defines each; a module is imported when its name is asked for, so that
listing the choices loads neither torch nor anything else. Plug-ins (`--user-dir`) add names with
the `register_*` decorators of the package faces, which are the `register` methods below.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

__all__ = [
    "ARCHITECTURES",
    "BPES",
    "COMPONENT_REGISTRIES",
    "CRITERIONS",
    "LR_SCHEDULERS",
    "MODELS",
    "OPTIMIZERS",
    "SCORERS",
    "TASKS",
    "TOKENIZERS",
    "ArchitectureRegistry",
    "Registry",
    "close_names",
    "nearest_first",
]

T = TypeVar("T")


def close_names(name: str, known: Iterable[str]) -> list[str]:
    """Returns up to three known names that `name` may be a slip of, the closest first."""
    return difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.72)


def nearest_first(name: str, known: Iterable[str]) -> list[str]:
    """Returns the known names, those that resemble `name` before the others."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return close + [k for k in known if k not in close]


class Registry(Mapping[str, Any]):
    """A table of named components of one kind.

    Args:
        kind: what the entries are, in words and as the flag has it (`lr_scheduler`).
        builtin: name -> module that registers it when imported.
        base_class: `module:Class` every registered class must derive from, or None.
        unsupported: name -> reason, for names the original has and this project does not.
        default: the name used when the command line gives none.
    """

    def __init__(
        self,
        kind: str,
        builtin: Mapping[str, str],
        *,
        base_class: str | None = None,
        unsupported: Mapping[str, str] | None = None,
        default: str | None = None,
    ) -> None:
        self.kind = kind
        self.default = default
        self.unsupported: dict[str, str] = dict(unsupported or {})
        self._builtin = dict(builtin)
        self._base_class = base_class
        self._classes: dict[str, Any] = {}
        self._dataclasses: dict[str, type] = {}

    def register(self, name: str, dataclass: type | None = None) -> Callable[[T], T]:
        """Returns the decorator that adds a class under `name`.

        Raises:
            ValueError: the name is taken, the class does not derive from the base class of this
                kind, or the dataclass is no `FairseqDataclass`.
        """

        def add(cls: T) -> T:
            self._check_new(name, cls)
            if dataclass is not None:
                self._check_dataclass(name, dataclass)
                self._dataclasses[name] = dataclass
            self._classes[name] = cls
            return cls

        return add

    def _check_new(self, name: str, cls: Any) -> None:
        if name in self._classes or (name in self._builtin and not self._is_builtin(name, cls)):
            raise ValueError(f"Cannot register duplicate {self.kind} ({name})")
        if self._base_class is not None and isinstance(cls, type):
            module, _, attribute = self._base_class.partition(":")
            base = getattr(importlib.import_module(module), attribute)
            if not issubclass(cls, base):
                raise ValueError(
                    f"{self.kind} ({name}: {cls.__name__}) must extend {base.__name__}"
                )

    def _is_builtin(self, name: str, cls: Any) -> bool:
        return getattr(cls, "__module__", None) == self._builtin[name]

    def _check_dataclass(self, name: str, dataclass: type) -> None:
        from fairseq.dataclass import FairseqDataclass

        if not issubclass(dataclass, FairseqDataclass):
            raise ValueError(f"Dataclass of {self.kind} ({name}) must extend FairseqDataclass")

    def __getitem__(self, name: str) -> Any:
        if name not in self._classes:
            if name in self.unsupported:
                raise ValueError(f"{self.kind} {name!r} is not supported: {self.unsupported[name]}")
            if name not in self._builtin:
                raise KeyError(name)
            importlib.import_module(self._builtin[name])
        return self._classes[name]

    def find(self, name: str | None) -> Any:
        """Returns the class called `name`.

        Raises:
            ValueError: no such name; the message lists the known ones, nearest first.
        """
        if name is None or (name not in self and name not in self.unsupported):
            known = ", ".join(nearest_first(str(name), self))
            raise ValueError(f"unknown {self.kind} {name!r}; known are {known}")
        return self[name]

    def dataclass_of(self, name: str) -> type | None:
        """Returns the config dataclass registered with `name`, None if it has none."""
        if name in self:
            self[name]
        return self._dataclasses.get(name)

    def __contains__(self, name: object) -> bool:
        return name in self._classes or name in self._builtin

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(set(self._classes) | set(self._builtin)))

    def __len__(self) -> int:
        return len(set(self._classes) | set(self._builtin))

    def __repr__(self) -> str:
        return f"Registry({self.kind}: {', '.join(self)})"


class ArchitectureRegistry(Registry):
    """Named presets: arch -> (model name, function that fills a namespace)."""

    def __init__(self, kind: str, builtin: Mapping[str, str], **options: Any) -> None:
        super().__init__(kind, builtin, **options)
        self._model_of: dict[str, str] = {}

    def register_preset(self, model_name: str, arch_name: str) -> Callable[[T], T]:
        """Returns the decorator that adds a preset function of a registered model.

        Raises:
            ValueError: the model is unknown or the arch name is taken.
        """

        def add(preset: T) -> T:
            if model_name not in MODELS:
                raise ValueError(
                    f"Cannot register model architecture for unknown model type ({model_name})"
                )
            if not callable(preset):
                raise ValueError(f"Model architecture must be callable ({arch_name})")
            self._check_new(arch_name, preset)
            self._classes[arch_name] = preset
            self._model_of[arch_name] = model_name
            return preset

        return add

    def model_of(self, arch_name: str) -> str:
        """Returns the name of the model an arch is a preset of."""
        self.find(arch_name)
        return self._model_of[arch_name]

    def preset_of(self, arch_name: str) -> Callable[[Any], None]:
        """Returns the function that sets an arch's values where a namespace has none."""
        preset: Callable[[Any], None] = self.find(arch_name)
        return preset


def _table(package: str, *names: str, **elsewhere: str) -> dict[str, str]:
    table = {name: f"{package}.{name}" for name in names}
    table.update({name: f"{package}.{module}" for name, module in elsewhere.items()})
    return table


TASKS = Registry(
    "task",
    _table("fairseq.tasks", "language_modeling", "translation"),
    base_class="fairseq.tasks.fairseq_task:FairseqTask",
)

MODELS = Registry(
    "model",
    {
        "transformer": "fairseq.models.transformer.transformer_model",
        "transformer_lm": "fairseq.models.transformer.transformer_lm",
    },
    base_class="fairseq.models.base:BaseFairseqModel",
)

ARCHITECTURES = ArchitectureRegistry(
    "arch",
    {
        "transformer_lm": "fairseq.models.transformer_lm_archs",
        **{
            f"transformer_lm_{size}": "fairseq.models.transformer_lm_archs"
            for size in (
                "big",
                "baevski_wiki103",
                "wiki103",
                "baevski_gbw",
                "gbw",
                "gpt",
                "gpt2_tiny",
                "gpt2_small",
                "gpt2_medium",
                "gpt2_big",
                "gpt3_small",
                "gpt3_medium",
                "gpt3_large",
                "gpt3_xl",
                "gpt3_2_7",
                "gpt3_6_7",
                "gpt3_13",
                "gpt3_175",
            )
        },
        **dict.fromkeys(
            (
                "transformer",
                "transformer_tiny",
                "transformer_iwslt_de_en",
                "transformer_wmt_en_de",
                "transformer_vaswani_wmt_en_de_big",
                "transformer_vaswani_wmt_en_fr_big",
                "transformer_wmt_en_de_big",
                "transformer_wmt_en_de_big_t2t",
            ),
            "fairseq.models.transformer_archs",
        ),
    },
    unsupported={
        "transformer_lm_megatron": "it needs the Megatron fork's model-parallel package",
        "transformer_lm_megatron_11b": "it needs the Megatron fork's model-parallel package",
    },
)

CRITERIONS = Registry(
    "criterion",
    _table("fairseq.criterions", "adaptive_loss", "cross_entropy", "label_smoothed_cross_entropy"),
    base_class="fairseq.criterions.fairseq_criterion:FairseqCriterion",
    default="cross_entropy",
)

OPTIMIZERS = Registry(
    "optimizer",
    _table("fairseq.optim", "nag", "adam", "sgd", "adagrad", "adafactor", "adadelta", "adamax"),
    base_class="fairseq.optim.fairseq_optimizer:FairseqOptimizer",
    unsupported={
        "lamb": "it needs apex; use adam",
        "cpu_adam": "it needs DeepSpeed's compiled extension; use adam",
        "composite": "per-group optimizers are not provided; use one of the others",
    },
)

LR_SCHEDULERS = Registry(
    "lr_scheduler",
    _table(
        "fairseq.optim.lr_scheduler",
        cosine="cosine_schedule",
        fixed="fixed_schedule",
        inverse_sqrt="inverse_square_root_schedule",
        manual="manual_schedule",
        pass_through="pass_through_schedule",
        polynomial_decay="polynomial_decay_schedule",
        reduce_lr_on_plateau="reduce_lr_on_plateau_schedule",
        tri_stage="tri_stage_schedule",
        triangular="triangular_schedule",
    ),
    base_class="fairseq.optim.lr_scheduler.fairseq_lr_scheduler:FairseqLRScheduler",
    default="fixed",
)

TOKENIZERS = Registry(
    "tokenizer",
    _table(
        "fairseq.data.encoders",
        moses="moses_tokenizer",
        nltk="nltk_tokenizer",
        space="space_tokenizer",
    ),
)
_NO_BYTES = "its symbols for bytes are upstream's own; use hf_byte_bpe or sentencepiece"
BPES = Registry(
    "bpe",
    _table(
        "fairseq.data.encoders",
        "characters",
        gpt2="byte_level_bpe",
        hf_byte_bpe="byte_level_bpe",
        sentencepiece="sentencepiece_bpe",
        subword_nmt="subword_nmt_bpe",
    ),
    unsupported={
        "bert": "its pieces belong to models that this project does not have; use sentencepiece",
        "byte_bpe": _NO_BYTES,
        "bytes": _NO_BYTES,
        "fastbpe": "its library has to be compiled; use subword_nmt",
    },
)
SCORERS = Registry(
    "scoring",
    _table("fairseq.scoring", "bleu", "chrf", sacrebleu="bleu"),
    base_class="fairseq.scoring.base:BaseScorer",
    unsupported={"wer": "it is a score of speech recognition; use bleu, sacrebleu or chrf"},
    default="bleu",
)
SIMUL_TYPES = Registry(
    "simul_type",
    {},
    unsupported=dict.fromkeys(
        (
            "chunkwise",
            "hard_aligned",
            "infinite_lookback",
            "waitk",
            "waitk_fixed_pre_decision",
        ),
        "simultaneous translation is not provided",
    ),
)

COMPONENT_REGISTRIES: dict[str, Registry] = {
    "criterion": CRITERIONS,
    "tokenizer": TOKENIZERS,
    "bpe": BPES,
    "simul_type": SIMUL_TYPES,
    "optimizer": OPTIMIZERS,
    "lr_scheduler": LR_SCHEDULERS,
    "scoring": SCORERS,
}
"""The selectors every command has, in the order in which their options are added."""
