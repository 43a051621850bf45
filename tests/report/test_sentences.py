"""What is said of verdicts, mistakes and corruptions, whichever way it fell."""

import dataclasses

import numpy as np
import pytest
import scipy.stats
from helpers import BASELINE, SE, comparison

from lab.measure import comparison as comparison_of
from lab.measure import corruptions, statistics
from lab.measure.comparison import Comparison
from lab.measure.failures import SureMistakes
from lab.measure.looks import Look
from lab.measure.statistics import Difference, TTest, Verdict
from lab.measure.stress import Outcome
from lab.report import measurements, sentences, summary


def test_one_is_not_said_as_many():
    assert sentences.number_of(1, "epoch") == "1 epoch"
    assert sentences.number_of(15, "epoch") == "15 epochs"


def test_what_the_temperature_takes_away_is_said():
    """Where the change as trained, and what scaling does to it, are both beyond chance."""

    def mistakes(network, as_trained, scaled, p_as_trained=1.0, p_scaled=1.0, p_of_scaling=1.0):
        return SureMistakes(
            network, (90.0,), np.array([[as_trained]]), np.array([[scaled]]),
            (p_as_trained,), (p_scaled,), (p_of_scaling,),
        )  # fmt: skip

    baseline = mistakes(BASELINE, 30, 20)
    (said,) = sentences.say_sureness([baseline, mistakes(SE, 10, 22, 0.001, 0.7, 0.004)], 0.05)
    assert said == (
        "At 90 % confidence SE-Attention makes fewer mistakes than Baseline as trained (10 and 30,"
        " p = 0.001); scaling the temperature changes that (to 22 and 20; p = 0.004 of no such"
        " change, p = 0.7 of no difference afterwards)."
    )
    # one significant and one not is no difference between the two
    assert sentences.say_sureness([baseline, mistakes(SE, 10, 17, 0.04, 0.06, 0.5)], 0.05) == []
    assert sentences.say_sureness([baseline, mistakes(SE, 29, 22, 0.7, 0.7, 0.01)], 0.05) == []
    (said,) = sentences.say_sureness(
        [mistakes(BASELINE, 10, 22), mistakes(SE, 30, 20, 0.001, 0.9, 0.001)], 0.05
    )
    assert "makes more mistakes" in said


def test_results_say_which_corruptions_were_used(made_tiny_run):
    found = comparison(made_tiny_run)["corruptions"]
    assert found["count"] == 18 and found["extra_count"] == 4
    assert found["source"] == "made by main.py" and found["reference"] == ""
    assert found["names"] == [corruption.name for corruption in corruptions.ALL]
    summary = (made_tiny_run / "results" / "summary.md").read_text()
    assert "made by main.py; means are over 14 of the benchmark's 15 corruptions" in summary
    assert found["verdicts"] in summary
    assert "Under corruption, SE-Attention CNN as trained here is" in summary


def test_the_whole_benchmark_has_a_published_result_beside_it():
    names = [corruption.name for corruption in corruptions.ALL] + ["frost"]
    corrupted = dict.fromkeys(names, np.zeros((32, 32, 3)))
    for official, left_out, told in (
        (True, None, True),
        (True, "fog", False),
        (False, None, False),
    ):
        tried = {name: pixels for name, pixels in corrupted.items() if name != left_out}
        stress = Outcome((), (), np.zeros(()), tried, None, official, 0.05)
        assert ("73.46 %" in sentences.corruption_reference(stress)) == told
        some = "14 of " if left_out else ""
        assert sentences.mean_is_over(stress) == f"{some}the benchmark's 15 corruptions"


CLASSES = ("a", "b", "c")
RULES = statistics.Settings()


def simulated(rng, seeds, images=300, better=0.0):
    """Two networks' right answers [2, seeds, images]; images differ in difficulty, seeds too."""
    difficulty = rng.normal(1.5, 1.5, images)
    luck = rng.normal(0, 0.3, (2, seeds, 1)) + np.array([0, better])[:, None, None]
    return rng.random((2, seeds, images)) < 1 / (1 + np.exp(-(difficulty + luck)))


def compared(first, other, labels):
    """The comparison of right answers [seeds, images]."""
    gains = other.astype(int) - first.astype(int)
    found = comparison_of.compare(gains, labels, len(CLASSES), RULES)
    return Comparison(SE, BASELINE, *found)


