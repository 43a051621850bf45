"""The statistics against scipy and statsmodels, and the verdict on networks that are the same."""

import dataclasses

import numpy as np
import pytest
import scipy.stats
import torch
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower
from torch import nn

import main

CLASSES = ("a", "b", "c")
BASELINE, SE = main.NETWORKS[:2]


def evaluations(right, labels):
    """Evaluations that are right where `right` [seeds, images] says so, else wrong by one class."""
    called = (labels + (~torch.as_tensor(right)).long()) % len(CLASSES)
    return [
        main.evaluate(None, torch.eye(len(CLASSES))[row], labels, len(CLASSES)) for row in called
    ]


def simulated(rng, seeds, images=300, better=0.0):
    """Two networks' right answers [2, seeds, images]; images differ in difficulty, seeds too."""
    difficulty = rng.normal(1.5, 1.5, images)
    luck = rng.normal(0, 0.3, (2, seeds, 1)) + np.array([0, better])[:, None, None]
    return rng.random((2, seeds, images)) < 1 / (1 + np.exp(-(difficulty + luck)))


def settings_with(seeds=1, **statistics):
    return main.Settings(
        seeds=seeds, statistics=main.StatisticsSettings(**{"resamples": 2000, **statistics})
    )


def compared(first, other, labels, **statistics):
    settings = settings_with(len(first), **statistics)
    return main.compare(
        SE, evaluations(other, labels), evaluations(first, labels), labels, len(CLASSES), settings
    )


def bounds(interval):
    return interval.low, interval.high


@pytest.fixture
def quick_holm(monkeypatch):
    """statsmodels' Holm collects garbage each time, which takes a quarter of a second."""
    monkeypatch.setattr("gc.collect", lambda: 0)


def test_one_seed_agrees_with_the_libraries():
    rng, labels = np.random.default_rng(0), torch.arange(600) % 3
    first, other = simulated(rng, 1, 600, better=0.4)
    found = compared(first, other, labels, resamples=20000)
    groups = [(found.overall, labels >= 0), *((found.by_class[k], labels == k) for k in range(3))]
    for group, members in groups:
        a, b = first[0][members], other[0][members]
        table = [[(a & b).sum(), (a & ~b).sum()], [(~a & b).sum(), (~a & ~b).sum()]]
        assert group.p == pytest.approx(mcnemar(table, exact=True).pvalue)
        discordant = int(table[0][1] + table[1][0])
        assert group.p == pytest.approx(scipy.stats.binomtest(int(table[0][1]), discordant).pvalue)
        assert group.difference.value == pytest.approx(100 * (b.mean() - a.mean()))
        (test,) = group.by_seed
        assert (test.only_this_correct, test.only_first_correct) == (table[1][0], table[0][1])
        reference = scipy.stats.bootstrap(
            (100 * b, 100 * a), lambda x, y, axis: x.mean(axis) - y.mean(axis), paired=True,
            method="percentile", n_resamples=20000, rng=1,
        ).confidence_interval  # fmt: skip
        assert bounds(group.difference) == pytest.approx(tuple(reference), abs=0.25)
    holm = multipletests([group.p for group in found.by_class], method="holm")[1]
    assert [group.p_holm for group in found.by_class] == pytest.approx(holm.tolist())
    assert [group.by_seed[0].p_holm for group in found.by_class] == pytest.approx(holm.tolist())
    assert found.overall.p_holm == found.overall.p


