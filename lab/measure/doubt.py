"""Does a network know when it does not know?

In come evaluations, the logits of corrupted images, and images of other kinds. Out come errors
among the most confident images, how well foreign images are told from test images, sets of classes
that should hold the true one, and calibration under corruption.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import numpy as np
import scipy
import torch
import torch.nn.functional as F
from torch import Tensor

from lab.data.images import Dataset
from lab.machine.device import Hardware
from lab.machine.options import Between, ImageCount
from lab.measure import calibration, robustness, statistics
from lab.measure.corruptions import SEVERITIES
from lab.measure.evaluation import (
    ByNetwork,
    Evaluation,
    at_labels,
    distance_from_any_class,
    first_key,
    outputs_of,
)
from lab.measure.statistics import Estimate


@dataclass(frozen=True)
class Settings:
    """How doubt and calibration are measured."""

    calibration_bins: Annotated[int, Between(1, 1000)] = 15
    """bins of confidence in the calibration error"""
    conformal_miss: Annotated[float, Between(0.001, 0.9)] = 0.1
    """share of images whose set of likely classes may miss the true one"""
    foreign_images: ImageCount = 2000
    """images of another kind to be told from the test images, of each kind"""


def confidence_as_trained(logits: Tensor) -> np.ndarray:
    """The probability of the predicted class: float32 [N]."""
    return logits.softmax(1).amax(1).numpy()


def confidence_without_norm(logits: Tensor) -> np.ndarray:
    """The largest logit, of logits with mean 0 and norm 1: float32 [N].

    Networks that learn smoothed labels say by the logits' norm less than they know (Xia et al.,
    arXiv 2403.14715; Cattelan & Silva, UAI 2024).
    """
    centred = logits - logits.mean(1, keepdim=True)
    return F.normalize(centred, dim=1).amax(1).numpy()


def energy(logits: Tensor) -> np.ndarray:
    """What all logits say together: high on familiar images (Liu et al., NeurIPS 2020)."""
    return logits.logsumexp(1).numpy()


def risks(confidence: np.ndarray, wrong: np.ndarray) -> np.ndarray:
    """Errors in percent among the most confident 1, 2, … N images [N]."""
    order = np.argsort(-confidence, kind="stable")
    return 100 * wrong[order].cumsum() / np.arange(1, len(wrong) + 1)


def area_under_risks(confidence: np.ndarray, wrong: np.ndarray) -> float:
    """The mean risk over all coverages (Geifman & El-Yaniv, NeurIPS 2017)."""
    return float(risks(confidence, wrong).mean())


@dataclass(frozen=True)
class SelectionScores:
    """What is gained by leaving out the images of least confidence."""

    coverage: np.ndarray  # float64 [points], percent of the images that are answered
    risk: np.ndarray  # float64 [seeds, points], percent of these that are wrong
    area: Estimate
    change: Estimate | None  # of the area, from the first network


def auroc(familiarity: np.ndarray, is_own: np.ndarray) -> float:
    """How often an own image looks more familiar than a foreign one, in percent."""
    ranks = scipy.stats.rankdata(familiarity)
    own = int(is_own.sum())
    foreign = len(is_own) - own
    wins = ranks[is_own].sum() - own * (own + 1) / 2
    return float(100 * wins / max(1, own * foreign))


def false_positives(familiarity: np.ndarray, is_own: np.ndarray) -> float:
    """Foreign images that pass where 95 % of the own ones do, in percent."""
    threshold = np.quantile(familiarity[is_own], 0.05)
    return float(100 * (familiarity[~is_own] >= threshold).mean())


@dataclass(frozen=True)
class Detection:
    """How well a measure of familiarity tells foreign images from the test images."""

    auroc: Estimate
    false_positives: Estimate


@dataclass(frozen=True)
class ForeignScores:
    """By each measure."""

    by_confidence: Detection
    by_energy: Detection
    by_distance: Detection  # from the nearest class's mean


@dataclass(frozen=True)
class ConformalScores:
    """Sets of classes that are to hold the true one of all but a share of the images.

    The threshold is the validation images' (split conformal prediction: Vovk et al., 2005).
    """

    coverage: Estimate  # percent of the test images whose set holds the true class
    size: Estimate  # classes in a set, on average


@dataclass(frozen=True)
class ShiftScores:
    """On the benchmark's corruptions (Ovadia et al., NeurIPS 2019), each by severity.

    Calibration errors and coverage in percent.
    """

    error_as_trained: tuple[Estimate, ...]
    error_scaled: tuple[Estimate, ...]
    likelihood_as_trained: tuple[Estimate, ...]  # negative log-likelihood
    likelihood_scaled: tuple[Estimate, ...]
    set_coverage: tuple[Estimate, ...]
    set_size: tuple[Estimate, ...]


@dataclass(frozen=True)
class Scores:
    """Whether a network knows when it does not know."""

    as_trained: SelectionScores
    without_norm: SelectionScores
    foreign: dict[str, ForeignScores]  # by what the images are
    conformal: ConformalScores
    shift: ShiftScores


def study(
    key: str,
    by_network: ByNetwork,
    corrupted: robustness.Study,
    data: Dataset,
    settings: Settings,
    rules: statistics.Settings,
    seed: int,
    hardware: Hardware,
) -> Scores:
    """All that is measured of one network's doubt."""
    evaluations = by_network[key]
    first = by_network[first_key(by_network)]
    foreign = {}
    for name, pixels in data.foreign.items():
        foreign[name] = study_foreign(evaluations, pixels, rules, seed, hardware)
    thresholds = []
    for evaluation in evaluations:
        held_out = evaluation.held_out
        thresholds.append(
            least_probability(held_out.outputs.logits, held_out.labels, settings.conformal_miss)
        )
    return Scores(
        as_trained=study_selection(evaluations, first, confidence_as_trained, rules, seed),
        without_norm=study_selection(evaluations, first, confidence_without_norm, rules, seed),
        foreign=foreign,
        conformal=study_conformal(evaluations, thresholds, data.test.labels, rules, seed),
        shift=study_shift(
            corrupted.benchmark_logits[key],
            corrupted.labels,
            [evaluation.temperature for evaluation in evaluations],
            thresholds,
            settings.calibration_bins,
            rules,
            seed,
        ),
    )


