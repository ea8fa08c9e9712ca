"""Is a model's position method really in effect, and does the model compute what it should?

Each check looks at the model from outside: it changes one thing that must, or must not, change the
output, and measures by how much the output moves. Differences are root mean squares relative to
the output; the limits come from the rounding error of the model itself (see `rounding`).

Shapes: `B` rows, `T` tokens, `H` heads.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from fairseq.attention import AttentionBackend, Positions, Prepared, ZeroBias, attend
from fairseq.attention.backends.recording import RecordingBackend
from fairseq.attention.backends.request import Request
from fairseq.evaluation.diagnostics import use_backend
from fairseq.evaluation.rounding import FLOAT32_TOLERANCE, relative_difference, rounding_error
from fairseq.positions import PositionMethod, alibi_slopes
from fairseq.positions.alibi import interpolated

__all__ = ["CHECKS", "FAIL", "PASS", "SKIP", "Finding", "Patient", "examine"]

PASS, FAIL, SKIP = "PASS", "FAIL", "SKIP"

# A correct half-precision computation moves the output by 1.1 to 1.25 times the simulated rounding.
_HALF_ROOM = 2.0
# What counts as an effect, in multiples of the largest difference that rounding makes.
_EFFECT = 10.0
# Logarithms of float32 weights, divided by slopes down to 2**-8 times some positions.
_SLOPE_ROUNDING = 1e-5
# Rows and tokens of most checks; tokens of those of precision, and of those of length.
_ROWS, _LENGTH, _LONG, _MOST_EXTRA = 3, 64, 512, 256
_NUM_RANDOM, _NUM_SPECIAL = 1 << 14, 4
_SHIFT = 17  # positions; not a multiple of anything a backend could be blind to


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    Attributes:
        name: what was checked.
        status: PASS, FAIL, or SKIP where the check makes no sense for the model.
        text: what was measured.
    """

    name: str
    status: str
    text: str


