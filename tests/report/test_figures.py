"""Figures: that they show what was found, and nothing lies on anything else."""

import dataclasses
import io
import itertools
import re

import matplotlib
import numpy as np
import pytest
from helpers import ROOT

from lab.data import shapes
from lab.measure.comparison import AccuracyIntervals
from lab.measure.failures import Mistake
from lab.measure.statistics import Interval
from lab.measure.suspects import Suspect
from lab.report import drawing, figures
from lab.report.results import named_images

CIFAR10 = tuple("airplane automobile bird cat deer dog frog horse ship truck".split())


@pytest.fixture(scope="module", params=[CIFAR10, tuple(shapes.SHAPES)], ids=["cifar10", "shapes"])
def laid_out(request, results):
    """Every figure by its name, all in its place, with classes of these names; for CIFAR-10's with
    people's answers too."""
    if request.param != results.classes:
        stress = dataclasses.replace(results.stress, classes=request.param)
        dossier = with_people(results.failures)
        results = dataclasses.replace(
            results, classes=request.param, stress=stress, failures=dossier
        )
    drawn = []
    with drawing.style():
        for name, plot in figures.all_figures(results):
            figure = plot()
            if figure is not None:
                figure.draw_without_rendering()
                figure.set_layout_engine("none")  # all stays where it is
            drawn.append((name, figure))
    return drawn


def with_people(dossier):
    """As if all mistakes were on images on whose label all people agree, and no network did."""
    groups = []
    for group in dossier.groups:
        mistakes = []
        for mistake in group.mistakes:
            mistakes.append(Mistake(mistake.image, people_for_label=100.0, is_suspect=True))
        groups.append(dataclasses.replace(group, mistakes=tuple(mistakes)))
    suspect = Suspect(
        index=9999, pixels=np.zeros((32, 32, 3), np.uint8), label=1, called=1, probability=1.0,
        people_for_label=100.0, people_for_called=0.0,
    )  # fmt: skip
    labels = dataclasses.replace(dossier.labels, suspects=(suspect,) * 16)
    return dataclasses.replace(dossier, groups=tuple(groups), labels=labels)


def test_every_figure_has_a_name_of_its_own(results):
    names = [name for name, _ in figures.all_figures(results)]
    assert len(names) == len(set(names)) > 20


@pytest.mark.slow
def test_every_figure_can_be_drawn(laid_out, style):
    for name, figure in laid_out:
        assert figure is not None or name in ("label_suspects", "seeds")
        if figure is not None:
            figure.savefig(io.BytesIO(), format="png", dpi=20)


@pytest.mark.slow
def test_text_is_readable_and_lies_within_the_figure(laid_out, style):
    """At the size of print: at least 6 points, nothing cut off, nothing on other text."""
    for name, figure in laid_out:
        if figure is None:
            continue
        figure.draw_without_rendering()
        scale = scale_in_paper(name, figure)
        canvas = figure.bbox.padded(1)
        boxes = {}
        for text in drawn_texts(figure):
            assert text.get_fontsize() * scale >= 6, (name, text)
            box = text.get_window_extent()
            assert canvas.x0 <= box.x0 and box.x1 <= canvas.x1, (name, text)
            assert canvas.y0 <= box.y0 and box.y1 <= canvas.y1, (name, text)
            if text.get_rotation() in (0, 90):
                boxes[text] = box
        for (one, box), (other, beside) in itertools.combinations(boxes.items(), 2):
            common = matplotlib.transforms.Bbox.intersection(box, beside)
            assert common is None or min(common.width, common.height) < 2, (name, one, other)


def scale_in_paper(name, figure):
    """What report.tex makes a figure larger or smaller by; 1 for what it does not show."""
    line = (210 - 2 * 24) / 25.4  # inches: A4 and its margins
    report = (ROOT / "report.tex").read_text()
    shown = re.findall(r"\\fullpage(?:\[(\.\d+)\\linewidth\])?\{([^{}]+)\}", report)
    assert len(shown) > 8
    for share, names in shown:
        if re.fullmatch(re.sub(r"\\[a-z]+", r"\\w+", names), name):
            return float(share or 1) * line / figure.get_figwidth()
    return 1


