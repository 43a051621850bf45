"""Differences and how sure they are: intervals, tests, and a verdict by rule.

In come arrays of right and wrong, or of any number by seed and image. Out come means with
intervals, p-values with Holm's correction, and verdicts.

Seeds and images are both few. A t test over seeds speaks of other seeds on these images; with one
seed, a test over images speaks of these weights on other images; `SeedsAndImages` of both.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Protocol, TypeVar

import numpy as np
import scipy

from lab.machine.options import Between

Key = TypeVar("Key")  # what tells differences apart


@dataclass(frozen=True)
class Settings:
    """When a difference counts."""

    margin: Annotated[float, Between(0, 100)] = 0.5
    """differences up to this, in percentage points, do not matter in practice"""
    level: Annotated[float, Between(1e-6, 0.5)] = 0.05
    """something is said of a difference where its p is below this; intervals cover the rest"""
    power: Annotated[float, Between(0.06, 0.999)] = 0.8
    """chance with which a difference is to be found, or its absence shown"""
    score_resamples: Annotated[int, Between(10, 1e5)] = 300
    """bootstrap resamples behind an interval in the stress tests, where it is of no plain mean"""


@dataclass(frozen=True)
class Interval:
    """A value and the bounds of its interval."""

    value: float
    low: float
    high: float


class Verdict(enum.StrEnum):
    """What is said of a difference."""

    BETTER = "better"
    WORSE = "worse"
    EQUIVALENT = "equivalent"
    UNDECIDED = "undecided"


@dataclass(frozen=True)
class Difference:
    """A difference in points, with two tests of it and the verdict that follows.

    The first test is two-sided, its null hypothesis that there is no difference. The second is two
    one-sided tests (Schuirmann, 1987), their null hypothesis a difference of the margin or more. Of
    several differences, both p are also corrected by Holm's method. A verdict of "better" or
    "worse" goes before "equivalent"; `is_within_margin` says the latter of these too.
    """

    interval: Interval
    p: float  # of the first test
    p_holm: float
    margin_p: float  # of the second
    margin_p_holm: float
    margin_interval: Interval  # of one alone, within the margin where `margin_p` is below the level
    smallest_margin: float  # within which it would just have been called equivalent, in points
    verdict: Verdict = Verdict.UNDECIDED
    is_within_margin: bool = False


# ---- Means, and how sure they are

# The least that a p can be: SciPy 1.17 gives some quantiles of t at 1e-300 as minus infinity.
LEAST_TAIL = 1e-100


class Test(Protocol):
    """A difference that can be tested: for being zero, and for being as large as a margin."""

    def interval(self, coverage: float) -> Interval: ...

    def p(self) -> float: ...

    def margin_p(self, margin: float) -> float: ...


@dataclass(frozen=True)
class MeanTest(ABC):
    """A mean, in points, and how far from it the true one may lie: to both sides alike."""

    mean: float

    @abstractmethod
    def half_width(self, tail: float) -> float:
        """How far from the mean the true one lies to one side with a chance of `tail`."""

    @abstractmethod
    def tail_beyond(self, distance: float) -> float:
        """The chance to lie farther than `distance` to one side of the true mean."""

    def interval(self, coverage: float) -> Interval:
        """Around the mean, so wide that it covers the true one so often."""
        half = self.half_width((1 - coverage) / 2)
        return Interval(self.mean, self.mean - half, self.mean + half)

    def p(self) -> float:
        """p of the null hypothesis that the mean is zero: two-sided."""
        return min(1.0, 2 * self.tail_beyond(abs(self.mean)))

    def margin_p(self, margin: float) -> float:
        """p of the null hypothesis that the mean is `margin` or more away from zero.

        One-sided, on the likelier side.
        """
        return self.tail_beyond(margin - abs(self.mean))


@dataclass(frozen=True)
class TTest(MeanTest):
    """A mean over seeds, and the t distribution around it: of other seeds on the same images.

    Answers to so many images can't agree better from seed to seed than `least_error` allows, a
    normal error of which much is known. The seeds' own spread is known from few, and may be small
    by chance: of the two the one that says less counts.
    """

    standard_error: float
    standard_deviation: float  # of the seeds
    degrees: int
    least_error: float = 0.0

    def half_width(self, tail: float) -> float:
        of_seeds = self.standard_error * float(scipy.stats.t.isf(tail, self.degrees))
        return max(of_seeds, self.least_error * float(scipy.stats.norm.isf(tail)))

    def tail_beyond(self, distance: float) -> float:
        of_seeds = float(scipy.stats.t.sf(distance / self.standard_error, self.degrees))
        if self.least_error == 0:
            return of_seeds
        of_images = float(scipy.stats.norm.sf(distance / self.least_error))
        return max(of_seeds, of_images)


def t_test(values: np.ndarray, resolution: float, least_error: float = 0.0) -> TTest:
    """The t test of the mean of `values` [S].

    `resolution` is the step from one possible value to the next: the share of one image. Values
    that agree within it are not known to be equal: the standard deviation is taken to be at least
    that of rounding to it, resolution / sqrt(12) (JCGM 100:2008, the GUM, F.2.2.1).
    """
    count = len(values)
    deviation = max(float(values.std(ddof=1)), resolution / math.sqrt(12))
    error = deviation / math.sqrt(count)
    return TTest(float(values.mean()), error, deviation, count - 1, least_error)


@dataclass(frozen=True)
class SeedsAndImages(MeanTest):
    """A mean over seeds and images, and its two errors: of other seeds, and of other images.

    Both are t distributed, and an interval has the root of the sum of both half-widths' squares
    (Howe, JASA 1974), which covers as often as it should at two seeds as well as at ten, and with
    few images (docs/rates.md). With one seed there is the second alone.
    """

    error_of_seeds: float
    seeds: int
    error_of_images: float
    images: int

    def half_width(self, tail: float) -> float:
        of_images = self.error_of_images * quantile_of_t(tail, self.images)
        if self.seeds == 1:
            return of_images
        return math.hypot(self.error_of_seeds * quantile_of_t(tail, self.seeds), of_images)

    def tail_beyond(self, distance: float) -> float:
        if distance < 0:
            return 1 - self.tail_beyond(-distance)
        if distance == 0 or self.half_width(0.5 - 1e-12) >= distance:
            return 0.5
        if self.half_width(LEAST_TAIL) <= distance:
            return LEAST_TAIL
        root = scipy.optimize.brentq(
            lambda exponent: self.half_width(math.exp(exponent)) - distance,
            math.log(LEAST_TAIL),
            math.log(0.5 - 1e-12),
        )
        return math.exp(root)


@functools.lru_cache(maxsize=10_000)  # the same ones are asked for again and again
def quantile_of_t(tail: float, count: int) -> float:
    """What the t statistic of so many numbers exceeds with a chance of `tail`."""
    return float(scipy.stats.t.isf(tail, max(1, count - 1)))


@dataclass(frozen=True)
class MeanSquares:
    """An analysis of variance of `gains` [seeds, images], both random, without replication."""

    seeds: int
    images: int
    mean: float
    of_seeds: float
    of_images: float
    of_rest: float
    largest: float  # what the image counts that counts most, on average over the seeds

    def error_of_seeds(self) -> float:
        """The standard error of the mean for other seeds on the same images."""
        return math.sqrt(self.of_seeds / self.seeds / self.images)

    def error_of_images(self) -> float:
        """What other images add to it, the seeds being the same.

        As if one more image had been gained and one lost, each by as much as any image counts
        (Agresti & Min, 2005, for single answers): where no image differs, another still may.
        """
        beyond_rest = max(0.0, self.of_images - self.of_rest) / self.seeds / self.images
        return math.sqrt(beyond_rest + 2 * self.largest**2 / self.images**2)

    def error_of_rest(self) -> float:
        """The least that the mean can be known to, since each seed answers to so many images."""
        return math.sqrt(self.of_rest / self.seeds / self.images)


def mean_squares(gains: np.ndarray) -> MeanSquares:
    """Of `gains` [seeds, images] in points, where a whole image counts 100."""
    seeds, images = gains.shape
    by_seed = gains.mean(1, keepdims=True)
    by_image = gains.mean(0, keepdims=True)
    rest = gains - by_seed - by_image + gains.mean()
    of_rest = 0.0
    of_seeds = 0.0
    if seeds > 1:
        of_rest = float((rest**2).sum() / max(1, (seeds - 1) * (images - 1)))
        of_seeds = float(images * by_seed.var(ddof=1))
    return MeanSquares(
        seeds=seeds,
        images=images,
        mean=float(gains.mean()),
        of_seeds=of_seeds,
        of_images=float(seeds * by_image.var(ddof=1)) if images > 1 else 0.0,
        of_rest=of_rest,
        largest=float(np.abs(by_image).max()) or 100.0,
    )


def over_seeds_and_images(gains: np.ndarray) -> SeedsAndImages:
    """The mean of `gains` [seeds, images] in points, where a whole image counts 100."""
    squares = mean_squares(gains)
    return SeedsAndImages(
        mean=squares.mean,
        error_of_seeds=squares.error_of_seeds(),
        seeds=squares.seeds,
        error_of_images=squares.error_of_images(),
        images=squares.images,
    )


# ---- One seed: answers to the same questions


@dataclass(frozen=True)
class PairedAnswers:
    """Two networks' answers to the same images: how often only this one, only the first, is right.

    Differences are in points. `p` is McNemar's, exact; the margin's and the intervals are those of
    the score test of Tango (Statistics in Medicine 1998), which knows that where no answer differs,
    others may: twice no difference in 200 answers is no proof of 0.5 points.
    """

    gained: int
    lost: int
    images: int

    def mean(self) -> float:
        return 100 * (self.gained - self.lost) / self.images

    def interval(self, coverage: float) -> Interval:
        """The differences that the score test does not reject."""
        limit = float(scipy.stats.norm.isf((1 - coverage) / 2))
        mean = self.mean()
        low = self.difference_at(limit, -100.0, mean)
        high = self.difference_at(-limit, mean, 100.0)
        return Interval(mean, low, high)

    def difference_at(self, score: float, low: float, high: float) -> float:
        """The difference between two bounds at which the test gives `score`; else the outer one."""
        if self.score(low) <= score:
            return low
        if self.score(high) >= score:
            return high
        return float(scipy.optimize.brentq(lambda at: self.score(at) - score, low, high))

    def p(self) -> float:
        """p of the null hypothesis that images are gained as often as lost: McNemar's, exact."""
        from statsmodels.stats.contingency_tables import mcnemar

        if self.gained + self.lost == 0:
            return 1.0
        return float(mcnemar([[0, self.gained], [self.lost, 0]], exact=True).pvalue)

    def margin_p(self, margin: float) -> float:
        """p of the null hypothesis that the difference is `margin` or more away from zero."""
        below = float(scipy.stats.norm.cdf(self.score(margin)))
        above = float(scipy.stats.norm.sf(self.score(-margin)))
        return max(below, above)

    def score(self, difference: float) -> float:
        """How many standard errors the difference found lies above this one, were that true.

        The share of images that are lost is then the likeliest with that difference: Tango's
        equation 2.
        """
        if difference < 0:
            return -PairedAnswers(self.lost, self.gained, self.images).score(-difference)
        images = self.images
        true = difference / 100
        excess = self.gained - self.lost - images * true
        a = 2 * images
        b = (2 * images - self.gained + self.lost) * true - self.gained - self.lost
        c = -self.lost * true * (1 - true)
        share_lost = (math.sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a)
        variance = images * (2 * share_lost + true * (1 - true))
        if variance <= 0:
            return 0.0 if excess == 0 else math.copysign(math.inf, excess)
        return excess / math.sqrt(variance)


