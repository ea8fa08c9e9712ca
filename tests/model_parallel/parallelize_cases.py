"""Models and policies that the workers of `parallelize` import by name in its tests."""

from __future__ import annotations

import os
import signal
from typing import Any

import torch
import torch.distributed as dist
from tensor_cases import gradients, hugging_face_model, language_model, lm_loss, padded
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from fairseq.model_parallel.mesh import build_mesh
from fairseq.model_parallel.parallelize import parallelize
from fairseq.model_parallel.policy import Layer, Policy


class Block(nn.Module):
    """An inner layer that can be told to fail on one process."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 8)
        self.down = nn.Linear(8, 6)

    def forward(self, x: torch.Tensor, trouble: str = "") -> torch.Tensor:
        rank = dist.get_rank() if dist.is_initialized() else 0
        if trouble == "everywhere":
            raise ValueError("no such thing")
        if trouble == "error" and rank == 1:
            raise ValueError("only here")
        if trouble == "killed" and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return x + self.down(torch.relu(self.up(x)))


class BlockModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.blocks[1].up.weight = self.blocks[0].up.weight

    def forward(self, x: torch.Tensor, trouble: str = "") -> dict[str, Any]:
        for block in self.blocks:
            x = block(x, trouble)
        return {
            "x": x,
            "past_key_values": "of own heads",
            "noise": torch.rand(2),
            "is_training": self.training,
        }


class BlockPolicy(Policy):
    @staticmethod
    def original_layer_class() -> type[nn.Module]:
        return Block

    @staticmethod
    def heads(config: Any) -> dict[str, int]:
        return {"inner channels": 8}

    @staticmethod
    def mlp_in() -> list[Layer]:
        return [Layer(weight="up.weight", bias="up.bias")]

    @staticmethod
    def mlp_out() -> list[Layer]:
        return [Layer(weight="down.weight", bias="down.bias")]


def block_model() -> BlockModel:
    torch.manual_seed(11)
    return BlockModel()


def in_place() -> dict[str, Any]:
    """Under a launcher: training, then the whole model again; figures; what is refused."""
    whole, model = language_model("shared"), language_model("shared")
    with parallelize(model, seed=3) as handle:
        seeds = float(torch.rand(()))
        figures = [handle.memory_allocated(), handle.memory_reserved()]
        losses = [lm_loss(whole), lm_loss(model)]
        for loss in losses:
            loss.backward()
        wanted, got = gradients(whole), gradients(model)
        for each in (whole, model):
            torch.optim.SGD(each.parameters(), lr=0.1).step()
        is_cut = any(hasattr(p, "to_local") for p in model.parameters())
    handle.close()  # a second time does nothing
    after = dict(model.named_parameters())
    moved = max(float((after[n] - p).abs().max().detach()) for n, p in whole.named_parameters())
    refused = {}
    two_axes = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("dp", "tp"))
    for name, options in {"mesh": {"mesh": two_axes}, "num_gpus": {"num_gpus": 7}}.items():
        try:
            parallelize(language_model("shared"), **options)
        except ValueError as error:
            refused[name] = str(error)
    grid = build_mesh(dist.get_world_size(), tensor_parallel_size=2)
    half = hugging_face_model("gpt2")
    with parallelize(half, mesh=grid, fp16=True), torch.no_grad():
        dtype = str(half(**padded()).logits.dtype)
    return {
        "seeds": seeds,
        "figures": figures,
        "losses": [loss.item() for loss in losses],
        "worst": max(float((got[n] - g).abs().max()) for n, g in wanted.items()),
        "moved": moved,
        "is_cut": is_cut,
        "plain_again": not any(hasattr(p, "to_local") for p in model.parameters()),
        "refused": refused,
        "dtype": dtype,
    }
