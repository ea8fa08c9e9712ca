"""A transformer decoder for language models, from token ids to scores.

No position embeddings: the relative bias is made once, before the layer loop, joined with the
causal mask in a buffered future mask; every layer only adds what it is handed. Other position
methods come in through the same three calls: `embed`, `rotate`, `bias`.

Shapes: `B` rows, `T` new tokens, `S` tokens so far (S = T but in incremental decoding), `D` width,
`H` heads, `V` words.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import nn

from fairseq.attention import (
    BIDIRECTIONAL,
    CAUSAL,
    AttentionRule,
    LinearBias,
    Positions,
    Prepared,
    get_backend,
)
from fairseq.attention.backends.dense import DenseBackend
from fairseq.attention.backends.reference import ReferenceBackend
from fairseq.attention.coordinates import at_columns
from fairseq.attention.head_share import HeadShare
from fairseq.models import upgrade
from fairseq.models.base import FairseqIncrementalDecoder
from fairseq.models.transformer.beam_steps import BeamSteps, can_step
from fairseq.modules import (
    AdaptiveSoftmax,
    FairseqDropout,
    IncrementalState,
    LayerDropModuleList,
    LayerNorm,
    Linear,
    PositionalEmbedding,
    TransformerDecoderLayer,
    checkpoint_wrapper,
)
from fairseq.modules.cutoffs import parse_cutoffs
from fairseq.modules.key_value_cache import WindowedCache
from fairseq.modules.transformer_layer import attention_dropout
from fairseq.positions import PositionMethod, Surroundings, find_method, table_rows
from fairseq.positions.documents import document_numbers
from fairseq.utils import on_host

__all__ = ["TransformerDecoder"]


class TransformerDecoder(FairseqIncrementalDecoder):
    """Embeds tokens, transforms them layer by layer, and scores the next ones.

    Args:
        cfg: settings with the names of `TransformerLanguageModelConfig`.
        dictionary: of the words it predicts.
        embed_tokens: input embeddings, an `nn.Embedding` or an `AdaptiveInput`.

    Attributes:
        sequence_length: for position methods that adapt to length, the length of sequences in calls
            that do not say it; None is that of the input.
        document_mask: where attention and positions restart, as in `--document-mask`.
        head_share: the heads that this process computes, None for all.
        takes_left_padding: a row gives the same with padding on its left.

    Raises:
        ValueError: settings contradict each other; the message names the options.
    """

    takes_left_padding = True

    def __init__(self, cfg: Any, dictionary: Any, embed_tokens: Any) -> None:
        super().__init__(dictionary)
        # 3 says that there is a final norm where the settings want one, see `upgrade`.
        self.version: torch.Tensor
        self.register_buffer("version", torch.full((1,), 3.0))
        width = cfg.decoder_embed_dim
        self.padding_idx: int = dictionary.pad()
        self.max_target_positions = cfg.max_target_positions
        self.dropout_module = FairseqDropout(cfg.dropout, type(self).__name__)
        self.embed_tokens = embed_tokens
        self.embed_scale = 1.0 if cfg.no_scale_embedding else math.sqrt(width)
        input_dim = embed_tokens.embedding_dim
        self.project_in_dim = Linear(input_dim, width, bias=False) if input_dim != width else None
        self.embed_positions = self._build_position_table(cfg)
        self.layernorm_embedding = LayerNorm(width) if cfg.layernorm_embedding else None
        self.layers = self._build_layers(cfg)
        has_final_norm = cfg.decoder_normalize_before and not cfg.no_decoder_final_norm
        self.layer_norm: nn.LayerNorm | None = LayerNorm(width) if has_final_norm else None
        output_dim = cfg.decoder_output_dim
        projects_out = output_dim != width and not cfg.tie_adaptive_weights
        self.project_out_dim = Linear(width, output_dim, bias=False) if projects_out else None
        self.adaptive_softmax: AdaptiveSoftmax | None = None
        self.output_projection: Any = None
        self._build_output(cfg)
        self.positions = self._build_position_method(cfg)
        self.sequence_length: int | None = None
        self.head_share: HeadShare | None = None
        self.document_mask: str = cfg.document_mask or "none"
        self.backend = get_backend(cfg.attention_backend)
        self._masks = self.backend if isinstance(self.backend, DenseBackend) else ReferenceBackend()

    def _build_position_table(self, cfg: Any) -> Any:
        """Makes the table that checkpoints have a key for, whether the method reads it or not."""
        method = find_method(cfg.position_method)
        if cfg.no_token_positional_embeddings or not method.has_table:
            return None
        learned = method.is_table_learned
        learned = cfg.decoder_learned_pos if learned is None else learned
        if cfg.max_target_positions is None and learned:
            raise ValueError(
                "learned position embeddings need a size; set --max-target-positions or "
                "--tokens-per-sample"
            )
        limit = cfg.max_target_positions or 0  # a table of sines grows when it is read
        return PositionalEmbedding(limit, cfg.decoder_embed_dim, self.padding_idx, learned)

    def _build_position_method(self, cfg: Any) -> PositionMethod:
        surroundings = Surroundings(
            num_heads=cfg.decoder_attention_heads,
            padding_idx=self.padding_idx,
            table=self.embed_positions,
            head_dim=cfg.decoder_embed_dim // cfg.decoder_attention_heads,
            settings=cfg,
            train_length=cfg.train_length or cfg.tokens_per_sample,
        )
        return find_method(cfg.position_method)(surroundings)

    def _build_layers(self, cfg: Any) -> nn.ModuleList:
        layerdrop = cfg.decoder_layerdrop
        layers = LayerDropModuleList(layerdrop) if layerdrop > 0 else nn.ModuleList()
        for _ in range(cfg.decoder_layers):
            layer = self.build_decoder_layer(cfg)
            if cfg.checkpoint_activations or cfg.offload_activations:
                layer = checkpoint_wrapper(layer, cfg.offload_activations)
            layers.append(layer)
        return layers

    def build_decoder_layer(self, cfg: Any) -> nn.Module:
        """Makes one layer."""
        return TransformerDecoderLayer(cfg)

    def _build_output(self, cfg: Any) -> None:
        if cfg.adaptive_softmax_cutoff is not None:
            self.adaptive_softmax = AdaptiveSoftmax(
                len(self.dictionary),
                cfg.decoder_output_dim,
                parse_cutoffs(cfg.adaptive_softmax_cutoff, "--adaptive-softmax-cutoff"),
                dropout=cfg.adaptive_softmax_dropout,
                factor=cfg.adaptive_softmax_factor,
                adaptive_inputs=self.embed_tokens if cfg.tie_adaptive_weights else None,
                tie_proj=cfg.tie_adaptive_proj,
            )
            return
        shape = (cfg.decoder_output_dim, len(self.dictionary))
        self.output_projection = nn.Linear(*shape, bias=False)
        if cfg.share_decoder_input_output_embed:
            self.output_projection.weight = self.embed_tokens.weight
        else:
            nn.init.normal_(self.output_projection.weight, mean=0, std=shape[0] ** -0.5)

    def forward(  # type: ignore[override]
        self,
        prev_output_tokens: torch.Tensor,
        encoder_out: Any = None,
        incremental_state: IncrementalState | None = None,
        features_only: bool = False,
        full_context_alignment: bool = False,
        src_lengths: torch.Tensor | None = None,
        return_all_hiddens: bool = False,
        sequence_length: int | None = None,
        columns: Positions | None = None,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Computes the output for the new tokens.

        Args:
            prev_output_tokens: ids of all tokens so far, (B, S).
            encoder_out: what the encoder returned; None for a decoder that attends to no encoder.
            incremental_state: keys and values of the tokens of earlier calls; `{}` at first.
            features_only: leave out the output layer.
            full_context_alignment: let every token see those after it.
            src_lengths: not needed, since padding is known by its id; part of every batch.
            return_all_hiddens: collect the output of every layer.
            sequence_length: tokens that the sequence will have at its end, such as the prompt and
                the most new ones, for position methods that adapt to it. With an incremental state
                the first call settles it, since keys are cached. None is the attribute of that
                name, or else the length of the input.
            columns: the T columns that this worker computes, where a sequence is cut over several
                and the attention backend brings them together; None is all of them.

        Returns:
            (logits (B, T, V), or features (B, T, D) if asked for or if there is an adaptive
            softmax; {"attn": [None], "inner_states": [(B, T, D), ...]}).

        Raises:
            ValueError: an encoder's output is given, no token is new, the sequence length is not
                that of the first call, or columns are given with an incremental state.
        """
        features, extra = self.extract_features(
            prev_output_tokens,
            encoder_out,
            incremental_state=incremental_state,
            full_context_alignment=full_context_alignment,
            return_all_hiddens=return_all_hiddens,
            sequence_length=sequence_length,
            columns=columns,
        )
        return (features if features_only else self.output_layer(features)), extra

    def extract_features(  # type: ignore[override]
        self,
        prev_output_tokens: torch.Tensor,
        encoder_out: Any = None,
        incremental_state: IncrementalState | None = None,
        full_context_alignment: bool = False,
        src_lengths: torch.Tensor | None = None,
        return_all_hiddens: bool = False,
        sequence_length: int | None = None,
        columns: Positions | None = None,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Computes what the output layer reads; see `forward`."""
        if columns is not None and incremental_state is not None:
            raise ValueError("columns are given with an incremental state; leave one of them out")
        num_cached = self._num_cached(prev_output_tokens, incremental_state)
        new = range(num_cached, prev_output_tokens.size(1)) if columns is None else columns
        x = self.embed(prev_output_tokens, new)  # (B, T, D)
        rule = BIDIRECTIONAL if full_context_alignment else CAUSAL
        length = self._sequence_length(prev_output_tokens, incremental_state, sequence_length)
        prepared = self.prepare_attention(x, prev_output_tokens, new, rule, sequence_length=length)
        memory = self.prepare_memory(x, prev_output_tokens, new, encoder_out)
        inner_states = [x] if return_all_hiddens else []
        for layer in self.layers:
            x = layer(x, prepared, incremental_state, *memory)
            if return_all_hiddens:
                inner_states.append(x)
        return self.after_layers(x), {"attn": [None], "inner_states": inner_states}

    def after_layers(self, x: torch.Tensor) -> torch.Tensor:
        """Turns what the last layer returns, (B, T, D), into what the output layer reads."""
        if self.layer_norm is not None:
            x = self.layer_norm(x)
        return x if self.project_out_dim is None else self.project_out_dim(x)

    def extract_last_features(self, tokens: torch.Tensor, num_last: int) -> torch.Tensor:
        """Computes what the output layer reads of the last tokens alone.

        The last layer computes keys and values of all tokens, everything else of the last ones.

        Args:
            tokens: ids, (B, S).
            num_last: how many of the columns are wanted, N, from 1 to S.

        Returns:
            The features of the last N columns, (B, N, D); those that `extract_features` returns.
        """
        x = self.embed(tokens)
        length = self._sequence_length(tokens, None, None)
        prepared = self.prepare_attention(x, tokens, sequence_length=length)
        *others, last = self.layers
        for layer in others:
            x = layer(x, prepared)
        columns = range(tokens.size(1) - num_last, tokens.size(1))
        of_last = self.prepare_attention(x, tokens, columns, sequence_length=length)
        turn, turn_last = prepared.rotate, of_last.rotate
        of_last.rotate = lambda q, k: (turn_last(q, q)[0], turn(k, k)[1])
        return self.after_layers(last(x, of_last, num_last=num_last))

    def embed(self, tokens: torch.Tensor, columns: Positions | None = None) -> torch.Tensor:
        """Embeds T columns, by default all, of the tokens (B, S), as (B, T, D)."""
        columns = range(tokens.size(1)) if columns is None else columns
        x = self.embed_scale * self.embed_tokens(at_columns(tokens, columns))
        if self.project_in_dim is not None:
            x = self.project_in_dim(x)
        documents = self.document_numbers(tokens) if self.positions.uses_table else None
        x = self.positions.embed(x, tokens, documents, columns)
        if self.layernorm_embedding is not None:
            x = self.layernorm_embedding(x)
        return self.dropout_module(x)

    def prepare_attention(
        self,
        x: torch.Tensor,
        tokens: torch.Tensor,
        new: Positions | None = None,
        rule: AttentionRule = CAUSAL,
        *,
        sequence_length: int | None = None,
    ) -> Prepared:
        """Makes, once for all layers, what is added to attention scores.

        Args:
            x: embeddings of the new tokens, (B, T, D).
            tokens: ids of all tokens so far, (B, S).
            new: columns of the new tokens; None is all of them.
            rule: who may see whom.
            sequence_length: see `forward`; None is no longer than in training.
        """
        is_padding = tokens.eq(self.padding_idx)  # (B, S)
        has_padding = bool(on_host(tokens).eq(self.padding_idx).any())
        documents = self.document_numbers(tokens)  # (B, S)
        columns = range(tokens.size(1))
        new = columns if new is None else new
        places: Positions = columns
        if documents is not None or (has_padding and not self.positions.is_relative):
            rows = table_rows(tokens, self.padding_idx, documents)  # (B, S)
            places = (rows - self.padding_idx - 1).clamp_(min=0)
        # Between tokens of one document columns differ as places do, and cost less.
        positions = columns if self.positions.is_relative else places
        share = self.head_share
        bias = self.positions.bias(sequence_length)
        prepared = self.backend.prepare(
            bias if share is None else share.of(bias),
            at_columns(positions, new),
            positions,
            rule=rule,
            key_is_padding=is_padding if has_padding else None,
            query_documents=None if documents is None else at_columns(documents, new),
            key_documents=documents,
            head_slice=None if share is None else share.heads,
            dropout_p=attention_dropout(self.layers),
            dtype=x.dtype,
            device=x.device,
        )
        prepared.rotate = functools.partial(
            self.positions.rotate,
            positions=at_columns(places, new),
            sequence_length=sequence_length,
        )
        return prepared

    def prepare_memory(
        self, x: torch.Tensor, tokens: torch.Tensor, new: Positions, encoder_out: Any
    ) -> tuple[Any, ...]:
        """Makes, once for all layers, what they attend to beside the tokens so far: here nothing.

        Args:
            x: embeddings of the new tokens, (B, T, D).
            tokens: ids of all tokens so far, (B, S).
            new: columns of the new tokens.
            encoder_out: what the encoder returned.

        Returns:
            Further arguments of every layer.

        Raises:
            ValueError: an encoder's output is given.
        """
        if encoder_out is not None:
            raise ValueError("encoder_out is given, but a language model attends to no encoder")
        return ()

    def document_numbers(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """Returns which document each token so far (B, S) belongs to; None if all are one."""
        if self.document_mask == "none":
            return None
        return document_numbers(
            tokens,
            self.document_mask,
            eos_idx=self.dictionary.eos(),
            padding_idx=self.padding_idx,
        )

    def buffered_future_mask(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the causal mask with the bias in it, for inputs like `x`.

        It is kept and cut to length, and made again for a longer input or another dtype or device.
        It is made from relative distance in float32 and cast last. Not part of the state dict.

        Args:
            x: (B, T, D); its length, dtype and device count.

        Returns:
            (H, T, T): the bias of head h where key j may be seen by query i, else -inf.
        """
        return self._masks.future_mask(
            self.positions.bias(self.sequence_length or x.size(1)),
            x.size(1),
            dtype=x.dtype,
            device=x.device,
        )

    def output_layer(self, features: torch.Tensor) -> torch.Tensor:
        """Turns features (B, T, D) into logits (B, T, V).

        With an adaptive softmax the features are returned as they are: it is applied by the
        criterion, or by `get_normalized_probs`.
        """
        return features if self.output_projection is None else self.output_projection(features)

    def max_positions(self) -> int | None:
        """Returns the longest input that training and validation let through."""
        limits = [self.max_target_positions, self.position_limit]
        return min((limit for limit in limits if limit is not None), default=None)

    @property
    def position_limit(self) -> int | None:
        """The longest input that can be computed at all; None is any length."""
        if not self.positions.uses_table:
            return None
        return getattr(self.embed_positions, "max_positions", None)

    def forget_far_keys(
        self, incremental_state: IncrementalState, error: float, sequence_length: int | None = None
    ) -> list[WindowedCache]:
        """Lets every head of a new incremental state forget keys that it cannot see any more.

        Args:
            incremental_state: has to be empty.
            error: largest sum of the attention weights that a query loses in a head; see
                `WindowedCache`.
            sequence_length: see `forward`.

        Returns:
            The cache of each layer.

        Raises:
            ValueError: the error is out of range, or the position method is not ALiBi.
        """
        if not 0 < error < 1:
            raise ValueError(f"--cache-error is {error:g}; it must be above 0 and below 1")
        bias = self.positions.bias(sequence_length)
        if not isinstance(bias, LinearBias):
            raise ValueError(
                f"--cache-error needs --position-method alibi with fixed slopes, not "
                f"{self.positions.name}: only these tell how far a head can see"
            )
        caches = [WindowedCache(bias.slopes, error) for _ in self.layers]
        layer: Any
        for layer, cache in zip(self.layers, caches, strict=True):
            layer.self_attn.cache(incremental_state, cache)
        return caches

    def begin_steps(
        self,
        incremental_state: IncrementalState,
        prompt: torch.Tensor,
        num_beams: int,
        sequence_length: int | None = None,
    ) -> BeamSteps | None:
        """Returns what reads further tokens one by one at less cost than `extract_features`.

        Args:
            incremental_state: filled with the prompts.
            prompt: ids, (B, P), padded on the left.
            num_beams: hypotheses that go on from each prompt, M.
            sequence_length: see `forward`.

        Returns:
            None where something was changed in the layers, such as hooks or retained dropout.
        """
        if not (type(self) is TransformerDecoder and can_step(self)):
            return None
        length = self._sequence_length(prompt, incremental_state, sequence_length)
        return BeamSteps(self, incremental_state, prompt, num_beams, length)

    def _num_cached(self, tokens: torch.Tensor, incremental_state: IncrementalState | None) -> int:
        if incremental_state is None or len(self.layers) == 0:
            return 0
        first_layer: Any = self.layers[0]
        num_cached: int = first_layer.self_attn.num_cached(incremental_state)
        if num_cached and num_cached >= tokens.size(1):
            raise ValueError(
                f"incremental decoding takes all tokens so far: the state holds {num_cached}, so "
                f"{num_cached + 1} or more are needed, but {tokens.size(1)} are given"
            )
        return num_cached

    def _sequence_length(
        self,
        tokens: torch.Tensor,
        incremental_state: IncrementalState | None,
        given: int | None,
    ) -> int | None:
        """Returns the length of the whole sequence, which the first call for it has settled."""
        if not self.positions.depends_on_length:
            return None
        length = given or self.sequence_length or tokens.size(1)
        if incremental_state is None or len(self.layers) == 0:
            return length
        memory: Any = self.layers[0].self_attn
        stored = memory.get_incremental_state(incremental_state, "sequence_length")
        if stored is None:
            # For each row, since rows are what is selected and reordered.
            settled = torch.full((tokens.size(0),), length, device=tokens.device)
            memory.set_incremental_state(incremental_state, "sequence_length", {"length": settled})
            return length
        settled_length = int(stored["length"][0])
        if given is not None and given != settled_length:
            raise ValueError(
                f"sequence_length is {given}, but the incremental state was begun for "
                f"{settled_length} tokens; say it in the first call only"
            )
        return settled_length

    def upgrade_state_dict_named(self, state_dict: dict[str, Any], name: str) -> None:
        """Brings a state dict up to date, in which this decoder's names start with `name`."""
        upgrade.fit_position_table(
            state_dict, f"{name}.embed_positions", self.embed_positions, self.positions.uses_table
        )
        output = f"{name}.output_projection.weight"
        if self.output_projection is not None and output not in state_dict:
            is_shared = self.output_projection.weight is getattr(self.embed_tokens, "weight", None)
            if is_shared:
                state_dict[output] = state_dict[f"{name}.embed_tokens.weight"]
            elif f"{name}.embed_out" in state_dict:
                state_dict[output] = state_dict.pop(f"{name}.embed_out")
        upgrade.rename_layer_norms(state_dict, name)
        version = state_dict.get(f"{name}.version")
        if version is None or float(version.reshape(-1)[0]) <= 2:
            self.layer_norm = None
            state_dict[f"{name}.version"] = torch.ones(1)
