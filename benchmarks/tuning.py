"""Does the verdict hold when each network has its own best settings? On validation images alone.

    python benchmarks/tuning.py --data-dir ../shared/data --seeds 2

Takes the options of main.py. Each network gets the same small budget: four settings, of the rate of
Muon, and of what is the network's own (SE's reduction; the Baseline's other rate). Weights and the
table go to tuning/ in the output folder, so that an interrupted run goes on where it stopped, and
report.tex takes up the table from there. The test images are not used.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import main
from lab.data.images import Dataset
from lab.machine.device import Hardware, prepare_machine
from lab.machine.files import write_file
from lab.measure import statistics
from lab.measure.models import Checkpoint, Network
from lab.report import sentences, tables

Change = Mapping[str, float]  # of a recipe, by the setting's name

RATES: list[Change] = [{"muon_rate": 0.04}, {"muon_rate": 0.06}, {"muon_rate": 0.09}]
CANDIDATES: dict[str, list[Change]] = {
    "baseline": [*RATES, {"learning_rate": 0.1}],
    "se_attention": [*RATES, {"reduction": 4}],
}


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One of a network's settings, trained with each seed."""

    network: Network
    change: Change
    jobs: Sequence[main.TrainingJob]

    def name(self) -> str:
        settings = ", ".join(
            f"{setting.replace('_', ' ')} {value:g}" for setting, value in self.change.items()
        )
        return f"{self.network.title}: {settings}"


def candidates_of(network: Network, settings: main.Settings) -> list[Candidate]:
    """The network's candidates, in the order of `CANDIDATES`."""
    candidates = []
    changes = CANDIDATES.get(network.key, CANDIDATES["baseline"])
    for k, change in enumerate(changes):
        folder = settings.output() / "tuning" / str(k)
        jobs = []
        for seed in settings.all_seeds():
            recipe = dataclasses.replace(settings.recipe, seed=seed, **change)  # type: ignore[arg-type]
            jobs.append(main.TrainingJob(network, recipe, folder / f"{network.key}_seed{seed}.pth"))
        candidates.append(Candidate(network, change, jobs))
    return candidates


def train(
    candidates: Sequence[Sequence[Candidate]], data: Dataset, hardware: Hardware
) -> dict[Path, Checkpoint]:
    """Each job's checkpoint by its file; trained where it was not before."""
    jobs: list[main.TrainingJob] = []
    for of_networks in zip(*candidates, strict=True):  # in turn: two side by side take as long
        for of_seed in zip(*(candidate.jobs for candidate in of_networks), strict=True):
            jobs.extend(of_seed)
    checkpoints = {}
    for job, trained in zip(jobs, main.train_all(jobs, data, hardware), strict=True):
        checkpoints[job.path] = trained.checkpoint
    return checkpoints


def report(
    candidates: Sequence[Sequence[Candidate]],
    checkpoints: Mapping[Path, Checkpoint],
    settings: main.Settings,
    images: int,
) -> None:
    """Print the table and what follows from it, and write them for report.tex."""
    by_seed: dict[str, list[float]] = {}  # validation accuracy in percent
    for candidate in (one for of_network in candidates for one in of_network):
        last_epochs = [checkpoints[job.path].history[-1] for job in candidate.jobs]
        by_seed[candidate.name()] = [log.validation_accuracy for log in last_epochs]
    table = tables.Table("Network and setting", list(by_seed))
    for k, seed in enumerate(settings.all_seeds()):
        table.add(f"seed {seed}", [found[k] for found in by_seed.values()], ".2f")
    table.add("mean", [float(np.mean(found)) for found in by_seed.values()], ".2f")

    best = []
    for of_network in candidates:
        best.append(max((by_seed[one.name()] for one in of_network), key=np.mean))
    said: list[str] = []
    for network, found in zip(main.NETWORKS[1:], best[1:], strict=True):
        gains = np.subtract(found, best[0])
        test = statistics.t_test(gains, 100 / images)
        difference = statistics.judge_by(test, settings.rules)
        verdict = sentences.name_verdict(
            difference, network, main.NETWORKS[0], settings.rules.margin, len(gains)
        )
        interval = difference.interval
        said.append(
            f"Each at its best, on validation images, {verdict}: {interval.value:+.2f} points, "
            f"{interval.low:+.2f} to {interval.high:+.2f} over {len(gains)} seeds."
        )
    machines = {f"{one.device} in {one.precision}" for one in checkpoints.values()}
    said.append(f"Trained on {' and '.join(sorted(machines))}.")
    print("", tables.in_markdown(table), *said, sep="\n\n")
    macros = {"tuningtable": tables.in_latex(table)}
    macros["tuningverdict"] = tables.latex_text(" ".join(said))
    lines = [rf"\newcommand{{\{name}}}{{{content}}}" for name, content in macros.items()]
    write_file(settings.output() / "tuning" / "report_values.tex", "\n".join(lines) + "\n")


def run(settings: main.Settings) -> None:
    if settings.seeds < 2:
        sys.exit("tuning.py: one seed does not tell a setting from luck: pass --seeds 2 or more")
    hardware = prepare_machine(settings.machine, len(main.NETWORKS))
    with main.one_line_errors(settings, hardware):
        data = main.load_data(settings)
        candidates = [candidates_of(network, settings) for network in main.NETWORKS]
        checkpoints = train(candidates, data, hardware)
        images = len(data.splits[settings.recipe.seed].validation)
        report(candidates, checkpoints, settings, images)


if __name__ == "__main__":
    run(main.parse_settings())
