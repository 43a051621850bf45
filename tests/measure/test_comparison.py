"""Networks compared: against SciPy and statsmodels, and on networks that are the same."""

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
from torch import nn

import main
from lab.machine.device import prepare_machine
from lab.measure import comparison, statistics
from lab.measure.evaluation import logits_of
from lab.measure.statistics import PairedAnswers, Verdict

CLASSES = ("a", "b", "c")
RULES = statistics.Settings()


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


def compared(first, other, labels):
    by_network = {
        "baseline": evaluations(first, labels),
        "se_attention": evaluations(other, labels, SE),
    }
    (found,) = comparison.compare_with_first(by_network, labels.numpy(), len(CLASSES), RULES)
    return found


def test_one_seed_agrees_with_the_libraries():
    rng, labels = np.random.default_rng(0), torch.arange(600) % 3
    first, other = simulated(rng, 1, 600, better=0.4)
    found = compared(first, other, labels)
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
        answers = PairedAnswers(table[1][0], table[0][1], int(members.sum()))
        assert test.interval == answers.interval(0.95)
        together = 1 if group is found.overall else len(CLASSES)
        assert group.difference.interval == answers.interval(1 - 0.05 / together)
    holm = multipletests([group.difference.p for group in found.by_class], method="holm")[1]
    assert [group.difference.p_holm for group in found.by_class] == pytest.approx(holm.tolist())
    assert [group.by_seed[0].p_holm for group in found.by_class] == pytest.approx(holm.tolist())
    assert found.overall.difference.p_holm == found.overall.difference.p


def test_many_seeds_agree_with_the_libraries():
    rng, labels = np.random.default_rng(1), torch.arange(600) % 3
    first, other = simulated(rng, 5, 600, better=0.3)
    group = compared(first, other, labels).overall
    a, b = 100 * first.mean(1), 100 * other.mean(1)
    test = scipy.stats.ttest_rel(b, a)
    assert group.difference.p == pytest.approx(test.pvalue)
    assert bounds(group.difference.interval) == pytest.approx(tuple(test.confidence_interval()))
    assert group.over_seeds.spread.standard_deviation == pytest.approx(np.std(b - a, ddof=1))
    planning = group.over_seeds.planning
    effect = planning.detectable_difference / planning.deviation
    assert TTestPower().power(effect, nobs=5, alpha=0.05) == pytest.approx(0.8, abs=1e-4)
    error = np.std(b - a, ddof=1) / np.sqrt(5)
    for posterior in group.over_seeds.posteriors:
        high, low = scipy.stats.t.cdf([posterior.bound, -posterior.bound], 4, (b - a).mean(), error)
        assert posterior.probability == pytest.approx(high - low)
    assert [one.bound for one in group.over_seeds.posteriors] == [0.5, 0.25, 0.1]
    assert group.over_seeds.effect_size == pytest.approx((b - a).mean() / np.std(b - a, ddof=1))


@pytest.mark.parametrize("seeds", [1, 4])
def test_plain_arrays_can_be_compared(seeds):
    """Of any two answers to the same questions, without a network: as networks are compared."""
    labels = np.arange(600) % 3
    first, other = simulated(np.random.default_rng(3), seeds, 600, better=0.5)
    gains = other.astype(int) - first.astype(int)
    overall, by_class = comparison.compare(gains, labels, 3, RULES)
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
    one = comparison.accuracy_intervals(first[:1], labels.numpy(), len(CLASSES), rules)
    wilson = scipy.stats.binomtest(int(first[0].sum()), 600).proportion_ci(method="wilson")
    assert one.overall.value == pytest.approx(100 * first[0].mean())
    assert bounds(one.overall) == pytest.approx((100 * wilson.low, 100 * wilson.high))
    many = comparison.accuracy_intervals(first, labels.numpy(), len(CLASSES), rules)
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


