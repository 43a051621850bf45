"""Differences and how sure they are: intervals, tests, and a verdict by rule.

In come arrays of right and wrong, or of any number by seed and image. Out come intervals, p-values
with Holm's correction, verdicts, and what a number of seeds can show.
"""

from __future__ import annotations

import bisect
import dataclasses
import enum
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import scipy

from lab.machine.options import Between
from lab.measure.evaluation import ByNetwork, correct_by_seed, networks_of
from lab.measure.models import Network


@dataclass(frozen=True)
class Settings:
    """When a difference counts."""

    margin: Annotated[float, Between(0, 100)] = 0.5
    """differences up to this, in percentage points, do not matter in practice"""
    level: Annotated[float, Between(1e-6, 0.5)] = 0.05
    """something is said of a difference where its p is below this; intervals cover the rest"""
    power: Annotated[float, Between(0.06, 0.999)] = 0.8
    """chance with which a difference is to be found, or its absence shown"""
    resamples: Annotated[int, Between(10, 1e5)] = 10000
    """bootstrap resamples behind an interval"""
    score_resamples: Annotated[int, Between(10, 1e5)] = 300
    """bootstrap resamples behind an interval in the stress tests"""


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
    margin_interval: Interval  # within the margin where `margin_p` is below the level
    verdict: Verdict = Verdict.UNDECIDED
    is_within_margin: bool = False


@dataclass(frozen=True)
class SeedTest:
    """Two networks of one seed on the same images."""

    only_this_correct: int
    only_first_correct: int
    p: float  # exact McNemar test
    p_holm: float
    interval: Interval  # of the difference in points: paired bootstrap over images


@dataclass(frozen=True)
class Spread:
    """Where the spread of a difference comes from, in points: an analysis of variance.

    The standard deviation from seed to seed on these test images is that of the networks' quality
    on any images, and that of these images being few (Jordan, arXiv 2304.01910). The standard
    errors are the mean difference's, for other seeds, other images, or both.
    """

    standard_deviation: float
    of_quality: float
    of_few_images: float
    error_of_seeds: float
    error_of_images: float
    error_of_both: float


@dataclass(frozen=True)
class Planning:
    """What a number of seeds can show at this spread, in points."""

    deviation: float  # from seed to seed
    detectable_difference: float
    provable_margin: float  # within which networks that are the same would be found equivalent
    deciding_seeds: int | None  # that detect the margin, and prove it; None: more than can be


@dataclass(frozen=True)
class SeveralSeeds:
    """What more than one seed tells."""

    spread: Spread
    planning: Planning
    interval_over_seeds_and_images: Interval
    outperforming: Interval  # percent of seeds in which this network is better than the first


@dataclass(frozen=True)
class GroupComparison:
    """The difference in accuracy on a group of images."""

    difference: Difference
    by_seed: tuple[SeedTest, ...]
    over_seeds: SeveralSeeds | None  # None with one seed


@dataclass(frozen=True)
class Comparison:
    """A network compared with the first one, on all test images and class by class."""

    network: Network
    first: Network
    overall: GroupComparison
    by_class: tuple[GroupComparison, ...]


@dataclass(frozen=True)
class AccuracyIntervals:
    """A network's accuracy in percent, overall and by class."""

    overall: Interval
    by_class: tuple[Interval, ...]


def accuracy_intervals(
    correct: np.ndarray, labels: np.ndarray, classes: int, settings: Settings
) -> AccuracyIntervals:
    """From what is right, bool [seeds, images], and the labels int64 [images].

    With one seed Wilson's interval, of these weights on other images. With more, mean and t
    interval, of other seeds' weights.
    """
    overall = share_interval(correct.sum(1), len(labels), settings)
    by_class = []
    for label in range(classes):
        of_class = correct[:, labels == label]
        by_class.append(share_interval(of_class.sum(1), of_class.shape[1], settings))
    return AccuracyIntervals(overall, tuple(by_class))


def share_interval(counts: np.ndarray, images: int, settings: Settings) -> Interval:
    """The share of `images` in percent that `counts` [seeds] are, as a mean over seeds."""
    if len(counts) == 1:
        return wilson_interval(counts[0], images, settings.level)
    interval = t_test(100 * counts / images, 100 / images).interval(1 - settings.level)
    low, high = np.clip([interval.low, interval.high], 0, 100).tolist()
    return Interval(interval.value, low, high)


def wilson_interval(count: float, of: int, level: float) -> Interval:
    """The share of `of` in percent that `count` is, with the score interval of Wilson (1927)."""
    from statsmodels.stats.proportion import proportion_confint

    low, high = proportion_confint(count, of, alpha=level, method="wilson")
    return Interval(100 * float(count) / max(1, of), 100 * float(low), 100 * float(high))


