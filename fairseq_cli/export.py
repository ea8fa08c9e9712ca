"""fairseq-export: a checkpoint as safetensors or as a Hugging Face folder, and back."""

from __future__ import annotations

import argparse
import logging
from importlib.util import find_spec
from pathlib import Path

from fairseq import export
from fairseq.data.dictionary import Dictionary
from fairseq_cli._run import run_command, set_up_logging

__all__ = ["cli_main", "get_parser", "main"]

logger = logging.getLogger("fairseq_cli.export")

FORMATS = ("safetensors", "hf")


def get_parser() -> argparse.ArgumentParser:
    """Returns the parser of fairseq-export."""
    parser = argparse.ArgumentParser(
        description="Write a checkpoint's model as safetensors or as a Hugging Face folder, or "
        "turn one of them into a checkpoint again. What belongs to training stays behind.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--path", required=True, metavar="FILE", help="the checkpoint, or with --from the folder"
    )
    direction = parser.add_mutually_exclusive_group(required=True)
    direction.add_argument("--to", choices=FORMATS, help="format to write")
    direction.add_argument(
        "--from", dest="source", choices=FORMATS, help="format to read, to write a checkpoint"
    )
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="the folder, or with --from the checkpoint"
    )
    parser.add_argument(
        "--dict",
        metavar="FILE",
        help="the model's dict.txt (default: the one in the checkpoint's data folder, or in the "
        "folder that is read)",
    )
    return parser


def cli_main() -> None:
    """Runs fairseq-export with the arguments of the process."""
    set_up_logging()
    run_command(lambda: main(get_parser().parse_args()))


def main(args: argparse.Namespace) -> None:
    """Converts a model.

    Args:
        args: the namespace of the command line.

    Raises:
        FileNotFoundError: checkpoint, folder or dictionary is missing.
        ValueError: they do not fit each other, or are no such thing.
        ImportError: transformers is needed and not installed.
    """
    if "hf" in (args.to, args.source) and find_spec("transformers") is None:
        raise ImportError("the format hf needs transformers: pip install 'transformers>=4.48'")
    if args.source is not None:
        _to_checkpoint(args)
    else:
        _from_checkpoint(args)


def _from_checkpoint(args: argparse.Namespace) -> None:
    folder = Path(args.output)
    if folder.is_file():
        raise ValueError(f"--output {folder} is a file; it has to be a folder, or not there")
    exported = export.read_checkpoint_model(args.path)
    dictionary = export.find_dictionary(args.dict, exported.settings)
    if dictionary is None and args.to == "hf":
        raise FileNotFoundError(
            "the tokenizer needs the model's dictionary, which is not where it was in training; "
            "give it with --dict DATA/dict.txt"
        )
    if args.to == "hf":
        from fairseq.huggingface.export import write_pretrained

        assert dictionary is not None
        write_pretrained(exported, folder, dictionary)
    else:
        export.write_safetensors(exported, folder)
    if dictionary is None:
        logger.warning("no dictionary was found, so none lies beside the model; --dict gives one")
    else:
        export.copy_dictionary(dictionary, folder)
    logger.info(f"wrote {folder}: {', '.join(sorted(p.name for p in folder.iterdir()))}")


def _to_checkpoint(args: argparse.Namespace) -> None:
    source, output = Path(args.path), Path(args.output)
    if output.is_dir():
        raise ValueError(f"--output {output} is a folder; with --from it is the checkpoint's file")
    if args.source == "hf":
        from fairseq.huggingface.export import read_pretrained

        exported = read_pretrained(source)
    else:
        exported = export.read_safetensors(source)
    if args.dict is not None and not Path(args.dict).exists():
        raise FileNotFoundError(f"--dict: there is no {args.dict}")
    beside = (source if source.is_dir() else source.parent) / export.DICTIONARY_FILE
    path = Path(args.dict) if args.dict is not None else beside
    dictionary = Dictionary.load(path) if path.exists() else None
    output.parent.mkdir(parents=True, exist_ok=True)
    export.write_checkpoint(exported, output, dictionary)
    logger.info(f"wrote {output}")


if __name__ == "__main__":
    cli_main()
