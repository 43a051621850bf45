"""Doubt: risks, foreign images and sets of classes, counted or against scikit-learn."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import torch

from lab.data import shapes
from lab.machine.pieces import Pieces
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
    found = doubt.study_foreign(runs, data.test.pixels, RULES, 42, hardware, Pieces())
    for by in (found.by_confidence, found.by_energy, found.by_distance):
        assert by.auroc.by_seed[0] == pytest.approx(50, abs=1e-6)
        assert by.auroc.interval.low < 50 < by.auroc.interval.high
        assert by.false_positives.by_seed[0] == pytest.approx(95, abs=1)
    others = shapes.draw(400, 77).pixels  # drawn as the test images are
    found = doubt.study_foreign(runs, others, RULES, 42, hardware, Pieces())
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
        inside = logits[300:].softmax(1).double() >= least
        held.append(100 * inside[torch.arange(300), labels[300:]].double().mean().item())
    error = np.std(held) / np.sqrt(200)
    assert 90 - 3 * error <= np.mean(held) <= 90 + 100 / 301 + 3 * error
    assert doubt.least_probability(logits[:5], labels[:5], 0.1) == 0  # too few to leave any out


def test_coverage_on_test_images_is_within_its_interval(trained, stressed):
    """Which validation images a network has is chance too: the coverage's law is beta-binomial."""
    _, _, data, _ = trained
    held_out = len(data.splits[42].validation)
    for one in stressed.values():
        assert [sets.miss for sets in one.doubt.conformal] == [0.05, 0.01]
        for sets in one.doubt.conformal:
            rank = math.ceil((1 - sets.miss) * (held_out + 1))
            low, high = scipy.stats.betabinom.interval(0.999, 400, rank, held_out + 1 - rank)
            assert low <= sets.coverage.mean() * 4 <= high
            assert 0.5 < sets.size.mean() < 10
            assert sets.size.mean() + sets.empty.mean() / 100 >= 1


def test_corrupted_images_are_counted_by_severity(stressed):
    for one in stressed.values():
        shift = one.doubt.shift
        for by_severity in (
            shift.error_as_trained, shift.error_scaled,
            shift.likelihood_as_trained, shift.likelihood_scaled,
        ):  # fmt: skip
            for found in by_severity:
                assert found.interval.low < found.by_seed[0] < found.interval.high
        first, *_, last = (sets[0].coverage for sets in shift.sets)
        assert last.interval.high < first.interval.low
        first, *_, last = shift.likelihood_as_trained
        assert last.interval.low > first.interval.high


def test_calibration_under_shift_is_the_mean_over_corruptions():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 5, 40, 10, generator=generator)
    labels = torch.arange(40) % 10
    settings = doubt.Settings(conformal_misses=(0.1,))
    limits = [[0.05], [0.2]]
    found = doubt.study_shift(logits, labels, [2.0, 0.5], limits, settings, RULES, 42)
    for seed, temperature, least in ((0, 2.0, 0.05), (1, 0.5, 0.2)):
        of_seed = logits[seed, :, 3].double()
        each = []
        for one in of_seed:
            scores = calibration.score([one / temperature], labels, 15, RULES, 42)
            each.append((scores.error.mean(), scores.negative_log_likelihood.mean()))
        error, likelihood = np.mean(each, axis=0)
        assert found.error_scaled[3].by_seed[seed] == pytest.approx(error)
        assert found.likelihood_scaled[3].by_seed[seed] == pytest.approx(likelihood)
        inside = of_seed.softmax(2) >= least
        (sets,) = found.sets[3]
        held = inside[:, torch.arange(40), labels].double().mean().item()
        assert sets.coverage.by_seed[seed] == pytest.approx(100 * held)
        assert sets.size.by_seed[seed] == pytest.approx(inside.sum(2).double().mean().item())
        empty = (~inside.any(2)).double().mean().item()
        assert sets.empty.by_seed[seed] == pytest.approx(100 * empty)


def test_calibration_errors_of_opposite_sign_do_not_cancel():
    """Under one corruption 70 % sure and always right, under another always wrong."""
    labels = torch.zeros(20, dtype=torch.long)
    right = torch.tensor([0.7, 0.3]).log().expand(20, -1)
    wrong = torch.tensor([0.3, 0.7]).log().expand(20, -1)
    found = doubt.error_of_each([torch.stack([right, wrong])], labels, 15, RULES, 42)
    assert found.mean() == pytest.approx(100 * (0.3 + 0.7) / 2)


def test_norm_is_taken_out():
    logits = torch.randn(50, 10, generator=torch.Generator().manual_seed(0))
    once = doubt.confidence_without_norm(logits)
    np.testing.assert_allclose(once, doubt.confidence_without_norm(7 * logits + 3), rtol=1e-4)
    assert once.min() > 0 and once.max() <= 1


def test_seeds_that_agree_leave_an_interval_of_a_rounded_image():
    """Coverage is counted in images."""
    outputs = torch.randn(1, 400, 10, generator=torch.Generator().manual_seed(0))
    labels = outputs[0].argmax(1)
    settings = doubt.Settings(conformal_misses=(0.1,))
    (found,) = doubt.study_sets([outputs] * 2, [[0.2]] * 2, labels, settings, RULES)
    assert found.coverage.least_deviation == pytest.approx(100 / 400 / np.sqrt(12))
    assert found.coverage.interval.low < found.coverage.interval.value


@pytest.mark.parametrize("images", [30, 50, 100, 250])
def test_risks_are_drawn_where_they_are_measured(images):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(images, 10, generator=generator)
    correct = (torch.rand(images, generator=generator) < 0.7).numpy()
    runs = [SimpleNamespace(logits=logits, correct=correct)]
    rules = statistics.Settings(score_resamples=10)
    found = doubt.study_selection(runs, doubt.confidence_as_trained, rules, 42)
    every = doubt.risks(doubt.confidence_as_trained(logits), ~correct)
    for coverage, risk in zip(found.coverage, found.risk[0], strict=True):
        answered = round(coverage * images / 100)
        assert 1 <= answered <= images and risk == every[answered - 1]
    assert found.coverage[-1] == 100


def test_images_of_the_same_confidence_may_come_in_any_order():
    """Which image comes first in the test set is no knowledge."""
    confidence = np.repeat([0.9, 0.5], 10)
    wrong = np.zeros(20, bool)
    wrong[[0, 1, 10]] = True
    found = doubt.risks(confidence, wrong)
    assert found[:10] == pytest.approx(np.full(10, 20.0))
    shuffled = np.r_[np.roll(np.arange(10), 3), 10 + np.roll(np.arange(10), 5)]
    np.testing.assert_allclose(doubt.risks(confidence, wrong[shuffled]), found)


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
