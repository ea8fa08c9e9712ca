"""Mathematics of attention, without weights.

Two axes: what is added to the scores (`bias`, `mask`) and how attention is computed (`backends`).
"""

from fairseq.attention.backends import BACKENDS, get_backend
from fairseq.attention.backends.base import AttentionBackend, Prepared
from fairseq.attention.bias import AttentionBias, LinearBias, Positions, ZeroBias
from fairseq.attention.functional import attend
from fairseq.attention.mask import BIDIRECTIONAL, CAUSAL, FutureMaskBuffer, MaskRule

__all__ = [
    "BACKENDS",
    "BIDIRECTIONAL",
    "CAUSAL",
    "AttentionBackend",
    "AttentionBias",
    "FutureMaskBuffer",
    "LinearBias",
    "MaskRule",
    "Positions",
    "Prepared",
    "ZeroBias",
    "attend",
    "get_backend",
]
