"""The documents tell the truth: commands parse, files and flags they name are there."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest

from fairseq import options
from fairseq.dataclass import configs
from fairseq.registry import ARCHITECTURES, COMPONENT_REGISTRIES, MODELS, TASKS

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "examples/language_model").glob("*.yaml"))
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands_of_readme():
    text = (ROOT / "README.md").read_text()
    for block in re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words and (words[0].startswith("fairseq-") or words[:2] == ["python", "train.py"]):
                yield words


def test_the_readme_starts_with_the_two_commands():
    first = re.search(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)[1]
    named = [shlex.split(line, comments=True) for line in first.splitlines()]
    assert named == [["bash", "scripts/demo.sh"], ["bash", "scripts/test.sh"]]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_are_the_published_command_at_their_length(path):
    length = int(path.stem.rpartition("L")[2])
    parser = options.get_training_parser()
    args = options.parse_args_and_arch(parser, ["--config", str(path), "data"])
    published = next(words for words in commands_of_readme() if words[0] == "python")
    other = options.parse_args_and_arch(options.get_training_parser(), published[2:])
    differing = {key for key, value in vars(args).items() if value != getattr(other, key, None)} - {
        "config",
        "data",
        "save_dir",
        "tokens_per_sample",
    }
    assert differing == (
        {"max_tokens", "max_tokens_valid", "update_freq"} if length == 3072 else set()
    )
    assert args.tokens_per_sample == length
    rows = args.max_tokens // length
    assert 8192 <= rows * length * args.update_freq[0] <= 9216


def test_there_is_a_recipe_for_each_published_length():
    lengths = sorted(int(path.stem.rpartition("L")[2]) for path in RECIPES)
    assert lengths == [64, 128, 256, 512, 1024, 1536, 2048, 3072]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_a_document_names_exist(document):
    text = document.read_text()
    named = re.findall(r"`((?:fairseq|fairseq_cli|scripts|tests|docs|examples)/[\w./{},*]*)`", text)
    named += re.findall(r"\]\(([\w./]+)\)", text)
    for name in named:
        base = ROOT if (ROOT / name).exists() else document.parent
        assert list(base.glob(name)) or (base / name).exists(), f"{document.name} names {name}"


def config_dataclasses():
    for name in configs.__all__:
        if name != "BmufConfig":  # its options exist only with --use-bmuf, which is refused
            yield getattr(configs, name)
    for registry in (MODELS, TASKS, *COMPONENT_REGISTRIES.values()):
        yield from filter(None, (registry.dataclass_of(name) for name in registry))


def refused_flags():
    for config in config_dataclasses():
        for field in dataclasses.fields(config):
            flag = "--" + field.name.replace("_", "-")
            if field.metadata.get("unsupported"):
                yield flag
            for value in field.metadata.get("unsupported_values", ()):
                yield f"{flag} {value}"
    registries = {**COMPONENT_REGISTRIES, "arch": ARCHITECTURES, "task": TASKS}
    for kind, registry in registries.items():
        for name in registry.unsupported:
            if name != registry.default:
                yield f"--{kind.replace('_', '-')} {name}"


def test_every_refused_flag_stands_in_the_list():
    text = (ROOT / "docs/compatibility.md").read_text()
    missing = [flag for flag in refused_flags() if f"`{flag}`" not in text]
    assert missing == []


def test_no_other_flag_stands_in_the_list():
    text = (ROOT / "docs/compatibility.md").read_text().partition("## Flags that are refused")[2]
    first_column = "".join(line.split("|")[1] for line in text.splitlines() if "|" in line)
    listed = set(re.findall(r"`(--[^`]+)`", first_column))
    assert listed == set(refused_flags())
