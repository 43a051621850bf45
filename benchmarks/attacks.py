"""What main.py's attack leaves, beside the parts of AutoAttack, on trained networks; one table.

    python benchmarks/attacks.py --data-dir ../shared/data --seeds 3 --attack-images 1000

Takes the options of main.py, whose weights in the output folder are attacked, and the tests'
packages. The reference is adversarial-robustness-toolbox's: APGD on the cross-entropy and on the
ratio of logits, 100 steps each, then Square with 1,000 queries, each on what the ones before have
left (Croce & Hein, ICML 2020).
"""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from art.attacks.evasion import AutoProjectedGradientDescent, SquareAttack
from art.estimators.classification import PyTorchClassifier
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import main

EPSILONS = (1.0, 2.0)  # of 255
STEPS = 100
QUERIES = 1000


def reference_attacks(
    classifier: PyTorchClassifier, epsilon: float
) -> dict[str, AutoProjectedGradientDescent | SquareAttack]:
    """AutoAttack's parts by name, in its order."""
    apgd = {"eps": epsilon, "eps_step": 2 * epsilon, "max_iter": STEPS, "nb_random_init": 1}
    parts = {}
    for name, loss in (("APGD-CE", "cross_entropy"), ("APGD-DLR", "difference_logits_ratio")):
        parts[name] = AutoProjectedGradientDescent(
            classifier, loss_type=loss, batch_size=250, verbose=False, **apgd
        )
    parts["Square"] = SquareAttack(
        classifier, eps=epsilon, max_iter=QUERIES, nb_restarts=1, batch_size=250, verbose=False
    )
    return parts


def attack_by_reference(
    model: nn.Module, images: main.Images, epsilon: float, classes: int, device: torch.device
) -> dict[str, int]:
    """How many images are left after each part."""
    classifier = PyTorchClassifier(
        model,
        nn.CrossEntropyLoss(),
        input_shape=(3, 32, 32),
        nb_classes=classes,
        clip_values=(0, 1),
        device_type="gpu" if device.type == "cuda" else "cpu",
    )
    x = main.to_input(images.pixels).numpy()
    labels = images.labels.numpy()
    right = classifier.predict(x).argmax(1) == labels
    x, labels = x[right], labels[right]
    left = {}
    for name, part in reference_attacks(classifier, epsilon).items():
        np.random.seed(0)
        torch.manual_seed(0)
        if len(x) > 0:
            adversarial = part.generate(x, labels)
            withstood = classifier.predict(adversarial).argmax(1) == labels
            x, labels = x[withstood], labels[withstood]
        left[name] = len(x)
    return left


@dataclasses.dataclass(frozen=True)
class Attempt:
    """A network to be attacked, and the others of its seed."""

    seed: int
    key: str
    models: dict[str, main.Classifier]


def attempt(
    one: Attempt, images: main.Images, settings: main.Settings, hardware: main.Hardware
) -> None:
    """Print a row for each epsilon."""
    stress = dataclasses.replace(settings.stress_tests, epsilons=EPSILONS)
    start = time.perf_counter()
    found = main.attack_in_batches(one.key, one.models, images, stress, hardware)
    seconds = time.perf_counter() - start
    for k, epsilon in enumerate(EPSILONS):
        start = time.perf_counter()
        model: Any = one.models[one.key]
        left = attack_by_reference(model, images, epsilon / 255, 10, hardware.device)
        share = 100 / len(images)
        cells = [one.key, str(one.seed), f"{epsilon:g}", f"{share * found.withstood[k].sum():.1f}"]
        cells += [f"{share * count:.1f}" for count in left.values()]
        cells += [f"{seconds:.0f}", f"{time.perf_counter() - start:.0f}"]
        print("|", " | ".join(cells), "|", flush=True)


def run(settings: main.Settings) -> None:
    hardware = main.prepare_machine(settings)
    data = main.load_data(settings)
    jobs = main.training_jobs(settings)
    trained = [main.load_trained(job.path, job, 10, settings.precision) for job in jobs]
    for one in trained:
        one.model.to(hardware.device)
    index = main.first_images(data, settings.images_to_attack(), settings.stress_tests)
    images = data.test.select(index)
    print(f"{hardware.description}; {len(images)} test images, accuracy (%) that is left")
    print("| network | seed | ε | main.py | APGD-CE | + APGD-DLR | + Square | s (both ε) | s |")
    print("| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
    attempts = []
    for seed in settings.all_seeds():
        models = {one.network.key: one.model for one in trained if one.seed == seed}
        attempts += [Attempt(seed, key, models) for key in models]

    def work(one: Attempt) -> None:
        attempt(one, images, settings, hardware)

    main.side_by_side(work, attempts, hardware)


if __name__ == "__main__":
    run(main.parse_settings())
