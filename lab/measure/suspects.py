"""Images that are hard or mislabelled: those on which all networks agree against the label.

In come evaluations, the test images, and people's answers where there are any; out come suspects,
the likeliest first, and how many of them people reject. Networks of one recipe share their
mistakes, so that their agreement is weak evidence (docs/measured.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lab.data.images import Images
from lab.measure import statistics
from lab.measure.evaluation import ByNetwork, Evaluation, correct_by_seed, first_key
from lab.measure.people import rejected
from lab.measure.statistics import Difference, Interval


@dataclass(frozen=True)
class Suspect:
    """A test image which all networks take for another class than its label."""

    index: int  # in the test set
    pixels: np.ndarray  # uint8 [32, 32, 3]
    label: int
    called: int
    probability: float  # of that class; mean over networks and seeds, temperature scaled
    people_for_label: float | None  # percent of people who choose it; None without their answers
    people_for_called: float | None


def find(by_network: ByNetwork, test: Images, people: Tensor | None = None) -> list[Suspect]:
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
        label = int(test.labels[i])
        suspects.append(
            Suspect(
                index=i,
                pixels=test.pixels[i].numpy(),
                label=label,
                called=int(called[i]),
                probability=float(probability[i]),
                people_for_label=None if people is None else 100 * float(people[i, label]),
                people_for_called=None if people is None else 100 * float(people[i, called[i]]),
            )
        )
    return suspects


@dataclass(frozen=True)
class Rejected:
    """The images on which more people choose some other class than the label."""

    images: int
    suspected: int  # how many of them are suspects
    accuracy: dict[str, Interval]  # percent, without them, by network
    differences: dict[str, Difference]  # without them, from the first network, by the other's key


@dataclass(frozen=True)
class LabelSuspects:
    """Test images on which all networks agree against the label, and what people say of them."""

    suspects: tuple[Suspect, ...]
    rejected: Rejected | None  # None without people's answers


def study(
    by_network: ByNetwork, test: Images, people: Tensor | None, rules: statistics.Settings
) -> LabelSuspects:
    """The suspects; with `people`, shares float64 [N, classes], also how many of them people
    reject, and accuracy and verdict without what people reject."""
    suspects = find(by_network, test, people)
    if len(suspects) == len(test):
        suspects = []  # networks that are always wrong say nothing about labels
    if people is None:
        return LabelSuspects(tuple(suspects), None)
    by_people = rejected(people, test.labels)
    confirmed = sum(bool(by_people[suspect.index]) for suspect in suspects)
    kept = ~by_people
    correct = {}
    for key, evaluations in by_network.items():
        correct[key] = correct_by_seed(evaluations)[:, kept].astype(int)
    first = correct[first_key(by_network)]
    accuracy = {}
    differences = {}
    for key, of_network in correct.items():
        accuracy[key] = statistics.share_interval(of_network.sum(1), int(kept.sum()), rules)
        if of_network is not first:
            differences[key] = statistics.judge_answers(of_network - first, rules)
    corrected = statistics.correct_by_key(differences, rules.level)
    of_people = Rejected(int(by_people.sum()), confirmed, accuracy, corrected)
    return LabelSuspects(tuple(suspects), of_people)
