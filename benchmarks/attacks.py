"""What main.py's attack leaves, beside AutoAttack, on trained networks; one table.

    pip install git+https://github.com/fra31/auto-attack
    python benchmarks/attacks.py --data-dir ../shared/data --attack-images 1000

Takes the options of main.py, whose weights in the output folder are attacked. The reference is its
authors' own AutoAttack in the standard version (Croce & Hein, ICML 2020): APGD on the
cross-entropy, targeted APGD on the ratio of logits and targeted FAB, both towards all nine other
classes, 100 steps each, then Square with 5,000 queries, each on what the ones before have left.
It takes hours on a CPU: what is done is kept in autoattack/ in the output folder, and found again.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

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
SOURCE = sorted((Path(__file__).resolve().parents[1] / "lab" / "measure").glob("*.py"))


def withstand_autoattack(
    model: Model, x: Tensor, labels: Tensor, epsilon: float, batch: int, state: Path
) -> Tensor:
    """Which of images float32 [N, 3, 32, 32] are left: bool [N]. It logs what each part leaves.

    What has fallen is kept in the file `state`, from which a killed run goes on.
    """
    reference = AutoAttack(model, eps=epsilon, seed=0, device=x.device)
    reference.run_standard_evaluation(x, labels, bs=batch, state_path=state)
    return torch.tensor(json.loads(state.read_text())["_robust_flags"])


def print_rows(
    key: str,
    seed: int,
    models: dict[str, Model],
    images: Images,
    settings: main.Settings,
    hardware: Hardware,
) -> None:
    """A row for each epsilon."""
    x = to_input(images.pixels).to(hardware.device)
    labels = images.labels.to(hardware.device)
    start = time.perf_counter()
    harder = replace(settings.stress_tests.attacks, epsilons=EPSILONS)
    folder = settings.output() / "autoattack"
    weights = {name: value.cpu() for name, value in models[key].state_dict().items()}
    known = fingerprint({**weights, **images.tensors()})
    pieces = Pieces(folder, {"source": digest_of_files(SOURCE), "network and images": known})
    make = partial(attacks.attack, key, models, images, harder, hardware)
    attacked = pieces.get(f"{key}_seed{seed}", "ours", {}, make, attacks.Attacked)
    seconds = time.perf_counter() - start
    for epsilon, ours in zip(EPSILONS, torch.from_numpy(attacked.robust), strict=True):
        start = time.perf_counter()
        state = folder / f"{key}_seed{seed}_{epsilon:g}_{known[:12]}.json"
        left = withstand_autoattack(
            models[key], x, labels, epsilon / 255, hardware.eval_batch, state
        )
        reference_seconds = time.perf_counter() - start
        left = left.cpu()
        cells = [f"{epsilon:g}", key, str(seed)]
        for robust in (ours, left, ours & left):
            cells.append(f"{100 * robust.double().mean().item():.1f}")
        cells += [f"{seconds:.0f}", f"{reference_seconds:.0f}"]
        print("|", " | ".join(cells), "|", flush=True)


def run(settings: main.Settings) -> None:
    hardware = prepare_machine(settings.machine, len(main.NETWORKS))
    data = main.load_data(settings)
    images = data.test.select(stress.choose(data, settings.stress_tests).attacked)
    device = describe(hardware.device, at_once=1)
    print(f"{device}; {len(images)} test images, accuracy (%) that is left")
    print("| ε | network | seed | main.py | AutoAttack | either | s (both ε) | s of AutoAttack |")
    print("| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |", flush=True)
    jobs = main.training_jobs(settings)
    for seed in settings.all_seeds():
        models = {}
        for job in jobs:
            if job.recipe.seed == seed:
                trained = trainings.load(job.path, job, 10, settings.machine.precision)
                models[job.network.key] = trained.model.to(hardware.device)
        for key in models:
            print_rows(key, seed, models, images, settings, hardware)


if __name__ == "__main__":
    run(main.parse_settings())
