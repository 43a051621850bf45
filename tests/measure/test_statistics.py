"""The statistics against scipy and statsmodels, and the verdict on networks that are the same."""

import dataclasses
from functools import partial

import numpy as np
import pytest
import scipy.stats
import torch
from helpers import BASELINE, SE, bounds, evaluation_of
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower
from statsmodels.stats.proportion import proportion_confint
from statsmodels.stats.weightstats import ttost_paired
from torch import nn

import main
from lab.machine.device import prepare_machine
from lab.measure import statistics
from lab.measure.evaluation import logits_of
from lab.measure.statistics import Difference, Interval, Verdict

CLASSES = ("a", "b", "c")


def evaluations(right, labels, network=BASELINE):
    """Evaluations that are right where `right` [seeds, images] says so, else wrong by one class."""
    called = (labels + (~torch.as_tensor(right)).long()) % len(CLASSES)
    sure = torch.full((len(labels),), 0.9)
    return [evaluation_of(row, sure, labels, len(CLASSES), network=network) for row in called]


def simulated(rng, seeds, images=300, better=0.0):
    """Two networks' right answers [2, seeds, images]; images differ in difficulty, seeds too."""
    difficulty = rng.normal(1.5, 1.5, images)
    luck = rng.normal(0, 0.3, (2, seeds, 1)) + np.array([0, better])[:, None, None]
    return rng.random((2, seeds, images)) < 1 / (1 + np.exp(-(difficulty + luck)))


def compared(first, other, labels, resamples=2000):
    by_network = {
        "baseline": evaluations(first, labels),
        "se_attention": evaluations(other, labels, SE),
    }
    rules = statistics.Settings(resamples=resamples)
    (found,) = statistics.compare_with_first(by_network, labels.numpy(), len(CLASSES), rules, 42)
    return found


@pytest.fixture(autouse=True)
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
        assert group.difference.p == pytest.approx(mcnemar(table, exact=True).pvalue)
        discordant = int(table[0][1] + table[1][0])
        assert group.difference.p == pytest.approx(
            scipy.stats.binomtest(int(table[0][1]), discordant).pvalue
        )
        assert group.difference.interval.value == pytest.approx(100 * (b.mean() - a.mean()))
        (test,) = group.by_seed
        assert (test.only_this_correct, test.only_first_correct) == (table[1][0], table[0][1])
        reference = scipy.stats.bootstrap(
            (100 * b, 100 * a), lambda x, y, axis: x.mean(axis) - y.mean(axis), paired=True,
            method="percentile", n_resamples=20000, random_state=1,
        ).confidence_interval  # fmt: skip
        assert bounds(group.difference.interval) == pytest.approx(tuple(reference), abs=0.25)
    holm = multipletests([group.difference.p for group in found.by_class], method="holm")[1]
    assert [group.difference.p_holm for group in found.by_class] == pytest.approx(holm.tolist())
    assert [group.by_seed[0].p_holm for group in found.by_class] == pytest.approx(holm.tolist())
    assert found.overall.difference.p_holm == found.overall.difference.p


def test_many_seeds_agree_with_the_libraries():
    rng, labels = np.random.default_rng(1), torch.arange(600) % 3
    first, other = simulated(rng, 5, 600, better=0.3)
    group = compared(first, other, labels, resamples=20000).overall
    a, b = 100 * first.mean(1), 100 * other.mean(1)
    test = scipy.stats.ttest_rel(b, a)
    assert group.difference.p == pytest.approx(test.pvalue)
    assert bounds(group.difference.interval) == pytest.approx(tuple(test.confidence_interval()))
    assert group.over_seeds.spread.standard_deviation == pytest.approx(np.std(b - a, ddof=1))
    planning = group.over_seeds.planning
    effect = planning.detectable_difference / planning.deviation
    assert TTestPower().power(effect, nobs=5, alpha=0.05) == pytest.approx(0.8, abs=1e-4)
    gains = other.astype(int) - first.astype(int)
    draws = []  # plain two-way resampling
    for _ in range(20000):
        seeds, images = rng.integers(0, 5, 5), rng.integers(0, 600, 600)
        draws.append(100 * gains[seeds][:, images].mean())
    found = bounds(group.over_seeds.interval_over_seeds_and_images)
    assert found == pytest.approx(np.quantile(draws, [0.025, 0.975]).tolist(), abs=0.25)


