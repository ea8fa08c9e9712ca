"""Names of components: what is known, what is refused, what a plug-in may add."""

import subprocess
import sys

import pytest

from fairseq.registry import (
    ARCHITECTURES,
    COMPONENT_REGISTRIES,
    MODELS,
    TASKS,
    Registry,
    close_names,
    nearest_first,
)


@pytest.mark.parametrize("registry", [TASKS, MODELS, ARCHITECTURES, *COMPONENT_REGISTRIES.values()])
def test_every_name_in_the_tables_leads_to_a_class(registry):
    for name in registry:
        assert callable(registry[name])


def test_listing_names_loads_no_torch():
    code = (
        "import sys, fairseq.registry as r; "
        "print(list(r.CRITERIONS), list(r.ARCHITECTURES)); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0


def test_a_plug_in_adds_a_name_once():
    registry = Registry("thing", {})

    @registry.register("mine")
    class Mine:
        pass

    assert registry["mine"] is Mine
    assert list(registry) == ["mine"]
    with pytest.raises(ValueError, match="duplicate"):
        registry.register("mine")(type("Other", (), {}))


def test_builtin_names_are_taken_even_before_they_are_imported():
    with pytest.raises(ValueError, match="duplicate"):
        COMPONENT_REGISTRIES["criterion"].register("adaptive_loss")(type("Mine", (), {}))


def test_base_class_and_dataclass_are_checked():
    with pytest.raises(ValueError, match="must extend FairseqCriterion"):
        COMPONENT_REGISTRIES["criterion"].register("not_a_criterion")(type("Mine", (), {}))
    with pytest.raises(ValueError, match="must extend FairseqDataclass"):
        Registry("thing", {}).register("mine", dataclass=dict)(type("Mine", (), {}))


def test_unknown_and_unsupported_names_say_what_there_is():
    optimizers = COMPONENT_REGISTRIES["optimizer"]
    with pytest.raises(ValueError, match=r"unknown optimizer 'adan'; known are adam, "):
        optimizers.find("adan")
    with pytest.raises(ValueError, match=r"'lamb' is not supported: .*adam"):
        optimizers.find("lamb")


def test_an_architecture_belongs_to_a_model():
    assert ARCHITECTURES.model_of("transformer_lm_wiki103") == "transformer_lm"
    with pytest.raises(ValueError, match="unknown model type"):
        ARCHITECTURES.register_preset("no_such_model", "arch_of_it")(lambda args: None)


def test_close_names():
    known = ["--arch", "--max-tokens", "--max-tokens-valid", "--lr"]
    assert close_names("--max-token", known) == ["--max-tokens", "--max-tokens-valid"]
    assert close_names("--save-interval", known) == []


def test_nearest_first():
    assert nearest_first("--max-token", ["--arch", "--max-tokens", "--lr"]) == [
        "--max-tokens",
        "--arch",
        "--lr",
    ]
