"""How often the same networks have been looked at, and what each look may risk.

Who adds seeds until something is decided finds a difference where there is none more often than the
level says. In come the looks so far and the seeds of a further one; out comes the level that it is
left. The first look has the whole level. All further ones share a fifth of it, each half of what is
left of that, so that however many there are, verdicts err with at most 1.2 times the level
(Bonferroni; docs/rates.md simulates less). To look at the same seeds again is no further look.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SHARE_OF_FURTHER_LOOKS = 0.2


@dataclass(frozen=True)
class Look:
    """A comparison of networks of several seeds, and the level of its tests."""

    seeds: tuple[int, ...]
    level: float


def take(earlier: Sequence[Look], seeds: Sequence[int], level: float) -> list[Look]:
    """The looks with this one; as they are where these seeds have been looked at, or one alone.

    One seed decides nothing about architectures, so that nothing is risked.
    """
    looked_at = {look.seeds for look in earlier}
    if len(seeds) == 1 or tuple(seeds) in looked_at:
        return list(earlier)
    further = len(earlier)
    left = level if further == 0 else level * SHARE_OF_FURTHER_LOOKS / 2**further
    return [*earlier, Look(tuple(seeds), left)]


def level_of(looks: Sequence[Look], seeds: Sequence[int], level: float) -> float:
    """The level of the look at these seeds; `level` where one seed is no look."""
    for look in looks:
        if look.seeds == tuple(seeds):
            return min(level, look.level)
    return level
