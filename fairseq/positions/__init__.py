"""What a model knows of order: one file for each position method, `methods` is the table."""

from fairseq.positions.alibi import Alibi
from fairseq.positions.alibi_slopes import alibi_slopes
from fairseq.positions.base import PositionMethod, Surroundings, table_rows
from fairseq.positions.learned import Learned, LearnedPositionalEmbedding
from fairseq.positions.methods import METHODS, find_method
from fairseq.positions.no_positions import NoPositions
from fairseq.positions.sinusoidal import Sinusoidal, SinusoidalPositionalEmbedding

__all__ = [
    "METHODS",
    "Alibi",
    "Learned",
    "LearnedPositionalEmbedding",
    "NoPositions",
    "PositionMethod",
    "Sinusoidal",
    "SinusoidalPositionalEmbedding",
    "Surroundings",
    "alibi_slopes",
    "find_method",
    "table_rows",
]