def test_many_seeds_agree_with_the_libraries():
    rng, labels = np.random.default_rng(1), torch.arange(600) % 3
    first, other = simulated(rng, 5, 600, better=0.3)
    group = compared(first, other, labels, resamples=20000).overall
    a, b = 100 * first.mean(1), 100 * other.mean(1)
    test = scipy.stats.ttest_rel(b, a)
    assert group.p == pytest.approx(test.pvalue)
    assert bounds(group.difference) == pytest.approx(tuple(test.confidence_interval()))
    assert group.spread.standard_deviation == pytest.approx(np.std(b - a, ddof=1))
    effect = group.spread.detectable_difference / group.spread.standard_deviation
    assert TTestPower().power(effect, nobs=5, alpha=0.05) == pytest.approx(0.8, abs=1e-4)
    draws = []  # plain two-way resampling
    for _ in range(20000):
        seeds, images = rng.integers(0, 5, 5), rng.integers(0, 600, 600)
        draws.append(100 * (other[seeds][:, images].mean() - first[seeds][:, images].mean()))
    reference = np.quantile(draws, [0.025, 0.975])
    found = bounds(group.spread.interval_over_seeds_and_images)
    assert found == pytest.approx(reference.tolist(), abs=0.25)


def test_accuracy_intervals_agree_with_scipy():
    labels = torch.arange(600) % 3
    first, _ = simulated(np.random.default_rng(2), 4, 600)
    one = main.accuracy_intervals(evaluations(first[:1], labels), main.StatisticsSettings())
    wilson = scipy.stats.binomtest(int(first[0].sum()), 600).proportion_ci(method="wilson")
    assert one.overall.value == pytest.approx(100 * first[0].mean())
    assert bounds(one.overall) == pytest.approx((100 * wilson.low, 100 * wilson.high))
    many = main.accuracy_intervals(evaluations(first, labels), main.StatisticsSettings())
    shares = 100 * first[:, labels.numpy() == 1].mean(1)
    interval = scipy.stats.t.interval(0.95, 3, shares.mean(), scipy.stats.sem(shares))
    assert many.by_class[1].value == pytest.approx(shares.mean(), abs=1e-3)
    assert bounds(many.by_class[1]) == pytest.approx(interval, abs=1e-3)


def test_equal_networks_leave_no_nan():
    """Nor a certainty: 20 images a class tell a difference of 5 points from none at best."""
    labels = torch.arange(60) % 3
    right = np.ones((3, 60), bool)
    found = compared(right, right, labels)
    for group in (found.overall, *found.by_class):
        assert group.difference.value == 0 and group.difference.low == -group.difference.high < 0
        assert (group.p, group.verdict) == (1, main.Verdict.UNDECIDED)
    assert found.overall.spread.detectable_difference > 0


def test_equal_differences_are_not_certain():
    """Two seeds whose differences agree to the image are known to that image only."""
    settings = main.StatisticsSettings()
    found = main.t_test(np.array([0.3, 0.3]), 0.1, settings)
    deviation = 0.1 / np.sqrt(12)  # of a number rounded to tenths
    p = 2 * scipy.stats.t.sf(0.3 / (deviation / np.sqrt(2)), 1)
    assert found.p == pytest.approx(p) and 0.02 < found.p < 0.06
    assert found.standard_deviation == pytest.approx(deviation)
    half = scipy.stats.t.ppf(0.975, 1) * deviation / np.sqrt(2)
    assert bounds(found.interval) == pytest.approx((0.3 - half, 0.3 + half))
    values = np.array([0.1, 0.5, 0.2])  # their own deviation is larger
    test = scipy.stats.ttest_1samp(values, 0)
    found = main.t_test(values, 0.1, settings)
    assert found.p == pytest.approx(test.pvalue)
    assert bounds(found.interval) == pytest.approx(tuple(test.confidence_interval()))


@pytest.mark.parametrize("images", [200, 1000])
@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_equal_networks_are_seldom_told_apart_on_any_class(seeds, images, quick_holm):
    """400 experiments with ten classes; families of true hypotheses, so 5 % may err at most.

    With two seeds, their differences are equal on some class in a tenth of the experiments or
    more. The bound is 5 % and three standard errors of 400.
    """
    rng = np.random.default_rng(seeds)
    settings = main.StatisticsSettings()
    told = 0
    equal = 0
    for _ in range(400):
        correct = rng.binomial(images, 0.93, (2, seeds, 10))
        change = 100 * (correct[1] - correct[0]) / images
        equal += (np.ptp(change, axis=0) == 0).any()
        ps = [main.t_test(change[:, k], 100 / images, settings).p for k in range(10)]
        told += min(main.holm(ps, settings.level)) < settings.level
    assert told / 400 <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 400)
    assert seeds > 2 or equal > 40


