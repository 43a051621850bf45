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

from lab.measure.evaluation import Evaluation


@dataclass(frozen=True)
class Calibration:
    """How far confidence can be taken for probability."""

    error: float  # expected calibration error in percent (Guo et al., ICML 2017)
    negative_log_likelihood: float
    brier_score: float
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
class Scores:
    """By seed; before and after the logits are divided by a temperature."""

    temperature: np.ndarray  # float64 [seeds]
    as_trained: tuple[Calibration, ...]
    scaled: tuple[Calibration, ...]


def calibrate(logits: Tensor, labels: Tensor, bins: int) -> Calibration:
    """Calibration of `logits` [N, classes] against `labels` [N], with `bins` of confidence."""
    logits = logits.double()
    probabilities = logits.softmax(1)
    confidence, predicted = probabilities.max(1)
    correct = (predicted == labels).double()
    where = bins_of(confidence, bins)
    images = torch.bincount(where, torch.ones_like(confidence), minlength=bins)
    confidence_sum = torch.bincount(where, confidence, minlength=bins)
    correct_sum = torch.bincount(where, correct, minlength=bins)
    gaps = (confidence_sum - correct_sum).abs()
    truth = F.one_hot(labels, logits.shape[1])
    filled = images > 0
    return Calibration(
        error=100 * float(gaps.sum()) / len(labels),
        negative_log_likelihood=float(F.cross_entropy(logits, labels)),
        brier_score=float((probabilities - truth).square().sum(1).mean()),
        bin_confidence=(confidence_sum / images)[filled].numpy(),
        bin_correct=correct_sum[filled].long().numpy(),
        bin_images=images[filled].long().numpy(),
    )


def bins_of(confidence: Tensor, bins: int) -> Tensor:
    """Which of `bins` equal bins each confidence lies in: int64, as many."""
    return (confidence * bins).long().clamp_max(bins - 1)


def study(evaluations: Sequence[Evaluation], labels: Tensor, bins: int) -> Scores:
    """One network's calibration on the test images, as trained and with the temperature."""
    temperature = []
    as_trained = []
    scaled = []
    for evaluation in evaluations:
        temperature.append(evaluation.temperature)
        as_trained.append(calibrate(evaluation.logits, labels, bins))
        scaled.append(calibrate(evaluation.scaled_logits(), labels, bins))
    return Scores(np.array(temperature), tuple(as_trained), tuple(scaled))


def confidence_gaps(logits: Tensor, labels: Tensor, bins: int) -> np.ndarray:
    """By image and bin of confidence [N, bins]: confidence minus 1 or 0 for right or wrong."""
    confidence, predicted = logits.softmax(1).max(1)
    gap = confidence - (predicted == labels).double()
    where = F.one_hot(bins_of(confidence, bins), bins)
    return (where * gap[:, None]).numpy()


def error_of_gaps(gaps: np.ndarray) -> float:
    """The expected calibration error in percent, of gaps [N, bins]."""
    return float(100 * np.abs(gaps.mean(0)).sum())