# ---- Verdicts


def judge(gains: np.ndarray, settings: Settings, together: int = 1) -> Difference:
    """The difference that is the mean of `gains` [seeds, images], in points.

    Over other seeds, where there are several, and other images.
    """
    return judge_by(over_seeds_and_images(gains), settings, together)


def judge_answers(gains: np.ndarray, settings: Settings, together: int = 1) -> Difference:
    """The difference in percentage points that `gains` [seeds, images] of -1, 0 and 1 are.

    With one seed of these weights on other images, by the tests of `PairedAnswers`; with several,
    of other seeds on these images, by a t test.
    """
    return judge_by(test_of_answers(gains), settings, together)


def test_of_answers(gains: np.ndarray) -> Test:
    """The test of the difference that `gains` [seeds, images] of -1, 0 and 1 are."""
    if len(gains) == 1:
        return PairedAnswers(*count_gained_and_lost(gains[0]), gains.shape[1])
    return over_seeds(100 * gains)


def over_seeds(gains: np.ndarray) -> TTest:
    """The t test over seeds of answers, `gains` [seeds, images] in points."""
    least = mean_squares(gains).error_of_rest()
    return t_test(gains.mean(1), 100 / gains.shape[1], least)


def judge_by(test: Test, settings: Settings, together: int = 1) -> Difference:
    """What a test says of its difference.

    Of differences that are read `together`, so many, intervals are so wide that all of them hold
    at once as often as one else does (Bonferroni). None is wider than from -100 to 100 points.
    """
    p = test.p()
    margin_p = test.margin_p(settings.margin)
    level = settings.level / together
    margin_interval = clipped(test.interval(1 - 2 * level), -100, 100)
    difference = Difference(
        interval=clipped(test.interval(1 - level), -100, 100),
        p=p,
        p_holm=p,
        margin_p=margin_p,
        margin_p_holm=margin_p,
        margin_interval=margin_interval,
        smallest_margin=max(abs(margin_interval.low), abs(margin_interval.high)),
    )
    return decide(difference, settings.level)


