"""How well foreign pictures are told, by several rules, on trained networks; one table.

    python benchmarks/unfamiliar.py --data-dir ../shared/data --predict folder_of_foreign_pictures

Takes the options of main.py, whose weights in the output folder are asked. Each rule's limit lets
99 % of half of the test images pass; the table says how many of the other half it then warns of in
vain, and how many of other kinds it tells: drawn shapes, single colours, noise, smooth noise, and
the pictures of --predict. Distances from the classes' means are what main.py used to go by; those
of stages, Mahalanobis', are those of Lee et al. (NeurIPS 2018), neighbours are those of Sun et al.
(ICML 2022), energy is that of Liu et al. (NeurIPS 2020). All stages and the energy, of both
networks, are what main.py goes by.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import main
from lab.data import datasets
from lab.machine.device import Hardware, prepare_machine
from lab.measure import familiar
from lab.measure.evaluation import HeldOut, Outputs, distance_from_any_class, energy, outputs_of
from lab.report import pictures

COUNT = 1000  # images of each kind that can be made
PASS = 0.99  # of the images that set the limit
NEIGHBOUR = 10


@dataclass(frozen=True)
class Known:
    """One network's answers to the validation images, and to every kind of image by name."""

    held_out: HeldOut
    answers: dict[str, Outputs]


def by_class_means(known: Known, outputs: Outputs) -> Tensor:
    """How far the features lie from the nearest class's mean: [N]."""
    return distance_from_any_class(outputs.features, known.held_out.class_means)


def by_stage(known: Known, outputs: Outputs, k: int) -> Tensor:
    """How far a stage's channels lie from those of the validation images: [N]."""
    return familiar.usual(known.held_out.outputs.stages[k]).distance(outputs.stages[k])


def by_energy(known: Known, outputs: Outputs) -> Tensor:
    """How little all logits together say: [N]."""
    return -energy(outputs.logits)


def by_neighbours(known: Known, outputs: Outputs) -> Tensor:
    """How far the tenth of the validation images lies, features scaled to length 1: [N]."""
    own = F.normalize(known.held_out.outputs.features)
    distances = torch.cdist(F.normalize(outputs.features), own)
    return distances.kthvalue(NEIGHBOUR, dim=1).values


RULES: dict[str, Callable[[Known, Outputs], Tensor]] = {
    "class means": by_class_means,
    "neighbours": by_neighbours,
    "stage 1": partial(by_stage, k=0),
    "stage 2": partial(by_stage, k=1),
    "stage 3": partial(by_stage, k=2),
    "energy": by_energy,
}
STAGES = ("stage 1", "stage 2", "stage 3")
TOGETHER = (("class means", "energy"), ("neighbours", "energy"), STAGES, (*STAGES, "energy"))


def ask(settings: main.Settings, hardware: Hardware) -> list[Known]:
    """What each network of the first seed answers to all kinds of images."""
    data = main.load_data(settings)
    pixels = data.test.pixels
    others = datasets.other_kinds(data, COUNT, settings.recipe.seed)
    kinds = {"limits": pixels[::2], "test": pixels[1::2], **others}
    if settings.predict:
        paths = pictures.find_pictures(settings.predict)
        kinds["pictures"] = torch.cat([pictures.read_picture(path).pixels() for path in paths])
    held_out = data.train.select(data.splits[settings.recipe.seed].validation)
    found = []
    for one in main.train_all(main.training_jobs(settings), data, hardware)[: len(main.NETWORKS)]:
        own = outputs_of(one.model, held_out.pixels, hardware, True)
        answers = {name: outputs_of(one.model, x, hardware, True) for name, x in kinds.items()}
        found.append(Known(HeldOut(own, held_out.labels), answers))
    return found


Parts = Sequence[tuple[str, Known]]  # rules by name, each asked of a network


def combinations(networks: Sequence[Known]) -> Iterator[tuple[str, Parts]]:
    """What is tried: each rule, and some together, of each network and of both."""
    for rule in RULES:
        for network, known in zip(main.NETWORKS, networks, strict=True):
            yield f"{rule}, {network.title}", [(rule, known)]
        yield f"{rule}, both", [(rule, known) for known in networks]
    for rules in TOGETHER:
        for network, known in zip(main.NETWORKS, networks, strict=True):
            yield f"{', '.join(rules)}: {network.title}", [(rule, known) for rule in rules]
        parts = [(rule, known) for rule in rules for known in networks]
        yield f"{', '.join(rules)}: both", parts


def shares_told(networks: Sequence[Known]) -> pd.DataFrame:
    """In percent, a row for each combination: how many of each kind are warned of.

    What a rule says of an image is counted in standard deviations of what it says of half of the
    test images, which also set the limit; several are averaged.
    """
    rows = {}
    for name, parts in combinations(networks):
        scores = {}
        for kind in networks[0].answers:
            scores[kind] = torch.stack([standardised(rule, known, kind) for rule, known in parts])
        limit = scores["limits"].mean(0).quantile(PASS)
        rows[name] = {
            kind: 100 * float((of_kind.mean(0) > limit).double().mean())
            for kind, of_kind in scores.items()
        }
    return pd.DataFrame(rows).T.drop(columns="limits")


def standardised(rule: str, known: Known, kind: str) -> Tensor:
    """What a rule says of a network's answers to a kind of images: [N]."""
    usual = RULES[rule](known, known.answers["limits"])
    return (RULES[rule](known, known.answers[kind]) - usual.mean()) / usual.std()


if __name__ == "__main__":
    chosen = main.parse_settings()
    machine = prepare_machine(chosen.machine, len(main.NETWORKS))
    print(shares_told(ask(chosen, machine)).round(1).to_markdown())
