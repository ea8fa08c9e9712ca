"""An exponential moving average of a model's parameters."""

from __future__ import annotations

import argparse
import copy
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

__all__ = ["EMA", "build_ema"]

State = Mapping[str, torch.Tensor]


def build_ema(model: nn.Module, cfg: Any, device: torch.device | str | None = None) -> EMA:
    """Builds the average of a model; with `--ema-seed-model` it starts from that checkpoint.

    Args:
        model: the model in training, unwrapped, in its precision.
        cfg: the `ema` section of the configuration.
        device: where the average lives; None is where the model is.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: a setting is out of range, or the checkpoint has no model.
    """
    ema = EMA(model, cfg, device)
    if cfg.ema_seed_model is not None:
        ema.restore(_read_weights(cfg.ema_seed_model))
    return ema


def _read_weights(path: str) -> State:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"--ema-seed-model: there is no file {path}")
    # Older checkpoints hold their settings as a Namespace; nothing else but tensors is read.
    with torch.serialization.safe_globals([argparse.Namespace]):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    if "model" not in checkpoint:
        raise ValueError(f"--ema-seed-model: {path} is no training checkpoint, it has no 'model'")
    weights: State = checkpoint["model"]
    return weights


class EMA:
    """Keeps a copy of a model whose parameters average those of the model in training.

    A trainer builds it once the model is on its device and in its precision, calls
    `step(model, num_updates)` after each update, and stores
    `extra_state["ema"] = ema.get_model().state_dict()` and, with `--ema-fp32`,
    `extra_state["ema_fp32_params"] = ema.fp32_params`; to go on,
    `restore({**extra_state["ema"], **extra_state["ema_fp32_params"]})` takes these back.

    Args:
        model: the model in training, unwrapped.
        cfg: the `ema` section: `ema_decay`, `ema_start_update`, `ema_update_freq`, `ema_fp32`.
        device: where the average lives; None is where the model is.

    Attributes:
        fp32_params: parameter name -> average in float32, with `ema_fp32`; else empty.

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(
        self, model: nn.Module, cfg: Any, device: torch.device | str | None = None
    ) -> None:
        if not 0.0 <= cfg.ema_decay <= 1.0:
            raise ValueError(f"--ema-decay must be between 0 and 1, not {cfg.ema_decay}")
        if cfg.ema_update_freq < 1:
            raise ValueError(f"--ema-update-freq must be at least 1, not {cfg.ema_update_freq}")
        self.cfg = cfg
        self.decay: float = cfg.ema_decay
        self.fp32_params: dict[str, torch.Tensor] = {}
        self.model = copy.deepcopy(model).requires_grad_(False)
        if device is not None:
            self.model.to(device)
        if cfg.ema_fp32:
            self.build_fp32_params()

    def get_model(self) -> nn.Module:
        """Returns the averaged model."""
        return self.model

    def get_decay(self) -> float:
        """Returns the decay of the last step."""
        return self.decay

    @torch.no_grad()
    def build_fp32_params(self, values: State | None = None) -> None:
        """Sets the float32 averages, from given values or from the averaged model.

        Raises:
            ValueError: a parameter is missing in `values` or has another shape.
        """
        params = dict(self.model.named_parameters())
        values = params if values is None else values
        wrong = [n for n in params if n not in values or values[n].shape != params[n].shape]
        if wrong:
            raise ValueError(f"averages of another model: no fitting value for {', '.join(wrong)}")
        self.fp32_params = {
            name: values[name].to(device=parameter.device, dtype=torch.float32, copy=True)
            for name, parameter in params.items()
        }

    @torch.no_grad()
    def restore(self, state_dict: State, build_fp32_params: bool = True) -> None:
        """Takes back what was stored.

        Args:
            state_dict: the averaged model's state, in its precision or in float32.
            build_fp32_params: with `ema_fp32`, take the float32 averages from it as well.
        """
        self.model.load_state_dict(state_dict, strict=True)
        if self.cfg.ema_fp32 and build_fp32_params:
            self.build_fp32_params(state_dict)

    @torch.no_grad()
    def step(self, new_model: nn.Module, updates: int | None = None) -> None:
        """Moves the averages towards a model: average = decay * average + (1 - decay) * value.

        Before update `ema_start_update` the average is the model; from then on only every
        `ema_update_freq`-th update enters. Buffers are copied.

        Args:
            new_model: the model in training, unwrapped.
            updates: number of the update; None enters the average in any case.

        Raises:
            ValueError: the model has other parameters than the average.
        """
        self.decay = self.cfg.ema_decay
        if updates is not None:
            if updates < self.cfg.ema_start_update:
                self.decay = 0.0
            elif updates % self.cfg.ema_update_freq != 0:
                return
        self._average(new_model)

    def _average(self, new_model: nn.Module) -> None:
        # Tied weights are one parameter here, so that they are averaged once.
        params = dict(self.model.named_parameters())
        news = dict(new_model.named_parameters())
        if {n: p.shape for n, p in params.items()} != {n: p.shape for n, p in news.items()}:
            raise ValueError("the moving average belongs to a model with other parameters")
        averages = self.fp32_params or params
        targets = [averages[name] for name in params]
        values = [news[n].detach().to(averages[n].device, averages[n].dtype) for n in params]
        torch._foreach_mul_(targets, self.decay)
        torch._foreach_add_(targets, values, alpha=1.0 - self.decay)
        if self.fp32_params:
            torch._foreach_copy_(list(params.values()), targets)
        buffers = dict(new_model.named_buffers())
        for name, buffer in self.model.named_buffers():
            buffer.copy_(buffers[name])
