"""Models whose distributions can be looked up, and a beam search as it is written in textbooks."""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch
from torch import nn

from fairseq.models.transformer_lm import TransformerLanguageModel

PAD, EOS, UNK = 1, 2, 3


class Words:
    """As much of a dictionary as a generator needs; words are the ids themselves."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def pad(self) -> int:
        return PAD

    def eos(self) -> int:
        return EOS

    def unk(self) -> int:
        return UNK


class TableDecoder(nn.Module):
    """Scores each next word by the last two tokens; keeps nothing between steps."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits  # (V, V, V): before, last, next

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, None]:
        before = torch.cat([torch.full_like(tokens[:, :1], EOS), tokens[:, :-1]], dim=1)
        return self.logits[before, tokens], None


class TableModel(nn.Module):
    """A language model that is a table, (V, V, V)."""

    def __init__(self, num_words: int, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.num_words = num_words
        logits = 2 * torch.randn(num_words, num_words, num_words, generator=generator)
        self.decoder = TableDecoder(logits)

    def get_normalized_probs(self, output: Any, log_probs: bool, sample: Any = None) -> Any:
        return torch.log_softmax(output[0], dim=-1)

    def log_probs(self, tokens: list[int], temperature: float = 1.0) -> list[float]:
        """Returns log p of each next word after tokens, the start symbol first."""
        before = tokens[-2] if len(tokens) > 1 else EOS
        logits = self.decoder.logits[before, tokens[-1]].double() / temperature
        return torch.log_softmax(logits, dim=-1).tolist()


class _Task:
    def __init__(self, num_words: int) -> None:
        self.source_dictionary = self.target_dictionary = Words(num_words)


def tiny_lm(num_words: int, **settings: Any) -> Any:
    """Returns a transformer language model with random weights."""
    return TransformerLanguageModel.build_model(argparse.Namespace(**settings), _Task(num_words))


def batch(*sources: list[int]) -> dict[str, Any]:
    """Returns a batch of sources, padded on the right."""
    width = max(map(len, sources))
    rows = [source + [PAD] * (width - len(source)) for source in sources]
    return {
        "id": torch.arange(len(rows)),
        "net_input": {
            "src_tokens": torch.tensor(rows),
            "src_lengths": torch.tensor([len(source) for source in sources]),
        },
    }


def naive_beam_search(
    log_probs: Any,
    num_words: int,
    beam: int,
    max_len: int,
    *,
    min_len: int = 1,
    len_penalty: float = 1.0,
    prefix: tuple[int, ...] = (),
) -> list[tuple[float, list[int]]]:
    """Searches for one sentence, with lists; `log_probs(tokens)` gives those of each next word.

    Returns the hypotheses, best first, as (normalised score, tokens).
    """
    alive = [(0.0, [EOS])]
    ended: list[tuple[float, list[int]]] = []
    for step in range(max_len + 1):
        found = []
        for score, tokens in alive:
            for word, log_prob in enumerate(log_probs(tokens)):
                if word == PAD or (step == max_len and word != EOS):
                    continue
                if step < len(prefix) and step < max_len:
                    if word != prefix[step]:
                        continue
                elif word == EOS and step < min_len:
                    continue
                found.append((score + log_prob, [*tokens, word]))
        found.sort(key=lambda each: -each[0])
        found = found[: 2 * beam]
        for score, tokens in found[:beam]:
            if tokens[-1] == EOS and len(ended) < beam:
                ended.append((score / (step + 1) ** len_penalty, tokens[1:]))
        alive = [each for each in found if each[1][-1] != EOS][:beam]
        if len(ended) == beam or not alive:
            break
    return sorted(ended, key=lambda each: -each[0])


def all_sequences(model: TableModel, max_len: int) -> list[tuple[float, list[int]]]:
    """Returns (score, tokens) of every output of at most `max_len` words, best first."""
    found, alive = [], [(0.0, [EOS])]
    for step in range(max_len + 1):
        longer = []
        for score, tokens in alive:
            for word, log_prob in enumerate(model.log_probs(tokens)):
                if word == EOS and step >= 1:
                    found.append((score + log_prob, [*tokens[1:], EOS]))
                elif word not in (EOS, PAD) and math.isfinite(log_prob):
                    longer.append((score + log_prob, [*tokens, word]))
        alive = longer
    return sorted(found, key=lambda each: -each[0])
