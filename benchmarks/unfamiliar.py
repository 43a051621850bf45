"""How well foreign pictures are told, by several rules, on trained networks; one table.

    python benchmarks/unfamiliar.py --data-dir ../shared/data --predict folder_of_foreign_pictures

Takes the options of main.py, whose weights in the output folder are asked. Each rule's limit lets
99 % of the validation images pass; the table says how many of the test images it then warns of in
vain, and how many of other kinds it tells: drawn shapes, flat colours, noise, smooth noise, and the
pictures of --predict. Distances from the classes' means are what main.py used to go by; neighbours
are those of Sun et al. (ICML 2022), energy is that of Liu et al. (NeurIPS 2020).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import scipy
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import main
from lab.data import shapes
from lab.machine.device import Hardware, prepare_machine
from lab.measure.evaluation import HeldOut, Outputs, distance_from_any_class, outputs_of
from lab.report import pictures

COUNT = 1000  # images of each kind that can be made
PASS = 0.99  # of the validation images
NEIGHBOUR = 10


@dataclass(frozen=True)
class Known:
    """One network's answers to the validation images, and to every kind of image by name."""

    held_out: HeldOut
    answers: dict[str, Outputs]


def by_class_means(known: Known, outputs: Outputs) -> Tensor:
    """How far the features lie from the nearest class's mean: [N]."""
    return distance_from_any_class(outputs.features, known.held_out.class_means)


def by_mahalanobis(known: Known, outputs: Outputs) -> Tensor:
    """The same in units of how far a class's own images lie in that direction: [N]."""
    own = known.held_out
    within = (own.outputs.features - own.class_means[own.labels]).double()
    covariance = within.T @ within / len(within)
    covariance += 1e-3 * covariance.diagonal().mean() * torch.eye(len(covariance))
    root = torch.linalg.cholesky(torch.linalg.inv(covariance))
    return torch.cdist(outputs.features.double() @ root, own.class_means.double() @ root).amin(1)


def by_residual(known: Known, outputs: Outputs) -> Tensor:
    """The part of the features that is off the main directions of the validation images': [N]."""
    own = known.held_out.outputs.features.double()
    centre = own.mean(0)
    _, _, directions = torch.linalg.svd(own - centre, full_matrices=False)
    off = directions[own.shape[1] // 4 :]
    return ((outputs.features.double() - centre) @ off.T).norm(dim=1)


def by_energy(known: Known, outputs: Outputs) -> Tensor:
    """How little all logits together say: [N]."""
    return -outputs.logits.logsumexp(1)


def by_neighbours(known: Known, outputs: Outputs) -> Tensor:
    """How far the tenth of the validation images lies, features scaled to length 1: [N].

    A validation image is not its own neighbour.
    """
    own = known.held_out.outputs
    distances = torch.cdist(F.normalize(outputs.features), F.normalize(own.features))
    if outputs is own:
        distances.fill_diagonal_(torch.inf)
    return distances.kthvalue(NEIGHBOUR, dim=1).values


RULES: dict[str, Callable[[Known, Outputs], Tensor]] = {
    "class means": by_class_means,
    "Mahalanobis": by_mahalanobis,
    "residual": by_residual,
    "energy": by_energy,
    "neighbours": by_neighbours,
}


def make_foreign(seed: int) -> dict[str, Tensor]:
    """Images uint8 [N, 32, 32, 3] of other kinds, by name."""
    rng = np.random.default_rng(seed)
    size = (COUNT, 32, 32, 3)
    noise = rng.integers(0, 256, size, np.uint8)
    flat = np.broadcast_to(rng.integers(0, 256, (COUNT, 1, 1, 3), np.uint8), size).copy()
    smooth = scipy.ndimage.gaussian_filter(rng.normal(0, 1, size), (0, 4, 4, 0))
    low = smooth.min((1, 2), keepdims=True)
    high = smooth.max((1, 2), keepdims=True)
    smooth = (255 * (smooth - low) / (high - low)).astype(np.uint8)
    return {
        "drawn shapes": shapes.draw(COUNT, seed).pixels,
        "noise": torch.from_numpy(noise),
        "smooth noise": torch.from_numpy(smooth),
        "flat": torch.from_numpy(flat),
    }


def surprise(known: Known, rule: Callable[[Known, Outputs], Tensor], outputs: Outputs) -> Tensor:
    """The share of the validation images that are more familiar than each image: [N]."""
    own = rule(known, known.held_out.outputs).sort().values
    return torch.searchsorted(own, rule(known, outputs)) / len(own)


def ask(settings: main.Settings, hardware: Hardware) -> list[Known]:
    """What each network of the first seed answers to all kinds of images."""
    data = main.load_data(settings)
    kinds = {"test": data.test.pixels, **make_foreign(settings.recipe.seed)}
    if settings.predict:
        paths = pictures.find_pictures(settings.predict)
        kinds["pictures"] = torch.cat([pictures.read_picture(path).pixels() for path in paths])
    held_out = data.train.select(data.splits[settings.recipe.seed].validation)
    found = []
    for one in main.train_all(main.training_jobs(settings), data, hardware)[: len(main.NETWORKS)]:
        own = outputs_of(one.model, held_out.pixels, hardware)
        answers = {name: outputs_of(one.model, x, hardware) for name, x in kinds.items()}
        found.append(Known(HeldOut(own, held_out.labels), answers))
    return found


def shares_told(networks: list[Known]) -> pd.DataFrame:
    """In percent, a row for each rule: of one network, of the more surprised, of all together."""
    rows = {}
    names = [network.title for network in main.NETWORKS]
    for rule_name, rule in RULES.items():
        for title, known in zip(names, networks, strict=True):
            own = surprise(known, rule, known.held_out.outputs)
            limit = own.quantile(PASS)
            row = {
                k: 100 * share_over(surprise(known, rule, o), limit)
                for k, o in known.answers.items()
            }
            rows[f"{rule_name}, {title}"] = row
    combined = {
        name: [(rule, known) for rule in rules for known in networks]
        for name, rules in (
            *((f"{rule_name} of both", [rule]) for rule_name, rule in RULES.items()),
            ("means and energy of both", [by_class_means, by_energy]),
            ("residual and energy of both", [by_residual, by_energy]),
            ("residual and neighbours of both", [by_residual, by_neighbours]),
            ("neighbours and energy of both", [by_neighbours, by_energy]),
            ("all of both", list(RULES.values())),
        )
    }
    for how_name, how in (("most", torch.amax), ("mean", torch.mean)):
        for name, parts in combined.items():
            own = how(torch.stack([surprise(k, r, k.held_out.outputs) for r, k in parts]), 0)
            limit = own.quantile(PASS)
            row = {}
            for kind in networks[0].answers:
                scores = how(torch.stack([surprise(k, r, k.answers[kind]) for r, k in parts]), 0)
                row[kind] = 100 * share_over(scores, limit)
            rows[f"{name}, {how_name}"] = row
    return pd.DataFrame(rows).T


def share_over(scores: Tensor, limit: Tensor) -> float:
    return float((scores > limit).double().mean())


if __name__ == "__main__":
    chosen = main.parse_settings()
    machine = prepare_machine(chosen.machine, len(main.NETWORKS))
    print(shares_told(ask(chosen, machine)).round(1).to_markdown())
