"""Numbers of any kind: their intervals and changes, simulated over seeds and images."""

import numpy as np
import pytest
import scipy.stats
from helpers import bounds

from lab.measure import estimates, statistics

RULES = statistics.Settings(score_resamples=400)


def test_a_mean_over_images_has_the_normal_interval():
    rng = np.random.default_rng(0)
    values = rng.normal(5, 2, 400)
    rules = statistics.Settings(score_resamples=4000)
    half = 1.96 * values.std() / 20
    expected = (values.mean() - half, values.mean() + half)
    for found in (
        estimates.estimate(np.mean, [(values,)], rules, 42),
        estimates.estimate_mean([values], rules),
    ):
        assert found.interval.value == pytest.approx(values.mean())
        assert bounds(found.interval) == pytest.approx(expected, abs=0.02)


def test_seeds_and_images_are_both_in_the_interval():
    """Seeds that differ on every image alike, and images that differ for every seed alike."""
    rng = np.random.default_rng(0)
    values = rng.normal(5, 2, 400)
    rules = statistics.Settings(score_resamples=4000)
    of_seeds = [values + k for k in (0, 1, 3)]
    found = estimates.estimate_mean(of_seeds, rules)
    means = values.mean() + np.array([0, 1, 3])
    np.testing.assert_allclose(found.by_seed, means)
    low, high = scipy.stats.ttest_1samp(means, 0).confidence_interval()
    half = np.hypot((high - low) / 2, 1.96 * values.std() / 20)
    expected = (means.mean() - half, means.mean() + half)
    assert bounds(found.interval) == pytest.approx(expected, abs=0.02)


def test_the_mean_of_a_seeds_own_images_is_in_the_spread_of_seeds_alone():
    """Images that each seed sees by itself are no error that all seeds share."""
    rng = np.random.default_rng(0)
    of_seeds = list(rng.normal(0, 1, (6, 2000)))
    certainty = estimates.certainty_of(estimates.estimate_mean(of_seeds, RULES))
    assert certainty.error_of_images < 0.4 / np.sqrt(6 * 2000)


@pytest.mark.parametrize("seeds", [1, 2, 3, 5, 10])
def test_changes_are_covered_as_often_as_they_should_be(seeds):
    """300 experiments with seeds and images that differ, of a mean and of a statistic."""
    rng = np.random.default_rng(seeds)
    rules = statistics.Settings(score_resamples=200)
    covered = 0
    for _ in range(300):
        difficulty = rng.normal(0, 1, 300)
        preference = rng.normal(0, 1, (2, 1, 300))
        luck = rng.normal(0, 0.05, (2, seeds, 1)) if seeds > 1 else 0
        answers = difficulty + preference + luck + rng.normal(0, 1, (2, seeds, 300))
        first, other = (estimates.estimate_mean(one, rules) for one in answers)
        interval = estimates.change_of(other, first).interval(0.95)
        covered += interval.low <= 0 <= interval.high
    assert 0.91 <= covered / 300 <= 0.985, covered


def test_the_same_images_are_drawn_for_every_network():
    """A network that is the other one and a little better is found so, however noisy both are."""
    rng = np.random.default_rng(0)
    first = rng.normal(50, 30, 1000)
    other = first + 1
    for estimated in (
        lambda values: estimates.estimate_mean([values], RULES),
        lambda values: estimates.estimate(np.mean, [(values,)], RULES, 42),
    ):
        change = estimates.change_of(estimated(other), estimated(first))
        assert change.mean == pytest.approx(1) and change.p() < 1e-6


def test_no_wrong_image_is_no_certainty():
    """Of 400 images none survives: Wilson's upper bound is 0.95 %."""
    found = estimates.estimate_mean([np.zeros(400)], RULES, 100, between=estimates.PERCENT)
    assert found.interval.low == 0 and 0.3 < found.interval.high < 1.5


def test_an_interval_holds_its_value():
    """Of an expected calibration error, which is larger where images are drawn again."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(50):
        gaps = rng.normal(0, 0.3, (200, 15))
        found = estimates.estimate_of_means(
            lambda mean: float(np.abs(mean).sum()), [gaps], RULES, 42
        )
        held += found.interval.low < found.interval.value < found.interval.high
    assert held == 50


def test_what_is_measured_once_a_seed_has_the_t_interval():
    values = np.array([0.7, 0.9, 0.8])
    found = estimates.estimate_by_seed(values, RULES)
    expected = scipy.stats.ttest_1samp(values, 0).confidence_interval()
    assert bounds(found.interval) == pytest.approx(tuple(expected))
    one = estimates.estimate_by_seed(values[:1], RULES)
    assert bounds(one.interval) == (0.7, 0.7)


@pytest.mark.parametrize("images", [5, 25, 400])
def test_a_means_change_is_tested_as_scipy_does(images):
    """Of few images too: by their normal error ten told networks apart in 8 %, and where Holm's
    method leaves a fifty-fifth of the level, ten times as often as that."""
    rng = np.random.default_rng(images)
    first, other = rng.normal(0, 1, (2, images))
    rules = statistics.Settings()
    one, another = (estimates.estimate_mean([values], rules) for values in (first, other))
    change = estimates.change_of(another, one)
    test = scipy.stats.ttest_rel(other, first)
    assert change.p() == pytest.approx(test.pvalue)
    found = change.interval(0.95)
    assert (found.low, found.high) == pytest.approx(tuple(test.confidence_interval()))
