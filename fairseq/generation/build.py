"""Makes the generator that the options of generation ask for."""

from __future__ import annotations

import dataclasses
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
    options = _complete(args)
    if options.score_reference:
        return SequenceScorer(tgt_dict)
    given = {
        "beam_size": options.beam,
        "max_len_a": options.max_len_a,
        "max_len_b": options.max_len_b,
        "min_len": options.min_len,
        "normalize_scores": not options.unnormalized,
        "len_penalty": options.lenpen,
        "unk_penalty": options.unkpen,
        "temperature": options.temperature,
        "match_source_len": options.match_source_len,
        "no_repeat_ngram_size": options.no_repeat_ngram_size,
        "search_strategy": build_search(options),
        "cache_error": options.cache_error,
        **(extra_gen_cls_kwargs or {}),
    }
    return (seq_gen_cls or SequenceGenerator)(models, tgt_dict, **given)


def build_search(args: Any) -> Search:
    """Makes the strategy that the options ask for.

    Raises:
        ValueError: they ask for more than one.
    """
    options = _complete(args)
    chosen = {
        "--sampling": options.sampling,
        "--diverse-beam-groups": options.diverse_beam_groups > 0,
        "--match-source-len": options.match_source_len,
        "--diversity-rate": options.diversity_rate > 0,
    }
    flags = [flag for flag, is_chosen in chosen.items() if is_chosen]
    if len(flags) > 1:
        raise ValueError(
            f"Provided Search parameters are mutually exclusive: {', '.join(flags)}; give one"
        )
    topk, topp = options.sampling_topk, options.sampling_topp
    if (topk > 0 or topp > 0) and not chosen["--sampling"]:
        raise ValueError("--sampling-topk and --sampling-topp need --sampling")
    if chosen["--sampling"]:
        return Sampling(topk, topp)
    if chosen["--diverse-beam-groups"]:
        return DiverseBeamSearch(options.diverse_beam_groups, options.diverse_beam_strength)
    if options.diversity_rate > -1:
        return DiverseSiblingsSearch(options.diversity_rate)
    return BeamSearch()


def _complete(args: Any) -> GenerationConfig:
    """Returns options with their defaults where there are none."""
    names = (each.name for each in dataclasses.fields(GenerationConfig))
    return GenerationConfig(**{name: getattr(args, name) for name in names if hasattr(args, name)})
