"""Compiled layers, for `--compile`.

What a layer does to each token, projections, norms, sums, dropout and the feed-forward net, is
compiled. Attention is not, and neither is what is prepared for it: they choose by lengths and by
values.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from typing import Any

import torch
from torch import nn

from fairseq.modules import TransformerDecoderLayer

__all__ = ["check_compiler", "compile_layers"]


def check_compiler(device: torch.device) -> None:
    """Checks that there is what torch.compile makes code with.

    Raises:
        ValueError: there is no C++ compiler, or no Triton on a GPU.
    """
    default = "clang++" if sys.platform == "darwin" else "g++"
    compiler = os.environ.get("CXX", default)
    if shutil.which(compiler) is None:
        raise ValueError(
            f"--compile needs a C++ compiler, and there is no {compiler}; install one, name it in "
            "the environment variable CXX, or leave the flag out"
        )
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise ValueError("--compile needs Triton on a GPU; pip install triton, or leave it out")


def compile_layers(model: nn.Module, backend: str = "inductor") -> None:
    """Has every layer of a decoder compiled when it is first called.

    Names in a state dict stay as they are.

    Args:
        model: a language model, changed in place.
        backend: of `torch.compile`.

    Raises:
        ValueError: the model has no layers that can be compiled.
    """
    decoder: Any = getattr(model, "decoder", None)
    layers: list[Any] = list(getattr(decoder, "layers", []))
    for layer in layers:
        if type(layer) is not TransformerDecoderLayer or "forward" in vars(layer):
            raise ValueError(
                f"--compile is for language models of this project's layers without "
                f"--checkpoint-activations, not for {type(model).__name__} with "
                f"{type(layer).__name__}"
            )
    for layer in layers:
        layer.self_attn.attend = torch.compiler.disable(layer.self_attn.attend)
        layer.compile(dynamic=True, backend=backend)
