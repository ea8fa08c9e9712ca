"""Makes the generator that the options of generation ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fairseq.dataclass.configs import GenerationConfig
from fairseq.search import (
    BeamSearch,
    DiverseBeamSearch,
    DiverseSiblingsSearch,
    Sampling,
    Search,
)
from fairseq.sequence_generator import SequenceGenerator
from fairseq.sequence_scorer import SequenceScorer

__all__ = ["build_generator", "build_search"]

_DEFAULTS = GenerationConfig()


def build_generator(
    models: Sequence[Any],
    tgt_dict: Any,
    args: Any,
    seq_gen_cls: type[SequenceGenerator] | None = None,
    extra_gen_cls_kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """Makes the generator, or the scorer if references are to be scored.

    Args:
        models: what generates.
        tgt_dict: dictionary of the output.
        args: an object with attributes named as the fields of `GenerationConfig`; what it lacks
            has its default.
        seq_gen_cls: another class of generator.
        extra_gen_cls_kwargs: further arguments of its constructor.

    Raises:
        ValueError: options contradict each other or are out of range.
    """
    if _get(args, "score_reference"):
        return SequenceScorer(tgt_dict)
    given = {
        "beam_size": _get(args, "beam"),
        "max_len_a": _get(args, "max_len_a"),
        "max_len_b": _get(args, "max_len_b"),
        "min_len": _get(args, "min_len"),
        "normalize_scores": not _get(args, "unnormalized"),
        "len_penalty": _get(args, "lenpen"),
        "unk_penalty": _get(args, "unkpen"),
        "temperature": _get(args, "temperature"),
        "match_source_len": _get(args, "match_source_len"),
        "no_repeat_ngram_size": _get(args, "no_repeat_ngram_size"),
        "search_strategy": build_search(args),
        **(extra_gen_cls_kwargs or {}),
    }
    return (seq_gen_cls or SequenceGenerator)(models, tgt_dict, **given)


def build_search(args: Any) -> Search:
    """Makes the strategy that the options ask for.

    Raises:
        ValueError: they ask for more than one.
    """
    chosen = {
        "--sampling": _get(args, "sampling"),
        "--diverse-beam-groups": _get(args, "diverse_beam_groups") > 0,
        "--match-source-len": _get(args, "match_source_len"),
        "--diversity-rate": _get(args, "diversity_rate") > 0,
    }
    flags = [flag for flag, is_chosen in chosen.items() if is_chosen]
    if len(flags) > 1:
        raise ValueError(
            f"Provided Search parameters are mutually exclusive: {', '.join(flags)}; give one"
        )
    topk, topp = _get(args, "sampling_topk"), _get(args, "sampling_topp")
    if (topk > 0 or topp > 0) and not chosen["--sampling"]:
        raise ValueError("--sampling-topk and --sampling-topp need --sampling")
    if chosen["--sampling"]:
        return Sampling(topk, topp)
    if chosen["--diverse-beam-groups"]:
        return DiverseBeamSearch(
            _get(args, "diverse_beam_groups"), _get(args, "diverse_beam_strength")
        )
    if _get(args, "diversity_rate") > -1:
        return DiverseSiblingsSearch(_get(args, "diversity_rate"))
    return BeamSearch()


def _get(args: Any, name: str) -> Any:
    return getattr(args, name, getattr(_DEFAULTS, name))
