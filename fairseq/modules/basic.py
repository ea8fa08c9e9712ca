"""Small parts that layers and models are made of."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

from fairseq.modules.dropout import dropout

__all__ = [
    "ACTIVATIONS",
    "Embedding",
    "FairseqDropout",
    "LayerDropModuleList",
    "LayerNorm",
    "Linear",
    "gelu",
    "gelu_accurate",
    "get_activation_fn",
    "is_plain_linear",
]

logger = logging.getLogger(__name__)


def gelu(x: torch.Tensor) -> torch.Tensor:
    """Gaussian error linear unit with the exact erf, computed in float32."""
    return F.gelu(x.float()).type_as(x)


def gelu_accurate(x: torch.Tensor) -> torch.Tensor:
    """Gaussian error linear unit with the tanh approximation (Hendrycks and Gimpel 2016)."""
    return F.gelu(x, approximate="tanh")


def linear(x: torch.Tensor) -> torch.Tensor:
    """Returns its input."""
    return x


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu,
    "gelu": gelu,
    "gelu_fast": gelu_accurate,
    "gelu_accurate": gelu_accurate,
    "tanh": torch.tanh,
    "linear": linear,
}


def get_activation_fn(activation: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns the activation function of that name.

    Raises:
        ValueError: there is none of that name.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"--activation-fn: unknown function {activation!r}; known are {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[activation]


def LayerNorm(
    normalized_shape: int | list[int],
    eps: float = 1e-5,
    elementwise_affine: bool = True,
    export: bool = False,
) -> nn.LayerNorm:
    """Returns torch's layer norm; `export` has no meaning any more and is taken for plug-ins."""
    return nn.LayerNorm(normalized_shape, eps, elementwise_affine)


def Embedding(num_embeddings: int, embedding_dim: int, padding_idx: int) -> nn.Embedding:
    """Returns a table drawn from N(0, 1 / embedding_dim), its padding row zero."""
    table = nn.Embedding(num_embeddings, embedding_dim, padding_idx)
    nn.init.normal_(table.weight, mean=0, std=embedding_dim**-0.5)
    nn.init.zeros_(table.weight[padding_idx])
    return table


def Linear(in_features: int, out_features: int, bias: bool = True) -> nn.Linear:
    """Returns a linear map with Xavier-uniform weights and zero bias."""
    layer = nn.Linear(in_features, out_features, bias)
    nn.init.xavier_uniform_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def is_plain_linear(projection: nn.Module) -> bool:
    """Tells whether calling a projection does nothing but a product with its own weight."""
    return (
        type(projection) is nn.Linear
        and type(projection.weight) is nn.Parameter
        and not projection._forward_hooks
        and not projection._forward_pre_hooks
        and not projection._backward_hooks
        and not projection._backward_pre_hooks
    )


class FairseqDropout(nn.Module):
    """Dropout that a generation setting may leave switched on.

    Args:
        p: probability that an element is zeroed.
        module_name: class name of the owner, by which the setting names its modules.
    """

    def __init__(self, p: float, module_name: str | None = None) -> None:
        super().__init__()
        self.p = p
        self.module_name = module_name
        self.apply_during_inference = False

    @property
    def rate(self) -> float:
        """The probability that counts now: `p` in training, else 0 unless retained."""
        return self.p if self.training or self.apply_during_inference else 0.0

    def forward(self, x: torch.Tensor, add_to: torch.Tensor | None = None) -> torch.Tensor:
        """Drops elements of `x`; returns them, or the sum of `add_to` and them."""
        return dropout(x, self.rate, add_to=add_to)

    def make_generation_fast_(
        self,
        name: str = "",
        retain_dropout: bool = False,
        retain_dropout_modules: list[str] | None = None,
        **options: object,
    ) -> None:
        """Keeps dropout on for generation if asked to, in all or in the named classes."""
        if not retain_dropout:
            return
        self.apply_during_inference = (
            retain_dropout_modules is None or self.module_name in retain_dropout_modules
        )
        if self.apply_during_inference:
            logger.info(f"dropout of {name} stays on for generation")

    def extra_repr(self) -> str:
        return f"p={self.p}"


class LayerDropModuleList(nn.ModuleList):
    """Layers of which each is left out of a training pass with probability `p`.

    Iterating draws once for all layers. Source: Fan et al. 2020, Reducing transformer depth on
    demand with structured dropout.

    Args:
        p: probability that a layer is left out; iterating in evaluation yields all.

    Attributes:
        generator: draws; None is torch's own. Workers that compute one pass together must draw
            the same, although their dropout differs.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.generator: torch.Generator | None = None

    def __iter__(self) -> Iterator[nn.Module]:
        length = len(self)
        draws = torch.rand(length, generator=self.generator) if self.training else None
        for i, layer in enumerate(super().__iter__()):
            if draws is None or draws[i] > self.p:
                yield layer
