"""fairseq-preprocess: makes dictionaries and turns text into datasets of token ids.

Everything is written into a temporary folder inside the destination and moved to its place at the
end, so that a run either leaves all of its files or none. Never loads torch.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from fairseq import options
from fairseq.binarizer import binarize_alignments, binarize_numbered, binarize_text
from fairseq.data import indexed_dataset
from fairseq.data.alignments import most_frequent_translations
from fairseq.data.dictionary import Dictionary
from fairseq.data.text_encoding import NumberedText, number_text
from fairseq.data.text_file import check_text_file, map_chunks
from fairseq.logging.progress_bar import log_to_file
from fairseq.registry import TASKS
from fairseq.utils import make_writable_folder
from fairseq_cli._run import run_command, set_up_logging

__all__ = ["cli_main", "main"]

logger = logging.getLogger("fairseq_cli.preprocess")

_TASKS_WITH_PLAIN_DICTIONARY = ("translation", "language_modeling")


def cli_main() -> None:
    """Runs fairseq-preprocess with the arguments of the process."""
    set_up_logging()
    run_command(_run)


def _run() -> None:
    parser = options.get_preprocessing_parser()
    args = options.parse_args(parser)
    if args.dataset_impl not in indexed_dataset.get_available_dataset_impl():
        parser.error(f"--dataset-impl {args.dataset_impl} is not supported; use mmap")
    if args.log_file is not None:
        log_to_file(args.log_file)
    main(args)


def main(args: argparse.Namespace) -> None:
    """Makes the dictionaries and datasets that the arguments ask for.

    Args:
        args: the options of `fairseq.options.get_preprocessing_parser`.

    Raises:
        FileNotFoundError: a text or dictionary is missing.
        FileExistsError: the destination has a dictionary already.
        ValueError: options contradict each other, or an input is empty, not UTF-8 or malformed.
    """
    _check_options(args)
    with contextlib.ExitStack() as files:
        _run_job(_Job(args, files))


def _run_job(job: _Job) -> None:
    args = job.args
    _check_inputs(job)
    _warn_of_idle_options(args)
    with _destination(Path(args.destdir)) as folder, _log_file(folder / "preprocess.log"):
        logger.info(args)
        job.folder = folder
        source, target = _make_dictionaries(job)
        source.save(folder / job.dict_name(args.source_lang))
        if target is not None:
            target.save(folder / job.dict_name(args.target_lang))
        if not args.dict_only:
            _make_all(job, args.source_lang, source)
            if target is not None:
                _make_all(job, args.target_lang, target)
                if args.align_suffix:
                    _make_all_alignments(job)
        if args.alignfile:
            assert target is not None
            _make_alignment_dictionary(job, source, target)
        logger.info("Wrote preprocessed data to %s", args.destdir)


@dataclass
class Split:
    """A text to be binarized: `prefix` of the input files, `name` of the output ones."""

    name: str
    prefix: str


class _Job:
    """The arguments, the names of files that follow from them, and what was read so far."""

    def __init__(self, args: argparse.Namespace, files: contextlib.ExitStack) -> None:
        self.args = args
        self.folder = Path(args.destdir)
        self.files = files
        self.numbered: dict[str, NumberedText] = {}  # training texts that were read, by path

    @property
    def has_target(self) -> bool:
        return not self.args.only_source

    @property
    def is_encoded(self) -> bool:
        """Tells whether texts become ids, not only dictionaries."""
        return not self.args.dict_only and self.args.dataset_impl != "raw"

    @property
    def languages(self) -> list[str | None]:
        args = self.args
        return [args.source_lang, args.target_lang] if self.has_target else [args.source_lang]

    @property
    def splits(self) -> list[Split]:
        """Lists train, valid, valid1, ..., test, test1, ..., as far as they are given."""
        args = self.args
        splits = [Split("train", args.trainpref)] if args.trainpref else []
        for name, prefixes in (("valid", args.validpref), ("test", args.testpref)):
            for number, prefix in enumerate(prefixes.split(",") if prefixes else ()):
                splits.append(Split(f"{name}{number or ''}", prefix))
        return splits

    def text_path(self, prefix: str, language: str | None) -> str:
        return prefix if language is None else f"{prefix}.{language}"

    def dict_name(self, language: str | None) -> str:
        return "dict.txt" if language is None else f"dict.{language}.txt"

    def output_name(self, split: str, language: str | None) -> str:
        """Returns `train`, or `train.en-de.en` where there are languages."""
        pair = f"{self.args.source_lang}-{self.args.target_lang}"
        return split if language is None else f"{split}.{pair}.{language}"

    def pair_name(self, stem: str) -> str:
        return f"{stem}.{self.args.source_lang}-{self.args.target_lang}"


def _check_options(args: argparse.Namespace) -> None:
    if args.workers < 1:
        raise ValueError(f"--workers {args.workers}: at least 1 process is needed")
    if args.dataset_impl not in indexed_dataset.get_available_dataset_impl():
        raise ValueError(f"--dataset-impl {args.dataset_impl} is not supported; use mmap")
    if not args.only_source and (args.source_lang is None or args.target_lang is None):
        raise ValueError(
            "give --only-source for one text, as language models have it, or both --source-lang "
            "and --target-lang for a translation"
        )
    if not args.only_source and args.source_lang == args.target_lang:
        raise ValueError(
            f"--source-lang and --target-lang are both {args.source_lang}; their files would be "
            "the same"
        )
    if args.joined_dictionary and args.srcdict and args.tgtdict:
        raise ValueError("--joined-dictionary takes --srcdict or --tgtdict, not both")
    if args.alignfile and (args.only_source or not args.trainpref):
        raise ValueError("--alignfile needs two languages and --trainpref, not --only-source")
    if args.align_suffix and args.only_source:
        raise ValueError("--align-suffix belongs to two languages, not to --only-source")


def _warn_of_idle_options(args: argparse.Namespace) -> None:
    """Says which limits are set for a dictionary that is not made."""
    reasons = {}
    if args.srcdict:
        reasons["src"] = "--srcdict, which is taken as it is"
    if args.tgtdict:
        reasons["tgt"] = "--tgtdict, which is taken as it is"
    if args.joined_dictionary:
        reasons["tgt"] = "--joined-dictionary, which goes by --thresholdsrc and --nwordssrc"
    if args.only_source:
        reasons["tgt"] = "--only-source"
    for side, reason in reasons.items():
        for name, default in (("threshold", 0), ("nwords", -1)):
            if getattr(args, name + side) != default:
                logger.warning("--%s%s has no effect with %s", name, side, reason)
    if args.only_source and args.tgtdict and not args.joined_dictionary:
        logger.warning("--tgtdict has no effect with --only-source")


def _check_inputs(job: _Job) -> None:
    """Checks, before anything is written, all that can be checked quickly."""
    args = job.args
    for dictionary in filter(None, (args.srcdict, args.tgtdict)):
        if not os.path.isfile(dictionary):
            raise FileNotFoundError(f"there is no dictionary {dictionary}")
    given = [args.srcdict, args.tgtdict]
    if args.joined_dictionary:
        given = [args.srcdict or args.tgtdict] * 2
    for language, dictionary in zip(job.languages, given, strict=False):
        if dictionary is None:
            _check_new_dictionary(job, language)
    if not job.splits:
        raise ValueError("no text is given: use --trainpref, --validpref or --testpref")
    for split in job.splits:
        if not split.prefix:
            raise ValueError(
                f"--{split.name.rstrip('0123456789')}pref has an empty name; give texts separated "
                "by commas, without one at either end"
            )
        for language in job.languages:
            check_text_file(job.text_path(split.prefix, language))
    if args.alignfile:
        check_text_file(args.alignfile)
    if args.align_suffix and not _alignment_files(job):
        raise FileNotFoundError(
            f"--align-suffix {args.align_suffix}: there is no file "
            f"{args.trainpref or args.validpref or args.testpref}.{args.align_suffix}"
        )


def _check_new_dictionary(job: _Job, language: str | None) -> None:
    path = Path(job.args.destdir) / job.dict_name(language)
    if path.exists():
        raise FileExistsError(
            f"{path} exists already: choose another --destdir, remove it, or use it with "
            f"--{'srcdict' if language == job.args.source_lang else 'tgtdict'} {path}"
        )
    if not job.args.trainpref:
        raise ValueError("--trainpref must be given to make a dictionary, or --srcdict to use one")


@contextlib.contextmanager
def _destination(destdir: Path) -> Iterator[Path]:
    """Gives a temporary folder; moves its files to the destination if all went well."""
    existing = next(folder for folder in (destdir, *destdir.parents) if folder.exists())
    make_writable_folder(destdir, "--destdir")
    try:
        with tempfile.TemporaryDirectory(prefix=".preprocess-", dir=destdir) as name:
            yield Path(name)
            _move_files(Path(name), destdir)
    except OSError as error:
        if error.filename is not None or isinstance(error, BrokenPipeError):
            raise
        # What fails while a file is written, such as for lack of space, names no file.
        message = f"--destdir: writing there failed: {error.strerror}; nothing is left of this run"
        raise OSError(error.errno, message, str(destdir)) from None
    finally:
        for folder in (destdir, *destdir.parents):
            if folder == existing or any(folder.iterdir()):
                break
            folder.rmdir()


def _move_files(folder: Path, destdir: Path) -> None:
    log = folder / "preprocess.log"
    with open(destdir / log.name, "a", encoding="utf-8") as file:
        file.write(log.read_text(encoding="utf-8"))
    log.unlink()
    # Dictionaries last: while they are missing, the command can simply be given again.
    for path in sorted(folder.iterdir(), key=lambda path: (path.suffix == ".txt", path.name)):
        os.replace(path, destdir / path.name)


@contextlib.contextmanager
def _log_file(path: Path) -> Iterator[None]:
    """Writes the messages of this command to a file as well, without times and names."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()


