"""All that a run has found, typed; whatever is reported is made of it alone.

In come evaluations and what the measurements found; out comes `Results`, which keeps neither models
nor logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from lab.data.images import Dataset
from lab.machine.device import Hardware, Precision
from lab.measure import comparison, statistics
from lab.measure.comparison import AccuracyIntervals, Comparison
from lab.measure.evaluation import ByNetwork, Evaluation, correct_by_seed
from lab.measure.failures import Dossier
from lab.measure.familiar import Familiarity
from lab.measure.gradcam import ExplainedImage
from lab.measure.looks import Look
from lab.measure.models import EpochLog, LayerCost, Network, layer_costs
from lab.measure.retest import Retest
from lab.measure.stress import Chosen, Outcome


@dataclass(frozen=True)
class ImageCounts:
    """How many images were used for what; the split is the first seed's."""

    train: int
    validation: int
    test: int
    corrupted: int
    attacked: int


@dataclass(frozen=True)
class SeedResults:
    """What one seed gave: accuracy in percent, and how the network got its weights."""

    seed: int
    accuracy: float
    class_accuracy: np.ndarray  # float64 [classes]
    confusion: np.ndarray  # int64 [classes, classes]: true class by predicted class
    seconds: float  # of training, without validation
    history: tuple[EpochLog, ...]
    device: str
    precision: Precision
    versions: dict[str, str]


@dataclass(frozen=True)
class NetworkResults:
    """A network's costs, and its accuracy over all seeds and by seed."""

    network: Network
    layers: tuple[LayerCost, ...]
    accuracy: AccuracyIntervals
    runs: tuple[SeedResults, ...]

    def parameters(self) -> int:
        return sum(layer.parameters for layer in self.layers)

    def multiply_adds(self) -> int:
        return sum(layer.multiply_adds for layer in self.layers)


@dataclass(frozen=True)
class Setup:
    """What a run was asked for, as far as its report tells of it."""

    command: str  # that does it again
    date: str  # when, as in 2026-11-28
    commit: str  # of the program; "" where it is no checkout
    options: dict[str, object]  # every setting under the name of its option
    seeds: range
    epochs: int
    stages: int  # of the networks
    rules: statistics.Settings


@dataclass(frozen=True)
class Results:
    """All that a run has found so far; figures and report are made of it alone."""

    setup: Setup
    hardware: Hardware
    dataset: str
    classes: tuple[str, ...]
    images: ImageCounts
    networks: tuple[NetworkResults, ...]
    seconds: Mapping[str, float]  # by phase
    familiarity: Familiarity  # what --predict needs
    looks: tuple[Look, ...] = ()  # at networks of this recipe in this folder, this one's last
    # What a part that has not been done, or has failed, would add
    comparisons: tuple[Comparison, ...] = ()
    retest: Retest | None = None
    explained: tuple[ExplainedImage, ...] = ()
    failures: Dossier | None = None
    stress: Outcome | None = None
    failed: Mapping[str, str] = field(default_factory=dict)  # what went wrong, by phase


def count_images(data: Dataset, chosen: Chosen, seed: int) -> ImageCounts:
    """How many images a run used whose first seed this is."""
    split = data.splits[seed]
    return ImageCounts(
        train=len(split.training),
        validation=len(split.validation),
        test=len(data.test),
        corrupted=len(chosen.corrupted),
        attacked=len(chosen.attacked),
    )


def network_results(
    by_network: ByNetwork, data: Dataset, rules: statistics.Settings
) -> tuple[NetworkResults, ...]:
    """What is kept of each network's evaluations."""
    labels = data.test.labels.numpy()
    networks = []
    for evaluations in by_network.values():
        correct = correct_by_seed(evaluations)
        first = evaluations[0]
        networks.append(
            NetworkResults(
                network=first.trained.network,
                layers=layer_costs(first.trained.model),
                accuracy=comparison.accuracy_intervals(correct, labels, len(data.classes), rules),
                runs=tuple(seed_results(evaluation) for evaluation in evaluations),
            )
        )
    return tuple(networks)


def seed_results(evaluation: Evaluation) -> SeedResults:
    """What is kept of one evaluation."""
    checkpoint = evaluation.trained.checkpoint
    return SeedResults(
        seed=evaluation.trained.seed,
        accuracy=evaluation.accuracy,
        class_accuracy=evaluation.class_accuracy,
        confusion=evaluation.confusion,
        seconds=sum(log.seconds for log in checkpoint.history),
        history=tuple(checkpoint.history),
        device=checkpoint.device,
        precision=checkpoint.precision,
        versions=checkpoint.versions,
    )


def named_images(results: Results) -> Iterator[tuple[str, ExplainedImage]]:
    """The images explained, named by class and number: cat_1, cat_2, dog_1."""
    seen: dict[int, int] = {}
    for image in results.explained:
        seen[image.label] = seen.get(image.label, 0) + 1
        yield f"{results.classes[image.label]}_{seen[image.label]}", image