def decide(difference: Difference, level: float) -> Difference:
    """The difference with its verdict."""
    is_within_margin = difference.margin_p_holm < level
    verdict = Verdict.EQUIVALENT if is_within_margin else Verdict.UNDECIDED
    if difference.p_holm < level:
        verdict = Verdict.BETTER if difference.interval.value > 0 else Verdict.WORSE
    return dataclasses.replace(difference, verdict=verdict, is_within_margin=is_within_margin)


def count_gained_and_lost(gains: np.ndarray) -> tuple[int, int]:
    """How many of `gains` [images] are above 0, and how many below."""
    return int((gains > 0).sum()), int((gains < 0).sum())


def correct_differences(differences: Sequence[Difference], level: float) -> tuple[Difference, ...]:
    """The differences with p corrected over them by Holm's method, and the verdicts that follow."""
    p_holm = holm([difference.p for difference in differences])
    margin_p_holm = holm([difference.margin_p for difference in differences])
    corrected = []
    for difference, p, margin_p in zip(differences, p_holm, margin_p_holm, strict=True):
        replaced = dataclasses.replace(difference, p_holm=p, margin_p_holm=margin_p)
        corrected.append(decide(replaced, level))
    return tuple(corrected)


def smallest_margins(tests: Sequence[Test], level: float) -> list[float]:
    """The smallest margin within which each would be called equivalent, in points, 100 at most.

    p corrected over the tests by Holm's method, as the verdicts' are. One interval of each, so wide
    that all hold at once, may reach beyond a margin within which that method shows all of them.
    """

    def is_equivalent(margin: float) -> np.ndarray:
        return np.array(holm([test.margin_p(margin) for test in tests])) < level

    low = np.zeros(len(tests))
    high = np.full(len(tests), 100.0)
    for _ in range(24):  # halved to a hundred-thousandth of a point
        middle = (low + high) / 2
        is_enough = np.array([is_equivalent(middle[k])[k] for k in range(len(tests))])
        high = np.where(is_enough, middle, high)
        low = np.where(is_enough, low, middle)
    return high.tolist()