def _make_dictionaries(job: _Job) -> tuple[Dictionary, Dictionary | None]:
    args = job.args
    if args.joined_dictionary:
        given = args.srcdict or args.tgtdict
        joined = _load(args, given) if given else _build(job, job.languages, "src")
        return joined, joined if job.has_target else None
    source = _load(args, args.srcdict) if args.srcdict else _build(job, job.languages[:1], "src")
    if not job.has_target:
        return source, None
    target = _load(args, args.tgtdict) if args.tgtdict else _build(job, job.languages[1:], "tgt")
    return source, target


def _plug_in_task(args: argparse.Namespace) -> Any:
    """Returns the class of a plug-in's task, which may have a dictionary of its own, or None."""
    return None if args.task in _TASKS_WITH_PLAIN_DICTIONARY else TASKS.find(args.task)


def _load(args: argparse.Namespace, path: str) -> Dictionary:
    loader = _plug_in_task(args)
    dictionary: Dictionary = loader.load_dictionary(path) if loader else Dictionary.load(path)
    return dictionary


def _build(job: _Job, languages: list[str | None], side: str) -> Dictionary:
    """Counts the words of the training texts of one side, or of both."""
    args = job.args
    paths = [job.text_path(args.trainpref, language) for language in languages]
    limits = {
        "threshold": getattr(args, f"threshold{side}"),
        "nwords": getattr(args, f"nwords{side}"),
        "padding_factor": args.padding_factor,
    }
    dictionary = _counted(job, paths, limits)
    if len(dictionary) == dictionary.nspecial:
        raise ValueError(
            f"no word of {', '.join(paths)} is left for the dictionary; lower "
            f"--threshold{side} or raise --nwords{side}, if they are given"
        )
    return dictionary


