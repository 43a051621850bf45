"""What numbers of seeds can show: in simulations, and against the noncentral t distribution."""

import numpy as np
import pytest
import scipy.stats

from lab.measure import planning, statistics


def plan(deviation, seeds, **more):
    return planning.plan(deviation, seeds, statistics.Settings(**more), known_from=seeds)


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_planned_power_is_found_in_simulations(seeds):
    """Differences as large as the detectable one are found, and equal networks found equivalent
    within the provable margin, as often as was said; 4,000 experiments each."""
    planned = plan(0.3, seeds)
    rng = np.random.default_rng(0)
    detected = 0
    proved = 0
    for _ in range(4000):
        noise = rng.normal(0, 0.3, seeds)
        detected += statistics.t_test(noise + planned.detectable_difference, 1e-9).p() < 0.05
        proved += statistics.t_test(noise, 1e-9).margin_p(planned.provable_margin) < 0.05
    assert detected / 4000 == pytest.approx(0.8, abs=0.02)
    assert 0.78 <= proved / 4000 <= 0.85  # "at least": both tests may fail at once


@pytest.mark.parametrize("deviation", [0.02, 0.05, 0.1, 0.3, 1.0])
def test_so_many_seeds_decide(deviation):
    count = plan(deviation, 5).deciding.seeds
    for seeds, enough in ((count - 1, False), (count, True)):
        if seeds >= 2:
            planned = plan(deviation, seeds)
            found = planned.detectable_difference <= 0.5 + 1e-6
            assert (found and planned.provable_margin <= 0.5 + 1e-6) == enough
    assert plan(30.0, 5).deciding.seeds is None
    assert plan(0.3, 5, margin=0).deciding is None


@pytest.mark.parametrize("seeds", [2, 3, 10])
def test_the_range_of_deciding_seeds_holds_the_true_number(seeds):
    """400 experiments at a true deviation of 0.23: in 95 % and three standard errors."""
    rng = np.random.default_rng(seeds)
    rules = statistics.Settings()
    true = planning.count_deciding_seeds(0.23, rules)
    held = 0
    for _ in range(400):
        deviation = rng.normal(0, 0.23, seeds).std(ddof=1)
        low, high = planning.bounds_of_deviation(deviation, seeds, 0.05)
        held += low <= 0.23 <= high
    assert held / 400 == pytest.approx(0.95, abs=3 * np.sqrt(0.05 * 0.95 / 400))
    found = planning.plan(0.23, seeds, rules, known_from=seeds, least=0.2).deciding
    assert found.fewest <= found.seeds == true
    assert found.most is None or found.most > true
    assert found.fewest == planning.count_deciding_seeds(max(low_of(0.23, seeds), 0.2), rules)


def low_of(deviation, seeds):
    """The lower end of a deviation, from the chi-squared distribution."""
    return deviation * np.sqrt((seeds - 1) / scipy.stats.chi2.isf(0.025, seeds - 1))


@pytest.mark.parametrize(
    ("seeds", "power", "level"),
    [(2, 0.8, 0.01), (2, 0.95, 0.05), (3, 0.8, 0.01), (5, 0.8, 0.001), (5, 0.8, 0.05)],
)
def test_power_is_that_of_the_noncentral_t_distribution(seeds, power, level):
    """Integrated here over the deviation that a test finds; SciPy's fails in the far tail."""
    effect = plan(1.0, seeds, power=power, level=level).detectable_difference
    limit = scipy.stats.t.isf(level / 2, seeds - 1)
    squares = scipy.stats.chi2.ppf((np.arange(200_000) + 0.5) / 200_000, seeds - 1)
    deviations = np.sqrt(squares / (seeds - 1))
    far = effect * np.sqrt(seeds) - limit * deviations
    assert scipy.stats.norm.cdf(far).mean() == pytest.approx(power, abs=1e-3)


def test_few_seeds_do_not_decide_at_a_strict_level():
    for effect in (20, 40):  # which two seeds find in half of the cases
        assert plan(0.5 / effect, 2, margin=0.5, level=0.01).deciding.seeds == 3
