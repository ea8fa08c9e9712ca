"""The order of the original: the ids of every micro-batch of its recorded runs.

The runs on invented text are part of the project; more are checked where the environment variable
GOLDEN_DIR names the folder that holds `wikitext-2`.
"""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path

import pytest

from fairseq.data.dictionary import Dictionary
from fairseq.data.iterators import GroupedIterator
from fairseq.tasks.language_modeling import LanguageModelingConfig, LanguageModelingTask

INVENTED = Path(__file__).parents[1] / "golden" / "invented"
WIDER = Path(os.environ.get("GOLDEN_DIR", "")) / "wikitext-2"
needs_golden_dir = pytest.mark.skipif("GOLDEN_DIR" not in os.environ, reason="needs GOLDEN_DIR")

RUNS = [(INVENTED, "wiki103_tiny"), (INVENTED, "gpt_tiny")]
WIDER_RUNS = ["a0", "a0_uf3", "a1", "a2", "b0", "b1", "b2", "b3_default_io_dims"]
WIDER_RUNS += ["c_eos", "c_complete", "c_complete_doc"]
EVERY_RUN = [*RUNS, *(pytest.param(WIDER, run, marks=needs_golden_dir) for run in WIDER_RUNS)]


class Run:
    """A recorded training run: its command and the ids it trained on."""

    def __init__(self, root: Path, name: str) -> None:
        folder = root / "ckpt" / name
        self._words = shlex.split((folder / "COMMAND.txt").read_text().splitlines()[0])
        curve = (folder / "curve.jsonl").read_text().splitlines()
        self.ids = [json.loads(line)["ids"] for line in curve]
        self.num_tokens = [json.loads(line)["ntokens"] for line in curve]
        self.data = str(root / self._words[self._words.index("language_modeling") + 1])
        self.update_freq = self.number("--update-freq", 1)

    def number(self, flag: str, default: int | None) -> int | None:
        return int(self._words[self._words.index(flag) + 1]) if flag in self._words else default

    def epoch_iterator(self):
        tokens_per_sample = self.number("--tokens-per-sample", None)
        mode = self._words[self._words.index("--sample-break-mode") + 1]
        seed = self.number("--seed", 1)
        config = LanguageModelingConfig(
            data=self.data, sample_break_mode=mode, tokens_per_sample=tokens_per_sample, seed=seed
        )
        task = LanguageModelingTask.setup_task(config)
        task.load_dataset("train", combine=True)
        max_tokens = self.number("--max-tokens", None)
        return task.get_batch_iterator(
            task.dataset("train"),
            max_tokens=max_tokens,
            max_sentences=self.number("--batch-size", None),
            max_positions=min(tokens_per_sample, max_tokens),
            ignore_invalid_inputs=True,
            required_batch_size_multiple=self.number("--required-batch-size-multiple", 8),
            seed=seed,
        )


def updates(epochs, update_freq, count):
    """Returns the micro-batches of the next updates and where the iterator then stands."""
    groups = []
    while True:
        for group in GroupedIterator(epochs.next_epoch_itr(), update_freq):
            groups.append(group)
            if len(groups) == count:
                return groups, epochs.state_dict()


def ids_of(groups):
    return [[batch["id"].tolist() for batch in group] for group in groups]


@pytest.mark.parametrize(("root", "name"), EVERY_RUN)
def test_every_update_trains_on_the_ids_of_the_original(root, name):
    run = Run(root, name)
    groups, _ = updates(run.epoch_iterator(), run.update_freq, len(run.ids))
    assert ids_of(groups) == run.ids
    assert [[batch["ntokens"] for batch in group] for group in groups] == run.num_tokens


@pytest.mark.parametrize(("root", "name"), EVERY_RUN)
def test_going_on_from_the_middle_of_an_epoch_gives_the_rest(root, name):
    run = Run(root, name)
    half = len(run.ids) * 2 // 5
    _, state = updates(run.epoch_iterator(), run.update_freq, half)
    resumed = run.epoch_iterator()
    resumed.load_state_dict(state)
    groups, _ = updates(resumed, run.update_freq, len(run.ids) - half)
    assert ids_of(groups) == run.ids[half:]


@needs_golden_dir
@pytest.mark.parametrize("name", ["a0_resume", "b0_resume"])
def test_the_resumed_runs_of_the_original_go_on_after_their_first_update(name):
    run = Run(WIDER, name)
    epochs = run.epoch_iterator()
    epochs.load_state_dict({"version": 2, "epoch": 1, "iterations_in_epoch": 1, "shuffle": True})
    groups, _ = updates(epochs, run.update_freq, len(run.ids))
    assert ids_of(groups) == run.ids


def test_the_position_in_the_checkpoint_of_the_original():
    import torch

    run = Run(INVENTED, "wiki103_tiny")
    path = INVENTED / "ckpt" / "wiki103_tiny" / "checkpoint_last.pt"
    state = torch.load(path, weights_only=True)["extra_state"]["train_iterator"]
    _, position = updates(run.epoch_iterator(), run.update_freq, len(run.ids))
    assert position == state


def printed_rows(path: Path) -> list[tuple[int, list[str]]]:
    """Returns the id and the words of each row that `--output-word-probs` printed."""
    rows = []
    for line in path.read_text().splitlines():
        message = line.split(" | ", 3)[-1]
        if "\t" in message and message.endswith("]"):
            row_id, entries = message.split(" ", 1)
            rows.append((int(row_id), [e.rsplit(" [", 1)[0] for e in entries.split("\t")]))
    return rows


def test_evaluation_goes_through_the_words_in_the_order_of_the_original():
    name = "wiki103_tiny_valid_l64_c0_outputwordprobs.stdout.txt"
    data = INVENTED / "bin" / "main"
    dictionary = Dictionary.load(str(data / "dict.txt"))
    config = LanguageModelingConfig(data=str(data), tokens_per_sample=64)
    task = LanguageModelingTask(config, dictionary)
    task.load_dataset("valid")
    batches = task.eval_lm_dataloader(task.dataset("valid"), batch_size=1, num_workers=0)
    rows = [
        (int(batch["id"]), [dictionary[i] for i in batch["target"][0].tolist()])
        for batch in batches
    ]
    assert len(rows) == 88
    assert rows == printed_rows(INVENTED / "eval" / name)
