"""Options from dataclass fields, and dataclass fields from a namespace."""

import argparse
from dataclasses import dataclass, field

import pytest

from fairseq.dataclass import II, ChoiceEnum, FairseqDataclass
from fairseq.dataclass.arguments import CommandParser, cast, fill_dataclass, literal_dict


@dataclass
class Config(FairseqDataclass):
    data: str | None = field(default=None, metadata={"help": "folder"})
    size: int = field(default=3, metadata={"help": "100% of it", "argparse_alias": "--extent"})
    rates: list[float] = field(default_factory=lambda: [0.25])
    switch: bool = False
    on: bool = True
    mode: ChoiceEnum(["none", "some"]) = "none"
    limit: int | None = None
    bare: str | None = field(default=None, metadata={"argparse_const": "given"})
    old: int = field(default=0, metadata={"unsupported": "it is gone"})
    impl: str = field(default="a", metadata={"unsupported_values": {"b": "b is gone"}})
    seed: int = II("common.seed")


def parse(*arguments, suppress=False):
    parser = CommandParser(prog="command")
    parser.add_dataclass("group", Config, suppress_defaults=suppress)
    args = parser.parse_args(list(arguments))
    parser.refuse_unsupported(args)
    return args


def test_defaults_and_types():
    args = parse()
    assert vars(args) == {
        "data": None, "size": 3, "rates": [0.25], "switch": False, "on": True, "mode": "none",
        "limit": None, "bare": None, "old": 0, "impl": "a",
    }  # fmt: skip
    args = parse(
        "folder", "--extent", "5", "--rates", "0.1,2", "--switch", "--on", "--mode", "some",
        "--limit", "7", "--bare",
    )  # fmt: skip
    assert (args.data, args.size, args.rates, args.switch) == ("folder", 5, [0.1, 2.0], True)
    assert (args.on, args.mode, args.limit, args.bare) == (False, "some", 7, "given")


@pytest.mark.parametrize(
    ("text", "value"), [("0.5", [0.5]), ("[1,2]", [1.0, 2.0]), ("(3,)", [3.0]), ("", [])]
)
def test_lists(text, value):
    assert parse("--rates", text).rates == value


def test_suppressed_defaults_are_absent():
    assert vars(parse("--size", "4", suppress=True)) == {"data": None, "size": 4}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--old", "1"], "--old is not supported: it is gone"),
        (["--impl", "b"], "--impl b is not supported: b is gone"),
        (["--rates", "fast"], "'fast' is not a number or a list of numbers"),
        (["--mode", "all"], "invalid choice"),
    ],
)
def test_what_is_refused_ends_with_exit_2_and_one_message(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(*arguments)
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert message in printed and len(printed.splitlines()) == 2


def test_the_first_definition_of_an_option_counts():
    parser = CommandParser()
    parser.add_argument("--size", default="first")
    parser.add_dataclass("group", Config)
    assert parser.parse_args([]).size == "first"


def test_filling_takes_interpolated_values_by_name_and_defaults_otherwise():
    config = fill_dataclass(Config, argparse.Namespace(seed=9, size="12", rates=0.5), name="x")
    assert (config.seed, config.size, config.rates, config.mode, config._name) == (
        9, 12, [0.5], "none", "x",
    )  # fmt: skip
    assert fill_dataclass(Config, argparse.Namespace()).seed is None
    assert fill_dataclass(Config, argparse.Namespace(limit=None, size=None)).size == 3


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        ("20", int | None, 20),
        (2.0, int, 2),
        ("1e-3", float, 0.001),
        ("no", bool, False),
        ([0.9, 0.98], str, "[0.9, 0.98]"),
        (("a", "b"), list[str], ["a", "b"]),
        ("a,b", list[str], ["a", "b"]),
        (None, int, None),
    ],
)
def test_cast(value, hint, expected):
    assert cast(value, hint, "--flag") == expected


@pytest.mark.parametrize(("value", "hint"), [("x", int), (2.5, int), ("maybe", bool), ([], float)])
def test_cast_names_the_flag(value, hint):
    with pytest.raises(ValueError, match="--flag"):
        cast(value, hint, "--flag")


def test_dictionary_literals_are_never_evaluated():
    assert literal_dict("{'max_tokens': 64}", "--model-overrides") == {"max_tokens": 64}
    assert literal_dict("", "--model-overrides") == {}
    for text in ("__import__('os').getcwd()", "[1]", "{'a': open('x')}", "{"):
        with pytest.raises(ValueError, match="--model-overrides"):
            literal_dict(text, "--model-overrides")


@dataclass
class Ranges(FairseqDataclass):
    size: int = field(default=3, metadata={"minimum": 1})
    share: float = field(default=0.5, metadata={"minimum": 0, "maximum": 1})
    rates: list[float] = field(default_factory=lambda: [0.25], metadata={"minimum": 0})


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--size=0", "argument --size: 0 is out of range; it must be at least 1"),
        ("--size=1.5", "argument --size: '1.5' is not a whole number"),
        ("--share=1.5", "argument --share: 1.5 is out of range; it must be from 0 to 1"),
        ("--share=nan", "argument --share: it is not a number"),
        ("--share=x", "argument --share: 'x' is not a number"),
        ("--rates=0.1,-2", "argument --rates: -2.0 is out of range; it must be at least 0"),
        ("--rates=", "argument --rates: it is empty; give a number or a list"),
        ("--rates=x", "argument --rates: 'x' is not a number or a list of numbers"),
    ],
)
def test_numbers_are_held_to_their_range(option, message, capsys):
    parser = CommandParser(prog="command")
    parser.add_dataclass("group", Ranges)
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args([option])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_the_ends_of_a_range_belong_to_it():
    parser = CommandParser(prog="command")
    parser.add_dataclass("group", Ranges)
    args = parser.parse_args(["--size=1", "--share=1", "--rates=0,3"])
    assert (args.size, args.share, args.rates) == (1, 1.0, [0.0, 3.0])
