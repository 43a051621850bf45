"""What is told of a run, in order: for the summary and for the page.

In come results; out come parts, each with sentences, tables and the names of figures.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from lab.measure.failures import Dossier
from lab.report import sentences, tables
from lab.report.results import Results, named_images
from lab.report.tables import Table


class Topic(StrEnum):
    """What a part is of."""

    MISSING = "Not all was measured"
    VERDICT = "Does it help?"
    CONFUSIONS = "What is taken for what"
    STRESS = "Stress tests"
    FAILURES = "Failures"
    EXPLANATION = "Where the networks look"
    TRAINING = "Training"


@dataclass(frozen=True)
class ShownTable:
    """A table with what it shows."""

    caption: str
    table: Table


@dataclass(frozen=True)
class ShownFigure:
    """A figure, by the name of its file in plots/, with what it shows."""

    name: str
    shows: str


@dataclass(frozen=True)
class Part:
    """A topic, with what is said of it, tables and figures."""

    topic: Topic
    sentences: Sequence[str]
    tables: Sequence[ShownTable] = ()
    figures: Sequence[ShownFigure] = ()


def parts(results: Results) -> Iterator[Part]:
    """What was found, the verdict first, then in the order of the paper."""
    if results.failed:
        problems = [f"- {phase}: {problem}" for phase, problem in results.failed.items()]
        missing = "This is missing, since it failed:\n\n" + "\n".join(problems)
        yield Part(Topic.MISSING, [missing])
    yield of_verdict(results)
    of_failures: dict[str, Table] = {}
    if results.failures is not None:
        of_failures = tables.failure_tables(results, results.failures)
    yield of_confusions(results, of_failures)
    if results.stress is not None:
        yield of_stress(results)
    if results.failures is not None:
        yield of_mistakes(results, results.failures, of_failures)
    yield of_explanation(results)
    yield of_training(results)


def of_verdict(results: Results) -> Part:
    setup = results.setup
    count = len(setup.seeds)
    epochs = sentences.number_of(setup.epochs, "epoch")
    seeds = sentences.number_of(count, "seed")
    said = [
        *sentences.say_verdicts(results),
        sentences.say_looks(results),
        sentences.say_retest(results),
        f"Test accuracy in percent on {results.images.test:,} images, after {epochs}, {seeds}, "
        f"on {results.hardware.description} in {results.hardware.precision}.",
    ]
    shown = [
        ShownTable("Test accuracy by network", tables.networks_table(results)),
        ShownTable("Test accuracy by class", tables.accuracy_table(results)),
    ]
    if results.retest is not None:
        of_new = tables.retest_table(results, results.retest)
        shown.append(ShownTable("Accuracy on new images", of_new))
    figures = [ShownFigure("accuracy_comparison", "Test accuracy by class, and the paired change")]
    if count > 1:
        figures.append(ShownFigure("seeds", "Each seed's networks, and their changes"))
    return Part(Topic.VERDICT, list(filter(None, said)), shown, figures)


def of_confusions(results: Results, of_failures: dict[str, Table]) -> Part:
    shown = []
    for name, caption in (
        ("classes", "Precision, recall and F1 by class"),
        ("confusions", "The pairs of classes that are confused most; the intervals hold together"),
    ):
        if name in of_failures:
            shown.append(ShownTable(caption, of_failures[name]))
    figures = []
    for of_network in results.networks:
        network = of_network.network
        name = f"confusion_matrix_{network.key}"
        figures.append(ShownFigure(name, f"What {network.title} takes for what"))
    return Part(Topic.CONFUSIONS, [], shown, figures)


def of_stress(results: Results) -> Part:
    assert results.stress is not None
    table = tables.stress_table(results.stress)
    return Part(
        Topic.STRESS,
        list(filter(None, sentences.say_stress(results.stress, results.setup.rules.margin))),
        [ShownTable("All stress tests, and which way each is better", table)],
        [
            ShownFigure("corruptions", "An image under every corruption"),
            ShownFigure("robustness", "Accuracy under corruption"),
            ShownFigure("attacks", "Accuracy under attack"),
            ShownFigure("reliability", "Accuracy by confidence"),
            ShownFigure("selection", "Errors among the most confident images"),
            ShownFigure("shift", "Calibration and sets of classes on corrupted images"),
        ],
    )


def of_mistakes(results: Results, dossier: Dossier, of_failures: dict[str, Table]) -> Part:
    said = sentences.say_failures(results, dossier)
    shown = []
    for name, caption in (
        ("transitions", "What becomes of mistakes"),
        ("people", "Mistakes by how many people agree with the label"),
        ("sure_mistakes", "Mistakes by confidence"),
        ("associations", "What mistakes go with"),
    ):
        if name in of_failures:
            shown.append(ShownTable(caption, of_failures[name]))
    suspects_show = (
        "Test images on which all networks agree against the label: that, the networks' class"
    )
    if dossier.people is not None:
        suspects_show += ", and how many people choose the one and the other"
    words = [said.transitions, said.people, said.sureness, said.common, said.suspects]
    return Part(
        Topic.FAILURES,
        list(filter(None, words)),
        shown,
        [
            ShownFigure("transitions", "What becomes of mistakes, and how sure they are"),
            ShownFigure("associations", "Error by fifths of what images are like"),
            ShownFigure("failure_cases", "The surest mistakes, of all networks and of each alone"),
            ShownFigure("label_suspects", suspects_show),
        ],
    )


def of_explanation(results: Results) -> Part:
    figures = []
    for name, image in named_images(results):
        shows = f"Grad-CAM for what is answered: {results.classes[image.label]} {image.index}"
        figures.append(ShownFigure(f"gradcam_{name}", shows))
    if results.stress is not None:
        figures.append(ShownFigure("deletion_insertion", "What Grad-CAM's pixels are worth"))
        figures.append(ShownFigure("excitation", "The gates by class and channel"))
    return Part(Topic.EXPLANATION, [], [], figures)


def of_training(results: Results) -> Part:
    figures = []
    for of_network in results.networks:
        network = of_network.network
        shows = f"Loss and accuracy of {network.title} by epoch"
        figures.append(ShownFigure(f"{network.key}_curves", shows))
    shown = [ShownTable("Parameters and multiply-adds by layer", tables.layers_table(results))]
    return Part(Topic.TRAINING, [], shown, figures)
