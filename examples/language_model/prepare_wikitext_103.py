#!/usr/bin/env python3
"""Puts WikiText-103 at word level into a folder, as the three files that everybody starts from.

Sources are tried in turn until one gives files with the right hashes. A source is an archive with
the token files, or the rows of the Hugging Face data set (parquet, jsonl or txt), from which the
token files are rebuilt byte for byte.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import logging
import os
import re
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from fairseq.fetch import fetch, hash_of
from fairseq_cli._run import run_command, set_up_logging

logger = logging.getLogger("prepare_wikitext_103")

SPLITS = ("train", "valid", "test")
# Of the files in the original archive.
SHA1 = {
    "train": "b7497e2dfe77e72cfef5e3dbc61b7b53712ac211",
    "valid": "c326ac59dc587676d58c422eb8a03e119582f92b",
    "test": "8a5befc548865cec54ed4273cf87dbbad60d1e47",
}
ZIP_URL = "https://wikitext.smerity.com/wikitext-103-v1.zip"
ROWS_URL = "https://huggingface.co/datasets/Salesforce/wikitext/resolve/main/wikitext-103-v1"
ROWS = {
    "train": ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"],
    "valid": ["validation-00000-of-00001.parquet"],
    "test": ["test-00000-of-00001.parquet"],
}
# Some servers answer only what looks like a browser.
HEADERS = {"User-Agent": "Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0"}
# The largest file has 540 MB; an archive that claims more is not ours.
LARGEST_FILE = 1 << 30
_CHUNK = 1 << 20


class SourceError(ValueError):
    """A source does not hold what is wanted of it."""


def token_file(folder: Path, split: str) -> Path:
    """Returns the place of a split's token file."""
    return folder / f"wiki.{split}.tokens"


# ---- rows to lines ----


def line_of(row: str) -> str:
    """Returns the line of the token file that a row of the Hugging Face data set stands for.

    There, a line that is blank became the empty row, and others may have lost the blanks around
    them. Every line of the token files has one blank at each end, a blank line is one blank.
    """
    words = row.strip()
    return f" {words} \n" if words else " \n"


def rows_of(path: Path) -> Iterator[str]:
    """Yields the rows in a file.

    Args:
        path: .parquet, .jsonl (or .json, an object with `text` per line), or text, a row per line.

    Raises:
        ImportError: pyarrow, which reads parquet, is not installed.
        SourceError: the file is damaged or has no column `text`.
    """
    if path.suffix == ".parquet":
        yield from _parquet_rows(path)
        return
    with path.open(encoding="utf-8", newline="\n") as stream:
        for number, line in enumerate(stream, start=1):
            if path.suffix not in (".json", ".jsonl"):
                yield line
                continue
            try:
                row = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError) as error:
                raise SourceError(
                    f"{path}, line {number}: not an object with an entry 'text'"
                ) from error
            yield row


def _parquet_rows(path: Path) -> Iterator[str]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ImportError(
            f"reading {path.name} needs pyarrow (pip install pyarrow); or give --from a zip, or "
            "the rows as jsonl"
        ) from error
    try:
        for batch in parquet.ParquetFile(path).iter_batches(columns=["text"]):
            yield from batch.column(0).to_pylist()
    except (ArrowException, OSError, IndexError) as error:
        raise SourceError(f"{path} cannot be read as parquet with a column 'text': {error}") from (
            error
        )


# ---- splits to files ----


@dataclass(frozen=True)
class Counts:
    """Lines, tokens with one end mark per line, and the hash of a token file."""

    lines: int
    tokens: int
    sha1: str


def count(path: Path) -> Counts:
    """Counts a token file."""
    lines = tokens = 0
    digest = hashlib.sha1()
    with path.open("rb") as stream:
        for line in stream:
            digest.update(line)
            lines += 1
            tokens += len(line.split()) + 1
    return Counts(lines, tokens, digest.hexdigest())


Write = Callable[[BinaryIO], None]


