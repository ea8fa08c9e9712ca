"""Which document each token of a row belongs to, told from the tokens alone.

A row is what a model reads: every token stands where the next one is predicted, so the `</s>` that
ends a line of text is the token from which the first word of the next line is predicted. Hence:

* `line`: each `</s>` begins a line, of which it is the first token.
* `document`: a `</s>` begins a document if the token before it is `</s>` too, that is after a line
  of text that is empty; the `</s>` of an empty line is the last thing that a document predicts.
* The first token of a row begins one in any case, wherever the row was cut out of the text.
* Padding is passed over: it has the number of the token before it, and is no token before another.

A number depends on the tokens so far alone. So batches, windows, shards and incremental decoding
get the same documents, and no data but the tokens is needed. Shapes: `B` rows, `S` tokens.
"""

from __future__ import annotations

import torch

__all__ = ["DOCUMENT_MASKS", "document_numbers"]

DOCUMENT_MASKS = ["none", "document", "line"]


def document_numbers(
    tokens: torch.Tensor, kind: str, *, eos_idx: int, padding_idx: int
) -> torch.Tensor:
    """Numbers the documents, or lines, of each row in rising order.

    Args:
        tokens: ids, (B, S), padded anywhere.
        kind: `document` or `line`.
        eos_idx: id of `</s>`.
        padding_idx: id of padding.

    Returns:
        int64 (B, S); numbers mean nothing but same or other.

    Raises:
        ValueError: another kind.
    """
    if kind not in DOCUMENT_MASKS[1:]:
        known = ", ".join(DOCUMENT_MASKS)
        raise ValueError(f"--document-mask is {kind!r}; it must be one of {known}")
    begins = tokens.eq(eos_idx)
    if kind == "document":
        begins = begins & _token_before(tokens, padding_idx).eq(eos_idx)
    return begins.cumsum(dim=1)


def _token_before(tokens: torch.Tensor, padding_idx: int) -> torch.Tensor:
    """Returns the last token before each that is no padding; padding where there is none."""
    columns = torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens)
    latest = columns.where(tokens.ne(padding_idx), 0).cummax(dim=1).values
    before = tokens.gather(1, latest).roll(1, dims=1)
    before[:, :1] = padding_idx
    return before
