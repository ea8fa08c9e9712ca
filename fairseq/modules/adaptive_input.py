"""Input embeddings that are narrower for rarer words (Baevski and Auli 2019).

The vocabulary is sorted by frequency and cut into bands. Band i has a table of width
d_i = D_in / factor**i and a projection to the width of the model.
Shapes: `B` rows, `T` tokens, `D` width of the model, `N_i` tokens of band i.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fairseq.modules.cutoffs import band_limits

__all__ = ["AdaptiveInput"]


class AdaptiveInput(nn.Module):
    """Embeds tokens band by band.

    Args:
        vocab_size: number of words V.
        padding_idx: id of the padding token, in the first band.
        initial_dim: width D_in of the first band's table.
        factor: each band is narrower than the one before by this factor.
        output_dim: width D of the embeddings.
        cutoffs: first id of each band but the first.

    Raises:
        ValueError: the cutoffs go beyond the vocabulary, or a band would have no width left.
    """

    def __init__(
        self,
        vocab_size: int,
        padding_idx: int,
        initial_dim: int,
        factor: float,
        output_dim: int,
        cutoffs: list[int],
    ) -> None:
        super().__init__()
        self.cutoff = band_limits(cutoffs, vocab_size, "--adaptive-input-cutoff")
        self.embedding_dim = output_dim
        self.padding_idx = padding_idx
        self.embeddings = nn.ModuleList()
        starts = [0, *self.cutoff[:-1]]
        for i, (start, end) in enumerate(zip(starts, self.cutoff, strict=True)):
            width = band_width(initial_dim, factor, i, "--adaptive-input-factor")
            table = nn.Embedding(end - start, width, padding_idx if i == 0 else None)
            self.embeddings.append(nn.Sequential(table, nn.Linear(width, output_dim, bias=False)))
        self.reset_parameters()
        # Holds nothing; checkpoints have the key.
        self.register_buffer("_float_tensor", torch.zeros(1))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws all weights again, after their constructors did."""
        for band in range(len(self.embeddings)):
            table, projection = self.weights_for_band(band)
            nn.init.normal_(table, mean=0, std=table.size(1) ** -0.5)
            # In every band that is as long, though it stands for padding in the first only: as
            # published models were drawn.
            table[self.padding_idx : self.padding_idx + 1].zero_()
            nn.init.xavier_uniform_(projection)

    def weights_for_band(self, band: int) -> tuple[nn.Parameter, nn.Parameter]:
        """Returns (table (V_i, d_i), projection (D, d_i)) of a band."""
        layers: Any = self.embeddings[band]
        return layers[0].weight, layers[1].weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embeds ids (B, T) as (B, T, D)."""
        flat = tokens.reshape(-1)
        _, projection = self.weights_for_band(0)
        out = projection.new_empty(len(flat), self.embedding_dim)
        start = 0
        for end, embed in zip(self.cutoff, self.embeddings, strict=True):
            here = ((flat >= start) & (flat < end)).nonzero().squeeze(1)  # (N_i,)
            if here.numel() > 0:
                out[here] = embed(flat[here] - start)
            start = end
        return out.view(*tokens.shape, self.embedding_dim)


def band_width(initial_dim: int, factor: float, band: int, flag: str) -> int:
    """Returns the width of a band, initial_dim / factor**band rounded down.

    Raises:
        ValueError: no width is left.
    """
    if factor <= 0:
        raise ValueError(f"{flag} is {factor:g}; it must be larger than 0, such as 4")
    width = int(initial_dim // factor**band)
    if width < 1:
        raise ValueError(
            f"{flag} {factor:g} leaves no width for band {band} of a first band of width "
            f"{initial_dim}; choose a smaller factor or fewer cutoffs"
        )
    return width
