"""The tests behind a verdict: against SciPy and statsmodels, and simulated in the corners."""

import math

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
from helpers import bounds
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import ttost_paired

from lab.measure import statistics
from lab.measure.statistics import Difference, Interval, PairedAnswers, Verdict

RULES = statistics.Settings()


def test_holm_is_that_of_statsmodels():
    rng = np.random.default_rng(0)
    for count in (1, 2, 3, 49):
        ps = rng.random(count) ** 3
        ps[: count // 2] = ps[0]  # some are equal
        assert statistics.holm(list(ps)) == pytest.approx(multipletests(ps, method="holm")[1])
    assert statistics.holm([]) == []


def test_smallest_margins_agree_with_holms_verdicts(monkeypatch):
    """Of several networks too: one was called equivalent within 0.5, and its margin 0.61."""
    monkeypatch.setattr("gc.collect", lambda: 0)  # statsmodels' Holm would, for a long time
    rng = np.random.default_rng(1)
    for _ in range(20):
        tests = [statistics.t_test(rng.normal(0.1, 0.25, 5), 0.01) for _ in range(3)]
        margins = statistics.smallest_margins(tests, 0.05)
        for margin in (0.3, 0.5, 0.8):
            p = multipletests([one.margin_p(margin) for one in tests], method="holm")[1]
            assert [bool(one < 0.05) for one in p] == [one < margin for one in margins]
    alone = statistics.judge_by(tests[0], RULES)
    (margin,) = statistics.smallest_margins(tests[:1], RULES.level)
    assert alone.smallest_margin == pytest.approx(margin, abs=1e-4)


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
        told += min(statistics.holm(ps)) < level
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
        found = statistics.decide(
            Difference(interval, p, p, margin_p, margin_p, interval, 0.9), 0.05
        )
        assert (found.verdict, found.is_within_margin) == (expected, within)


def likeliest_score(gained, lost, images, difference):
    """Tango's score with the share that is lost found by maximising the likelihood."""
    true = difference / 100

    def unlikeliness(share):
        counts = (gained, lost, images - gained - lost)
        shares = (share + true, share, 1 - 2 * share - true)
        parts = zip(counts, shares, strict=True)
        return -sum(count * math.log(max(of, 1e-300)) for count, of in parts if count)

    limits = (max(0, -true), (1 - true) / 2)
    found = scipy.optimize.minimize_scalar(
        unlikeliness, bounds=limits, method="bounded", options={"xatol": 1e-13}
    )
    variance = images * (2 * found.x + true - true**2)
    return (gained - lost - images * true) / math.sqrt(variance)


@pytest.mark.parametrize("counts", [(12, 5, 100), (0, 0, 200), (3, 0, 50), (40, 70, 10000)])
@pytest.mark.parametrize("difference", [-3, -0.5, 0.2, 0.5, 4])
def test_the_score_is_that_of_the_likeliest_shares(counts, difference):
    expected = likeliest_score(*counts, difference)
    assert PairedAnswers(*counts).score(difference) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("counts", [(12, 5, 100), (0, 0, 200), (3, 0, 50), (40, 70, 10000)])
def test_intervals_hold_what_the_score_does_not_reject(counts):
    answers = PairedAnswers(*counts)
    interval = answers.interval(0.95)
    assert answers.score(interval.low) == pytest.approx(1.96, abs=1e-3)
    assert answers.score(interval.high) == pytest.approx(-1.96, abs=1e-3)
    inner = answers.interval(0.9)
    for margin in (0.1, 0.5, 1, 2, 5, 20):
        inside = -margin < inner.low and inner.high < margin
        assert (answers.margin_p(margin) < 0.05) == inside


def test_at_zero_the_score_is_mcnemars():
    """Its square is (b - c)² / (b + c)."""
    assert PairedAnswers(40, 70, 10000).score(0) ** 2 == pytest.approx(30**2 / 110)


@pytest.mark.parametrize("images", [200, 1000, pytest.param(10000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("discordance", [0.5, 1, 2, 5, 10])
def test_networks_that_differ_by_the_margin_are_seldom_equivalent_with_one_seed(
    images, discordance
):
    """Every outcome counted, not drawn: at most 6 %."""
    gained_share = (discordance + 0.5) / 200
    lost_share = (discordance - 0.5) / 200
    rate = 0.0
    for gained in likely_counts(images, gained_share):
        chance = scipy.stats.binom.pmf(gained, images, gained_share)
        of_rest = lost_share / (1 - gained_share)
        for lost in likely_counts(images - gained, of_rest):
            if PairedAnswers(gained, lost, images).margin_p(0.5) < 0.05:
                rate += chance * scipy.stats.binom.pmf(lost, images - gained, of_rest)
    assert rate <= 0.06


def likely_counts(images, share):
    """All that is not rarer than one in ten million."""
    low = int(scipy.stats.binom.ppf(1e-7, images, share))
    high = int(scipy.stats.binom.isf(1e-7, images, share))
    return range(low, high + 1)


def test_no_answer_that_differs_is_no_proof_of_equivalence():
    """On 200 images; the same on 10,000 is one."""
    for images, verdict in ((2, Verdict.UNDECIDED), (200, Verdict.UNDECIDED),
                            (10_000, Verdict.EQUIVALENT)):  # fmt: skip
        found = statistics.judge_answers(np.zeros((1, images), int), RULES)
        assert (found.verdict, found.p) == (verdict, 1)
        assert found.interval.low < 0 < found.interval.high
        assert found.smallest_margin == pytest.approx(found.margin_interval.high)


def test_no_difference_is_more_than_all_images():
    """Of two seeds, of which a t test knows nearly nothing, on 40 images; read with 19 others."""
    gains = np.zeros((2, 40))
    gains[0, :3] = 1
    difference = statistics.judge_answers(gains, statistics.Settings(), together=20)
    assert (difference.interval.low, difference.interval.high) == (-100, 100)
    assert difference.smallest_margin == 100


def test_two_seeds_that_agree_by_chance_are_not_told_apart():
    """Each of two seeds gains 6 images of 500 that differ: no spread of seeds can be smaller than
    500 tosses of a coin allow."""
    gains = np.zeros((2, 10_000), int)
    for k, of_seed in enumerate(gains):
        of_seed[1000 * k : 1000 * k + 253] = 1
        of_seed[1000 * k + 253 : 1000 * k + 500] = -1
    assert gains.sum(1).tolist() == [6, 6]
    found = statistics.judge_answers(gains, RULES)
    assert found.p > 0.5 and found.verdict not in (Verdict.BETTER, Verdict.WORSE)
    least = math.sqrt(500) / 10_000 * 100
    assert statistics.over_seeds(100 * gains).least_error == pytest.approx(
        least / math.sqrt(2), rel=0.02
    )


def answers(rng, seeds, luck, preference, images=1000):
    """By how much one network answers better than another that is as good, in points: [S, N]."""
    difficulty = rng.normal(1.5, 1.5, images)
    liking = rng.normal(0, preference, images)
    quality = rng.normal(0, luck, (2, seeds, 1))
    sure = difficulty + np.stack([-liking / 2, liking / 2])[:, None] + quality
    right = rng.random(sure.shape) < 1 / (1 + np.exp(-sure))
    return 100.0 * (right[1].astype(int) - right[0])


@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
@pytest.mark.parametrize(("luck", "preference"), [(0, 0), (0.3, 0), (0, 1), (0.3, 1)])
def test_intervals_over_seeds_and_images_cover_what_they_should(seeds, luck, preference):
    """400 experiments, with networks whose quality differs from seed to seed, or not, and that
    prefer other images, or not: 93 to 97 % and two standard errors (docs/rates.md has more)."""
    rng = np.random.default_rng(seeds)
    covered = 0
    for _ in range(400):
        gains = answers(rng, seeds, luck, preference)
        interval = statistics.over_seeds_and_images(gains).interval(0.95)
        covered += interval.low <= 0 <= interval.high
    slack = 2 * math.sqrt(0.05 * 0.95 / 400)
    assert 0.93 - slack <= covered / 400 <= 0.97 + slack, covered


@pytest.mark.parametrize("images", [2, 30, 10000])
@pytest.mark.parametrize("seeds", [1, 2, 5])
def test_p_is_where_the_interval_ends_at_zero(seeds, images):
    for mean in (0.0, 0.1, -1.0, 7.0):
        test = statistics.SeedsAndImages(mean, 0.3, seeds, 0.4, images)
        p = test.p()
        assert 0 < p <= 1
        if 1e-12 < p < 1:
            interval = test.interval(1 - p)
            nearest = interval.low if mean > 0 else interval.high
            assert nearest == pytest.approx(0, abs=1e-6)
        assert test.margin_p(abs(mean)) == pytest.approx(0.5)
        assert test.margin_p(0) >= 0.5
    of_images = statistics.SeedsAndImages(1.0, 0.0, 1, 0.5, images)
    assert of_images.p() == pytest.approx(2 * scipy.stats.t.sf(2, images - 1))
    of_seeds = statistics.SeedsAndImages(1.0, 0.5, 4, 0.0, images)
    assert of_seeds.p() == pytest.approx(2 * scipy.stats.t.sf(2, 3))


def test_seeds_that_all_agree_leave_the_images_error():
    """However many: SciPy 1.17's quantiles of t, far out, are infinite for some numbers of them."""
    for seeds in range(2, 100):
        test = statistics.SeedsAndImages(0.0, 0.0, seeds, 0.5, 10_000)
        assert test.margin_p(1.0) == pytest.approx(scipy.stats.t.sf(2, 9_999), rel=1e-6)
        far = statistics.SeedsAndImages(50.0, 0.0, seeds, 0.1, 10_000)
        assert 0 < far.p() < 1e-90


@pytest.mark.parametrize("seeds", range(2, 13))
def test_a_difference_that_is_the_same_for_every_seed_is_judged(seeds):
    same = np.zeros((seeds, 200))
    assert statistics.judge(same, RULES).verdict is Verdict.UNDECIDED
    same[:, :100] = 100
    assert statistics.judge(same, RULES).verdict is Verdict.BETTER


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
        on_any_class += min(statistics.holm(ps)) < 0.05
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
