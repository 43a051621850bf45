"""Tables: numbers that stay numbers until they are printed.

In come results; out come tables, which become rows of a spreadsheet, Markdown, or LaTeX.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from lab.measure import people
from lab.measure.attributes import Association
from lab.measure.failures import Dossier, Transition
from lab.measure.retest import Retest
from lab.measure.statistics import Difference, Interval
from lab.measure.stress import Outcome
from lab.report import sentences
from lab.report.measurements import Metric, changes_by_network, measurements
from lab.report.results import Results

# Headings that columns are found by
P_HOLM = "p (Holm)"
ERROR = "error (%)"

Style = str | Callable[[float], str]  # how a number is printed: a format, or what makes its text


@dataclass(frozen=True)
class Column:
    """Numbers under a heading, one for each row of a table, some with an interval, or None."""

    heading: str
    numbers: Sequence[Interval | float | None]
    formats: Sequence[Style]
    network: str = ""  # whose numbers they are, where the heading does not say it

    def texts(self) -> list[str]:
        texts = []
        for number, style in zip(self.numbers, self.formats, strict=True):
            if number is None:
                texts.append("")
            elif isinstance(number, Interval):
                texts.append(printed_interval(number, style))
            else:
                texts.append(printed(number, style))
        return texts


def printed_interval(interval: Interval, style: Style) -> str:
    """The value with its bounds; alone where nothing varied that its uncertainty could be seen by,
    as of one seed's temperature, which the test images have no part in."""
    value = printed(interval.value, style)
    if interval.low == interval.high:
        return value
    return f"{value} ({printed(interval.low, style)} to {printed(interval.high, style)})"


def printed(number: float, style: Style) -> str:
    return format(number, style) if isinstance(style, str) else style(number)


@dataclass(frozen=True)
class Table:
    """Numbers stay numbers until `texts`."""

    heading: str  # of the names
    names: Sequence[str]  # of the rows
    columns: list[Column] = field(default_factory=list)

    def add(
        self,
        heading: str,
        numbers: Sequence[Interval | float | None],
        style: Style,
        network: str = "",
    ) -> None:
        self.columns.append(Column(heading, numbers, [style] * len(numbers), network))

    def texts(self) -> pd.DataFrame:
        """As people read it: a network is named at the first of its columns."""
        texts = pd.DataFrame([column.texts() for column in self.columns]).T
        headings = []
        network_before = ""
        for column in self.columns:
            is_named = column.network in ("", network_before)
            headings.append(column.heading if is_named else f"{column.network}: {column.heading}")
            network_before = column.network
        return texts.set_axis(headings, axis=1).set_axis(list(self.names), axis=0)

    def only(self, names: Collection[str]) -> Table:
        """The rows of these names."""
        places = [k for k, name in enumerate(self.names) if name in names]
        table = Table(self.heading, [self.names[k] for k in places])
        for column in self.columns:
            numbers = [column.numbers[k] for k in places]
            formats = [column.formats[k] for k in places]
            table.columns.append(dataclasses.replace(column, numbers=numbers, formats=formats))
        return table

    def rows(self) -> pd.DataFrame:
        """The numbers as they are, for spreadsheets; an interval's bounds have columns too."""
        columns: dict[str, Any] = {self.heading: list(self.names)}
        for column in self.columns:
            heading = f"{column.network}: {column.heading}" if column.network else column.heading
            intervals = [one for one in column.numbers if isinstance(one, Interval)]
            if not intervals:
                columns[heading] = column.numbers
                continue
            for bound in dataclasses.fields(Interval):
                name = heading if bound.name == "value" else f"{heading}, {bound.name}"
                columns[name] = [bound_of(number, bound.name) for number in column.numbers]
        return pd.DataFrame(columns)


def bound_of(number: Interval | float | None, bound: str) -> float | None:
    """The value, or a bound, of what may have none."""
    if isinstance(number, Interval):
        return getattr(number, bound)
    return number if bound == "value" else None