def difference(value, half, **more):
    """A difference whose interval reaches `half` on both sides, and its verdict."""
    error = half / scipy.stats.t.ppf(0.975, 4)
    test = TTest(value, error, error * np.sqrt(5), 4)
    p, margin_p = test.p(), test.margin_p(0.5)
    found = Difference(test.interval(0.95), p, p, margin_p, margin_p, test.interval(0.9), 0.9)
    return statistics.decide(dataclasses.replace(found, **more), 0.05)


VERDICTS = {
    "SE-Attention CNN is better than Baseline CNN": difference(0.9, 0.3),
    "SE-Attention CNN is worse than Baseline CNN": difference(-0.9, 0.3),
    "SE-Attention CNN is better than Baseline CNN, by less than the margin of 0.5 points":
        difference(0.2, 0.1),
    "SE-Attention CNN is worse than Baseline CNN, by less than the margin of 0.5 points":
        difference(-0.2, 0.1),
    "SE-Attention CNN is equivalent to Baseline CNN within 0.5 points": difference(0.1, 0.2),
    "SE-Attention CNN is undecided against Baseline CNN: neither a difference is shown nor that "
    "there is none of 0.5 points": difference(-0.23, 0.6),
}  # fmt: skip


@pytest.mark.parametrize("said", VERDICTS)
def test_the_verdict_is_named(said):
    assert sentences.name_verdict(VERDICTS[said], SE, BASELINE, 0.5, seeds=5) == said
    of_one_seed = sentences.name_verdict(VERDICTS[said], SE, BASELINE, 0.5, seeds=1)
    assert of_one_seed == said.replace("Attention CNN is", "Attention CNN as trained here is")


def test_without_a_margin_nothing_is_said_of_one():
    undecided = difference(-0.23, 0.6)
    said = sentences.name_verdict(undecided, SE, BASELINE, margin=0, seeds=5)
    assert said == "SE-Attention CNN is undecided against Baseline CNN: no difference is shown"


@pytest.mark.parametrize("better", [2.0, -2.0, 0.0])
@pytest.mark.parametrize("seeds", [1, 5])
def test_verdict_says_what_was_found(better, seeds, monkeypatch):
    monkeypatch.setattr("gc.collect", lambda: 0)  # statsmodels' Holm would, for a long time
    labels = np.arange(900) % 3
    found = compared(*simulated(np.random.default_rng(5), seeds, 900, better=better), labels)
    sentence = sentences.say_verdict(found, CLASSES, RULES)
    clause = sentences.name_verdict(found.overall.difference, SE, BASELINE, 0.5, seeds)
    assert clause in sentence
    expected = {2.0: Verdict.BETTER, -2.0: Verdict.WORSE, 0.0: Verdict.UNDECIDED}
    assert found.overall.difference.verdict is expected[better]
    assert f"{found.overall.difference.interval.value:+.2f} percentage points" in sentence
    assert ("One seed can't speak for the architecture" in sentence) == (seeds == 1)
    assert ("as trained here" in sentence) == (seeds == 1)
    smallest = found.overall.difference.smallest_margin
    assert f"shown to be equivalent is {smallest:.2f} points" in sentence
    if seeds > 1:
        planning = found.overall.over_seeds.planning
        assert f"{planning.detectable_difference:.2f} points 80 % of the time" in sentence
        assert f"equivalent within {planning.provable_margin:.2f}" in sentence
    for side in (Verdict.BETTER, Verdict.WORSE, Verdict.EQUIVALENT):
        groups = zip(CLASSES, found.by_class, strict=True)
        names = [name for name, group in groups if group.difference.verdict is side]
        assert f"{side} on {', '.join(names) or 'none'}" in sentence


def test_a_further_look_is_said_with_its_level(results):
    """A first one is not, nor one seed after it."""
    setup = dataclasses.replace(results.setup, seeds=range(42, 52))
    first = Look(tuple(range(42, 47)), 0.05)
    second = Look(tuple(range(42, 52)), 0.005)
    rules = dataclasses.replace(results.setup.rules, level=0.005)
    setup = dataclasses.replace(setup, rules=rules)
    said = sentences.say_looks(dataclasses.replace(results, setup=setup, looks=(first, second)))
    assert "look 2 at these networks, after one at 5 seeds" in said and "0.005" in said
    assert sentences.say_looks(dataclasses.replace(results, setup=setup, looks=(second,))) == ""
    assert sentences.say_looks(dataclasses.replace(results, looks=(first, second))) == ""