def drawn_texts(figure):
    """All text but the labels of ticks beyond the limits, which are there and not drawn."""
    texts = set(figure.findobj(matplotlib.text.Text))
    for axes in figure.findobj(matplotlib.axes.Axes):
        for axis in (axes.xaxis, axes.yaxis):
            texts -= set(axis.findobj(matplotlib.text.Text))
            if axes.axison:
                texts |= {axis.label, axis.get_offset_text()}
                texts |= {tick.label1 for tick in axis._update_ticks()}
    return [text for text in texts if text.get_visible() and text.get_text()]


def test_one_seed_has_no_figure_of_seeds(results, made_tiny_run):
    assert len(results.setup.seeds) == 1 and figures.plot_seeds(results) is None
    assert not (made_tiny_run / "plots" / "seeds.png").exists()


def test_bins_of_few_images_show_how_little_they_say(results, style):
    stress = results.stress
    as_trained = stress.networks[0].calibration.as_trained
    calibration = dataclasses.replace(
        as_trained.by_seed[0],
        bin_confidence=np.array([0.2, 0.3, 0.9]),
        bin_correct=np.array([0, 10, 900]),
        bin_images=np.array([1, 19, 1000]),
    )
    as_trained = dataclasses.replace(as_trained, by_seed=(calibration,))
    scores = dataclasses.replace(stress.networks[0].calibration, as_trained=as_trained)
    network = dataclasses.replace(stress.networks[0], calibration=scores)
    figure = figures.plot_reliability(dataclasses.replace(stress, networks=(network,)))
    (bars,) = figure.axes[0].containers
    heights = [segment[1, 1] - segment[0, 1] for segment in bars[2][0].get_segments()]
    assert len(heights) == 2  # the first two are pooled: one image alone is no point of 0 %
    assert heights[0] > 35 and heights[1] < 4
    assert figure.axes[0].get_ylabel() == "accuracy (%)"


def test_a_figure_is_the_same_whatever_its_reader_has_set(results):
    """Settings of matplotlib that turn pictures upside down or draw other lines are left out."""
    image = results.explained[0]
    # The type of pixels that were pickled is not the one object that older matplotlibs know.
    image = dataclasses.replace(image, pixels=image.pixels.astype(np.uint8))
    pictures = []
    for settings in (
        {},
        {"image.origin": "lower", "lines.linestyle": ":", "font.size": 30, "axes.grid": False},
    ):
        with matplotlib.rc_context(settings), drawing.style():
            buffer = io.BytesIO()
            figures.plot_explained(results, image).savefig(buffer, format="raw", dpi=50)
            figures.plot_attacks(results.stress).savefig(buffer, format="raw", dpi=50)
            pictures.append(buffer.getvalue())
    assert pictures[0] == pictures[1]


def test_curves_show_the_numbers(results, style):
    figure = figures.plot_attacks(results.stress)
    left, right = figure.axes
    for line, one in zip(left.lines, results.stress.networks, strict=True):
        accuracy = [one.attacks.clean.mean(), *(of.mean() for of in one.attacks.robust)]
        np.testing.assert_array_equal(line.get_ydata(), accuracy)
        assert line.get_color() == one.network.colour and line.get_marker() == one.network.marker
    ticks = [label.get_text() for label in left.get_xticklabels()]
    assert ticks == [
        "0",
        *(f"{epsilon:g}" for epsilon in results.stress.networks[0].attacks.epsilons),
    ]
    changes = results.stress.networks[1].attacks.change
    drawn = right.containers[0]
    assert drawn[0].get_ydata().tolist() == [interval.value for interval in changes]
    (bars,) = drawn[2]
    for (low, high), interval in zip(bars.get_segments(), changes, strict=True):
        assert (low[1], high[1]) == pytest.approx((interval.low, interval.high))


def test_several_seeds_are_drawn_as_mean_and_range(results, style):
    figure = drawing.new_figure(2)
    axes = figure.subplots()
    by_seed = np.array([[1.0, 2.0], [3.0, 6.0]])
    figures.plot_mean_and_range(axes, [0, 1], by_seed, results.networks[0].network)
    assert axes.lines[0].get_ydata().tolist() == [2, 4]
    outline = axes.collections[0].get_paths()[0].vertices
    assert {tuple(corner) for corner in outline.tolist()} == {(0, 1), (0, 3), (1, 2), (1, 6)}