def accuracy_table(results: Results) -> Table:
    """By class and overall: each network's accuracy, each other network's change with its test."""
    table = Table("Class", [*results.classes, "Overall"])
    for of_network in results.networks:
        accuracy = [*of_network.accuracy.by_class, of_network.accuracy.overall]
        table.add(of_network.network.title, [one.value for one in accuracy], ".2f")
    for comparison in results.comparisons:
        groups = [*comparison.by_class, comparison.overall]
        title = comparison.network.title
        differences = [group.difference for group in groups]
        table.add("change", [one.interval.value for one in differences], "+.2f", title)
        table.add("from", [one.interval.low for one in differences], "+.2f", title)
        table.add("to", [one.interval.high for one in differences], "+.2f", title)
        ps = [one.p_holm for one in differences]
        table.add("p (of classes: Holm)", ps, sentences.p_of_table, title)
    return table


def networks_table(results: Results) -> Table:
    """A row for each network: what it costs, its accuracy, its change with both tests."""
    table = Table("Network", [of_network.network.title for of_network in results.networks])
    table.add("parameters", [of_network.parameters() for of_network in results.networks], ",")
    accuracy = [of_network.accuracy.overall for of_network in results.networks]
    differences = [comparison.overall.difference for comparison in results.comparisons]
    add_accuracy(table, accuracy, differences)
    return table


def retest_table(results: Results, retest: Retest) -> Table:
    """The same on the new images."""
    table = Table("Network", [of_network.network.title for of_network in results.networks])
    differences = [group.difference for group in retest.compared.values()]
    add_accuracy(table, list(retest.accuracy.values()), differences)
    return table


def add_accuracy(
    table: Table, accuracy: Sequence[Interval], differences: Sequence[Difference]
) -> None:
    """A row for each network; the `differences` are the others' from the first."""
    table.add("accuracy (%)", accuracy, ".2f")
    if not differences:
        return
    p_style = sentences.p_of_table
    table.add("change (points)", [None, *[one.interval for one in differences]], "+.2f")
    table.add("p", [None, *[one.p_holm for one in differences]], p_style)
    table.add("p against the margin", [None, *[one.margin_p_holm for one in differences]], p_style)
    margins = [one.smallest_margin for one in differences]
    table.add("smallest margin shown", [None, *margins], ".2f")


def stress_table(stress: Outcome) -> Table:
    """What was tried, and each network's result."""
    measured = {one.network.title: list(measurements(one)) for one in stress.networks}
    metrics: dict[str, Metric] = {}
    for of_network in sorted(measured.values(), key=len, reverse=True):  # the longest has the order
        for measurement in of_network:
            metrics.setdefault(measurement.metric.key, measurement.metric)
    formats = [f".{metric.digits}f" for metric in metrics.values()]
    table = Table("Stress test", [metric.title() for metric in metrics.values()])
    table.add("better", [metric.better for metric in metrics.values()], direction)
    for title, of_network in measured.items():
        shown = {one.metric.key: one.estimate.interval for one in of_network}
        table.columns.append(Column(title, [shown.get(key) for key in metrics], formats))
    signed = [f"+{style}" for style in formats]
    for network, changes in changes_by_network(stress).items():
        intervals = [changes[key].interval if key in changes else None for key in metrics]
        ps = [changes[key].p_holm if key in changes else None for key in metrics]
        table.columns.append(Column("change", intervals, signed, network.title))
        table.add(P_HOLM, ps, sentences.p_of_table, network.title)
    return table


def direction(better: float) -> str:
    """Which way a metric is better."""
    if better == 0:
        return ""
    return "more" if better > 0 else "less"


def main_stress_table(stress: Outcome) -> Table:
    """The rows of the stress tests that the paper has room for."""
    shown = set()
    for one in stress.networks:
        shown |= {found.metric.title() for found in measurements(one) if found.metric.shown}
    return stress_table(stress).only(shown)


def narrow(whole: Table, of_networks: Mapping[str, Column], level: float) -> Table:
    """For many networks: of each one column without intervals, under its title.

    A star stands where the change beside it, in the `whole` table, is beyond chance.
    """
    ps = {column.network: column for column in whole.columns if column.heading == P_HOLM}
    table = Table(whole.heading, whole.names)
    for title, column in of_networks.items():
        numbers = [bound_of(number, "value") for number in column.numbers]
        formats: list[Style] = []
        for k, style in enumerate(column.formats):
            p = ps[title].numbers[k] if title in ps else None
            is_beyond_chance = isinstance(p, float) and p < level
            formats.append(partial(starred, style=style) if is_beyond_chance else style)
        table.columns.append(Column(title, numbers, formats))
    return table


