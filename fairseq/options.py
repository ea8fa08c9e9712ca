"""What each command accepts.

A parser starts with the groups every command of its kind has; `parse_args_and_arch` then adds the
options of the task, the architecture and the other components that the command line names, parses
once more and strictly, and applies the architecture's preset to what was not given.
Priority, low to high: dataclass default, preset, settings file (`--config`), command line.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from fairseq.dataclass.arguments import CommandParser, literal_dict, whole_number
from fairseq.dataclass.base import FairseqDataclass, is_interpolated
from fairseq.dataclass.configs import (
    CheckpointConfig,
    CommonConfig,
    CommonEvalConfig,
    DatasetConfig,
    DistributedTrainingConfig,
    EMAConfig,
    EvalLMConfig,
    GenerationConfig,
    InteractiveConfig,
    OptimizationConfig,
)
from fairseq.dataclass.settings_file import check_names, expand_config
from fairseq.registry import (
    ARCHITECTURES,
    COMPONENT_REGISTRIES,
    MODELS,
    TASKS,
    Registry,
    close_names,
    nearest_first,
)

__all__ = [
    "get_diagnose_parser",
    "get_doctor_parser",
    "get_eval_lm_parser",
    "get_extrapolate_parser",
    "get_generation_parser",
    "get_interactive_generation_parser",
    "get_parser",
    "get_preprocessing_parser",
    "get_training_parser",
    "get_validation_parser",
    "parse_args",
    "parse_args_and_arch",
]


def _name_in(registry: Registry) -> Callable[[str], str]:
    """Returns argparse's check of a component name; plug-ins count as soon as they are imported."""

    def check(name: str) -> str:
        if name in registry or name in registry.unsupported:
            return name
        known = ", ".join(nearest_first(name, registry))
        raise argparse.ArgumentTypeError(f"unknown {registry.kind} {name!r}; known are {known}")

    return check


def get_parser(description: str, default_task: str | None = "language_modeling") -> CommandParser:
    """Returns a parser with the options that every command has."""
    parser = CommandParser(description=description)
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file with options; the command line wins over it"
    )
    parser.add_dataclass("common", CommonConfig)
    selectors = parser.add_argument_group("components")
    for name, registry in COMPONENT_REGISTRIES.items():
        _add_selector(selectors, name, registry, registry.default)
    _add_selector(selectors, "task", TASKS, default_task)
    return parser


def _add_selector(group: Any, name: str, registry: Registry, default: str | None) -> None:
    flag = "--" + name.replace("_", "-")
    group.add_argument(
        flag,
        default=default,
        type=_name_in(registry),
        metavar="NAME",
        help=", ".join(registry) or argparse.SUPPRESS,
    )


def _visible_gpus() -> int:
    import torch

    return int(torch.cuda.device_count())


def _add_distributed(parser: CommandParser, world_size: int) -> None:
    parser.add_dataclass("distributed training", DistributedTrainingConfig)
    parser.set_defaults(distributed_world_size=world_size, nprocs_per_node=max(1, _visible_gpus()))
    if os.environ.get("LOCAL_RANK", "").isdigit():
        parser.set_defaults(device_id=int(os.environ["LOCAL_RANK"]))


def get_preprocessing_parser(default_task: str | None = "translation") -> CommandParser:
    """Returns the parser of fairseq-preprocess, without loading torch."""
    parser = get_parser("Make a dictionary and binarize text.", default_task)
    group = parser.add_argument_group("preprocessing")
    add = group.add_argument
    add("-s", "--source-lang", metavar="SRC", help="source language (suffix of the files)")
    add("-t", "--target-lang", metavar="TARGET", help="target language (suffix of the files)")
    add("--trainpref", metavar="FP", help="training text (without the language suffix)")
    add("--validpref", metavar="FP", help="validation texts, separated by commas")
    add("--testpref", metavar="FP", help="test texts, separated by commas")
    add("--align-suffix", metavar="FP", help="suffix of alignment files")
    add("--destdir", metavar="DIR", default="data-bin", help="folder for the output")
    add("--thresholdtgt", metavar="N", default=0, type=int, help="rarer target words are unknown")
    add("--thresholdsrc", metavar="N", default=0, type=int, help="rarer source words are unknown")
    add("--tgtdict", metavar="FP", help="target dictionary to use instead of making one")
    add("--srcdict", metavar="FP", help="source dictionary to use instead of making one")
    limit: dict[str, Any] = {"metavar": "N", "default": -1, "type": whole_number(-1)}
    add("--nwordstgt", help="most target words to keep (default: all, -1)", **limit)
    add("--nwordssrc", help="most source words to keep (default: all, -1)", **limit)
    add("--alignfile", metavar="ALIGN", help="alignments, for a dictionary of translations")
    add(
        "--dataset-impl",
        metavar="FORMAT",
        default="mmap",
        choices=["raw", "lazy", "cached", "mmap", "fasta"],
        help="format of the output: mmap, cached, lazy or raw",
    )
    add("--joined-dictionary", action="store_true", help="one dictionary for both languages")
    add("--only-source", action="store_true", help="only the source side, as for language models")
    add("--padding-factor", metavar="N", default=8, type=int, help="pad the dictionary's size")
    add("--workers", metavar="N", default=1, type=whole_number(1), help="number of processes")
    add("--dict-only", action="store_true", help="make the dictionary and stop")
    return parser


