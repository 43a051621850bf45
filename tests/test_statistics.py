"""The statistics of main.py against scipy and statsmodels, and its verdict on networks that are the same."""

import numpy as np
import pytest
import scipy.stats
import torch
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

import main

CLASSES = ("a", "b", "c")


def evaluations(right, labels):
    """Evaluations that are right where `right` [seeds, images] says so, else wrong by one class."""
    called = (labels + (~torch.as_tensor(right)).long()) % len(CLASSES)
    return [main.evaluate(None, torch.eye(len(CLASSES))[row], labels, CLASSES) for row in called]


def simulated(rng, seeds, images=300, better=0.0):
    """Two networks' right answers [seeds, images]: images differ in difficulty, seeds in luck; both networks alike."""
    difficulty = rng.normal(1.5, 1.5, images)
    luck = rng.normal(0, 0.3, (2, seeds, 1)) + np.array([0, better])[:, None, None]
    return rng.random((2, seeds, images)) < 1 / (1 + np.exp(-(difficulty + luck)))


def compared(first, other, labels, **settings):
    settings = main.Settings(seeds=len(first), **{"resamples": 2000, **settings})
    return main.compare(evaluations(other, labels), evaluations(first, labels), labels, CLASSES, settings)


def test_one_seed_agrees_with_the_libraries():
    rng, labels = np.random.default_rng(0), torch.arange(600) % 3
    first, other = simulated(rng, 1, 600, better=0.4)
    found = compared(first, other, labels, resamples=20000)
    ps = []
    for group, members in [("overall", labels >= 0), *((c, labels == k) for k, c in enumerate(CLASSES))]:
        row = found[group]
        a, b = first[0][members], other[0][members]
        table = [[(a & b).sum(), (a & ~b).sum()], [(~a & b).sum(), (~a & ~b).sum()]]
        assert row["p"] == pytest.approx(mcnemar(table, exact=True).pvalue)
        assert row["p"] == pytest.approx(scipy.stats.binomtest(int(table[0][1]), int(table[0][1] + table[1][0])).pvalue)
        assert row["difference"] == pytest.approx(100 * (b.mean() - a.mean()))
        reference = scipy.stats.bootstrap(
            (100 * b, 100 * a), lambda x, y, axis: x.mean(axis) - y.mean(axis), paired=True, method="percentile",
            n_resamples=20000, rng=1,
        ).confidence_interval  # fmt: skip
        assert row["interval"] == pytest.approx(tuple(reference), abs=0.25)
        ps.append(row["p"])
    holm = multipletests(ps[1:], method="holm")[1]
    assert [row["p_holm"] for row in list(found.values())[1:]] == pytest.approx(holm.tolist())
    assert found["overall"]["p_holm"] == found["overall"]["p"]


def test_many_seeds_agree_with_the_libraries():
    rng, labels = np.random.default_rng(1), torch.arange(600) % 3
    first, other = simulated(rng, 5, 600, better=0.3)
    row = compared(first, other, labels, resamples=20000)["overall"]
    a, b = 100 * first.mean(1), 100 * other.mean(1)
    test = scipy.stats.ttest_rel(b, a)
    assert row["p"] == pytest.approx(test.pvalue)
    assert row["interval"] == pytest.approx(tuple(test.confidence_interval()))
    assert row["standard_deviation"] == pytest.approx(np.std(b - a, ddof=1))
    power = TTestPower().power(row["detectable_difference"] / row["standard_deviation"], nobs=5, alpha=0.05)
    assert power == pytest.approx(0.8, abs=1e-4)
    draws = []  # plain two-way resampling
    for _ in range(20000):
        seeds, images = rng.integers(0, 5, 5), rng.integers(0, 600, 600)
        draws.append(100 * (other[seeds][:, images].mean() - first[seeds][:, images].mean()))
    reference = np.quantile(draws, [0.025, 0.975])
    assert row["interval_over_seeds_and_images"] == pytest.approx(reference.tolist(), abs=0.25)


