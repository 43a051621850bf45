"""The networks' answers held against people's.

In come evaluations and the shares of people who chose each class; out come mistakes by how many
people agree with the label, and how far the networks' probabilities are people's.
"""

from __future__ import annotations

import dataclasses
import enum
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy
import torch
import torch.nn.functional as F
from torch import Tensor

from lab.measure import calibration, statistics
from lab.measure.estimates import (
    PERCENT,
    Estimate,
    certainty_of,
    estimate,
    estimate_mean,
    estimate_of_means,
)
from lab.measure.evaluation import ByNetwork, Evaluation, at_labels, correct_by_seed, first_key
from lab.measure.statistics import Difference, Interval

LEVELS = (50, 80, 95)  # % of people who agree with the label: mistakes are told apart by them
SURE = max(LEVELS)  # from which share on people count as sure


class Outcome(enum.StrEnum):
    """How many of the networks are right about an image."""

    ALL_RIGHT = "all are right"
    SOME_WRONG = "some are wrong"
    ALL_WRONG = "all are wrong"


@dataclass(frozen=True)
class Group:
    """Images on whose label about as many people agree, and how often networks err on them."""

    low: float  # percent of people that choose the label, at least
    high: float  # less than so many; above 100 in the last group
    images: int
    mistakes: dict[str, float]  # mean over the seeds, by network
    error: dict[str, Interval]  # percent of these images, by network
    # Of the error, from the first network, by the other's key; p corrected over groups and networks
    change: dict[str, Difference]


@dataclass(frozen=True)
class Scores:
    """Mistakes that people make too, and mistakes that they don't."""

    sure: float  # SURE
    groups: tuple[Group, ...]  # the least agreement first
    clear: Group | None  # the images of which people are sure; None where there are none
    unclear: Group | None  # all others
    share: dict[Outcome, Interval]  # mean percent of people that choose the label
    # How much more points of error the network loses where people are sure than where they are not
    contrast: dict[str, Difference]


def rejected(people: Tensor, labels: Tensor) -> np.ndarray:
    """On which images more people choose some other class than the label: bool [N]."""
    return (at_labels(people, labels) < people.amax(1)).numpy()


def shares_for(people: Tensor, labels: Tensor) -> np.ndarray:
    """Percent of people [N] that choose the label, of their shares [N, classes]."""
    return 100 * at_labels(people, labels).numpy()


def compare(
    by_network: ByNetwork, labels: Tensor, people: Tensor, rules: statistics.Settings, seed: int
) -> Scores:
    """The mistakes of all networks; `people` float64 [N, classes] are shares."""
    share = shares_for(people, labels)
    correct = {key: correct_by_seed(evaluations) for key, evaluations in by_network.items()}
    clear = None
    unclear = None
    for group in find_groups(correct, share, (SURE,), rules):
        if group.low == SURE:
            clear = group
        else:
            unclear = group
    return Scores(
        sure=SURE,
        groups=find_groups(correct, share, LEVELS, rules),
        clear=clear,
        unclear=unclear,
        share=share_by_outcome(np.stack(list(correct.values())), share, rules, seed),
        contrast=find_contrasts(correct, share >= SURE, rules, seed),
    )


def find_groups(
    correct: Mapping[str, np.ndarray],
    share: np.ndarray,
    levels: Sequence[float],
    rules: statistics.Settings,
) -> tuple[Group, ...]:
    """From what is right, bool [seeds, N] by network, and people's `share` in percent [N]."""
    first = correct[first_key(correct)]
    others = [key for key in correct if key != first_key(correct)]
    bounds = [0.0, *sorted(levels), 100.1]
    found: list[Group] = []
    changes = {}  # of each group and other network
    for low, high in itertools.pairwise(bounds):
        inside = (share >= low) & (share < high)
        if not inside.any():
            continue
        images = int(inside.sum())
        mistakes = {}
        error = {}
        for key, of_network in correct.items():
            wrong = (~of_network[:, inside]).sum(1)
            mistakes[key] = float(wrong.mean())
            error[key] = statistics.share_interval(wrong, images, rules)
        for key in others:
            lost = first[:, inside].astype(int) - correct[key][:, inside]
            changes[len(found), key] = statistics.judge_answers(lost, rules)
        found.append(Group(low, high, images, mistakes, error, {}))
    changes = statistics.correct_by_key(changes, rules.level)
    groups = []
    for k, group in enumerate(found):
        change = {key: changes[k, key] for key in others}
        groups.append(dataclasses.replace(group, change=change))
    return tuple(groups)


