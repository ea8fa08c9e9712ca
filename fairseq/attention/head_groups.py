"""Which heads are computed together, and in blocks of which length, so that it costs least.

A tile holds the scores of all heads of a group and as many keys as the one that looks furthest
needs. Few tiles cost few calls; small groups and short blocks leave out more scores.
"""

from __future__ import annotations

from fairseq.attention.tiles import MOST_SCORES, HeadGroup

__all__ = ["group_heads"]

_BLOCKS = ((64, 1.15), (128, 1.0), (256, 1.0))
"""Lengths of blocks of queries, and what a score costs there."""
_TILE_COST = 10_240
"""What calling the operators of a tile costs, in scores; measured."""


def group_heads(
    back: list[int], ahead: list[int], num_queries: int, num_keys: int
) -> tuple[HeadGroup, ...]:
    """Puts heads that follow one another together as long as that costs less than it saves.

    Args:
        back: how many steps back each head looks.
        ahead: how many steps ahead.
        num_queries: T.
        num_keys: S.
    """
    groups: list[tuple[float, HeadGroup]] = []
    for head in range(len(back)):
        alone = _cheapest(range(head, head + 1), back, ahead, num_queries, num_keys)
        if groups:
            cost, group = groups[-1]
            heads = range(group.heads.start, head + 1)
            joined = _cheapest(heads, back, ahead, num_queries, num_keys)
            if joined[0] <= cost + alone[0]:
                groups[-1] = joined
                continue
        groups.append(alone)
    return tuple(group for _, group in groups)


def _cheapest(
    heads: range, back: list[int], ahead: list[int], num_queries: int, num_keys: int
) -> tuple[float, HeadGroup]:
    """Returns the best group of these heads, and what it costs in scores."""
    furthest = tuple(max(each[heads.start : heads.stop]) for each in (back, ahead))
    # Near either end of the keys there are fewer of them to look at.
    reach = sum(w - w * w / (2 * num_keys) for w in (min(each, num_keys) for each in furthest))
    options = []
    for block, slowness in _BLOCKS:
        span = min(reach + block, num_keys)
        num_tiles = -(-num_queries // block) * -(-len(heads) * block * span // MOST_SCORES)
        cost = slowness * len(heads) * num_queries * span + num_tiles * _TILE_COST
        options.append((cost, block))
    cost, block = min(options)
    return cost, HeadGroup(slice(heads.start, heads.stop), block, *furthest)