def test_numbers_in_matrices_do_not_touch(results, style):
    """Not even the widest."""
    full = []
    for one in results.stress.networks:
        accuracy = np.full_like(one.corruptions.accuracy, 100)
        full.append(
            dataclasses.replace(
                one, corruptions=dataclasses.replace(one.corruptions, accuracy=accuracy)
            )
        )
    figure = figures.plot_robustness(dataclasses.replace(results.stress, networks=tuple(full)))
    figure.draw_without_rendering()
    (part,) = figure.subfigs
    for axes in part.axes[:2]:
        boxes = [text.get_window_extent() for text in axes.texts[:5]]
        assert len(boxes) == 5 and all(a.x1 + 1 < b.x0 for a, b in itertools.pairwise(boxes))


def test_a_perfect_network_is_drawn(results, style):
    """Wilson's upper bound of a perfect network, rounded, lies below its accuracy."""
    rounded = Interval(100.0, 99.0, 100.0 - 1e-9)
    perfect = AccuracyIntervals(rounded, (rounded,) * len(results.classes))
    networks = [dataclasses.replace(one, accuracy=perfect) for one in results.networks]
    figure = figures.plot_accuracy(dataclasses.replace(results, networks=tuple(networks)))
    assert len(figure.axes[0].containers) == len(networks)


def test_images_are_named_by_the_class_that_they_show(results):
    """Also where a class has fewer images than were asked for."""
    chosen = results.explained
    assert [name for name, _ in named_images(results)][:3] == ["disc_1", "disc_2", "ring_1"]
    fewer = dataclasses.replace(results, explained=chosen[:1] + chosen[2:])
    named = named_images(fewer)
    for name, image in named:
        assert name.split("_")[0] == results.classes[image.label]


@pytest.mark.parametrize("count", [2, 10, 20, 49])
def test_the_seeds_numbers_do_not_collide(results, style, count):
    """Few have each its number; of many, some do."""
    setup = dataclasses.replace(results.setup, seeds=range(42, 42 + count))
    networks = []
    for of_network in results.networks:
        runs = [dataclasses.replace(of_network.runs[0], accuracy=90 + k % 3) for k in range(count)]
        networks.append(dataclasses.replace(of_network, runs=tuple(runs)))
    figure = figures.plot_seeds(dataclasses.replace(results, setup=setup, networks=networks))
    figure.draw_without_rendering()
    axes = figure.axes[1]
    boxes = [label.get_window_extent() for label in axes.get_xticklabels() if label.get_text()]
    if count <= 10:
        assert axes.get_xticks().tolist() == list(setup.seeds)
    for one, other in itertools.pairwise(boxes):
        assert not one.overlaps(other)


@pytest.mark.filterwarnings("error")
def test_a_single_networks_seeds_are_drawn_without_changes(results, style):
    setup = dataclasses.replace(results.setup, seeds=range(42, 44))
    of_network = results.networks[0]
    networks = (dataclasses.replace(of_network, runs=2 * of_network.runs),)
    alone = dataclasses.replace(results, setup=setup, networks=networks, comparisons=())
    figure = figures.plot_seeds(alone)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    assert axes.get_ylabel() == "test accuracy (%)"


def test_errors_by_attribute_have_one_axis(results, style):
    """Panels side by side are read against each other."""
    *associations, last = results.failures.associations
    wide = dataclasses.replace(
        last, error=tuple(Interval(k, k - 1, k + 1) for k in range(10, 60, 10))
    )
    narrow = []
    for one in associations:
        narrow.append(dataclasses.replace(one, error=(Interval(2.0, 1.0, 3.0),) * 5))
    dossier = dataclasses.replace(results.failures, associations=(*narrow, wide))
    figure = figures.plot_associations(results, dossier)
    ((low, high),) = {axes.get_ylim() for axes in figure.axes if axes.has_data()}
    assert low == 0 and high > 51  # what the last panel shows is not cut off


def test_no_image_fails_twice_in_the_figure(results):
    for group, other in itertools.combinations(results.failures.groups, 2):
        shown = {mistake.image.index for mistake in group.mistakes}
        assert not shown & {mistake.image.index for mistake in other.mistakes}