def get_training_parser(default_task: str | None = "language_modeling") -> CommandParser:
    """Returns the parser of fairseq-train."""
    parser = get_parser("Train a model.", default_task)
    parser.add_dataclass("dataset and batches", DatasetConfig)
    _add_distributed(parser, max(1, _visible_gpus()))
    model = parser.add_argument_group("model")
    model.add_argument(
        "-a",
        "--arch",
        type=_name_in(ARCHITECTURES),
        metavar="ARCH",
        help="architecture: " + ", ".join(ARCHITECTURES),
    )
    parser.add_dataclass("optimization", OptimizationConfig)
    parser.add_dataclass("checkpoints", CheckpointConfig)
    parser.add_dataclass("moving average", EMAConfig)
    return parser


def _evaluation_parser(description: str, default_task: str | None) -> CommandParser:
    parser = get_parser(description, default_task)
    parser.add_dataclass("dataset and batches", DatasetConfig)
    _add_distributed(parser, 1)
    _add_checkpoint_options(parser)
    return parser


def _add_checkpoint_options(parser: CommandParser) -> None:
    parser.add_dataclass("evaluation", CommonEvalConfig)
    _add_position_options(parser)


def _add_position_options(parser: CommandParser) -> None:
    parser.add_argument(
        "--position-method",
        metavar="NAME",
        help="position method of the checkpoint's model, where the file does not tell or is wrong",
    )
    parser.add_dataclass("position method", _position_config(), suppress_defaults=True)


def _position_config() -> type[FairseqDataclass]:
    from fairseq.positions import PositionConfig

    return PositionConfig


def get_eval_lm_parser(default_task: str | None = "language_modeling") -> CommandParser:
    """Returns the parser of fairseq-eval-lm."""
    parser = _evaluation_parser("Evaluate a language model's perplexity.", default_task)
    parser.add_dataclass("language model evaluation", EvalLMConfig)
    return parser


def get_generation_parser(
    interactive: bool = False, default_task: str | None = "translation"
) -> CommandParser:
    """Returns the parser of fairseq-generate, or that of fairseq-interactive."""
    if interactive:
        description = "Generate outputs for lines of text, one after another."
    else:
        description = "Generate, or score, outputs for a binarized split."
    parser = get_parser(description, default_task)
    output = parser.add_argument_group("output")
    if not interactive:
        # What other commands refuse.
        output.add_argument("--quiet", action="store_true", help="print only the final scores")
        output.add_argument(
            "--results-path",
            metavar="PATH",
            help="folder for generate-SUBSET.txt, which takes what is printed",
        )
    parser.add_dataclass("dataset and batches", DatasetConfig)
    _add_distributed(parser, 1)
    _add_checkpoint_options(parser)
    parser.add_dataclass("generation", GenerationConfig)
    parser.add_dataclass("checkpoints", CheckpointConfig)
    if interactive:
        parser.add_dataclass("interactive", InteractiveConfig)
    return parser


def get_interactive_generation_parser(default_task: str | None = "translation") -> CommandParser:
    """Returns the parser of fairseq-interactive."""
    return get_generation_parser(interactive=True, default_task=default_task)


