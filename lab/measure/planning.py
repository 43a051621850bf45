"""What a number of seeds can show, and how many would decide.

In come the spread of a difference from seed to seed and the rules of the verdict; out come the
difference that is found, the margin that can be proved, and numbers of seeds.
"""

from __future__ import annotations

import bisect
import math
import warnings
from dataclasses import dataclass

import numpy as np
import scipy

from lab.measure.statistics import Settings

MOST_SEEDS = 1000  # that are counted, of those that would decide


@dataclass(frozen=True)
class SeedCount:
    """How many seeds would decide; None: more than are counted."""

    seeds: int | None
    fewest: int | None  # if the true spread lies at the lower end of what this one tells
    most: int | None


@dataclass(frozen=True)
class Planning:
    """What a number of seeds can show at this spread, in points."""

    deviation: float  # from seed to seed
    detectable_difference: float
    provable_margin: float  # within which networks that are the same would be found equivalent
    deciding: SeedCount | None  # seeds that detect the margin, and prove it; None without a margin


def plan(
    deviation: float, seeds: int, settings: Settings, known_from: int, least: float = 0.0
) -> Planning:
    """What `seeds` show, whose differences have this standard deviation, with --power.

    The deviation is known from `known_from` seeds, and to be no less than `least`.
    """
    # A difference is found by that half of a two-sided test that looks on its side.
    detectable = detectable_effect(seeds, settings.power, settings.level / 2)
    # Equivalence takes both one-sided tests. If each misses half of what may be missed, both reject
    # often enough; a little more often than that, since they may miss in the same experiment.
    missed = 1 - settings.power
    provable = detectable_effect(seeds, 1 - missed / 2, settings.level)
    deciding = None
    if settings.margin > 0:
        low, high = bounds_of_deviation(deviation, known_from, settings.level)
        deciding = SeedCount(
            seeds=count_deciding_seeds(deviation, settings),
            fewest=count_deciding_seeds(max(low, least), settings),
            most=count_deciding_seeds(high, settings),
        )
    return Planning(
        deviation=deviation,
        detectable_difference=detectable * deviation,
        provable_margin=provable * deviation,
        deciding=deciding,
    )


def bounds_of_deviation(deviation: float, seeds: int, level: float) -> tuple[float, float]:
    """The interval of a normal standard deviation that was estimated from `seeds`."""
    degrees = seeds - 1
    high, low = scipy.stats.chi2.ppf([level / 2, 1 - level / 2], degrees)
    return deviation * math.sqrt(degrees / low), deviation * math.sqrt(degrees / high)


def detectable_effect(seeds: int, power: float, level: float) -> float:
    """The difference, in standard deviations, that a one-sided t test finds with `power`."""
    from statsmodels.stats.power import TTestPower

    return float(TTestPower().solve_power(None, seeds, level, power, alternative="larger"))


def power_of_t_test(effect: float, seeds: int, level: float) -> float:
    """How often a one-sided t test of `seeds` finds `effect` standard deviations.

    SciPy, which statsmodels asks, can't compute what is all but certain.
    """
    from statsmodels.stats.power import TTestPower

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        power = TTestPower().power(effect, seeds, level, alternative="larger")
    return float(np.nan_to_num(power, nan=1.0))


def count_deciding_seeds(deviation: float, settings: Settings) -> int | None:
    """How many seeds detect a difference of the margin, and show that there is none."""
    effect = settings.margin / deviation

    def decide_it(seeds: int) -> bool:
        power_to_find = power_of_t_test(effect, seeds, settings.level / 2)
        power_to_exclude = 2 * power_of_t_test(effect, seeds, settings.level) - 1
        return min(power_to_find, power_to_exclude) >= settings.power

    candidates = range(2, MOST_SEEDS + 1)
    fewest = bisect.bisect_left(candidates, True, key=decide_it)
    return candidates[fewest] if fewest < len(candidates) else None
