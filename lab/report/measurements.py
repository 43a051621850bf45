"""The numbers of the stress tests: what each is called, in files and by people.

In comes what a network did under stress; out come its measurements in the order of the table, each
with its values by seed and, where there is one, its interval.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lab.measure import attacks, calibration, doubt, gates, heatmaps, robustness
from lab.measure.statistics import Estimate, Interval
from lab.measure.stress import NetworkOutcome


@dataclass(frozen=True)
class Metric:
    """A number of the stress tests: its name in files, its name for people, unit and digits.

    Rewording a label changes nothing but what people read. `{}` is filled in by `at`.
    """

    key: str
    label: str
    unit: str = ""
    digits: int = 3

    def at(self, key: object, label: object) -> Metric:
        """The metric at one place: at an epsilon, for a stage, of one kind of map."""
        filled_key = self.key.format(key)
        return dataclasses.replace(self, key=filled_key, label=self.label.format(label))

    def title(self) -> str:
        return f"{self.label} ({self.unit})" if self.unit else self.label


CORRUPTED_ACCURACY = Metric("corrupted_accuracy", "Corrupted images: accuracy", "%", 2)
EXTRA_ACCURACY = Metric("extra_corrupted_accuracy", "Extra corruptions: accuracy", "%", 2)
CORRUPTION_ERROR = Metric("mean_corruption_error", "Corrupted images: mCE", "", 2)
CORRUPTED_CHANGE = Metric("corrupted_change", "Corrupted images: change", "points", 2)
CLEAN_ACCURACY = Metric("clean_accuracy", "The same images as they are: accuracy", "%", 2)
ROBUST_ACCURACY = Metric("robust_accuracy_{}", "Attack, {}/255: accuracy", "%", 2)
MEDIAN_EPSILON = Metric("median_epsilon", "Attack that half of what is right withstands", "of 255")
TEMPERATURE = Metric("temperature", "Temperature")
CALIBRATION_ERROR = Metric("calibration_error_{}", "Calibration error, {}", "%", 2)
LOG_LIKELIHOOD = Metric("negative_log_likelihood_{}", "Negative log-likelihood, {}")
BRIER_SCORE = Metric("brier_score_{}", "Brier score, {}")
SELECTION_AREA = Metric("risk_coverage_area_{}", "Risk over coverage, {}: area", "%", 3)
AUROC = Metric("auroc_{}", "Told from {}: AUROC", "%", 2)
FALSE_POSITIVES = Metric("false_positives_{}", "Told from {}: FPR at 95 %", "%", 2)
SET_COVERAGE = Metric("set_coverage_{}", "Sets of classes, {}: coverage", "%", 2)
SET_SIZE = Metric("set_size_{}", "Sets of classes, {}: size", "", 2)
SHIFTED_ERROR = Metric(
    "shifted_calibration_error_{}", "Calibration error at severity 5, {}", "%", 2
)
DELETION = Metric("deletion_auc_{}", "Deletion, {}: probability")
INSERTION = Metric("insertion_auc_{}", "Insertion, {}: probability")
POINTING = Metric("pointing_game_{}", "Pointing game, {}")
OVERLAP = Metric("intersection_over_union_{}", "Intersection over union, {}")
LIKENESS = Metric("likeness_without_{}", "Likeness of Grad-CAM, shuffled down to {}")
GATE_SHARE = Metric("gate_share_stage_{}", "Gates of stage {}: share of variance between classes")
GATES_LEARNT = Metric("gates_as_learnt_accuracy", "Gates as learnt: accuracy", "%", 2)
GATES_AT_MEANS = Metric("gates_at_means_accuracy", "Gates at their means: accuracy", "%", 2)


@dataclass(frozen=True)
class Measurement:
    """What was measured of a network: one value a seed, or the first seed's alone.

    With the interval of their mean, where there is one: over seeds, of one seed over images.
    """

    metric: Metric
    values: np.ndarray
    interval: Interval | None = None

    def mean(self) -> float:
        return float(self.values.mean())


def measurements(outcome: NetworkOutcome) -> Iterator[Measurement]:
    """All numbers of a network's stress tests, in the order of the table."""
    for part in (
        measure_corruptions(outcome.corruptions),
        measure_attacks(outcome.attacks),
        measure_calibration(outcome.calibration),
        measure_doubt(outcome.doubt),
        measure_heatmaps(outcome.heatmaps),
        measure_gates(outcome.gates),
    ):
        for metric, value in part:
            if isinstance(value, Estimate):
                yield Measurement(metric, value.by_seed, value.interval)
            else:
                yield Measurement(metric, np.atleast_1d(np.asarray(value, dtype=float)))


