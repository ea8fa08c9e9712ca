"""The checkpoints that the authors of ALiBi published, and where they are kept on this machine.

| variable | what it sets |
|---|---|
| FAIRSEQ_CHECKPOINT_URL | the address that the files' names are appended to |
| FAIRSEQ_CACHE, or else PYTORCH_FAIRSEQ_CACHE | the cache folder |
| TORCH_HOME, or else XDG_CACHE_HOME | where the cache folder lies by default |

No hashes of the files are published. The hash of the first complete download that reads as a
checkpoint is recorded beside the file (`<name>.pt.sha256`, as `sha256sum` writes it), and the file
is compared with it whenever it is asked for.
"""

from __future__ import annotations

import difflib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from fairseq.checkpoint.reading import read_checkpoint
from fairseq.data.dictionary import Dictionary
from fairseq.fetch import fetch, hash_of

__all__ = [
    "PUBLISHED",
    "PublishedCheckpoint",
    "cache_folder",
    "keep_dictionary",
    "published_checkpoint",
    "published_data",
    "published_log",
]

BASE_URL = "https://dl.fbaipublicfiles.com/train_short_test_long/wt103"
_PREPARE = (
    "bash examples/language_model/prepare-wikitext-103.sh && fairseq-preprocess --only-source "
    "--trainpref wikitext-103/wiki.train.tokens --validpref wikitext-103/wiki.valid.tokens "
    "--testpref wikitext-103/wiki.test.tokens --destdir data-bin/wikitext-103"
)


@dataclass(frozen=True)
class PublishedCheckpoint:
    """A published model.

    Attributes:
        name: what it is asked for by.
        train_length: tokens in a training sample.
        vocabulary: symbols in the dictionary it needs.
    """

    name: str
    train_length: int
    vocabulary: int

    @property
    def file(self) -> str:
        """Name of its file, at the address and in the cache folder."""
        return f"{self.name}.pt"


# What fairseq-preprocess makes of WikiText-103 at word level, padded to a multiple of 8.
_WT103_VOCABULARY = 267744
_LENGTHS = (64, 128, 256, 512, 1024, 1536, 2048, 3072)

PUBLISHED: dict[str, PublishedCheckpoint] = {
    f"alibi_wt103_L{length}": PublishedCheckpoint(
        f"alibi_wt103_L{length}", length, _WT103_VOCABULARY
    )
    for length in _LENGTHS
}


def cache_folder() -> Path:
    """Returns the folder for published files; it may not exist yet."""
    for variable in ("FAIRSEQ_CACHE", "PYTORCH_FAIRSEQ_CACHE"):
        if os.environ.get(variable):
            return Path(os.environ[variable]).expanduser() / "alibi_wt103"
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    torch_home = os.environ.get("TORCH_HOME") or os.path.join(home, "torch")
    return Path(torch_home).expanduser() / "pytorch_fairseq" / "alibi_wt103"


def published_checkpoint(
    name: str, *, folder: str | os.PathLike[str] | None = None, sha256: str | None = None
) -> Path:
    """Returns the file of a published checkpoint, downloading it if it is not there.

    The whole file is read each time to compare its hash with the recorded one.

    Args:
        name: one of `PUBLISHED`.
        folder: where it is kept; by default `cache_folder()`.
        sha256: what its hash must be; by default the recorded one, if it was downloaded before.

    Raises:
        ValueError: there is no such name, the file has another hash than it should, or what came is
            no checkpoint.
        DownloadError: it could not be had.
    """
    published = _find(name)
    path = Path(folder or cache_folder()) / published.file
    if not path.exists():
        fetch(f"{_base_url()}/{published.file}", path, sha256=sha256, check=_check_is_checkpoint)
    _verify(path, sha256)
    return path


