"""A language model with ALiBi written plainly, the baseline of the benchmarks.

It computes what the original computes, as the original computes it: three projections, two batched
products with a mask of length x length for every row and head, torch's dropout, an optimizer that
updates one tensor after the other, and in evaluations a row over the whole vocabulary for each
token. Weights are copied from a model of this project, so that both forms can be compared.

Shapes: `B` rows, `T` tokens, `H` heads, `D` width, `K` = D / H, `V` words.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from fairseq.positions.alibi_slopes import alibi_slopes

__all__ = ["PlainModel", "PlainNAG"]


class PlainModel:
    """A pre-norm decoder with adaptive input and adaptive softmax, weights tied.

    Args:
        model: a `transformer_lm_wiki103` of any size, whose weights are copied.
        length: tokens of a full row; the mask is made once for it.
        rows: rows of a full batch, each of which has its mask.
        dropout: probability after embeddings, attention and feed-forward net.
        attention_dropout: probability of attention weights.
        activation_dropout: probability after the activation.
        softmax_dropout: probability in the adaptive softmax.
    """

    def __init__(
        self,
        model: Any,
        length: int,
        rows: int,
        *,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        activation_dropout: float = 0.0,
        softmax_dropout: float = 0.0,
    ) -> None:
        decoder = model.decoder
        self.weights = {
            name.removeprefix("decoder."): parameter.detach().clone().requires_grad_()
            for name, parameter in model.named_parameters()
        }
        self.cutoffs = list(decoder.adaptive_softmax.cutoff)
        self.num_layers = len(decoder.layers)
        self.num_heads = decoder.layers[0].self_attn.num_heads
        self.scale = decoder.embed_scale
        self.rates = (dropout, attention_dropout, activation_dropout, softmax_dropout)
        self.mask = self._mask(length, rows)  # (B * H, T, T)
        self.training = False

    def _mask(self, length: int, rows: int) -> torch.Tensor:
        slopes = torch.tensor(alibi_slopes(self.num_heads))
        bias = slopes[:, None, None] * torch.arange(length)  # (H, 1, T)
        future = torch.full((length, length), -torch.inf).triu(1)
        return (future + bias).repeat(rows, 1, 1)

    def features(self, tokens: torch.Tensor) -> torch.Tensor:
        """Transforms ids (B, T) into features (B, T, D)."""
        x = self._drop(self.scale * self._embed(tokens), self.rates[0]).transpose(0, 1)
        for layer in range(self.num_layers):
            x = self._layer(x, f"layers.{layer}.")
        return x.transpose(0, 1)

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
        width = self.weights["layers.0.fc1.weight"].size(1)
        out = self.weights["layers.0.fc1.weight"].new_zeros(*tokens.shape, width)
        for band, (start, end) in enumerate(self._bands()):
            is_here = (tokens >= start) & (tokens < end)
            if is_here.any():
                name = f"embed_tokens.embeddings.{band}"
                rows = F.embedding(tokens[is_here] - start, self.weights[f"{name}.0.weight"])
                out[is_here] = F.linear(rows, self.weights[f"{name}.1.weight"])
        return out

    def _layer(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """Transforms (T, B, D)."""
        y = self._norm(x, f"{name}self_attn_layer_norm")
        x = x + self._drop(self._attend(y, f"{name}self_attn."), self.rates[0])
        y = self._norm(x, f"{name}final_layer_norm")
        y = self._drop(F.relu(self._linear(y, f"{name}fc1")), self.rates[2])
        return x + self._drop(self._linear(y, f"{name}fc2"), self.rates[0])

    def _attend(self, x: torch.Tensor, name: str) -> torch.Tensor:
        length, rows, width = x.shape
        head_dim = width // self.num_heads

        def heads(part: str) -> torch.Tensor:
            y = self._linear(x, f"{name}{part}_proj")
            return y.reshape(length, rows * self.num_heads, head_dim).transpose(0, 1)

        q, k, v = heads("q") * head_dim**-0.5, heads("k"), heads("v")  # (B * H, T, K)
        scores = torch.bmm(q, k.transpose(1, 2))
        scores += self.mask[: len(q), :length, :length]
        weights = self._drop(F.softmax(scores, dim=-1), self.rates[1])
        out = torch.bmm(weights, v).transpose(0, 1).reshape(length, rows, width)
        return self._linear(out, f"{name}out_proj")

    def loss(self, tokens: torch.Tensor, target: torch.Tensor, pad: int) -> torch.Tensor:
        """Returns the sum of cross entropies that `adaptive_loss` minimises, in nats."""
        x = self.features(tokens).reshape(-1, self.weights["layers.0.fc1.weight"].size(1))
        x, target = self._drop(x, self.rates[3]), target.reshape(-1)
        head_target = target.clone()
        total = x.new_zeros(())
        for tail, (start, end) in enumerate(self._bands()[1:]):
            is_here = (target >= start) & (target < end)
            if is_here.any():
                head_target[is_here] = self.cutoffs[0] + tail
                logits = self._tail(x[is_here], tail)
                total = total + F.cross_entropy(
                    logits, target[is_here] - start, ignore_index=pad, reduction="sum"
                )
        head = self._head(x)
        return total + F.cross_entropy(head, head_target, ignore_index=pad, reduction="sum")

    def log_probs(self, tokens: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Returns log p of the targets (B, T), picked from rows over the whole vocabulary."""
        features = self.features(tokens)
        x, flat = features.reshape(-1, features.size(-1)), target.reshape(-1)
        head = F.log_softmax(self._head(x), dim=-1)
        words = self.cutoffs[0]
        rows = x.new_zeros(len(x), self.cutoffs[-1])
        rows[:, :words] = head[:, :words]
        for tail, (start, end) in enumerate(self._bands()[1:]):
            here = ((flat >= start) & (flat < end)).nonzero().squeeze(1)
            if len(here):
                log_word = F.log_softmax(self._tail(x[here], tail), dim=-1)
                rows[here, start:end] = log_word + head[here, words + tail, None]
        return rows.gather(1, flat[:, None]).view(target.shape)

    def _head(self, x: torch.Tensor) -> torch.Tensor:
        words = F.linear(x, self.weights["embed_tokens.embeddings.0.0.weight"])
        classes = F.linear(x, self.weights["adaptive_softmax.head.class_proj.weight"])
        return torch.cat([words, classes], dim=1)

    def _tail(self, x: torch.Tensor, tail: int) -> torch.Tensor:
        name = f"embed_tokens.embeddings.{tail + 1}"
        x = F.linear(x, self.weights[f"{name}.1.weight"].t())
        return F.linear(self._drop(x, self.rates[3]), self.weights[f"{name}.0.weight"])

    def _bands(self) -> list[tuple[int, int]]:
        return list(zip([0, *self.cutoffs[:-1]], self.cutoffs, strict=True))

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return F.layer_norm(x, weight.shape, weight, bias)

    def _drop(self, x: torch.Tensor, rate: float) -> torch.Tensor:
        return F.dropout(x, rate, training=self.training)