@dataclass(frozen=True)
class TTest:
    """A mean, and the t distribution around it."""

    mean: float
    standard_error: float
    standard_deviation: float  # of the values
    degrees: int

    def interval(self, coverage: float) -> Interval:
        """Around the mean, so wide that it covers the true one so often."""
        half = self.standard_error * float(scipy.stats.t.ppf((1 + coverage) / 2, self.degrees))
        return Interval(self.mean, self.mean - half, self.mean + half)

    def p(self) -> float:
        """p of the null hypothesis that the mean is zero: two-sided."""
        return 2 * float(scipy.stats.t.sf(abs(self.mean) / self.standard_error, self.degrees))

    def margin_p(self, margin: float) -> float:
        """p of the null hypothesis that the mean is `margin` or more away from zero.

        One-sided, on the likelier side.
        """
        distance = margin - abs(self.mean)
        return float(scipy.stats.t.sf(distance / self.standard_error, self.degrees))


def t_test(values: np.ndarray, resolution: float) -> TTest:
    """The t test of the mean of `values` [S].

    `resolution` is the step from one possible value to the next: the share of one image. Values
    that agree within it are not known to be equal: the standard deviation is taken to be at least
    that of rounding to it, resolution / sqrt(12) (JCGM 100:2008, the GUM, F.2.2.1).
    """
    count = len(values)
    deviation = max(float(values.std(ddof=1)), resolution / math.sqrt(12))
    return TTest(float(values.mean()), deviation / math.sqrt(count), deviation, count - 1)


@dataclass(frozen=True)
class Bootstrap:
    """A mean, and means of what was drawn again."""

    mean: float
    drawn: np.ndarray  # float64 [resamples]

    def interval(self, coverage: float) -> Interval:
        """The middle of the drawn means, so much of them."""
        low, high = np.quantile(self.drawn, [(1 - coverage) / 2, (1 + coverage) / 2])
        return Interval(self.mean, float(low), float(high))

    def p(self) -> float:
        """p of the null hypothesis that the mean is zero: two-sided."""
        return min(1.0, 2 * min(self.share_above(0.0), self.share_below(0.0)))

    def margin_p(self, margin: float) -> float:
        """p of the null hypothesis that the mean is `margin` or more away from zero.

        One-sided, on the likelier side.
        """
        return max(self.share_above(margin), self.share_below(-margin))

    def share_above(self, limit: float) -> float:
        """The share of the drawn means; never zero, since a rarer one might have been missed."""
        return float(((self.drawn >= limit).sum() + 1) / (len(self.drawn) + 1))

    def share_below(self, limit: float) -> float:
        """See `share_above`."""
        return float(((self.drawn <= limit).sum() + 1) / (len(self.drawn) + 1))


def bootstrap(gains: np.ndarray, settings: Settings, seed: int) -> Bootstrap:
    """The bootstrap of the mean of `gains` [seeds, images].

    Seeds and images are both drawn again; with one seed, it is the paired bootstrap over images.
    Images of equal columns are drawn together, which leaves the distribution as it is.
    """
    rng = np.random.default_rng(seed)
    seeds = len(gains)
    columns, counts = np.unique(gains, axis=1, return_counts=True)
    images = counts.sum()
    drawn = rng.multinomial(images, counts / images, settings.resamples)  # [resamples, columns]
    means_by_seed = drawn @ columns.T / images  # [resamples, seeds]
    drawn_seeds = rng.multinomial(seeds, np.full(seeds, 1 / seeds), settings.resamples)
    means = (means_by_seed * (drawn_seeds / seeds)).sum(1)
    return Bootstrap(float(gains.mean()), means)


def judge(gains: np.ndarray, resolution: float, settings: Settings, seed: int) -> Difference:
    """The difference that is the mean of `gains` [seeds, images], in points.

    By the t test over seeds, of one seed by the paired bootstrap over images. `resolution` is the
    step from one possible mean over images to the next.
    """
    test: TTest | Bootstrap = bootstrap(gains, settings, seed)
    if len(gains) > 1:
        test = t_test(gains.mean(1), resolution)
    p = test.p()
    margin_p = test.margin_p(settings.margin)
    difference = Difference(
        interval=test.interval(1 - settings.level),
        p=p,
        p_holm=p,
        margin_p=margin_p,
        margin_p_holm=margin_p,
        margin_interval=test.interval(1 - 2 * settings.level),
    )
    return decide(difference, settings.level)


def judge_answers(gains: np.ndarray, settings: Settings, seed: int) -> Difference:
    """The difference in percentage points that `gains` [seeds, images] of -1, 0 and 1 are.

    As by `judge`, but that with one seed, p is that of McNemar's exact test.
    """
    difference = judge(100 * gains, 100 / gains.shape[1], settings, seed)
    if len(gains) > 1:
        return difference
    p = mcnemar_p(*count_gained_and_lost(gains[0]))
    return decide(dataclasses.replace(difference, p=p, p_holm=p), settings.level)


