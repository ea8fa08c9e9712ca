"""Which source token each output token looked at.

Shapes: `B` sentences, `N` hypotheses of all sentences, `T` output tokens, `S` source tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fairseq.generation.beams import Hypothesis

__all__ = ["add_alignments", "alignment_text", "check_can_align", "hard_alignment"]


def check_can_align(models: Sequence[Any]) -> None:
    """Checks that outputs of models attend to a source.

    Raises:
        ValueError: one of them has no encoder.
    """
    for model in models:
        if not hasattr(getattr(model, "decoder", None), "source_attention"):
            raise ValueError(
                "--print-alignment needs models whose decoder attends to an encoder; "
                f"{type(model).__name__} has none"
            )


@torch.no_grad()
def add_alignments(
    models: Sequence[Any],
    net_input: Mapping[str, Any],
    hypotheses: Sequence[Sequence[Hypothesis]],
    *,
    pad: int,
    eos: int,
) -> None:
    """Adds to hypotheses what their tokens attend to, read once more as a whole.

    It is the attention to the source in the last layer, averaged over heads, then over models.

    Args:
        models: models with an encoder and a decoder.
        net_input: what they were given, of which the encoder reads all but `prev_output_tokens`.
        hypotheses: those of each of the B sentences; `attention` (T, S) and `alignment`, see
            `hard_alignment`, are filled in.
        pad: id of padding.
        eos: id of the end of sentence, with which outputs begin, too.

    Raises:
        ValueError: a model has no encoder to attend to.
    """
    check_can_align(models)
    source = net_input["src_tokens"]
    found = [hypothesis for each in hypotheses for hypothesis in each]
    counts = torch.tensor([len(each) for each in hypotheses], device=source.device)
    order = torch.arange(len(source), device=source.device).repeat_interleave(counts)
    width = max((len(hypothesis["tokens"]) for hypothesis in found), default=0)
    previous = source.new_full((len(found), width), pad)
    for row, hypothesis in zip(previous, found, strict=True):
        tokens = hypothesis["tokens"].to(row)
        row[0] = eos
        row[1 : len(tokens)] = tokens[:-1]
    weights = torch.stack([_attention(model, net_input, previous, order) for model in models])
    for row, (hypothesis, own) in enumerate(zip(found, weights.mean(dim=0), strict=True)):
        tokens = hypothesis["tokens"]
        hypothesis["attention"] = own[: len(tokens)].clone()
        hypothesis["alignment"] = hard_alignment(
            hypothesis["attention"], source[order[row]], tokens, pad=pad, eos=eos
        )


def _attention(
    model: Any, net_input: Mapping[str, Any], previous: torch.Tensor, order: torch.Tensor
) -> torch.Tensor:
    """Returns the attention of a model's outputs, float32 (N, T, S)."""
    given = {name: value for name, value in net_input.items() if name != "prev_output_tokens"}
    encoder_out = model.encoder.reorder_encoder_out(model.encoder(**given), order)
    weights: torch.Tensor = model.decoder.source_attention(previous, encoder_out)
    return weights


def hard_alignment(
    attention: torch.Tensor, source: torch.Tensor, tokens: torch.Tensor, *, pad: int, eos: int
) -> list[tuple[int, int]]:
    """Returns for each output token the source token with the highest weight.

    Args:
        attention: (T, S).
        source: ids, (S,).
        tokens: ids of the output, (T,).
        pad: id of padding, which counts in neither.
        eos: id of the end of sentence, which counts in neither.

    Returns:
        (number of the source token, number of the output token), each counted from 0 without
        padding and end of sentence; empty if there is no source token.
    """
    is_source, is_output = _is_word(source, pad, eos), _is_word(tokens, pad, eos)
    chosen = attention[is_output.to(attention.device)][:, is_source.to(attention.device)]
    if chosen.size(1) == 0:
        return []
    return [(place, number) for number, place in enumerate(chosen.argmax(dim=1).tolist())]


def _is_word(tokens: torch.Tensor, pad: int, eos: int) -> torch.Tensor:
    return tokens.ne(pad) & tokens.ne(eos)


def alignment_text(hypothesis: Hypothesis, kind: str, source: torch.Tensor, pad: int) -> str:
    """Returns what is printed of a hypothesis's alignment.

    Args:
        hypothesis: filled in by `add_alignments`.
        kind: `hard` is a pair `source-output` of numbers for each output token; `soft` the weights
            of all source tokens for each output token, `</s>` on both sides included.
        source: ids, (S,).
        pad: id of padding.
    """
    if kind == "hard":
        return " ".join(f"{place}-{number}" for place, number in hypothesis["alignment"])
    weights = hypothesis["attention"]
    rows = weights[:, source.ne(pad).to(weights.device)].tolist()
    return " ".join(",".join(f"{weight:.6f}" for weight in row) for row in rows)
