"""A model for the lm-evaluation-harness: `--model fairseq-alibi`.

    python -m fairseq.huggingface.lm_eval --model fairseq-alibi \\
        --model_args path=checkpoint_best.pt,data=data-bin/wikitext-103 --tasks wikitext

Text is read as fairseq-preprocess reads it: words between blanks, `</s>` for the end of a line. The
harness itself (`pip install lm-eval`) is needed by `register` and `main` alone. Its `wikitext` task
undoes the word splitting of the data, so its perplexity is not that of the paper.

Shapes: `B` rows, `T` tokens, `N` scored tokens of a batch, `D` width, `V` symbols.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fairseq.checkpoint.download import PUBLISHED, published_checkpoint, published_data
from fairseq.data.dictionary import Dictionary
from fairseq.export import check_dictionary, find_dictionary, read_checkpoint_model

__all__ = ["NAME", "FairseqAlibiLM", "Window", "main", "register", "rolling_windows"]

NAME = "fairseq-alibi"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Window:
    """Tokens to read, of which the last are to be predicted.

    Attributes:
        tokens: ids; the first is only read.
        num_scored: how many at the end are scored.
    """

    tokens: list[int]
    num_scored: int


def rolling_windows(
    tokens: Sequence[int], prefix: int, max_length: int, stride: int
) -> list[Window]:
    """Cuts a text into windows that score each of its tokens once.

    Args:
        tokens: ids of the text.
        prefix: id that stands before it.
        max_length: most tokens a window reads.
        stride: tokens that a window scores, but for the last, which scores what is left.
    """
    whole = [prefix, *tokens]
    windows = []
    for start in range(1, len(whole), stride):
        end = min(start + stride, len(whole))
        first = max(0, end - 1 - max_length)
        windows.append(Window(whole[first:end], end - start))
    return windows


class FairseqAlibiLM:
    """Answers the requests of the harness with a checkpoint of this project.

    Args:
        path: a checkpoint, or the name of a published one such as `alibi_wt103_L512`.
        data: folder with the model's dict.txt; by default where it was in training.
        max_length: most tokens the model reads at once; by default as many as in training. With
            ALiBi longer is fine.
        stride: new tokens in each window of a rolling likelihood; by default max_length, windows
            that do not overlap.
        batch_size: windows computed at once.
        device: such as `cpu` or `cuda`.

    Raises:
        FileNotFoundError: checkpoint or dictionary is missing.
        ValueError: they do not fit each other, or a number is out of range.
    """

    def __init__(
        self,
        path: str,
        data: str | None = None,
        max_length: int | None = None,
        stride: int | None = None,
        batch_size: int | str = 8,
        device: str | None = None,
        **_unused: Any,
    ) -> None:
        super().__init__()
        if path in PUBLISHED:
            data = str(published_data(path, data))
            path = str(published_checkpoint(path))
        exported = read_checkpoint_model(path)
        given = None if data is None else str(Path(data) / "dict.txt")
        found = find_dictionary(given, exported.settings)
        if found is None:
            raise FileNotFoundError("the model's dictionary is needed; give its folder with data=")
        self.dictionary = Dictionary.load(found)
        check_dictionary(exported.settings, self.dictionary, str(found))
        self.place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = exported.model.eval().to(self.place)
        self.max_length = int(max_length or self.model.max_positions() or 1024)
        self.stride = int(stride or self.max_length)
        if not 1 <= self.stride <= self.max_length:
            raise ValueError(
                f"stride={self.stride} is out of range; it is 1 to max_length={self.max_length}"
            )
        self.rows = 8 if batch_size in (None, "auto") else int(batch_size)

    # ---- the harness's three questions ----

    def loglikelihood(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        """Returns for each (context, continuation) its log-probability and whether it is likeliest.

        Args:
            requests: objects whose `args` are two strings.

        Returns:
            Nats, and whether each of its tokens is the likeliest at its place.
        """
        windows = [self._window_of(*request.args) for request in requests]
        return self._score(windows)

    def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
        """Returns the log-probability (nats) of each text.

        Args:
            requests: objects whose `args` are one string.
        """
        totals = []
        for request in requests:
            (text,) = request.args
            tokens = self.encode(text)
            windows = rolling_windows(tokens, self.prefix, self.max_length, self.stride)
            totals.append(sum(nats for nats, _ in self._score(windows)))
        return totals

    def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
        """Continues each context by the likeliest words up to one of its stop strings.

        Args:
            requests: objects whose `args` are a string and {until, max_gen_toks, do_sample}.

        Raises:
            ValueError: sampling is asked for.
        """
        return [self._generate(*request.args) for request in requests]

    # ---- text and ids ----

    @property
    def prefix(self) -> int:
        """The id that stands before a text: the end of the line before."""
        return self.dictionary.eos()

    def encode(self, text: str) -> list[int]:
        """Returns the ids of words, and of `</s>` for each line end."""
        ids: list[int] = []
        for number, line in enumerate(text.split("\n")):
            if number:
                ids.append(self.dictionary.eos())
            ids += self.dictionary.encode_ids(line, append_eos=False).tolist()
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Returns words joined by blanks, and line ends."""
        words = " ".join("\n" if i == self.dictionary.eos() else self.dictionary[i] for i in ids)
        return words.replace(" \n ", "\n").replace(" \n", "\n").replace("\n ", "\n")

    def _window_of(self, context: str, continuation: str) -> Window:
        """Returns the tokens of both; a word that lies across the seam is scored."""
        before, whole = self.encode(context), self.encode(context + continuation)
        same = sum(1 for _ in _common(before, whole))
        num_scored = len(whole) - same
        tokens = [self.prefix, *whole]
        return Window(tokens[-max(self.max_length, num_scored) - 1 :], num_scored)

    # ---- numbers ----

    @torch.no_grad()
    def _score(self, windows: Sequence[Window]) -> list[tuple[float, bool]]:
        """Returns the log-probability of each window, and whether it is the likeliest."""
        order = sorted(range(len(windows)), key=lambda i: -len(windows[i].tokens))
        results: dict[int, tuple[float, bool]] = {}
        for start in range(0, len(order), self.rows):
            batch = order[start : start + self.rows]
            found = self._score_batch([windows[i] for i in batch])
            results.update(zip(batch, found, strict=True))
        return [results[i] for i in range(len(windows))]

    def _score_batch(self, windows: Sequence[Window]) -> Iterator[tuple[float, bool]]:
        longest = max(len(window.tokens) for window in windows) - 1
        tokens = torch.full((len(windows), max(1, longest)), self.dictionary.pad())  # (B, T)
        for row, window in zip(tokens, windows, strict=True):
            row[: len(window.tokens) - 1] = torch.tensor(window.tokens[:-1])
        features, _ = self.model.extract_features(tokens.to(self.place))  # (B, T, D)
        for row, window in zip(features, windows, strict=True):
            if not window.num_scored:
                yield 0.0, True
                continue
            end = len(window.tokens) - 1
            log_probs = self._log_probs(row[end - window.num_scored : end])  # (N, V)
            target = torch.tensor(window.tokens[-window.num_scored :], device=log_probs.device)
            picked = log_probs.gather(1, target[:, None])
            yield picked.double().sum().item(), bool((log_probs.argmax(1) == target).all())

    def _log_probs(self, features: torch.Tensor) -> torch.Tensor:
        """Returns the log-probabilities (N, V) that features (N, D) stand for, in float32."""
        decoder = self.model.decoder
        output = decoder.output_layer(features[None])
        probs: torch.Tensor = decoder.get_normalized_probs((output, {}), log_probs=True)[0]
        return probs

    @torch.no_grad()
    def _generate(self, context: str, settings: Mapping[str, Any]) -> str:
        if settings.get("do_sample") and float(settings.get("temperature", 1.0)) > 0:
            raise ValueError("fairseq-alibi answers generate_until by the likeliest words alone")
        until = settings.get("until") or [self.dictionary.eos_word]
        stops = [until] if isinstance(until, str) else list(until)
        most = int(settings.get("max_gen_toks", 256))
        tokens = [self.prefix, *self.encode(context)][-max(1, self.max_length - most) :]
        state: dict[str, Any] = {}
        made: list[int] = []
        while len(made) < most:
            so_far = torch.tensor([tokens + made], device=self.place)
            features, _ = self.model.extract_features(so_far, incremental_state=state)
            made.append(int(self._log_probs(features[0, -1:]).argmax()))
            if made[-1] == self.dictionary.eos() and self.dictionary.eos_word in stops:
                return self.decode(made[:-1])
            text = self.decode(made)
            places = [text.find(stop) for stop in stops if stop and stop in text]
            if places:
                return text[: min(places)]
        return self.decode(made)


def _common(first: Sequence[int], second: Sequence[int]) -> Iterator[int]:
    """Yields what two sequences have in common at their beginning."""
    for one, other in zip(first, second, strict=False):
        if one != other:
            return
        yield one


def register() -> type:
    """Makes the harness know the model; returns its class.

    Raises:
        ImportError: the harness is not installed.
    """
    try:
        from lm_eval.api.model import LM
        from lm_eval.api.registry import register_model
    except ImportError as error:
        raise ImportError("the lm-evaluation-harness is needed: pip install lm-eval") from error
    harness_model = type(
        "FairseqAlibiLM", (FairseqAlibiLM, LM), {"__doc__": FairseqAlibiLM.__doc__}
    )
    register_model(NAME)(harness_model)
    return harness_model


def main() -> None:
    """Runs the harness's own command line with the model in it."""
    try:
        register()
    except ImportError as error:
        raise SystemExit(f"{NAME}: error: {error}") from None
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