def _counted(job: _Job, paths: list[str], limits: dict[str, int]) -> Dictionary:
    """Makes a dictionary of texts; keeps those that are to be encoded as numbers."""
    args = job.args
    task = _plug_in_task(args)
    if task is not None:
        built: Dictionary = task.build_dictionary(paths, workers=args.workers, **limits)
        return built
    dictionary = Dictionary()
    for path in paths:
        with _progress(path, "reading") as on_progress:
            text = number_text(
                path,
                workers=args.workers,
                keep_in=_scratch_file(job) if job.is_encoded else None,
                on_progress=on_progress,
            )
        dictionary.add_text(text)
        if job.is_encoded:
            job.numbered[path] = text
    dictionary.finalize(**limits)
    return dictionary


def _scratch_file(job: _Job) -> IO[bytes]:
    """Returns a file without a name, on the disk of those that are written."""
    return job.files.enter_context(tempfile.TemporaryFile(dir=job.folder))


def _make_all(job: _Job, language: str | None, dictionary: Dictionary) -> None:
    for split in job.splits:
        path = job.text_path(split.prefix, language)
        output = job.folder / job.output_name(split.name, language)
        if job.args.dataset_impl == "raw":
            for _ in map_chunks(len, path):  # reading it tells whether it is UTF-8
                pass
            shutil.copyfile(path, output)
        else:
            _make_binary_dataset(job, language, dictionary, path, output)


