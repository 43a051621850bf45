"""The networks' mistakes: which, how sure, and what changes from network to network.

In come evaluations and the data; out comes a `Dossier`: counts with their tests, scores by class,
the surest mistakes as images, and a row for every test image.
"""

from __future__ import annotations

import dataclasses
import enum
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lab.data.images import Dataset, Images
from lab.measure import gallery, gradcam, people, statistics, suspects
from lab.measure.attributes import (
    Association,
    associate,
    common_to_all,
    distance_from_class,
    image_attributes,
)
from lab.measure.evaluation import ByNetwork, Evaluation, at_labels, first_key
from lab.measure.gallery import Gallery
from lab.measure.gradcam import ExplainedImage
from lab.measure.models import Network
from lab.measure.statistics import Interval
from lab.measure.suspects import LabelSuspects

if TYPE_CHECKING:
    import pandas as pd


OF_A_KIND = 6  # images of each kind in the failure figure, where they fill its rows
CONFUSED_PAIRS = 5  # pairs of classes whose confusion is told of, the most frequent first
NAMED_ATTRIBUTES = 3  # those that are named as going with mistakes, the strongest first
SURE_LEVELS = (50, 60, 70, 80, 90, 95, 99)  # % of confidence from which mistakes are counted


class Transition(enum.StrEnum):
    """What becomes of a test image from the first network to another."""

    RIGHT = "right in both"
    CORRECTED = "corrected"
    BROKEN = "broken"
    SAME_CLASS = "wrong in both, same class"
    OTHER_CLASS = "wrong in both, other class"


def transitions(first: Evaluation, other: Evaluation) -> dict[Transition, np.ndarray]:
    """Which test images each holds for: bool [N]."""
    both_wrong = ~first.correct & ~other.correct
    same_class = (first.predicted == other.predicted).numpy()
    return {
        Transition.RIGHT: first.correct & other.correct,
        Transition.CORRECTED: ~first.correct & other.correct,
        Transition.BROKEN: first.correct & ~other.correct,
        Transition.SAME_CLASS: both_wrong & same_class,
        Transition.OTHER_CLASS: both_wrong & ~same_class,
    }


@dataclass(frozen=True)
class TransitionCounts:
    """How many test images go which way from the first network to this one."""

    network: Network
    first: Network
    counts: dict[Transition, np.ndarray]  # int64 [seeds]


def count_transitions(
    evaluations: Sequence[Evaluation], first_evaluations: Sequence[Evaluation]
) -> TransitionCounts:
    """Each seed's networks are a pair."""
    counts: dict[Transition, list[int]] = {way: [] for way in Transition}
    for first, other in zip(first_evaluations, evaluations, strict=True):
        for way, images in transitions(first, other).items():
            counts[way].append(int(images.sum()))
    by_way = {way: np.array(by_seed) for way, by_seed in counts.items()}
    network = evaluations[0].trained.network
    return TransitionCounts(network, first_evaluations[0].trained.network, by_way)


@dataclass(frozen=True)
class SureMistakes:
    """How many mistakes a network makes with at least so much confidence: int64 [seeds, levels]."""

    network: Network
    levels: tuple[float, ...]  # of confidence, in percent
    as_trained: np.ndarray
    scaled: np.ndarray  # by the temperature
    # At each level p of no change from the first network; once all networks are known, it is
    # Holm-corrected over the levels and them
    p_as_trained: tuple[float, ...]
    p_scaled: tuple[float, ...]
    p_of_scaling: tuple[float, ...]  # of the change being as large with the temperature as without


def count_sure_mistakes(
    evaluations: Sequence[Evaluation],
    first_evaluations: Sequence[Evaluation],
    rules: statistics.Settings,
) -> SureMistakes:
    """With the same tests as accuracy has, and one of what the temperature takes away."""
    as_trained, scaled = sure_mistakes_by_seed(evaluations)
    first, first_scaled = sure_mistakes_by_seed(first_evaluations)
    change = as_trained.astype(int) - first
    change_scaled = scaled.astype(int) - first_scaled
    by_scaling = 100.0 * (change - change_scaled)
    of_scaling = [statistics.judge(by_scaling[:, k], rules).p for k in range(len(SURE_LEVELS))]
    return SureMistakes(
        network=evaluations[0].trained.network,
        levels=SURE_LEVELS,
        as_trained=as_trained.sum(2),
        scaled=scaled.sum(2),
        p_as_trained=p_of_changes(change, rules),
        p_scaled=p_of_changes(change_scaled, rules),
        p_of_scaling=tuple(of_scaling),
    )


