"""The import path that plug-ins know the transformer language model by."""

from fairseq.models.transformer.transformer_lm import (
    TransformerLanguageModel,
    TransformerLanguageModelConfig,
)

__all__ = ["TransformerLanguageModel", "TransformerLanguageModelConfig"]
