"""The figures: results in, a figure out.

`all_figures` names them all; each is drawn by a function of the results, of one network's, or of
the stress tests' outcome.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from lab.machine.files import ResultFiles
from lab.measure import statistics
from lab.measure.attributes import by_attribute
from lab.measure.corruptions import SEVERITIES
from lab.measure.estimates import Estimate
from lab.measure.failures import Dossier, Mistake, MistakeGroup, Transition
from lab.measure.gradcam import ExplainedImage
from lab.measure.models import EpochLog, Network
from lab.measure.statistics import Interval
from lab.measure.stress import Outcome
from lab.report import drawing, sentences
from lab.report.drawing import PAGE, Picture, PictureBlock
from lab.report.results import NetworkResults, Results, named_images


def plot_mean_and_range(
    axes: Axes, x: Sequence[float] | np.ndarray, by_seed: np.ndarray, network: Network, **look: Any
) -> None:
    """The mean of `by_seed` [seeds, points] in the network's colour, the range of seeds shaded."""
    look = {"marker": network.marker, "markersize": 3, **look}
    axes.plot(x, by_seed.mean(0), color=network.colour, **look)
    axes.fill_between(
        x, by_seed.min(0), by_seed.max(0), color=network.colour, alpha=0.2, linewidth=0
    )


LEGEND_LINE = 0.18  # inches


def legend_columns(entries: int) -> int:
    return 2 if entries <= 4 else 3


def two_panels(entries: int) -> tuple[Figure, Axes, Axes]:
    """A figure of two panels side by side, with room above for a legend of so many entries."""
    legend_lines = math.ceil(entries / legend_columns(entries))
    figure = drawing.new_figure(0.34 * PAGE + LEGEND_LINE * max(0, legend_lines - 2))
    left, right = figure.subplots(1, 2)
    return figure, left, right


def legend_above(figure: Figure, axes: Axes) -> None:
    """One legend for all panels, which `axes` speaks for."""
    handles, labels = axes.get_legend_handles_labels()
    columns = legend_columns(len(labels))
    figure.legend(handles, labels, loc="outside upper center", ncols=columns)


def beside_others(k: int, count: int, most: float) -> float:
    """How far the network k, of `count` that share a place of width 1, stands from its middle.

    They stand `most` apart, or less where they would reach into the next place.
    """
    return min(most, 0.8 / count) * (k - (count - 1) / 2)


def plot_training_curves(results: Results, of_network: NetworkResults) -> Figure:
    """Loss and accuracy by epoch, with the axes of all networks: to be held side by side."""
    figure, left, right = two_panels(entries=2)
    plot_history(left, of_network, lambda log: log.validation_loss, lambda log: log.train_loss)
    plot_history(
        right, of_network, lambda log: log.validation_accuracy, lambda log: log.train_accuracy
    )
    left.set(ylabel="loss", ylim=history_limits(results, EpochLog.losses))
    right.set(ylabel="accuracy (%)", ylim=history_limits(results, EpochLog.accuracies))
    legend_above(figure, right)
    return figure


def plot_history(
    axes: Axes,
    of_network: NetworkResults,
    validation: Callable[[EpochLog], float],
    training: Callable[[EpochLog], float],
) -> None:
    """Two quantities of each epoch, mean and range of all seeds."""
    network = of_network.network
    for quantity, label, dashes in (
        (validation, "validation", "-"),
        (training, "training (augmented)", "--"),
    ):
        by_seed = []
        for run in of_network.runs:
            by_seed.append([quantity(log) for log in run.history])
        epochs = range(1, len(by_seed[0]) + 1)
        label = f"{network.title} {label}"
        plot_mean_and_range(axes, epochs, np.array(by_seed), network, linestyle=dashes, label=label)
    axes.set(xlabel="epoch")
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))


def history_limits(
    results: Results, values_of: Callable[[EpochLog], tuple[float, float]]
) -> tuple[float, float]:
    """The range of all networks' epochs, with some space."""
    values: list[float] = []
    for of_network in results.networks:
        for run in of_network.runs:
            for log in run.history:
                values.extend(values_of(log))
    space = 0.05 * (max(values) - min(values))
    return min(values) - space, max(values) + space


