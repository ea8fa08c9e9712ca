"""Chooses a backend for each call, by a rule that docs/attention.md tells and
scripts/bench_attention.py measures."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from fairseq.attention.backends.augmented import AugmentedBackend
from fairseq.attention.backends.base import AttentionBackend, Prepared
from fairseq.attention.backends.dense import DenseBackend
from fairseq.attention.backends.flash import FlashBackend
from fairseq.attention.backends.flex import FlexBackend
from fairseq.attention.backends.reference import ReferenceBackend
from fairseq.attention.backends.request import Request
from fairseq.attention.backends.sdpa import SdpaBackend
from fairseq.attention.backends.triangular import TriangularBackend
from fairseq.attention.backends.windowed import WindowedBackend

__all__ = ["AutoBackend", "AutoPrepared"]

logger = logging.getLogger(__name__)

_LONG = 512
"""Queries with as many keys from which on tiles beat a dense mask on a CPU; in general the square
of this many scores, since some of a sequence's queries see all of its keys."""
_LONG_IN_TRAINING = 384
"""The same where gradients are wanted, of which tiles take less, or with attention dropout, with
which the fused kernel leaves its fast path; if nothing is hidden, which costs tiles most."""
_MANY_BLOCKS = 96
"""The same from which on blocks up to the diagonal beat all scores at once, with dropout."""
_FEW_SCORES = 1 << 18
"""Scores of all rows and heads below which these blocks are not worth their calls."""
_WIDE_HEADS = 64
_LONG_FOR_WIDE_HEADS = 192
"""Queries with as many keys from which on blocks beat the fused kernel's gradients, which are slow
for wide heads; all scores at once beat them from `_MANY_BLOCKS` on."""
_LONG_ON_DEVICE = 2048
"""Queries from which on a dense mask is avoided on an accelerator."""


@dataclass(kw_only=True)
class AutoPrepared(Prepared):
    """What was asked for, and what backends made of it so far.

    Attributes:
        request: what was asked for.
        chosen: the backend for the rate of dropout that was asked for.
        backends: all there are, by name.
        made: by backend; those that take a dense mask share it. Another than the chosen one is
            made when a layer attends with another rate, and kept if the bias is fixed. A layer
            that is computed again for its gradients has to make a learned one again too.
    """

    request: Request
    chosen: str
    backends: Mapping[str, AttentionBackend]
    made: dict[str, Prepared] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Now, not in the first layer.
        self.made[self._maker_for(self.chosen)] = self.form_for(self.chosen)

    def form_for(self, name: str) -> Prepared:
        """Returns what a backend attends with."""
        maker = self._maker_for(name)
        if maker in self.made:
            return self.made[maker]
        made = self.request.of(self.backends[maker])
        if not self.request.bias.is_learned:
            self.made[maker] = made
        return made

    def _maker_for(self, name: str) -> str:
        return SdpaBackend.name if isinstance(self.backends[name], DenseBackend) else name


class AutoBackend(AttentionBackend):
    """Hands each call to the fastest backend that computes it as exactly as the reference."""

    name = "auto"

    def __init__(self) -> None:
        backends: tuple[AttentionBackend, ...] = (
            ReferenceBackend(),
            SdpaBackend(),
            AugmentedBackend(),
            TriangularBackend(),
            WindowedBackend(),
            FlexBackend(),
            FlashBackend(),
        )
        self._backends = {backend.name: backend for backend in backends}
        self._has_warned = False

    def obstacle(self, request: Request) -> None:
        return None

    def prepare_request(self, request: Request) -> AutoPrepared:
        chosen = self.choose(request, request.dropout_p)
        return AutoPrepared(
            self,
            key_is_padding=request.key_is_padding,
            request=request,
            chosen=chosen,
            backends=self._backends,
        )

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        prepared: Prepared,
        *,
        dropout_p: float = 0.0,
        scale: float | None = None,
    ) -> torch.Tensor:
        assert isinstance(prepared, AutoPrepared)
        name = self.name_for(q, k, prepared, dropout_p)
        made = prepared.form_for(name)
        return self._backends[name].attend(q, k, v, made, dropout_p=dropout_p, scale=scale)

    def name_for(
        self, q: torch.Tensor, k: torch.Tensor, prepared: AutoPrepared, dropout_p: float
    ) -> str:
        """Returns the name of the backend that attends with these queries and keys."""
        name = prepared.chosen
        if dropout_p != prepared.request.dropout_p:
            name = self.choose(prepared.request, dropout_p)
        of_head = q.size(2) * k.size(2)
        has_few = q.size(0) * q.size(1) * of_head < _FEW_SCORES
        if name == TriangularBackend.name:
            return ReferenceBackend.name if has_few else name
        width = q.size(-1)
        is_fused = name == SdpaBackend.name and q.device.type == "cpu" and q.dtype.itemsize >= 4
        has_gradients = torch.is_grad_enabled() and q.requires_grad
        if not (is_fused and has_gradients) or width < _WIDE_HEADS or of_head < _MANY_BLOCKS**2:
            return name
        is_long = of_head >= _LONG_FOR_WIDE_HEADS**2
        if is_long and not has_few and self._has_triangle(prepared.request):
            return TriangularBackend.name
        return ReferenceBackend.name if has_few or width >= 2 * _WIDE_HEADS else name

    def choose(self, request: Request, dropout_p: float = 0.0) -> str:
        """Returns the name of the backend for a request, if its rows are not few and short."""
        length = len(request.query_positions)
        if request.device.type == "cpu":
            if dropout_p == 0 and self._is_plainly_causal(request):
                return AugmentedBackend.name
            is_training = dropout_p > 0 or torch.is_grad_enabled()
            long = _LONG_IN_TRAINING if is_training and request.hides_nothing else _LONG
            num_scores = length * len(request.key_positions)
            if num_scores >= long**2 and self._can(WindowedBackend.name, request):
                return WindowedBackend.name
            if dropout_p == 0:
                return SdpaBackend.name
            if num_scores >= _MANY_BLOCKS**2 and self._has_triangle(request):
                return TriangularBackend.name
            return ReferenceBackend.name
        if self._is_plainly_causal(request):
            return AugmentedBackend.name
        if length < _LONG_ON_DEVICE:
            return SdpaBackend.name
        if self._can(FlashBackend.name, request):
            return FlashBackend.name
        if dropout_p == 0 and self._can(FlexBackend.name, request):
            return FlexBackend.name
        self._warn(request)
        return SdpaBackend.name

    def _can(self, name: str, request: Request) -> bool:
        return self._backends[name].obstacle(request) is None

    def _has_triangle(self, request: Request) -> bool:
        """Tells whether scores beyond a diagonal need not be formed, and can be left out."""
        return request.is_causal and self._can(TriangularBackend.name, request)

    def _is_plainly_causal(self, request: Request) -> bool:
        """Tells whether nothing but the future is hidden, and nothing added."""
        slopes = request.bias.linear_slopes()
        if slopes is None or bool(slopes.left.any()):
            return False
        is_square = request.shift == 0 and len(request.query_positions) == len(
            request.key_positions
        )
        return is_square and request.hides_nothing and self._can(AugmentedBackend.name, request)

    def _warn(self, request: Request) -> None:
        if self._has_warned:
            return
        self._has_warned = True
        reasons = "; ".join(
            f"{name}: {backend.obstacle(request) or 'no attention dropout'}"
            for name, backend in self._backends.items()
            if isinstance(backend, FlashBackend | FlexBackend)
        )
        logger.warning(
            "attention over %d queries takes a dense mask, since no backend without one can "
            "compute it (%s)",
            len(request.query_positions),
            reasons,
        )
