"""The transformer, top to bottom."""

from fairseq.models.transformer.transformer_decoder import TransformerDecoder
from fairseq.models.transformer.transformer_lm import (
    TransformerLanguageModel,
    TransformerLanguageModelConfig,
)

__all__ = ["TransformerDecoder", "TransformerLanguageModel", "TransformerLanguageModelConfig"]