def _make_binary_dataset(
    job: _Job, language: str | None, dictionary: Dictionary, path: str, output: Path
) -> None:
    logger.info("[%s] Dictionary: %d types", language, len(dictionary))
    with _builder(job, output, len(dictionary)) as builder:
        if path in job.numbered:
            summary = binarize_numbered(job.numbered[path], dictionary, builder)
        else:
            with _progress(path, "encoding") as on_progress:
                summary = binarize_text(
                    path, dictionary, builder, workers=job.args.workers, on_progress=on_progress
                )
    logger.info(
        f"[{language}] {path}: {summary.sentences} sents, {summary.tokens} tokens, "
        f"{summary.percent_replaced:.3}% replaced by {dictionary.unk_word}"
    )


@contextlib.contextmanager
def _builder(job: _Job, output: Path, vocab_size: int | None) -> Iterator[Any]:
    """Gives the builder of a dataset and finalizes it."""
    with indexed_dataset.make_builder(
        indexed_dataset.data_file_path(output), job.args.dataset_impl, vocab_size
    ) as builder:
        yield builder
        builder.finalize(indexed_dataset.index_file_path(output))


def _alignment_files(job: _Job) -> list[tuple[str, str]]:
    """Lists the alignment files that exist, with the name of their split."""
    args = job.args
    prefixes = {"train": args.trainpref, "valid": args.validpref, "test": args.testpref}
    paths = {name: f"{prefix}.{args.align_suffix}" for name, prefix in prefixes.items() if prefix}
    return [(name, path) for name, path in paths.items() if os.path.exists(path)]


def _make_all_alignments(job: _Job) -> None:
    for split, path in _alignment_files(job):
        output = job.folder / job.pair_name(f"{split}.align")
        if job.args.dataset_impl == "raw":
            shutil.copyfile(path, output)
            continue
        with _builder(job, output, None) as builder, _progress(path, "aligning") as on_progress:
            parsed = binarize_alignments(
                path, builder, workers=job.args.workers, on_progress=on_progress
            )
        logger.info("[alignments] %s: parsed %d alignments", path, parsed)


def _make_alignment_dictionary(job: _Job, source: Dictionary, target: Dictionary) -> None:
    """Writes for each source word the target word that it is aligned to most often."""
    args = job.args
    source_text, target_text = (job.text_path(args.trainpref, lang) for lang in job.languages)
    translations = most_frequent_translations(
        source_text, target_text, args.alignfile, source, target
    )
    output = job.folder / f"{job.pair_name('alignment')}.txt"
    with open(output, "w", encoding="utf-8", newline="\n") as file:
        for index, translation in translations.items():
            file.write(f"{source[index]} {target[translation]}\n")


@contextlib.contextmanager
def _progress(path: str, verb: str) -> Iterator[Callable[[int], object] | None]:
    """Shows on a terminal how much of a file is done; elsewhere nothing."""
    if not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    size = os.path.getsize(path)
    label = f"{verb} {os.path.basename(path)}"
    with tqdm(total=size, desc=label, unit="B", unit_scale=True, leave=False) as bar:
        yield bar.update


if __name__ == "__main__":
    cli_main()
