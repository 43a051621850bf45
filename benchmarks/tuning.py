"""Does the verdict hold when each network has its own best settings?

    python benchmarks/tuning.py --data-dir ../shared/data --seeds 5

Takes the options of main.py. Each network gets the same small budget: four settings, of the rate of
Muon, and of what is the network's own (SE's reduction; the others' other rate), each trained with
all seeds. The best on validation images is trained anew with as many fresh seeds, which chose
nothing, and these networks alone meet the test images, once. Weights and the table go to tuning/ in
the output folder, so that an interrupted run goes on where it stopped, and report.tex takes up the
table from there.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import main
from lab.data.images import Dataset
from lab.machine.device import Hardware, prepare_machine
from lab.machine.files import write_file
from lab.measure import comparison
from lab.measure.evaluation import evaluate_all
from lab.measure.models import Checkpoint, Network, TrainedModel
from lab.report import paper, sentences, tables

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


def changes_of(key: str) -> list[Change]:
    """What a network may choose from."""
    return CANDIDATES.get(key, CANDIDATES["baseline"])


def candidates_of(network: Network, settings: main.Settings) -> list[Candidate]:
    """The network's candidates, in the order of `CANDIDATES`."""
    candidates = []
    for k, change in enumerate(changes_of(network.key)):
        folder = settings.output() / "tuning" / str(k)
        jobs = []
        for seed in settings.all_seeds():
            recipe = dataclasses.replace(settings.recipe, seed=seed, **change)  # type: ignore[arg-type]
            jobs.append(main.TrainingJob(network, recipe, folder / f"{network.key}_seed{seed}.pth"))
        candidates.append(Candidate(network, change, jobs))
    return candidates


def winner_of(
    candidates: Sequence[Candidate], accuracy: Mapping[str, Sequence[float]]
) -> Candidate:
    """The candidate whose mean validation accuracy is highest; of equals the first."""
    return max(candidates, key=lambda one: np.mean(accuracy[one.name()]))


def fresh_jobs(winners: Sequence[Candidate], settings: main.Settings) -> list[main.TrainingJob]:
    """Each winner with as many seeds again, after those that chose it."""
    folder = settings.output() / "tuning" / "winners"
    jobs = []
    for seed in fresh_seeds(settings):
        for winner in winners:
            key = winner.network.key
            recipe = dataclasses.replace(winner.jobs[0].recipe, seed=seed)
            name = f"{key}_seed{seed}_of{changes_of(key).index(winner.change)}.pth"
            jobs.append(main.TrainingJob(winner.network, recipe, folder / name))
    return jobs


def fresh_seeds(settings: main.Settings) -> range:
    chosen_by = settings.all_seeds()
    return range(chosen_by.stop, chosen_by.stop + settings.seeds)


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


def accuracy_of(
    candidates: Sequence[Sequence[Candidate]], checkpoints: Mapping[Path, Checkpoint]
) -> dict[str, list[float]]:
    """Each candidate's validation accuracy in percent by seed, under its name."""
    accuracy = {}
    for candidate in itertools.chain.from_iterable(candidates):
        last_epochs = [checkpoints[job.path].history[-1] for job in candidate.jobs]
        accuracy[candidate.name()] = [log.validation_accuracy for log in last_epochs]
    return accuracy


def table_of(accuracy: Mapping[str, Sequence[float]], seeds: Sequence[int]) -> tables.Table:
    """A row for each candidate, a column for each seed, and the mean."""
    table = tables.Table("Network and setting", list(accuracy))
    for k, seed in enumerate(seeds):
        table.add(f"seed {seed}", [by_seed[k] for by_seed in accuracy.values()], ".2f")
    table.add("mean", [float(np.mean(by_seed)) for by_seed in accuracy.values()], ".2f")
    return table


def say_winners(
    winners: Sequence[Candidate],
    trained: Sequence[TrainedModel],
    data: Dataset,
    settings: main.Settings,
    hardware: Hardware,
) -> list[str]:
    """What the winners' fresh networks do on the test images."""
    labels = data.test.labels.numpy()
    by_network = evaluate_all(trained, data, hardware)
    compared = comparison.compare_with_first(by_network, labels, len(data.classes), settings.rules)
    seeds = fresh_seeds(settings)
    accuracy = []
    for winner in winners:
        mean = np.mean([one.accuracy for one in by_network[winner.network.key]])
        accuracy.append(f"{winner.name()} {mean:.2f} %")
    said = [
        f"The best of each, trained anew with seeds {seeds[0]} to {seeds[-1]}, on the test images: "
        f"{sentences.join_with_and(accuracy)}."
    ]
    for one in compared:
        difference = one.overall.difference
        verdict = sentences.name_verdict(
            difference, one.network, one.first, settings.rules.margin, len(seeds)
        )
        numbers = (
            f"{sentences.in_points(difference.interval)}, {sentences.say_p(difference.p_holm)}"
        )
        said.append(f"{verdict} ({numbers}).")
    machines = {f"{one.checkpoint.device} in {one.checkpoint.precision}" for one in trained}
    said.append(f"Trained on {' and '.join(sorted(machines))}.")
    return said


def run(settings: main.Settings) -> None:
    if settings.seeds < 2:
        sys.exit("tuning.py: one seed does not tell a setting from luck: pass --seeds 2 or more")
    hardware = prepare_machine(settings.machine, len(settings.networks))
    with main.one_line_errors(settings, hardware):
        data = main.load_data(dataclasses.replace(settings, seeds=2 * settings.seeds))
        candidates = [candidates_of(network, settings) for network in settings.taking_part()]
        accuracy = accuracy_of(candidates, train(candidates, data, hardware))
        winners = [winner_of(of_network, accuracy) for of_network in candidates]
        trained = main.train_all(fresh_jobs(winners, settings), data, hardware)
        said = say_winners(winners, trained, data, settings, hardware)
        table = table_of(accuracy, settings.all_seeds())
        print("", tables.in_markdown(table), *said, sep="\n\n")
        macros = {"tuningtable": tables.in_latex(table)}
        macros["tuningverdict"] = tables.latex_text(" ".join(said))
        path = settings.output() / "tuning" / "report_values.tex"
        write_file(path, paper.in_macros(macros))


if __name__ == "__main__":
    run(main.parse_settings())