def test_what_survives_in_the_table_is_named(results):
    """And only that: with the level at 1 every row, with it at 0 none."""
    every = dataclasses.replace(results.stress, level=1.1)
    said = sentences.say_changes(every)
    rows = measurements.changes_from_first(every)
    assert said.count("; ") + 1 == len(rows) > 30
    assert "from Baseline, of these networks as trained here, in the table" in said
    assert "these are beyond chance" in said
    short = sentences.say_changes_in_short(every)
    assert f"{len(rows)} of {len(rows)} differences" in short
    for row in rows:
        named = f"{row.metric.title()} {row.interval.value:+.{row.metric.digits}f}"
        assert named in said and (named in short) == row.metric.shown
    nothing = dataclasses.replace(results.stress, level=1e-300)
    said = sentences.say_changes(nothing)
    assert said.endswith("none is beyond chance (Holm-corrected over all of them).")
    short = sentences.say_changes_in_short(nothing)
    assert short.startswith(f"In the stress tests none of {len(rows)} differences from Baseline")
    assert short.endswith("is beyond chance, Holm-corrected.")


def test_no_p_is_given_that_is_too_small_to_be_known():
    assert sentences.say_p(1e-140) == "p < 0.0001" and sentences.p_of_table(1e-140) == "<0.0001"
    assert sentences.say_p(0.0497) == "p = 0.0497" and sentences.p_of_table(0.0502) == "0.0502"
    assert sentences.say_p(0.5) == "p = 0.5" and sentences.p_of_table(1.0) == "1"
    assert sentences.say_p(0.0123) == "p = 0.012" and sentences.p_of_table(0.0123) == "0.012"


def test_masked_gradients_are_spoken_of_as_far_as_they_were_tested(results):
    def with_transfer(verdict):
        networks = []
        for one in results.stress.networks:
            transfer = tuple(dataclasses.replace(t, verdict=verdict) for t in one.attacks.transfer)
            scores = dataclasses.replace(one.attacks, transfer=transfer)
            networks.append(dataclasses.replace(one, attacks=scores))
        return dataclasses.replace(results.stress, networks=tuple(networks))

    said = sentences.say_masking(with_transfer(Verdict.UNDECIDED))
    assert said.startswith("What was made for other networks is not shown to fool any more than")
    said = sentences.say_masking(with_transfer(Verdict.WORSE))
    assert "fools Baseline and SE-Attention more" in said and "a sign of masked gradients" in said


def test_a_temperature_that_is_not_known_is_said(results):
    def with_second(**changes):
        first, second = results.stress.networks
        plain = {"nothing_says_how_unsure": False, "is_temperature_largest": False}
        networks = []
        for one, of_it in ((first, plain), (second, {**plain, **changes})):
            calibration = dataclasses.replace(one.calibration, **of_it)
            networks.append(dataclasses.replace(one, calibration=calibration))
        return dataclasses.replace(results.stress, networks=tuple(networks))

    assert sentences.say_temperatures(with_second()) == ""
    said = sentences.say_temperatures(with_second(nothing_says_how_unsure=True))
    assert said.startswith("The temperature of SE-Attention is where its search happened to end")
    said = sentences.say_temperatures(with_second(is_temperature_largest=True))
    assert said.startswith("The temperature of SE-Attention is the largest that was tried")


def test_gates_are_spoken_of_with_their_test(results):
    said = sentences.say_gates(results.stress)
    gates = results.stress.networks[1].gates
    assert f"{gates.change.interval.value:+.2f} points" in said
    assert sentences.say_p(gates.change.p) in said


def test_the_suspects_caption_speaks_of_people_only_where_they_were_asked(results):
    def caption_of(results):
        figures = [figure for part in summary.parts(results) for figure in part.figures]
        (suspects,) = [figure.shows for figure in figures if figure.name == "label_suspects"]
        return suspects

    assert results.failures.people is None
    assert "people" not in caption_of(results)