@dataclass
class Patient:
    """A model with all that its checks need.

    Attributes:
        model: a transformer language model, in float32 and evaluation mode.
        tokens: ids without padding, (B, T), B at least 2 and T at least 8.
        long_tokens: one row for the checks of length and precision, (1, T) or longer than any of
            them needs.
        stored_method: position method recorded in the checkpoint.
        stored_reason: how it is known.
        is_certain: whether the file tells it.
        train_length: tokens of a training sample.
        bias_max: exponent of the gentlest slope.
        interpolation: how slopes are interpolated at any length, and the factor.
        expected: features of the tokens, (B, T, D).
        tolerance: the largest difference that rounding makes between computations in float32.
    """

    model: Any
    tokens: torch.Tensor
    long_tokens: torch.Tensor
    stored_method: str
    stored_reason: str = "recorded in the checkpoint"
    is_certain: bool = True
    train_length: int = 64
    bias_max: float = 8.0
    interpolation: tuple[str, float] = ("none", 1.0)

    def __post_init__(self) -> None:
        # At once, not when a check first asks: it may be changing the model at that moment.
        self.expected = self.features()
        self.tolerance = FLOAT32_TOLERANCE * rounding_error(self.model, self.tokens, torch.bfloat16)

    @classmethod
    def of(
        cls,
        model: Any,
        cfg: Any,
        tokens: torch.Tensor | None = None,
        *,
        train_length: int | None,
        **stored: Any,
    ) -> Patient:
        """Returns a model with what its checks need.

        Args:
            model: a transformer language model, in float32 and evaluation mode.
            cfg: its configuration.
            tokens: ids without padding, (any number,), on the model's device; None draws some.
            train_length: tokens of a training sample, if they are known.
            stored: `stored_method` and what else is known of it.
        """
        if tokens is None:
            tokens = _random_ids(len(model.decoder.dictionary)).to(next(model.parameters()).device)
        train_length = int(train_length or _LENGTH)
        length = min(train_length, _LENGTH)
        limit = model.decoder.position_limit or 0
        num_short = _ROWS * length
        num_long = max(_LONG, train_length + _MOST_EXTRA, limit + 1)
        tokens = tokens.repeat(-(-(num_short + num_long) // len(tokens)))
        return cls(
            model,
            tokens[:num_short].view(_ROWS, length),
            tokens[num_short : num_short + num_long].unsqueeze(0),
            train_length=train_length,
            bias_max=cfg.alibi_bias_max,
            # At the training length, where a factor by length is 1.
            interpolation=(cfg.alibi_interpolation, cfg.alibi_interpolation_factor or 1.0),
            **stored,
        )

    @property
    def decoder(self) -> Any:
        """The model's decoder."""
        return self.model.decoder

    @property
    def positions(self) -> PositionMethod:
        """The position method in effect."""
        method: PositionMethod = self.decoder.positions
        return method

    def features(self, tokens: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
        """Returns the model's features (B, T, D) for its tokens or others."""
        with torch.no_grad():
            chosen = self.tokens if tokens is None else tokens
            found: torch.Tensor = self.decoder.extract_features(chosen, **options)[0]
            return found


def _random_ids(size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(_NUM_SPECIAL, size, (_NUM_RANDOM,), generator=generator)


Outcome = tuple[str, str]
"""Status and what was measured."""


def examine(patient: Patient) -> Iterator[Finding]:
    """Runs every check, one after the other; one that ends in an error has failed."""
    for name, check in CHECKS.items():
        try:
            status, text = check(patient)
        except Exception as error:
            status, text = FAIL, f"ended in {type(error).__name__}: {error}"
        yield Finding(name, status, text)


def _equal(what: str, difference: float, limit: float) -> Outcome:
    """Passes if a difference is within rounding; one that is no number fails."""
    status = PASS if difference <= limit else FAIL
    return status, f"{what}: difference {difference:.1e}, allowed {limit:.1e}"


def _moved(what: str, difference: float, rounding: float) -> Outcome:
    """Passes if a difference is more than rounding."""
    least = _EFFECT * rounding
    status = PASS if difference > least else FAIL
    return status, f"{what}: output moves by {difference:.1e}, needed {least:.1e}"


@contextmanager
def _replaced(owner: object, name: str, value: object) -> Iterator[None]:
    """Gives one object another attribute for a while."""
    own = vars(owner)
    had, before = name in own, own.get(name)
    own[name] = value
    try:
        yield
    finally:
        del own[name]
        if had:
            own[name] = before


# ---- the checkpoint ----


def _check_finite(patient: Patient) -> Outcome:
    state = patient.model.state_dict()
    bad = [key for key, tensor in state.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        return FAIL, f"NaN or infinite numbers in {', '.join(bad[:3])}{more}"
    count = sum(tensor.numel() for tensor in state.values())
    return PASS, f"{count:,} numbers in {len(state)} tensors"


def _check_method(patient: Patient) -> Outcome:
    stored, used = patient.stored_method, patient.positions.name
    if stored == used:
        return PASS, f"{used} ({patient.stored_reason})"
    if not patient.is_certain:
        return PASS, f"{used}, as asked for; the file itself does not tell"
    return FAIL, f"{used}, but the model was trained with {stored} ({patient.stored_reason})"


# ---- the method ----


def _hooks_off(patient: Patient) -> dict[str, Callable[..., Any]]:
    """Returns what takes the place of each hook that the method overrides, to switch it off."""
    positions = patient.positions
    kind = type(positions)
    off: dict[str, Callable[..., Any]] = {}
    if kind.embed is not PositionMethod.embed:
        off["embed"] = lambda x, *_, **__: x
    if kind.rotate is not PositionMethod.rotate:
        off["rotate"] = lambda q, k, *_, **__: (q, k)
    bias = positions.bias()
    if not isinstance(bias, ZeroBias):
        none = ZeroBias(bias.num_heads)
        off["bias"] = lambda *_, **__: none
    return off


_HOOKS = {"embed": "position embeddings", "rotate": "rotation", "bias": "bias"}


def _check_effect(patient: Patient) -> Outcome:
    off = _hooks_off(patient)
    if not off:
        return SKIP, f"{patient.positions.name} adds nothing that could be left out"
    parts, differences = [], []
    for hook, nothing in off.items():
        with _replaced(patient.positions, hook, nothing):
            differences.append(relative_difference(patient.features(), patient.expected))
        parts.append(f"without its {_HOOKS[hook]}")
    return _moved(" or ".join(parts), min(differences), patient.tolerance)


def _check_order(patient: Patient) -> Outcome:
    """Without a causal mask, a model knows the order of tokens from its position method alone."""
    tokens = patient.tokens
    order = torch.randperm(tokens.size(1), generator=torch.Generator().manual_seed(0))
    order = order.to(tokens.device)
    whole = patient.features(full_context_alignment=True)
    permuted = patient.features(tokens[:, order], full_context_alignment=True)
    difference = relative_difference(permuted, whole[:, order])
    what = "tokens permuted, mask lifted"
    if not _hooks_off(patient):
        return _equal(what, difference, patient.tolerance)
    return _moved(what, difference, patient.tolerance)


def _check_slopes(patient: Patient) -> Outcome:
    """Reads the slopes from attention weights: those of queries and keys that are all zero."""
    bias = patient.positions.bias()
    if patient.positions.name != "alibi" or bias.is_learned:
        return SKIP, "the method has no slopes that are fixed"
    kind, factor = patient.interpolation
    plain = torch.tensor(alibi_slopes(bias.num_heads, patient.bias_max), dtype=torch.float64)
    wanted = interpolated(plain, factor, kind)
    length = 9
    tokens = patient.tokens[:1, :length]
    x = torch.zeros(1, length, 1, device=tokens.device)
    prepared = patient.decoder.prepare_attention(x, tokens)
    zeros = torch.zeros(1, len(wanted), length, length, device=tokens.device)
    ones = torch.eye(length, device=tokens.device).expand_as(zeros)
    weights = attend(zeros, zeros, ones, prepared)[0].double().cpu()  # (H, T, T)
    last = weights[:, -1].log()  # the last query's, (H, T)
    found = (last[:, -1] - last[:, 0]) / (length - 1)
    error = float(((found - wanted) / wanted).abs().max())
    largest, smallest = float(wanted.max()), float(wanted.min())
    what = f"{len(wanted)} heads, {largest:.4g} to {smallest:.4g} (bias_max {patient.bias_max:g})"
    return _equal(what, error, _SLOPE_ROUNDING)


class _ShiftedBackend(AttentionBackend):
    """Another backend that is told later positions."""

    name = "shifted"

    def __init__(self, inner: AttentionBackend, shift: int) -> None:
        self._inner = inner
        self._shift = shift

    def prepare_request(self, request: Request) -> Prepared:
        later = dataclasses.replace(
            request,
            query_positions=_later(request.query_positions, self._shift),
            key_positions=_later(request.key_positions, self._shift),
        )
        return later.of(self._inner)

    def attend(self, *args: Any, **options: Any) -> torch.Tensor:
        return self._inner.attend(*args, **options)


def _later(positions: Positions, shift: int) -> torch.Tensor:
    # As a tensor, from which no backend can tell that a mask it keeps would do.
    if isinstance(positions, range):
        positions = torch.tensor(positions)
    return positions + shift


def _check_shift(patient: Patient) -> Outcome:
    positions = patient.positions
    adds_to_embeddings = type(positions).embed is not PositionMethod.embed
    if adds_to_embeddings or not positions.is_relative:
        return SKIP, f"{positions.name} counts positions from the first token on"
    rotate = positions.rotate

    def rotate_later(
        q: torch.Tensor, k: torch.Tensor, positions: Positions, *args: Any, **options: Any
    ) -> Any:
        return rotate(q, k, _later(positions, _SHIFT), *args, **options)

    with (
        use_backend(patient.model, _ShiftedBackend(patient.decoder.backend, _SHIFT)),
        _replaced(positions, "rotate", rotate_later),
    ):
        difference = relative_difference(patient.features(), patient.expected)
    return _equal(f"positions + {_SHIFT}", difference, patient.tolerance)


# ---- the computation ----


def _check_formula(patient: Patient) -> Outcome:
    with use_backend(patient.model, RecordingBackend()):
        plain = patient.features()
    what = f"backend {patient.decoder.backend.name} against the formula"
    return _equal(what, relative_difference(patient.expected, plain), patient.tolerance)


def _check_causality(patient: Patient) -> Outcome:
    middle = patient.tokens.size(1) // 2
    changed = patient.tokens.clone()
    changed[:, middle:] = patient.tokens[:, middle:].flip(1).roll(1, 0)
    found = patient.features(changed)
    before = relative_difference(found[:, :middle], patient.expected[:, :middle])
    return _equal(f"tokens from {middle} on replaced", before, patient.tolerance)


def _check_cache(patient: Patient) -> Outcome:
    length = min(patient.tokens.size(1), 32)
    first = length // 4
    state: dict[str, Any] = {}
    parts = [patient.features(patient.tokens[:, :first], incremental_state=state)]
    for stop in range(first + 1, length + 1):
        parts.append(patient.features(patient.tokens[:, :stop], incremental_state=state))
    difference = relative_difference(torch.cat(parts, 1), patient.expected[:, :length])
    return _equal(f"{length - first} steps", difference, patient.tolerance)


def _check_batch(patient: Patient) -> Outcome:
    rows = [patient.features(row.unsqueeze(0)) for row in patient.tokens]
    difference = relative_difference(torch.cat(rows), patient.expected)
    return _equal(f"1 row against {len(rows)}", difference, patient.tolerance)


def _check_right_padding(patient: Patient) -> Outcome:
    return _check_padding(patient, is_left=False)


def _check_left_padding(patient: Patient) -> Outcome:
    return _check_padding(patient, is_left=True)


def _check_padding(patient: Patient, *, is_left: bool) -> Outcome:
    """Compares a short row alone with the same row padded to the length of another."""
    length = patient.tokens.size(1)
    short = length - max(3, length // 4)
    row = patient.tokens[:1, :short]
    padding = row.new_full((1, length - short), patient.decoder.padding_idx)
    padded = torch.cat([padding, row] if is_left else [row, padding], dim=1)
    found = patient.features(torch.cat([padded, patient.tokens[1:]]))[:1]
    found = found[:, length - short :] if is_left else found[:, :short]
    difference = relative_difference(found, patient.features(row))
    return _equal(f"{length - short} of {length}", difference, patient.tolerance)


def _check_longer(patient: Patient) -> Outcome:
    limit = patient.decoder.position_limit
    if limit is not None:
        return _check_refusal(patient, limit)
    length = patient.train_length + min(patient.train_length, 256)
    tokens = patient.long_tokens[:, :length]
    found = patient.features(tokens)
    with use_backend(patient.model, RecordingBackend()):
        plain = patient.features(tokens)
    what = f"{tokens.size(1)} tokens, trained with {patient.train_length}, against the formula"
    return _equal(what, relative_difference(found, plain), patient.tolerance)


def _check_refusal(patient: Patient, limit: int) -> Outcome:
    tokens = patient.long_tokens[:, : limit + 1]
    try:
        patient.features(tokens)
    except ValueError:
        return PASS, f"the table ends at {limit}; {limit + 1} tokens are refused"
    return FAIL, f"the table ends at {limit}, yet {limit + 1} tokens were computed"


def _check_float16(patient: Patient) -> Outcome:
    return _check_half(patient, torch.float16)


def _check_bfloat16(patient: Patient) -> Outcome:
    return _check_half(patient, torch.bfloat16)


def _check_half(patient: Patient, dtype: torch.dtype) -> Outcome:
    limit = patient.decoder.position_limit
    tokens = patient.long_tokens[:, : min(512, limit or 512)]
    half = copy.deepcopy(patient.model).to(dtype)
    with torch.no_grad():
        found = half.decoder.extract_features(tokens)[0]
    difference = relative_difference(found, patient.features(tokens))
    room = _HALF_ROOM * rounding_error(patient.model, tokens, dtype)
    what = f"{tokens.size(1)} tokens"
    return _equal(what, difference, room)


CHECKS: dict[str, Callable[[Patient], Outcome]] = {
    "parameters are finite": _check_finite,
    "stored method is in effect": _check_method,
    "method changes the output": _check_effect,
    "order comes from the method": _check_order,
    "slopes are the method's": _check_slopes,
    "only distances count": _check_shift,
    "attention equals its formula": _check_formula,
    "no token sees a later one": _check_causality,
    "cached decoding equals uncached": _check_cache,
    "batch size does not matter": _check_batch,
    "padding right does not matter": _check_right_padding,
    "padding left does not matter": _check_left_padding,
    "longer than in training": _check_longer,
    "float16 agrees with float32": _check_float16,
    "bfloat16 agrees with float32": _check_bfloat16,
}
