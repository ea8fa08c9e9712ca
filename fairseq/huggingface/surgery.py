"""Changing a model in place, step by step, each of which can be taken back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from fairseq.huggingface.attention import implementation_for
from fairseq.huggingface.bias import AlibiSettings, ScoreBias
from fairseq.huggingface.policies import find_policy, is_attention, is_cross_attention
from fairseq.huggingface.replacements import (
    NoPositions,
    NoRotation,
    fill_in_ids,
    note_query_offset,
    watch_output_attentions,
)

__all__ = ["MARKER", "Operation", "attach_bias"]

MARKER = "fairseq_alibi"
"""Name in a model's configuration under which the settings of its ALiBi are kept."""

_TABLES = ("wpe", "position_embeddings", "embed_positions")


def attach_bias(module: nn.Module, *, is_causal: bool, num_heads: int | None = None) -> None:
    """Gives an attention module its bias; for surgery functions, while `apply_alibi` runs.

    Args:
        module: one that hands its attention to transformers' registry.
        is_causal: whether a token sees no later one.
        num_heads: its heads; by default those of its configuration.

    Raises:
        RuntimeError: `apply_alibi` is not running.
    """
    if not _running:
        raise RuntimeError("attach_bias is for surgery functions, which apply_alibi calls")
    _running[-1].attach(module, is_causal=is_causal, num_heads=num_heads)


_running: list[Operation] = []


class Operation:
    """One surgery on one model: what was changed, and how to change it back.

    Args:
        root: the model.
        settings: of its ALiBi.
        max_sequence_length: handed on to surgery functions.

    Attributes:
        root: the model; another module if a surgery function replaced the root itself.
        attached: attention modules that were given a bias.
        replaced: how many modules surgery functions replaced.
    """

    def __init__(self, root: nn.Module, settings: AlibiSettings, max_sequence_length: int) -> None:
        self.root = root
        self.settings = settings
        self.max_sequence_length = max_sequence_length
        self.attached: list[Any] = []
        self.replaced = 0
        self._biases: dict[tuple[str, int], ScoreBias] = {}
        self._undo: list[Callable[[], Any]] = []

    def run(self) -> None:
        """Changes the model."""
        _running.append(self)
        try:
            self._apply_policies()
            for name, module in list(self.root.named_modules()):
                if is_attention(module) and module not in self.attached:
                    self._change_attention(name, module)
            if self.attached:
                self._change_positions()
                self._change_configs()
        except BaseException:
            self.undo()
            raise
        finally:
            _running.pop()

    def undo(self) -> None:
        """Puts everything back, in the reverse order."""
        while self._undo:
            self._undo.pop()()

    # ---- attention ----

    def _apply_policies(self) -> None:
        counts: dict[Any, int] = {}
        for name, module in list(self.root.named_modules()):
            surgery = find_policy(module)
            if surgery is None:
                continue
            index = counts.get(surgery, 0)
            counts[surgery] = index + 1
            new = surgery(module, index, self.max_sequence_length)
            if new is not None:
                self.replaced += 1
                self._replace(name, module, new)

    def _replace(self, name: str, module: nn.Module, new: nn.Module) -> None:
        new.train(module.training)
        if not name:
            self.root = new
        for owner in self.root.modules():
            for child_name, child in list(owner.named_children()):
                if child is module and owner is not new:
                    self.set_attribute(owner, child_name, new)

    def _change_attention(self, name: str, module: nn.Module) -> None:
        if not is_cross_attention(module, name):
            self.attach(module, is_causal=bool(module.is_causal))
        elif self.settings.cross_attention:
            self.attach(module, is_causal=False, is_cross=True)

    def attach(
        self,
        module: nn.Module,
        *,
        is_causal: bool,
        num_heads: int | None = None,
        is_cross: bool = False,
    ) -> None:
        """Gives an attention module the bias that all of its kind share."""
        kind = "cross" if is_cross else self._kind(is_causal)
        heads = num_heads or _num_heads(module)
        if (kind, heads) not in self._biases:
            self._biases[kind, heads] = ScoreBias(heads, kind, self.settings)
        self.set_attribute(module, "alibi", self._biases[kind, heads])
        self.attached.append(module)
        if is_cross:
            self._undo.append(lambda: vars(module).pop("alibi_query_offset", None))
            self._hook(module, note_query_offset)

    def _kind(self, is_causal: bool) -> str:
        if is_causal:
            return "causal"
        return self.settings.variant or "symmetric"

    @property
    def biases(self) -> list[ScoreBias]:
        """The biases of all kinds of attention."""
        return list(self._biases.values())

    # ---- positions ----

    def _change_positions(self) -> None:
        configs = [module.config for module in self.attached]
        for owner, config in _owners_with_config(self.root):
            if not any(config is other for other in configs):
                continue
            for name, child in list(owner.named_children()):
                if name in _TABLES and isinstance(child, nn.Embedding):
                    self.set_attribute(owner, name, NoPositions(config))
                    if hasattr(owner, "token_type_ids"):
                        self._hook(owner, fill_in_ids)
                elif "RotaryEmbedding" in type(child).__name__:
                    self.set_attribute(owner, name, NoRotation(child, config))

    # ---- configurations ----

    def _change_configs(self) -> None:
        configs = {id(module.config): module.config for module in self.attached}
        for config in configs.values():
            name = implementation_for(config._attn_implementation)
            # The second is what is saved: it keeps transformers alone from loading the model.
            for attribute in ("_attn_implementation", "attn_implementation"):
                self.set_attribute(config, attribute, name)
            self.set_attribute(config, MARKER, self.settings.as_dict())
        for module in self.root.modules():
            is_base = getattr(module, "base_model", None) is module
            if is_base and id(module.config) in configs:
                self._undo.extend(handle.remove for handle in watch_output_attentions(module))

    def _hook(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        handle = module.register_forward_pre_hook(hook, with_kwargs=True)
        self._undo.append(handle.remove)

    def set_attribute(self, owner: Any, name: str, value: Any) -> None:
        """Sets an attribute, to be taken back by `undo`."""
        missing = object()
        before = getattr(owner, name, missing)
        if before is missing:
            self._undo.append(lambda: delattr(owner, name))
        else:
            self._undo.append(lambda: setattr(owner, name, before))
        setattr(owner, name, value)


def _num_heads(module: nn.Module) -> int:
    for owner in (module, module.config):
        for name in ("num_heads", "num_attention_heads"):
            number = getattr(owner, name, None)
            if isinstance(number, int):
                return number
    raise ValueError(
        f"{type(module).__name__} does not tell its number of heads; register a surgery function "
        "for it that calls attach_bias(module, is_causal=..., num_heads=...)"
    )


def _owners_with_config(root: nn.Module) -> list[tuple[nn.Module, Any]]:
    """Returns each module with the configuration of the innermost module around it that has one."""
    found: list[tuple[nn.Module, Any]] = []

    def walk(module: nn.Module, config: Any) -> None:
        config = getattr(module, "config", config)
        found.append((module, config))
        for child in module.children():
            walk(child, config)

    walk(root, None)
    return found
