"""How the weights of models lie in memory while they generate, and with what they are computed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

__all__ = ["kernels_for_few_tokens", "lay_out_for_generation"]


@contextlib.contextmanager
def kernels_for_few_tokens(models: Sequence[Any]) -> Iterator[None]:
    """Does without oneDNN as long as the context lasts, if all models are of float32 on a CPU.

    Of what they call, torch hands it activation functions alone; for one token it takes several
    times as long to call it as to compute them.
    """
    backend: Any = torch.backends.mkldnn
    was_enabled = backend.enabled
    parameters = (parameter for model in models for parameter in model.parameters())
    if all(p.device.type == "cpu" and p.dtype == torch.float32 for p in parameters):
        backend.enabled = False
    try:
        yield
    finally:
        backend.enabled = was_enabled


def lay_out_for_generation(models: Sequence[Any]) -> None:
    """Stores the weights of models so that products with few tokens are fast.

    Weights of linear layers are stored by input channel instead of by output channel, which on a
    CPU halves the time of a product with some five to ten rows; those of queries, keys and values
    become parts of one matrix. Parameters keep names, shapes and values. Not for models that will
    be trained.

    Args:
        models: changed in place.
    """
    for model in models:
        shared = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in [m.weight]}
        module: Any
        for module in model.modules():
            if hasattr(module, "join_projections"):
                module.join_projections()
        for module in model.modules():
            if type(module) is nn.Linear and id(module.weight) not in shared:
                weight = module.weight
                if type(weight) is nn.Parameter and weight.is_contiguous():
                    with torch.no_grad():
                        weight.data = weight.data.t().contiguous().t()