def decide(difference: Difference, level: float) -> Difference:
    """The difference with its verdict."""
    is_within_margin = difference.margin_p_holm < level
    verdict = Verdict.EQUIVALENT if is_within_margin else Verdict.UNDECIDED
    if difference.p_holm < level:
        verdict = Verdict.BETTER if difference.interval.value > 0 else Verdict.WORSE
    return dataclasses.replace(difference, verdict=verdict, is_within_margin=is_within_margin)


def compare_with_first(
    by_network: ByNetwork, labels: np.ndarray, classes: int, settings: Settings, seed: int
) -> list[Comparison]:
    """Each network but the first, compared with the first."""
    first, *others = networks_of(by_network)
    first_correct = correct_by_seed(by_network[first.key])
    comparisons = []
    for network in others:
        correct = correct_by_seed(by_network[network.key])
        gains = correct.astype(int) - first_correct.astype(int)
        overall, by_class = compare(gains, labels, classes, settings, seed)
        comparisons.append(Comparison(network, first, overall, by_class))
    return comparisons


def compare(
    gains: np.ndarray, labels: np.ndarray, classes: int, settings: Settings, seed: int
) -> tuple[GroupComparison, tuple[GroupComparison, ...]]:
    """On all images, and class by class with p corrected over the classes.

    `gains` [seeds, images] are 1 where only this network is right, -1 where only the first is, and
    else 0; `labels` int64 [images].
    """
    overall = compare_group(gains, settings, seed)
    by_class = []
    for label in range(classes):
        by_class.append(compare_group(gains[:, labels == label], settings, seed))
    return overall, tuple(correct_by_holm(by_class, settings.level))


def compare_group(gains: np.ndarray, settings: Settings, seed: int) -> GroupComparison:
    """The comparison on some images, from `gains` [seeds, images] of -1, 0 and 1."""
    images = gains.shape[1]
    tests = tuple(compare_one_seed(row, settings, seed) for row in gains)
    difference = judge_answers(gains, settings, seed)
    if len(gains) == 1:
        return GroupComparison(difference, tests, None)
    spread = analyse_spread(100 * gains)
    deviation = t_test(100 * gains.mean(1), 100 / images).standard_deviation
    both = bootstrap(100 * gains, settings, seed)
    over_seeds = SeveralSeeds(
        spread=spread,
        planning=plan(deviation, len(gains), settings),
        interval_over_seeds_and_images=both.interval(1 - settings.level),
        outperforming=share_of_better_seeds(gains.sum(1), settings.level),
    )
    return GroupComparison(difference, tests, over_seeds)


def compare_one_seed(gains: np.ndarray, settings: Settings, seed: int) -> SeedTest:
    """McNemar's test and the paired bootstrap on `gains` [images] of -1, 0 and 1."""
    gained, lost = count_gained_and_lost(gains)
    p = mcnemar_p(gained, lost)
    interval = bootstrap(100 * gains[None], settings, seed).interval(1 - settings.level)
    return SeedTest(gained, lost, p, p, interval)


def count_gained_and_lost(gains: np.ndarray) -> tuple[int, int]:
    """How many of `gains` [images] are above 0, and how many below."""
    return int((gains > 0).sum()), int((gains < 0).sum())


def mcnemar_p(gained: int, lost: int) -> float:
    """p of the null hypothesis that images are gained as often as lost: McNemar's test, exact."""
    from statsmodels.stats.contingency_tables import mcnemar

    if gained + lost == 0:
        return 1.0
    return float(mcnemar([[0, gained], [lost, 0]], exact=True).pvalue)


def analyse_spread(gains: np.ndarray) -> Spread:
    """An analysis of variance of `gains` [seeds, images]: both are random, without replication."""
    seeds, images = gains.shape
    by_seed = gains.mean(1, keepdims=True)
    by_image = gains.mean(0, keepdims=True)
    rest = gains - by_seed - by_image + gains.mean()
    variance_of_rest = (rest**2).sum() / max(1, (seeds - 1) * (images - 1))
    variance_of_seeds = by_seed.var(ddof=1)  # on these images
    variance_of_images = by_image.var(ddof=1) if images > 1 else 0.0  # by these seeds
    of_quality = max(0.0, variance_of_seeds - variance_of_rest / images)
    of_images = max(0.0, variance_of_images - variance_of_rest / seeds)
    of_both = of_quality / seeds + of_images / images + variance_of_rest / seeds / images
    return Spread(
        standard_deviation=math.sqrt(variance_of_seeds),
        of_quality=math.sqrt(of_quality),
        of_few_images=math.sqrt(variance_of_rest / images),
        error_of_seeds=math.sqrt(variance_of_seeds / seeds),
        error_of_images=math.sqrt(variance_of_images / images),
        error_of_both=math.sqrt(of_both),
    )


