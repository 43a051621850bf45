"""What main.py's attack leaves, beside AutoAttack, on trained networks; one table.

    pip install git+https://github.com/fra31/auto-attack
    python benchmarks/attacks.py --data-dir ../shared/data --attack-images 1000

Takes the options of main.py, whose weights in the output folder are attacked. The reference is its
authors' own AutoAttack in the standard version (Croce & Hein, ICML 2020): APGD on the
cross-entropy, targeted APGD on the ratio of logits and targeted FAB, both towards all nine other
classes, 100 steps each, then Square with 5,000 queries, each on what the ones before have left.
It takes hours on a CPU. Each part on each 250 images, its authors' batch, is kept in autoattack/ in
the output folder when it ends, and found again by the same command.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from autoattack import AutoAttack
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import main
from lab.data.images import Images, to_input
from lab.machine.device import Hardware, describe, prepare_machine
from lab.machine.pieces import Pieces, digest_of_files
from lab.measure import attacks, stress, trainings
from lab.measure.models import Model, fingerprint

EPSILONS = (1.0, 2.0)  # of 255
PARTS = ("apgd-ce", "apgd-t", "fab-t", "square")  # of the standard version, in its order
BATCH = 250
SOURCE = sorted((Path(__file__).resolve().parents[1] / "lab" / "measure").glob("*.py"))


@dataclass(frozen=True)
class Left:
    """What withstood one part of AutoAttack: bool [N] of the images that it was shown."""

    robust: np.ndarray


def withstand(
    part: str, model: Model, images: Images, epsilon: float, device: torch.device
) -> Left:
    """AutoAttack's own loop, with one of its parts."""
    x = to_input(images.pixels.to(device))
    labels = images.labels.to(device)
    reference = AutoAttack(model, eps=epsilon / 255, seed=0, device=device, verbose=False)
    reference.attacks_to_run = [part]
    attacked = reference.run_standard_evaluation(x, labels, bs=len(x))
    return Left(attacks.is_correct(model, attacked, labels).cpu().numpy())


def withstand_autoattack(
    owner: str, model: Model, images: Images, epsilon: float, device: torch.device, pieces: Pieces
) -> dict[str, Tensor]:
    """Which of N images are left after each part: bool [N]. "clean" is before the first."""
    batches = torch.arange(len(images)).split(BATCH)
    left = torch.zeros(len(images), dtype=torch.bool)
    for batch in batches:
        some = images.select(batch).to(device)
        left[batch] = attacks.is_correct(model, to_input(some.pixels), some.labels).cpu()
    left_after = {"clean": left}
    for part in PARTS:
        still_left = left.clone()
        for batch in batches:
            index = batch[left[batch]]
            if len(index) == 0:
                continue
            make = partial(withstand, part, model, images.select(index), epsilon, device)
            depends_on = {"epsilon": epsilon, "part": part, "index": index.tolist()}
            piece = pieces.get(owner, "autoattack", depends_on, make, Left)
            still_left[index] = torch.from_numpy(piece.robust)
            print(
                f"{owner}, {epsilon:g}, {part}: {len(index)}, {piece.robust.sum()} left", flush=True
            )
        left = still_left
        left_after[part] = left
    return left_after


def percent(robust: Tensor) -> str:
    return f"{100 * robust.double().mean().item():.1f}"


def rows_of(
    key: str,
    seed: int,
    models: dict[str, Model],
    images: Images,
    settings: main.Settings,
    hardware: Hardware,
) -> list[str]:
    """A row for each epsilon."""
    owner = f"{key}_seed{seed}"
    harder = replace(settings.stress_tests.attacks, epsilons=EPSILONS)
    folder = settings.output() / "autoattack"
    weights = {name: value.cpu() for name, value in models[key].state_dict().items()}
    known = {"network and images": fingerprint({**weights, **images.tensors()})}
    start = time.perf_counter()
    make = partial(attacks.attack, key, models, images, harder, hardware)
    our_pieces = Pieces(folder, {**known, "source": digest_of_files(SOURCE)})
    attacked = our_pieces.get(owner, "ours", {}, make, attacks.Attacked)
    seconds = time.perf_counter() - start
    reference_pieces = Pieces(folder, known)  # of AutoAttack, whatever our source
    rows = []
    for epsilon, ours in zip(EPSILONS, torch.from_numpy(attacked.robust), strict=True):
        start = time.perf_counter()
        left_after = withstand_autoattack(
            owner, models[key], images, epsilon, hardware.device, reference_pieces
        )
        reference_seconds = time.perf_counter() - start
        cells = [f"{epsilon:g}", key, str(seed), percent(ours)]
        cells += [percent(left) for left in left_after.values()]
        cells.append(percent(ours & left_after[PARTS[-1]]))
        cells += [f"{seconds:.0f}", f"{reference_seconds:.0f}"]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def run(settings: main.Settings) -> None:
    hardware = prepare_machine(settings.machine, len(main.NETWORKS))
    data = main.load_data(settings)
    images = data.test.select(stress.choose(data, settings.stress_tests).attacked)
    device = describe(hardware.device, at_once=1)
    rows = [
        f"{device}; {len(images)} test images, accuracy (%) that is left",
        "| ε | network | seed | main.py | clean | APGD-CE | APGD-T | FAB-T | Square: all of it "
        "| either | s (both ε) | s of AutoAttack |",
        "| --- | --- | --- " + "| ---: " * 9 + "|",
    ]
    jobs = main.training_jobs(settings)
    for seed in settings.all_seeds():
        models = {}
        for job in jobs:
            if job.recipe.seed == seed:
                trained = trainings.load(job.path, job, 10, settings.machine.precision)
                models[job.network.key] = trained.model.to(hardware.device)
        for key in models:
            rows += rows_of(key, seed, models, images, settings, hardware)
    print("\n".join(rows))


if __name__ == "__main__":
    run(main.parse_settings())