def get_extrapolate_parser(default_task: str | None = "language_modeling") -> CommandParser:
    """Returns the parser of fairseq-extrapolate."""
    parser = get_parser("Evaluate language models at many lengths.", default_task)
    sweep = parser.add_argument_group("sweep")
    sweep.add_argument(
        "--lengths",
        type=_distinct(),
        metavar="L,...",
        help="tokens in a window (default: 1, 2, 4, 8 and 16 times the training length)",
    )
    sweep.add_argument(
        "--strides",
        type=_distinct("length"),
        default=["length"],
        metavar="S,...",
        help="new tokens in a window; the word length for windows that do not overlap (default)",
    )
    sweep.add_argument(
        "--results-path",
        required=True,
        metavar="DIR",
        help="folder for report, pictures and what is done so far",
    )
    sweep.add_argument("--gen-subset", default="valid", help="split to evaluate (default: valid)")
    sweep.add_argument("--no-plots", action="store_true", help="no pictures, no matplotlib")
    sweep.add_argument(
        "--num-workers",
        type=int,
        default=0,
        metavar="N",
        help="processes that load data (default: 0; starting one takes longer than most rows)",
    )
    for flag in ("--tokens-per-sample", "--context-window"):
        sweep.add_argument(flag, type=_decided_by_the_sweep, help=argparse.SUPPRESS)
    parser.add_dataclass("dataset and batches", DatasetConfig)
    _add_checkpoint_options(parser)
    return parser


def _distinct(word: str | None = None) -> Callable[[str], list[int | str]]:
    """Returns argparse's reader of numbers from 1, all different, separated by commas.

    Args:
        word: allowed in place of a number.
    """
    allowed = "whole numbers from 1" + (f" and the word {word!r}" if word else "")

    def read(text: str) -> list[int | str]:
        values: list[int | str] = []
        for part in (part.strip() for part in text.split(",")):
            value = part if part == word else int(part) if part.isdecimal() else 0
            if value == 0:
                raise argparse.ArgumentTypeError(
                    f"{part!r} in {text!r}; allowed are {allowed}, separated by commas"
                )
            if value in values:
                raise argparse.ArgumentTypeError(f"{part} is in {text!r} twice; give it once")
            values.append(value)
        return values

    return read


def _decided_by_the_sweep(text: str) -> None:
    raise argparse.ArgumentTypeError(
        "the sweep sets it for each evaluation; give --lengths and --strides instead"
    )


def get_validation_parser(default_task: str | None = "language_modeling") -> CommandParser:
    """Returns the parser of fairseq-validate."""
    return _evaluation_parser("Validate a checkpoint as training does.", default_task)


def _inspection_parser(
    description: str, default_task: str | None, *, path_help: str, data: set[str], common: set[str]
) -> CommandParser:
    """Returns a parser with what it takes to look at a checkpoint in one process.

    Args:
        description: what the command does.
        default_task: task whose options are accepted.
        path_help: help of `--path`.
        data: fields of `DatasetConfig` that are accepted.
        common: fields of `CommonConfig` that are.
    """
    parser = CommandParser(description=description)
    group = parser.add_argument_group("checkpoint and text")
    group.add_argument("--path", metavar="FILE", help=path_help)
    group.add_argument(
        "--gen-subset", metavar="SUBSET", default="valid", help="split to read (default: valid)"
    )
    parser.add_dataclass("settings", CommonEvalConfig, only={"model_overrides"})
    _add_position_options(parser)
    parser.add_dataclass("dataset and batches", DatasetConfig, only=data)
    parser.add_dataclass("common", CommonConfig, only=common)
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file with options; the command line wins over it"
    )
    parser.set_defaults(task=default_task)
    return parser


def get_diagnose_parser(default_task: str | None = "language_modeling") -> CommandParser:
    """Returns the parser of fairseq-diagnose."""
    parser = _inspection_parser(
        "Show what each attention head of a language model looks at, on real text.",
        default_task,
        path_help="checkpoint to diagnose",
        data={"max_tokens", "batch_size", "num_workers", "data_buffer_size", "dataset_impl"},
        common={"cpu", "user_dir", "no_progress_bar", "log_format", "log_interval"},
    )
    group = parser.add_argument_group("diagnosis")
    group.add_argument(
        "--results-path",
        metavar="DIR",
        help="folder for heads.json, heads.csv and heads.png; without it the table is printed only",
    )
    group.add_argument(
        "--max-batches",
        metavar="N",
        type=int,
        default=16,
        help="batches of text to read; 0 reads the whole split (default: 16)",
    )
    group.add_argument("--no-plots", action="store_true", help="no picture, no matplotlib")
    return parser


def get_doctor_parser(default_task: str | None = "language_modeling") -> CommandParser:
    """Returns the parser of fairseq-doctor; its data folder is optional."""
    parser = _inspection_parser(
        "Check that a checkpoint's position method is really in effect; exit code 1 if a check "
        "fails. Without a data folder the model reads random words.",
        default_task,
        path_help="checkpoint to examine",
        data={"dataset_impl"},
        common={"cpu", "user_dir"},
    )
    parser.add_argument(
        "--hf", metavar="DIR", help="folder of a Hugging Face model to examine, instead of --path"
    )
    return parser


