"""Numbers of any kind, of each seed, with the interval of their mean.

In comes what is known of each image, by seed, and how a number is made of it; out come estimates,
whose changes from one network to another can be tested.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lab.measure.statistics import Interval, SeedsAndImages, Settings, clipped

PERCENT = (0.0, 100.0)
ANY = (-math.inf, math.inf)


@dataclass(frozen=True)
class Estimate:
    """A number of each seed, and the interval of its mean: of other seeds, and of other images.

    A plain mean over images has what `of_images` it is the mean of. Any other number has `drawn`:
    itself with the images drawn again, the same ones for every network and seed where the images
    are the same.
    """

    by_seed: np.ndarray  # float64 [seeds]
    interval: Interval
    images: int = 0  # how many are drawn again; 0 where none are
    of_images: np.ndarray | None = None  # float64 [seeds, N]
    drawn: np.ndarray | None = None  # float64 [resamples, seeds]
    least_deviation: float = 0.0  # of seeds, from rounding to an image
    least_error: float = 0.0  # of the images
    between: tuple[float, float] = ANY  # in which the number lies

    def mean(self) -> float:
        return float(self.by_seed.mean())

    def covariance(self) -> np.ndarray:
        """Of the seeds' numbers over other images [seeds, seeds]; 0 where none are drawn again."""
        if self.of_images is not None:
            return np.atleast_2d(np.cov(self.of_images)) / self.of_images.shape[1]
        if self.drawn is not None:
            return np.atleast_2d(np.cov(self.drawn.T))
        return np.zeros((len(self.by_seed), len(self.by_seed)))


def estimate(
    statistic: Callable[..., float],
    by_seed: Sequence[Sequence[np.ndarray]],
    settings: Settings,
    seed: int,
    groups: np.ndarray | None = None,
    between: tuple[float, float] = ANY,
) -> Estimate:
    """The `statistic` of each seed's arrays, and the interval of its mean.

    A seed's arrays [N, …] are the statistic's arguments, and hold something of the same N images.
    Where images are of several kinds, `groups` [N] names each one's, and each kind is drawn again
    apart. No interval reaches beyond what lies `between`.
    """
    images = len(by_seed[0][0])
    members = [np.arange(images)]
    if groups is not None:
        members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(settings.score_resamples):
        index = np.concatenate([one[rng.integers(0, len(one), len(one))] for one in members])
        of_seeds = []
        for arrays in by_seed:
            again = [array[index] for array in arrays]
            of_seeds.append(statistic(*again))
        drawn.append(of_seeds)
    values = np.array([statistic(*arrays) for arrays in by_seed])
    found = Estimate(values, UNKNOWN, images, drawn=np.array(drawn))
    return with_interval(found, settings, between)


def estimate_mean(
    by_seed: Sequence[np.ndarray] | np.ndarray,
    settings: Settings,
    of_one_image: float = 0.0,
    between: tuple[float, float] = ANY,
) -> Estimate:
    """The mean over images, by the formula for a mean's error.

    A seed's array [N] holds something of the same N images. `of_one_image` is what a single image
    counts in N times it; 0 if that can be any value.
    """
    of_images = np.array(by_seed, dtype=float)
    unit = of_one_image / of_images.shape[1]
    found = Estimate(
        by_seed=of_images.mean(1),
        interval=UNKNOWN,
        images=of_images.shape[1],
        of_images=of_images,
        least_deviation=unit / math.sqrt(12),  # see statistics.t_test
        least_error=unit * math.sqrt(2),  # see MeanSquares.error_of_images
    )
    return with_interval(found, settings, between)


def estimate_of_means(
    of_means: Callable[[np.ndarray], float],
    by_seed: Sequence[np.ndarray] | np.ndarray,
    settings: Settings,
    seed: int,
    between: tuple[float, float] = ANY,
) -> Estimate:
    """What `of_means` makes of means over images: as `estimate`, and fast.

    A seed's array [N, …] holds something of the same N images; `of_means` gets the mean [...] of
    that.
    """
    images = len(by_seed[0])
    counts = drawn_counts(images, settings.score_resamples, seed)
    values = []
    drawn = []
    for of_seed in by_seed:
        values.append(of_means(of_seed.mean(0)))
        means = (counts @ of_seed.reshape(images, -1)).reshape(-1, *of_seed.shape[1:]) / images
        drawn.append([of_means(mean) for mean in means])
    found = Estimate(np.array(values), UNKNOWN, images, drawn=np.array(drawn).T)
    return with_interval(found, settings, between)


def estimate_by_seed(values: np.ndarray, settings: Settings) -> Estimate:
    """Of numbers [seeds] that images are not drawn again for: of other seeds alone."""
    return with_interval(Estimate(np.asarray(values, dtype=float), UNKNOWN), settings, ANY)


UNKNOWN = Interval(math.nan, math.nan, math.nan)


def with_interval(estimate: Estimate, settings: Settings, between: tuple[float, float]) -> Estimate:
    """The estimate with its interval."""
    interval = certainty_of(estimate).interval(1 - settings.level)
    return dataclasses.replace(estimate, interval=clipped(interval, *between), between=between)


@functools.lru_cache(maxsize=4)
def drawn_counts(images: int, resamples: int, seed: int) -> np.ndarray:
    """How often each image is drawn, in each of many draws: float64 [resamples, images]."""
    rng = np.random.default_rng(seed)
    counts = [
        np.bincount(rng.integers(0, images, images), minlength=images) for _ in range(resamples)
    ]
    return np.array(counts, dtype=float)


def change_of(estimate: Estimate, first: Estimate) -> SeedsAndImages:
    """From one network's number to another's, of the same seeds and images."""
    change = dataclasses.replace(estimate, by_seed=estimate.by_seed - first.by_seed)
    if estimate.of_images is not None and first.of_images is not None:
        gains = estimate.of_images - first.of_images
        change = dataclasses.replace(change, of_images=gains)
        if change.least_error > 0:  # each image counts tries, as in statistics.mean_squares
            largest = float(np.abs(gains.mean(0)).max())
            least = max(change.least_error, largest * math.sqrt(2) / gains.shape[1])
            change = dataclasses.replace(change, least_error=least)
    if estimate.drawn is not None and first.drawn is not None:
        change = dataclasses.replace(change, drawn=estimate.drawn - first.drawn)
    return certainty_of(change)


def certainty_of(estimate: Estimate) -> SeedsAndImages:
    """From how much its numbers vary from seed to seed, and as images are drawn again.

    What images do to all seeds alike is their error; what they do to each apart is in the spread of
    the seeds already.
    """
    seeds = len(estimate.by_seed)
    covariance = estimate.covariance()
    common = float(covariance[0, 0])
    of_seeds = 0.0
    if seeds > 1:
        common = float((covariance.sum() - covariance.trace()) / (seeds * (seeds - 1)))
        deviation = max(float(estimate.by_seed.std(ddof=1)), estimate.least_deviation)
        of_seeds = deviation / math.sqrt(seeds)
    of_images = math.sqrt(max(0.0, common) + estimate.least_error**2)
    return SeedsAndImages(estimate.mean(), of_seeds, seeds, of_images, estimate.images)
