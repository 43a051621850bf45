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
from lab.machine.pieces import Pieces
from lab.measure import calibration, robustness, statistics
from lab.measure.corruptions import SEVERITIES
from lab.measure.estimates import PERCENT, Estimate, estimate, estimate_mean, estimate_of_means
from lab.measure.evaluation import (
    ByNetwork,
    Evaluation,
    at_labels,
    distance_from_any_class,
    energy,
    outputs_of,
)
from lab.measure.models import Model, fingerprint


@dataclass(frozen=True)
class Settings:
    """How doubt and calibration are measured."""

    conformal_misses: Annotated[tuple[float, ...], Between(0.001, 0.9)] = (0.05, 0.01)
    """shares of images whose set of likely classes may miss the true one"""
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


def risks(confidence: np.ndarray, wrong: np.ndarray) -> np.ndarray:
    """Errors in percent among the most confident 1, 2, … N images [N].

    Of images of the same confidence any may come first: each counts what all do on average.
    """
    levels, which, counts = np.unique(-confidence, return_inverse=True, return_counts=True)
    share_wrong = np.bincount(which, wrong, minlength=len(levels)) / counts
    expected = np.repeat(share_wrong, counts)
    return 100 * expected.cumsum() / np.arange(1, len(wrong) + 1)


def area_under_risks(confidence: np.ndarray, wrong: np.ndarray) -> float:
    """The mean risk over all coverages, AURC (Geifman et al., ICLR 2019)."""
    return float(risks(confidence, wrong).mean())


@dataclass(frozen=True)
class SelectionScores:
    """What is gained by leaving out the images of least confidence."""

    coverage: np.ndarray  # float64 [points], percent of the images that are answered
    risk: np.ndarray  # float64 [seeds, points], percent of these that are wrong
    area: Estimate


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

    miss: float  # that share
    coverage: Estimate  # percent of the test images whose set holds the true class
    size: Estimate  # classes in a set, on average
    empty: Estimate  # percent of the sets that hold no class


@dataclass(frozen=True)
class ShiftScores:
    """On the benchmark's corruptions (Ovadia et al., NeurIPS 2019), each by severity.

    Calibration errors in percent, means over the corruptions.
    """

    error_as_trained: tuple[Estimate, ...]
    error_scaled: tuple[Estimate, ...]
    likelihood_as_trained: tuple[Estimate, ...]  # negative log-likelihood
    likelihood_scaled: tuple[Estimate, ...]
    sets: tuple[tuple[ConformalScores, ...], ...]  # each for every share that may be missed


@dataclass(frozen=True)
class Scores:
    """Whether a network knows when it does not know."""

    as_trained: SelectionScores
    without_norm: SelectionScores
    foreign: dict[str, ForeignScores]  # by what the images are
    conformal: tuple[ConformalScores, ...]  # by the share that may be missed
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
    pieces: Pieces,
) -> Scores:
    """All that is measured of one network's doubt."""
    evaluations = by_network[key]
    foreign = {}
    for name, pixels in data.foreign.items():
        foreign[name] = study_foreign(evaluations, pixels, rules, seed, hardware, pieces)
    limits = [least_probabilities(one, settings.conformal_misses) for one in evaluations]
    logits = [evaluation.logits[None] for evaluation in evaluations]
    return Scores(
        as_trained=study_selection(evaluations, confidence_as_trained, rules, seed),
        without_norm=study_selection(evaluations, confidence_without_norm, rules, seed),
        foreign=foreign,
        conformal=study_sets(logits, limits, data.test.labels, settings, rules),
        shift=study_shift(
            corrupted.benchmark_logits[key],
            corrupted.labels,
            [evaluation.temperature for evaluation in evaluations],
            limits,
            settings,
            rules,
            seed,
        ),
    )


def study_selection(
    evaluations: Sequence[Evaluation],
    confidence: Callable[[Tensor], np.ndarray],
    rules: statistics.Settings,
    seed: int,
) -> SelectionScores:
    """By one measure of confidence, on the test images."""
    points = 100
    by_seed = [(confidence(one.logits), ~one.correct) for one in evaluations]
    images = len(evaluations[0].correct)
    last = np.ceil(np.arange(1, points + 1) * images / points).astype(int) - 1
    return SelectionScores(
        coverage=100 * (last + 1) / images,
        risk=np.stack([risks(*arrays)[last] for arrays in by_seed]),
        area=estimate(area_under_risks, by_seed, rules, seed, between=PERCENT),
    )


@dataclass(frozen=True)
class Answers:
    """What one trained network gives for foreign images."""

    logits: np.ndarray  # float32 [N, classes]
    features: np.ndarray  # float32 [N, C]


def answer(model: Model, pixels: Tensor, hardware: Hardware) -> Answers:
    """For images uint8 [N, 32, 32, 3]."""
    outputs = outputs_of(model, pixels, hardware)
    return Answers(outputs.logits.numpy(), outputs.features.numpy())


def study_foreign(
    evaluations: Sequence[Evaluation],
    pixels: Tensor,
    rules: statistics.Settings,
    seed: int,
    hardware: Hardware,
    pieces: Pieces,
) -> ForeignScores:
    """Test images against foreign ones, uint8 [N, 32, 32, 3]."""
    by_confidence = []
    by_energy = []
    by_distance = []
    depends_on = {"images": fingerprint({"pixels": pixels})}
    for evaluation in evaluations:
        ask = partial(answer, evaluation.trained.model, pixels, hardware)
        answers = evaluation.measured_once(pieces, "foreign", depends_on, ask, Answers)
        logits = torch.cat([evaluation.logits, torch.from_numpy(answers.logits)])
        features = torch.cat([evaluation.features, torch.from_numpy(answers.features)])
        distance = distance_from_any_class(features, evaluation.held_out.class_means)
        is_own = np.arange(len(logits)) < len(evaluation.logits)
        by_confidence.append((confidence_as_trained(logits), is_own))
        by_energy.append((energy(logits).numpy(), is_own))
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
    return Detection(
        auroc=estimate(auroc, by_seed, rules, seed, is_own, PERCENT),
        false_positives=estimate(false_positives, by_seed, rules, seed, is_own, PERCENT),
    )