class PlainNAG:
    """Nesterov momentum, one tensor after the other, as in the original.

    Args:
        params: what is updated.
        lr: learning rate.
        momentum: factor of the buffer.
        clip_norm: largest norm of the gradient.
    """

    def __init__(
        self, params: list[torch.Tensor], lr: float, momentum: float, clip_norm: float
    ) -> None:
        self.params = params
        self.lr, self.momentum, self.clip_norm = lr, momentum, clip_norm
        self.buffers = [torch.zeros_like(p) for p in params]

    @torch.no_grad()
    def step(self, sample_size: int) -> torch.Tensor:
        """Updates the parameters from gradients of sums over `sample_size` tokens."""
        pairs = [(p, b) for p, b in zip(self.params, self.buffers, strict=True)]
        pairs = [(p, b) for p, b in pairs if p.grad is not None]
        for p, _ in pairs:
            p.grad.mul_(1 / sample_size)
        norm = torch.norm(torch.stack([torch.norm(p.grad) for p, _ in pairs]))
        coefficient = (self.clip_norm / (norm + 1e-6)).clamp_(max=1)
        for p, buffer in pairs:
            p.grad.mul_(coefficient)
            p.add_(buffer, alpha=self.momentum**2)
            p.add_(p.grad, alpha=-(1 + self.momentum) * self.lr)
            buffer.mul_(self.momentum).add_(p.grad, alpha=-self.lr)
            p.grad = None
        return norm