def write_split(folder: Path, split: str, write: Write, *, any_text: bool) -> None:
    """Writes a token file that is whole and has the known hash, or none.

    Args:
        folder: where it goes.
        split: train, valid or test.
        write: writes its content to a stream.
        any_text: accept another hash.

    Raises:
        SourceError: the hash is another.
    """
    target = token_file(folder, split)
    part = target.with_name(target.name + ".part")
    try:
        with part.open("wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        found = hash_of(part, "sha1")
        if found != SHA1[split] and not any_text:
            raise SourceError(
                f"its wiki.{split}.tokens has the SHA-1 {found}, that of WikiText-103 is "
                f"{SHA1[split]} (--any-text accepts other text)"
            )
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def from_zip(path: Path, folder: Path, *, any_text: bool) -> None:
    """Takes the token files out of an archive, wherever in it they lie.

    Raises:
        SourceError: it is damaged, or lacks a file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {Path(info.filename).name: info for info in archive.infolist()}
            for split in SPLITS:
                info = members.get(f"wiki.{split}.tokens")
                if info is None or info.file_size > LARGEST_FILE:
                    raise SourceError(f"{path} holds no wiki.{split}.tokens of a likely size")

                def unpack(out: BinaryIO, info: zipfile.ZipInfo = info) -> None:
                    with archive.open(info) as member:
                        while chunk := member.read(_CHUNK):
                            out.write(chunk)

                write_split(folder, split, unpack, any_text=any_text)
    except (zipfile.BadZipFile, NotImplementedError, EOFError) as error:
        raise SourceError(f"{path} is no zip file or damaged: {error}") from error


def from_rows(files: dict[str, list[Path]], folder: Path, *, any_text: bool) -> None:
    """Rebuilds the token files from the rows of the Hugging Face data set."""
    for split, paths in files.items():

        def rebuild(out: BinaryIO, paths: Iterable[Path] = paths) -> None:
            for path in paths:
                out.writelines(line_of(row).encode() for row in rows_of(path))

        write_split(folder, split, rebuild, any_text=any_text)


def from_folder(source: Path, folder: Path, *, any_text: bool) -> None:
    """Takes token files, or else rows, that lie in a folder.

    Raises:
        SourceError: a split is missing.
    """
    files: dict[str, list[Path]] = {}
    for split in SPLITS:
        start = {"valid": "valid(ation)?"}.get(split, split)
        pattern = re.compile(rf"wiki\.{split}\.(tokens|txt)|{start}[-.\w]*\.(parquet|jsonl?|txt)")
        files[split] = sorted(p for p in source.iterdir() if pattern.fullmatch(p.name))
        if not files[split]:
            raise SourceError(
                f"{source} has no wiki.{split}.tokens and no {split}*.parquet, .jsonl or .txt"
            )
    from_rows(files, folder, any_text=any_text)


# ---- sources ----


def from_zip_address(url: str, folder: Path, *, any_text: bool) -> None:
    """Downloads an archive and takes the token files out of it; the archive is not kept."""
    archive = folder / "wikitext-103-v1.zip"
    fetch(url, archive, headers=HEADERS)
    with _removing([archive]):
        from_zip(archive, folder, any_text=any_text)


def from_rows_address(url: str, folder: Path, *, any_text: bool) -> None:
    """Downloads the rows of the Hugging Face data set and rebuilds the token files from them."""
    files = {split: [folder / name for name in names] for split, names in ROWS.items()}
    downloaded = [path for paths in files.values() for path in paths]
    for path in downloaded:
        if not path.exists():
            fetch(f"{url}/{path.name}", path)
    with _removing(downloaded):
        from_rows(files, folder, any_text=any_text)


@contextlib.contextmanager
def _removing(paths: Sequence[Path]) -> Iterator[None]:
    """Removes downloads that were used or are of no use; after a full disk, say, they are kept."""
    try:
        yield
    except SourceError:
        for path in paths:
            path.unlink()
        raise
    for path in paths:
        path.unlink()


Source = tuple[str, Callable[[], None]]


def sources(args: argparse.Namespace, folder: Path) -> list[Source]:
    """Returns what to try, in turn: a name, and what gets the files from there."""
    local, any_text = args.source, args.any_text
    if local is not None:
        path = Path(local)
        if not path.exists():
            raise FileNotFoundError(f"--from: there is no {path}")
        take = from_folder if path.is_dir() else from_zip
        return [(local, lambda: take(path, folder, any_text=any_text))]
    url = os.environ.get("WIKITEXT_URL")
    if url:
        get = from_zip_address if url.endswith(".zip") else from_rows_address
        return [(url, lambda: get(url.rstrip("/"), folder, any_text=any_text))]
    return [
        (ZIP_URL, lambda: from_zip_address(ZIP_URL, folder, any_text=any_text)),
        (ROWS_URL, lambda: from_rows_address(ROWS_URL, folder, any_text=any_text)),
    ]


def is_prepared(folder: Path, *, any_text: bool) -> bool:
    """Tells whether all three files are there with the known hashes."""
    return all(
        token_file(folder, split).exists()
        and (any_text or hash_of(token_file(folder, split), "sha1") == SHA1[split])
        for split in SPLITS
    )


def prepare(args: argparse.Namespace) -> None:
    """Gets the files from the first source that has them, and prints their counts.

    Raises:
        FileNotFoundError: --from names nothing that is there.
        ValueError: no source has them; the message says of each why.
    """
    folder = Path(args.dir)
    folder.mkdir(parents=True, exist_ok=True)
    if not is_prepared(folder, any_text=args.any_text):
        failures = []
        for name, get in sources(args, folder):
            logger.info(f"taking WikiText-103 from {name}")
            try:
                get()
                break
            except (OSError, ValueError, ImportError) as error:
                logger.warning(f"{name}: {error}")
                failures.append(f"{name}: {error}")
        else:
            raise ValueError(
                "no source gave WikiText-103. Download wikitext-103-v1.zip (or the rows of "
                "Salesforce/wikitext, wikitext-103-v1) by other means and give it with --from.\n  "
                + "\n  ".join(failures)
            )
    for split in SPLITS:
        found = count(token_file(folder, split))
        known = "" if found.sha1 == SHA1[split] else "  not WikiText-103"
        print(
            f"{token_file(folder, split)}: {found.lines:,} lines, {found.tokens:,} tokens, "
            f"SHA-1 {found.sha1}{known}"
        )


def get_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("dir", nargs="?", default="wikitext-103", help="where the files go")
    parser.add_argument(
        "--from",
        dest="source",
        metavar="PATH",
        help="a zip with the token files, or a folder with them or with the rows of the Hugging "
        "Face data set, instead of the web",
    )
    parser.add_argument(
        "--any-text", action="store_true", help="accept files with other hashes, such as WikiText-2"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the script with command-line arguments."""
    prepare(get_parser().parse_args(arguments))


if __name__ == "__main__":
    set_up_logging(sys.stderr)
    run_command(main)
