"""When a run validates, saves and stops, and what it leaves behind."""

import shutil
from types import SimpleNamespace

import pytest
import torch
import yaml
from train_runs import TINY_MODEL, TINY_TRAINING, make_tiny_data, train

from fairseq.tasks.language_modeling import LanguageModelingTask
from fairseq.trainer import Trainer
from fairseq_cli import train as train_command


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_tiny_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def run(monkeypatch, caplog, tmp_path, data):
    """Returns a function: options -> a run on the tiny data (3 updates an epoch)."""

    def run_with(options, *, save_dir="ckpt", data=data):
        command = f"{data} {TINY_MODEL} {TINY_TRAINING} --save-dir {tmp_path / save_dir} {options}"
        return train(monkeypatch, caplog, command)

    return run_with


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.suffix == ".pt")


def validated_at(found):
    return [int(line["valid_num_updates"]) for line in found.json("valid")]


def saved(found, tmp_path):
    prefix = f"Saving checkpoint to {tmp_path}/ckpt/"
    return [m[len(prefix) :] for m in found.messages("fairseq.trainer") if m.startswith(prefix)]


def test_each_epoch_is_validated_and_saved(run, tmp_path):
    found = run("--max-epoch 2")
    assert found.exit_code == 0
    assert validated_at(found) == [3, 6]
    assert names(tmp_path / "ckpt") == [
        "checkpoint1.pt", "checkpoint2.pt", "checkpoint_best.pt", "checkpoint_last.pt"
    ]  # fmt: skip
    assert found.messages("fairseq_cli.train")[-1].startswith("done training in ")


def test_interval_saves_validate_and_the_oldest_go(run, tmp_path):
    found = run("--max-update 7 --save-interval-updates 2 --keep-interval-updates 2")
    # By interval 2 and 4; epoch ends 3 and 6; 7 by the limit.
    assert validated_at(found) == [2, 3, 4, 6, 7]
    assert saved(found, tmp_path) == [
        "checkpoint_1_2.pt", "checkpoint1.pt", "checkpoint_2_4.pt", "checkpoint2.pt",
        "checkpoint_last.pt" if "checkpoint_best.pt" not in saved(found, tmp_path)[-1]
        else "checkpoint_best.pt",
    ]  # fmt: skip
    assert {"checkpoint_1_2.pt", "checkpoint_2_4.pt"} <= set(names(tmp_path / "ckpt"))


def test_retention_by_epoch_and_score(run, tmp_path):
    found = run("--max-epoch 4 --keep-last-epochs 2 --keep-best-checkpoints 1")
    best = min(float(line["valid_loss"]) for line in found.json("valid"))
    assert names(tmp_path / "ckpt") == [
        f"checkpoint.best_loss_{best:.2f}.pt",
        "checkpoint3.pt", "checkpoint4.pt", "checkpoint_best.pt", "checkpoint_last.pt",
    ]  # fmt: skip


def test_validation_on_its_own_interval(run, tmp_path):
    found = run("--max-update 5 --validate-interval-updates 2 --no-epoch-checkpoints")
    assert validated_at(found) == [2, 3, 4, 5]
    assert len(saved(found, tmp_path)) == 2


def test_interval_saves_wait_for_the_first_update_allowed(run):
    found = run("--max-update 5 --save-interval-updates 1 --validate-after-updates 4")
    assert validated_at(found) == [3, 4, 5]


def test_longer_epoch_intervals(run, tmp_path):
    found = run("--max-epoch 4 --save-interval 2 --validate-interval 4")
    assert validated_at(found) == [12]
    assert names(tmp_path / "ckpt")[:2] == ["checkpoint2.pt", "checkpoint4.pt"]


def test_validation_can_be_switched_off_and_saving_too(run, tmp_path):
    found = run("--max-update 2 --disable-validation --no-save")
    assert found.exit_code == 0 and validated_at(found) == []
    assert not (tmp_path / "ckpt").exists()


def test_validation_stops_after_one_batch_more_than_asked(run):
    whole = run("--max-update 1 --no-save", save_dir="a")
    limited = run(
        "--max-update 1 --no-save --max-valid-steps 0 --max-tokens-valid 16", save_dir="b"
    )
    assert whole.json("valid")[0]["valid_wpb"] == "57"
    assert float(limited.json("valid")[0]["valid_wpb"]) <= 16


def test_patience_counts_validations_without_improvement(run):
    found = run("--max-epoch 30 --patience 2 --lr 3 --no-save")
    message = "early stop since valid performance hasn't improved for last 2 runs"
    assert message in found.messages("fairseq_cli.train")
    losses = [float(line["valid_loss"]) for line in found.json("valid")]
    best = losses.index(min(losses[:-2]))
    assert best == len(losses) - 3 and min(losses[-2:]) >= losses[best]


