"""What of a model is cut, as data.

A `Policy` names, for one class of layers, the weights that are cut by columns or rows, the numbers
that are counted per process afterwards, and the state that each head has of its own. It is turned
into a plan of torch's parallel styles by `fairseq.model_parallel.tensor_parallel`. The fields are
those of parallelformers 1.2.7 (2022), with what they lacked: layouts of fused weights by name,
fewer heads of keys and values than of queries, per-head state, and the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from fairseq.attention.head_share import HeadShare

__all__ = ["HeadState", "Layer", "Policy", "check_heads"]

LAYOUTS = ("parts", "heads")


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A weight and its bias, by their names within the policy's layer.

    Attributes:
        weight: dotted name; `[i]` for the i-th of a list.
        bias: dotted name, of the same module; "" if it has none.
        n_fused: how many projections lie in one weight, such as 3 for queries, keys and values.
        layout: order of a fused weight's outputs: `parts` is [n_fused, heads, head width] (GPT-2,
            MPT), `heads` is [heads, n_fused, head width] (BLOOM).
        replace: makes, of the module found, the one to cut; None cuts an `nn.Linear` as it is.
        reversed: the weight is (in, out); the module becomes an `nn.Linear` with (out, in).
        ignore_checker: pass over a name that the layer does not have, instead of failing.

    Raises:
        ValueError: no weight is named, or the fields contradict each other.
    """

    weight: str
    bias: str = ""
    n_fused: int = 1
    layout: str = "parts"
    replace: Callable[[nn.Module], nn.Module] | None = None
    reversed: bool = False
    ignore_checker: bool = False

    def __post_init__(self) -> None:
        if not self.weight:
            raise ValueError("a Layer must name a weight, such as Layer(weight='mlp.fc1.weight')")
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout is {self.layout!r}; it must be one of {', '.join(LAYOUTS)}")
        if self.n_fused < 1:
            raise ValueError(f"n_fused is {self.n_fused}; it must be 1 or more")
        if self.bias and self._module_of(self.bias) != self.module:
            raise ValueError(
                f"weight {self.weight} and bias {self.bias} are not those of one module"
            )

    @property
    def module(self) -> str:
        """Dotted name of the module that has the weight."""
        return self._module_of(self.weight)

    @staticmethod
    def _module_of(name: str) -> str:
        return name.replace("[", ".").replace("]", "").rpartition(".")[0]


@dataclass(frozen=True, kw_only=True)
class HeadState:
    """A tensor with an entry for each head that is no weight, such as ALiBi's slopes.

    It is made for all heads, and each process takes its own: made anew from the number of local
    heads it would be another model.

    Attributes:
        argument: keyword argument of the layer that holds it; or
        buffer: dotted name of a tensor within the layer.
        dim: axis of the heads, which may be joined with rows in front of them, as (B * H).
        ignore_checker: pass over a buffer that the layer does not have.

    Raises:
        ValueError: not exactly one of argument and buffer is given.
    """

    argument: str = ""
    buffer: str = ""
    dim: int = 0
    ignore_checker: bool = False

    def __post_init__(self) -> None:
        if bool(self.argument) == bool(self.buffer):
            raise ValueError("a HeadState is either an argument of the layer or a buffer in it")


class Policy:
    """How layers of one class are cut; a subclass overrides what its model has.

    Methods are static and return data. `config` is the model's own (see `config`), `world_size` the
    number of processes that share the weights.
    """

    @staticmethod
    def original_layer_class() -> type[nn.Module]:
        """Returns the class of the layers (subclasses count)."""
        raise NotImplementedError("a Policy must say its original_layer_class()")

    @staticmethod
    def heads(config: Any) -> Mapping[str, int]:
        """Returns the numbers of heads that the processes share, by the names users know."""
        raise NotImplementedError("a Policy must say its heads(config)")

    @staticmethod
    def replace_arguments(config: Any, world_size: int) -> dict[str, Any]:
        """Returns new values of attributes, by their dotted names within the layer."""
        return {}

    @staticmethod
    def replace_modules() -> dict[str, type[nn.Module]]:
        """Returns classes for modules of this model, by the names of those they take the place of.

        Other instances of the class are left alone.
        """
        return {}

    @staticmethod
    def attn_qkv() -> list[Layer]:
        """Returns the projections to queries, keys and values, cut by heads."""
        return []

    @staticmethod
    def attn_out() -> list[Layer]:
        """Returns the projection of the heads' outputs; its bias is added once."""
        return []

    @staticmethod
    def mlp_in() -> list[Layer]:
        """Returns the projections into the inner width, gates too."""
        return []

    @staticmethod
    def mlp_out() -> list[Layer]:
        """Returns the projections from the inner width; their biases are added once."""
        return []

    @staticmethod
    def head_state() -> list[HeadState]:
        """Returns the state that each head has of its own."""
        return []

    @staticmethod
    def config(model: nn.Module) -> Any:
        """Returns the settings that the other methods are given."""
        return getattr(model, "config", None)

    @staticmethod
    def embeddings(model: nn.Module) -> list[str]:
        """Returns the names of the embeddings whose rows are words, cut by words."""
        return _names_of(model, _call(model, "get_input_embeddings"))

    @staticmethod
    def outputs(model: nn.Module) -> list[str]:
        """Returns the names of the layers that score words, cut by words."""
        return _names_of(model, _call(model, "get_output_embeddings"))

    @staticmethod
    def install(model: nn.Module, share: HeadShare | None) -> None:
        """Tells a model that asks for it which heads it computes; None is all again."""


def check_heads(heads: Mapping[str, int], world_size: int) -> None:
    """Checks that every process gets whole heads, and as many as the others.

    Raises:
        ValueError: it cannot; the message says which sizes could.
    """
    if all(count % world_size == 0 for count in heads.values()):
        return
    common = math.gcd(*heads.values())
    possible = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
    counts = " and ".join(f"{count} {name}" for name, count in heads.items())
    raise ValueError(
        f"{counts} cannot be shared by {world_size} processes (--tensor-parallel-size, num_gpus); "
        f"sizes that divide them are {possible}"
    )


def _call(model: nn.Module, method: str) -> Any:
    function = getattr(model, method, None)
    return None if function is None else function()


def _names_of(model: nn.Module, module: Any) -> list[str]:
    return [name for name, each in model.named_modules() if each is module]