def study_selection(
    evaluations: Sequence[Evaluation],
    first_evaluations: Sequence[Evaluation],
    confidence: Callable[[Tensor], np.ndarray],
    rules: statistics.Settings,
    seed: int,
) -> SelectionScores:
    """By one measure of confidence, on the test images."""
    points = 100
    by_seed = [(confidence(one.logits), ~one.correct) for one in evaluations]
    images = len(evaluations[0].correct)
    last = np.ceil(np.arange(1, points + 1) * images / points).astype(int) - 1
    risk = np.stack([risks(*arrays)[last] for arrays in by_seed])
    change = None
    if evaluations is not first_evaluations:
        pairs = []
        for arrays, first in zip(by_seed, first_evaluations, strict=True):
            pairs.append((*arrays, confidence(first.logits), ~first.correct))
        change = statistics.estimate(change_of_area, pairs, rules, seed, of_one_image=0)
    return SelectionScores(
        coverage=100 * (last + 1) / images,
        risk=risk,
        area=statistics.estimate(area_under_risks, by_seed, rules, seed, of_one_image=0),
        change=change,
    )


def change_of_area(
    confidence: np.ndarray, wrong: np.ndarray, first_confidence: np.ndarray, first_wrong: np.ndarray
) -> float:
    """From the first network's area to another's: less is better."""
    return area_under_risks(confidence, wrong) - area_under_risks(first_confidence, first_wrong)


def study_foreign(
    evaluations: Sequence[Evaluation],
    pixels: Tensor,
    rules: statistics.Settings,
    seed: int,
    hardware: Hardware,
) -> ForeignScores:
    """Test images against foreign ones, uint8 [N, 32, 32, 3]."""
    by_confidence = []
    by_energy = []
    by_distance = []
    for evaluation in evaluations:
        outputs = outputs_of(evaluation.trained.model, pixels, hardware)
        logits = torch.cat([evaluation.logits, outputs.logits])
        features = torch.cat([evaluation.features, outputs.features])
        distance = distance_from_any_class(features, evaluation.held_out.class_means)
        is_own = np.arange(len(logits)) < len(evaluation.logits)
        by_confidence.append((confidence_as_trained(logits), is_own))
        by_energy.append((energy(logits), is_own))
        by_distance.append((-distance.numpy(), is_own))
    return ForeignScores(
        by_confidence=detect(by_confidence, rules, seed),
        by_energy=detect(by_energy, rules, seed),
        by_distance=detect(by_distance, rules, seed),
    )


def detect(
    by_seed: Sequence[tuple[np.ndarray, np.ndarray]], rules: statistics.Settings, seed: int
) -> Detection:
    """From each seed's familiarity and which images are own."""
    _, is_own = by_seed[0]
    estimate = partial(
        statistics.estimate,
        by_seed=by_seed,
        settings=rules,
        seed=seed,
        of_one_image=0,
        groups=is_own,
    )
    return Detection(auroc=estimate(auroc), false_positives=estimate(false_positives))


def study_conformal(
    evaluations: Sequence[Evaluation],
    thresholds: Sequence[float],
    labels: Tensor,
    rules: statistics.Settings,
    seed: int,
) -> ConformalScores:
    """On the test images."""
    coverage = []
    size = []
    for evaluation, threshold in zip(evaluations, thresholds, strict=True):
        held, sizes = prediction_sets(evaluation.logits, labels, threshold)
        coverage.append((held,))
        size.append((sizes,))
    return ConformalScores(
        coverage=statistics.estimate(np.mean, coverage, rules, seed, of_one_image=100),
        size=statistics.estimate(np.mean, size, rules, seed, of_one_image=1),
    )