def test_patience_belongs_to_a_run():
    class Cfg:
        class checkpoint:
            patience = 2
            maximize_best_checkpoint_metric = False

    class One:
        best_of_patience = None
        runs_without_improvement = 0

    def stops(trainer, values):
        return [train_command.should_stop_early(Cfg, trainer, value) for value in values]

    assert stops(One(), [3.0, 3.0, 2.0, 2.5, None, 2.0]) == [False] * 5 + [True]
    assert stops(One(), [4.0, 5.0]) == [False, False]
    Cfg.checkpoint.maximize_best_checkpoint_metric = True
    assert stops(One(), [4.0, 5.0, 5.0, 4.0]) == [False, False, False, True]


def test_stop_by_rate_is_looked_at_between_epochs(run):
    found = run("--max-epoch 9 --stop-min-lr 0.45 --lr-period-updates 4 --lr-shrink 1 --no-save")
    assert any("--stop-min-lr=0.45" in m for m in found.messages("fairseq_cli.train"))
    assert found.json("train_inner") == []  # the warm-up starts below it


def test_stop_by_time(run, monkeypatch):
    monkeypatch.setattr(Trainer, "cumulative_training_time", lambda self: 7201.0)
    found = run("--stop-time-hours 2 --no-save")
    assert len(found.json("train_inner")) == 1
    assert any("stop_time_hours: 2" in m for m in found.messages("fairseq_cli.train"))


def test_update_freq_may_differ_between_epochs(run):
    found = run("--max-epoch 3 --update-freq 3,1 --no-save")
    assert [len(ids) for ids in found.ids] == [3, 3] + [1] * 12


def test_remainders_can_be_left_out_of_every_epoch(run, tmp_path):
    found = run("--max-epoch 2 --update-freq 4 --skip-remainder-batch")
    assert [len(ids) for ids in found.ids] == [4, 4]
    state = torch.load(tmp_path / "ckpt/checkpoint1.pt", weights_only=True)
    assert state["extra_state"]["train_iterator"]["epoch"] == 2
    assert state["extra_state"]["train_iterator"]["iterations_in_epoch"] == 0


def test_curriculum_leaves_the_first_epochs_in_order(run):
    found = run("--max-epoch 2 --curriculum 1 --no-save")
    rows = [len(batch) for ids in found.ids for batch in ids]
    assert rows[0] == max(rows[:6])  # the short last block comes first and leaves room for a row
    assert found.ids[:3] != found.ids[3:]


def test_settings_beside_the_checkpoint_repeat_the_run(run, tmp_path, monkeypatch, caplog):
    first = run("--max-update 2")
    path = tmp_path / "ckpt" / "config.yaml"
    settings = yaml.safe_load(path.read_text())
    assert settings["max_tokens"] == 64 and settings["arch"] == "transformer_lm_wiki103"
    again = train(
        monkeypatch, caplog, ["--config", str(path), "--save-dir", str(tmp_path / "again")]
    )
    assert again.exit_code == 0
    losses = [[line["loss"] for line in r.json("train_inner")] for r in (first, again)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("reset", ["", "--reset-optimizer", "--reset-dataloader", "--reset-meters"])
def test_what_a_reset_leaves_out(run, tmp_path, reset):
    run("--max-update 4")
    found = run(
        f"--max-update 6 {reset} --restore-file {tmp_path}/ckpt/checkpoint_last.pt", save_dir="b"
    )
    assert found.exit_code == 0
    updates = [int(line["num_updates"]) for line in found.json("train_inner")]
    epochs = [line["epoch"] for line in found.json("train_inner")]
    assert updates[0] == (1 if reset == "--reset-optimizer" else 5)
    assert epochs[0] == (1 if reset == "--reset-dataloader" else 2)
    best = [line.get("valid_best_loss") for line in found.json("valid")]
    forgets_best = reset in ("--reset-optimizer", "--reset-meters")
    assert (best[0] is None) == forgets_best


def test_optimizer_overrides(run, tmp_path):
    run("--max-update 2")
    found = run("""--max-update 3 --optimizer-overrides "{'momentum': 0.5}" """)
    state = torch.load(tmp_path / "ckpt/checkpoint_last.pt", weights_only=True)
    assert state["last_optimizer_state"]["param_groups"][0]["momentum"] == 0.5
    assert found.exit_code == 0


def test_finetuning_takes_the_weights_only(run, tmp_path):
    run("--max-update 4")
    found = run(f"--max-update 1 --finetune-from-model {tmp_path}/ckpt/checkpoint_last.pt --lr 1e-9"
                " --min-lr 1e-10 --warmup-init-lr 1e-10", save_dir="b")  # fmt: skip
    weights = [
        torch.load(tmp_path / folder / "checkpoint_last.pt", weights_only=True)["model"]
        for folder in ("ckpt", "b")
    ]
    assert found.ids == run("--max-update 1 --no-save", save_dir="c").ids
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, atol=1e-6, rtol=0)