def starred(number: float, style: Style) -> str:
    return f"{printed(number, style)}*"


def narrow_stress_table(stress: Outcome) -> Table:
    """The rows of the stress tests that the paper has room for, of many networks."""
    whole = main_stress_table(stress)
    titles = [one.network.title for one in stress.networks]
    own = {column.heading: column for column in whole.columns if column.heading in titles}
    return narrow(whole, own, stress.level)


def narrow_people_table(results: Results, scores: people.Scores) -> Table:
    """Many networks' errors by how many people agree with the label."""
    whole = people_table(results, scores)
    own = {column.network: column for column in whole.columns if column.heading == ERROR}
    return narrow(whole, own, results.setup.rules.level)


def transitions_table(results: Results, dossier: Dossier) -> Table:
    """What becomes of the test images from the first network to each other one."""
    first = results.networks[0].network.title
    table = Table(f"From {first}: images", [str(way) for way in Transition])
    style = sentences.count_style(len(results.setup.seeds))
    for one in dossier.transitions:
        counts = [float(one.counts[way].mean()) for way in Transition]
        table.add(f"to {one.network.title}", counts, style)
    return table


def mistakes_table(results: Results, dossier: Dossier) -> Table:
    """Mistakes by least confidence."""
    levels = dossier.mistakes[0].levels
    table = Table("Mistakes of at least", [f"{level:g} % confidence" for level in levels])
    style = sentences.count_style(len(results.setup.seeds))
    for one in dossier.mistakes:
        title = one.network.title
        table.add("as trained", one.as_trained.mean(0).tolist(), style, title)
        table.add("temperature scaled", one.scaled.mean(0).tolist(), style, title)
    return table


def people_table(results: Results, scores: people.Scores) -> Table:
    """Mistakes by how many people agree with the label."""
    groups = scores.groups
    names = []
    for group in groups:
        upper = "and more" if group.high > 100 else f"to {group.high:g}"
        names.append(f"{group.low:g} {upper}")
    table = Table("Percent of people that choose the label", names)
    table.add("images", [group.images for group in groups], ",")
    first, *others = [of_network.network for of_network in results.networks]
    style = sentences.count_style(len(results.setup.seeds))
    for network in (first, *others):
        mistakes = [group.mistakes[network.key] for group in groups]
        table.add("mistakes", mistakes, style, network.title)
        errors = [group.error[network.key] for group in groups]
        table.add(ERROR, errors, ".2f", network.title)
        if network is not first:
            changes = [group.change[network.key] for group in groups]
            table.add("change", [one.interval for one in changes], "+.2f", network.title)
            ps = [one.p_holm for one in changes]
            table.add(P_HOLM, ps, sentences.p_of_table, network.title)
    return table


def classes_table(results: Results, dossier: Dossier) -> Table:
    """Precision, recall and F1 by class, and their means over the classes."""
    table = Table("Class", [*results.classes, "Mean (macro)"])
    for scores in dossier.scores:
        title = scores.network.title
        for heading, by_seed in (
            ("precision", scores.precision),
            ("recall", scores.recall),
            ("F1", scores.f1),
        ):
            by_class = by_seed.mean(0)
            table.add(heading, [*by_class.tolist(), float(by_class.mean())], ".2f", title)
    return table


def confusions_table(results: Results, dossier: Dossier) -> Table:
    """The pairs of classes that all networks together confuse most, in percent of their images."""
    names = []
    for pair in dossier.pairs:
        names.append(f"{results.classes[pair.first_class]}, {results.classes[pair.second_class]}")
    table = Table("Taken for each other (%)", names)
    for of_network in results.networks:
        network = of_network.network
        pairs = dossier.pairs
        table.add(network.title, [pair.error[network.key] for pair in pairs], ".2f")
        if network is not results.networks[0].network:
            changes = [pair.change[network.key] for pair in pairs]
            table.add("change (points)", changes, "+.2f", network.title)
    return table


