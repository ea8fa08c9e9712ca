"""Training on shorter sequences than those of the data: a schedule for three kinds of loops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fairseq.huggingface.alibi import apply_alibi, is_alibi, own_position_methods
from fairseq.huggingface.batches import REMAINDERS, piece_length, split_batch
from fairseq.huggingface.probe import biases_of
from fairseq.huggingface.requirements import import_transformers

__all__ = ["Alibi", "AlibiCollator"]

Scaling = float | Sequence[tuple[int, float]]


class Alibi:
    """Gives a model ALiBi and cuts its training batches into shorter rows.

    In a loop of one's own: `apply_alibi(model)`, then `schedule(batch, step)` for each batch. With
    Hugging Face's Trainer: `callbacks=[schedule.callback()]`, which cuts training batches only.
    With MosaicML Composer: `algorithms=[schedule]`; it has the interface of its algorithms.

    Args:
        max_sequence_length: longest row that the model is to read, in tokens; see `apply_alibi`.
        train_sequence_length_scaling: how long pieces are, relative to rows; or how long from
            which update on, such as `[(0, 0.25), (10000, 0.5)]`.
        shifts_labels: whether the model shifts labels itself; None means that causal models do and
            others do not, told from the model once it is known, and causal before.
        remainder: see `split_batch`.
        pad_token_id: see `split_batch`.
        names: see `split_batch`.
        settings: further arguments of `apply_alibi`, such as `variant`.

    Raises:
        ValueError: a scaling that is not above 0 and at most 1, or steps that do not begin at 0
            and rise.

    Source: MosaicML Composer's `Alibi`, whose arguments the first two are.
    """

    # What Composer asks of an algorithm.
    find_unused_parameters = False
    backwards_create_graph = False

    def __init__(
        self,
        max_sequence_length: int,
        train_sequence_length_scaling: Scaling = 0.25,
        *,
        shifts_labels: bool | None = None,
        remainder: str = "pad",
        pad_token_id: int = 0,
        names: Sequence[str] | None = None,
        **settings: Any,
    ) -> None:
        self.max_sequence_length = max_sequence_length
        self.train_sequence_length_scaling = train_sequence_length_scaling
        self.shifts_labels = shifts_labels
        self.remainder = remainder
        self.pad_token_id = pad_token_id
        self.names = names
        self.settings = settings
        self._steps = _steps(train_sequence_length_scaling)
        self._is_causal = True
        if remainder not in REMAINDERS:
            raise ValueError(f"remainder is {remainder!r}; it can be {' or '.join(REMAINDERS)}")
        # Shared with the processes of a data loader.
        self._update = torch.zeros((), dtype=torch.int64).share_memory_()

    def __repr__(self) -> str:
        """Returns a call that makes the same schedule."""
        given = {
            "max_sequence_length": self.max_sequence_length,
            "train_sequence_length_scaling": self.train_sequence_length_scaling,
        }
        for name, default in (
            ("shifts_labels", None),
            ("remainder", "pad"),
            ("pad_token_id", 0),
            ("names", None),
        ):
            if getattr(self, name) != default:
                given[name] = getattr(self, name)
        arguments = ", ".join(f"{k}={v!r}" for k, v in {**given, **self.settings}.items())
        return f"Alibi({arguments})"

    def scaling_at(self, update: int) -> float:
        """Returns how long pieces are, relative to rows, in the update of that number."""
        return next(scaling for start, scaling in reversed(self._steps) if update >= start)

    def prepare(self, model: torch.nn.Module, optimizers: Any = None) -> int:
        """Gives a model ALiBi if it has none yet; see `apply_alibi`.

        Returns:
            How many attention modules were changed.
        """
        count = 0
        if not is_alibi(model):
            count = apply_alibi(model, self.max_sequence_length, optimizers, **self.settings)
        is_own = bool(own_position_methods(model))  # Those are language models, all causal.
        self._is_causal = is_own or any(bias.is_causal for bias in biases_of(model).values())
        return count

    def __call__(self, batch: Any, update: int | None = None) -> Any:
        """Returns a training batch cut into shorter rows; see `split_batch`.

        Args:
            batch: of the data loader.
            update: number of the update, from 0; None is the one the loop was last seen in.
        """
        if update is not None:
            self.seen_update(update)
        shifts = self._is_causal if self.shifts_labels is None else self.shifts_labels
        return split_batch(
            batch,
            self.scaling_at(int(self._update)),
            shifts_labels=shifts,
            remainder=self.remainder,
            pad_token_id=self.pad_token_id,
            names=self.names,
        )

    def seen_update(self, update: int) -> None:
        """Notes the number of the update that is next."""
        self._update.fill_(update)

    # ---- Hugging Face's Trainer ----

    def callback(self) -> Any:
        """Returns a `TrainerCallback` that gives the Trainer's model ALiBi and cuts its batches.

        It wraps the collator of the training data only; evaluation reads whole rows.
        """
        import_transformers("trainer_callback")
        from fairseq.huggingface.callback import AlibiCallback

        return AlibiCallback(self)

    def collator(self, collate: Callable[[Any], Any]) -> AlibiCollator:
        """Returns a collator that cuts what another one makes, for a loader of training data."""
        return AlibiCollator(collate, self)

    # ---- Composer ----

    @staticmethod
    def required_on_load() -> bool:
        """Returns that a checkpoint trained with this cannot be loaded without."""
        return True

    def match(self, event: Any, state: Any) -> bool:
        """Returns whether Composer is to call `apply`: at the start, and for training batches."""
        name = _event(event)
        return name == "AFTER_DATALOADER" or (name == "INIT" and not is_alibi(state.model))

    def apply(self, event: Any, state: Any, logger: Any = None) -> None:
        """Gives Composer's model ALiBi, or cuts its training batch."""
        if _event(event) == "INIT":
            self.prepare(state.model, state.optimizers)
        else:
            state.batch = self(state.batch, int(state.timestamp.batch.value))

    def state_dict(self) -> dict[str, Any]:
        """Returns what Composer keeps of an algorithm."""
        return {"repr": repr(self)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Checks that a checkpoint was trained with the same schedule.

        Raises:
            ValueError: it was not.
        """
        if state.get("repr") != repr(self):
            raise ValueError(f"trained with {state.get('repr')}, going on with {self!r}")


class AlibiCollator:
    """Makes batches by another collator and cuts them by a schedule.

    Args:
        collate: the other collator.
        schedule: says how.
    """

    def __init__(self, collate: Callable[[Any], Any], schedule: Alibi) -> None:
        self.collate = collate
        self.schedule = schedule

    def __call__(self, examples: Any) -> Any:
        """Returns a batch of shorter rows."""
        return self.schedule(self.collate(examples))


def _event(event: Any) -> str:
    """Returns the name of an event of Composer, or of a text that names it."""
    return str(getattr(event, "name", event)).upper()


def _steps(scaling: Scaling) -> list[tuple[int, float]]:
    steps = [(0, float(scaling))] if isinstance(scaling, int | float) else [*scaling]
    starts = [start for start, _ in steps]
    if not starts or starts[0] != 0 or starts != sorted(set(starts)):
        raise ValueError(
            f"train_sequence_length_scaling is {scaling}; updates must begin at 0 and rise, as in "
            "[(0, 0.25), (10000, 0.5)]"
        )
    for _, value in steps:
        piece_length(1, value)
    return steps