def published_log(name: str, *, folder: str | os.PathLike[str] | None = None) -> Path:
    """Returns the training log that was published with a checkpoint, downloading it if needed.

    Raises:
        ValueError: there is no such name.
        DownloadError: it could not be had.
    """
    file = f"{_find(name).name}.log"
    path = Path(folder or cache_folder()) / file
    return path if path.exists() else fetch(f"{_base_url()}/{file}", path)


def published_data(name: str, data_name_or_path: str | os.PathLike[str] | None = None) -> Path:
    """Returns the folder with the dictionary that a published checkpoint needs.

    Args:
        name: one of `PUBLISHED`.
        data_name_or_path: folder with a `dict.txt`; None or "." is the cache folder, unless "."
            itself has one.

    Raises:
        FileNotFoundError: there is no dictionary; the message says which commands make it.
        ValueError: there is no such name, or the dictionary is not that of WikiText-103.
    """
    published = _find(name)
    folders = [Path(data_name_or_path or ".")]
    if str(folders[0]) == ".":
        folders.append(cache_folder())
    for folder in folders:
        if (folder / "dict.txt").exists():
            _check_dictionary(folder / "dict.txt", published)
            return folder
    raise FileNotFoundError(
        f"{name} was published without its dictionary, and there is no "
        f"{' or '.join(str(folder / 'dict.txt') for folder in folders)}. Make it with: {_PREPARE}; "
        "then give data_name_or_path='data-bin/wikitext-103', or keep it in the cache with: python "
        "scripts/download_checkpoints.py --keep-dict data-bin/wikitext-103/dict.txt"
    )


def keep_dictionary(path: str | os.PathLike[str]) -> Path:
    """Copies the dictionary of WikiText-103 into the cache folder, where the hub looks for it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is another dictionary.
    """
    _check_dictionary(Path(path), next(iter(PUBLISHED.values())))
    target = cache_folder() / "dict.txt"
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name("dict.txt.part")
    shutil.copyfile(path, part)
    os.replace(part, target)
    return target


def _find(name: str) -> PublishedCheckpoint:
    if name not in PUBLISHED:
        nearest = difflib.get_close_matches(name, PUBLISHED, n=1)
        hint = f"did you mean {nearest[0]}? " if nearest else ""
        raise ValueError(
            f"no published checkpoint is called {name!r}; {hint}there are {', '.join(PUBLISHED)}"
        )
    return PUBLISHED[name]


def _base_url() -> str:
    return (os.environ.get("FAIRSEQ_CHECKPOINT_URL") or BASE_URL).rstrip("/")


def _check_is_checkpoint(path: Path) -> None:
    """Refuses what a server sends in place of a file, and files that are cut."""
    if "model" not in read_checkpoint(path, memory_map=True):
        raise ValueError(f"{path} is no checkpoint: it has no entry 'model'")


def _check_dictionary(path: Path, published: PublishedCheckpoint) -> None:
    found = len(Dictionary.load(str(path)))
    if found != published.vocabulary:
        raise ValueError(
            f"{path} has {found:,} symbols, {published.name} was trained with "
            f"{published.vocabulary:,}; it needs the dictionary of all of WikiText-103. Make "
            f"it with: {_PREPARE}"
        )


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _record_hash(path: Path) -> str:
    found = hash_of(path)
    _sidecar(path).write_text(f"{found}  {path.name}\n")
    return found


def _verify(path: Path, sha256: str | None) -> None:
    sidecar = _sidecar(path)
    recorded = sidecar.read_text().split()[0] if sidecar.exists() else None
    if recorded is None:
        # Put there by other means; from now on it must stay as it is.
        _check_is_checkpoint(path)
        recorded = found = _record_hash(path)
    else:
        found = hash_of(path)
    for wanted, origin in ((recorded, f"recorded in {sidecar}"), (sha256, "asked for")):
        if wanted is not None and found != wanted.lower():
            raise ValueError(
                f"{path} has the SHA-256 {found}, not {wanted.lower()} as {origin}; remove it (and "
                f"{sidecar.name}) to download it again"
            )
