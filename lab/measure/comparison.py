"""Networks compared with the first one: on all test images, and class by class.

In come evaluations, or plain arrays of right and wrong; out come differences with their tests, what
each seed tells, what several tell together, and accuracies with intervals.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy

from lab.measure import planning, statistics
from lab.measure.evaluation import ByNetwork, correct_by_seed, networks_of
from lab.measure.models import Network
from lab.measure.planning import Planning
from lab.measure.statistics import Difference, Interval, PairedAnswers, Settings, Test


@dataclass(frozen=True)
class SeedTest:
    """Two networks of one seed on the same images."""

    only_this_correct: int
    only_first_correct: int
    p: float  # exact McNemar test
    p_holm: float
    interval: Interval  # of the difference in points, by Tango's score test: of other images


@dataclass(frozen=True)
class Spread:
    """Where the spread of a difference comes from, in points: an analysis of variance.

    The standard deviation from seed to seed on these test images is that of the networks' quality
    on any images, and that of these images being few (Jordan, arXiv 2304.01910): of their
    variances it is the sum, unless that of quality would be negative and is taken for 0. The
    standard errors are the mean difference's, for other seeds, other images, or both.
    """

    standard_deviation: float
    of_quality: Interval
    of_few_images: float
    error_of_seeds: float
    error_of_images: float
    error_of_both: float


@dataclass(frozen=True)
class Posterior:
    """How likely the true difference over seeds is smaller than a bound, after what was seen.

    With a flat prior of mean and log deviation: the Bayesian t test (Benavoli et al., JMLR 2017).
    """

    bound: float  # points
    probability: float


@dataclass(frozen=True)
class SeveralSeeds:
    """What more than one seed tells."""

    spread: Spread
    planning: Planning
    interval_over_seeds_and_images: Interval
    outperforming: Interval  # percent of seeds in which this network is better than the first
    effect_size: float  # the mean difference in standard deviations from seed to seed
    posteriors: tuple[Posterior, ...]


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
    interval, of other seeds' weights on these images.
    """
    overall = statistics.share_interval(correct.sum(1), len(labels), settings)
    by_class = []
    for label in range(classes):
        of_class = correct[:, labels == label]
        by_class.append(statistics.share_interval(of_class.sum(1), of_class.shape[1], settings))
    return AccuracyIntervals(overall, tuple(by_class))


def compare_with_first(
    by_network: ByNetwork, labels: np.ndarray, classes: int, settings: Settings
) -> tuple[Comparison, ...]:
    """Each network but the first, compared with the first.

    Of three networks or more, p is corrected over the comparisons; on classes always, over all
    classes of all comparisons. Their intervals hold together.
    """
    first, *others = networks_of(by_network)
    first_correct = correct_by_seed(by_network[first.key])
    gains = []
    by_class = []
    for network in others:
        gained = correct_by_seed(by_network[network.key]).astype(int) - first_correct.astype(int)
        gains.append(gained)
        for label in range(classes):
            of_class = gained[:, labels == label]
            by_class.append(compare_group(of_class, settings, classes * len(others)))
    overall = compare_together(gains, settings)
    by_class = correct_by_holm(by_class, settings.level)
    comparisons = []
    for k, network in enumerate(others):
        of_network = by_class[k * classes : (k + 1) * classes]
        comparisons.append(Comparison(network, first, overall[k], tuple(of_network)))
    return tuple(comparisons)


def compare_together(gains: Sequence[np.ndarray], settings: Settings) -> list[GroupComparison]:
    """Several networks' comparisons on the same images, each from [seeds, images] of -1, 0 and 1.

    p and the smallest margins are corrected over them, and their intervals hold together.
    """
    groups = [compare_group(of_network, settings, len(gains)) for of_network in gains]
    groups = correct_by_holm(groups, settings.level)
    if len(gains) < 2:
        return groups
    tests = [statistics.test_of_answers(of_network) for of_network in gains]
    return with_margins(groups, tests, settings.level)


def with_margins(
    groups: Sequence[GroupComparison], tests: Sequence[Test], level: float
) -> list[GroupComparison]:
    """The groups with the smallest margins that the correction over them leaves."""
    corrected = []
    for group, margin in zip(groups, statistics.smallest_margins(tests, level), strict=True):
        difference = dataclasses.replace(group.difference, smallest_margin=margin)
        corrected.append(dataclasses.replace(group, difference=difference))
    return corrected


def compare(
    gains: np.ndarray, labels: np.ndarray, classes: int, settings: Settings
) -> tuple[GroupComparison, tuple[GroupComparison, ...]]:
    """On all images, and class by class with p corrected over the classes.

    `gains` [seeds, images] are 1 where only this network is right, -1 where only the first is, and
    else 0; `labels` int64 [images].
    """
    overall = compare_group(gains, settings)
    by_class = []
    for label in range(classes):
        by_class.append(compare_group(gains[:, labels == label], settings, classes))
    return overall, tuple(correct_by_holm(by_class, settings.level))