def test_background_writing_leaves_the_same_files(run, tmp_path):
    run("--max-epoch 2")
    run("--max-epoch 2 --save-async", save_dir="b")
    assert names(tmp_path / "b") == names(tmp_path / "ckpt")
    first, second = (
        torch.load(tmp_path / folder / "checkpoint_last.pt", weights_only=True)["model"]
        for folder in ("ckpt", "b")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_several_validation_splits(run, tmp_path, data):
    more = tmp_path / "more"
    shutil.copytree(data, more)
    for ending in ("bin", "idx"):
        shutil.copy(more / f"valid.{ending}", more / f"valid1.{ending}")
    refused = run("--max-update 1 --no-save", data=more)
    assert refused.exit_code == 1
    both = run("--max-update 1 --no-save --valid-subset valid,valid1", data=more)
    assert both.json("valid")[0]["valid_loss"] == both.json("valid1")[0]["valid1_loss"]
    one = run("--max-update 1 --no-save --ignore-unused-valid-subsets", data=more)
    joined = run("--max-update 1 --no-save --combine-valid-subsets", data=more)
    assert one.json("valid")[0]["valid_loss"] == both.json("valid")[0]["valid_loss"]
    assert len(joined.json("valid")) == 1
    assert "/valid1" in joined.text() and "/valid1" not in one.text()
    assert joined.json("valid")[0]["valid_bsz"] != one.json("valid")[0]["valid_bsz"]


def test_the_log_goes_to_a_file_as_well(run, tmp_path):
    run(f"--max-update 1 --no-save --log-file {tmp_path}/train.txt")
    text = (tmp_path / "train.txt").read_text()
    assert "begin training epoch 1" in text and '"num_updates": "1"' in text


def test_a_number_of_rows_is_enough_to_make_batches(monkeypatch, caplog, tmp_path, data):
    command = f"{data} {TINY_MODEL} {TINY_TRAINING} --max-update 1 --no-save --batch-size 2"
    found = train(monkeypatch, caplog, command.replace("--max-tokens 64", ""))
    assert found.exit_code == 0
    assert [len(batch) for batch in found.ids[0]] == [2, 2]


def test_rows_may_start_with_bos_in_training(run, monkeypatch):
    first = []
    step = LanguageModelingTask.train_step

    def recording(self, sample, *args, **kwargs):
        first.extend(sample["net_input"]["src_tokens"][:, 0].tolist())
        return step(self, sample, *args, **kwargs)

    monkeypatch.setattr(LanguageModelingTask, "train_step", recording)
    assert run("--max-update 1 --no-save --add-bos-token").exit_code == 0
    assert first == [0] * 8


def test_short_lines_make_batches_of_more_rows_than_blocks_would(run):
    found = run("--max-update 2 --no-save --sample-break-mode eos")
    assert found.exit_code == 0
    assert max(len(batch) for update in found.ids for batch in update) > 64 // 16


def test_validation_may_have_a_seed_of_its_own(run, monkeypatch):
    seeds = []
    monkeypatch.setattr("fairseq.utils.set_torch_seed", seeds.append)
    run("--max-epoch 1 --no-save --fixed-validation-seed 77")
    assert seeds.count(77) == 1
    seeds.clear()
    run("--max-epoch 1 --no-save")
    assert 77 not in seeds


def test_validation_batches_have_sizes_of_their_own(run, monkeypatch):
    rows = []
    step = Trainer.valid_step

    def recording(self, sample, **kwargs):
        rows.append(sample["target"].shape[0])
        return step(self, sample, **kwargs)

    monkeypatch.setattr(Trainer, "valid_step", recording)
    sizes = {}
    for options in ("", "--batch-size-valid 1", "--max-tokens-valid 32", "--batch-size 3"):
        rows.clear()
        run(f"--max-update 1 --no-save {options}")
        sizes[options] = max(rows)
    assert sizes == {
        "": 4, "--batch-size-valid 1": 1, "--max-tokens-valid 32": 2, "--batch-size 3": 3,
    }  # fmt: skip


def test_sentences_may_be_the_unit_of_gradients(run):
    by_token = run("--max-update 1 --no-save").curve()[1]
    by_row = run("--max-update 1 --no-save --sentence-avg").curve()[1]
    # The gradient of the same sum is divided by rows, not by tokens.
    assert by_row["gnorm"] == pytest.approx(
        by_token["gnorm"] * by_token["wpb"] / by_token["bsz"], rel=2e-2
    )


def test_the_cache_of_a_gpu_is_emptied_every_so_often(monkeypatch):
    emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(trainer._num_updates))
    trainer = Trainer.__new__(Trainer)
    trainer.cuda = True
    for period, expected in ((0, []), (3, [1, 4, 7])):
        emptied.clear()
        trainer.cfg = SimpleNamespace(common=SimpleNamespace(empty_cache_freq=period))
        for trainer._num_updates in range(1, 9):
            trainer._empty_cache_if_due()
        assert emptied == expected