@pytest.mark.parametrize("seeds", [1, 4])
def test_plain_arrays_can_be_compared(seeds):
    """Of any two answers to the same questions, without a network: as networks are compared."""
    labels = np.arange(600) % 3
    first, other = simulated(np.random.default_rng(3), seeds, 600, better=0.5)
    gains = other.astype(int) - first.astype(int)
    rules = statistics.Settings(resamples=2000)
    overall, by_class = statistics.compare(gains, labels, 3, rules, 42)
    found = compared(first, other, torch.from_numpy(labels))
    assert (overall, by_class) == (found.overall, found.by_class)
    assert overall.difference.interval.value == pytest.approx(100 * gains.mean())
    for label, group in enumerate(by_class):
        of_class = gains[:, labels == label]
        assert group.difference.interval.value == pytest.approx(100 * of_class.mean())
        for test, row in zip(group.by_seed, of_class, strict=True):
            assert test.only_this_correct == (row == 1).sum()
            assert test.only_first_correct == (row == -1).sum()
    assert (overall.over_seeds is None) == (seeds == 1)


def test_accuracy_intervals_agree_with_scipy():
    labels = torch.arange(600) % 3
    first, _ = simulated(np.random.default_rng(2), 4, 600)
    rules = statistics.Settings()
    one = statistics.accuracy_intervals(first[:1], labels.numpy(), len(CLASSES), rules)
    wilson = scipy.stats.binomtest(int(first[0].sum()), 600).proportion_ci(method="wilson")
    assert one.overall.value == pytest.approx(100 * first[0].mean())
    assert bounds(one.overall) == pytest.approx((100 * wilson.low, 100 * wilson.high))
    many = statistics.accuracy_intervals(first, labels.numpy(), len(CLASSES), rules)
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
        interval = group.difference.interval
        assert interval.value == 0 and interval.low == -interval.high < 0
        assert (group.difference.p, group.difference.verdict) == (1, Verdict.UNDECIDED)
    assert found.overall.over_seeds.planning.detectable_difference > 0
    assert found.overall.over_seeds.outperforming.value == 50


def test_equal_differences_are_not_certain():
    """Two seeds whose differences agree to the image are known to that image only."""
    found = statistics.t_test(np.array([0.3, 0.3]), 0.1)
    deviation = 0.1 / np.sqrt(12)  # of a number rounded to tenths
    p = 2 * scipy.stats.t.sf(0.3 / (deviation / np.sqrt(2)), 1)
    assert found.p() == pytest.approx(p) and 0.02 < found.p() < 0.06
    assert found.standard_deviation == pytest.approx(deviation)
    half = scipy.stats.t.ppf(0.975, 1) * deviation / np.sqrt(2)
    assert bounds(found.interval(0.95)) == pytest.approx((0.3 - half, 0.3 + half))
    values = np.array([0.1, 0.5, 0.2])  # their own deviation is larger
    test = scipy.stats.ttest_1samp(values, 0)
    found = statistics.t_test(values, 0.1)
    assert found.p() == pytest.approx(test.pvalue)
    assert bounds(found.interval(0.95)) == pytest.approx(tuple(test.confidence_interval()))


@pytest.mark.parametrize("margin", [0.2, 0.5, 2.0])
def test_equivalence_agrees_with_statsmodels(margin):
    rng = np.random.default_rng(0)
    for seeds in (2, 3, 5, 10):
        for centre in (-1, -0.3, 0, 0.1, 0.6):
            first = rng.normal(90, 0.3, seeds)
            other = first + rng.normal(centre, 0.3, seeds)
            p, _, _ = ttost_paired(other, first, -margin, margin)
            found = statistics.t_test(other - first, 1e-9)
            assert found.margin_p(margin) == pytest.approx(p, abs=1e-9)
            inner = found.interval(0.9)
            assert (p < 0.05) == (-margin < inner.low and inner.high < margin)


