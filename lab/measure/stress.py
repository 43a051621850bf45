"""The stress tests, one after the other, of all networks.

In come evaluations, the data and which of its test images to try; out comes an `Outcome`, all that
the five tests measured. Each says when it begins and how long it took.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from torch import Tensor

from lab.data.images import Dataset, first_of_class
from lab.machine.console import Stopwatch
from lab.machine.device import Hardware
from lab.machine.parallel import Tick, try_each
from lab.machine.pieces import Pieces
from lab.measure import (
    attacks,
    calibration,
    corruptions,
    doubt,
    gates,
    heatmaps,
    people,
    robustness,
    showcase,
    statistics,
)
from lab.measure.evaluation import ByNetwork, networks_of
from lab.measure.models import Network
from lab.measure.showcase import Showcase

SHARES = {"off": 0, "quick": 1 / 8, "full": 1}  # of the images that are tried


@dataclass(frozen=True)
class Settings:
    """How hard the trained networks are tried."""

    stress: Literal["full", "quick", "off"] = "full"
    """stress tests; quick takes an eighth of the images"""
    robustness: robustness.Settings = field(default_factory=robustness.Settings)
    attacks: attacks.Settings = field(default_factory=attacks.Settings)
    doubt: doubt.Settings = field(default_factory=doubt.Settings)
    heatmaps: heatmaps.Settings = field(default_factory=heatmaps.Settings)

    def share(self) -> float:
        """How much of the images is tried."""
        return SHARES[self.stress]


@dataclass(frozen=True)
class Chosen:
    """Which test images are tried: int64 indices, the first of each class."""

    corrupted: Tensor
    attacked: Tensor
    explained: Tensor  # whose heatmaps are tried


@dataclass(frozen=True)
class NetworkOutcome:
    """What a network does under stress."""

    network: Network
    corruptions: robustness.Scores
    attacks: attacks.Scores
    calibration: calibration.Scores
    people: people.Calibrated | None  # None without people's answers
    doubt: doubt.Scores
    heatmaps: heatmaps.Scores
    gates: gates.Scores | None


@dataclass(frozen=True)
class Doubts:
    """What is measured of a network's probabilities."""

    calibration: calibration.Scores
    people: people.Calibrated | None
    doubt: doubt.Scores


@dataclass(frozen=True)
class Outcome:
    """The stress tests of all networks, and the image that shows the corruptions."""

    classes: tuple[str, ...]
    networks: tuple[NetworkOutcome, ...]
    original: np.ndarray  # uint8 [32, 32, 3]
    corrupted: dict[str, np.ndarray]  # by corruption, at severity 3
    showcase: Showcase  # one image, with what the first seed's networks say of it
    official: bool  # whether the corrupted images are CIFAR-10-C's own
    level: float  # of tests and intervals

    def seeds(self) -> int:
        """Of how many each network was tried."""
        return len(self.networks[0].corruptions.accuracy)

    def benchmark_corruptions(self) -> list[str]:
        """Those that means are over."""
        return [name for name in self.corrupted if name not in corruptions.EXTRA]


def choose(data: Dataset, settings: Settings) -> Chosen:
    """The test images to try, a share of those that are asked for or usual for the data."""
    corrupted = settings.robustness.stress_images
    if corrupted is None:
        corrupted = data.usually_corrupted
    attacked = settings.attacks.attack_images
    if attacked is None:
        attacked = data.usually_attacked
    share = settings.share()
    return Chosen(
        corrupted=first_images(data, corrupted, share),
        attacked=first_images(data, attacked, share),
        explained=first_images(data, settings.heatmaps.curve_images, share),
    )


def first_images(data: Dataset, count: int, share: float) -> Tensor:
    """Indices of about a `share` of `count` test images, as many of each class."""
    classes = len(data.classes)
    of_each = math.ceil(share * count / classes)
    return first_of_class(data.test.labels, range(classes), of_each)


def run(
    by_network: ByNetwork,
    data: Dataset,
    chosen: Chosen,
    settings: Settings,
    rules: statistics.Settings,
    seed: int,
    hardware: Hardware,
    pieces: Pieces,
) -> Outcome:
    """All stress tests of all networks; `pieces` has what an earlier run has measured of them."""
    watch = Stopwatch()
    keys = list(by_network)
    attacked_images = data.test.select(chosen.attacked)
    explained_images = data.test.select(chosen.explained)

    with watch.phase("stress 1/5: corruptions"):
        corrupted = robustness.study(
            by_network, data, chosen.corrupted, rules, seed, hardware, pieces
        )

    with watch.phase("stress 2/5: attacks"):
        attacked = attacks.study(
            by_network, attacked_images, settings.attacks, rules, seed, hardware, pieces
        )

    def study_doubt(key: str, _: Tick) -> Doubts:
        calibrated = calibration.study(by_network[key], data.test.labels, rules, seed)
        of_people = None
        if data.people is not None:
            of_people = people.study_probabilities(by_network[key], data.people, rules, seed)
        doubted = doubt.study(
            key, by_network, corrupted, data, settings.doubt, rules, seed, hardware, pieces
        )
        return Doubts(calibrated, of_people, doubted)

    with watch.phase("stress 3/5: doubt"):
        doubts = try_each(study_doubt, keys, hardware, "doubt")

    def study_heatmaps(key: str, _: Tick) -> heatmaps.Scores:
        return heatmaps.study(
            by_network[key], explained_images, settings.heatmaps, rules, seed, hardware, pieces
        )

    with watch.phase("stress 4/5: heatmaps"):
        maps = try_each(study_heatmaps, keys, hardware, "heatmaps")

    def study_gates(key: str, _: Tick) -> gates.Scores:
        return gates.study(
            by_network[key], data.test, len(data.classes), rules, seed, hardware, pieces
        )

    with_gates = [key for key in keys if gates.has_gates(by_network[key][0].trained.model)]
    # One network alone may have all cores.
    sharing = replace(hardware, at_once=max(1, min(hardware.at_once, len(with_gates))))
    with watch.phase("stress 5/5: gates"):
        found = try_each(study_gates, with_gates, sharing, "gates")
        gated = dict(zip(with_gates, found, strict=True))
    gated = gates.correct_over_networks(gated, rules.level)

    first_seed = [evaluations[0] for evaluations in by_network.values()]
    shown = showcase.make(first_seed, data, chosen.attacked, settings.attacks, seed, hardware)

    networks = []
    for k, network in enumerate(networks_of(by_network)):
        networks.append(
            NetworkOutcome(
                network=network,
                corruptions=corrupted.scores[network.key],
                attacks=attacked[network.key],
                calibration=doubts[k].calibration,
                people=doubts[k].people,
                doubt=doubts[k].doubt,
                heatmaps=maps[k],
                gates=gated.get(network.key),
            )
        )
    return Outcome(
        classes=data.classes,
        networks=tuple(networks),
        original=corrupted.original,
        corrupted=corrupted.examples,
        showcase=shown,
        official=len(data.official) > 0,
        level=rules.level,
    )
