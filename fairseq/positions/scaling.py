"""By how much a method shrinks positions in sequences that are longer than those in training."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LengthScaling"]


@dataclass(frozen=True)
class LengthScaling:
    """The factor a = sequence length / training length, never below 1, or a fixed one.

    A factor belongs to a whole sequence: it is made from the length the sequence will have at its
    end, so that keys which are cached at its start stay valid.

    Attributes:
        kind: how positions shrink; "none" is not at all.
        kinds: the kinds there are.
        flag: option of `kind`, such as `--alibi-interpolation`, for messages.
        prefix: what the options of the lengths start with, such as `--alibi`, for messages.
        fixed_factor: the factor of every sequence; None makes it from the lengths.
        train_length: tokens of a sequence in training.

    Raises:
        ValueError: settings that contradict each other, or a factor or length that is not positive.
    """

    kind: str
    kinds: list[str]
    flag: str
    prefix: str
    fixed_factor: float | None = None
    train_length: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in self.kinds:
            raise ValueError(f"{self.flag} is {self.kind!r}; it can be {', '.join(self.kinds)}")
        if self.fixed_factor is not None:
            if self.kind == "none":
                raise ValueError(
                    f"{self.flag}-factor {self.fixed_factor:g} needs {self.flag} "
                    f"{' or '.join(self.kinds[1:])}"
                )
            if not 0 < self.fixed_factor < float("inf"):
                raise ValueError(f"{self.flag}-factor is {self.fixed_factor:g}; it must be above 0")
        if self.train_length is not None and self.train_length < 1:
            raise ValueError(
                f"{self.prefix}-train-length is {self.train_length}; it must be at least 1"
            )
        if self.kind != "none" and self.fixed_factor is None:
            self.known_train_length()

    def known_train_length(self) -> int:
        """Returns the training length.

        Raises:
            ValueError: it is not known.
        """
        if self.train_length is None:
            raise ValueError(
                f"{self.flag} {self.kind} needs the training length, which is not known; give "
                f"{self.prefix}-train-length"
            )
        return self.train_length

    def factor(self, sequence_length: int | None) -> float:
        """Returns the factor for a sequence of that length; None is one as long as in training."""
        if self.kind == "none":
            return 1.0
        if self.fixed_factor is not None:
            return self.fixed_factor
        if sequence_length is None:
            return 1.0
        return max(1.0, sequence_length / self.known_train_length())
