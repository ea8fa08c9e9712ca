"""Changes to a model that can be taken back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

__all__ = ["Undo"]

_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_load_state_dict_pre_hooks",
)


class Undo:
    """Remembers a model as it is, and what is changed after that.

    Args:
        model: classes, hooks, children and parameters of all its modules are remembered, and
            those that come later are dropped. Parameters that are replaced give up their memory by
            `free`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._modules = [
            (
                module,
                {name: type(vars(module)[name])(vars(module)[name]) for name in _HOOKS},
                dict(module._modules),
                dict(module._parameters),
                vars(module).get("forward"),
                type(module),
            )
            for module in model.modules()
        ]
        self._steps: list[Callable[[], None]] = []
        self.params: dict[str, nn.Parameter] = dict(model.named_parameters(remove_duplicate=False))

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Sets an attribute, to be set back."""
        before = getattr(owner, name)
        self._steps.append(lambda: setattr(owner, name, before))
        setattr(owner, name, value)

    def free(self) -> None:
        """Lets the memory of replaced parameters go; their values must be given back later."""
        kept = {id(param) for param in self._model.parameters()}
        for param in self.params.values():
            if id(param) not in kept:
                param.data = param.data.new_empty(0)

    def take_back(self, values: dict[str, torch.Tensor] | None) -> None:
        """Takes all changes back.

        Args:
            values: of all parameters, by the names they had; None if none was freed.
        """
        for step in reversed(self._steps):
            step()
        for module, hooks, children, params, forward, own_class in self._modules:
            module.__class__ = own_class
            for name, entries in hooks.items():
                # In place: whoever added a hook holds on to the dictionary to remove it.
                vars(module)[name].clear()
                vars(module)[name].update(entries)
            module._modules.clear()
            module._modules.update(children)
            module._parameters.clear()
            module._parameters.update(params)
            if forward is None:
                vars(module).pop("forward", None)
            else:
                vars(module)["forward"] = forward
        if values is None:
            return
        for name, param in self.params.items():
            param.data = values[name].to(param.data.device, param.data.dtype)
            param.grad = None