def plot_attacks(stress: Outcome) -> Figure:
    """Accuracy by the largest change allowed; its change from the first network with intervals."""
    networks = len(stress.networks)
    figure, left, right = two_panels(entries=networks)
    epsilons = stress.networks[0].attacks.epsilons
    places = np.arange(1 + len(epsilons))  # equally far apart, as the usual ones are in powers
    for k, of_network in enumerate(stress.networks):
        attacks = of_network.attacks
        network = of_network.network
        by_seed = values_by_seed([attacks.clean, *attacks.robust])
        plot_mean_and_range(left, places, by_seed, network, label=network.title)
        if attacks.change is not None:
            shift = beside_others(k - 1, networks - 1, most=0.15)
            plot_intervals(right, places[1:] + shift, attacks.change, network)
    right.axhline(0, color=stress.networks[0].network.colour, linewidth=1)
    left.set(ylabel="accuracy (%)", ylim=(-3, 103))
    right.set(ylabel="change (points)", xlim=left.get_xlim())
    for axes in (left, right):
        axes.set(
            xlabel="largest change of a pixel (of 255)",
            xticks=places,
            xticklabels=["0", *(f"{epsilon:g}" for epsilon in epsilons)],
        )
    legend_above(figure, left)
    return figure


def plot_intervals(
    axes: Axes, x: np.ndarray, intervals: Sequence[Interval], network: Network, **look: Any
) -> None:
    """Values with their intervals, in the network's colour."""
    value = np.array([interval.value for interval in intervals])
    below = value - np.array([interval.low for interval in intervals])
    above = np.array([interval.high for interval in intervals]) - value
    axes.errorbar(
        x,
        value,
        np.stack([below, above]).clip(0),
        fmt=network.marker,
        color=network.colour,
        markersize=4,
        capsize=2.5,
        **look,
    )


def plot_reliability(stress: Outcome) -> Figure:
    """Accuracy by confidence; a calibrated network lies on the diagonal. Of the first seed alone.

    With Wilson's intervals. Bins of few images, which would lie anywhere, are pooled.
    """
    figure, left, right = two_panels(entries=len(stress.networks))
    for of_network in stress.networks:
        network = of_network.network
        calibration = of_network.calibration
        as_trained = calibration.as_trained.by_seed[0]
        first_seed = ((left, as_trained), (right, calibration.scaled.by_seed[0]))
        for axes, measured in first_seed:
            bins = measured.pooled(least=20)
            confidence = np.array([100 * one.confidence for one in bins])
            intervals = []
            for one in bins:
                interval = statistics.wilson_interval(one.correct, one.images, stress.level)
                intervals.append(interval)
            look = {"label": network.title, "linestyle": "-", "linewidth": 1}
            plot_intervals(axes, confidence, intervals, network, **look)
    for axes, when in ((left, "as trained"), (right, "temperature scaled")):
        axes.set(title=when, xlabel="confidence (%)", ylabel="accuracy (%)", ylim=(-3, 103))
        axes.axline((0, 0), slope=1, color="0.4", linestyle=":", zorder=1)
    legend_above(figure, left)
    return figure


