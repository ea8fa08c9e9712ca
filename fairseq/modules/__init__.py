"""Layers with weights; the names of their parameters are those in checkpoints."""

from fairseq.modules.adaptive_input import AdaptiveInput
from fairseq.modules.adaptive_softmax import AdaptiveSoftmax, TiedHeadModule, TiedLinear
from fairseq.modules.basic import (
    Embedding,
    FairseqDropout,
    LayerDropModuleList,
    LayerNorm,
    Linear,
    gelu,
    gelu_accurate,
    get_activation_fn,
)
from fairseq.modules.checkpoint_activations import checkpoint_wrapper
from fairseq.modules.incremental_state import IncrementalState, StatefulModule
from fairseq.modules.multihead_attention import MultiheadAttention
from fairseq.modules.positional_embedding import PositionalEmbedding
from fairseq.modules.transformer_layer import TransformerDecoderLayer
from fairseq.positions import LearnedPositionalEmbedding, SinusoidalPositionalEmbedding

__all__ = [
    "AdaptiveInput",
    "AdaptiveSoftmax",
    "Embedding",
    "FairseqDropout",
    "IncrementalState",
    "LayerDropModuleList",
    "LayerNorm",
    "LearnedPositionalEmbedding",
    "Linear",
    "MultiheadAttention",
    "PositionalEmbedding",
    "SinusoidalPositionalEmbedding",
    "StatefulModule",
    "TiedHeadModule",
    "TiedLinear",
    "TransformerDecoderLayer",
    "checkpoint_wrapper",
    "gelu",
    "gelu_accurate",
    "get_activation_fn",
]