def parse_args(
    parser: CommandParser,
    input_args: Sequence[str] | None = None,
    *,
    complete: Callable[[argparse.Namespace, bool], None] | None = None,
    parse_known: bool = False,
) -> Any:
    """Parses a command line: settings file, plug-ins, options, refusal of the unsupported.

    Args:
        parser: the command's parser.
        input_args: the arguments; None takes those of the process.
        complete: called with a first, lenient parse and whether it may fail, to add options.
        parse_known: return (namespace, unknown arguments) instead of failing on the latter.
    """
    from fairseq.utils import import_user_module

    argv = [_spelled_as_before(a) for a in (sys.argv[1:] if input_args is None else input_args)]
    try:
        argv, settings, path = expand_config(argv)
        plug_ins = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        plug_ins.add_argument("--user-dir", default=None)
        import_user_module(plug_ins.parse_known_args(argv)[0])
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))
    if complete is not None:
        complete(_lenient(parser, argv), True)
    if path is not None:
        check_names(parser, settings, path, lambda flag: _hint(parser, flag))
    args, unknown = parser.parse_known_args(argv)
    if unknown and not parse_known:
        parser.error(_unrecognized(parser, unknown))
    if getattr(args, "data", "") is None:
        args.data = settings.get("data")
    args.config = path
    parser.refuse_unsupported(args)
    _refuse_unsupported_names(parser, args)
    return (args, unknown) if parse_known else args


def _spelled_as_before(argument: str) -> str:
    """Maps the spelling of newer torch launchers to the one older ones used."""
    if argument == "--local-rank" or argument.startswith("--local-rank="):
        return argument.replace("--local-rank", "--local_rank", 1)
    return argument


def _lenient(parser: CommandParser, argv: list[str]) -> argparse.Namespace:
    """Parses what is known so far; `--help` and what is missing must wait for all options."""
    required = [action for action in parser._actions if action.required]
    for action in required:
        action.required = False
    try:
        return parser.parse_known_args([a for a in argv if a not in ("-h", "--help")])[0]
    finally:
        for action in required:
            action.required = True


def _unrecognized(parser: CommandParser, unknown: list[str]) -> str:
    hints = []
    for argument in unknown:
        if argument.startswith("--"):
            flag = argument.split("=")[0]
            said = _hint(parser, flag)
            hints += [f"{flag} ({said})"] if said else []
    tail = "; " + "; ".join(hints) if hints else ""
    return f"unrecognized arguments: {' '.join(unknown)}{tail}"


def _hint(parser: CommandParser, flag: str) -> str:
    """Returns what a flag that a command does not have may be: another's, a slip, or nothing."""
    owners = _components_with(parser, flag)
    if owners:
        return f"an option of {', '.join(owners)}"
    makers: dict[str, Callable[[], CommandParser]] = {
        "fairseq-train": get_training_parser,
        "fairseq-eval-lm": get_eval_lm_parser,
        "fairseq-generate": get_generation_parser,
    }
    for command, make in makers.items():
        if flag in make().usable_flags():
            return f"an option of {command}"
    # Dashes alone resemble each other and would make everything a little closer.
    names = {known.lstrip("-"): known for known in parser.usable_flags() if known[:2] == "--"}
    near = [names[name] for name in close_names(flag.lstrip("-"), names)]
    if not near:
        return ""
    return f"did you mean {'one of ' if len(near) > 1 else ''}{', '.join(near)}?"


def _components_with(parser: CommandParser, flag: str) -> list[str]:
    """Returns the choices of this command, such as `--task NAME`, that would add a flag."""
    field = flag.removeprefix("--").replace("-", "_")
    found = []
    for name, registry in {"task": TASKS, **COMPONENT_REGISTRIES}.items():
        selector = "--" + name.replace("_", "-")
        if selector in parser.usable_flags():
            for each in registry:
                if _has_option(registry.dataclass_of(each), field):
                    found.append(f"{selector} {each}")
    return found


def _has_option(config: type[FairseqDataclass] | None, name: str) -> bool:
    if config is None:
        return False
    for field in dataclasses.fields(config):
        if field.name == name:
            is_own = not is_interpolated(config.default_of(field))
            return is_own and not field.metadata.get("unsupported")
    return False


def _refuse_unsupported_names(parser: CommandParser, args: argparse.Namespace) -> None:
    for name, registry in {**COMPONENT_REGISTRIES, "task": TASKS, "arch": ARCHITECTURES}.items():
        chosen = getattr(args, name, None)
        if chosen in registry.unsupported and chosen != parser.get_default(name):
            flag = "--" + name.replace("_", "-")
            parser.error(f"{flag} {chosen} is not supported: {registry.unsupported[chosen]}")


