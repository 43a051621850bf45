"""What matters first: the verdict, what would decide it, and what survives."""

import dataclasses

import numpy as np
import pytest
from helpers import comparison

from lab.measure import statistics
from lab.measure.comparison import compare_seeds
from lab.measure.statistics import Verdict
from lab.report import headline, sentences
from lab.report.measurements import changes_from_first


def test_its_verdict_is_the_conclusion(results, made_tiny_run):
    head = headline.headline(results)
    assert (
        head.verdict == comparison(made_tiny_run)["conclusion"] == sentences.say_conclusion(results)
    )
    assert head.question.startswith("Does Squeeze-and-Excitation Attention Help a Small")
    assert head.command == results.setup.command and results.setup.date in head.made


def test_one_seed_is_told_to_take_more(results):
    """At the pace of this run: four more seeds of its two trainings, side by side."""
    networks = []
    for of_network in results.networks:
        run = dataclasses.replace(of_network.runs[0], seconds=600)
        networks.append(dataclasses.replace(of_network, runs=(run,)))
    hardware = dataclasses.replace(results.hardware, at_once=2)
    slow = dataclasses.replace(results, networks=tuple(networks), hardware=hardware)
    assert "--seeds 5 says more, in about 40 minutes more here" in headline.headline(slow).decides
    slower = dataclasses.replace(slow, hardware=dataclasses.replace(hardware, at_once=1))
    assert "80 minutes" in headline.headline(slower).decides
    assert headline.minutes(slower, 40) == "13 hours"


def over_seeds(results, gains, verdict):
    """The results with several seeds' comparison, of gains [seeds, images]."""
    rules = results.setup.rules
    (compared,) = results.comparisons
    group = compared.overall
    difference = dataclasses.replace(group.difference, verdict=verdict)
    changed = dataclasses.replace(
        group, over_seeds=compare_seeds(gains, rules), difference=difference
    )
    compared = dataclasses.replace(compared, overall=changed)
    setup = dataclasses.replace(results.setup, seeds=range(42, 42 + len(gains)))
    return dataclasses.replace(results, comparisons=(compared,), setup=setup)


def test_several_seeds_say_how_many_would_decide(results):
    rng = np.random.default_rng(0)
    gains = rng.choice([-1, 0, 1], (3, 10_000), p=[0.04, 0.92, 0.04])
    open_still = over_seeds(results, gains, Verdict.UNDECIDED)
    needed = open_still.comparisons[0].overall.over_seeds.planning.deciding.seeds
    said = headline.headline(open_still).decides
    assert (f"--seeds {needed}" in said) == (needed > 3)
    assert headline.headline(over_seeds(results, gains, Verdict.EQUIVALENT)).decides == ""
    few_images = rng.choice([-1, 0, 1], (3, 30), p=[0.3, 0.4, 0.3])
    said = headline.headline(over_seeds(results, few_images, Verdict.UNDECIDED)).decides
    assert said == "As far as these seeds tell, not even 1,000 would decide it."


@pytest.mark.parametrize("seeds", [1, 3])
def test_one_seeds_classes_are_of_these_networks_alone(results, seeds):
    gains = np.random.default_rng(0).choice([-1, 0, 1], (seeds, 1000))
    compared = results if seeds == 1 else over_seeds(results, gains, Verdict.UNDECIDED)
    (comparison_of_all,) = compared.comparisons
    first, *others = comparison_of_all.by_class
    better = dataclasses.replace(first.difference, verdict=Verdict.BETTER)
    by_class = (dataclasses.replace(first, difference=better), *others)
    found = dataclasses.replace(
        compared, comparisons=(dataclasses.replace(comparison_of_all, by_class=by_class),)
    )
    said = next(headline.find_beyond_chance(found))
    whose = " as trained here" if seeds == 1 else ""
    assert said == f"By class SE-Attention{whose} is better on {results.classes[0]}."


def test_findings_are_those_beyond_chance_the_surest_first(results, stressed, outcome):
    rules = statistics.Settings()
    found = dataclasses.replace(results, stress=outcome)
    shown = [one for one in changes_from_first(outcome) if one.metric.shown]
    surviving = sorted(
        (one for one in shown if one.p_holm < rules.level), key=lambda one: one.p_holm
    )
    findings = list(headline.find_beyond_chance(found))
    of_stress = [finding for finding in findings if not finding.startswith("By class")]
    if surviving:
        assert len(of_stress) == len(surviving)
        assert surviving[0].metric.title() in of_stress[0]
    else:
        assert "none of the results chosen beforehand" in of_stress[0]
    assert len(headline.headline(found).findings) <= 3


@pytest.mark.parametrize(
    ("better", "value", "said"),
    [(1, 2.0, "better"), (1, -2.0, "worse"), (-1, -2.0, "better"), (-1, 2.0, "worse"), (0, 2, "")],
)
def test_which_way_is_better(outcome, better, value, said):
    change = changes_from_first(outcome)[0]
    metric = dataclasses.replace(change.metric, better=better)
    interval = dataclasses.replace(change.interval, value=value)
    changed = dataclasses.replace(change, metric=metric, interval=interval)
    assert sentences.say_direction(changed) == (f", which is {said}" if said else "")


def test_nothing_compared_is_still_told(results):
    head = headline.headline(dataclasses.replace(results, comparisons=(), stress=None))
    assert head.verdict.startswith("Baseline CNN: ") and head.decides == "" and not head.findings
