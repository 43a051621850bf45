"""Does the verdict hold when each network has its own best settings? On validation images alone.

    python benchmarks/tuning.py --data-dir ../shared/data --seeds 2

Takes the options of main.py. Each network gets the same small budget: four settings, of the rate of
Muon, and of what is the network's own (SE's reduction; the Baseline's other rate). Weights go to
output/tuning/, so that an interrupted run goes on where it stopped; the test images are not used.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import main

Change = Mapping[str, float]  # of a recipe, by the setting's name

RATES: list[Change] = [{"muon_rate": 0.04}, {"muon_rate": 0.06}, {"muon_rate": 0.09}]
CANDIDATES: dict[str, list[Change]] = {
    "baseline": [*RATES, {"learning_rate": 0.1}],
    "se_attention": [*RATES, {"reduction": 4}],
}


def candidate_jobs(settings: main.Settings) -> dict[str, list[list[main.TrainingJob]]]:
    """By network, for each of its candidates a job for each seed."""
    jobs: dict[str, list[list[main.TrainingJob]]] = {}
    for network in main.NETWORKS:
        jobs[network.key] = []
        for k, change in enumerate(CANDIDATES[network.key]):
            folder = settings.output() / "tuning" / str(k)
            of_candidate = []
            for seed in settings.all_seeds():
                recipe = dataclasses.replace(settings.recipe, seed=seed, **change)  # type: ignore[arg-type]
                path = folder / f"{network.key}_seed{seed}.pth"
                of_candidate.append(main.TrainingJob(network, recipe, path))
            jobs[network.key].append(of_candidate)
    return jobs


def say(change: Change) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in change.items())


def run(settings: main.Settings) -> None:
    hardware = main.prepare_machine(settings)
    data = main.load_data(settings)
    jobs = candidate_jobs(settings)
    # Networks in turn, so that two that are trained side by side take as long.
    in_turn: list[main.TrainingJob] = []
    for candidates in zip(*jobs.values(), strict=True):
        for of_seeds in zip(*candidates, strict=True):
            in_turn.extend(of_seeds)
    trained = main.train_all(in_turn, data, hardware)
    accuracy = {}
    for job, one in zip(in_turn, trained, strict=True):
        accuracy[job.path] = one.checkpoint.history[-1].validation_accuracy

    print("\n| network | settings | validation accuracy (%) by seed | mean |")
    print("| --- | --- | --- | ---: |")
    best: dict[str, list[float]] = {}
    for network in main.NETWORKS:
        for change, of_candidate in zip(CANDIDATES[network.key], jobs[network.key], strict=True):
            by_seed = [accuracy[job.path] for job in of_candidate]
            shown = ", ".join(f"{value:.2f}" for value in by_seed)
            print(f"| {network.title} | {say(change)} | {shown} | {np.mean(by_seed):.2f} |")
            if network.key not in best or np.mean(by_seed) > np.mean(best[network.key]):
                best[network.key] = by_seed
    first, *others = main.NETWORKS
    for network in others:
        gain = np.mean(best[network.key]) - np.mean(best[first.key])
        print(f"\n{network.title} minus {first.title}, each at its best: {gain:+.2f} points")


if __name__ == "__main__":
    run(main.parse_settings())
