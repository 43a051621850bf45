"""The numbers of the stress tests: what each is called, in files and by people.

In comes what networks did under stress; out come their measurements in the order of the table, each
with its values by seed and an interval, and their changes from the first network, tested.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lab.measure import attacks, calibration, doubt, gates, heatmaps, people, robustness, statistics
from lab.measure.estimates import Estimate, change_of
from lab.measure.models import Network
from lab.measure.statistics import Interval, clipped
from lab.measure.stress import NetworkOutcome, Outcome


@dataclass(frozen=True)
class Metric:
    """A number of the stress tests: its name in files, its name for people, unit and digits.

    Rewording a label changes nothing but what people read. `{}` is filled in by `at`. The paper and
    the README show those that are `shown`: chosen for what they ask, one of each kind, before their
    changes were tested.
    """

    key: str
    label: str
    unit: str = ""
    digits: int = 3
    shown: bool = False
    better: int = 0  # 1 where more is better, -1 where less is, 0 where neither is

    def at(self, key: object, label: object) -> Metric:
        """The metric at one place: at an epsilon, for a stage, of one kind of map."""
        filled_key = self.key.format(key)
        return dataclasses.replace(self, key=filled_key, label=self.label.format(label))

    def title(self) -> str:
        return f"{self.label} ({self.unit})" if self.unit else self.label


CORRUPTED_ACCURACY = Metric(
    "corrupted_accuracy", "Corrupted images: accuracy", "%", 2, shown=True, better=1
)
EXTRA_ACCURACY = Metric("extra_corrupted_accuracy", "Extra corruptions: accuracy", "%", 2, better=1)
CORRUPTION_ERROR = Metric(
    "mean_corruption_error", "Corrupted images: mCE", "", 2, shown=True, better=-1
)
CLEAN_ACCURACY = Metric("clean_accuracy", "The same images as they are: accuracy", "%", 2, better=1)
ROBUST_ACCURACY = Metric("robust_accuracy_{}", "Attack, {}/255: accuracy", "%", 2, better=1)
MEDIAN_EPSILON = Metric(
    "median_epsilon",
    "Attack that half of what is right withstands",
    "of 255",
    2,
    shown=True,
    better=1,
)
TEMPERATURE = Metric("temperature", "Temperature")
CALIBRATION_ERROR = Metric(
    "calibration_error_{}", "Calibration error, {}", "%", 2, shown=True, better=-1
)
LOG_LIKELIHOOD = Metric("negative_log_likelihood_{}", "Negative log-likelihood, {}", better=-1)
BRIER_SCORE = Metric("brier_score_{}", "Brier score, {}", better=-1)
PEOPLES_ENTROPY = Metric(
    "peoples_cross_entropy_{}", "Cross-entropy with people's answers, {}", better=-1
)
PEOPLES_ERROR = Metric(
    "peoples_calibration_error_{}",
    "Calibration error against people, {}",
    "%",
    2,
    shown=True,
    better=-1,
)
PEOPLES_DOUBT = Metric(
    "peoples_doubt_{}", "Doubt where people doubt, {}: rank correlation", shown=True, better=1
)
SELECTION_AREA = Metric(
    "risk_coverage_area_{}", "Risk over coverage, {}: area", "%", 3, shown=True, better=-1
)
AUROC = Metric("auroc_{}", "Told from {}: AUROC", "%", 2, shown=True, better=1)
FALSE_POSITIVES = Metric("false_positives_{}", "Told from {}: FPR at 95 %", "%", 2, better=-1)
SET_COVERAGE = Metric("set_coverage_{}", "Sets of classes, {}: coverage", "%", 2, shown=True)
SET_SIZE = Metric("set_size_{}", "Sets of classes, {}: size", "", 2, better=-1)
EMPTY_SETS = Metric("empty_sets_{}", "Sets of classes, {}: empty", "%", 2, better=-1)
SHIFTED_ERROR = Metric(
    "shifted_calibration_error_{}",
    "Calibration error at severity 5, {}",
    "%",
    2,
    shown=True,
    better=-1,
)
DELETION = Metric("deletion_auc_{}", "Deletion, {}: probability", better=-1)
INSERTION = Metric("insertion_auc_{}", "Insertion, {}: probability", better=1)
DELETION_GAIN = Metric(
    "deletion_gain", "Deletion: Grad-CAM below random maps", shown=True, better=1
)
INSERTION_GAIN = Metric(
    "insertion_gain", "Insertion: Grad-CAM above random maps", shown=True, better=1
)
POINTING = Metric("pointing_game_{}", "Pointing game, {}", better=1)
OVERLAP = Metric("intersection_over_union_{}", "Intersection over union, {}", better=1)
LIKENESS = Metric("likeness_without_{}", "Likeness of Grad-CAM, shuffled down to {}", better=-1)
GATE_SHARE = Metric("gate_share_stage_{}", "Gates of stage {}: share of variance between classes")
GATES_LEARNT = Metric("gates_as_learnt_accuracy", "Gates as learnt: accuracy", "%", 2, better=1)
GATES_AT_MEANS = Metric(
    "gates_at_means_accuracy", "Gates at their means: accuracy", "%", 2, better=1
)


@dataclass(frozen=True)
class Measurement:
    """What was measured of a network."""

    metric: Metric
    estimate: Estimate


def measurements(outcome: NetworkOutcome) -> Iterator[Measurement]:
    """All numbers of a network's stress tests, in the order of the table."""
    for part in (
        measure_corruptions(outcome.corruptions),
        measure_attacks(outcome.attacks),
        measure_calibration(outcome.calibration),
        measure_people(outcome.people),
        measure_doubt(outcome.doubt),
        measure_heatmaps(outcome.heatmaps),
        measure_gates(outcome.gates),
    ):
        for metric, estimate in part:
            yield Measurement(metric, estimate)


