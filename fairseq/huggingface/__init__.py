"""ALiBi for models of Hugging Face transformers, an optional extra: `pip install -e '.[hf]'`.

Importing it is enough for `from_pretrained` to restore ALiBi where a model was saved with it.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

_ATTRIBUTES = {
    "Alibi": "fairseq.huggingface.schedule",
    "AlibiCollator": "fairseq.huggingface.schedule",
    "apply_alibi": "fairseq.huggingface.alibi",
    "gpt2_to_transformer_lm": "fairseq.huggingface.convert",
    "is_alibi": "fairseq.huggingface.alibi",
    "policy_registry": "fairseq.huggingface.policies",
    "position_context": "fairseq.huggingface.positions",
    "split_batch": "fairseq.huggingface.batches",
    "transformer_lm_to_gpt2": "fairseq.huggingface.convert",
}
__all__ = list(_ATTRIBUTES)


def __getattr__(name: str) -> Any:
    if name not in _ATTRIBUTES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_ATTRIBUTES[name]), name)


if find_spec("transformers") is not None:
    import_module("fairseq.huggingface.loading").install()
    import_module("fairseq.huggingface.registration").register()
