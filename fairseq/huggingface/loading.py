"""ALiBi that outlives saving: a marker in the configuration, and what restores it.

`install` wraps three public methods of transformers' `PreTrainedModel`: a model whose configuration
has the marker gets ALiBi when it is built, is tried out when its weights are loaded, and is saved
with a README that says what it needs.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from fairseq.huggingface.attention import register
from fairseq.huggingface.requirements import import_transformers

__all__ = ["auto_class", "install"]

_HEADING = "## ALiBi"
_AUTO_CLASSES = (
    ("ForCausalLM", "AutoModelForCausalLM"),
    ("LMHeadModel", "AutoModelForCausalLM"),
    ("ForMaskedLM", "AutoModelForMaskedLM"),
    ("ForConditionalGeneration", "AutoModelForSeq2SeqLM"),
    ("ForSequenceClassification", "AutoModelForSequenceClassification"),
    ("ForTokenClassification", "AutoModelForTokenClassification"),
    ("ForQuestionAnswering", "AutoModelForQuestionAnswering"),
    ("ForMultipleChoice", "AutoModelForMultipleChoice"),
    ("ForPreTraining", "AutoModelForPreTraining"),
)
_README = f"""{_HEADING}

This model knows the order of its tokens by ALiBi alone, which its configuration notes under
`fairseq_alibi`. transformers cannot compute that by itself. Load it like this:

```python
import fairseq.huggingface  # from fairseq-alibi: pip install -e '.[hf]'
from transformers import AUTO_CLASS

model = AUTO_CLASS.from_pretrained("this folder")
```

Without that import, loading stops at an attention implementation that is not known. With another
one forced by `attn_implementation=`, the position embeddings would be made up at random.
"""


def install() -> None:
    """Registers the attention functions and wraps the methods, once."""
    base = import_transformers("modeling_utils").PreTrainedModel
    register()
    if getattr(base, "_fairseq_alibi_installed", False):
        return
    base._fairseq_alibi_installed = True
    _wrap_post_init(base)
    _wrap_from_pretrained(base)
    _wrap_save_pretrained(base)


def _wrap_post_init(base: Any) -> None:
    original = base.post_init

    @functools.wraps(original)
    def post_init(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        _restore(self)
        return result

    base.post_init = post_init


def _wrap_from_pretrained(base: Any) -> None:
    original = base.__dict__["from_pretrained"].__func__

    @functools.wraps(original)
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(cls, *args, **kwargs)
        _try_out(result[0] if isinstance(result, tuple) else result)
        return result

    base.from_pretrained = classmethod(from_pretrained)


def _wrap_save_pretrained(base: Any) -> None:
    original = base.save_pretrained

    @functools.wraps(original)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, save_directory, *args, **kwargs)
        from fairseq.huggingface.alibi import is_alibi, settings_of

        if is_alibi(self) and settings_of(self) is not None:
            _write_readme(Path(save_directory) / "README.md", auto_class(type(self).__name__))
        return result

    base.save_pretrained = save_pretrained


def auto_class(kind: str) -> str:
    """Returns the name of the Auto class that loads a class of models with its head."""
    return next((auto for end, auto in _AUTO_CLASSES if kind.endswith(end)), "AutoModel")


def _restore(model: Any) -> None:
    """Gives a model that has just been built the ALiBi that its configuration tells of."""
    from fairseq.huggingface.bias import AlibiSettings
    from fairseq.huggingface.probe import biases_of
    from fairseq.huggingface.surgery import MARKER, Operation

    noted = getattr(model.config, MARKER, None)
    if noted is None or biases_of(model):
        return
    longest = getattr(model.config, "max_position_embeddings", 1 << 20)
    operation = Operation(model, AlibiSettings(**noted), longest)
    operation.run()
    if not operation.attached and _is_whole(model):
        raise ValueError(
            f"{type(model).__name__} was saved with ALiBi, but its attention does not go through "
            "the registry of the transformers that is installed; install the one it was saved with"
        )


def _is_whole(model: Any) -> bool:
    return model.base_model is model


def _try_out(model: Any) -> None:
    from fairseq.huggingface.alibi import check_alibi

    if not any(parameter.is_meta for parameter in model.parameters()):
        check_alibi(model)


def _write_readme(path: Path, auto: str) -> None:
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    if _HEADING not in before:
        text = _README.replace("AUTO_CLASS", auto)
        path.write_text(f"{before.rstrip()}\n\n{text}".lstrip(), encoding="utf-8")
