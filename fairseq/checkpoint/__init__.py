"""Checkpoint files: layout, old versions, safety, names. The public face is `checkpoint_utils`."""

from fairseq.checkpoint.format import dictionary_fingerprint, pack
from fairseq.checkpoint.position_method import PositionMethod, position_method_of
from fairseq.checkpoint.reading import read_checkpoint
from fairseq.checkpoint.safe_pickle import UnsafeCheckpointError

__all__ = [
    "PositionMethod",
    "UnsafeCheckpointError",
    "dictionary_fingerprint",
    "pack",
    "position_method_of",
    "read_checkpoint",
]
