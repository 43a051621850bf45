"""The files of a run's results: numbers, and a summary for people.

In come results and the folder's `ResultFiles`; figures have been drawn by then.
"""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Collection, Sequence

from lab.machine.files import ResultFiles, as_json, as_tensors
from lab.measure.failures import Dossier
from lab.report import figures as drawn
from lab.report import headline, history, page, paper, records, summary, tables
from lab.report.headline import Headline
from lab.report.records import COMPARISON_FILE, FAMILIAR_FILE
from lab.report.results import Results
from lab.report.summary import Part, ShownTable

FOLDED_FROM = 15  # rows


def write_numbers(results: Results, files: ResultFiles) -> None:
    """All that has been measured so far, as JSON and CSV in results/."""
    files.write(COMPARISON_FILE, as_json(records.comparison_record(results)))
    if results.stress is not None:
        files.write("results/robustness.json", as_json(records.stress_record(results.stress)))
    known = {"classes": list(results.classes), **dataclasses.asdict(results.familiarity)}
    files.write(FAMILIAR_FILE, as_tensors(known))
    files.write(history.FILE, history.of_results(results))
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


def finish(results: Results, files: ResultFiles) -> None:
    """What people read first, when all numbers are there; deletes what is an earlier run's alone.

    Of the numbers, comparison.json is written once more: what failed, and how long it took.
    """
    files.write(COMPARISON_FILE, as_json(records.comparison_record(results)))
    write_report(results, files)
    files.finish()


def write_report(results: Results, files: ResultFiles) -> None:
    """summary.md, report.html and what report.tex reads; the headline also to the terminal."""
    head = headline.headline(results)
    told = list(summary.parts(results))
    files.write("results/summary.md", in_markdown(head, told, files.written))
    figures = {}
    for name in files.written:
        path = files.folder / name
        if name.startswith("plots/") and name.endswith(".png") and path.exists():
            figures[path.stem] = path.read_bytes()
    accuracy = drawn.accuracy_svg(results)
    files.write("results/report.html", page.report(results, head, told, accuracy, figures))
    if not results.failed:  # a paper tells of a whole run
        files.write("results/report_values.tex", paper.latex_values(results))
    print("", *head.lines(), "", sep="\n")
    print(f"Everything is in {files.folder}/; open {files.folder}/results/report.html first.")


def in_markdown(head: Headline, told: Sequence[Part], written: Collection[str]) -> str:
    """What is told, the headline first; of figures those that were `written`. Long tables fold."""
    paragraphs = [f"# {head.question}", f"**{head.verdict}**", head.decides]
    paragraphs.append("\n".join(f"- {finding}" for finding in head.findings))
    paragraphs.append(f"{head.made}. `{head.command}`")
    for part in told:
        paragraphs += [f"## {part.topic}", *part.sentences]
        for shown in part.tables:
            paragraphs += table_in_markdown(shown)
        for figure in part.figures:
            path = f"plots/{figure.name}.png"
            if path in written:
                paragraphs += [f"![{figure.shows}](../{path})", f"*{figure.shows}*"]
    return "\n\n".join(filter(None, paragraphs)) + "\n"


def table_in_markdown(shown: ShownTable) -> list[str]:
    """A table under its caption, to be unfolded where it is long."""
    text = tables.in_markdown(shown.table)
    if len(shown.table.names) <= FOLDED_FROM:
        return [f"{shown.caption}:", text]
    return [f"<details><summary>{html.escape(shown.caption)}</summary>", text, "</details>"]
