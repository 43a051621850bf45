"""Trained networks on a second test set, which no one has tuned anything to.

In come evaluations and the new images; out come accuracies with intervals, and each network
compared with the first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lab.data.images import Images
from lab.machine.device import Hardware
from lab.machine.parallel import in_parallel
from lab.measure import comparison, statistics
from lab.measure.comparison import GroupComparison
from lab.measure.evaluation import ByNetwork, Evaluation, first_key, logits_of
from lab.measure.statistics import Interval


@dataclass(frozen=True)
class Retest:
    """What the networks do on the new images."""

    images: int
    accuracy: dict[str, Interval]  # percent, by the network's key
    compared: dict[str, GroupComparison]  # with the first, by the other's key


def run(
    by_network: ByNetwork, images: Images | None, rules: statistics.Settings, hardware: Hardware
) -> Retest | None:
    """All networks on `images`; of three or more, p is corrected over the comparisons.

    None without such images.
    """
    if images is None:
        return None

    def correct_of(evaluation: Evaluation) -> np.ndarray:
        logits = logits_of(evaluation.trained.model, images.pixels, hardware)
        return (logits.argmax(1) == images.labels).numpy()

    everything: list[Evaluation] = []
    for evaluations in by_network.values():
        everything.extend(evaluations)
    answers = np.stack(in_parallel(correct_of, everything, hardware))
    seeds = len(everything) // len(by_network)
    correct = dict(zip(by_network, answers.reshape(-1, seeds, len(images)), strict=True))
    accuracy = {}
    for key, of_network in correct.items():  # bool [seeds, images]
        accuracy[key] = statistics.share_interval(of_network.sum(1), len(images), rules)
    first = correct[first_key(correct)].astype(int)
    others = list(correct)[1:]
    gains = [correct[key].astype(int) - first for key in others]
    groups = comparison.compare_together(gains, rules)
    return Retest(len(images), accuracy, dict(zip(others, groups, strict=True)))