def associations_table(results: Results, dossier: Dossier) -> Table:
    """How each network's mistakes go with attributes of the images."""
    first_key = results.networks[0].network.key
    by_network: dict[str, list[Association]] = {}
    for association in dossier.associations:
        by_network.setdefault(association.network.key, []).append(association)
    table = Table(
        "Rank correlation of mistakes with", [one.attribute for one in by_network[first_key]]
    )
    for of_network in results.networks:
        correlations = [one.correlation for one in by_network[of_network.network.key]]
        table.add(of_network.network.title, correlations, "+.3f")
    return table


def layers_table(results: Results) -> Table:
    """What each part of each network costs, and all of it."""
    longest = max(results.networks, key=lambda of_network: len(of_network.layers))
    names = [layer.name for layer in longest.layers]
    table = Table("Layer", [*names, "all"])
    for of_network in results.networks:
        costs = {layer.name: layer for layer in of_network.layers}
        parameters = [costs[name].parameters if name in costs else None for name in names]
        multiply_adds = [costs[name].multiply_adds if name in costs else None for name in names]
        title = of_network.network.title
        table.add("parameters", [*parameters, of_network.parameters()], ",", title)
        table.add("multiply-adds", [*multiply_adds, of_network.multiply_adds()], ",", title)
    return table


def parameters_table(results: Results) -> Table:
    """The parameters alone, for many networks."""
    whole = layers_table(results)
    table = Table(whole.heading, whole.names)
    for column in whole.columns:
        if column.heading == "parameters":
            table.add(column.network, column.numbers, ",")
    return table


TABLES: dict[str, Callable[[Results], Table]] = {
    "networks": networks_table,
    "accuracy": accuracy_table,
    "layers": layers_table,
}

FAILURE_TABLES: dict[str, Callable[[Results, Dossier], Table]] = {
    "transitions": transitions_table,
    "sure_mistakes": mistakes_table,
    "classes": classes_table,
    "confusions": confusions_table,
    "associations": associations_table,
}


def failure_tables(results: Results, dossier: Dossier) -> dict[str, Table]:
    """The dossier's tables by name; one on people only where their answers are there."""
    made = {name: make(results, dossier) for name, make in FAILURE_TABLES.items()}
    if dossier.people is not None:
        made["people"] = people_table(results, dossier.people)
    return made


def all_tables(results: Results) -> Iterator[tuple[str, Table]]:
    """The name of each table, and the table, of what is known."""
    for name, make in TABLES.items():
        yield name, make(results)
    if results.retest is not None:
        yield "retest", retest_table(results, results.retest)
    if results.failures is not None:
        yield from failure_tables(results, results.failures).items()
    if results.stress is not None:
        yield "stress_tests", stress_table(results.stress)


def in_markdown(table: Table) -> str:
    texts = table.texts()
    headings = [table.heading, *texts.columns]
    align = ["left"] + ["right"] * texts.shape[1]
    return texts.to_markdown(headers=headings, colalign=align, disable_numparse=True)


def in_latex(table: Table, names: str = "l") -> str:
    """A tabular environment, whose first column is laid out as LaTeX's `names`."""
    texts = table.texts()
    escaped = texts.map(latex_text).rename(latex_text, axis=0).rename(latex_text, axis=1)
    return escaped.style.to_latex(column_format=names + "r" * texts.shape[1], hrules=True)


# What LaTeX would read as a command
LATEX_LETTERS = {letter: f"\\{letter}" for letter in "%_&#${}"}
LATEX_LETTERS["\\"] = r"\textbackslash{}"
LATEX_LETTERS["^"] = r"\textasciicircum{}"
LATEX_LETTERS["~"] = r"\textasciitilde{}"


def latex_text(value: Any) -> str:
    """A value as LaTeX prints it: no exponents, minus signs, and what LaTeX would read escaped."""
    if isinstance(value, float):
        return np.format_float_positional(value, trim="-")
    text = "".join(LATEX_LETTERS.get(letter, letter) for letter in str(value))
    text = re.sub(r"(?<!\w)-(?=\d)", "$-$", text)  # a minus sign, not a hyphen
    return text.replace(r" \%", r"\,\%")