def correct_sure_mistakes(mistakes: Sequence[SureMistakes]) -> tuple[SureMistakes, ...]:
    """With each p corrected over the levels and all networks but the first."""
    first, *others = mistakes
    as_trained = holm_by_network([one.p_as_trained for one in others])
    scaled = holm_by_network([one.p_scaled for one in others])
    of_scaling = holm_by_network([one.p_of_scaling for one in others])
    corrected = [first]
    for k, one in enumerate(others):
        corrected.append(
            dataclasses.replace(
                one, p_as_trained=as_trained[k], p_scaled=scaled[k], p_of_scaling=of_scaling[k]
            )
        )
    return tuple(corrected)


def holm_by_network(ps: Sequence[tuple[float, ...]]) -> list[tuple[float, ...]]:
    """Each network's p, corrected over all of them."""
    corrected = iter(statistics.holm(list(itertools.chain(*ps))))
    return [tuple(itertools.islice(corrected, len(of_network))) for of_network in ps]


def sure_mistakes_by_seed(evaluations: Sequence[Evaluation]) -> tuple[np.ndarray, np.ndarray]:
    """As trained, and with the temperature: bool [seeds, levels, images] each."""
    as_trained = []
    scaled = []
    for one in evaluations:
        as_trained.append(sure_mistakes(one.logits, one.correct))
        scaled.append(sure_mistakes(one.scaled_logits(), one.correct))
    return np.stack(as_trained), np.stack(scaled)


def sure_mistakes(logits: Tensor, correct: np.ndarray) -> np.ndarray:
    """At each level, which images are mistaken with at least so much confidence: bool [L, N]."""
    confidence = 100 * logits.softmax(1).amax(1).numpy()
    return np.stack([(confidence >= level) & ~correct for level in SURE_LEVELS])


def p_of_changes(change: np.ndarray, rules: statistics.Settings) -> tuple[float, ...]:
    """At each level p of no change from one network's mistakes to another's.

    `change` [seeds, levels, images] is 1 for an image more, -1 for one less, and else 0.
    """
    levels = range(change.shape[1])
    return tuple(statistics.judge_answers(change[:, k], rules).p for k in levels)


@dataclass(frozen=True)
class ClassScores:
    """Precision, recall and F1 in percent: float64 [seeds, classes]."""

    network: Network
    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray


def score_classes(evaluations: Sequence[Evaluation], labels: Tensor, classes: int) -> ClassScores:
    """By scikit-learn; 0 where a class is never predicted."""
    from sklearn.metrics import precision_recall_fscore_support

    by_seed = []
    for evaluation in evaluations:
        precision, recall, f1, _ = precision_recall_fscore_support(
            labels.numpy(), evaluation.predicted.numpy(), labels=range(classes), zero_division=0
        )
        by_seed.append((100 * precision, 100 * recall, 100 * f1))
    network = evaluations[0].trained.network
    return ClassScores(network, *np.moveaxis(np.array(by_seed), 1, 0))


@dataclass(frozen=True)
class ConfusedPair:
    """Two classes that are taken for each other: percent of the images of both."""

    first_class: int
    second_class: int
    error: dict[str, float]  # mean over seeds, by network
    # From the first network, by the other's key; those of all pairs and networks hold together
    change: dict[str, Interval]


def find_confused_pairs(
    by_network: ByNetwork, labels: Tensor, count: int, rules: statistics.Settings
) -> tuple[ConfusedPair, ...]:
    """At most `count`, which all networks together confuse most.

    Were they chosen by one network's mistakes, the other would seem to make fewer of them.
    """
    first = first_key(by_network)
    confusions = []
    for evaluations in by_network.values():
        confusions += [evaluation.confusion for evaluation in evaluations]
    confusion = np.sum(confusions, axis=0)
    both_ways = np.triu(confusion + confusion.T, k=1)
    order = np.argsort(-both_ways, axis=None, kind="stable")
    places = [place for place in order[:count].tolist() if both_ways.flat[place] > 0]
    together = len(places) * (len(by_network) - 1)
    pairs = []
    for place in places:
        a, b = divmod(place, len(both_ways))
        confused = {}
        for key, evaluations in by_network.items():
            confused[key] = 100.0 * confused_images(evaluations, labels, a, b)
        error = {key: float(of_network.mean()) for key, of_network in confused.items()}
        change = {}
        for key in list(by_network)[1:]:
            gains = confused[key] - confused[first]
            change[key] = statistics.judge(gains, rules, together).interval
        pairs.append(ConfusedPair(a, b, error, change))
    return tuple(pairs)


