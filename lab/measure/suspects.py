"""Labels that may be wrong: test images on which all networks agree against the label.

In come evaluations and the test images; out come suspects, the likeliest first, and accuracy and
verdict without them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from lab.data.images import Images
from lab.measure import statistics
from lab.measure.evaluation import ByNetwork, Evaluation, correct_by_seed, first_key
from lab.measure.statistics import Difference, Interval


@dataclass(frozen=True)
class Suspect:
    """A test image which all networks take for another class than its label."""

    index: int  # in the test set
    pixels: np.ndarray  # uint8 [32, 32, 3]
    label: int
    called: int
    probability: float  # of that class; mean over networks and seeds, temperature scaled


def find(by_network: ByNetwork, test: Images) -> list[Suspect]:
    """The likeliest first.

    By confident learning (Northcutt, Jiang & Chuang, JAIR 2021): a class counts where it is as
    probable as it is, on average, on the images that are labelled so. All networks of all seeds
    have to agree on it, which makes the list shorter and surer.
    """
    every_model: list[Evaluation] = []
    for evaluations in by_network.values():
        every_model.extend(evaluations)
    chances = torch.stack([one.probabilities for one in every_model]).mean(0)
    called = chances.argmax(1)
    suspected = called != test.labels
    for evaluation in every_model:
        suspected &= evaluation.predicted == called
    for label in range(chances.shape[1]):
        labelled_so = chances[test.labels == label, label]
        usual = labelled_so.mean() if len(labelled_so) > 0 else 1.0
        suspected &= (called != label) | (chances[:, label] >= usual)
    probability = chances.amax(1)
    index = suspected.nonzero()[:, 0]
    suspects = []
    for i in index[probability[index].argsort(descending=True, stable=True)].tolist():
        suspects.append(
            Suspect(
                index=i,
                pixels=test.pixels[i].numpy(),
                label=int(test.labels[i]),
                called=int(called[i]),
                probability=float(probability[i]),
            )
        )
    return suspects


@dataclass(frozen=True)
class LabelSuspects:
    """Test images whose label may be wrong, and what is found without them."""

    suspects: tuple[Suspect, ...]
    accuracy: dict[str, Interval]  # percent, by network
    differences: dict[str, Difference]  # from the first network, by the other's key


def study(by_network: ByNetwork, test: Images, rules: statistics.Settings) -> LabelSuspects:
    """Accuracy and verdict on the images whose labels are not suspected."""
    suspects = find(by_network, test)
    if len(suspects) == len(test):
        suspects = []  # networks that are always wrong say nothing about labels
    kept = np.ones(len(test), bool)
    kept[[suspect.index for suspect in suspects]] = False
    correct = {}
    for key, evaluations in by_network.items():
        correct[key] = correct_by_seed(evaluations)[:, kept].astype(int)
    first = correct[first_key(by_network)]
    images = int(kept.sum())
    accuracy = {}
    differences = {}
    for key, of_network in correct.items():
        accuracy[key] = statistics.share_interval(of_network.sum(1), images, rules)
        if of_network is not first:
            differences[key] = statistics.judge_answers(of_network - first, rules)
    corrected = statistics.correct_differences(list(differences.values()), rules.level)
    differences = dict(zip(differences, corrected, strict=True))
    return LabelSuspects(tuple(suspects), accuracy, differences)
