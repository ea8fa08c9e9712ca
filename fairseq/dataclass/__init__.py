"""Config dataclasses: what a command accepts, as one tree."""

from fairseq.dataclass.base import II, MISSING, ChoiceEnum, FairseqDataclass, is_interpolated

__all__ = ["II", "MISSING", "ChoiceEnum", "FairseqDataclass", "is_interpolated"]
