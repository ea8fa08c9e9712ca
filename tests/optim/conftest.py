import argparse

import pytest

from fairseq.dataclass.arguments import fill_dataclass
from fairseq.registry import LR_SCHEDULERS, OPTIMIZERS


def _maker(registry):
    def make(name, **values):
        values.setdefault("lr", [0.1])
        return fill_dataclass(registry.dataclass_of(name), argparse.Namespace(**values), name=name)

    return make


@pytest.fixture(scope="session")
def optimizer_config():
    """Returns a function: (name, **settings) -> config of an optimizer."""
    return _maker(OPTIMIZERS)


@pytest.fixture(scope="session")
def schedule_config():
    """Returns a function: (name, **settings) -> config of a schedule."""
    return _maker(LR_SCHEDULERS)