def test_bootstraps_margin_agrees_with_its_interval():
    rng = np.random.default_rng(0)
    settings = statistics.Settings(resamples=4000)
    for gained in (300, 330, 360, 420):
        change = np.zeros(10000)
        change[:gained] = 100
        change[-300:] = -100
        found = statistics.bootstrap(rng.permutation(change)[None], settings, 0)
        inner = found.interval(0.9)
        for margin in (0.2, 0.4, 0.6, 1.0):
            inside = -margin < inner.low and inner.high < margin
            assert (found.margin_p(margin) < 0.05) == inside
        outer = found.interval(0.95)
        assert (found.p() < 0.05) == (not outer.low < 0 < outer.high)
    assert found.margin_p(0) > 0.5


@pytest.mark.parametrize("images", [200, 1000])
@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_equal_networks_are_seldom_told_apart_on_any_class(seeds, images):
    """400 experiments with ten classes; families of true hypotheses, so 5 % may err at most.

    With two seeds, their differences are equal on some class in a tenth of the experiments or
    more. The bound is 5 % and three standard errors of 400.
    """
    rng = np.random.default_rng(seeds)
    level = statistics.Settings().level
    told = 0
    equal = 0
    for _ in range(400):
        correct = rng.binomial(images, 0.93, (2, seeds, 10))
        change = 100 * (correct[1] - correct[0]) / images
        equal += (np.ptp(change, axis=0) == 0).any()
        ps = [statistics.t_test(change[:, k], 100 / images).p() for k in range(10)]
        told += min(statistics.holm(ps, level)) < level
    assert told / 400 <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 400)
    assert seeds > 2 or equal > 40


def test_verdicts_follow_from_the_tests():
    """By every combination of what the two tests find."""
    for value, p, margin_p, expected, within in (
        (1, 0.01, 0.9, Verdict.BETTER, False),
        (-1, 0.01, 0.9, Verdict.WORSE, False),
        (0.1, 0.01, 0.01, Verdict.BETTER, True),
        (-0.1, 0.01, 0.01, Verdict.WORSE, True),
        (0.1, 0.4, 0.01, Verdict.EQUIVALENT, True),
        (0.1, 0.4, 0.4, Verdict.UNDECIDED, False),
        (0.1, 0.05, 0.05, Verdict.UNDECIDED, False),
    ):
        interval = Interval(value, value - 1, value + 1)
        found = statistics.decide(Difference(interval, p, p, margin_p, margin_p, interval), 0.05)
        assert (found.verdict, found.is_within_margin) == (expected, within)


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_planned_power_is_found_in_simulations(seeds):
    """Differences as large as the detectable one are found, and equal networks found equivalent
    within the provable margin, as often as was said; 4,000 experiments each."""
    settings = statistics.Settings(resamples=100)
    planning = statistics.plan(0.3, seeds, settings)
    rng = np.random.default_rng(0)
    detected = 0
    proved = 0
    for _ in range(4000):
        noise = rng.normal(0, 0.3, seeds)
        detected += statistics.t_test(noise + planning.detectable_difference, 1e-9).p() < 0.05
        proved += statistics.t_test(noise, 1e-9).margin_p(planning.provable_margin) < 0.05
    assert detected / 4000 == pytest.approx(0.8, abs=0.02)
    assert 0.78 <= proved / 4000 <= 0.85  # "at least": both tests may fail at once


@pytest.mark.parametrize("deviation", [0.02, 0.05, 0.1, 0.3, 1.0])
def test_so_many_seeds_decide(deviation):
    settings = statistics.Settings(margin=0.5)
    count = statistics.plan(deviation, 5, settings).deciding_seeds
    for seeds, enough in ((count - 1, False), (count, True)):
        if seeds >= 2:
            planning = statistics.plan(deviation, seeds, settings)
            found = planning.detectable_difference <= 0.5 + 1e-6
            assert (found and planning.provable_margin <= 0.5 + 1e-6) == enough
    assert statistics.plan(30.0, 5, settings).deciding_seeds is None
    assert statistics.plan(0.3, 5, statistics.Settings(margin=0)).deciding_seeds is None


