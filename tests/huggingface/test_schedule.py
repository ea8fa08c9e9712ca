"""Batches cut into shorter rows: every target once, in every kind of batch and loop."""

from __future__ import annotations

from collections import Counter, UserDict
from types import SimpleNamespace

import pytest
import torch
import transformers
from tiny_transformers import collate, gpt2, tokens

from fairseq.huggingface import Alibi, is_alibi, split_batch


def _numbered(rows: int, length: int) -> torch.Tensor:
    """Ids that say where they come from: 1000 * row + column, from 1000 on."""
    return 1000 * torch.arange(1, rows + 1)[:, None] + torch.arange(length)


def _targets(batch, *, shifts: bool) -> Counter:
    """Counts (token given last, token to predict) of a batch."""
    ids, labels = batch["input_ids"], batch["labels"]
    given, wanted = (ids[:, :-1], labels[:, 1:]) if shifts else (ids, labels)
    return Counter(
        (int(a), int(b))
        for a, b in zip(given.flatten(), wanted.flatten(), strict=True)
        if b != -100
    )


@pytest.mark.parametrize("length", [16, 17, 18, 19, 20, 5, 1])
@pytest.mark.parametrize("scaling", [0.25, 0.3, 0.5, 0.29, 1.0])
@pytest.mark.parametrize("rows", [1, 3])
def test_every_target_exactly_once(length, scaling, rows) -> None:
    ids = _numbered(rows, length)
    batch = {"input_ids": ids, "labels": ids.clone()}
    found = split_batch(batch, scaling)
    expected = Counter(
        (int(ids[row, t]), int(ids[row, t + 1])) for row in range(rows) for t in range(length - 1)
    )
    assert _targets(found, shifts=True) == expected
    shifted = {"input_ids": ids, "labels": ids + 1}
    found = split_batch(shifted, scaling, shifts_labels=False)
    assert _targets(found, shifts=False) == Counter((int(i), int(i) + 1) for i in ids.flatten())


def test_pieces_by_hand() -> None:
    ids = torch.arange(10)[None]
    found = split_batch({"input_ids": ids, "labels": ids}, 0.4, pad_token_id=77)
    assert found["input_ids"].tolist() == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8], [8, 9, 77, 77, 77]]
    ignored = -100
    assert found["labels"].tolist() == [
        [0, 1, 2, 3, 4],
        [ignored, 5, 6, 7, 8],
        [ignored, 9, ignored, ignored, ignored],
    ]
    assert found["attention_mask"].tolist() == [[1] * 5, [1] * 5, [1, 1, 0, 0, 0]]
    dropped = split_batch({"input_ids": ids, "labels": ids}, 0.4, remainder="drop")
    assert dropped["input_ids"].tolist() == found["input_ids"].tolist()[:2]
    assert "attention_mask" not in dropped


def test_a_length_that_fits_needs_no_padding() -> None:
    ids = torch.arange(8)[None]
    found = split_batch({"input_ids": ids, "labels": ids}, 0.5)
    assert found["input_ids"].tolist() == [[0, 1, 2, 3, 4], [3, 4, 5, 6, 7]]
    assert found["labels"].tolist() == [[0, 1, 2, 3, 4], [-100, -100, 5, 6, 7]]
    assert set(found) == {"input_ids", "labels"}


def test_all_kinds_of_values() -> None:
    rows, length = 2, 6
    ids = _numbered(rows, length)
    square = torch.arange(length * length).view(1, 1, length, length)
    batch = {
        "input_ids": ids,
        "token_type_ids": torch.tensor([[0, 0, 0, 1, 1, 1]] * rows),
        "position_ids": torch.arange(length)[None],
        "attention_mask": square.expand(rows, 1, length, length),
        "causal_mask": square[:, 0].expand(rows, length, length),
        "extra": ids[..., None] * torch.ones(3),
        "boxes": torch.zeros(rows, length, 2, 4),
        "index": torch.tensor([7, 8]),
        "names": ["a", "b"],
        "flag": True,
    }
    found = split_batch(batch, 0.5, shifts_labels=False)
    assert found["input_ids"].tolist() == [
        *ids[:1].view(2, 3).tolist(),
        *ids[1:].view(2, 3).tolist(),
    ]
    assert found["token_type_ids"].tolist() == [[0, 0, 0], [1, 1, 1]] * 2
    assert found["position_ids"].tolist() == [[0, 1, 2], [3, 4, 5]] * 2
    assert found["attention_mask"].shape == (4, 1, 3, 3)
    assert found["attention_mask"][1, 0].tolist() == square[0, 0, 3:, 3:].tolist()
    assert found["causal_mask"][2].tolist() == square[0, 0, :3, :3].tolist()
    assert found["extra"].shape == (4, 3, 3) and found["boxes"].shape == (4, 3, 2, 4)
    assert found["index"].tolist() == [7, 7, 8, 8]
    assert found["names"] == ["a", "a", "b", "b"]
    assert found["flag"] is True


