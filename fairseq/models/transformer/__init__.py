"""The transformer, top to bottom."""

from fairseq.models.transformer.transformer_config import TransformerConfig
from fairseq.models.transformer.transformer_cross_decoder import TransformerCrossDecoder
from fairseq.models.transformer.transformer_decoder import TransformerDecoder
from fairseq.models.transformer.transformer_encoder import TransformerEncoder
from fairseq.models.transformer.transformer_lm import (
    TransformerLanguageModel,
    TransformerLanguageModelConfig,
)
from fairseq.models.transformer.transformer_model import TransformerModel

__all__ = [
    "TransformerConfig",
    "TransformerCrossDecoder",
    "TransformerDecoder",
    "TransformerEncoder",
    "TransformerLanguageModel",
    "TransformerLanguageModelConfig",
    "TransformerModel",
]
