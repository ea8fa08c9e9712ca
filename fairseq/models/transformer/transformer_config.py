"""Settings of the transformer with an encoder and a decoder."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fairseq.attention import BACKENDS
from fairseq.dataclass import II
from fairseq.modules.basic import ACTIVATIONS
from fairseq.positions import METHODS, PositionConfig, check_settings
from fairseq.positions.encoders import ENCODER_VARIANTS

__all__ = ["CROSS_BIASES", "TransformerConfig", "check"]

CROSS_BIASES = ["none", "aligned", "continued"]

_NO_QUANTISATION = "training with quantisation noise is not provided"
_NO_PRETRAINED = "embeddings of other programs are not read; use --finetune-from-model"
_NO_OTHER_ATTENTION = "every layer of the decoder attends to the tokens so far and to the encoder"


def _option(default: Any, text: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": text, **metadata})


@dataclass
class TransformerConfig(PositionConfig):
    """Settings of `transformer`; the names are those in checkpoints."""

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
    encoder_embed_path: str | None = _option(
        None, "embeddings to start from", unsupported=_NO_PRETRAINED
    )
    encoder_embed_dim: int = _option(512, "width of the encoder", minimum=1)
    encoder_ffn_embed_dim: int = _option(
        2048, "width inside the encoder's feed-forward nets", minimum=1
    )
    encoder_layers: int = _option(6, "layers of the encoder", minimum=1)
    encoder_attention_heads: int = _option(8, "attention heads of the encoder", minimum=1)
    encoder_normalize_before: bool = _option(
        False, "layer norm before each part of an encoder's layer"
    )
    encoder_learned_pos: bool = _option(
        False, "learned position embeddings of the encoder; ALiBi keeps but does not read them"
    )
    decoder_embed_path: str | None = _option(
        None, "embeddings to start from", unsupported=_NO_PRETRAINED
    )
    decoder_embed_dim: int = _option(512, "width of the decoder", minimum=1)
    decoder_output_dim: int = _option(512, "width of what the output layer reads", minimum=1)
    decoder_ffn_embed_dim: int = _option(
        2048, "width inside the decoder's feed-forward nets", minimum=1
    )
    decoder_layers: int = _option(6, "layers of the decoder", minimum=1)
    decoder_attention_heads: int = _option(8, "attention heads of the decoder", minimum=1)
    decoder_normalize_before: bool = _option(
        False, "layer norm before each part of a decoder's layer"
    )
    decoder_learned_pos: bool = _option(
        False, "learned position embeddings of the decoder; ALiBi keeps but does not read them"
    )
    no_decoder_final_norm: bool = _option(False, "no layer norm after the decoder's last layer")
    share_decoder_input_output_embed: bool = _option(
        False, "one table for the decoder's input embeddings and output layer"
    )
    share_all_embeddings: bool = _option(
        False, "one table for both languages and the output layer (needs a joined dictionary)"
    )
    no_token_positional_embeddings: bool = _option(
        False, "keep no position embeddings in the model; ALiBi does not read them anyway"
    )
    adaptive_softmax_cutoff: str | None = _option(
        None, "first ids of the bands of an adaptive softmax, separated by commas"
    )
    adaptive_softmax_dropout: float = _option(
        0.0, "dropout probability of the adaptive softmax", minimum=0, maximum=1
    )
    adaptive_softmax_factor: float = _option(4.0, "how much narrower each tail is than the last")
    layernorm_embedding: bool = _option(False, "layer norm of the embeddings")
    no_scale_embedding: bool = _option(False, "embeddings are not multiplied by sqrt(width)")
    no_cross_attention: bool = _option(
        False, "no attention to the encoder", unsupported=_NO_OTHER_ATTENTION
    )
    cross_self_attention: bool = _option(
        False, "one attention to both", unsupported=_NO_OTHER_ATTENTION
    )
    encoder_layerdrop: float = _option(
        0.0, "probability that an encoder's layer is left out in training", minimum=0, maximum=1
    )
    decoder_layerdrop: float = _option(
        0.0, "probability that a decoder's layer is left out in training", minimum=0, maximum=1
    )
    encoder_layers_to_keep: str | None = _option(
        None, "encoder's layers of a checkpoint to use, separated by commas"
    )
    decoder_layers_to_keep: str | None = _option(
        None, "decoder's layers of a checkpoint to use, separated by commas"
    )
    checkpoint_activations: bool = _option(
        False, "compute the activations of a layer again in the backward pass, to save memory"
    )
    offload_activations: bool = _option(
        False, "also keep the inputs of layers in the memory of the host"
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
    max_source_positions: int | None = II("task.max_source_positions")
    max_target_positions: int | None = II("task.max_target_positions")
    attention_backend: str = _option(
        "auto", "how attention is computed", choices=BACKENDS, extension=True
    )
    encoder_alibi_variant: str = _option(
        "split",
        "ALiBi of the encoder: -m|i - j| both ways (symmetric), half of the heads for each side "
        "(split), or other slopes on the right than on the left (two-slope)",
        choices=ENCODER_VARIANTS,
        extension=True,
    )
    cross_attention_bias: str = _option(
        "none",
        "what ALiBi adds to the decoder's attention to the encoder: nothing; the distance of equal "
        "places (aligned); or that of a target which goes on where the source ends (continued)",
        choices=CROSS_BIASES,
        extension=True,
    )


def check(cfg: TransformerConfig) -> None:
    """Checks that settings do not contradict each other.

    Raises:
        ValueError: they do; the message names the options.
    """
    check_settings(cfg)
    for side in ("encoder", "decoder"):
        _check_heads(
            side, getattr(cfg, f"{side}_embed_dim"), getattr(cfg, f"{side}_attention_heads")
        )
    default = TransformerConfig.encoder_alibi_variant
    if cfg.encoder_alibi_variant != default and cfg.position_method != "alibi":
        raise ValueError(
            f"--encoder-alibi-variant {cfg.encoder_alibi_variant} belongs to --position-method "
            f"alibi, not {cfg.position_method}; leave one of them out"
        )
    if cfg.share_all_embeddings and cfg.encoder_embed_dim != cfg.decoder_embed_dim:
        raise ValueError(
            "--share-all-embeddings needs equal --encoder-embed-dim and --decoder-embed-dim, which "
            f"are {cfg.encoder_embed_dim} and {cfg.decoder_embed_dim}"
        )
    shares = cfg.share_all_embeddings or cfg.share_decoder_input_output_embed
    is_plain = cfg.adaptive_softmax_cutoff is None
    if shares and is_plain and cfg.decoder_output_dim != cfg.decoder_embed_dim:
        flag = (
            "--share-all-embeddings"
            if cfg.share_all_embeddings
            else "--share-decoder-input-output-embed"
        )
        raise ValueError(
            f"{flag} needs equal --decoder-embed-dim and --decoder-output-dim, which are "
            f"{cfg.decoder_embed_dim} and {cfg.decoder_output_dim}"
        )


def _check_heads(side: str, width: int, heads: int) -> None:
    if width % heads:
        divisors = [str(n) for n in range(1, min(width, 64) + 1) if width % n == 0]
        raise ValueError(
            f"--{side}-attention-heads {heads} does not divide --{side}-embed-dim {width}; "
            f"possible numbers of heads are {', '.join(divisors)}"
        )
