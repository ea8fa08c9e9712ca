"""Mathematics of attention, without weights.

Two axes: what is added to the scores (`bias`, `mask`) and how attention is computed (`backends`).
"""

from fairseq.attention.backends import BACKENDS, get_backend
from fairseq.attention.backends.base import AttentionBackend, Prepared
from fairseq.attention.bias import AttentionBias, LinearBias, ZeroBias
from fairseq.attention.bidirectional import (
    PrefixBias,
    SplitHeadsBias,
    SymmetricBias,
    TwoSlopeBias,
)
from fairseq.attention.coordinates import Positions
from fairseq.attention.functional import attend
from fairseq.attention.mask import FutureMaskBuffer
from fairseq.attention.partial import Part, attend_with_lse, merge_parts
from fairseq.attention.repositioned import ChunkBias, CrossBias
from fairseq.attention.rules import (
    BIDIRECTIONAL,
    CAUSAL,
    AttentionRule,
    MaskRule,
    PrefixRule,
    SplitHeadsRule,
)

__all__ = [
    "BACKENDS",
    "BIDIRECTIONAL",
    "CAUSAL",
    "AttentionBackend",
    "AttentionBias",
    "AttentionRule",
    "ChunkBias",
    "CrossBias",
    "FutureMaskBuffer",
    "LinearBias",
    "MaskRule",
    "Part",
    "Positions",
    "PrefixBias",
    "PrefixRule",
    "Prepared",
    "SplitHeadsBias",
    "SplitHeadsRule",
    "SymmetricBias",
    "TwoSlopeBias",
    "ZeroBias",
    "attend",
    "attend_with_lse",
    "get_backend",
    "merge_parts",
]
