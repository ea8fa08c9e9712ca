"""What a model knows of order: one file for each position method, `methods` is the table."""

from fairseq.positions.alibi import Alibi
from fairseq.positions.alibi_bias import alibi_bias
from fairseq.positions.alibi_slopes import alibi_slopes
from fairseq.positions.base import PositionMethod, Surroundings, WeightedMethod, table_rows
from fairseq.positions.learned import Learned, LearnedPositionalEmbedding
from fairseq.positions.methods import METHODS, check_settings, find_method, foreign_settings
from fairseq.positions.no_positions import NoPositions
from fairseq.positions.settings import PositionConfig
from fairseq.positions.sinusoidal import Sinusoidal, SinusoidalPositionalEmbedding

__all__ = [
    "METHODS",
    "Alibi",
    "Learned",
    "LearnedPositionalEmbedding",
    "NoPositions",
    "PositionConfig",
    "PositionMethod",
    "Sinusoidal",
    "SinusoidalPositionalEmbedding",
    "Surroundings",
    "WeightedMethod",
    "alibi_bias",
    "alibi_slopes",
    "check_settings",
    "find_method",
    "foreign_settings",
    "table_rows",
]
