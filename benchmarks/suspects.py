"""How well networks tell labels that people reject, by several rules; one table.

    python benchmarks/suspects.py --data-dir ../shared/data

Takes the options of main.py, whose weights in the output folder are asked, and CIFAR-10H. The truth
is people's: an image's label is rejected where more of them choose another class. Each rule puts
the test images into an order. The images of even index are to choose a rule by, those of odd index
say how good it is: average precision, how many of the first 50 and 200 are rejected, and how many
of all rejected ones are among them. Of networks of several seeds, what a rule says is averaged.

Where label-errors/cifar10_mturk.json lies in the data folder (github: cleanlab/label-errors), the
suspects are held against it too: test images that confident learning had called mislabelled, each
reviewed by five people (Northcutt et al., NeurIPS 2021). A label is kept where at least three of
them choose it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import scipy
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import main
from lab.data import cifar10
from lab.machine.device import prepare_machine
from lab.measure import people, suspects
from lab.measure.evaluation import Evaluation, at_labels, evaluate_all

NEIGHBOURS = 20
FIRST = (50, 200)  # of half of the test images


def label_unlikely(one: Evaluation, labels: Tensor) -> Tensor:
    """1 less the label's probability: [N]."""
    return 1 - at_labels(one.probabilities, labels)


def margin(one: Evaluation, labels: Tensor) -> Tensor:
    """By how much another class is likelier than the label: [N]."""
    others = one.probabilities.scatter(1, labels[:, None], 0)
    return others.amax(1) - at_labels(one.probabilities, labels)


def below_usual(one: Evaluation, labels: Tensor) -> Tensor:
    """How much less likely the label is than it usually is for its class: [N].

    Confident learning's threshold by class (Northcutt et al., JAIR 2021).
    """
    of_label = at_labels(one.probabilities, labels)
    usual = torch.stack([of_label[labels == label].mean() for label in labels.unique()])
    return usual[labels] - of_label


def far_from_class(one: Evaluation, labels: Tensor) -> Tensor:
    """How much farther the features lie from their class's mean than from another's: [N]."""
    distances = torch.cdist(one.features, one.held_out.class_means)
    others = distances.scatter(1, labels[:, None], torch.inf)
    return at_labels(distances, labels) - others.amin(1)


def other_neighbours(one: Evaluation, labels: Tensor) -> Tensor:
    """How many of the nearest validation images have another label: [N]."""
    own = F.normalize(one.held_out.outputs.features)
    distances = torch.cdist(F.normalize(one.features), own)
    nearest = distances.topk(NEIGHBOURS, largest=False).indices
    return (one.held_out.labels[nearest] != labels[:, None]).double().mean(1)


RULES: dict[str, Callable[[Evaluation, Tensor], Tensor]] = {
    "label unlikely": label_unlikely,
    "margin": margin,
    "below the class's usual": below_usual,
    "far from the class's mean": far_from_class,
    "neighbours of other classes": other_neighbours,
}
TOGETHER = (
    ("label unlikely", "neighbours of other classes"),
    ("label unlikely", "far from the class's mean"),
    ("margin", "neighbours of other classes", "far from the class's mean"),
)


def orders(evaluations: Sequence[Evaluation], labels: Tensor) -> dict[str, np.ndarray]:
    """By rule, how suspicious each image is: [N]."""
    found = {}
    for name, rule in RULES.items():
        by_network = torch.stack([rule(one, labels).double() for one in evaluations])
        found[name] = by_network.mean(0).numpy()
        found[f"{name}, for all networks"] = by_network.amin(0).numpy()
    for names in TOGETHER:
        ranks = [scipy.stats.rankdata(found[name]) for name in names]
        found[" + ".join(names)] = np.mean(ranks, axis=0)
    return found


def judge(order: np.ndarray, rejected: np.ndarray) -> dict[str, float]:
    """How good an order of images [N] is, of which some are `rejected` [N]; percent."""
    from sklearn.metrics import average_precision_score

    row = {"average precision": 100 * float(average_precision_score(rejected, order))}
    first = np.argsort(-order, kind="stable")
    for count in FIRST:
        hits = rejected[first[:count]].sum()
        row[f"precision of {count}"] = 100 * hits / count
        row[f"recall of {count}"] = 100 * hits / rejected.sum()
    return row


def read_reviews(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """The images that were reviewed int64 [N], and whether their labels were rejected bool [N]."""
    path = folder / "label-errors" / "cifar10_mturk.json"
    if not path.exists():
        return np.zeros(0, int), np.zeros(0, bool)
    images = []
    rejected = []
    for review in json.loads(path.read_text(encoding="utf-8")):
        images.append(review["id"])
        rejected.append(review["mturk"]["given"] < 3)
    return np.array(images), np.array(rejected)


def print_reviews(
    found: dict[str, np.ndarray], agreed: np.ndarray, images: np.ndarray, rejected: np.ndarray
) -> None:
    """The rules and main.py's suspects on the images that were reviewed."""
    from sklearn.metrics import average_precision_score

    print(f"\n{len(images)} reviewed images, {rejected.sum()} labels rejected by the reviewers\n")
    rows = {}
    for name, order in found.items():
        precision = average_precision_score(rejected, order[images])
        rows[name] = {"average precision": 100 * float(precision)}
    print(pd.DataFrame(rows).T.round(1).to_markdown())
    named = agreed[images] > 0
    print(
        f"\nof main.py's {(agreed > 0).sum()} suspects {named.sum()} were reviewed: "
        f"{(named & rejected).sum()} labels rejected, {(named & ~rejected).sum()} kept"
    )


def run(settings: main.Settings) -> None:
    """The table, on even and on odd images."""
    hardware = prepare_machine(settings.machine, len(main.NETWORKS))
    data = main.load_data(settings)
    if data.people is None:
        sys.exit("there are no people's answers to hold the rules against")
    trained = main.train_all(main.training_jobs(settings), data, hardware)
    by_network = evaluate_all(trained, data, hardware)
    evaluations = [one for of_network in by_network.values() for one in of_network]
    labels = data.test.labels
    found = orders(evaluations, labels)
    agreed = np.zeros(len(labels))
    for suspect in suspects.find(by_network, data.test):
        agreed[suspect.index] = suspect.probability
    found["all networks agree surely (main.py)"] = agreed
    rejected = people.rejected(data.people, labels)
    even = np.arange(len(labels)) % 2 == 0
    for half, chosen in (("even", even), ("odd", ~even)):
        rows = {name: judge(order[chosen], rejected[chosen]) for name, order in found.items()}
        print(f"\n{half} images, {rejected[chosen].sum()} labels rejected by people\n")
        print(pd.DataFrame(rows).T.round(1).to_markdown())
    named = agreed > 0
    print(f"\nmain.py names {named.sum()}, of which people reject {(named & rejected).sum()}")
    images, by_reviewers = read_reviews(cifar10.home_of(settings.data_dir))
    if len(images) > 0:
        print_reviews(found, agreed, images, by_reviewers)


if __name__ == "__main__":
    run(main.parse_settings())
