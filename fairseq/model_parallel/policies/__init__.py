"""The policies there are, and which one a model's layers have.

Policies are found by the names of classes, so that looking one up loads no other library.
"""

from __future__ import annotations

import importlib

from torch import nn

from fairseq.model_parallel.policy import Policy

__all__ = ["find_policy", "known_policies", "register_policy"]

_HERE = "fairseq.model_parallel.policies"

_BUILT_IN = {
    "TransformerDecoderLayer": f"{_HERE}.transformer_lm:TransformerLMPolicy",
    "GPT2Block": f"{_HERE}.gpt2:GPT2Policy",
    "BertLayer": f"{_HERE}.bert:BertPolicy",
    "RobertaLayer": f"{_HERE}.bert:RobertaPolicy",
    "BloomBlock": f"{_HERE}.bloom:BloomPolicy",
    "MptBlock": f"{_HERE}.mpt:MptPolicy",
    "OPTDecoderLayer": f"{_HERE}.opt:OPTPolicy",
    "LlamaDecoderLayer": f"{_HERE}.llama:LlamaPolicy",
}
_registered: dict[str, type[Policy]] = {}


def register_policy(policy: type[Policy]) -> type[Policy]:
    """Makes a policy known for the layers it names; usable as a decorator.

    A later policy for the same class takes the place of an earlier one.
    """
    _registered[policy.original_layer_class().__name__] = policy
    return policy


def known_policies() -> list[str]:
    """Returns the names of the layer classes that have a policy."""
    return sorted({*_BUILT_IN, *_registered})


def find_policy(model: nn.Module) -> type[Policy]:
    """Returns the policy for a model's layers.

    Raises:
        ValueError: none of its modules has one.
    """
    for module in model.modules():
        for each in type(module).__mro__:
            for policy in (_registered.get(each.__name__), _built_in(each.__name__)):
                if policy is not None and isinstance(module, policy.original_layer_class()):
                    return policy
    raise ValueError(
        f"there is no policy for {type(model).__name__}; its layers must be one of "
        f"{', '.join(known_policies())}. Write a Policy, as examples/parallel/own_policy.py "
        "does, and give it as custom_policies, or call register_policy"
    )


def _built_in(class_name: str) -> type[Policy] | None:
    if class_name not in _BUILT_IN:
        return None
    module, _, name = _BUILT_IN[class_name].partition(":")
    policy: type[Policy] = getattr(importlib.import_module(module), name)
    return policy