def least_probabilities(evaluation: Evaluation, misses: Sequence[float]) -> list[float]:
    """The threshold of each share that may be missed, from a network's validation images."""
    held_out = evaluation.held_out
    return [least_probability(held_out.outputs.logits, held_out.labels, miss) for miss in misses]


def least_probability(logits: Tensor, labels: Tensor, miss: float) -> float:
    """The threshold that the true class passes on all but a share `miss` of new images.

    Of N images, the ⌊(N + 1) miss⌋-th smallest probability of the true class: sets hold the true
    class with a chance of at least 1 - miss, if images come from the same source.
    """
    of_truth = at_labels(logits.softmax(1), labels).double().sort().values
    place = math.floor((len(labels) + 1) * miss) - 1
    return float(of_truth[place]) if place >= 0 else 0.0


def study_sets(
    logits: Sequence[Tensor],
    limits: Sequence[Sequence[float]],
    labels: Tensor,
    settings: Settings,
    rules: statistics.Settings,
) -> tuple[ConformalScores, ...]:
    """Sets of classes of each seed's logits [tries, N, classes], by the share that may be missed.

    `limits` are each seed's least probabilities.
    """
    scores = []
    for k, miss in enumerate(settings.conformal_misses):
        held = []
        sizes = []
        empty = []
        for of_seed, of_limits in zip(logits, limits, strict=True):
            inside = of_seed.softmax(-1).double() >= of_limits[k]  # [tries, N, classes]
            tries = len(inside)
            at_label = inside.gather(2, labels[None, :, None].expand(tries, -1, 1))[..., 0]
            held.append(100 * at_label.double().mean(0).numpy())
            sizes.append(inside.sum(2).double().mean(0).numpy())
            empty.append(100 * (~inside.any(2)).double().mean(0).numpy())
        scores.append(
            ConformalScores(
                miss=miss,
                coverage=estimate_mean(held, rules, 100 / tries, between=PERCENT),
                size=estimate_mean(sizes, rules),
                empty=estimate_mean(empty, rules, 100 / tries, between=PERCENT),
            )
        )
    return tuple(scores)


def study_shift(
    corrupted: Tensor,
    labels: Tensor,
    temperatures: Sequence[float],
    limits: Sequence[Sequence[float]],
    settings: Settings,
    rules: statistics.Settings,
    seed: int,
) -> ShiftScores:
    """Calibration and sets of classes under corruption: means over the corruptions.

    `corrupted` are logits [seeds, corruptions, severities, N, classes], `labels` int64 [N].
    """
    bins = calibration.BINS
    error_as_trained = []
    error_scaled = []
    likelihood_as_trained = []
    likelihood_scaled = []
    sets = []
    for k in range(len(SEVERITIES)):
        as_trained = [of_seed[:, k].double() for of_seed in corrupted]
        scaled = []
        for of_seed, temperature in zip(as_trained, temperatures, strict=True):
            scaled.append(of_seed / temperature)
        error_as_trained.append(error_of_each(as_trained, labels, bins, rules, seed))
        error_scaled.append(error_of_each(scaled, labels, bins, rules, seed))
        likelihood_as_trained.append(likelihood_of_all(as_trained, labels, rules))
        likelihood_scaled.append(likelihood_of_all(scaled, labels, rules))
        sets.append(study_sets(as_trained, limits, labels, settings, rules))
    return ShiftScores(
        error_as_trained=tuple(error_as_trained),
        error_scaled=tuple(error_scaled),
        likelihood_as_trained=tuple(likelihood_as_trained),
        likelihood_scaled=tuple(likelihood_scaled),
        sets=tuple(sets),
    )


def error_of_each(
    logits: Sequence[Tensor], labels: Tensor, bins: int, rules: statistics.Settings, seed: int
) -> Estimate:
    """The calibration error under each corruption, averaged: errors of opposite sign stay.

    Of each seed's logits [corruptions, N, classes].
    """
    by_seed = []
    for of_seed in logits:
        gaps = [calibration.confidence_gaps(one, labels, bins) for one in of_seed]
        by_seed.append(np.stack(gaps, axis=1))  # [N, corruptions, bins]
    return estimate_of_means(mean_error_of_gaps, by_seed, rules, seed, between=PERCENT)


def mean_error_of_gaps(mean_gaps: np.ndarray) -> float:
    """The mean calibration error in percent, of mean gaps [corruptions, bins]."""
    return float(100 * np.abs(mean_gaps).sum(1).mean())


def likelihood_of_all(
    logits: Sequence[Tensor], labels: Tensor, rules: statistics.Settings
) -> Estimate:
    """The mean negative log-likelihood of each seed's logits [corruptions, N, classes]."""
    by_seed = []
    for of_seed in logits:
        repeated = labels.expand(len(of_seed), -1)
        losses = F.cross_entropy(of_seed.transpose(1, 2), repeated, reduction="none")
        by_seed.append(losses.mean(0).numpy())
    return estimate_mean(by_seed, rules)
