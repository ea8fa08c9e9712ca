"""The transformer language model: its settings, and how it is built from them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fairseq.attention import BACKENDS
from fairseq.dataclass import II, is_interpolated
from fairseq.models.base import FairseqLanguageModel
from fairseq.models.transformer.settings import complete
from fairseq.models.transformer.transformer_decoder import TransformerDecoder
from fairseq.models.upgrade import layers_to_keep
from fairseq.modules import AdaptiveInput, Embedding
from fairseq.modules.basic import ACTIVATIONS
from fairseq.modules.cutoffs import parse_cutoffs
from fairseq.positions import METHODS, PositionConfig, check_settings
from fairseq.registry import MODELS

__all__ = ["TransformerLanguageModel", "TransformerLanguageModelConfig"]

_NO_CHARACTERS = "embeddings made of characters are not provided; use --adaptive-input"
_NO_QUANTISATION = "training with quantisation noise is not provided"
_NO_BASE_LAYERS = "mixture-of-experts base layers are not provided"


def _option(default: Any, text: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": text, **metadata})


@dataclass
class TransformerLanguageModelConfig(PositionConfig):
    """Settings of a transformer language model; the names are those in checkpoints."""

    position_method: str = _option(
        "alibi", f"how the model knows the order of tokens: {', '.join(METHODS)}", extension=True
    )
    activation_fn: str = _option("relu", "activation of the feed-forward net", choices=ACTIVATIONS)
    dropout: float = _option(0.1, "dropout probability", minimum=0, maximum=1)
    attention_dropout: float = _option(
        0.0, "dropout probability of attention weights", minimum=0, maximum=1
    )
    activation_dropout: float = _option(
        0.0, "dropout probability after the activation", minimum=0, maximum=1
    )
    relu_dropout: float = _option(
        0.0, "older name of --activation-dropout, which wins", minimum=0, maximum=1
    )
    decoder_embed_dim: int = _option(512, "width of the model", minimum=1)
    decoder_output_dim: int = _option(512, "width of what the output layer reads", minimum=1)
    decoder_input_dim: int = _option(512, "width of the input embeddings", minimum=1)
    decoder_ffn_embed_dim: int = _option(2048, "width inside the feed-forward net", minimum=1)
    decoder_layers: int = _option(6, "number of layers", minimum=1)
    decoder_attention_heads: int = _option(8, "number of attention heads", minimum=1)
    decoder_normalize_before: bool = _option(False, "layer norm before each part of a layer")
    no_decoder_final_norm: bool = _option(False, "no layer norm after the last layer")
    adaptive_softmax_cutoff: str | None = _option(
        None, "first ids of the bands of an adaptive softmax, separated by commas"
    )
    adaptive_softmax_dropout: float = _option(
        0.0, "dropout probability of the adaptive softmax", minimum=0, maximum=1
    )
    adaptive_softmax_factor: float = _option(4.0, "how much narrower each tail is than the last")
    no_token_positional_embeddings: bool = _option(
        False, "keep no position embeddings in the model; ALiBi does not read them anyway"
    )
    share_decoder_input_output_embed: bool = _option(
        False, "one table for input embeddings and output layer"
    )
    character_embeddings: bool = _option(
        False, "embeddings made of characters", unsupported=_NO_CHARACTERS
    )
    character_filters: str = _option(
        "[(1, 64), (2, 128), (3, 192), (4, 256), (5, 256), (6, 256), (7, 256)]",
        "sizes of character filters",
        unsupported=_NO_CHARACTERS,
    )
    character_embedding_dim: int = _option(
        4, "width of character embeddings", unsupported=_NO_CHARACTERS
    )
    char_embedder_highway_layers: int = _option(
        2, "highway layers of the character embedder", unsupported=_NO_CHARACTERS
    )
    adaptive_input: bool = _option(False, "input embeddings that are narrower for rarer words")
    adaptive_input_factor: float = _option(4.0, "how much narrower each band is than the last")
    adaptive_input_cutoff: str | None = _option(
        None, "first ids of the bands of the adaptive input, separated by commas"
    )
    tie_adaptive_weights: bool = _option(False, "share the tables of adaptive input and softmax")
    tie_adaptive_proj: bool = _option(False, "share the projections of adaptive input and softmax")
    decoder_learned_pos: bool = _option(
        False, "learned position embeddings; ALiBi keeps but does not read them"
    )
    layernorm_embedding: bool = _option(False, "layer norm of the embeddings")
    no_scale_embedding: bool = _option(False, "embeddings are not multiplied by sqrt(width)")
    checkpoint_activations: bool = _option(
        False, "compute the activations of a layer again in the backward pass, to save memory"
    )
    offload_activations: bool = _option(
        False, "also keep the inputs of layers in the memory of the host"
    )
    decoder_layerdrop: float = _option(
        0.0, "probability that a layer is left out in training", minimum=0, maximum=1
    )
    decoder_layers_to_keep: str | None = _option(
        None, "layers of a checkpoint to use, separated by commas"
    )
    quant_noise_pq: float = _option(0.0, "product quantisation noise", unsupported=_NO_QUANTISATION)
    quant_noise_pq_block_size: int = _option(
        8, "block size of product quantisation", unsupported=_NO_QUANTISATION
    )
    quant_noise_scalar: float = _option(
        0.0, "scalar quantisation noise", unsupported=_NO_QUANTISATION
    )
    min_params_to_wrap: int = _option(
        100000000,
        "fewest parameters of a layer that is sharded on its own (fully_sharded)",
        minimum=0,
    )
    base_layers: int = _option(0, "number of base layers", unsupported=_NO_BASE_LAYERS)
    base_sublayers: int = _option(1, "sublayers of a base layer", unsupported=_NO_BASE_LAYERS)
    base_shuffle: int | None = _option(
        1, "shuffle tokens before base layers", unsupported=_NO_BASE_LAYERS
    )
    max_tokens: int | None = II("dataset.max_tokens")
    add_bos_token: bool = II("task.add_bos_token")
    tokens_per_sample: int = II("task.tokens_per_sample")
    max_target_positions: int | None = II("task.max_target_positions")
    tpu: bool = II("common.tpu")
    attention_backend: str = _option(
        "auto", "how attention is computed", choices=BACKENDS, extension=True
    )
    document_mask: str | None = field(
        default=II("task.document_mask"), metadata={"extension": True}
    )


@MODELS.register("transformer_lm", dataclass=TransformerLanguageModelConfig)
class TransformerLanguageModel(FairseqLanguageModel):
    """A transformer decoder that predicts each next token."""

    decoder: TransformerDecoder

    @classmethod
    def build_model(cls, cfg: Any, task: Any) -> TransformerLanguageModel:
        """Builds the model.

        Args:
            cfg: a `TransformerLanguageModelConfig`, or any object with attributes of those names;
                what it lacks takes its default. Its `max_target_positions` and `decoder_layers`
                are set to what they come to.
            task: gives `source_dictionary` and `target_dictionary`.

        Raises:
            ValueError: settings contradict each other; the message names the options.
        """
        if getattr(cfg, "decoder_layers_to_keep", None):
            cfg.decoder_layers = len(layers_to_keep(cfg.decoder_layers_to_keep))
        if _missing(getattr(cfg, "max_target_positions", None)):
            limit = getattr(cfg, "tokens_per_sample", None)
            cfg.max_target_positions = None if _missing(limit) else limit
        settings = complete(cfg, TransformerLanguageModelConfig)
        check(settings)
        embed_tokens = cls.build_embedding(settings, task.source_dictionary)
        return cls(TransformerDecoder(settings, task.target_dictionary, embed_tokens))

    @classmethod
    def build_embedding(
        cls, cfg: TransformerLanguageModelConfig, dictionary: Any
    ) -> nn.Embedding | AdaptiveInput:
        """Makes the input embeddings: a plain table, or an adaptive input."""
        if not cfg.adaptive_input:
            return Embedding(len(dictionary), cfg.decoder_input_dim, dictionary.pad())
        assert cfg.adaptive_input_cutoff is not None
        return AdaptiveInput(
            len(dictionary),
            dictionary.pad(),
            cfg.decoder_input_dim,
            cfg.adaptive_input_factor,
            cfg.decoder_embed_dim,
            parse_cutoffs(cfg.adaptive_input_cutoff, "--adaptive-input-cutoff"),
        )


def _missing(value: Any) -> bool:
    return value is None or is_interpolated(value)


def check(cfg: TransformerLanguageModelConfig) -> None:
    """Checks that the model exists here and that its settings do not contradict each other.

    Raises:
        ValueError: it does not, or they do; the message names the options.
    """
    check_settings(cfg)
    if cfg.character_embeddings:
        raise ValueError(f"--character-embeddings is not supported: {_NO_CHARACTERS}")
    if cfg.base_layers:
        raise ValueError(f"--base-layers is not supported: {_NO_BASE_LAYERS}")
    if cfg.adaptive_input and cfg.adaptive_input_cutoff is None:
        raise ValueError("--adaptive-input needs --adaptive-input-cutoff, such as 20000,60000")
    if cfg.tie_adaptive_weights:
        _check_ties(cfg)
    elif cfg.tie_adaptive_proj:
        raise ValueError("--tie-adaptive-proj needs --tie-adaptive-weights")
    if cfg.share_decoder_input_output_embed and cfg.adaptive_softmax_cutoff is None:
        if cfg.adaptive_input:
            raise ValueError(
                "--share-decoder-input-output-embed does not go with --adaptive-input; use "
                "--adaptive-softmax-cutoff with --tie-adaptive-weights and --tie-adaptive-proj"
            )
        _check_equal(
            cfg, "--share-decoder-input-output-embed", "decoder_input_dim", "decoder_output_dim"
        )


def _check_ties(cfg: TransformerLanguageModelConfig) -> None:
    flag = "--tie-adaptive-weights"
    if not cfg.adaptive_input or cfg.adaptive_softmax_cutoff is None:
        raise ValueError(f"{flag} needs --adaptive-input and --adaptive-softmax-cutoff")
    _check_equal(cfg, flag, "adaptive_input_factor", "adaptive_softmax_factor")
    _check_equal(cfg, flag, "adaptive_input_cutoff", "adaptive_softmax_cutoff")
    _check_equal(cfg, flag, "decoder_input_dim", "decoder_output_dim")


def _check_equal(cfg: Any, flag: str, first: str, second: str) -> None:
    one, other = getattr(cfg, first), getattr(cfg, second)
    if one != other:
        names = ["--" + name.replace("_", "-") for name in (first, second)]
        raise ValueError(
            f"{flag} needs equal {names[0]} and {names[1]}, which are {one} and {other}"
        )
