"""How columns are shared out, and batches cut with what has to travel along."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fairseq import options
from fairseq.dataclass.legacy import namespace_to_config
from fairseq.model_parallel.layout import SequenceLayout
from fairseq.model_parallel.sequence_batch import apply_sequence_parallelism
from fairseq.model_parallel.sequence_parallel import SequenceParallelContextManager
from fairseq_cli import generate


def parts(batch, size, **options):
    return [apply_sequence_parallelism(batch, rank, size, **options)[0] for rank in range(size)]


def test_layouts_by_hand():
    contiguous, zigzag = SequenceLayout(2), SequenceLayout(2, "zigzag")
    assert [contiguous.columns(r, 8) for r in range(2)] == [range(4), range(4, 8)]
    assert zigzag.columns(0, 8).tolist() == [0, 1, 6, 7]
    assert zigzag.columns(1, 8).tolist() == [2, 3, 4, 5]
    assert zigzag.order(8).tolist() == [0, 1, 6, 7, 2, 3, 4, 5]
    assert [contiguous.padded(n) for n in (1, 8, 9)] == [2, 8, 10]
    assert [zigzag.padded(n) for n in (1, 8, 9)] == [4, 8, 12]
    many = SequenceLayout(128)
    assert {len(many.columns(r, many.padded(300))) for r in range(128)} == {3}


@pytest.mark.parametrize("size", [2, 4, 8])
def test_zigzag_balances_causal_work(size):
    """Keys that a process's queries see: contiguous up to twice the mean, zigzag the mean."""
    length = 16 * size

    def seen(kind):
        layout = SequenceLayout(size, kind)
        return [sum(c + 1 for c in list(layout.columns(r, length))) for r in range(size)]

    mean = length * (length + 1) / 2 / size
    assert max(seen("contiguous")) / mean == pytest.approx(2 - 1 / size, rel=0.02)
    assert seen("zigzag") == [mean] * size


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_target_is_kept_once(size, layout):
    """Sixteen tokens have fifteen targets, however they are cut: labels are shifted before."""
    tokens = torch.arange(100, 116).view(1, 16)
    batch = {"input_ids": tokens, "labels": tokens.clone()}
    pairs = []
    for part in parts(batch, size, layout=layout):
        assert int(part["num_items_in_batch"]) == 15
        counted = part["shift_labels"].ne(-100)
        pairs += zip(
            part["input_ids"][counted].tolist(), part["shift_labels"][counted].tolist(), strict=True
        )
    assert sorted(pairs) == [(token, token + 1) for token in range(100, 115)]


def test_the_last_logits_are_those_of_the_whole_row():
    tokens = torch.arange(9).view(1, 9)
    batch = {"input_ids": tokens, "logits_to_keep": 3}
    kept = [part["input_ids"][0, part["logits_to_keep"]].tolist() for part in parts(batch, 4)]
    assert kept == [[], [], [6, 7, 8], []]
    assert apply_sequence_parallelism(batch, 0, 4)[1:] == (9, 3)
    batch["logits_to_keep"] = torch.tensor([True] * 2 + [False] * 6 + [True])
    kept = [part["input_ids"][0, part["logits_to_keep"]].tolist() for part in parts(batch, 2)]
    assert kept == [[0, 1], [8]]


def test_padding_positions_and_what_is_no_sequence():
    batch = {
        "input_ids": torch.arange(10).view(2, 5),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]]),
        "labels": torch.full((2, 5), 7),
        "rewards": torch.ones(2, 5),  # as wide as the row by chance
        "num_items_in_batch": 40,
    }
    first, second = parts(batch, 2)
    assert second["input_ids"].tolist() == [[3, 4, 0], [8, 9, 0]]
    assert second["position_ids"].tolist() == [[0, 1, 0], [2, 3, 0]]
    assert second["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 0]]
    assert second["shift_labels"].tolist() == [[7, -100, -100]] * 2
    assert first["rewards"].shape == (2, 5) and first["num_items_in_batch"] == 40
    assert parts({**batch, "num_items_in_batch": None}, 2, gradient_accumulation_steps=3)[0][
        "num_items_in_batch"
    ] == 24  # fmt: skip
    embeds = {"inputs_embeds": torch.randn(2, 5, 3)}
    assert [part["inputs_embeds"].shape for part in parts(embeds, 2)] == [(2, 3, 3)] * 2


def test_batches_of_tasks():
    batch = {
        "ntokens": 9,
        "nsentences": 2,
        "target": torch.tensor([[4, 5, 6, 7, 8], [5, 6, 7, 8, 1]]),
        "net_input": {"src_tokens": torch.tensor([[3, 4, 5, 6, 7], [4, 5, 6, 7, 1]])},
    }
    first, second = parts(batch, 2)
    assert second["net_input"]["src_tokens"].tolist() == [[3, 4, 5, 6, 7, 1], [4, 5, 6, 7, 1, 1]]
    assert second["net_input"]["columns"] == range(3, 6)
    assert second["net_input"]["sequence_length"] == 5
    assert second["target"].tolist() == [[7, 8, 1], [8, 1, 1]]
    assert [first["ntokens"], second["ntokens"]] == [9, 0]
    assert [first["num_rows"], second["num_rows"]] == [2, 0]
    several = {**batch, "target": [batch["target"], batch["target"] + 1]}
    assert [x.tolist() for x in parts(several, 2)[0]["target"]] == [
        [[4, 5, 6], [5, 6, 7]],
        [[5, 6, 7], [6, 7, 8]],
    ]


def test_batches_that_cannot_be_cut():
    tokens = torch.zeros(2, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="neither input_ids nor inputs_embeds nor net_input"):
        apply_sequence_parallelism({"pixels": tokens}, 0, 2)
    with pytest.raises(ValueError, match=r"attention_mask has the shape \(2, 4, 4\)"):
        apply_sequence_parallelism(
            {"input_ids": tokens, "attention_mask": torch.ones(2, 4, 4)}, 0, 2
        )
    with pytest.raises(ValueError, match="contiguous, zigzag"):
        apply_sequence_parallelism({"input_ids": tokens}, 0, 2, layout="stripes")


def test_settings_that_contradict_each_other():
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="give one of them"):
        SequenceParallelContextManager(model, 1, context_parallel_size=2)
    with pytest.raises(ValueError, match="give one of them"):
        SequenceParallelContextManager(model)
    with pytest.raises(ValueError, match="allgather, ring, ulysses"):
        SequenceParallelContextManager(model, 1, ring_attn_func="batch_stripe")
    with pytest.raises(ValueError, match="does not divide the 1"):
        SequenceParallelContextManager(model, 2)


@pytest.mark.parametrize("flag", ["--sequence-parallel-size", "--tensor-parallel-size"])
def test_commands_that_generate_refuse_a_mesh(flag):
    parser = options.get_generation_parser()
    args = options.parse_args_and_arch(parser, ["data", "--path", "model.pt", flag, "2"])
    with pytest.raises(ValueError, match=f"{flag} 2 does not go with this command"):
        generate.main(namespace_to_config(args))


def test_a_process_on_its_own_changes_nothing():
    model = nn.Linear(2, 2)
    with SequenceParallelContextManager(model, 1) as sequence:
        batch = {"input_ids": torch.zeros(1, 3)}
        assert sequence.cut(batch) == batch
        assert sequence.total(torch.tensor(2.0)) == 2.0
        assert model(torch.ones(1, 2)).shape == (1, 2)
