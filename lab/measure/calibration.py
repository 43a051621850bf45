"""How far a network's confidence can be taken for probability.

In come logits and labels; out come the expected calibration error, negative log-likelihood and
Brier score, before and after the logits are divided by a temperature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lab.measure import statistics
from lab.measure.estimates import (
    PERCENT,
    Estimate,
    estimate_by_seed,
    estimate_mean,
    estimate_of_means,
)
from lab.measure.evaluation import Evaluation, at_labels

BINS = 15  # of confidence, in the calibration error


@dataclass(frozen=True)
class Calibration:
    """How often a network is right, by how sure it is."""

    bin_confidence: np.ndarray  # float64 [bins that hold images]: mean, 0 to 1
    bin_correct: np.ndarray  # int64 [bins that hold images]
    bin_images: np.ndarray  # int64 [bins that hold images]

    def pooled(self, least: int) -> list[Bin]:
        """The bins from the least confidence on, joined until each holds `least` images."""
        found: list[Bin] = []
        waiting = Bin(0.0, 0, 0)
        bins = zip(self.bin_confidence, self.bin_correct, self.bin_images, strict=True)
        for confidence, correct, images in bins:
            waiting = waiting.with_more(Bin(float(confidence), int(correct), int(images)))
            if waiting.images >= least:
                found.append(waiting)
                waiting = Bin(0.0, 0, 0)
        if waiting.images > 0:  # too few at the end join the last
            last = found.pop() if found else Bin(0.0, 0, 0)
            found.append(last.with_more(waiting))
        return found


@dataclass(frozen=True)
class Bin:
    """Images of about the same confidence."""

    confidence: float  # mean, 0 to 1
    correct: int
    images: int

    def with_more(self, other: Bin) -> Bin:
        images = self.images + other.images
        confidence = (self.confidence * self.images + other.confidence * other.images) / images
        return Bin(confidence, self.correct + other.correct, images)


@dataclass(frozen=True)
class CalibrationScores:
    """How far confidence can be taken for probability."""

    by_seed: tuple[Calibration, ...]
    error: Estimate  # expected calibration error in percent (Guo et al., ICML 2017)
    negative_log_likelihood: Estimate
    brier_score: Estimate


@dataclass(frozen=True)
class Scores:
    """Before and after the logits are divided by a temperature."""

    temperature: Estimate
    nothing_says_how_unsure: bool  # all validation images of a seed are answered correctly
    is_temperature_largest: bool  # that is tried, in a seed
    as_trained: CalibrationScores
    scaled: CalibrationScores


def calibrate(logits: Tensor, labels: Tensor, bins: int) -> Calibration:
    """Calibration of `logits` [N, classes] against `labels` [N], with `bins` of confidence."""
    logits = logits.double()
    confidence, predicted = logits.softmax(1).max(1)
    correct = (predicted == labels).double()
    where = bins_of(confidence, bins)
    images = torch.bincount(where, torch.ones_like(confidence), minlength=bins)
    confidence_sum = torch.bincount(where, confidence, minlength=bins)
    correct_sum = torch.bincount(where, correct, minlength=bins)
    filled = images > 0
    return Calibration(
        bin_confidence=(confidence_sum / images)[filled].numpy(),
        bin_correct=correct_sum[filled].long().numpy(),
        bin_images=images[filled].long().numpy(),
    )


def bins_of(confidence: Tensor, bins: int) -> Tensor:
    """Which of `bins` equal bins each confidence lies in: int64, as many."""
    return (confidence * bins).long().clamp_max(bins - 1)


def study(
    evaluations: Sequence[Evaluation], labels: Tensor, rules: statistics.Settings, seed: int
) -> Scores:
    """One network's calibration on the test images, as trained and with the temperature."""
    temperature = np.array([evaluation.temperature for evaluation in evaluations])
    as_trained = [evaluation.logits for evaluation in evaluations]
    scaled = [evaluation.scaled_logits() for evaluation in evaluations]
    return Scores(
        temperature=estimate_by_seed(temperature, rules),
        nothing_says_how_unsure=any(one.held_out.all_correct() for one in evaluations),
        is_temperature_largest=any(one.is_temperature_largest() for one in evaluations),
        as_trained=score(as_trained, labels, BINS, rules, seed),
        scaled=score(scaled, labels, BINS, rules, seed),
    )


def score(
    logits: Sequence[Tensor], labels: Tensor, bins: int, rules: statistics.Settings, seed: int
) -> CalibrationScores:
    """Of each seed's logits [N, classes] against `labels` [N]."""
    by_seed = []
    gaps = []
    likelihoods = []
    brier_scores = []
    for of_seed in logits:
        precise = of_seed.double()
        by_seed.append(calibrate(precise, labels, bins))
        gaps.append(confidence_gaps(precise, labels, bins))
        likelihoods.append(F.cross_entropy(precise, labels, reduction="none").numpy())
        truth = F.one_hot(labels, precise.shape[1])
        brier_scores.append((precise.softmax(1) - truth).square().sum(1).numpy())
    return CalibrationScores(
        by_seed=tuple(by_seed),
        error=estimate_of_means(error_of_gaps, gaps, rules, seed, between=PERCENT),
        negative_log_likelihood=estimate_mean(likelihoods, rules),
        brier_score=estimate_mean(brier_scores, rules),
    )


def confidence_gaps(logits: Tensor, labels: Tensor, bins: int) -> np.ndarray:
    """By image and bin of confidence [N, bins]: confidence minus 1 or 0 for right or wrong."""
    return gaps_from(logits, F.one_hot(labels, logits.shape[1]).double(), bins)


def gaps_from(logits: Tensor, truth: Tensor, bins: int) -> np.ndarray:
    """By image and bin of confidence [N, bins]: confidence minus how true the answer is.

    `truth` float64 [N, classes] is 1 for the label, or the share of people who choose a class.
    """
    confidence, predicted = logits.softmax(1).max(1)
    gap = confidence - at_labels(truth, predicted)
    where = F.one_hot(bins_of(confidence, bins), bins)
    return (where * gap[:, None]).numpy()


def error_of_gaps(mean_gaps: np.ndarray) -> float:
    """The expected calibration error in percent, of mean gaps [bins]."""
    return float(100 * np.abs(mean_gaps).sum())