@pytest.mark.parametrize("verdict", main.Verdict)
@pytest.mark.parametrize("seeds", [1, 5])
def test_verdict_says_what_was_found(verdict, seeds):
    labels = torch.arange(900) % 3
    shift = {main.Verdict.BETTER: 2.0, main.Verdict.WORSE: -2.0, main.Verdict.UNDECIDED: 0.0}[
        verdict
    ]
    found = compared(*simulated(np.random.default_rng(5), seeds, 900, better=shift), labels)
    sentence = main.say_verdict(found, CLASSES, settings_with(seeds))
    assert found.overall.verdict is verdict
    assert f"{SE.title} CNN is {verdict} " in sentence and f" {BASELINE.title} CNN: " in sentence
    assert f"{found.overall.difference.value:+.2f} percentage points" in sentence
    assert ("one seed can't speak for the architecture" in sentence) == (seeds == 1)
    if seeds > 1:
        assert (
            f"{found.overall.spread.detectable_difference:.2f} points 80 % of the time" in sentence
        )
    for side in (main.Verdict.BETTER, main.Verdict.WORSE):
        groups = zip(CLASSES, found.by_class, strict=True)
        names = [name for name, group in groups if group.verdict is side]
        assert f"{side} on {', '.join(names) or 'none'}" in sentence


class Open(main.SEBlock):
    """A block whose gates are all one: the network computes what the Baseline does."""

    def gate(self, activations):
        return torch.ones(activations.shape[:2])


@pytest.fixture(scope="module")
def same_networks(tmp_path_factory):
    """Right answers [24, images], by seed, of the Baseline and of a network that computes the same,
    in turn."""
    as_baseline = [main.with_attention(nn.Identity), main.with_attention(Open)]
    recipe = main.Recipe(
        dataset="shapes", shapes_train=400, epochs=8, crop_epochs=0, batch_size=32, stem=4
    )
    recipe = dataclasses.replace(recipe, seed=0, widths=(16, 16, 16))
    settings = main.Settings(recipe=recipe, shapes_test=1000, seeds=24)
    hardware = main.prepare_machine(settings)
    data = main.load_data(settings)
    right = []
    for seed in settings.all_seeds():
        network = dataclasses.replace(SE, build=as_baseline[seed % 2])
        path = tmp_path_factory.mktemp("same") / "model.pth"
        job = main.TrainingJob(network, recipe.with_seed(seed), "auto", path)
        (one,) = main.train_all([job], data, hardware)
        logits = main.predict(one.model, data.test.pixels, hardware)
        right.append((logits.argmax(1) == data.test.labels).numpy())
    assert (
        0.2 < np.mean(right) < 0.99 and np.std(np.mean(right, 1)) > 0.003
    )  # they learn, and seeds matter
    return np.stack(right)


def test_networks_that_are_the_same_are_seldom_told_apart(same_networks, quick_holm):
    """1,000 experiments of 5 seeds each, drawn from trained networks that differ in seeds alone.

    With 200, one such test in fifty would end outside these bounds by chance.
    """
    rng, labels = np.random.default_rng(0), torch.arange(same_networks.shape[1]) % 3
    told = 0
    for _ in range(1000):
        order = rng.permutation(len(same_networks))
        found = compared(same_networks[order[:5]], same_networks[order[5:10]], labels, resamples=10)
        told += found.overall.verdict is not main.Verdict.UNDECIDED
    assert 0.02 <= told / 1000 <= 0.08, told