def compare_group(gains: np.ndarray, settings: Settings, together: int = 1) -> GroupComparison:
    """The comparison on some images, from `gains` [seeds, images] of -1, 0 and 1.

    Intervals of the difference are for so many that are read `together`.
    """
    tests = tuple(compare_one_seed(row, settings) for row in gains)
    difference = statistics.judge_answers(gains, settings, together)
    if len(gains) == 1:
        return GroupComparison(difference, tests, None)
    return GroupComparison(difference, tests, compare_seeds(gains, settings))


def compare_one_seed(gains: np.ndarray, settings: Settings) -> SeedTest:
    """McNemar's test and Tango's interval on `gains` [images] of -1, 0 and 1."""
    gained, lost = statistics.count_gained_and_lost(gains)
    answers = PairedAnswers(gained, lost, len(gains))
    p = answers.p()
    return SeedTest(gained, lost, p, p, answers.interval(1 - settings.level))


def compare_seeds(gains: np.ndarray, settings: Settings) -> SeveralSeeds:
    """What several seeds tell: of `gains` [seeds, images] of -1, 0 and 1."""
    seeds = len(gains)
    test = statistics.over_seeds(100 * gains)
    both = statistics.over_seeds_and_images(100 * gains)
    least = test.least_error * math.sqrt(seeds)
    deviation = max(test.standard_deviation, least)
    posteriors = []
    for bound in (settings.margin, settings.margin / 2, settings.margin / 5):
        posteriors.append(Posterior(bound, probability_within(bound, test)))
    return SeveralSeeds(
        spread=analyse_spread(100 * gains, settings.level),
        planning=planning.plan(deviation, seeds, settings, seeds, least),
        interval_over_seeds_and_images=statistics.clipped(
            both.interval(1 - settings.level), -100, 100
        ),
        outperforming=share_of_better_seeds(gains.sum(1), settings.level),
        effect_size=test.mean / deviation,
        posteriors=tuple(posteriors),
    )


def probability_within(bound: float, test: statistics.TTest) -> float:
    """That the true difference over seeds is smaller than `bound`, to either side."""
    error = max(test.standard_error, test.least_error)
    above = scipy.stats.t.cdf((bound - test.mean) / error, test.degrees)
    below = scipy.stats.t.cdf((-bound - test.mean) / error, test.degrees)
    return float(above - below)


def analyse_spread(gains: np.ndarray, level: float) -> Spread:
    """An analysis of variance of `gains` [seeds, images]: both are random, without replication."""
    squares = statistics.mean_squares(gains)
    seeds = squares.seeds
    images = squares.images
    of_quality = max(0.0, squares.of_seeds - squares.of_rest) / images
    of_images = max(0.0, squares.of_images - squares.of_rest) / seeds
    of_both = of_quality / seeds + of_images / images + squares.of_rest / seeds / images
    return Spread(
        standard_deviation=math.sqrt(squares.of_seeds / images),
        of_quality=Interval(math.sqrt(of_quality), *bounds_of_quality(squares, level)),
        of_few_images=math.sqrt(squares.of_rest / images),
        error_of_seeds=squares.error_of_seeds(),
        error_of_images=math.sqrt(squares.of_images / seeds / images),
        error_of_both=math.sqrt(of_both),
    )


def bounds_of_quality(squares: statistics.MeanSquares, level: float) -> tuple[float, float]:
    """Of the standard deviation of quality: from the F distribution of the mean squares' ratio."""
    degrees = squares.seeds - 1
    degrees_of_rest = max(1, degrees * (squares.images - 1))
    bounds = []
    for tail in (1 - level / 2, level / 2):
        ratio = scipy.stats.f.ppf(tail, degrees, degrees_of_rest)
        variance = (squares.of_seeds / ratio - squares.of_rest) / squares.images
        bounds.append(math.sqrt(max(0.0, variance)))
    low, high = bounds
    return low, high


def share_of_better_seeds(gains: np.ndarray, level: float) -> Interval:
    """In percent, of `gains` [seeds], with Wilson's interval; equal ones count half.

    The probability of outperforming (Bouthillier et al., MLSys 2021).
    """
    better = float((gains > 0).sum() + (gains == 0).sum() / 2)
    return statistics.wilson_interval(better, len(gains), level)


def correct_by_holm(groups: Sequence[GroupComparison], level: float) -> list[GroupComparison]:
    """The groups with p corrected over the groups, and the verdicts that follow."""
    if not groups:
        return []
    differences = statistics.correct_differences([group.difference for group in groups], level)
    seeds = len(groups[0].by_seed)
    by_seed = []  # [seeds, groups]
    for s in range(seeds):
        by_seed.append(statistics.holm([group.by_seed[s].p for group in groups]))
    result = []
    for k, group in enumerate(groups):
        tests = []
        for s, test in enumerate(group.by_seed):
            tests.append(dataclasses.replace(test, p_holm=by_seed[s][k]))
        result.append(dataclasses.replace(group, difference=differences[k], by_seed=tuple(tests)))
    return result
