"""What is said of verdicts, mistakes and corruptions, whichever way it fell."""

import dataclasses

import numpy as np
import pytest
import scipy.stats
from helpers import BASELINE, SE, comparison

from lab.measure import corruptions, statistics
from lab.measure.failures import SureMistakes
from lab.measure.statistics import Comparison, Difference, TTest, Verdict
from lab.measure.stress import Outcome
from lab.report import sentences


def test_a_network_that_is_less_sure_is_not_called_better():
    def mistakes(network, as_trained, scaled, p_as_trained=1.0, p_scaled=1.0):
        return SureMistakes(
            network, (90.0,), np.array([[as_trained]]), np.array([[scaled]]),
            (p_as_trained,), (p_scaled,),
        )  # fmt: skip

    (said,) = sentences.say_sureness(
        [mistakes(BASELINE, 30, 20), mistakes(SE, 10, 22, 0.001)], 0.05
    )
    assert said == (
        "At 90 % confidence SE-Attention makes fewer mistakes than Baseline as trained (10 and 30,"
        " p = 0.001), and no difference is found once the temperature is scaled (22 and 20, p = 1):"
        " as far as this tells, it is less sure, not better."
    )
    better = mistakes(SE, 10, 12, 0.001, 0.01)
    assert sentences.say_sureness([mistakes(BASELINE, 30, 20), better], 0.05) == []
    assert (
        sentences.say_sureness([mistakes(BASELINE, 30, 20), mistakes(SE, 29, 22, 0.7)], 0.05) == []
    )
    (said,) = sentences.say_sureness(
        [mistakes(BASELINE, 10, 22), mistakes(SE, 30, 20, 0.001)], 0.05
    )
    assert said.endswith("it is surer, not worse.")


def test_results_say_which_corruptions_were_used(made_tiny_run):
    found = comparison(made_tiny_run)["corruptions"]
    assert found["count"] == 18 and found["extra_count"] == 4
    assert found["source"] == "made by main.py" and found["reference"] == ""
    assert found["names"] == [corruption.name for corruption in corruptions.ALL]
    summary = (made_tiny_run / "results" / "summary.md").read_text()
    assert "made by main.py; means are over 14 of the benchmark's 15 corruptions" in summary
    assert found["verdicts"] in summary and "Under corruption, SE-Attention CNN is" in summary


def test_the_whole_benchmark_has_a_published_result_beside_it():
    names = [corruption.name for corruption in corruptions.ALL] + ["frost"]
    corrupted = dict.fromkeys(names, np.zeros((32, 32, 3)))
    for official, left_out, told in (
        (True, None, True),
        (True, "fog", False),
        (False, None, False),
    ):
        tried = {name: pixels for name, pixels in corrupted.items() if name != left_out}
        stress = Outcome((), (), np.zeros(()), tried, official, 0.1, 0.05)
        assert ("73.46 %" in sentences.corruption_reference(stress)) == told
        some = "14 of " if left_out else ""
        assert sentences.mean_is_over(stress) == f"{some}the benchmark's 15 corruptions"


CLASSES = ("a", "b", "c")
RULES = statistics.Settings(resamples=2000)


def simulated(rng, seeds, images=300, better=0.0):
    """Two networks' right answers [2, seeds, images]; images differ in difficulty, seeds too."""
    difficulty = rng.normal(1.5, 1.5, images)
    luck = rng.normal(0, 0.3, (2, seeds, 1)) + np.array([0, better])[:, None, None]
    return rng.random((2, seeds, images)) < 1 / (1 + np.exp(-(difficulty + luck)))


def compared(first, other, labels):
    """The comparison of right answers [seeds, images]."""
    gains = other.astype(int) - first.astype(int)
    found = statistics.compare(gains, labels, len(CLASSES), RULES, 42)
    return Comparison(SE, BASELINE, *found)


def difference(value, half, **more):
    """A difference whose interval reaches `half` on both sides, and its verdict."""
    error = half / scipy.stats.t.ppf(0.975, 4)
    test = TTest(value, error, error * np.sqrt(5), 4)
    p, margin_p = test.p(), test.margin_p(0.5)
    found = Difference(test.interval(0.95), p, p, margin_p, margin_p, test.interval(0.9))
    return statistics.decide(dataclasses.replace(found, **more), 0.05)


VERDICTS = {
    "SE-Attention CNN is better than Baseline CNN": difference(0.9, 0.3),
    "SE-Attention CNN is worse than Baseline CNN": difference(-0.9, 0.3),
    "SE-Attention CNN is better than Baseline CNN, by less than the margin of 0.5 points":
        difference(0.2, 0.1),
    "SE-Attention CNN is worse than Baseline CNN, by less than the margin of 0.5 points":
        difference(-0.2, 0.1),
    "SE-Attention CNN is equivalent to Baseline CNN within 0.5 points": difference(0.1, 0.2),
    "SE-Attention CNN is undecided against Baseline CNN, neither better nor worse nor equivalent "
    "within 0.5 points": difference(-0.23, 0.6),
}  # fmt: skip


@pytest.mark.parametrize("said", VERDICTS)
def test_the_verdict_is_named(said):
    assert sentences.name_verdict(VERDICTS[said], SE, BASELINE, 0.5) == said


@pytest.mark.parametrize("better", [2.0, -2.0, 0.0])
@pytest.mark.parametrize("seeds", [1, 5])
def test_verdict_says_what_was_found(better, seeds, monkeypatch):
    monkeypatch.setattr("gc.collect", lambda: 0)  # statsmodels' Holm would, for a long time
    labels = np.arange(900) % 3
    found = compared(*simulated(np.random.default_rng(5), seeds, 900, better=better), labels)
    sentence = sentences.say_verdict(found, CLASSES, RULES)
    clause = sentences.name_verdict(found.overall.difference, SE, BASELINE, 0.5)
    assert clause in sentence
    expected = {2.0: Verdict.BETTER, -2.0: Verdict.WORSE, 0.0: Verdict.UNDECIDED}
    assert found.overall.difference.verdict is expected[better]
    assert f"{found.overall.difference.interval.value:+.2f} percentage points" in sentence
    assert ("One seed can't speak for the architecture" in sentence) == (seeds == 1)
    assert ("As trained here" in sentence) == (seeds == 1)
    if seeds > 1:
        planning = found.overall.over_seeds.planning
        assert f"{planning.detectable_difference:.2f} points 80 % of the time" in sentence
        assert f"equivalent within {planning.provable_margin:.2f}" in sentence
    for side in (Verdict.BETTER, Verdict.WORSE, Verdict.EQUIVALENT):
        groups = zip(CLASSES, found.by_class, strict=True)
        names = [name for name, group in groups if group.difference.verdict is side]
        assert f"{side} on {', '.join(names) or 'none'}" in sentence