def test_p_is_corrected_over_networks_and_their_classes():
    """A third network costs the second one something."""
    rng, labels = np.random.default_rng(4), torch.arange(600) % 3
    first, other = simulated(rng, 1, 600, better=0.4)
    _, third = simulated(rng, 1, 600)
    eca = dataclasses.replace(SE, key="eca")
    by_network = {
        "baseline": evaluations(first, labels),
        "se_attention": evaluations(other, labels, SE),
        "eca": evaluations(third, labels, eca),
    }
    found = comparison.compare_with_first(by_network, labels.numpy(), len(CLASSES), RULES)
    overall = [one.overall.difference for one in found]
    holm = multipletests([one.p for one in overall], method="holm")[1]
    assert [one.p_holm for one in overall] == pytest.approx(holm.tolist())
    classes = [group.difference for one in found for group in one.by_class]
    holm = multipletests([one.p for one in classes], method="holm")[1]
    assert len(classes) == 6
    assert [one.p_holm for one in classes] == pytest.approx(holm.tolist())


def test_of_several_networks_the_smallest_margin_and_the_verdict_agree():
    """Also where the corrected tests show what intervals that hold together do not."""
    rng, labels = np.random.default_rng(1), torch.arange(400) % 3
    rules = dataclasses.replace(RULES, margin=2.9)
    differing = 0
    for _ in range(2):
        first = rng.random((5, 400)) < 0.9
        by_network = {"baseline": evaluations(first, labels)}
        for key in ("se_attention", "eca", "wide"):
            flipped = rng.random((5, 400)) < 0.02
            network = dataclasses.replace(SE, key=key)
            by_network[key] = evaluations(first ^ flipped, labels, network)
        for one in comparison.compare_with_first(by_network, labels.numpy(), 3, rules):
            difference = one.overall.difference
            assert difference.is_within_margin == (difference.smallest_margin < rules.margin)
            together = difference.margin_interval
            reaches = max(-together.low, together.high)
            differing += difference.is_within_margin and reaches > rules.margin
    assert differing > 0


def test_spread_is_that_of_its_sources():
    """Seeds, images and what is left, drawn with known deviations."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(200):
        change = (
            rng.normal(0, 0.5, (6, 1)) + rng.normal(0, 8, (1, 400)) + rng.normal(0, 10, (6, 400))
        )
        found.append(comparison.analyse_spread(change, 0.05))
    of_quality = np.sqrt(np.mean([one.of_quality.value**2 for one in found]))
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


@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
@pytest.mark.parametrize("quality", [0.0, 0.5])
def test_the_interval_of_quality_holds_the_true_one(seeds, quality):
    """In 400 experiments; where there is none, 0 lies in it."""
    rng = np.random.default_rng(seeds)
    held = 0
    for _ in range(400):
        change = rng.normal(0, quality, (seeds, 1)) + rng.normal(0, 10, (seeds, 400))
        found = comparison.analyse_spread(change, 0.05).of_quality
        assert found.low <= found.value <= found.high
        held += found.low <= quality <= found.high
    assert held / 400 >= 0.95 - 3 * np.sqrt(0.05 * 0.95 / 400), held


def test_better_seeds_are_counted():
    found = comparison.share_of_better_seeds(np.array([3, -1, 0, 5]), 0.05)
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
        dataset="shapes",
        shapes_difficulty=0,
        shapes_train=300,
        epochs=6,
        crop_epochs=0,
        batch_size=32,
        stem=4,
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
    told = 0
    told_of_a_class = 0
    for _ in range(1000):
        order = rng.permutation(len(same_networks))
        first = same_networks[order[:seeds]].astype(int)
        other = same_networks[order[seeds : 2 * seeds]].astype(int)
        change = other - first
        told += statistics.judge_answers(change, RULES).verdict in DIRECTIONS
        ps = [statistics.judge_answers(change[:, k::10], RULES).p for k in range(10)]
        told_of_a_class += min(statistics.holm(ps)) < 0.05
    assert 0.01 <= told / 1000 <= 0.08, told
    assert told_of_a_class / 1000 <= 0.08, told_of_a_class