def share_by_outcome(
    correct: np.ndarray, share: np.ndarray, rules: statistics.Settings, seed: int
) -> dict[Outcome, Interval]:
    """The mean of people's `share` [N]; `correct` bool [networks, seeds, N]."""
    all_right = np.all(correct, axis=0)
    all_wrong = ~np.any(correct, axis=0)
    masks = {
        Outcome.ALL_RIGHT: all_right,
        Outcome.SOME_WRONG: ~all_right & ~all_wrong,
        Outcome.ALL_WRONG: all_wrong,
    }
    found = {}
    for outcome, by_seed in masks.items():
        if by_seed.any(1).all():
            arrays = [(share, of_seed) for of_seed in by_seed]
            mean = estimate(mean_where, arrays, rules, seed, between=PERCENT)
            found[outcome] = mean.interval
    return found


def mean_where(values: np.ndarray, mask: np.ndarray) -> float:
    """The mean of `values` [N] where `mask` [N]; of all of them where it holds nowhere."""
    return float(values[mask].mean()) if mask.any() else float(values.mean())


def find_contrasts(
    correct: Mapping[str, np.ndarray], sure: np.ndarray, rules: statistics.Settings, seed: int
) -> dict[str, Difference]:
    """By network but the first; none where people are sure of all images, or of none.

    `correct` bool [seeds, N] by network, `sure` bool [N].
    """
    if sure.all() or not sure.any():
        return {}
    first = correct[first_key(correct)]
    contrasts = {}
    for key, of_network in correct.items():
        if key != first_key(correct):
            by_seed = []
            for gained in of_network.astype(float) - first:
                by_seed.append((gained, sure))
            of_gains = estimate(difference_of_means, by_seed, rules, seed, groups=sure)
            contrasts[key] = statistics.judge_by(certainty_of(of_gains), rules)
    return statistics.correct_by_key(contrasts, rules.level)


def difference_of_means(gained: np.ndarray, sure: np.ndarray) -> float:
    """In points: of `gained` [N] where `sure` [N], less that elsewhere."""
    return float(100 * (gained[sure].mean() - gained[~sure].mean()))


# ---- Probabilities


@dataclass(frozen=True)
class ProbabilityScores:
    """How far probabilities are the shares of people who choose each class."""

    cross_entropy: Estimate  # from people's answers; at least `floor`
    error: Estimate  # expected calibration error in percent: a person's answer counts as right
    doubt: Estimate  # rank correlation of the network's and people's entropy over the images


@dataclass(frozen=True)
class Calibrated:
    """Before and after the logits are divided by a temperature fitted on the labels."""

    floor: float  # people's own mean entropy
    as_trained: ProbabilityScores
    scaled: ProbabilityScores


def study_probabilities(
    evaluations: Sequence[Evaluation], people: Tensor, rules: statistics.Settings, seed: int
) -> Calibrated:
    """One network's probabilities on the test images; `people` float64 [N, classes] are shares."""
    as_trained = [evaluation.logits for evaluation in evaluations]
    scaled = [evaluation.scaled_logits() for evaluation in evaluations]
    return Calibrated(
        floor=float(entropy(people).mean()),
        as_trained=score(as_trained, people, calibration.BINS, rules, seed),
        scaled=score(scaled, people, calibration.BINS, rules, seed),
    )


def score(
    logits: Sequence[Tensor], people: Tensor, bins: int, rules: statistics.Settings, seed: int
) -> ProbabilityScores:
    """Of each seed's logits [N, classes]."""
    losses = []
    gaps = []
    doubts = []
    of_people = entropy(people).numpy()
    for of_seed in logits:
        precise = of_seed.double()
        losses.append(F.cross_entropy(precise, people, reduction="none").numpy())
        gaps.append(calibration.gaps_from(precise, people, bins))
        doubts.append((entropy(precise.softmax(1)).numpy(), of_people))
    return ProbabilityScores(
        cross_entropy=estimate_mean(losses, rules),
        error=estimate_of_means(calibration.error_of_gaps, gaps, rules, seed, between=PERCENT),
        doubt=estimate(rank_correlation, doubts, rules, seed, between=(-1, 1)),
    )


def entropy(probabilities: Tensor) -> Tensor:
    """In nats, of probabilities [N, classes]: [N]."""
    return torch.special.entr(probabilities).sum(1)


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's, of values [N] that may be tied; 0 where one is the same for all."""
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return 0.0
    return float(scipy.stats.spearmanr(one, other).statistic)
