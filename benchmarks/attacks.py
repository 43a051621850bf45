"""What main.py's attack leaves, beside AutoAttack, on trained networks; one table.

    pip install git+https://github.com/fra31/auto-attack
    python benchmarks/attacks.py --data-dir ../shared/data --attack-images 1000

Takes the options of main.py, whose weights in the output folder are attacked. The reference is its
authors' own AutoAttack in the standard version (Croce & Hein, ICML 2020): APGD on the
cross-entropy, targeted APGD on the ratio of logits and targeted FAB, both towards all nine other
classes, 100 steps each, then Square with 5,000 queries, each on what the ones before have left.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from autoattack import AutoAttack
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import main

EPSILONS = (1.0, 2.0)  # of 255


def withstand_autoattack(
    model: main.Classifier, x: Tensor, labels: Tensor, epsilon: float, batch: int
) -> Tensor:
    """Which of images float32 [N, 3, 32, 32] are left: bool [N]. It logs what each part leaves."""
    reference = AutoAttack(model, eps=epsilon, seed=0, device=x.device)
    attacked = reference.run_standard_evaluation(x, labels, bs=batch)
    return main.answers_rightly(model, attacked, labels)


def print_rows(
    key: str,
    seed: int,
    models: dict[str, main.Classifier],
    images: main.Images,
    settings: main.Settings,
    hardware: main.Hardware,
) -> None:
    """A row for each epsilon."""
    x = main.to_input(images.pixels).to(hardware.device)
    labels = images.labels.to(hardware.device)
    start = time.perf_counter()
    stress = replace(settings.stress_tests, epsilons=EPSILONS)
    found = main.attack_in_batches(key, models, images, stress, hardware)
    seconds = time.perf_counter() - start
    for epsilon, withstood in zip(EPSILONS, torch.from_numpy(found.withstood), strict=True):
        start = time.perf_counter()
        left = withstand_autoattack(models[key], x, labels, epsilon / 255, settings.eval_batch)
        reference_seconds = time.perf_counter() - start
        left = left.cpu()
        cells = [f"{epsilon:g}", key, str(seed)]
        for robust in (withstood, left, withstood & left):
            cells.append(f"{100 * robust.double().mean().item():.1f}")
        cells += [f"{seconds:.0f}", f"{reference_seconds:.0f}"]
        print("|", " | ".join(cells), "|", flush=True)


def run(settings: main.Settings) -> None:
    hardware = main.prepare_machine(settings)
    data = main.load_data(settings)
    index = main.first_images(data, settings.images_to_attack(), settings.stress_tests)
    images = data.test.select(index)
    device = main.describe(hardware.device, at_once=1)
    print(f"{device}; {len(images)} test images, accuracy (%) that is left")
    print("| ε | network | seed | main.py | AutoAttack | either | s (both ε) | s of AutoAttack |")
    print("| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |", flush=True)
    jobs = main.training_jobs(settings)
    for seed in settings.all_seeds():
        models = {}
        for job in jobs:
            if job.recipe.seed == seed:
                trained = main.load_trained(job.path, job, 10, settings.precision)
                models[job.network.key] = trained.model.to(hardware.device)
        for key in models:
            print_rows(key, seed, models, images, settings, hardware)


if __name__ == "__main__":
    run(main.parse_settings())
