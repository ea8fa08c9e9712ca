"""Several processes with parts of the weights compute what one process with all of them does."""

import functools
import multiprocessing

import pytest
import tensor_cases
import torch
import vocabulary_cases
from parallel_launch import findings, launch

from fairseq.model_parallel.sharded_checkpoint import load_sharded, whole_from_sharded

WORLD_SIZES = (2, 4)
NUM_SCORES = 27 * 101  # tokens times words
SHARE_OF_TWO = 0.53  # of the weights on each of two processes: half, norms and a rest


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tensor")


@pytest.fixture(scope="module")
def found(folder):
    """Returns a function: (case, processes) -> what each process found."""
    multiprocessing.set_forkserver_preload([vocabulary_cases.__name__])
    both = ["language_models", "all_hugging_face"]
    vocabulary = ["formula", "criterions", "sizes", "evaluation"]
    names = {2: [*both, "incremental", "dropout", "recomputed", "refused", "own_models"], 4: both}
    for world_size, wanted in names.items():
        cases = {name: getattr(tensor_cases, name) for name in wanted}
        cases |= {name: getattr(vocabulary_cases, name) for name in vocabulary}
        if world_size == 4:
            cases["sharded_files"] = functools.partial(
                tensor_cases.sharded_files, str(folder / "sharded")
            )
        launch(world_size, cases, folder)
    return lambda name, world_size=2: findings(folder, name, world_size)


def assert_equals_one_process(model, name):
    one, several = model["losses"]
    assert several == pytest.approx(one, rel=2e-6), name
    assert model["worst"][1] < 5e-5, (name, model["worst"])
    assert model["same_state"] and model["restored"], name


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_losses_and_gradients_of_language_models(found, world_size):
    for process in found("language_models", world_size):
        for name, model in process.items():
            assert_equals_one_process(model, name)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("name", tensor_cases.HUGGING_FACE)
def test_models_of_transformers(found, name, world_size):
    for process in found("all_hugging_face", world_size):
        model = process[name]
        assert_equals_one_process(model, name)
        assert model["logits"] < 1e-5
        texts = model.get("texts", [[], []])
        assert texts[0] == texts[1]


def test_each_process_holds_its_share_of_layers_and_vocabulary(found):
    for process in found("language_models"):
        assert process["shared alibi"]["share"] < SHARE_OF_TWO
        assert process["apart alibi"]["share"] < SHARE_OF_TWO


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_log_probabilities_from_scores_in_parts(found, world_size):
    for process in found("formula", world_size):
        for name, case in process.items():
            tolerance = 5e-3 if "bfloat16" in name else 1e-14 if "float64" in name else 2e-6
            assert max(case["differences"]) < tolerance, (name, case["differences"])
            assert case["best"] == case["best wanted"], name


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_criterions_compute_from_scores_in_parts(found, world_size):
    for process in found("criterions", world_size):
        for name, model in process.items():
            assert_equals_one_process(model, name)
            one, several = model["logged"]
            assert several == pytest.approx(one, rel=2e-6), name
            assert several["sum of tokens"] == pytest.approx(several["loss"], rel=2e-6)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_no_process_has_the_scores_of_all_words(found, world_size):
    for process in found("sizes", world_size):
        for name, largest in process.items():
            assert largest < 0.65 * NUM_SCORES, name


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_evaluation_and_generation_of_cut_models(found, world_size):
    for process in found("evaluation", world_size):
        for kind, differences in process.items():
            assert max(differences) < 1e-5, kind


def test_greedy_decoding_with_cached_heads(found):
    for process in found("incremental"):
        for kind, (whole, cut) in process.items():
            assert whole == cut, kind


def test_dropout_agrees_where_all_compute_the_same_and_differs_elsewhere(found):
    first, second = found("dropout")
    for name in ("out", "inner", "heads"):
        for process in (first, second):
            once, again, other = process[name][:3]
            assert torch.equal(once, again)  # the same seed
            assert not torch.equal(once, other)
            assert torch.equal(once, process[name][3])
    assert all(map(torch.equal, first["out"], second["out"]))
    assert not any(map(torch.equal, first["inner"], second["inner"]))
    shares = [zeros.float().mean().item() for zeros in (*first["inner"], *second["inner"])]
    assert shares == pytest.approx([0.5] * len(shares), abs=0.06)
    both = torch.stack(first["inner"]) & torch.stack(second["inner"])
    assert both.float().mean().item() == pytest.approx(0.25, abs=0.03)  # independent


def test_activations_that_are_computed_again_drop_the_same(found):
    for process in found("recomputed"):
        assert process["worst"] < 1e-5 * process["largest"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("heads", "1 --decoder-attention-heads cannot be shared by 2 .* sizes .* are 1"),
        ("width", "fc1 has a width of 63, which 2 processes cannot share"),
        ("groups", "8 query heads and 3 key-value heads cannot be shared by 2 .* are 1$"),
        ("unnamed", "the policy names fcl.weight, which decoder.layers.0 does not have"),
        ("nothing", "Elsewhere is for layers of class LSTM, but TransformerLanguageModel has none"),
        ("unknown", "there is no policy for Linear; .*GPT2Block.*OPTDecoderLayer"),
        ("argument", "replaces self_attn.number_of_heads, which decoder.layers.0 does not have"),
    ],
)
def test_what_cannot_be_cut_is_refused_and_left_as_it_was(found, name, message):
    for process in found("refused"):
        with pytest.raises(ValueError, match=message):
            raise ValueError(process[name])


@pytest.mark.parametrize("fused", ["parts", "heads"])
def test_fused_projections_in_both_layouts_with_slopes_of_their_own(found, fused):
    for process in found("own_models"):
        assert_equals_one_process(process[fused], fused)
        assert process[f"{fused} calls"] > 0
        # Only the cut model has another class, and only while it is cut.
        assert process[f"{fused} classes"] == ["CountingBlock", "OwnBlock", "OwnBlock"]


def test_files_in_parts_are_read_in_another_layout(found, folder):
    for process in found("sharded_files", 4):
        assert max(process["differences"]) < 1e-5
        assert "reorders the rows of fused weights" in process["refused"]
    one = tensor_cases.language_model("adaptive_tied")
    other = tensor_cases.language_model("adaptive_tied")
    optimizer = tensor_cases.adam(one)
    load_sharded(folder / "sharded", one, optimizer)
    assert all(state["step"] == 1 for state in optimizer.state.values())
    whole_from_sharded(folder / "sharded", str(folder / "whole.pt"))
    other.load_state_dict(torch.load(folder / "whole.pt", weights_only=True)["model"])
    for name, param in one.named_parameters():
        torch.testing.assert_close(other.get_parameter(name), param, rtol=0, atol=0)
    tensor_cases.trained_once(one, optimizer)
    wanted = tensor_cases.language_model("adaptive_tied")
    steps = tensor_cases.adam(wanted)
    for _ in range(2):
        twice = tensor_cases.trained_once(wanted, steps)
    for name, param in one.state_dict().items():
        torch.testing.assert_close(param, twice[name], rtol=0, atol=1e-5)
    with pytest.raises(FileNotFoundError, match="is no sharded checkpoint"):
        load_sharded(folder, one)
