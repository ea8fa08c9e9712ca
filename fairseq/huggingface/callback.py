"""The schedule of `fairseq.huggingface.schedule` in Hugging Face's Trainer."""

from __future__ import annotations

from typing import Any

from transformers.trainer_callback import TrainerCallback

from fairseq.huggingface.schedule import Alibi, AlibiCollator

__all__ = ["AlibiCallback"]


class AlibiCallback(TrainerCallback):
    """Gives the Trainer's model ALiBi, and cuts its training batches; see `Alibi.callback`.

    Args:
        schedule: says how.
    """

    def __init__(self, schedule: Alibi) -> None:
        self.schedule = schedule

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Changes the model before the Trainer makes an optimizer for it."""
        self.schedule.prepare(kwargs["model"], kwargs.get("optimizer"))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Wraps the collator of the training data."""
        self.schedule.seen_update(state.global_step)
        loader = kwargs["train_dataloader"]
        if not isinstance(loader.collate_fn, AlibiCollator):
            loader.collate_fn = self.schedule.collator(loader.collate_fn)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Notes how many updates were made."""
        self.schedule.seen_update(state.global_step)
