"""fairseq-preprocess: the original's files, byte for byte, or one message and no files."""

import hashlib
import logging
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fairseq import options
from fairseq.data import Dictionary, text_file
from fairseq.data.indexed_dataset import infer_dataset_impl, make_dataset
from fairseq.registry import TASKS
from fairseq_cli import preprocess

GOLDEN = Path(__file__).parent.parent / "golden/invented"
TEXTS = [
    *("--trainpref", "text/train.txt", "--validpref", "text/valid.txt"),
    *("--testpref", "text/test.txt"),
]
COMMAND = [sys.executable, "-m", "fairseq_cli.preprocess"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(GOLDEN.parents[2])}


def run(*arguments, only_source=True):
    """Runs the command in this process."""
    parser = options.get_preprocessing_parser(default_task="language_modeling")
    argv = [*map(str, arguments), *(["--only-source"] if only_source else [])]
    preprocess.main(options.parse_args(parser, argv))


def run_command(*arguments, **settings):
    """Runs the command as a process of its own."""
    command = [*COMMAND, "--only-source", *map(str, arguments)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, **settings)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def data_files(folder):
    return {name: data for name, data in contents(folder).items() if name != "preprocess.log"}


def write(path, text):
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.fixture
def in_golden(monkeypatch):
    monkeypatch.chdir(GOLDEN)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(text_file, "CHUNK_BYTES", 10_000)


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
@pytest.mark.parametrize(
    ("name", "limits"),
    [
        ("main", []),
        (
            "nwords1000_thr2_pf16",
            ["--nwordssrc", "1000", "--thresholdsrc", "2", "--padding-factor", "16"],
        ),
    ],
)
def test_the_originals_bytes(in_golden, small_chunks, tmp_path, workers, name, limits):
    run(*TEXTS, *limits, "--workers", workers, "--destdir", tmp_path)
    assert data_files(tmp_path) == data_files(GOLDEN / "bin" / name)


def test_the_originals_messages(tmp_path):
    result = run_command(*TEXTS, "--destdir", tmp_path, cwd=GOLDEN)
    assert (result.returncode, result.stderr) == (0, "")
    stamp = r"(?m)^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \| INFO \| fairseq_cli\.preprocess \| "
    printed = re.sub(stamp, "", result.stdout)
    expected = re.sub(stamp, "", (GOLDEN / "bin/main.stdout.txt").read_text())
    lines, expected_lines = printed.splitlines(), expected.splitlines()
    assert lines[0].startswith("Namespace(") and "trainpref='text/train.txt'" in lines[0]
    assert lines[1:-1] == expected_lines[1:-1]
    assert lines[-1] == f"Wrote preprocessed data to {tmp_path}"
    assert (tmp_path / "preprocess.log").read_text() == printed