def test_kinds_of_batches() -> None:
    ids = _numbered(2, 8)
    encoding = transformers.BatchEncoding({"input_ids": ids, "labels": ids})
    found = split_batch(encoding, 0.5)
    assert type(found) is transformers.BatchEncoding and found["input_ids"].shape == (4, 5)
    assert type(split_batch(UserDict(input_ids=ids), 0.5)) is UserDict
    pair = split_batch((ids, ids), 0.5)
    assert type(pair) is tuple and pair[1][1].tolist()[:2] == [-100, -100]
    three = split_batch(
        [ids, torch.ones_like(ids), ids], 0.5, names=("input_ids", "attention_mask", "labels")
    )
    assert type(three) is list and [x.shape for x in three] == [(4, 5)] * 3
    one_row = split_batch({"input_ids": ids[0], "labels": ids[0]}, 0.5)
    assert one_row["input_ids"].shape == (2, 5)


@pytest.mark.parametrize("is_left", [True, False])
def test_pieces_of_padding_are_left_out(is_left) -> None:
    ids = _numbered(2, 8)
    mask = torch.ones_like(ids)
    (mask[0, :4] if is_left else mask[0, 4:]).zero_()
    batch = {"input_ids": ids, "attention_mask": mask, "row": torch.tensor([5, 6]), "n": ["a", "b"]}
    found = split_batch(batch, 0.5, shifts_labels=False)
    assert found["row"].tolist() == [5, 6, 6] and found["n"] == ["a", "b", "b"]
    assert bool(found["attention_mask"].any(1).all())


@pytest.mark.parametrize(
    ("batch", "arguments", "error", "text"),
    [
        ({"labels": torch.zeros(2, 8)}, {}, ValueError, "it needs input_ids"),
        (torch.zeros(2, 8), {}, TypeError, "the batch is a Tensor"),
        ((1, 2, 3), {}, ValueError, "say what they are"),
        (
            {"input_ids": torch.zeros(2, 8), "labels": torch.zeros(2)},
            {},
            ValueError,
            "for each row",
        ),
        ({"input_ids": torch.zeros(2, 8), "x": torch.zeros(5)}, {}, ValueError, "x has shape"),
        ({"input_ids": torch.zeros(2, 8)}, {"scaling": 2.0}, ValueError, "above 0 and at most 1"),
        ({"input_ids": torch.zeros(2, 8)}, {"remainder": "cut"}, ValueError, "pad or drop"),
    ],
)
def test_what_cannot_be_cut(batch, arguments, error, text) -> None:
    with pytest.raises(error, match=text):
        split_batch(batch, **arguments)


def test_sums_of_losses_agree() -> None:
    # With a window of one token the context does not matter, so cutting changes no loss.
    model = gpt2()
    ids = tokens(length=20)
    whole, total = {"input_ids": ids, "labels": ids}, 0.0
    for batch in (whole, split_batch(whole, 0.3)):
        logits = model.transformer.wte(batch["input_ids"]) @ model.transformer.wte.weight.T
        labels = batch["labels"][:, 1:].flatten()
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].reshape(-1, 50), labels, reduction="sum"
        )
        total = float(loss.detach()) - total
    assert abs(total) < 1e-3


# ---- the schedule ----