@pytest.mark.parametrize(
    ("seeds", "power", "level"),
    [(2, 0.8, 0.01), (2, 0.95, 0.05), (3, 0.8, 0.01), (5, 0.8, 0.001), (5, 0.8, 0.05)],
)
def test_power_is_that_of_the_noncentral_t_distribution(seeds, power, level):
    """Integrated here over the deviation that a test finds; SciPy's fails in the far tail."""
    settings = statistics.Settings(power=power, level=level)
    effect = statistics.plan(1.0, seeds, settings).detectable_difference
    limit = scipy.stats.t.isf(level / 2, seeds - 1)
    squares = scipy.stats.chi2.ppf((np.arange(200_000) + 0.5) / 200_000, seeds - 1)
    deviations = np.sqrt(squares / (seeds - 1))
    far = effect * np.sqrt(seeds) - limit * deviations
    assert scipy.stats.norm.cdf(far).mean() == pytest.approx(power, abs=1e-3)


def test_few_seeds_do_not_decide_at_a_strict_level():
    settings = statistics.Settings(margin=0.5, level=0.01)
    for effect in (20, 40):  # which two seeds find in half of the cases
        assert statistics.plan(0.5 / effect, 2, settings).deciding_seeds == 3


def test_spread_is_that_of_its_sources():
    """Seeds, images and what is left, drawn with known deviations."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(200):
        change = (
            rng.normal(0, 0.5, (6, 1)) + rng.normal(0, 8, (1, 400)) + rng.normal(0, 10, (6, 400))
        )
        found.append(statistics.analyse_spread(change))
    of_quality = np.sqrt(np.mean([one.of_quality**2 for one in found]))
    assert of_quality == pytest.approx(0.5, abs=0.05)
    few = np.sqrt(np.mean([one.of_few_images**2 for one in found]))
    assert few == pytest.approx(10 / np.sqrt(400), rel=0.02)
    total = np.sqrt(np.mean([one.standard_deviation**2 for one in found]))
    assert total == pytest.approx(np.sqrt(0.5**2 + 10**2 / 400), abs=0.05)
    both = np.sqrt(np.mean([one.error_of_both**2 for one in found]))
    assert both == pytest.approx(np.sqrt(0.5**2 / 6 + 8**2 / 400 + 10**2 / 2400), rel=0.05)
    seeds = np.sqrt(np.mean([one.error_of_seeds**2 for one in found]))
    assert seeds == pytest.approx(np.sqrt((0.5**2 + 10**2 / 400) / 6), rel=0.06)
    images = np.sqrt(np.mean([one.error_of_images**2 for one in found]))
    assert images == pytest.approx(np.sqrt((8**2 + 10**2 / 6) / 400), rel=0.05)


def test_better_seeds_are_counted():
    found = statistics.share_of_better_seeds(np.array([3, -1, 0, 5]), 0.05)
    assert found.value == 62.5
    low, high = proportion_confint(2.5, 4, method="wilson")
    assert bounds(found) == pytest.approx((100 * low, 100 * high))


DIRECTIONS = (Verdict.BETTER, Verdict.WORSE)


class Open(main.SEBlock):
    """A block whose gates are all one: the network computes what the Baseline does."""

    def gate(self, activations):
        return torch.ones(activations.shape[:2])


@pytest.fixture(scope="module")
def same_networks(tmp_path_factory):
    """Right answers [24, images], by seed, of the Baseline and of a network that computes the same,
    in turn."""
    as_baseline = [
        partial(main.SmallCNN, attention=nn.Identity),
        partial(main.SmallCNN, attention=Open),
    ]
    recipe = main.Recipe(
        dataset="shapes", shapes_train=300, epochs=6, crop_epochs=0, batch_size=32, stem=4
    )
    recipe = dataclasses.replace(recipe, seed=0, widths=(16, 16, 16))
    settings = main.Settings(recipe=recipe, shapes_test=1000, seeds=24)
    hardware = prepare_machine(settings.machine, len(main.NETWORKS))
    data = main.load_data(settings)
    right = []
    for seed in settings.all_seeds():
        network = dataclasses.replace(SE, build=as_baseline[seed % 2])
        path = tmp_path_factory.mktemp("same") / "model.pth"
        job = main.TrainingJob(network, recipe.with_seed(seed), path)
        (one,) = main.train_all([job], data, hardware)
        logits = logits_of(one.model, data.test.pixels, hardware)
        right.append((logits.argmax(1) == data.test.labels).numpy())
    # they learn, and seeds matter
    assert 0.2 < np.mean(right) < 0.99 and np.std(np.mean(right, 1)) > 0.003
    return np.stack(right)


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_networks_that_are_the_same_are_seldom_told_apart(same_networks, seeds):
    """1,000 experiments, drawn from trained networks that differ in seeds alone.

    With 200, one such test in fifty would end outside these bounds by chance.
    """
    rng = np.random.default_rng(0)
    images = same_networks.shape[1]
    rules = statistics.Settings(resamples=10)
    told = 0
    told_of_a_class = 0
    for _ in range(1000):
        order = rng.permutation(len(same_networks))
        first = same_networks[order[:seeds]].astype(int)
        other = same_networks[order[seeds : 2 * seeds]].astype(int)
        change = 100 * (other - first)
        told += statistics.judge(change, 100 / images, rules, 42).verdict in DIRECTIONS
        ps = [statistics.judge(change[:, k::10], 1000 / images, rules, 42).p for k in range(10)]
        told_of_a_class += min(statistics.holm(ps, 0.05)) < 0.05
    assert 0.02 <= told / 1000 <= 0.08, told
    assert told_of_a_class / 1000 <= 0.08, told_of_a_class


@pytest.mark.parametrize(
    "seeds", [2, 3, *(pytest.param(seeds, marks=pytest.mark.slow) for seeds in (5, 10))]
)
def test_networks_that_differ_by_the_margin_are_seldom_called_equivalent(seeds):
    """1,000 experiments on ten classes of 1,000 images, binomial, the true difference being exactly
    the margin: overall, and on any class, at most 5 % and three standard errors."""
    rng = np.random.default_rng(seeds)
    rules = statistics.Settings(margin=1.0)
    bound = 0.05 + 3 * np.sqrt(0.05 * 0.95 / 1000)
    overall = 0
    on_any_class = 0
    for _ in range(1000):
        correct = rng.binomial(1000, np.array([0.92, 0.93])[:, None, None], (2, seeds, 10))
        change = (correct[1] - correct[0]) / 10
        overall += statistics.t_test(change.mean(1), 0.01).margin_p(1.0) < 0.05
        ps = [statistics.t_test(change[:, k], 0.1).margin_p(rules.margin) for k in range(10)]
        on_any_class += min(statistics.holm(ps, 0.05)) < 0.05
    assert overall / 1000 <= bound
    assert on_any_class / 1000 <= bound


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_equal_networks_are_called_better_or_worse_as_often_as_the_level_says(seeds):
    """1,000 experiments on 10,000 images, binomial."""
    rng = np.random.default_rng(seeds)
    told = 0
    for _ in range(1000):
        correct = rng.binomial(10000, 0.93, (2, seeds))
        told += statistics.t_test((correct[1] - correct[0]) / 100, 0.01).p() < 0.05
    assert 0.02 <= told / 1000 <= 0.08


def test_scores_have_intervals_over_images_or_seeds():
    rng = np.random.default_rng(0)
    values = rng.normal(5, 2, 400)
    rules = statistics.Settings(score_resamples=4000)
    one = statistics.estimate(np.mean, [(values,)], rules, 42, of_one_image=0)
    half = 1.96 * values.std() / 20
    assert one.interval.value == pytest.approx(values.mean())
    expected = (values.mean() - half, values.mean() + half)
    assert bounds(one.interval) == pytest.approx(expected, abs=0.02)
    of_seeds = [(values + k,) for k in (0, 1, 3)]
    many = statistics.estimate(np.mean, of_seeds, rules, 42, of_one_image=0)
    means = values.mean() + np.array([0, 1, 3])
    expected = scipy.stats.ttest_1samp(means, 0).confidence_interval()
    assert bounds(many.interval) == pytest.approx(tuple(expected))
    np.testing.assert_allclose(many.by_seed, means)