def plot_selection(stress: Outcome) -> Figure:
    """Risk by the share of images answered, most confident first; by two measures of confidence."""
    figure, left, right = two_panels(entries=len(stress.networks))
    for of_network in stress.networks:
        network = of_network.network
        doubt = of_network.doubt
        for axes, scores in ((left, doubt.as_trained), (right, doubt.without_norm)):
            look = {"label": network.title, "markevery": len(scores.coverage) // 10}
            plot_mean_and_range(axes, scores.coverage, scores.risk, network, **look)
    top = max(left.get_ylim()[1], right.get_ylim()[1])
    for axes, name in ((left, "confidence as trained"), (right, "without the logits' norm")):
        axes.set(
            title=name, xlabel="images answered (%)", ylabel="errors among them (%)", ylim=(0, top)
        )
    legend_above(figure, left)
    return figure


def plot_shift(stress: Outcome) -> Figure:
    """By the corruptions' severity: calibration error, and coverage of the sets of classes.

    Dotted is what the sets promise on images of the same source.
    """
    figure, left, right = two_panels(entries=2 * len(stress.networks))
    for of_network in stress.networks:
        network = of_network.network
        shift = of_network.doubt.shift
        for scores, name, dashes in (
            (shift.error_as_trained, "as trained", "--"),
            (shift.error_scaled, "temperature scaled", "-"),
        ):
            look = {"linestyle": dashes, "label": f"{network.title} {name}"}
            plot_mean_and_range(left, SEVERITIES, values_by_seed(scores), network, **look)
        for of_severities in zip(*shift.sets, strict=True):  # of each share that may be missed
            coverage = values_by_seed([sets.coverage for sets in of_severities])
            plot_mean_and_range(right, SEVERITIES, coverage, network)
    left.set(xlabel="severity", ylabel="calibration error (%)", xticks=SEVERITIES)
    right.set(xlabel="severity", ylabel="coverage of sets (%)", xticks=SEVERITIES)
    right.set_ylim(top=106)  # words stand above a line that is nearly 100
    lowest, _ = right.get_ylim()
    ticks = right.get_yticks()
    right.set_yticks(ticks[(ticks >= lowest) & (ticks <= 100)])
    shares = [sets.miss for sets in stress.networks[0].doubt.shift.sets[0]]
    for miss in shares:
        promised = 100 * (1 - miss)
        above = miss == min(shares)  # the other lines are near it: their words stand below them
        right.axhline(promised, color="0.4", linestyle=":", zorder=1)
        right.annotate(
            f"sets for {promised:g} %",
            (SEVERITIES[-1], promised),
            xytext=(0, 2 if above else -2),
            textcoords="offset points",
            horizontalalignment="right",
            verticalalignment="bottom" if above else "top",
            fontsize=7,
        )
    legend_above(figure, left)
    return figure


def values_by_seed(scores: Sequence[Estimate]) -> np.ndarray:
    """float64 [seeds, scores]."""
    return np.column_stack([one.by_seed for one in scores])


def plot_deletion_insertion(stress: Outcome) -> Figure:
    """Probability of the predicted class by the share of pixels touched; means over the seeds."""
    figure, left, right = two_panels(entries=2 * len(stress.networks))
    for of_network in stress.networks:
        network = of_network.network
        heatmaps = of_network.heatmaps
        for maps, name, dashes in (
            (heatmaps.grad_cam, "Grad-CAM", "-"),
            (heatmaps.random, "random maps", "--"),
        ):
            share = np.linspace(0, 100, len(maps.deletion))
            look = {"linestyle": dashes, "label": f"{network.title} {name}"}
            plot_mean_and_range(left, share, maps.deletion[None], network, **look)
            plot_mean_and_range(right, share, maps.insertion[None], network, **look)
    for axes, name in ((left, "deletion"), (right, "insertion")):
        axes.set(
            title=name, xlabel="pixels, hottest first (%)", ylabel="probability", ylim=(-0.03, 1.03)
        )
    legend_above(figure, left)
    return figure


def plot_accuracy(results: Results) -> Figure:
    """Accuracy by class and overall with intervals, and below its paired change, which is tested.

    The intervals above are each network's own: that they overlap says nothing of the change.
    """
    figure = drawing.new_figure(0.55 * PAGE)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    names = [*results.classes, "Overall"]
    for k, of_network in enumerate(results.networks):
        intervals = [*of_network.accuracy.by_class, of_network.accuracy.overall]
        shift = beside_others(k, len(results.networks), most=0.25)
        places = np.arange(len(names)) + shift
        network = of_network.network
        plot_intervals(above, places, intervals, network, label=network.title)
    for k, comparison in enumerate(results.comparisons):
        groups = [*comparison.by_class, comparison.overall]
        changes = [group.difference.interval for group in groups]
        shift = beside_others(k, len(results.comparisons), most=0.25)
        places = np.arange(len(names)) + shift
        plot_intervals(below, places, changes, comparison.network)
    below.axhline(0, color=results.networks[0].network.colour, linewidth=1)
    above.set(ylabel="test accuracy (%)")
    below.set(ylabel="change (points)", xticks=range(len(names)), xticklabels=names)
    below.tick_params(axis="x", labelsize=7)
    figure.legend(loc="outside upper center", ncols=len(results.networks))
    return figure


def plot_seeds(results: Results) -> Figure | None:
    """Left each seed's networks, joined; right each seed's change, and the mean change.

    Of one network the left alone. None of one seed, whose axes would make a cliff of any
    difference.
    """
    if len(results.setup.seeds) == 1:
        return None
    accuracy = []
    for of_network in results.networks:
        accuracy.append([run.accuracy for run in of_network.runs])
    by_network = np.array(accuracy)  # [networks, seeds]
    titles = [of_network.network.title for of_network in results.networks]
    figure = drawing.new_figure(0.42 * PAGE)
    panels = figure.subplots(1, 2 if results.comparisons else 1, squeeze=False)[0]
    panels[0].plot(titles, by_network, color="0.4", marker="o", markersize=4)
    panels[0].set(xlim=(-0.5, len(titles) - 0.5), ylabel="test accuracy (%)")
    if results.comparisons:
        plot_changes(panels[1], results, by_network[1:] - by_network[0])
        figure.legend(loc="outside upper right", ncols=2)
    if len(titles) > 2:
        for axes in panels:
            axes.tick_params(axis="x", rotation=45)
    return figure


def plot_changes(axes: Axes, results: Results, change: np.ndarray) -> None:
    """The `change` [networks, seeds] of all but the first network, and the margin."""
    if len(results.comparisons) == 1:
        plot_changes_by_seed(axes, results, change[0])
    else:
        plot_changes_by_network(axes, results, change)
    axes.axhline(0, color="black", linewidth=1)
    margin = results.setup.rules.margin
    for bound, label in ((-margin, f"margin of {margin:g}"), (margin, None)):
        axes.axhline(bound, color="black", linestyle=":", linewidth=1, label=label)
    first = results.networks[0].network.title
    axes.set(ylabel=f"change from {first} (points)", ymargin=0.15)


def plot_changes_by_seed(axes: Axes, results: Results, change: np.ndarray) -> None:
    """A network's `change` [seeds] from the first one, its mean and the mean's interval."""
    seeds = results.setup.seeds
    (comparison,) = results.comparisons
    network = comparison.network
    mean = comparison.overall.difference.interval
    colour = network.colour
    axes.scatter(seeds, change, color=colour, label=f"{network.title} of a seed")
    band = f"{100 * (1 - results.setup.rules.level):g} % interval of the mean"
    axes.axhspan(mean.low, mean.high, color=colour, alpha=0.2, linewidth=0, label=band)
    mean_in_words = f"mean {mean.value:+.2f}".replace("-", "−")  # as on the axis
    axes.axhline(mean.value, color=colour, label=mean_in_words)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    if len(seeds) <= 10:  # there is room for the number of each
        axes.set_xticks(seeds)
    axes.set(xlabel="seed")
    axes.set_xlim(seeds[0] - 0.5, seeds[-1] + 0.5)  # older versions would begin at 0


def plot_changes_by_network(axes: Axes, results: Results, change: np.ndarray) -> None:
    """The `change` [networks, seeds] of several from the first one, their means and intervals."""
    for k, comparison in enumerate(results.comparisons):
        network = comparison.network
        of_seed = "of a seed" if k == 0 else None
        axes.scatter(
            np.full(change.shape[1], k), change[k], color=network.colour, alpha=0.4, label=of_seed
        )
        mean = comparison.overall.difference.interval
        label = f"mean, {100 * (1 - results.setup.rules.level):g} % interval" if k == 0 else None
        plot_intervals(axes, np.array([k + 0.2]), [mean], network, label=label)
    titles = [comparison.network.title for comparison in results.comparisons]
    axes.set(xticks=range(len(titles)), xticklabels=titles)
    axes.set_xlim(-0.5, len(titles) - 0.5)


PERCENT = {"annot": True, "fmt": ".1f", "cmap": "Blues", "vmin": 0, "vmax": 100}

WHOLE_PERCENT = {**PERCENT, "fmt": ".0f"}

POINTS = {"annot": True, "fmt": "+.1f", "cmap": "PuOr", "center": 0}

EXCITATION = {"cmap": "viridis", "vmin": 0, "vmax": 1, "xticklabels": False}

NUMBER_SIZE = 6.5  # points


def plot_transitions(results: Results, dossier: Dossier) -> Figure:
    """What becomes of images from the first network to others, and mistakes by confidence."""
    figure, left, right = two_panels(entries=2 * len(dossier.mistakes))
    ways = [way for way in Transition if way is not Transition.RIGHT]
    names = [str(way).replace(", ", ",\n") for way in ways]
    compared = dossier.transitions
    bars = len(ways) * len(compared)
    figure.set_figheight(figure.get_figheight() + 0.1 * max(0, bars - 8))  # for their numbers
    thickness = 0.8 / max(1, len(compared))
    style = sentences.count_style(len(results.setup.seeds))
    for k, one in enumerate(compared):
        counts = [one.counts[way].mean() for way in ways]
        place = np.arange(len(ways)) + (k - (len(compared) - 1) / 2) * thickness
        drawn = left.barh(place, counts, 0.9 * thickness, color=one.network.colour)
        left.bar_label(drawn, fmt=f"{{:{style}}}", padding=2)
    left.set(yticks=range(len(ways)), yticklabels=names, xlabel="test images")
    left.margins(x=0.18)
    left.grid(visible=False)  # which would strike out the numbers
    left.invert_yaxis()
    for mistakes in dossier.mistakes:
        network = mistakes.network
        for by_seed, name, dashes in (
            (mistakes.as_trained, "as trained", "--"),
            (mistakes.scaled, "temperature scaled", "-"),
        ):
            look = {"linestyle": dashes, "label": f"{network.title} {name}"}
            plot_mean_and_range(right, mistakes.levels, by_seed, network, **look)
    right.set(xlabel="with a confidence of at least (%)", ylabel="mistakes", ylim=(0, None))
    legend_above(figure, right)
    return figure


def plot_associations(results: Results, dossier: Dossier) -> Figure:
    """Each network's error by fifths of each attribute, with intervals."""
    grouped = by_attribute(dossier.associations)
    rows = math.ceil(len(grouped) / 5)
    columns = math.ceil(len(grouped) / rows)
    figure = drawing.new_figure(0.3 + 1.5 * rows)
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes, (attribute, of_networks) in zip(panels.flat, grouped.items(), strict=False):
        for k, association in enumerate(of_networks):
            shift = beside_others(k, len(of_networks), most=0.15)
            network = association.network
            places = np.arange(1, 6) + shift
            plot_intervals(axes, places, association.error, network, label=network.title)
        name = attribute.replace("from the", "from the\n")
        axes.margins(y=0.15)
        axes.set(xlabel=f"{name}\n(fifths)", xticks=range(1, 6))
    for axes in panels.flat[len(grouped) :]:
        axes.set_axis_off()
    for axes in panels[:, 0]:
        axes.set(ylabel="error (%)")
    panels[0, 0].set_ylim(bottom=0)  # of all, when all is drawn
    legend_above(figure, panels[0, 0])
    return figure


def plot_confusion(results: Results, of_network: NetworkResults) -> Figure:
    """In percent of the true class; of the first seed."""
    classes = results.classes
    half = 0.49 * PAGE  # two lie abreast in the paper
    figure = drawing.new_figure(0.8 + 0.2 * len(classes), width=half)
    axes = figure.subplots()
    confusion = of_network.runs[0].confusion
    shares = 100 * confusion / confusion.sum(1, keepdims=True).clip(1)
    sns.heatmap(
        pd.DataFrame(shares, classes, classes),
        ax=axes,
        cbar=False,
        annot_kws={"size": NUMBER_SIZE},
        **WHOLE_PERCENT,
    )
    axes.set(title=of_network.network.title, xlabel="predicted class", ylabel="true class")
    axes.set_xticklabels(axes.get_xticklabels(), rotation=45, ha="right")
    axes.tick_params(axis="y", rotation=0)
    return figure


@dataclass(frozen=True)
class MatrixPanel:
    """A matrix to be drawn: its rows and columns are named, its colours have a scale."""

    title: str
    matrix: pd.DataFrame
    scale: str
    look: Mapping[str, Any]  # what seaborn's heatmap is told


def plot_matrices(rows: Sequence[Sequence[MatrixPanel]], xlabel: str) -> Figure:
    """Rows of matrices side by side; neighbours of one scale share its bar."""
    lines = len(rows[0][0].matrix)
    figure = drawing.new_figure(len(rows) * (0.8 + 0.17 * lines))
    parts = figure.subfigures(len(rows), 1, squeeze=False)
    for part, panels in zip(parts[:, 0], rows, strict=True):
        for k, axes in enumerate(part.subplots(1, len(panels), squeeze=False)[0]):
            panel = panels[k]
            last_of_scale = k + 1 == len(panels) or panels[k + 1].scale != panel.scale
            sns.heatmap(
                panel.matrix,
                ax=axes,
                cbar=last_of_scale,
                cbar_kws={"label": panel.scale},
                annot_kws={"size": NUMBER_SIZE},
                yticklabels=k == 0,
                **panel.look,
            )
            axes.set(title=panel.title, xlabel=xlabel, ylabel="")
            axes.tick_params(axis="both", rotation=0)
    return figure


def plot_robustness(stress: Outcome) -> Figure:
    """Accuracy by corruption and severity, mean over seeds, and its change from the first."""
    tables = []
    for of_network in stress.networks:
        corruptions = of_network.corruptions
        names = [name.replace("_", " ") for name in corruptions.names]
        tables.append(pd.DataFrame(corruptions.accuracy.mean(0), names, SEVERITIES))
    accuracies = []
    for of_network, table in zip(stress.networks, tables, strict=True):
        title = of_network.network.title
        accuracies.append(MatrixPanel(title, table, "accuracy (%)", WHOLE_PERCENT))
    first = stress.networks[0].network.title
    titles = [of_network.network.title for of_network in stress.networks[1:]]
    changes = []
    for table in tables[1:]:
        changes.append((table - tables[0]).round(1) + 0)  # no "-0.0"
    if not changes:
        return plot_matrices([accuracies], xlabel="severity")
    if len(changes) == 1:
        title = f"{titles[0]} minus {first}"
        panel = MatrixPanel(title, changes[0], "change (points)", POINTS)
        return plot_matrices([[*accuracies, panel]], xlabel="severity")
    largest = max(float(change.abs().to_numpy().max()) for change in changes)
    look = {**POINTS, "vmin": -largest, "vmax": largest}  # they share one bar
    if len(changes) > 3:
        look["fmt"] = "+.0f"  # there is no room for tenths
    panels = []
    for title, change in zip(titles, changes, strict=True):
        panels.append(MatrixPanel(title, change, f"change from {first} (points)", look))
    return plot_matrices([accuracies, panels], xlabel="severity")


def plot_excitation(stress: Outcome) -> Figure | None:
    """The gates' means by class and channel, a row for each network that has gates."""
    rows = []
    for of_network in stress.networks:
        if of_network.gates is None:
            continue
        panels = []
        for stage, means in of_network.gates.mean_by_class.items():
            title = f"{of_network.network.title}, stage {stage}"
            table = pd.DataFrame(means, stress.classes)
            panels.append(MatrixPanel(title, table, "mean excitation", EXCITATION))
        rows.append(panels)
    return plot_matrices(rows, xlabel="channel") if rows else None


def explained_row(image: ExplainedImage, classes: Sequence[str]) -> list[Picture]:
    """The image with its true class, then each answer's heatmap with what the network says."""
    caption = f"{classes[image.label]}\n(image {image.index})"
    return [Picture(image.pixels, caption), *heatmaps_of(image, classes)]


def heatmaps_of(image: ExplainedImage, classes: Sequence[str]) -> list[Picture]:
    """Each network's, with what it says."""
    row = []
    for answer in image.answers:
        caption = f"{answer.network.title}:\n{classes[answer.predicted]}\n{answer.confidence:.0%}"
        heat = drawing.overlay(image.pixels, answer.heatmap)
        row.append(Picture(heat, caption, answer.network.colour))
    return row


def plot_explained(results: Results, image: ExplainedImage) -> Figure:
    """One image with each network's Grad-CAM."""
    row = explained_row(image, results.classes)
    return drawing.plot_pictures([[PictureBlock("", [row])]], heat_scale=True)


def plot_failures(results: Results, dossier: Dossier) -> Figure:
    """Groups side by side; in each column an image, below it the networks' answers.

    Three groups or two fill a line. Of more images than fit there, so many as fill further lines.
    Of more than three networks, the answers would take pages: each image stands alone, with what
    the network that is wrong calls it.
    """
    with_heatmaps = len(results.networks) <= 3
    abreast = 3 if len(dossier.groups) % 3 == 0 else 2
    fitting = 9 // abreast
    most = max(len(group.mistakes) for group in dossier.groups)
    shown = most if most <= fitting else most - most % fitting
    lines = []
    for first in range(0, len(dossier.groups), abreast):
        for start in range(0, max(1, shown), fitting):
            blocks = []
            for group in dossier.groups[first : first + abreast]:
                columns = []
                for mistake in group.mistakes[start : min(start + fitting, shown)]:
                    if with_heatmaps:
                        heatmaps = heatmaps_of(mistake.image, results.classes)
                        columns.append([picture_of(mistake, results.classes), *heatmaps])
                    else:
                        columns.append([picture_of_wrong(mistake, group, results.classes)])
                rows = list(zip(*columns, strict=True))
                blocks.append(PictureBlock(group.title(), rows))
            lines.append(blocks)
    return drawing.plot_pictures(lines, heat_scale=with_heatmaps)


def picture_of_wrong(mistake: Mistake, group: MistakeGroup, classes: Sequence[str]) -> Picture:
    """As `picture_of`, with the group's network's answer; where all are wrong, the first's."""
    answers = {answer.network.key: answer for answer in mistake.image.answers}
    wrong = mistake.image.answers[0]
    if group.network is not None:
        wrong = answers[group.network.key]
    picture = picture_of(mistake, classes)
    called = f"→ {classes[wrong.predicted]} {wrong.confidence:.0%}"
    return dataclasses.replace(picture, caption=f"{picture.caption}\n{called}")


def picture_of(mistake: Mistake, classes: Sequence[str]) -> Picture:
    """The image with its label, a "?" where all networks agree against it, and how many people
    choose it where that is known."""
    doubt = "?" if mistake.is_suspect else ""
    caption = [f"{classes[mistake.image.label]}{doubt}"]
    if mistake.people_for_label is not None:
        caption.append(f"people {mistake.people_for_label:.0f}%")
    caption.append(f"(image {mistake.image.index})")
    return Picture(mistake.image.pixels, "\n".join(caption))


SUSPECTS_DRAWN = 14  # at most


def plot_suspects(results: Results, dossier: Dossier) -> Figure | None:
    """Test images on which all networks agree against the label, the likeliest first; None without.

    Label and networks' class; where they are known, how many people choose the one and the other.
    """
    pictures = []
    for suspect in dossier.labels.suspects[:SUSPECTS_DRAWN]:
        label = results.classes[suspect.label]
        called = results.classes[suspect.called]
        caption = [f"{label}?", f"{called} {suspect.probability:.0%}"]
        if suspect.people_for_label is not None:
            shares = f"{suspect.people_for_label:.0f}/{suspect.people_for_called:.0f}"
            caption.append(f"people {shares}%")
        caption.append(f"(image {suspect.index})")
        pictures.append(Picture(suspect.pixels, "\n".join(caption)))
    if not pictures:
        return None
    rows = [pictures[k : k + 7] for k in range(0, len(pictures), 7)]  # else names touch
    return drawing.plot_pictures([[PictureBlock("", rows)]], heat_scale=False)


def plot_corruptions(stress: Outcome) -> Figure:
    """One test image under every corruption."""
    pictures = [Picture(stress.original, "original")]
    for name, pixels in stress.corrupted.items():
        pictures.append(Picture(pixels, name.replace("_", " ")))
    rows = [pictures[k : k + 8] for k in range(0, len(pictures), 8)]
    return drawing.plot_pictures([[PictureBlock("", rows)]], heat_scale=False)


FIGURES: dict[str, Callable[[Results], Figure | None]] = {
    "accuracy_comparison": plot_accuracy,
    "seeds": plot_seeds,
}

FAILURE_FIGURES: dict[str, Callable[[Results, Dossier], Figure | None]] = {
    "transitions": plot_transitions,
    "associations": plot_associations,
    "failure_cases": plot_failures,
    "label_suspects": plot_suspects,
}

NETWORK_FIGURES: dict[str, Callable[[Results, NetworkResults], Figure]] = {
    "{}_curves": plot_training_curves,
    "confusion_matrix_{}": plot_confusion,
}

STRESS_FIGURES: dict[str, Callable[[Outcome], Figure | None]] = {
    "robustness": plot_robustness,
    "corruptions": plot_corruptions,
    "attacks": plot_attacks,
    "reliability": plot_reliability,
    "selection": plot_selection,
    "shift": plot_shift,
    "deletion_insertion": plot_deletion_insertion,
    "excitation": plot_excitation,
}


def all_figures(results: Results) -> Iterator[tuple[str, Callable[[], Figure | None]]]:
    """The name of each figure of what is known, and what draws it."""
    for name, plot in FIGURES.items():
        yield name, partial(plot, results)
    if results.failures is not None:
        for name, plot_failure in FAILURE_FIGURES.items():
            yield name, partial(plot_failure, results, results.failures)
    for name, plot_network in NETWORK_FIGURES.items():
        for of_network in results.networks:
            yield name.format(of_network.network.key), partial(plot_network, results, of_network)
    for name, image in named_images(results):
        yield f"gradcam_{name}", partial(plot_explained, results, image)
    if results.stress is not None:
        for name, plot_stress in STRESS_FIGURES.items():
            yield name, partial(plot_stress, results.stress)


def accuracy_svg(results: Results) -> bytes:
    """The first figure, for a page, sharp at any size."""
    with drawing.style():
        return drawing.rendered(plot_accuracy(results), "svg", {"Date": None})


def save(results: Results, files: ResultFiles) -> None:
    """All figures in plots/, and the single Grad-CAM overlays in gradcam/."""
    with drawing.style():
        for name, plot in all_figures(results):
            figure = plot()
            if figure is not None:
                png = drawing.rendered(figure, "png", {"Software": None})
                figure.set_layout_engine("none")  # the PDF is laid out as the PNG, which saves time
                pdf = drawing.rendered(figure, "pdf", {"CreationDate": None})
                files.write(f"plots/{name}.png", png)
                files.write(f"plots/{name}.pdf", pdf)
    for name, image in named_images(results):
        for answer in image.answers:
            picture = Image.fromarray(drawing.overlay(image.pixels, answer.heatmap))
            content = drawing.in_file(picture, "PNG")
            files.write(f"gradcam/{answer.network.key}/{name}.png", content)