def confused_images(
    evaluations: Sequence[Evaluation], labels: Tensor, a: int, b: int
) -> np.ndarray:
    """Which images of two classes are taken for the other one: bool [seeds, images of both]."""
    of_pair = (labels == a) | (labels == b)
    by_seed = []
    for evaluation in evaluations:
        wrong = torch.from_numpy(~evaluation.correct)
        between = (evaluation.predicted == a) | (evaluation.predicted == b)
        by_seed.append((wrong & between)[of_pair].numpy())
    return np.stack(by_seed)


@dataclass(frozen=True)
class Mistake:
    """A test image that a network gets wrong, with all networks' answers."""

    image: ExplainedImage
    people_for_label: float | None  # percent of people who choose it; None without their answers
    is_suspect: bool  # see `suspects`


@dataclass(frozen=True)
class MistakeGroup:
    """The most confident mistakes of all networks together, or of one that makes them alone."""

    network: Network | None  # None: all are wrong
    mistakes: tuple[Mistake, ...]

    def title(self) -> str:
        if self.network is None:
            return "All are wrong"
        return f"Only {self.network.title} is wrong"


def group_mistakes(
    evaluations: Sequence[Evaluation],
    test: Images,
    suspected: Sequence[int],
    people_for_label: np.ndarray | None,
    count: int,
) -> tuple[MistakeGroup, ...]:
    """At most `count` images a group, most confident first, with all networks' answers.

    First what all get wrong, by their mean confidence, then what each alone does: no image is in
    two groups. No two of a group have the same true and the same predicted class, so that one
    confusion does not fill it. Where it is known what percent of people [N] choose the label,
    images of which people are sure come before all others.
    """

    def explain(index: Tensor) -> tuple[Mistake, ...]:
        mistakes = []
        for image in gradcam.explain_images(index, evaluations, test):
            share = None if people_for_label is None else float(people_for_label[image.index])
            mistakes.append(Mistake(image, share, image.index in suspected))
        return tuple(mistakes)

    clear = np.zeros(len(test), bool)
    if people_for_label is not None:
        clear = people_for_label >= people.SURE
    wrong = np.stack([~evaluation.correct for evaluation in evaluations])
    confidence = torch.stack([evaluation.confidence for evaluation in evaluations])

    groups = []
    called = evaluations[0].predicted
    index = most_confident(
        np.all(wrong, axis=0), clear, confidence.mean(0), called, test.labels, count
    )
    groups.append(MistakeGroup(None, explain(index)))
    for k, evaluation in enumerate(evaluations):
        alone = wrong[k] & (wrong.sum(0) == 1)
        index = most_confident(
            alone, clear, confidence[k], evaluation.predicted, test.labels, count
        )
        groups.append(MistakeGroup(evaluation.trained.network, explain(index)))
    return tuple(groups)


def most_confident(
    among: np.ndarray,
    first: np.ndarray,
    confidence: Tensor,
    predicted: Tensor,
    labels: Tensor,
    count: int,
) -> Tensor:
    """Of images `among` bool [N] the most confident, each of another kind: int64 [count] at most.

    Those that come `first`, bool [N], go before all others. `confidence` float32, `predicted` and
    `labels` int64, all [N].
    """
    place = confidence + torch.from_numpy(first).float()  # confidence is 1 at most
    order = place.argsort(descending=True, stable=True)
    seen = set()
    index: list[int] = []
    for i in order[torch.from_numpy(among)[order]].tolist():
        if len(index) == count:
            break
        kind = (int(labels[i]), int(predicted[i]))
        if kind not in seen:
            seen.add(kind)
            index.append(i)
    return torch.tensor(index, dtype=torch.int64)


