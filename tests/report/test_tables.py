"""Tables: numbers in their digits, and every network's rows."""

import dataclasses

import pytest
from statsmodels.stats.multitest import multipletests

from lab.measure.statistics import Interval
from lab.report import measurements, sentences, tables


def test_tables_print_numbers_in_their_digits(results):
    texts = tables.accuracy_table(results).texts()
    overall = results.comparisons[0].overall
    change = overall.difference.interval
    assert texts.iloc[-1].tolist() == [
        *(f"{one.accuracy.overall.value:.2f}" for one in results.networks),
        f"{change.value:+.2f}", f"{change.low:+.2f}", f"{change.high:+.2f}",
        sentences.p_of_table(overall.difference.p_holm),
    ]  # fmt: skip
    assert list(texts.index) == [*results.classes, "Overall"]
    table = tables.stress_table(results.stress).texts()
    measured = {m.metric.title(): m for m in measurements.measurements(results.stress.networks[1])}
    assert list(table.index) == list(measured)
    for title, measurement in measured.items():
        digits = measurement.metric.digits
        interval = measurement.estimate.interval
        shown = f"{interval.value:.{digits}f}"
        if interval.low < interval.high:
            shown += f" ({interval.low:.{digits}f} to {interval.high:.{digits}f})"
        assert interval.low <= measurement.estimate.mean() <= interval.high
        assert table.loc[title, "SE-Attention"] == shown
        in_percent = measurement.metric.unit in ("%", "points")
        assert digits == 2 or not in_percent or "area" in title  # which is small


def test_each_row_has_its_change_and_p(results):
    """Holm-corrected over all rows; a row that the first network has not, has neither."""
    table = tables.stress_table(results.stress).texts()
    changes = measurements.changes_from_first(results.stress)
    assert len(changes) > 35
    holm = multipletests([one.p for one in changes], method="holm")[1]
    for change, p in zip(changes, holm, strict=True):
        assert change.p_holm == pytest.approx(p)
        value, low, high = (
            format(x, f"+.{change.metric.digits}f") for x in dataclasses.astuple(change.interval)
        )
        shown = table.loc[change.metric.title()]
        assert shown["SE-Attention: change"] == f"{value} ({low} to {high})"
        assert shown["p (Holm)"] == sentences.p_of_table(p)
    assert table.loc[measurements.GATES_LEARNT.title(), "SE-Attention: change"] == ""
    verdict = results.stress.networks[1].corruptions.change
    assert dataclasses.astuple(changes[0].interval) == pytest.approx(
        dataclasses.astuple(verdict.interval), rel=1e-6
    )
    accuracy = [one.corruptions.mean_accuracy for one in results.stress.networks]
    expected = accuracy[1].mean() - accuracy[0].mean()
    assert changes[0].interval.value == pytest.approx(expected)


def test_a_measurement_that_one_network_alone_has_is_in_the_table(results):
    """Whichever network that is, and however many the others have."""
    first, second = results.stress.networks
    gated = dataclasses.replace(first, gates=second.gates)
    masks = dataclasses.replace(second.heatmaps.grad_cam, pointing=None, overlap=None)
    heatmaps = dataclasses.replace(second.heatmaps, grad_cam=masks)
    less = dataclasses.replace(second, heatmaps=heatmaps, gates=None)
    table = tables.stress_table(dataclasses.replace(results.stress, networks=(gated, less))).texts()
    for metric in (measurements.GATES_LEARNT, measurements.POINTING.at("grad_cam", "Grad-CAM")):
        assert metric.title() in table.index
    assert table.loc[measurements.GATES_LEARNT.title(), "SE-Attention"] == ""


def test_layers_are_listed_for_each_network(results):
    table = tables.layers_table(results).texts()
    se = results.networks[1]
    assert table.loc["all"].tolist()[2:] == [f"{se.parameters():,}", f"{se.multiply_adds():,}"]
    assert table.loc["attention 1"].tolist()[:2] == ["", ""]


def test_what_latex_reads_as_a_command_is_printed():
    """As in a network's title."""
    for title, expected in (
        ("50% of_A & B#1 $x", r"50\% of\_A \& B\#1 \$x"),
        ("a^b~c", r"a\textasciicircum{}b\textasciitilde{}c"),
        ("{x}\\y", r"\{x\}\textbackslash{}y"),
    ):
        assert tables.latex_text(title) == expected


def test_a_p_that_is_not_corrected_is_not_called_so(results):
    """The one of the overall difference is of a single test."""
    table = tables.accuracy_table(results)
    texts = table.texts()
    (column,) = [name for name in texts.columns if "p (" in name]
    assert "of classes: Holm" in column
    assert texts.index[-1] == "Overall"


def test_what_did_not_vary_has_no_interval():
    """One seed's temperature, which test images have no part in; the first network's mCE, which is
    100 by definition."""
    fixed = Interval(0.613, 0.613, 0.613)
    known = Interval(0.0, 0.0, 0.69)
    column = tables.Column("any", [fixed, known, None, 2.0], [".2f"] * 4)
    assert column.texts() == ["0.61", "0.00 (0.00 to 0.69)", "", "2.00"]
