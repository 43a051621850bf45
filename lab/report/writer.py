"""The files of a run's results: numbers, and a summary for people.

In come results and the folder's `ResultFiles`; figures have been drawn by then.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lab.machine.files import ResultFiles, as_json, as_tensors
from lab.measure.failures import Dossier
from lab.report import paper, records, sentences, tables
from lab.report.records import COMPARISON_FILE, FAMILIAR_FILE
from lab.report.results import Results, named_images
from lab.report.tables import Table


def write_numbers(results: Results, files: ResultFiles) -> None:
    """All that has been measured so far, as JSON and CSV in results/."""
    files.write(COMPARISON_FILE, as_json(records.comparison_record(results)))
    if results.stress is not None:
        files.write("results/robustness.json", as_json(records.stress_record(results.stress)))
    known = {"classes": list(results.classes), **dataclasses.asdict(results.familiarity)}
    files.write(FAMILIAR_FILE, as_tensors(known))
    for name, table in tables.all_tables(results):
        files.write(f"results/{name}.csv", table.rows().to_csv(index=False))
    for of_network in results.networks:
        accuracy = records.by_class_name(results.classes, of_network.accuracy.by_class)
        means = {name: interval.value for name, interval in accuracy.items()}
        files.write(f"results/{of_network.network.key}_classwise_accuracy.json", as_json(means))


def write_predictions(dossier: Dossier, files: ResultFiles) -> None:
    """What each network answers to each test image, and the images that any of them gets wrong."""
    files.write("results/predictions.csv", dossier.predictions.to_csv(index=False))
    files.write("results/failures.csv", dossier.rows.to_csv(index=False))


@dataclass(frozen=True)
class SummaryPart:
    """A heading, with what is said under it, tables, and figures by name with what they show."""

    heading: str
    sentences: Sequence[str]
    tables: Sequence[Table] = ()
    figures: Sequence[tuple[str, str]] = ()


def summary_parts(results: Results) -> Iterator[SummaryPart]:
    """What was found, the verdict first, then in the order of the paper."""
    setup = results.setup
    if results.failed:
        problems = [f"- {phase}: {problem}" for phase, problem in results.failed.items()]
        yield SummaryPart(
            "Not all was measured", ["This is missing, since it failed:\n\n" + "\n".join(problems)]
        )
    of_networks = [tables.networks_table(results), tables.accuracy_table(results)]
    if results.retest is not None:
        of_networks.append(tables.retest_table(results, results.retest))
    count = len(setup.seeds)
    seeds = f"{count} seed{'s' if count > 1 else ''}"
    yield SummaryPart(
        "Does it help?",
        [
            *sentences.say_verdicts(results),
            sentences.say_looks(results),
            sentences.say_retest(results),
            f"Test accuracy in percent on {results.images.test:,} images, after "
            f"{setup.epochs} epochs, {seeds}, on {results.hardware.description} in "
            f"{results.hardware.precision}:",
        ],
        of_networks,
        [("accuracy_comparison", "Test accuracy by class with intervals")],
    )
    keys = [of_network.network.key for of_network in results.networks]
    confusions = [(f"confusion_matrix_{key}", f"What {key} takes for what") for key in keys]
    of_failures: dict[str, Table] = {}
    if results.failures is not None:
        of_failures = tables.failure_tables(results, results.failures)
    of_classes = [of_failures[name] for name in ("classes", "confusions") if name in of_failures]
    yield SummaryPart("What is taken for what", [], of_classes, confusions)
    if results.stress is not None:
        yield SummaryPart(
            "Stress tests",
            sentences.say_stress(results.stress, setup.rules.margin),
            [tables.stress_table(results.stress)],
            [
                ("corruptions", "An image under every corruption"),
                ("robustness", "Accuracy under corruption"),
                ("attacks", "Accuracy under attack"),
                ("reliability", "Accuracy by confidence"),
                ("selection", "Errors among the most confident images"),
                ("shift", "Calibration and sets of classes on corrupted images"),
            ],
        )
    if results.failures is not None:
        said = sentences.say_failures(results, results.failures)
        names = ("transitions", "people", "sure_mistakes", "associations")
        suspects_show = (
            "Test images on which all networks agree against the label: that, the networks' class"
        )
        if results.failures.people is not None:
            suspects_show += ", and how many people choose the one and the other"
        yield SummaryPart(
            "Failures",
            [said.transitions, said.people, said.sureness, said.common, said.suspects],
            [of_failures[name] for name in names if name in of_failures],
            [
                ("transitions", "What becomes of mistakes, and how sure they are"),
                ("associations", "Error by fifths of what images are like"),
                ("failure_cases", "The most confident mistakes, of all networks and of each alone"),
                ("label_suspects", suspects_show),
            ],
        )
    look_inside = [(f"gradcam_{name}", f"Grad-CAM, {name}") for name, _ in named_images(results)]
    if results.stress is not None:
        look_inside.append(("deletion_insertion", "What Grad-CAM's pixels are worth"))
        look_inside.append(("excitation", "The gates by class and channel"))
    yield SummaryPart("Where the networks look", [], [], look_inside)
    curves = [(f"{key}_curves", f"Loss and accuracy by epoch, {key}") for key in keys]
    if count > 1:
        curves.append(("seeds", "Each seed's networks"))
    yield SummaryPart("Training", [], [tables.layers_table(results)], curves)


def finish(results: Results, files: ResultFiles) -> None:
    """What people read first, when all numbers are there; deletes what is an earlier run's alone.

    Of the numbers, comparison.json is written once more: what failed, and how long it took.
    """
    files.write(COMPARISON_FILE, as_json(records.comparison_record(results)))
    write_report(results, files)
    files.finish()


def write_report(results: Results, files: ResultFiles) -> None:
    """summary.md and what report.tex reads; the former, without figures, also to the terminal."""
    summary = [f"# {results.dataset}"]
    for part in summary_parts(results):
        paragraphs = [f"## {part.heading}", *filter(None, part.sentences)]
        paragraphs += [tables.in_markdown(table) for table in part.tables]
        if part.sentences or part.tables:
            print("", *paragraphs, sep="\n\n")
        for name, shows in part.figures:
            path = f"plots/{name}.png"
            if path in files.written:
                paragraphs.append(f"![{shows}](../{path})")
        summary += paragraphs
    files.write("results/summary.md", "\n\n".join(summary) + "\n")
    if not results.failed:  # a paper tells of a whole run
        files.write("results/report_values.tex", paper.latex_values(results))
    print(f"\n\nEverything is in {files.folder}/; look at {files.folder}/results/summary.md first.")