def prediction_rows(
    by_network: ByNetwork, test: Images, classes: Sequence[str], people: Tensor | None
) -> pd.DataFrame:
    """A row for each test image and seed: what each network says of it, and what people say."""
    import pandas as pd

    names = np.array(classes)
    of_people: dict[str, Any] = {}
    if people is not None:
        of_people["human_label_share"] = at_labels(people, test.labels).numpy()
        of_people["human_class"] = names[people.argmax(1).numpy()]
    frames = []
    for k, first in enumerate(by_network[first_key(by_network)]):
        columns: dict[str, Any] = {
            "seed": first.trained.seed,
            "index": np.arange(len(test)),
            "true_class": names[test.labels.numpy()],
            **of_people,
        }
        for key, evaluations in by_network.items():
            evaluation = evaluations[k]
            columns[f"{key}_predicted"] = names[evaluation.predicted.numpy()]
            columns[f"{key}_confidence"] = evaluation.confidence.numpy()
            columns[f"{key}_true_class_probability"] = at_labels(
                evaluation.probabilities, test.labels
            ).numpy()
            columns[f"{key}_correct"] = evaluation.correct
        frames.append(pd.DataFrame(columns))
    return pd.concat(frames, ignore_index=True)


def failure_rows(
    predictions: pd.DataFrame, by_network: ByNetwork, suspected: Sequence[int]
) -> pd.DataFrame:
    """The rows of `predictions` that any network gets wrong, most confident first.

    With what becomes of each from the first network to the others.
    """
    rows = predictions.copy()
    first_evaluations = by_network[first_key(by_network)]
    surest = np.zeros(len(rows))
    for key, evaluations in by_network.items():
        wrong = ~rows[f"{key}_correct"].to_numpy()
        surest = np.maximum(surest, wrong * rows[f"{key}_confidence"].to_numpy())
        if evaluations is not first_evaluations:
            ways = []
            for first, other in zip(first_evaluations, evaluations, strict=True):
                images = transitions(first, other)
                ways.append(np.select(list(images.values()), [str(way) for way in images], ""))
            rows[f"{key}_transition"] = np.concatenate(ways)
    rows["label_is_suspect"] = rows["index"].isin(suspected)
    order = np.argsort(-surest, kind="stable")
    return rows.iloc[order[surest[order] > 0]]


@dataclass(frozen=True)
class Dossier:
    """What the networks get wrong, and what is in it."""

    groups: tuple[MistakeGroup, ...]  # of the first seed
    transitions: tuple[TransitionCounts, ...]
    mistakes: tuple[SureMistakes, ...]
    associations: tuple[Association, ...]
    common: tuple[tuple[Association, ...], ...]  # by attribute; see `common_to_all`
    labels: LabelSuspects
    scores: tuple[ClassScores, ...]
    pairs: tuple[ConfusedPair, ...]
    predictions: pd.DataFrame
    rows: pd.DataFrame  # of `failure_rows`
    people: people.Scores | None  # None without people's answers
    gallery: Gallery  # of the first seed


def study(by_network: ByNetwork, data: Dataset, rules: statistics.Settings, seed: int) -> Dossier:
    """What the networks of all seeds get wrong."""
    test = data.test
    first_evaluations = by_network[first_key(by_network)]
    labels = suspects.study(by_network, test, data.people, rules)
    suspected = [suspect.index for suspect in labels.suspects]
    on_pixels = image_attributes(test)
    transition_counts = []
    mistakes = []
    associations = []
    scores = []
    for evaluations in by_network.values():
        if evaluations is not first_evaluations:
            transition_counts.append(count_transitions(evaluations, first_evaluations))
        mistakes.append(count_sure_mistakes(evaluations, first_evaluations, rules))
        for attribute in [*on_pixels, distance_from_class(evaluations, test.labels)]:
            associations.append(associate(attribute, evaluations, rules))
        scores.append(score_classes(evaluations, test.labels, len(data.classes)))
    common = common_to_all(associations, rules.level)
    first_seed = [evaluations[0] for evaluations in by_network.values()]
    predictions = prediction_rows(by_network, test, data.classes, data.people)
    of_people = None
    people_for_label = None
    if data.people is not None:
        people_for_label = people.shares_for(data.people, test.labels)
        of_people = people.compare(by_network, test.labels, data.people, rules, seed)
    return Dossier(
        groups=group_mistakes(first_seed, test, suspected, people_for_label, OF_A_KIND),
        transitions=tuple(transition_counts),
        mistakes=correct_sure_mistakes(mistakes),
        associations=tuple(associations),
        common=tuple(tuple(group) for group in common[:NAMED_ATTRIBUTES]),
        labels=labels,
        scores=tuple(scores),
        pairs=find_confused_pairs(by_network, test.labels, CONFUSED_PAIRS, rules),
        predictions=predictions,
        rows=failure_rows(predictions, by_network, suspected),
        people=of_people,
        gallery=gallery.collect(first_seed, test, data.people, suspected),
    )
