"""Doubt: risks, foreign images and sets of classes, counted or against scikit-learn."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import torch

from lab.data import shapes
from lab.measure import calibration, doubt, statistics

RULES = statistics.Settings()


def test_risks_are_counted():
    """By cutting at each coverage, with the confidence of networks that err where they are less
    sure; and the area is the mean of what is found."""
    rng = np.random.default_rng(0)
    confidence = rng.random(400)
    wrong = rng.random(400) > confidence
    found = doubt.risks(confidence, wrong)
    expected = []
    for threshold in sorted(confidence, reverse=True):
        answered = confidence >= threshold
        expected.append(100 * wrong[answered].mean())
    np.testing.assert_allclose(found, expected)
    assert doubt.area_under_risks(confidence, wrong) == pytest.approx(np.mean(expected))
    assert found[-1] == pytest.approx(100 * wrong.mean())
    assert found[-1] > found[100]
    best = doubt.area_under_risks(-wrong.astype(float), wrong)
    chance = doubt.area_under_risks(rng.random(400), wrong)
    assert best < doubt.area_under_risks(confidence, wrong) < chance


def test_foreign_images_are_told_as_scikit_learn_tells_them():
    rng = np.random.default_rng(0)
    familiarity = np.concatenate([rng.normal(1, 1, 500), rng.normal(0, 1, 300)]).round(1)  # ties
    is_own = np.arange(800) < 500
    shuffled = rng.permutation(800)
    familiarity, is_own = familiarity[shuffled], is_own[shuffled]
    expected = 100 * sklearn.metrics.roc_auc_score(is_own, familiarity)
    assert doubt.auroc(familiarity, is_own) == pytest.approx(expected)
    passed, kept, _ = sklearn.metrics.roc_curve(is_own, familiarity, drop_intermediate=False)
    at_least_95 = 100 * passed[kept >= 0.95].min()
    assert doubt.false_positives(familiarity, is_own) == pytest.approx(at_least_95, abs=0.5)


def test_no_images_are_foreign_to_themselves(trained, evaluated):
    _, hardware, data, _ = trained
    runs = evaluated["baseline"]
    found = doubt.study_foreign(runs, data.test.pixels, RULES, 42, hardware)
    for by in (found.by_confidence, found.by_energy, found.by_distance):
        assert by.auroc.by_seed[0] == pytest.approx(50, abs=1e-6)
        assert by.auroc.interval.low < 50 < by.auroc.interval.high
        assert by.false_positives.by_seed[0] == pytest.approx(95, abs=1)
    others = shapes.draw(400, 77).pixels  # drawn as the test images are
    found = doubt.study_foreign(runs, others, RULES, 42, hardware)
    for by in (found.by_confidence, found.by_energy, found.by_distance):
        assert by.auroc.by_seed[0] == pytest.approx(50, abs=5)


def test_noise_is_foreign(stressed):
    """By the distance from what was learnt; of some networks' confidence that can't be said: one
    that was trained in bfloat16 was surer of noise than of shapes."""
    for one in stressed.values():
        assert set(one.doubt.foreign) == {"noise"}
        found = one.doubt.foreign["noise"]
        assert found.by_distance.auroc.by_seed[0] > 98
        assert found.by_distance.auroc.interval.low > 97
        assert found.by_distance.false_positives.by_seed[0] < 10


def test_sets_of_classes_hold_the_true_one_as_often_as_they_should():
    """On images from the validation's source, in 200 experiments: 90 %, whatever the network."""
    generator = torch.Generator().manual_seed(0)
    held = []
    for _ in range(200):
        logits = 2 * torch.randn(600, 10, generator=generator)
        labels = torch.randint(0, 10, (600,), generator=generator)
        logits[torch.arange(600), labels] += 2 * torch.rand(600, generator=generator)
        least = doubt.least_probability(logits[:300], labels[:300], 0.1)
        inside, sizes = doubt.prediction_sets(logits[300:], labels[300:], least)
        held.append(inside.mean())
        assert sizes.min() >= 0 and sizes.max() <= 10
    error = np.std(held) / np.sqrt(200)
    assert 90 - 3 * error <= np.mean(held) <= 90 + 100 / 301 + 3 * error
    assert doubt.least_probability(logits[:5], labels[:5], 0.1) == 0  # too few to leave any out


def test_coverage_on_test_images_is_within_its_interval(trained, stressed):
    """Which validation images a network has is chance too: the coverage's law is beta-binomial."""
    _, _, data, _ = trained
    held_out = len(data.splits[42].validation)
    rank = math.ceil(0.9 * (held_out + 1))
    for one in stressed.values():
        conformal = one.doubt.conformal
        low, high = scipy.stats.betabinom.interval(0.999, 400, rank, held_out + 1 - rank)
        assert low <= conformal.coverage.by_seed[0] * 4 <= high
        assert 0.5 < conformal.size.by_seed[0] < 10


