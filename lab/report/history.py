"""results/history.csv: a line for each epoch, written while networks train.

In come epochs as they end; out comes a table that any program can draw, which the finished run
writes once more from what the weights' files say.
"""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

from lab.machine.files import as_csv, hold_lock, write_file
from lab.measure.models import EpochLog
from lab.report.results import Results

FILE = "results/history.csv"
HEADINGS = ["network", "seed", "epoch", *(one.name for one in dataclasses.fields(EpochLog))]
NEVER = -1  # seconds to wait for another rank's line: without end


def add(path: Path, network: str, seed: int, epoch: int, log: EpochLog) -> None:
    """The line of epoch 1, 2, …; of the same training, later ones go: it was begun again there."""
    with hold_lock(path.with_name(f".{path.name}.lock"), NEVER):
        rows = []
        for row in read(path):
            is_same_training = row[:2] == [network, str(seed)]
            if not (is_same_training and int(row[2]) >= epoch):
                rows.append(row)
        rows.append(row_of(network, seed, epoch, log))
        write_file(path, as_csv([HEADINGS, *rows]))


def read(path: Path) -> list[list[str]]:
    """The lines there are; none where there is no such file, or it is another program's."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            headings, *rows = csv.reader(file)
    except (OSError, ValueError, csv.Error):
        return []
    is_own = headings == HEADINGS and all(len(row) == len(HEADINGS) for row in rows)
    is_counted = all(row[2].isdecimal() for row in rows if is_own)
    return rows if is_own and is_counted else []


def of_results(results: Results) -> str:
    """The file of a finished run: network by network, seed by seed."""
    rows = []
    for of_network in results.networks:
        for run in of_network.runs:
            for epoch, log in enumerate(run.history, start=1):
                rows.append(row_of(of_network.network.key, run.seed, epoch, log))
    return as_csv([HEADINGS, *rows])


def row_of(network: str, seed: int, epoch: int, log: EpochLog) -> list[str]:
    values = [f"{value:.6g}" for value in dataclasses.astuple(log)]
    return [network, str(seed), str(epoch), *values]