def least_probability(logits: Tensor, labels: Tensor, miss: float) -> float:
    """The threshold that the true class passes on all but a share `miss` of new images.

    Of N images, the ⌊(N + 1) miss⌋-th smallest probability of the true class: sets hold the true
    class with a chance of at least 1 - miss, if images come from the same source.
    """
    of_truth = at_labels(logits.softmax(1), labels).double().sort().values
    place = math.floor((len(labels) + 1) * miss) - 1
    return float(of_truth[place]) if place >= 0 else 0.0


def prediction_sets(logits: Tensor, labels: Tensor, least: float) -> tuple[np.ndarray, np.ndarray]:
    """Whether each image's set holds the label, 100 or 0, and how many classes it holds."""
    inside = logits.softmax(1).double() >= least
    held = at_labels(inside, labels)
    return 100.0 * held.numpy(), inside.sum(1).double().numpy()


def study_shift(
    corrupted: Tensor,
    labels: Tensor,
    temperatures: Sequence[float],
    thresholds: Sequence[float],
    bins: int,
    rules: statistics.Settings,
    seed: int,
) -> ShiftScores:
    """Calibration and sets of classes under corruption.

    `corrupted` are logits [seeds, corruptions, severities, N, classes], `labels` int64 [N].
    """
    by_severity: list[list[ShiftedImages]] = []
    for k in range(len(SEVERITIES)):
        of_seeds = []
        for of_seed, temperature, threshold in zip(
            corrupted, temperatures, thresholds, strict=True
        ):
            logits = of_seed[:, k].double()
            of_seeds.append(shifted_images(logits, labels, temperature, threshold, bins))
        by_severity.append(of_seeds)

    def estimates(
        statistic: Callable[..., float], part: Callable[[ShiftedImages], np.ndarray]
    ) -> tuple[Estimate, ...]:
        """By severity, of one part of what is known of the images."""
        estimated = []
        for of_seeds in by_severity:
            arrays = [(part(images),) for images in of_seeds]
            estimated.append(statistics.estimate(statistic, arrays, rules, seed, of_one_image=0))
        return tuple(estimated)

    return ShiftScores(
        error_as_trained=estimates(
            calibration.error_of_gaps, lambda images: images.gaps_as_trained
        ),
        error_scaled=estimates(calibration.error_of_gaps, lambda images: images.gaps_scaled),
        likelihood_as_trained=estimates(np.mean, lambda images: images.likelihood_as_trained),
        likelihood_scaled=estimates(np.mean, lambda images: images.likelihood_scaled),
        set_coverage=estimates(np.mean, lambda images: images.held),
        set_size=estimates(np.mean, lambda images: images.set_size),
    )


@dataclass(frozen=True)
class ShiftedImages:
    """What a network says of N images under corruptions of one severity: means over these.

    So that images can be drawn again. float64 [N]; gaps are [N, bins], of
    `calibration.confidence_gaps`.
    """

    gaps_as_trained: np.ndarray
    gaps_scaled: np.ndarray
    likelihood_as_trained: np.ndarray
    likelihood_scaled: np.ndarray
    held: np.ndarray  # 100 where the image's set holds the label, else 0
    set_size: np.ndarray


def shifted_images(
    logits: Tensor, labels: Tensor, temperature: float, threshold: float, bins: int
) -> ShiftedImages:
    """From float64 logits [corruptions, N, classes] and labels int64 [N]."""
    gaps_as_trained = []
    gaps_scaled = []
    likelihood_as_trained = []
    likelihood_scaled = []
    held = []
    set_size = []
    for as_trained in logits:
        scaled = as_trained / temperature
        gaps_as_trained.append(calibration.confidence_gaps(as_trained, labels, bins))
        gaps_scaled.append(calibration.confidence_gaps(scaled, labels, bins))
        likelihood_as_trained.append(F.cross_entropy(as_trained, labels, reduction="none").numpy())
        likelihood_scaled.append(F.cross_entropy(scaled, labels, reduction="none").numpy())
        of_labels, sizes = prediction_sets(as_trained, labels, threshold)
        held.append(of_labels)
        set_size.append(sizes)
    return ShiftedImages(
        gaps_as_trained=np.mean(gaps_as_trained, axis=0),
        gaps_scaled=np.mean(gaps_scaled, axis=0),
        likelihood_as_trained=np.mean(likelihood_as_trained, axis=0),
        likelihood_scaled=np.mean(likelihood_scaled, axis=0),
        held=np.mean(held, axis=0),
        set_size=np.mean(set_size, axis=0),
    )