def parse_args_and_arch(
    parser: CommandParser,
    input_args: Sequence[str] | None = None,
    parse_known: bool = False,
    suppress_defaults: bool = False,
    modify_parser: Callable[[CommandParser], None] | None = None,
    *,
    needs_data: bool = True,
) -> Any:
    """Parses a command line with the options of the components it names.

    Args:
        parser: one of the parsers above.
        input_args: the arguments; None takes those of the process.
        parse_known: return (namespace, unknown arguments) instead of failing on the latter.
        suppress_defaults: return only what was given explicitly.
        modify_parser: a last chance to add options.
        needs_data: whether a command line without a data folder is an error.

    Returns:
        The flat namespace; with an `--arch`, its preset has filled what was not given.
    """
    wants_arch = "--arch" in parser.known_flags()

    def complete(first: argparse.Namespace, may_fail: bool) -> None:
        if wants_arch and first.arch is None and "-h" not in sys.argv and "--help" not in sys.argv:
            parser.error(f"--arch is needed; it is one of {', '.join(ARCHITECTURES)}")
        _refuse_unsupported_names(parser, first)
        _add_component_options(parser, first)
        if modify_parser is not None:
            modify_parser(parser)

    parsed = parse_args(parser, input_args, complete=complete, parse_known=parse_known)
    args, unknown = parsed if parse_known else (parsed, [])
    if suppress_defaults:
        args = _explicit_only(parser, input_args)
        return (args, unknown) if parse_known else args
    if needs_data and hasattr(args, "data") and args.data is None:
        parser.error("the following arguments are required: data")
    _post_process(parser, args)
    if wants_arch and args.arch is not None:
        ARCHITECTURES.preset_of(args.arch)(args)
    return (args, unknown) if parse_known else args


def _add_component_options(parser: CommandParser, args: argparse.Namespace) -> None:
    arch = getattr(args, "arch", None)
    if arch is not None:
        model = ARCHITECTURES.model_of(arch)
        _add_options_of(parser, "model " + model, MODELS[model], MODELS.dataclass_of(model), True)
    if args.task in TASKS:
        cls = TASKS.dataclass_of(args.task)
        _add_options_of(parser, "task " + args.task, TASKS[args.task], cls)
    for name, registry in COMPONENT_REGISTRIES.items():
        chosen = getattr(args, name, None)
        if chosen is not None and chosen in registry:
            title = f"{name} {chosen}"
            _add_options_of(parser, title, registry[chosen], registry.dataclass_of(chosen))


def _add_options_of(
    parser: CommandParser,
    title: str,
    component: Any,
    config: type[FairseqDataclass] | None,
    suppress_defaults: bool = False,
) -> None:
    """Adds a component's options: those of its dataclass, or those its `add_args` makes."""
    if config is not None:
        parser.add_dataclass(title, config, suppress_defaults=suppress_defaults)
    elif hasattr(component, "add_args"):
        argument_default = argparse.SUPPRESS if suppress_defaults else None
        group = parser.add_argument_group(title, argument_default=argument_default)
        group.conflict_handler = "resolve"
        component.add_args(group)


def _explicit_only(parser: CommandParser, input_args: Sequence[str] | None) -> argparse.Namespace:
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    parser._defaults.clear()
    argv = expand_config([_spelled_as_before(a) for a in (input_args or sys.argv[1:])])[0]
    return parser.parse_known_args(argv)[0]


def _post_process(parser: CommandParser, args: argparse.Namespace) -> None:
    """Fills the settings that follow from others."""
    if getattr(args, "batch_size_valid", "") is None:
        args.batch_size_valid = args.batch_size
    if getattr(args, "max_tokens_valid", "") is None:
        args.max_tokens_valid = args.max_tokens
    if getattr(args, "memory_efficient_fp16", False):
        args.fp16 = True
    if getattr(args, "memory_efficient_bf16", False):
        args.bf16 = True
    if getattr(args, "fp16", False) and getattr(args, "bf16", False):
        parser.error("--fp16 and --bf16 exclude each other; choose one")
    args.no_seed_provided = False
    if hasattr(args, "model_overrides"):
        overrides = literal_dict(args.model_overrides, "--model-overrides")
        for name in (*_position_config().field_types(), "document_mask"):
            if getattr(args, name, None) is not None:
                overrides = {**overrides, name: getattr(args, name)}
        args.model_overrides = repr(overrides)
