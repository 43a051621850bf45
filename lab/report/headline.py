"""What matters first: the verdict, what would decide it, and what else is beyond chance.

In come results; out come a few sentences, the same for the terminal, the summary and the page.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lab.machine import console
from lab.measure.comparison import Comparison
from lab.measure.planning import MOST_SEEDS, SeedCount
from lab.measure.statistics import Verdict
from lab.report import sentences
from lab.report.measurements import beyond_chance, changes_from_first
from lab.report.results import Results

MOST_FINDINGS = 3
MORE_SEEDS = 5  # what is advised after one


@dataclass(frozen=True)
class Headline:
    """A run in a few sentences."""

    question: str
    verdict: str
    decides: str  # what would; "" where nothing is open
    findings: tuple[str, ...]  # what survives its tests
    made: str  # of what, on what and when
    command: str

    def lines(self) -> list[str]:
        """For a terminal."""
        shown = []
        for sentence in (self.verdict, self.decides):
            shown += console.wrapped(sentence, others="")
        for finding in self.findings:
            shown += console.wrapped(finding, first="- ")
        return shown


def headline(results: Results) -> Headline:
    """The run in a few sentences."""
    compared = [of_network.network for of_network in results.networks[1:]]
    setup = results.setup
    seeds = list(setup.seeds)
    of_seeds = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"
    made = [
        f"{results.dataset}, {of_seeds}, {sentences.number_of(setup.epochs, 'epoch')}",
        f"{results.hardware.description}, {results.hardware.precision}",
        setup.date,
    ]
    if setup.commit:
        made.append(f"commit {setup.commit}")
    return Headline(
        question=f"{sentences.ask(compared)} a Small Convolutional Network on {results.dataset}?",
        verdict=sentences.say_conclusion(results) or say_accuracy(results),
        decides=say_what_decides(results),
        findings=tuple(find_beyond_chance(results))[:MOST_FINDINGS],
        made="; ".join(made),
        command=setup.command,
    )


def say_accuracy(results: Results) -> str:
    """Where nothing is compared."""
    said = []
    for of_network in results.networks:
        accuracy = of_network.accuracy.overall
        interval = f"{accuracy.value:.2f} % ({sentences.bounds(accuracy, '.2f')})"
        said.append(f"{of_network.network.title} CNN: {interval} of the test images.")
    return " ".join(said)


def say_what_decides(results: Results) -> str:
    """How many seeds would, and how long they would take here."""
    seeds = len(results.setup.seeds)
    if seeds == 1 and results.comparisons:
        return (
            "One seed can't speak for the architecture, and another may turn round what follows: "
            f"--seeds {MORE_SEEDS} says more, in about {minutes(results, MORE_SEEDS - seeds)} more "
            "here."
        )
    needed = 0
    for counted in counts_that_decide(results.comparisons):
        if counted.seeds is None:
            return f"As far as these seeds tell, not even {MOST_SEEDS:,} would decide it."
        needed = max(needed, counted.seeds)
    if needed <= seeds:
        return ""
    return (
        f"As far as these seeds tell, {needed} would decide it: --seeds {needed}, in about "
        f"{minutes(results, needed - seeds)} more here. That look is counted, and has a stricter "
        "level."
    )


def counts_that_decide(comparisons: Sequence[Comparison]) -> Iterator[SeedCount]:
    """How many seeds would decide each comparison that is open, where that can be planned."""
    for comparison in comparisons:
        over_seeds = comparison.overall.over_seeds
        is_open = comparison.overall.difference.verdict is Verdict.UNDECIDED
        if is_open and over_seeds is not None and over_seeds.planning.deciding is not None:
            yield over_seeds.planning.deciding


def minutes(results: Results, seeds: int) -> str:
    """How long so many seeds' trainings would take, in words."""
    of_one_seed = sum(of_network.runs[0].seconds for of_network in results.networks)
    total = seeds * of_one_seed / results.hardware.at_once / 60
    if total < 1:
        return "a minute"
    return f"{total:.0f} minutes" if total < 120 else f"{total / 60:.0f} hours"


def find_beyond_chance(results: Results) -> Iterator[str]:
    """What else differs from the first network, corrected; the stress tests' surest first."""
    whose = sentences.as_trained_here(len(results.setup.seeds))
    for comparison in results.comparisons:
        for verdict in (Verdict.BETTER, Verdict.WORSE):
            names = sentences.classes_with(verdict, comparison, results.classes)
            if names != "none":
                yield f"By class {comparison.network.title}{whose} is {verdict} on {names}."
    if results.stress is None:
        return
    surviving = beyond_chance(changes_from_first(results.stress), results.stress.level)
    shown = [one for one in surviving if one.metric.shown]
    for change in sorted(shown, key=lambda one: one.p_holm):
        yield f"{sentences.say_change(change)}{sentences.say_direction(change)}."
    if not shown:
        yield (
            "In the stress tests none of the results chosen beforehand to be shown differs beyond "
            "chance."
        )
