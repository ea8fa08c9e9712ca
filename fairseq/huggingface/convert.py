"""A GPT-2 of transformers as our own language model with ALiBi, and back, with the same logits.

Both are decoders that normalise before each part; what differs is names, the layout of weights, and
how embeddings are scaled. Shapes: `D` width, `F` width of the feed-forward net, `V` vocabulary.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch

from fairseq.attention import LinearBias
from fairseq.export import Symbols
from fairseq.huggingface.alibi import apply_alibi, settings_of
from fairseq.huggingface.requirements import import_transformers
from fairseq.models.transformer_lm import TransformerLanguageModel
from fairseq.utils import get_activation_fn

__all__ = ["NUM_SPECIAL", "gpt2_to_transformer_lm", "transformer_lm_to_gpt2"]

NUM_SPECIAL = 4
"""How many symbols of a dictionary are `<s>`, `<pad>`, `</s>` and `<unk>`, its first ones."""

_ACTIVATIONS = {"gelu_new": "gelu_accurate", "gelu": "gelu", "relu": "relu"}
# Ours, GPT-2's, and whether the weight is stored transposed there.
_LAYER = (
    ("self_attn.out_proj", "attn.c_proj", True),
    ("self_attn_layer_norm", "ln_1", False),
    ("fc1", "mlp.c_fc", True),
    ("fc2", "mlp.c_proj", True),
    ("final_layer_norm", "ln_2", False),
)


def gpt2_to_transformer_lm(
    model: Any, *, has_special_symbols: bool = False
) -> TransformerLanguageModel:
    """Returns our model with the weights of a GPT-2 under ALiBi; parameters are copied.

    Args:
        model: a `GPT2LMHeadModel` after `apply_alibi`.
        has_special_symbols: whether its ids 0 to 3 are those of our dictionaries already, as in
            what `transformer_lm_to_gpt2` makes. Otherwise its id i becomes i + `NUM_SPECIAL`, and
            the four have embeddings of zeros, so that their logits are 0.

    Raises:
        ValueError: a model without ALiBi, or with a setting that our model does not have.
    """
    config = model.config
    _check_gpt2(model)
    num_added = 0 if has_special_symbols else NUM_SPECIAL
    symbols = Symbols(config.vocab_size + num_added)
    is_tied = model.lm_head.weight is model.transformer.wte.weight
    found = TransformerLanguageModel.build_model(
        _settings(config, is_tied, settings_of(model)),
        SimpleNamespace(source_dictionary=symbols, target_dictionary=symbols),
    )
    state = found.state_dict()
    source = model.state_dict()
    for layer in range(config.n_layer):
        _layer_from_gpt2(state, source, layer)
    _copy(state, "decoder.layer_norm", source, "transformer.ln_f", False)
    tables = (("embed_tokens", "transformer.wte"), ("output_projection", "lm_head"))
    for ours, theirs in tables:
        table = state[f"decoder.{ours}.weight"]
        table.zero_()
        table[num_added:] = source[f"{theirs}.weight"]
    return found.eval()


def transformer_lm_to_gpt2(model: TransformerLanguageModel) -> Any:
    """Returns a `GPT2LMHeadModel` under ALiBi with the weights of our model; they are copied.

    Its vocabulary is our dictionary, ids and all. Padding has to be told by `attention_mask`. If
    embeddings are multiplied by sqrt(D), they are stored so, apart from the output layer.

    Raises:
        ValueError: our model has something that GPT-2 does not: an adaptive softmax, layer norms
            after each part, another position method, or other widths.
    """
    transformers = import_transformers()
    decoder: Any = model.decoder
    _check_ours(decoder)
    layer: Any = decoder.layers[0]
    size, width = decoder.embed_tokens.weight.shape
    is_tied = decoder.output_projection.weight is decoder.embed_tokens.weight
    config = transformers.GPT2Config(
        vocab_size=size,
        n_embd=width,
        n_layer=len(decoder.layers),
        n_head=layer.self_attn.num_heads,
        n_inner=layer.fc1.out_features,
        n_positions=int(decoder.max_target_positions or 1024),
        activation_function=_activation_of(layer),
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=is_tied and decoder.embed_scale == 1.0,
    )
    found = transformers.GPT2LMHeadModel(config).eval()
    apply_alibi(found, bias_max=_bias_max_of(decoder))
    state, source = found.state_dict(), model.state_dict()
    for number in range(config.n_layer):
        _layer_to_gpt2(state, source, number)
    _copy(state, "transformer.ln_f", source, "decoder.layer_norm", False)
    table = source["decoder.embed_tokens.weight"]
    state["transformer.wte.weight"].copy_(table * decoder.embed_scale)
    state["lm_head.weight"].copy_(source["decoder.output_projection.weight"])
    return found


def _settings(config: Any, is_tied: bool, alibi: Any) -> SimpleNamespace:
    return SimpleNamespace(
        activation_fn=_ACTIVATIONS[config.activation_function],
        dropout=config.resid_pdrop,
        attention_dropout=config.attn_pdrop,
        decoder_embed_dim=config.n_embd,
        decoder_input_dim=config.n_embd,
        decoder_output_dim=config.n_embd,
        decoder_ffn_embed_dim=config.n_inner or 4 * config.n_embd,
        decoder_layers=config.n_layer,
        decoder_attention_heads=config.n_head,
        decoder_normalize_before=True,
        share_decoder_input_output_embed=is_tied,
        no_scale_embedding=True,
        no_token_positional_embeddings=True,
        position_method="alibi",
        alibi_bias_max=alibi.bias_max,
        max_target_positions=config.n_positions,
    )


def _check_gpt2(model: Any) -> None:
    kind = type(model).__name__
    if kind != "GPT2LMHeadModel":
        raise ValueError(f"the model is a {kind}; give a GPT2LMHeadModel")
    alibi = settings_of(model)
    if alibi is None:
        raise ValueError("the model has position embeddings, not ALiBi; call apply_alibi first")
    config = model.config
    others = {
        "add_cross_attention": config.add_cross_attention,
        "scale_attn_by_inverse_layer_idx": config.scale_attn_by_inverse_layer_idx,
        "scale_attn_weights=False": not config.scale_attn_weights,
        "interpolation of slopes": alibi.interpolation is not None,
        f"activation_function {config.activation_function}": (
            config.activation_function not in _ACTIVATIONS
        ),
        f"layer_norm_epsilon {config.layer_norm_epsilon}": config.layer_norm_epsilon != 1e-5,
    }
    _refuse([name for name, is_so in others.items() if is_so], "a transformer_lm has no")


def _check_ours(decoder: Any) -> None:
    layer, positions = decoder.layers[0], decoder.positions
    others = {
        "adaptive softmax": decoder.output_projection is None,
        "layer norms after each part": not layer.normalize_before,
        f"position method {positions.name}": positions.name != "alibi",
        "trained or interpolated slopes": (
            positions.depends_on_length or not isinstance(positions.bias(), LinearBias)
        ),
        "layer norm of embeddings": decoder.layernorm_embedding is not None,
        "no layer norm at the end": decoder.layer_norm is None,
        "other widths of input or output": (
            decoder.project_in_dim is not None or decoder.project_out_dim is not None
        ),
        "activation of that kind": _activation_of(layer) is None,
        "document mask": decoder.document_mask != "none",
    }
    _refuse([name for name, is_so in others.items() if is_so], "GPT-2 has no")


def _activation_of(layer: Any) -> str | None:
    """Returns GPT-2's name of a layer's activation function; None if it has none."""
    known = ((theirs, get_activation_fn(ours)) for theirs, ours in _ACTIVATIONS.items())
    return next((name for name, function in known if function is layer.activation_fn), None)


def _bias_max_of(decoder: Any) -> float:
    """Returns the exponent of the gentlest slope among the first power of two of heads."""
    slopes = decoder.positions.bias().slopes
    below = 1 << (len(slopes).bit_length() - 1)
    return -math.log2(float(slopes[below - 1]))


def _refuse(found: list[str], text: str) -> None:
    if found:
        raise ValueError(f"{text} {', '.join(found)}; the model cannot be converted")


def _layer_from_gpt2(state: dict[str, Any], source: dict[str, Any], layer: int) -> None:
    ours, theirs = f"decoder.layers.{layer}", f"transformer.h.{layer}"
    for name, other, is_transposed in _LAYER:
        _copy(state, f"{ours}.{name}", source, f"{theirs}.{other}", is_transposed)
    weights = source[f"{theirs}.attn.c_attn.weight"].T.chunk(3)
    biases = source[f"{theirs}.attn.c_attn.bias"].chunk(3)
    for part, weight, bias in zip("qkv", weights, biases, strict=True):
        state[f"{ours}.self_attn.{part}_proj.weight"].copy_(weight)
        state[f"{ours}.self_attn.{part}_proj.bias"].copy_(bias)


def _layer_to_gpt2(state: dict[str, Any], source: dict[str, Any], layer: int) -> None:
    ours, theirs = f"decoder.layers.{layer}", f"transformer.h.{layer}"
    for name, other, is_transposed in _LAYER:
        _copy(state, f"{theirs}.{other}", source, f"{ours}.{name}", is_transposed)
    for kind in ("weight", "bias"):
        parts = [source[f"{ours}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
        state[f"{theirs}.attn.c_attn.{kind}"].copy_(
            torch.cat(parts).T if kind == "weight" else torch.cat(parts)
        )


def _copy(
    state: dict[str, Any], name: str, source: dict[str, Any], other: str, is_transposed: bool
) -> None:
    weight = source[f"{other}.weight"]
    state[f"{name}.weight"].copy_(weight.T if is_transposed else weight)
    state[f"{name}.bias"].copy_(source[f"{other}.bias"])