def correct_by_key(differences: Mapping[Key, Difference], level: float) -> dict[Key, Difference]:
    """The same for differences that are known by a key each."""
    corrected = correct_differences(list(differences.values()), level)
    return dict(zip(differences, corrected, strict=True))


def holm(ps: Sequence[float]) -> list[float]:
    """`ps` corrected by Holm's method (1979): the smallest times their number, the next one less.

    statsmodels, which has this too, collects garbage at each call: a quarter of a second.
    """
    corrected = [0.0] * len(ps)
    largest = 0.0  # none may fall below one that was smaller
    for smaller, k in enumerate(np.argsort(ps, kind="stable")):
        largest = max(largest, (len(ps) - smaller) * float(ps[k]))
        corrected[k] = min(1.0, largest)
    return corrected


# ---- Shares of images


def share_interval(counts: np.ndarray, images: int, settings: Settings) -> Interval:
    """The share of `images` in percent that `counts` [seeds] are, as a mean over seeds."""
    if len(counts) == 1:
        return wilson_interval(counts[0], images, settings.level)
    interval = t_test(100 * counts / images, 100 / images).interval(1 - settings.level)
    return clipped(interval, 0, 100)


def wilson_interval(count: float, of: int, level: float) -> Interval:
    """The share of `of` in percent that `count` is, with the score interval of Wilson (1927)."""
    from statsmodels.stats.proportion import proportion_confint

    low, high = proportion_confint(count, of, alpha=level, method="wilson")
    return Interval(100 * float(count) / max(1, of), 100 * float(low), 100 * float(high))


def clipped(interval: Interval, low: float, high: float) -> Interval:
    """The interval without what can't be."""
    return Interval(
        interval.value,
        min(max(interval.low, low), interval.value),
        max(min(interval.high, high), interval.value),
    )