def test_accuracy_intervals_agree_with_scipy():
    labels = torch.arange(600) % 3
    first, _ = simulated(np.random.default_rng(2), 4, 600)
    one = main.accuracy_intervals(evaluations(first[:1], labels), main.Settings())
    wilson = scipy.stats.binomtest(int(first[0].sum()), 600).proportion_ci(method="wilson")
    assert one["overall"] == pytest.approx((100 * first[0].mean(), 100 * wilson.low, 100 * wilson.high))
    many = main.accuracy_intervals(evaluations(first, labels), main.Settings(seeds=4))
    shares = 100 * first[:, labels.numpy() == 1].mean(1)
    interval = scipy.stats.t.interval(0.95, 3, shares.mean(), scipy.stats.sem(shares))
    assert many["b"] == pytest.approx((shares.mean(), *interval), abs=1e-3)


def test_equal_networks_leave_no_nan():
    labels = torch.arange(60) % 3
    right = np.ones((3, 60), bool)
    found = compared(right, right, labels)
    rows = found.values()
    assert all((row["difference"], row["p"], row["verdict"]) == (0, 1, "not distinguishable") for row in rows)
    assert all(row["interval"] == (0, 0) for row in rows) and found["overall"]["detectable_difference"] == 0


@pytest.mark.parametrize("side", ["better", "worse", "not distinguishable"])
@pytest.mark.parametrize("seeds", [1, 5])
def test_verdict_says_what_was_found(side, seeds):
    labels = torch.arange(900) % 3
    shift = {"better": 2.0, "worse": -2.0, "not distinguishable": 0.0}[side]
    found = compared(*simulated(np.random.default_rng(5), seeds, 900, better=shift), labels)
    sentence = main.say_verdict("se_attention", found, main.Settings(seeds=seeds))
    assert found["overall"]["verdict"] == side
    word = {"better": "is better than", "worse": "is worse than"}.get(side, "is not distinguishable from")
    assert f"SE-Attention CNN {word} Baseline CNN" in sentence
    assert f"{found['overall']['difference']:+.2f} percentage points" in sentence
    assert ("one seed can't speak for the architecture" in sentence) == (seeds == 1)
    detected = f"{found['overall'].get('detectable_difference', 0):.2f} points 80 % of the time"
    assert (f"So many seeds detect a difference of {detected}" in sentence) == (seeds > 1)
    for word in ("better", "worse"):
        names = [name for name in CLASSES if found[name]["verdict"] == word]
        assert f"{word} on {', '.join(names) or 'none'}" in sentence


@pytest.fixture(scope="module")
def same_networks(tmp_path_factory):
    """Right answers [24, images] of the Baseline and, in turn, of the SE network with its gates held open, by seed."""

    class Open(main.SEBlock):
        def gate(self, x):
            return torch.ones(x.shape[:2])

    patch = pytest.MonkeyPatch()
    patch.setattr(main, "SEBlock", Open)
    settings = main.Settings(dataset="shapes", shapes_train=400, shapes_test=1000, epochs=8, crop_epochs=0)
    settings = main.dataclasses.replace(settings, batch_size=32, stem=4, widths=(16, 16, 16))
    main.prepare_process()
    hardware, data = main.choose_hardware(settings), main.load_data(settings)
    right = []
    for seed in range(24):
        network = ("se_attention", "baseline")[seed % 2]
        of_seed, path = main.dataclasses.replace(settings, seed=seed), tmp_path_factory.mktemp("same") / "model.pth"
        main.train(network, data, of_seed, hardware, path)
        model = main.load_trained(path, network, 10, of_seed, "auto").model
        right.append((main.predict(model, data.test.pixels, hardware).argmax(1) == data.test.labels).numpy())
    patch.undo()
    assert 0.2 < np.mean(right) < 0.99 and np.std(np.mean(right, 1)) > 0.003  # they learn, and seeds matter
    return np.stack(right)


def test_networks_that_are_the_same_are_seldom_told_apart(same_networks, monkeypatch):
    """1,000 experiments of 5 seeds each, drawn from trained networks that differ in their seeds alone. (With 200, one
    such test in fifty would end outside these bounds by chance.)"""
    monkeypatch.setattr("gc.collect", lambda: 0)  # statsmodels' Holm calls it each time, a quarter of a second
    rng, labels = np.random.default_rng(0), torch.arange(same_networks.shape[1]) % 3
    told = 0
    for _ in range(1000):
        order = rng.permutation(len(same_networks))
        found = compared(same_networks[order[:5]], same_networks[order[5:10]], labels, resamples=10)
        told += found["overall"]["verdict"] != "not distinguishable"
    assert 0.02 <= told / 1000 <= 0.08, told