@dataclass(frozen=True)
class Change:
    """How a measurement differs from the first network's, over other seeds and other images."""

    metric: Metric
    network: Network
    interval: Interval
    p: float
    p_holm: float  # corrected over all rows of the table, of all networks


def changes_from_first(stress: Outcome) -> list[Change]:
    """Of every measurement that another network and the first have, where it can be tested.

    What was measured once, on images that are not drawn again, has no p.
    """
    first, *others = stress.networks
    of_first = {one.metric.key: one.estimate for one in measurements(first)}
    found = []
    for outcome in others:
        for measurement in measurements(outcome):
            before = of_first.get(measurement.metric.key)
            if before is None:
                continue
            change = change_of(measurement.estimate, before)
            if change.error_of_seeds == 0 and change.error_of_images == 0:
                continue
            lowest, highest = before.between
            most = highest - lowest
            interval = clipped(change.interval(1 - stress.level), -most, most)
            p = change.p()
            found.append(Change(measurement.metric, outcome.network, interval, p, p))
    p_holm = statistics.holm([one.p for one in found])
    return [dataclasses.replace(one, p_holm=p) for one, p in zip(found, p_holm, strict=True)]


def beyond_chance(changes: Sequence[Change], level: float) -> list[Change]:
    """Those of all the changes that survive the correction over them."""
    return [one for one in changes if one.p_holm < level]


def changes_by_network(stress: Outcome) -> dict[Network, dict[str, Change]]:
    """The same by metric's key, of each network but the first."""
    by_network: dict[Network, dict[str, Change]] = {}
    for change in changes_from_first(stress):
        by_network.setdefault(change.network, {})[change.metric.key] = change
    return by_network


Measured = Iterator[tuple[Metric, Estimate]]


def measure_corruptions(scores: robustness.Scores) -> Measured:
    yield CORRUPTED_ACCURACY, scores.mean_accuracy
    if scores.mean_corruption_error is not None:
        yield CORRUPTION_ERROR, scores.mean_corruption_error
    if scores.mean_accuracy_of_extra is not None:
        yield EXTRA_ACCURACY, scores.mean_accuracy_of_extra


def measure_attacks(scores: attacks.Scores) -> Measured:
    yield CLEAN_ACCURACY, scores.clean
    yield MEDIAN_EPSILON, scores.median_epsilon
    for epsilon, accuracy in zip(scores.epsilons, scores.robust, strict=True):
        size = f"{epsilon:g}"
        yield ROBUST_ACCURACY.at(size.replace(".", "_"), size), accuracy


def measure_calibration(scores: calibration.Scores) -> Measured:
    yield TEMPERATURE, scores.temperature
    for key, label, of_logits in (
        ("as_trained", "as trained", scores.as_trained),
        ("scaled", "temperature scaled", scores.scaled),
    ):
        yield CALIBRATION_ERROR.at(key, label), of_logits.error
        yield LOG_LIKELIHOOD.at(key, label), of_logits.negative_log_likelihood
        yield BRIER_SCORE.at(key, label), of_logits.brier_score


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
    yield from measure_sets(scores.conformal, "clean", "clean")
    shift = scores.shift
    yield from measure_sets(shift.sets[-1], "severity_5", "severity 5")
    yield SHIFTED_ERROR.at("as_trained", "as trained"), shift.error_as_trained[-1]
    yield SHIFTED_ERROR.at("scaled", "temperature scaled"), shift.error_scaled[-1]


def measure_people(scores: people.Calibrated | None) -> Measured:
    if scores is None:
        return
    for key, label, of_scores in (
        ("as_trained", "as trained", scores.as_trained),
        ("scaled", "temperature scaled", scores.scaled),
    ):
        yield PEOPLES_ENTROPY.at(key, label), of_scores.cross_entropy
        yield PEOPLES_ERROR.at(key, label), of_scores.error
        yield PEOPLES_DOUBT.at(key, label), of_scores.doubt


def measure_sets(by_miss: Sequence[doubt.ConformalScores], key: str, label: str) -> Measured:
    for k, sets in enumerate(by_miss):
        key_of = f"{key}_{k}"
        label_of = f"{label}, {100 * (1 - sets.miss):g} %"
        yield SET_COVERAGE.at(key_of, label_of), sets.coverage
        yield SET_SIZE.at(key_of, label_of), sets.size
        yield EMPTY_SETS.at(key_of, label_of), sets.empty


def measure_heatmaps(scores: heatmaps.Scores) -> Measured:
    for key, label, maps in (
        ("grad_cam", "Grad-CAM", scores.grad_cam),
        ("random", "random maps", scores.random),
    ):
        yield DELETION.at(key, label), maps.deletion_area
        yield INSERTION.at(key, label), maps.insertion_area
        if maps.pointing is not None and maps.overlap is not None:
            yield POINTING.at(key, label), maps.pointing
            yield OVERLAP.at(key, label), maps.overlap
    yield DELETION_GAIN, scores.deletion_gain
    yield INSERTION_GAIN, scores.insertion_gain
    yield LIKENESS.at("classifier", "classifier"), scores.likeness_without_classifier
    stages = list(enumerate(scores.likeness_without_stage, start=1))
    for stage, likeness in reversed(stages):
        yield LIKENESS.at(f"stage_{stage}", f"stage {stage}"), likeness


def measure_gates(scores: gates.Scores | None) -> Measured:
    if scores is None:
        return
    for stage, share in scores.share_between_classes.items():
        yield GATE_SHARE.at(stage, stage), share
    yield GATES_LEARNT, scores.accuracy_as_learnt
    yield GATES_AT_MEANS, scores.accuracy_at_means