Measured = Iterator[tuple[Metric, Estimate | np.ndarray | Sequence[float] | float]]


def measure_corruptions(scores: robustness.Scores) -> Measured:
    yield CORRUPTED_ACCURACY, scores.mean_accuracy
    if scores.mean_corruption_error is not None:
        yield CORRUPTION_ERROR, scores.mean_corruption_error
    if scores.change is not None:
        change = scores.change.interval
        yield CORRUPTED_CHANGE, Estimate(np.array([change.value]), change)
    if scores.mean_accuracy_of_extra is not None:
        yield EXTRA_ACCURACY, scores.mean_accuracy_of_extra


def measure_attacks(scores: attacks.Scores) -> Measured:
    yield CLEAN_ACCURACY, scores.clean
    yield MEDIAN_EPSILON, scores.median_epsilon
    for k, epsilon in enumerate(scores.epsilons):
        size = f"{epsilon:g}"
        accuracy = Estimate(scores.robust[:, k], scores.intervals[k])
        yield ROBUST_ACCURACY.at(size.replace(".", "_"), size), accuracy


def measure_calibration(scores: calibration.Scores) -> Measured:
    yield TEMPERATURE, scores.temperature
    for key, label, by_seed in (
        ("as_trained", "as trained", scores.as_trained),
        ("scaled", "temperature scaled", scores.scaled),
    ):
        yield CALIBRATION_ERROR.at(key, label), [one.error for one in by_seed]
        yield LOG_LIKELIHOOD.at(key, label), [one.negative_log_likelihood for one in by_seed]
        yield BRIER_SCORE.at(key, label), [one.brier_score for one in by_seed]


def measure_doubt(scores: doubt.Scores) -> Measured:
    yield SELECTION_AREA.at("as_trained", "as trained"), scores.as_trained.area
    yield SELECTION_AREA.at("without_norm", "without norm"), scores.without_norm.area
    for name, of_foreign in scores.foreign.items():
        key = re.sub(r"\W", "_", name.lower())
        for by, detection in (
            ("confidence", of_foreign.by_confidence),
            ("energy", of_foreign.by_energy),
            ("distance", of_foreign.by_distance),
        ):
            key_by = f"{key}_by_{by}"
            name_by = f"{name} by {by}"
            yield AUROC.at(key_by, name_by), detection.auroc
            yield FALSE_POSITIVES.at(key_by, name_by), detection.false_positives
    conformal = scores.conformal
    yield SET_COVERAGE.at("clean", "clean"), conformal.coverage
    yield SET_SIZE.at("clean", "clean"), conformal.size
    shift = scores.shift
    yield SET_COVERAGE.at("severity_5", "severity 5"), shift.set_coverage[-1]
    yield SET_SIZE.at("severity_5", "severity 5"), shift.set_size[-1]
    yield SHIFTED_ERROR.at("as_trained", "as trained"), shift.error_as_trained[-1]
    yield SHIFTED_ERROR.at("scaled", "temperature scaled"), shift.error_scaled[-1]


def measure_heatmaps(scores: heatmaps.Scores) -> Measured:
    """A curve is measured by the area below it, as by Petsiuk et al."""
    from sklearn.metrics import auc

    for key, label, maps in (
        ("grad_cam", "Grad-CAM", scores.grad_cam),
        ("random", "random maps", scores.random),
    ):
        share = np.linspace(0, 1, len(maps.deletion))  # of the pixels
        yield DELETION.at(key, label), auc(share, maps.deletion)
        yield INSERTION.at(key, label), auc(share, maps.insertion)
        if maps.pointing is not None and maps.overlap is not None:
            yield POINTING.at(key, label), maps.pointing
            yield OVERLAP.at(key, label), maps.overlap
    yield LIKENESS.at("classifier", "classifier"), scores.likeness_without_classifier
    stages = list(enumerate(scores.likeness_without_stage, start=1))
    for stage, value in reversed(stages):
        yield LIKENESS.at(f"stage_{stage}", f"stage {stage}"), value


def measure_gates(scores: gates.Scores | None) -> Measured:
    if scores is None:
        return
    for stage, share in enumerate(scores.share_between_classes, start=1):
        yield GATE_SHARE.at(stage, stage), share
    yield GATES_LEARNT, scores.accuracy_as_learnt
    yield GATES_AT_MEANS, scores.accuracy_at_means
