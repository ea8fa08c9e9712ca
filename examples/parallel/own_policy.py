"""A policy for layers of one's own, in about 60 lines.

python examples/parallel/own_policy.py
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fairseq.model_parallel.parallelize import parallelize
from fairseq.model_parallel.policies import register_policy
from fairseq.model_parallel.policy import HeadState, Layer, Policy


class Block(nn.Module):
    """Attention with a fused projection, [3, heads, width], and a slope for each head."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.heads, self.width = heads, width
        self.fused = nn.Linear(heads * width, 3 * heads * width)
        self.out = nn.Linear(heads * width, heads * width)
        self.register_buffer("slopes", 2.0 ** -torch.arange(1.0, heads + 1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.fused(x).view(*x.shape[:2], 3, self.heads, self.width)
        q, k, v = parts.permute(2, 0, 3, 1, 4)  # (B, H, T, K) each
        distance = torch.arange(x.size(1)).view(-1, 1) - torch.arange(x.size(1))
        bias = -self.slopes.view(-1, 1, 1) * distance.abs()
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias.unsqueeze(0))
        return x + self.out(mixed.transpose(1, 2).flatten(2))


@register_policy
class BlockPolicy(Policy):
    """What of a `Block` is cut."""

    @staticmethod
    def original_layer_class() -> type[nn.Module]:
        return Block

    @staticmethod
    def config(model: nn.Module) -> Any:
        return next(m.heads for m in model.modules() if isinstance(m, Block))

    @staticmethod
    def heads(config: Any) -> dict[str, int]:
        return {"heads": config}

    @staticmethod
    def replace_arguments(config: Any, world_size: int) -> dict[str, Any]:
        return {"heads": config // world_size}

    @staticmethod
    def attn_qkv() -> list[Layer]:
        return [Layer(weight="fused.weight", bias="fused.bias", n_fused=3, layout="parts")]

    @staticmethod
    def attn_out() -> list[Layer]:
        return [Layer(weight="out.weight", bias="out.bias")]

    @staticmethod
    def head_state() -> list[HeadState]:
        return [HeadState(buffer="slopes")]


if __name__ == "__main__":
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(heads=4, width=8) for _ in range(3))).eval()
    x = torch.randn(2, 10, 32)
    with torch.no_grad():
        alone = model(x)
        with parallelize(model, num_gpus=2):
            shared = model(x)
    print(f"largest difference: {(alone - shared).abs().max().item():.1e}")