def test_the_log_grows(in_golden, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    run(*TEXTS, "--destdir", tmp_path)
    first = (tmp_path / "preprocess.log").read_text()
    run(*TEXTS, "--destdir", tmp_path, "--srcdict", tmp_path / "dict.txt")
    both = (tmp_path / "preprocess.log").read_text()
    assert both.startswith(first) and both.count("Wrote preprocessed data") == 2
    assert data_files(tmp_path) == data_files(GOLDEN / "bin/main")


def formula_text(num_lines, offset):
    """Lines of words that a formula gives, some of them empty."""
    lines = []
    for a in range(offset, num_lines + offset):
        words = [f"w{(a * a + 3 * j * j + j) % 70}" for j in range(7 * a % 11)]
        lines.append(" ".join(words) + "\n")
    return "".join(lines)


def test_hashes_of_a_text_from_a_formula(tmp_path):
    """The hashes were found by running the original."""
    train = write(tmp_path / "train.txt", formula_text(60, 0))
    valid = write(tmp_path / "valid.txt", formula_text(20, 5))
    out = tmp_path / "bin"
    run("--trainpref", train, "--validpref", valid, "--destdir", out)
    hashes = {
        name: (len(data), hashlib.sha256(data).hexdigest()[:16])
        for name, data in data_files(out).items()
    }
    assert hashes == {
        "dict.txt": (357, "af5a01e8800f827d"),
        "train.bin": (722, "8a9183803966eb6f"),
        "train.idx": (746, "a5026908a0137c21"),
        "valid.bin": (228, "01f29921696d41c5"),
        "valid.idx": (266, "e7c94eff6d3e9879"),
    }


@pytest.mark.parametrize(
    ("num_words", "code"), [(65495, 8), (65496, 9)], ids=["65499 types", "65500 types"]
)
def test_element_type_follows_the_size_of_the_dictionary(tmp_path, num_words, code):
    words = [f"w{number:05d}" for number in range(num_words)]
    text = write(tmp_path / "text.txt", " ".join(words) + "\n")
    run("--trainpref", text, "--padding-factor", 1, "--destdir", tmp_path / "bin")
    assert (tmp_path / "bin/train.idx").read_bytes()[17] == code
    dataset = make_dataset(tmp_path / "bin/train", "mmap")
    assert dataset.read(0).tolist() == [*range(4, num_words + 4), 2]


@pytest.mark.parametrize("impl", ["mmap", "lazy", "cached", "raw"])
def test_formats_hold_the_same_ids(in_golden, small_chunks, tmp_path, impl):
    run("--trainpref", "text/valid.txt", "--dataset-impl", impl, "--destdir", tmp_path)
    dictionary = Dictionary.load(tmp_path / "dict.txt")
    lines = (GOLDEN / "text/valid.txt").read_text(encoding="utf-8").splitlines()
    found = infer_dataset_impl(tmp_path / "train")
    assert found == ("cached" if impl == "lazy" else impl)
    dataset = make_dataset(tmp_path / "train", impl, fix_lua_indexing=True, dictionary=dictionary)
    assert [dictionary.string(dataset.read(i)) for i in range(len(dataset))] == [
        " ".join(line.split()) for line in lines
    ]


def test_older_formats_do_not_depend_on_workers(in_golden, small_chunks, tmp_path):
    for name, impl, workers in (("a", "lazy", 1), ("b", "cached", 1), ("c", "lazy", 3)):
        arguments = ["--dataset-impl", impl, "--workers", workers, "--destdir", tmp_path / name]
        run("--trainpref", "text/valid.txt", *arguments)
    assert data_files(tmp_path / "a") == data_files(tmp_path / "b") == data_files(tmp_path / "c")


def test_raw_text_is_copied_under_the_name_that_is_looked_for(tmp_path):
    text = write(tmp_path / "t", "a\r\nb  c")
    run(
        "--trainpref",
        text,
        "--testpref",
        text,
        "--dataset-impl",
        "raw",
        "--destdir",
        tmp_path / "o",
    )
    files = contents(tmp_path / "o")
    assert files["train"] == files["test"] == b"a\r\nb  c"
    assert set(files) == {"dict.txt", "preprocess.log", "train", "test"}


def test_several_validation_and_test_texts(in_golden, tmp_path):
    valid, test = "text/valid.txt,text/test.txt", "text/test.txt,text/train.txt,text/valid.txt"
    run(
        "--trainpref",
        "text/train.txt",
        "--validpref",
        valid,
        "--testpref",
        test,
        "--destdir",
        tmp_path,
    )
    golden, files = data_files(GOLDEN / "bin/main"), data_files(tmp_path)
    origins = {
        "valid": "valid",
        "valid1": "test",
        "test": "test",
        "test1": "train",
        "test2": "valid",
    }
    origins["train"] = "train"
    expected = {
        f"{name}{suffix}": golden[f"{origin}{suffix}"]
        for name, origin in origins.items()
        for suffix in (".bin", ".idx")
    }
    assert files == {**expected, "dict.txt": golden["dict.txt"]}


def test_only_the_dictionary(in_golden, tmp_path):
    run(*TEXTS, "--dict-only", "--destdir", tmp_path)
    assert data_files(tmp_path) == {"dict.txt": (GOLDEN / "bin/main/dict.txt").read_bytes()}


def test_a_given_dictionary_is_neither_sorted_nor_padded(tmp_path):
    text = write(tmp_path / "text.txt", "b a c\n")
    given = write(tmp_path / "given.txt", "a 1\nb 5\n")
    run("--testpref", text, "--srcdict", given, "--destdir", tmp_path / "bin")
    assert (tmp_path / "bin/dict.txt").read_bytes() == b"a 1\nb 5\n"
    assert make_dataset(tmp_path / "bin/test", "mmap").read(0).tolist() == [5, 4, 3, 2]


@pytest.fixture
def pair(tmp_path):
    """Two languages with alignments: en a b / b c, de x y y / z."""
    write(tmp_path / "t.en", "a b\nb c\n")
    write(tmp_path / "t.de", "x y y\nz\n")
    write(tmp_path / "t.align", "0-0 1-1 1-2\n1-0 0-0\n")
    return tmp_path / "t"


def items(prefix):
    dataset = make_dataset(prefix, "mmap")
    return [dataset.read(i).tolist() for i in range(len(dataset))]


def test_two_languages(pair, tmp_path):
    out = tmp_path / "bin"
    arguments = ["-s", "en", "-t", "de", "--padding-factor", 1, "--align-suffix", "align"]
    limits = ["--thresholdtgt", 2, "--nwordssrc", 6]
    run("--trainpref", pair, *arguments, *limits, "--destdir", out, only_source=False)
    assert (out / "dict.en.txt").read_text() == "b 2\na 1\n"
    assert (out / "dict.de.txt").read_text() == "y 2\n"
    assert items(out / "train.en-de.en") == [[5, 4, 2], [4, 3, 2]]
    assert items(out / "train.en-de.de") == [[3, 4, 4, 2], [3, 2]]
    assert items(out / "train.align.en-de") == [[0, 0, 1, 1, 1, 2], [1, 0, 0, 0]]
    assert len(contents(out)) == 9


def test_dictionaries_of_two_languages_may_be_joined_or_given(pair, tmp_path):
    languages = ["-s", "en", "-t", "de", "--padding-factor", 1, "--trainpref", pair]
    run(*languages, "--joined-dictionary", "--destdir", tmp_path / "joined", only_source=False)
    joined = (tmp_path / "joined/dict.en.txt").read_text()
    assert joined == "b 2\ny 2\na 1\nc 1\nx 1\nz 1\n"
    assert (tmp_path / "joined/dict.de.txt").read_text() == joined
    given = ["--tgtdict", tmp_path / "joined/dict.en.txt", "--nwordssrc", 5]
    run(*languages, *given, "--destdir", tmp_path / "given", only_source=False)
    assert (tmp_path / "given/dict.en.txt").read_text() == "b 2\n"
    assert (tmp_path / "given/dict.de.txt").read_text() == joined
    given = ["--joined-dictionary", "--srcdict", tmp_path / "joined/dict.en.txt"]
    run(*languages, *given, "--destdir", tmp_path / "both", only_source=False)
    assert data_files(tmp_path / "both") == data_files(tmp_path / "joined")


def test_one_language_of_two(pair, tmp_path):
    run("-s", "en", "--trainpref", pair, "--destdir", tmp_path / "bin")
    assert set(data_files(tmp_path / "bin")) == {
        *("dict.en.txt", "train.en-None.en.bin", "train.en-None.en.idx")
    }


def test_dictionary_of_translations(pair, tmp_path):
    """a is aligned with x, b with y twice and with z once, c with z."""
    arguments = ["-s", "en", "-t", "de", "--alignfile", f"{pair}.align", "--trainpref", pair]
    run(*arguments, "--destdir", tmp_path / "bin", only_source=False)
    assert (tmp_path / "bin/alignment.en-de.txt").read_text() == "a x\nb y\nc z\n"
    write(tmp_path / "t.align", "0-0 1-7\n1-0\n")
    with pytest.raises(ValueError, match=r"t\.align does not fit .*t\.en and .*t\.de"):
        run(*arguments, "--destdir", tmp_path / "other", only_source=False)
    write(tmp_path / "t.align", "0-0\n")
    with pytest.raises(ValueError, match=r"t\.align does not fit"):
        run(*arguments, "--destdir", tmp_path / "other", only_source=False)
    assert not (tmp_path / "other").exists()


def test_limits_without_effect_are_told(tmp_path, caplog):
    text = write(tmp_path / "text.txt", "a a b\n")
    given = write(tmp_path / "given.txt", "a 1\n")
    limits = ["--nwordssrc", 5, "--thresholdtgt", 2]
    run("--trainpref", text, "--srcdict", given, *limits, "--destdir", tmp_path / "bin")
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert warnings == [
        "--nwordssrc has no effect with --srcdict, which is taken as it is",
        "--thresholdtgt has no effect with --only-source",
    ]


def test_shards_that_are_there_already_survive(in_golden, small_chunks, tmp_path):
    write(tmp_path / "train1.bin", b"mine")
    write(tmp_path / "train1.idx", b"mine")
    run(*TEXTS, "--workers", 3, "--destdir", tmp_path)
    files = data_files(tmp_path)
    assert files.pop("train1.bin") == files.pop("train1.idx") == b"mine"
    assert files == data_files(GOLDEN / "bin/main")


def test_an_existing_dictionary_is_kept(in_golden, tmp_path):
    write(tmp_path / "dict.txt", "mine 1\n")
    with pytest.raises(FileExistsError, match=r"dict\.txt exists already: .*--srcdict"):
        run(*TEXTS, "--destdir", tmp_path)
    assert contents(tmp_path) == {"dict.txt": b"mine 1\n"}


BAD_TEXTS = {
    "missing": (None, FileNotFoundError, r"there is no text file .*bad\.txt"),
    "empty": (b"", ValueError, r"bad\.txt is empty"),
    "not UTF-8": (
        b"a b\nc \xff\n",
        ValueError,
        r"bad\.txt: not UTF-8: byte 0xff at offset 6, in line 2",
    ),
}


@pytest.mark.parametrize("impl", ["mmap", "lazy", "raw"])
@pytest.mark.parametrize("flag", ["--trainpref", "--validpref", "--testpref"])
@pytest.mark.parametrize("case", BAD_TEXTS)
def test_bad_texts_leave_nothing(tmp_path, case, flag, impl):
    data, error, message = BAD_TEXTS[case]
    good = write(tmp_path / "good.txt", "a b c\n")
    bad = tmp_path / "bad.txt" if data is None else write(tmp_path / "bad.txt", data)
    texts = {"--trainpref": good, "--validpref": good, flag: bad}
    arguments = [part for pair in texts.items() for part in pair]
    for destdir in (tmp_path / "new" / "folder", tmp_path / "old"):
        (tmp_path / "old").mkdir(exist_ok=True)
        with pytest.raises(error, match=message):
            run(*arguments, "--dataset-impl", impl, "--destdir", destdir)
    assert not (tmp_path / "new").exists() and contents(tmp_path / "old") == {}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_tells_what_is_wrong_in_one_line(in_golden, tmp_path, workers):
    data = (GOLDEN / "text/train.txt").read_bytes() * 8
    bad = write(tmp_path / "bad.txt", data + b"\xe9\n")
    given = ["--srcdict", "bin/main/dict.txt", "--workers", workers, "--destdir", tmp_path / "bin"]
    result = run_command("--trainpref", bad, *given)
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1
    assert f"{bad}: not UTF-8: byte 0xe9 at offset {len(data)}, in line 11353" in result.stderr
    assert not (tmp_path / "bin").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--testpref", "text/test.txt"], "--trainpref must be given"),
        ([], "--trainpref must be given"),
        (["--srcdict", "bin/main/dict.txt"], "no text is given"),
        (["--trainpref", "text"], "text is not a regular file"),
        (["--trainpref", "text/train.txt", "--alignfile", "x"], "--alignfile"),
        (["--trainpref", "text/train.txt", "--align-suffix", "x"], "--align-suffix"),
        (["--trainpref", "text/train.txt", "--srcdict", "text/train.txt"], r"train\.txt, line 1"),
    ],
)
def test_wrong_options_are_named(in_golden, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        run(*arguments, "--destdir", tmp_path / "bin")
    assert not (tmp_path / "bin").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --only-source"),
        (["-s", "en"], "give --only-source"),
        (["-s", "en", "-t", "en"], "are both en"),
        (["-s", "en", "-t", "de", "--align-suffix", "no"], "--align-suffix no: there is no file"),
        (
            ["-s", "en", "-t", "de", "--joined-dictionary", "--srcdict", "x", "--tgtdict", "y"],
            "--srcdict or --tgtdict, not both",
        ),
        (["-s", "en", "-t", "de", "--tgtdict", "gone.txt"], "there is no dictionary gone.txt"),
    ],
)
def test_wrong_options_for_two_languages_are_named(pair, tmp_path, arguments, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run("--trainpref", pair, *arguments, "--destdir", tmp_path / "bin", only_source=False)
    assert not (tmp_path / "bin").exists()


def test_a_format_that_is_not_provided_is_a_wrong_command_line(tmp_path):
    text = write(tmp_path / "text.txt", "a\n")
    result = run_command(
        "--trainpref", text, "--dataset-impl", "fasta", "--destdir", tmp_path / "b"
    )
    assert result.returncode == 2 and "fasta is not supported" in result.stderr
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers", "0"], "argument --workers: 0 is out of range; it must be at least 1"),
        (["--nwordssrc", "-5"], "argument --nwordssrc: -5 is out of range; it must be at least -1"),
        (["--nwordstgt", "-2"], "argument --nwordstgt: -2 is out of range"),
    ],
)
def test_numbers_out_of_range_are_a_wrong_command_line(
    in_golden, tmp_path, capsys, arguments, message
):
    with pytest.raises(SystemExit) as stopped:
        run("--trainpref", "text", *arguments, "--destdir", tmp_path / "bin")
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
@pytest.mark.parametrize(
    ("workers", "signal_number", "code"),
    [(1, signal.SIGINT, 130), (2, signal.SIGINT, 130), (2, signal.SIGTERM, 143)],
)
def test_an_interrupted_run_leaves_nothing(start_process, tmp_path, workers, signal_number, code):
    text = write(tmp_path / "text.txt", (GOLDEN / "text/train.txt").read_bytes() * 200)
    command = [*COMMAND, "--only-source", "--trainpref", str(text), "--workers", str(workers)]
    process = start_process([*command, "--destdir", str(tmp_path / "bin")], env=ENVIRONMENT)
    assert "Namespace" in process.stdout.readline()
    assert [path.name[:12] for path in (tmp_path / "bin").iterdir()] == [".preprocess-"]
    if signal_number == signal.SIGINT:
        os.killpg(process.pid, signal_number)  # as a terminal does
    else:
        process.send_signal(signal_number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert errors == ("interrupted\n" if signal_number == signal.SIGINT else "terminated\n")
    assert not (tmp_path / "bin").exists()


@pytest.mark.parametrize("limit", ["--nwordssrc 4", "--thresholdsrc 9", ""])
def test_a_dictionary_without_words_is_refused(tmp_path, limit):
    text = "one word\n" if limit else "<unk> <unk>\n"
    path = write(tmp_path / "text.txt", text.encode())
    arguments = f"--trainpref {path} --destdir {tmp_path}/bin --padding-factor 1 {limit}"
    with pytest.raises(ValueError, match=r"no word of \S+text.txt is left.*lower --thresholdsrc"):
        run(*arguments.split())
    assert not (tmp_path / "bin").exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_an_interruption_while_workers_start_is_not_lost(tmp_path):
    text = write(tmp_path / "text.txt", (GOLDEN / "text/train.txt").read_bytes() * 20)
    code = (
        "import os, signal\n"
        "def ctrl_c(): os.kill(os.getpid(), signal.SIGINT)\n"
        "os.register_at_fork(before=ctrl_c, after_in_child=ctrl_c)\n"
        "from fairseq_cli._commands import preprocess\n"
        "preprocess()"
    )
    arguments = ["--only-source", "--trainpref", str(text), "--destdir", str(tmp_path / "bin")]
    found = subprocess.run(
        [sys.executable, "-c", code, *arguments, "--workers", "2"],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=60,
    )
    assert (found.returncode, found.stderr) == (130, "interrupted\n")
    assert not (tmp_path / "bin").exists()


def test_torch_is_never_loaded(tmp_path):
    code = (
        "import sys\nfrom fairseq_cli.preprocess import cli_main\n"
        "cli_main()\nassert 'torch' not in sys.modules\nprint('no torch')\n"
    )
    arguments = ["--only-source", *TEXTS, "--workers", "2", "--destdir", str(tmp_path)]
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=ENVIRONMENT,
        cwd=GOLDEN,
        capture_output=True,
        text=True,
    )
    assert result.stdout.endswith("no torch\n"), result.stderr


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux")
@pytest.mark.parametrize("line_end", ["\n", " "])
def test_memory_does_not_grow_with_the_text(tmp_path, line_end):
    line = ("the quick brown fox jumps over the lazy dog " * 20).strip() + line_end
    code = (
        "from fairseq_cli.preprocess import cli_main\ncli_main()\n"
        "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])\n"
    )
    peaks = []
    for megabytes in (2, 20):
        text = write(tmp_path / "text.txt", line * (megabytes * 1_000_000 // len(line)))
        arguments = ["--only-source", "--trainpref", text, "--destdir", tmp_path / str(megabytes)]
        command = [sys.executable, "-c", code, *map(str, arguments)]
        result = subprocess.run(
            command, env=ENVIRONMENT, capture_output=True, text=True, check=True
        )
        peaks.append(int(result.stdout.splitlines()[-1]))
    assert peaks[1] < 1.1 * peaks[0]


class ReversedDictionary(Dictionary):
    """Has its words in the reverse of the usual order."""

    def finalize(self, **limits):
        super().finalize(**limits)
        self.symbols[4:] = self.symbols[:3:-1]
        self.indices = {word: index for index, word in enumerate(self.symbols)}


class PlugInTask:
    """A task with a dictionary of its own."""

    @classmethod
    def build_dictionary(cls, filenames, workers=1, threshold=-1, nwords=-1, padding_factor=8):
        dictionary = ReversedDictionary()
        for filename in filenames:
            Dictionary.add_file_to_dictionary(filename, dictionary, num_workers=workers)
        dictionary.finalize(threshold=threshold, nwords=nwords, padding_factor=padding_factor)
        return dictionary

    @classmethod
    def load_dictionary(cls, filename):
        return ReversedDictionary.load(filename)


def test_a_task_may_have_a_dictionary_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS._classes, "plug_in", PlugInTask)
    text = write(tmp_path / "text.txt", "a a b\n")
    arguments = ["--task", "plug_in", "--padding-factor", 1, "--trainpref", text]
    run(*arguments, "--destdir", tmp_path / "bin")
    assert items(tmp_path / "bin/train") == [[5, 5, 4, 2]]


def test_binarized_text_can_be_printed():
    script = GOLDEN.parents[2] / "scripts/read_binarized.py"
    prefix = GOLDEN / "bin/main/valid"
    command = [sys.executable, str(script), "--input", str(prefix)]
    ids = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    dataset = make_dataset(prefix, "mmap")
    assert ids.splitlines() == [" ".join(map(str, dataset.read(i))) for i in range(len(dataset))]
    command += ["--dict", str(GOLDEN / "bin/main/dict.txt")]
    words = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    text = (GOLDEN / "text/valid.txt").read_text(encoding="utf-8")
    pairs = [
        (printed, original)
        for line, original_line in zip(words.splitlines(), text.splitlines(), strict=True)
        for printed, original in zip(line.split(), original_line.split(), strict=True)
    ]
    assert all(printed in (original, "<unk>") for printed, original in pairs)
    assert sum(printed == original for printed, original in pairs) > 4900


def test_a_log_file_that_cannot_be_written_is_named(tmp_path):
    text = write(tmp_path / "text", "a b\n")
    found = run_command(
        "--trainpref", text, "--destdir", tmp_path / "bin", "--log-file", tmp_path / "no" / "log"
    )
    assert found.returncode == 1
    assert "--log-file: cannot write" in found.stderr and "Traceback" not in found.stderr
    assert not (tmp_path / "bin").exists()


def test_an_empty_name_between_commas_is_refused(tmp_path):
    text = write(tmp_path / "text", "a b\n")
    with pytest.raises(ValueError, match="--validpref has an empty name"):
        run("--trainpref", text, "--validpref", f"{text},", "--destdir", tmp_path / "bin")
    assert not (tmp_path / "bin").exists()


def test_a_destination_that_cannot_be_written_is_named(tmp_path):
    text = write(tmp_path / "text", "a b\n")
    with pytest.raises(OSError, match="--destdir: cannot write there") as failure:
        run("--trainpref", text, "--destdir", text / "bin")
    assert str(text / "bin") in str(failure.value)


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX limits")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_leaves_nothing(tmp_path, workers):
    import resource

    limit = 20 << 10
    found = run_command(
        *("--trainpref", GOLDEN / "text/train.txt", "--destdir", tmp_path / "bin"),
        *("--workers", workers),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert found.returncode == 1
    assert "--destdir: writing there failed: File too large" in found.stderr
    assert "Traceback" not in found.stderr and not (tmp_path / "bin").exists()


def test_a_closed_standard_output_is_no_defect(tmp_path):
    command = " ".join([*COMMAND, "--only-source", "--destdir", str(tmp_path / "bin"), ">&-"])
    found = subprocess.run(command, shell=True, env=ENVIRONMENT, capture_output=True, text=True)
    assert found.returncode == 1 and "Traceback" not in found.stderr
    assert "--trainpref" in found.stderr
