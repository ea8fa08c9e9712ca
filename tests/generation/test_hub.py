"""Checkpoints as objects that take text."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch

from fairseq.models.transformer_lm import TransformerLanguageModel

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "invented"
DATA = str(GOLDEN / "bin" / "main")
TEXT = "Col crirkgis bostwas tu sasleavend"


@pytest.fixture(scope="module")
def hub():
    folder = GOLDEN / "ckpt" / "gpt_tiny"
    return TransformerLanguageModel.from_pretrained(str(folder), "checkpoint_last.pt", DATA)


def log_probs(hub, tokens):
    model = hub.models[0]
    with torch.no_grad():
        output = model(torch.tensor([tokens]))
        return model.get_normalized_probs(output, log_probs=True, sample=None)[0]


def test_text_and_ids(hub):
    ids = hub.encode(TEXT)
    assert ids.dtype == torch.int64 and ids[-1] == hub.src_dict.eos() and len(ids) == 6
    assert hub.decode(ids) == TEXT and hub.device == torch.device("cpu")
    assert hub.max_positions == hub.models[0].max_positions()
    assert (hub.tokenizer, hub.bpe) == (None, None)


def test_scores_are_those_of_a_full_pass(hub):
    found = hub.score([TEXT, "Vo Fotdai = ="])
    for text, scored in zip([TEXT, "Vo Fotdai = ="], found, strict=True):
        ids = hub.encode(text).tolist()[:-1]
        rows = log_probs(hub, [hub.src_dict.eos(), *ids[:-1]])
        expected = [float(rows[at, word]) for at, word in enumerate(ids)]
        assert scored["tokens"].tolist() == ids
        assert scored["positional_scores"].tolist() == pytest.approx(expected, abs=1e-4)
        assert float(scored["score"]) == pytest.approx(sum(expected) / len(ids), abs=1e-4)
    assert torch.equal(hub.score(TEXT)["tokens"], found[0]["tokens"])


def test_samples_continue_the_text(hub):
    text = hub.sample(TEXT, beam=1, max_len_b=9)
    assert text.startswith(TEXT + " ")
    tokens = [hub.src_dict.eos(), *hub.encode(text).tolist()[:-1]]
    rows = log_probs(hub, tokens)
    rows[:, hub.src_dict.pad()] = -math.inf
    new = range(6, len(tokens))
    assert [int(rows[at - 1].argmax()) for at in new] == [tokens[at] for at in new]
    both = hub.sample(["Vo", TEXT], beam=1, max_len_b=9)
    assert both[1] == text and both[0].startswith("Vo")


def test_options_of_generation(hub):
    found = hub.generate(hub.encode("Vo"), beam=3, max_len_b=5, unnormalized=True)
    assert len(found) == 3
    assert all(torch.isclose(h["score"], h["positional_scores"].sum()) for h in found)
    torch.manual_seed(0)
    drawn = {hub.sample("Vo", sampling=True, sampling_topk=50, max_len_b=6) for _ in range(8)}
    assert len(drawn) > 3
    with pytest.raises(TypeError, match="beans is no option"):
        hub.generate(hub.encode("Vo"), beans=3)


def test_generation_goes_beyond_the_training_length(hub):
    longest = hub.max_positions
    prompt = "Vo Fotdai " * longest
    text = hub.sample(prompt, max_len_b=2 * longest + 20, min_len=2 * longest + 10)
    assert len(text.split()) >= 2 * longest + 10


def test_far_keys_may_be_forgotten(hub):
    options = {"beam": 2, "max_len_b": 300, "min_len": 290}
    whole = hub.generate(hub.encode(TEXT), **options)
    found = hub.generate(hub.encode(TEXT), cache_error=1e-6, **options)
    assert torch.equal(found[0]["tokens"], whole[0]["tokens"])
    assert torch.allclose(found[0]["positional_scores"], whole[0]["positional_scores"], atol=1e-4)


def test_an_ensemble_and_an_encoding(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    source = GOLDEN / "ckpt" / "gpt_tiny" / "checkpoint_last.pt"
    for name in ("a.pt", "b.pt"):
        (folder / name).symlink_to(source)
    (folder / "dict.txt").symlink_to(Path(DATA) / "dict.txt")
    hub = TransformerLanguageModel.from_pretrained(str(folder), "a.pt:b.pt", bpe="characters")
    assert len(hub.models) == 2
    assert hub.apply_bpe("a b") == "a \u2581 b" and hub.remove_bpe("a \u2581 b") == "a b"


@pytest.mark.parametrize(
    ("name", "file", "message"),
    [
        ("nowhere", "model.pt", "no such folder, and no published checkpoint"),
        (str(GOLDEN / "ckpt" / "gpt_tiny"), "model.pt", "it has .*checkpoint_last.pt"),
    ],
)
def test_what_is_missing(name, file, message):
    with pytest.raises(FileNotFoundError, match=message):
        TransformerLanguageModel.from_pretrained(name, file)


def test_hubconf():
    spec = importlib.util.spec_from_file_location("hubconf", ROOT / "hubconf.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert callable(module.alibi_wt103_L512)
    assert module.tokenizer("space").encode(" a  b ") == "a b"
    assert module.bpe("characters").encode("ab") == "a b"
