"""The transformer with an encoder and a decoder (Vaswani et al. 2017), by default with ALiBi."""

from __future__ import annotations

import argparse
from typing import Any

from torch import nn

from fairseq.models.encoder_decoder import FairseqEncoderDecoderModel
from fairseq.models.transformer.settings import complete
from fairseq.models.transformer.transformer_config import TransformerConfig, check
from fairseq.models.transformer.transformer_cross_decoder import TransformerCrossDecoder
from fairseq.models.transformer.transformer_encoder import TransformerEncoder
from fairseq.models.upgrade import layers_to_keep
from fairseq.modules import Embedding
from fairseq.registry import MODELS

__all__ = ["TransformerModel"]

# Settings that language models have and this model's decoder does without.
_OF_LANGUAGE_MODELS: dict[str, Any] = {
    "tie_adaptive_weights": False,
    "tie_adaptive_proj": False,
    "tokens_per_sample": None,
    "document_mask": None,
}


@MODELS.register("transformer", dataclass=TransformerConfig)
class TransformerModel(FairseqEncoderDecoderModel):
    """Reads a source both ways and predicts its target from left to right."""

    encoder: TransformerEncoder
    decoder: TransformerCrossDecoder

    @classmethod
    def build_model(cls, cfg: Any, task: Any) -> TransformerModel:
        """Builds the model.

        Args:
            cfg: a `TransformerConfig`, or any object with attributes of those names; what it lacks
                takes its default. Its numbers of layers are set to what they come to.
            task: gives `source_dictionary` and `target_dictionary`.

        Raises:
            ValueError: settings contradict each other; the message names the options.
        """
        for side in ("encoder", "decoder"):
            listed = getattr(cfg, f"{side}_layers_to_keep", None)
            if listed:
                kept = layers_to_keep(listed, f"--{side}-layers-to-keep")
                setattr(cfg, f"{side}_layers", len(kept))
        settings = complete(cfg, TransformerConfig)
        check(settings)
        source, target = task.source_dictionary, task.target_dictionary
        source_table = cls.build_embedding(source, settings.encoder_embed_dim)
        target_table = source_table
        if settings.share_all_embeddings:
            _check_joined(source, target)
        else:
            target_table = cls.build_embedding(target, settings.decoder_embed_dim)
        encoder = TransformerEncoder(settings, source, source_table)
        decoder = TransformerCrossDecoder(_of_decoder(settings), target, target_table)
        return cls(encoder, decoder)

    @classmethod
    def build_embedding(cls, dictionary: Any, width: int) -> nn.Embedding:
        """Makes the input embeddings of one side."""
        return Embedding(len(dictionary), width, dictionary.pad())


def _of_decoder(cfg: TransformerConfig) -> argparse.Namespace:
    """Returns the settings as the decoder reads them."""
    given = {**vars(cfg), **_OF_LANGUAGE_MODELS}
    if cfg.share_all_embeddings:
        given["share_decoder_input_output_embed"] = True
    return argparse.Namespace(**given)


def _check_joined(source: Any, target: Any) -> None:
    if source is not target and source != target:
        raise ValueError(
            "--share-all-embeddings needs the same dictionary for both languages; make it with "
            "fairseq-preprocess --joined-dictionary"
        )