def test_scaling_may_change_over_training() -> None:
    schedule = Alibi(64, [(0, 0.25), (10, 0.5), (20, 1.0)])
    assert [schedule.scaling_at(n) for n in (0, 9, 10, 19, 20, 999)] == [
        0.25,
        0.25,
        0.5,
        0.5,
        1.0,
        1.0,
    ]
    ids = _numbered(1, 8)
    batch = {"input_ids": ids}
    assert [schedule(batch, n)["input_ids"].shape for n in (0, 10, 20)] == [(4, 3), (2, 5), (1, 8)]


@pytest.mark.parametrize("scaling", [0.0, 1.5, [], [(1, 0.5)], [(0, 0.5), (0, 1.0)], [(0, 2.0)]])
def test_scalings_that_make_no_sense(scaling) -> None:
    with pytest.raises(ValueError, match="train_sequence_length_scaling"):
        Alibi(64, scaling)


def test_its_text_makes_it_again() -> None:
    for schedule in (
        Alibi(64),
        Alibi(64, [(0, 0.5), (3, 1.0)], remainder="drop", pad_token_id=3, bias_max=4.0),
    ):
        again = eval(repr(schedule), {"Alibi": Alibi})
        assert repr(again) == repr(schedule)
    assert repr(Alibi(64)) == "Alibi(max_sequence_length=64, train_sequence_length_scaling=0.25)"


def _examples(num: int, length: int) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": row, "labels": row} for row in tokens(rows=num, length=length)]


@pytest.mark.parametrize("num_workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_as_a_callback_it_cuts_training_batches_only(num_workers) -> None:
    model = gpt2()
    schedule = Alibi(16, [(0, 0.25), (2, 1.0)])
    callback = schedule.callback()
    assert isinstance(callback, transformers.TrainerCallback)
    state, control = SimpleNamespace(global_step=0), SimpleNamespace()
    callback.on_init_end(None, state, control, model=model)
    assert is_alibi(model)
    train, valid = (
        torch.utils.data.DataLoader(
            _examples(8, 16),
            2,
            collate_fn=collate,
            num_workers=num_workers,
            multiprocessing_context="forkserver" if num_workers else None,
        )
        for _ in range(2)
    )
    callback.on_train_begin(None, state, control, model=model, train_dataloader=train)
    callback.on_train_begin(None, state, control, model=model, train_dataloader=train)
    assert next(iter(train))["input_ids"].shape == (8, 5)
    assert next(iter(valid))["input_ids"].shape == (2, 16)
    state.global_step = 2
    callback.on_step_end(None, state, control)
    assert next(iter(train))["input_ids"].shape == (2, 16)


class _State:
    """What Composer's state has of what an algorithm reads, as its documentation says."""

    def __init__(self, model) -> None:
        self.model = torch.nn.ModuleDict({"model": model})
        self.optimizers = (torch.optim.SGD(model.parameters(), lr=0.1),)
        self.batch = {"input_ids": tokens(length=16), "labels": tokens(length=16)}
        self.timestamp = SimpleNamespace(batch=SimpleNamespace(value=0))


def test_as_an_algorithm_of_composer() -> None:
    events = {
        name: SimpleNamespace(name=name, value=name.lower())
        for name in ("INIT", "AFTER_DATALOADER", "EVAL_AFTER_DATALOADER", "BATCH_END")
    }
    state = _State(gpt2())
    schedule = Alibi(16, [(0, 0.25), (5, 0.5)])
    matched = [name for name, event in events.items() if schedule.match(event, state)]
    assert matched == ["INIT", "AFTER_DATALOADER"]
    schedule.apply(events["INIT"], state, None)
    assert is_alibi(state.model)
    held = {id(p) for group in state.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in state.model.parameters()}
    assert not schedule.match(events["INIT"], state)
    whole = state.batch
    for update, shape in ((0, (8, 5)), (5, (4, 9))):
        state.batch, state.timestamp.batch.value = whole, update
        schedule.apply(events["AFTER_DATALOADER"], state, None)
        assert state.batch["input_ids"].shape == shape
    assert Alibi.required_on_load()
    schedule.load_state_dict(schedule.state_dict())
    with pytest.raises(ValueError, match="going on with"):
        Alibi(32).load_state_dict(schedule.state_dict())
