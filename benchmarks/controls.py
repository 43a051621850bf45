"""What the study of docs/controls.md found, in one table, from its finished runs.

    python benchmarks/controls.py output/controls output/from_se output/max output/both

Each folder is a run of main.py, whose comparisons are a family: its p are corrected over them
already. Prints the table and what each run concludes, and writes them to controls/ in the folder
--paper, from where report.tex takes them up.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lab.machine.files import write_file
from lab.machine.options import UserError
from lab.measure.statistics import Interval
from lab.report import paper, sentences, tables


def read_run(folder: Path) -> dict[str, Any]:
    """A run's comparison.json; UserError where it has none, or compares nothing."""
    path = folder / "results" / "comparison.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        compared = record["compared_with_first"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not there, or damaged: run main.py first") from error
    if not compared:
        raise UserError(f"{path} compares nothing: run main.py with several networks")
    return record


def table_of(runs: Sequence[dict[str, Any]]) -> tables.Table:
    """A row for each network that a run compares with its first one."""
    names = []
    own = []
    firsts = []
    changes = []
    ps = []
    margin_ps = []
    seconds = []
    for record in runs:
        networks = record["networks"]
        first = next(iter(networks.values()))
        for key, compared in record["compared_with_first"].items():
            network = networks[key]
            difference = compared["overall"]["difference"]
            names.append(f"{network['title']} against {first['title']}{say_recipe(record)}")
            own.append(network["accuracy"]["overall"]["value"])
            firsts.append(first["accuracy"]["overall"]["value"])
            changes.append(Interval(**difference["interval"]))
            ps.append(difference["p_holm"])
            margin_ps.append(difference["margin_p_holm"])
            seconds.append(float(np.mean([one["seconds"] for one in network["runs"]])))
    table = tables.Table("Networks", names)
    table.add("accuracy (%)", own, ".2f")
    table.add("against (%)", firsts, ".2f")
    table.add("change (points)", changes, "+.2f")
    table.add("p (Holm)", ps, sentences.p_of_table)
    table.add("p of equivalence", margin_ps, sentences.p_of_table)
    table.add("s a training", seconds, ".0f")
    return table


def say_recipe(record: dict[str, Any]) -> str:
    """What a row must say of how its networks were trained."""
    settings = record["settings"]
    head = "" if settings["head"] == "mean" else f", head {settings['head']}"
    epochs = sentences.number_of(settings["epochs"], "epoch")
    return f"{head}, {epochs}, {sentences.number_of(settings['seeds'], 'seed')}"


def say_runs(runs: Sequence[dict[str, Any]]) -> list[str]:
    """What each run concludes, and where they were trained."""
    said = []
    machines = []
    for record in runs:
        said.append(record["conclusion"])
        machine = f"{record['device']} in {record['precision']}"
        if machine not in machines:
            machines.append(machine)
    said.append(f"Trained on {sentences.join_with_and(machines)}.")
    return said


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="output folders of main.py")
    parser.add_argument("--paper", type=Path, default=Path("output"), help="whose paper it is for")
    given = parser.parse_args(arguments)
    try:
        runs = [read_run(folder) for folder in given.runs]
    except UserError as error:
        sys.exit(f"controls.py: {error}")
    table = table_of(runs)
    said = say_runs(runs)
    print(tables.in_markdown(table), *said, sep="\n\n")
    macros = {"controlstable": tables.in_latex(table)}
    macros["controlsfindings"] = tables.latex_text(" ".join(said))
    write_file(given.paper / "controls" / "report_values.tex", paper.in_macros(macros))


if __name__ == "__main__":
    main()