MOST_SEEDS = 1000  # that are counted, of those that would decide


def plan(deviation: float, seeds: int, settings: Settings) -> Planning:
    """What `seeds` show, whose differences have this standard deviation, with --power."""
    # A difference is found by that half of a two-sided test that looks on its side.
    detectable = detectable_effect(seeds, settings.power, settings.level / 2)
    # Equivalence takes both one-sided tests. If each misses half of what may be missed, both reject
    # often enough; a little more often than that, since they may miss in the same experiment.
    missed = 1 - settings.power
    provable = detectable_effect(seeds, 1 - missed / 2, settings.level)
    return Planning(
        deviation=deviation,
        detectable_difference=detectable * deviation,
        provable_margin=provable * deviation,
        deciding_seeds=count_deciding_seeds(deviation, settings),
    )


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
    if settings.margin == 0:
        return None
    effect = settings.margin / deviation

    def decide_it(seeds: int) -> bool:
        power_to_find = power_of_t_test(effect, seeds, settings.level / 2)
        power_to_exclude = 2 * power_of_t_test(effect, seeds, settings.level) - 1
        return min(power_to_find, power_to_exclude) >= settings.power

    candidates = range(2, MOST_SEEDS + 1)
    fewest = bisect.bisect_left(candidates, True, key=decide_it)
    return candidates[fewest] if fewest < len(candidates) else None


def share_of_better_seeds(gains: np.ndarray, level: float) -> Interval:
    """In percent, of `gains` [seeds], with Wilson's interval; equal ones count half.

    The probability of outperforming (Bouthillier et al., MLSys 2021).
    """
    better = float((gains > 0).sum() + (gains == 0).sum() / 2)
    return wilson_interval(better, len(gains), level)


def correct_differences(differences: Sequence[Difference], level: float) -> tuple[Difference, ...]:
    """The differences with p corrected over them by Holm's method, and the verdicts that follow."""
    p_holm = holm([difference.p for difference in differences], level)
    margin_p_holm = holm([difference.margin_p for difference in differences], level)
    corrected = []
    for difference, p, margin_p in zip(differences, p_holm, margin_p_holm, strict=True):
        replaced = dataclasses.replace(difference, p_holm=p, margin_p_holm=margin_p)
        corrected.append(decide(replaced, level))
    return tuple(corrected)


def correct_by_holm(groups: Sequence[GroupComparison], level: float) -> list[GroupComparison]:
    """The groups with p corrected over the groups, and the verdicts that follow."""
    differences = correct_differences([group.difference for group in groups], level)
    seeds = len(groups[0].by_seed)
    by_seed = []  # [seeds, groups]
    for s in range(seeds):
        by_seed.append(holm([group.by_seed[s].p for group in groups], level))
    result = []
    for k, group in enumerate(groups):
        tests = []
        for s, test in enumerate(group.by_seed):
            tests.append(dataclasses.replace(test, p_holm=by_seed[s][k]))
        result.append(dataclasses.replace(group, difference=differences[k], by_seed=tuple(tests)))
    return result


def holm(ps: Sequence[float], level: float) -> list[float]:
    """`ps` corrected by Holm's method."""
    from statsmodels.stats.multitest import multipletests

    return multipletests(ps, alpha=level, method="holm")[1].tolist()


@dataclass(frozen=True)
class Estimate:
    """A number of each seed, and the interval of its mean: over seeds, of one over images."""

    by_seed: np.ndarray  # float64 [seeds]
    interval: Interval


def estimate(
    statistic: Callable[..., float],
    by_seed: Sequence[Sequence[np.ndarray]],
    settings: Settings,
    seed: int,
    of_one_image: float,
    groups: np.ndarray | None = None,
) -> Estimate:
    """The `statistic` of each seed's arrays, and the interval of its mean.

    A seed's arrays [N, …] are the statistic's arguments, and hold something of the same N images.
    `of_one_image` is what a single image counts in N times it; 0 if that can be any value. Where
    images are of several kinds, `groups` [N] names each one's, and each kind is drawn again apart.
    """
    values = np.array([statistic(*arrays) for arrays in by_seed])
    images = len(by_seed[0][0])
    if len(values) > 1:
        test = t_test(values, of_one_image / images)
        return Estimate(values, test.interval(1 - settings.level))
    (arrays,) = by_seed
    members = [np.arange(images)]
    if groups is not None:
        members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(settings.score_resamples):
        index = np.concatenate([one[rng.integers(0, len(one), len(one))] for one in members])
        drawn.append(statistic(*(array[index] for array in arrays)))
    resampled = Bootstrap(float(values[0]), np.array(drawn))
    return Estimate(values, resampled.interval(1 - settings.level))