def test_corrupted_images_are_counted_by_severity(stressed):
    for one in stressed.values():
        shift = one.doubt.shift
        for field in dataclasses.fields(shift):
            for found in getattr(shift, field.name):
                assert found.interval.low < found.by_seed[0] < found.interval.high
        first, *_, last = shift.set_coverage
        assert last.interval.high < first.interval.low
        first, *_, last = shift.likelihood_as_trained
        assert last.interval.low > first.interval.high


def test_calibration_under_shift_is_that_of_all_corruptions_together():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 5, 40, 10, generator=generator)
    labels = torch.arange(40) % 10
    found = doubt.study_shift(logits, labels, [2.0, 0.5], [0.05, 0.2], 15, RULES, 42)
    for seed, temperature, least in ((0, 2.0, 0.05), (1, 0.5, 0.2)):
        together = torch.cat([logits[seed, k, 3] for k in range(3)])
        truth = torch.cat([labels] * 3)
        expected = calibration.calibrate(together / temperature, truth, 15)
        assert found.error_scaled[3].by_seed[seed] == pytest.approx(expected.error)
        assert found.likelihood_scaled[3].by_seed[seed] == pytest.approx(
            expected.negative_log_likelihood
        )
        chance = together.softmax(1)
        inside = chance[torch.arange(120), truth] >= least
        assert found.set_coverage[3].by_seed[seed] == pytest.approx(
            100 * inside.double().mean().item()
        )
        sizes = (chance >= least).sum(1).double()
        assert found.set_size[3].by_seed[seed] == pytest.approx(sizes.mean().item())


def test_norm_is_taken_out():
    logits = torch.randn(50, 10, generator=torch.Generator().manual_seed(0))
    once = doubt.confidence_without_norm(logits)
    np.testing.assert_allclose(once, doubt.confidence_without_norm(7 * logits + 3), rtol=1e-4)
    assert once.min() > 0 and once.max() <= 1


def test_seeds_that_agree_leave_an_interval_of_a_rounded_image():
    """The step of each number is its own: one class of 400 for the size of a set, not 100."""
    outputs = torch.randn(400, 10, generator=torch.Generator().manual_seed(0))
    labels = outputs.argmax(1)
    run = SimpleNamespace(logits=outputs)
    found = doubt.study_conformal([run, run], [0.2, 0.2], labels, RULES, 42)
    for score, of_one_image in ((found.size, 1), (found.coverage, 100)):
        half = (score.interval.high - score.interval.low) / 2
        error = of_one_image / 400 / np.sqrt(12) / np.sqrt(2)
        assert half == pytest.approx(scipy.stats.t.ppf(0.975, 1) * error)


@pytest.mark.parametrize("images", [30, 50, 100, 250])
def test_risks_are_drawn_where_they_are_measured(images):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(images, 10, generator=generator)
    correct = (torch.rand(images, generator=generator) < 0.7).numpy()
    runs = [SimpleNamespace(logits=logits, correct=correct)]
    rules = statistics.Settings(score_resamples=10)
    found = doubt.study_selection(runs, runs, doubt.confidence_as_trained, rules, 42)
    every = doubt.risks(doubt.confidence_as_trained(logits), ~correct)
    for coverage, risk in zip(found.coverage, found.risk[0], strict=True):
        answered = round(coverage * images / 100)
        assert 1 <= answered <= images and risk == every[answered - 1]
    assert found.coverage[-1] == 100 and found.change is None


@pytest.mark.parametrize("own", [1, 2, 5])
def test_few_own_images_among_many_foreign_ones_leave_an_interval(own):
    """Drawn again from one pool, some resamples would hold none of the own images."""
    rng = np.random.default_rng(0)
    familiarity = np.concatenate([rng.normal(1, 1, own), rng.normal(0, 1, 100)])
    is_own = np.arange(100 + own) < own
    found = doubt.detect([(familiarity, is_own)], statistics.Settings(), 42)
    for estimate in (found.auroc, found.false_positives):
        interval = estimate.interval
        assert 0 <= interval.low <= estimate.by_seed[0] <= interval.high <= 100


@pytest.mark.slow
def test_intervals_of_few_own_images_cover_the_true_auroc():
    """150 experiments: 20 own images against 100 foreign ones, a normal and one a deviation up."""
    rng = np.random.default_rng(0)
    true = 100 * scipy.stats.norm.cdf(1 / np.sqrt(2))
    covered = 0
    rules = statistics.Settings(score_resamples=100)
    for _ in range(150):
        familiarity = np.concatenate([rng.normal(1, 1, 20), rng.normal(0, 1, 100)])
        found = doubt.detect([(familiarity, np.arange(120) < 20)], rules, 42)
        covered += found.auroc.interval.low <= true <= found.auroc.interval.high
    assert 0.88 < covered / 150 < 0.99, covered
