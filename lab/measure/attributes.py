"""What failing images have in common: attributes that mistakes go with.

In come images and evaluations; out come attributes of the images, each network's error by fifths of
them, and rank correlations with intervals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import scipy
import torch
from torch import Tensor

from lab.data.images import Images
from lab.measure import statistics
from lab.measure.evaluation import Evaluation, correct_by_seed
from lab.measure.models import Network
from lab.measure.statistics import Interval


@dataclass(frozen=True)
class Attribute:
    """Something that is measured of each test image: float64 [N]."""

    name: str
    values: np.ndarray


def image_attributes(images: Images) -> list[Attribute]:
    """What can be measured on the pixels, and what is known of drawn images."""
    rgb = images.pixels.double().numpy()
    luma = rgb @ np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
    edges = []
    for one in luma:
        edges.append(cv2.Laplacian(one, cv2.CV_64F).var())
    attributes = [
        Attribute("brightness", luma.mean((1, 2))),
        Attribute("contrast", luma.std((1, 2))),
        Attribute("colourfulness", colourfulness(rgb)),
        Attribute("sharpness", np.array(edges)),
    ]
    for name, values in images.known.items():
        attributes.append(Attribute(name, values.double().numpy()))
    return attributes


def colourfulness(rgb: np.ndarray) -> np.ndarray:
    """How colourful images [N, H, W, 3] are, by their opponent colours' spread and strength: [N].

    Hasler & Süsstrunk (Human Vision and Electronic Imaging 2003), equation for M(3).
    """
    red, green, blue = np.moveaxis(rgb, 3, 0)
    red_green = red - green
    yellow_blue = (red + green) / 2 - blue
    spread = np.hypot(red_green.std((1, 2)), yellow_blue.std((1, 2)))
    strength = np.hypot(red_green.mean((1, 2)), yellow_blue.mean((1, 2)))
    return spread + 0.3 * strength


def distance_from_class(evaluations: Sequence[Evaluation], labels: Tensor) -> Attribute:
    """How far images lie from their class's mean in the network's features; mean over seeds."""
    distances = []
    for evaluation in evaluations:
        means = evaluation.held_out.class_means[labels]
        distances.append((evaluation.features - means).norm(dim=1).double())
    return Attribute("distance from the class mean", torch.stack(distances).mean(0).numpy())


@dataclass(frozen=True)
class Association:
    """A network's error by fifths of an attribute, from its least values to its greatest."""

    network: Network
    attribute: str
    middle: np.ndarray  # float64 [5]: the attribute's median in each
    error: tuple[Interval, ...]  # percent
    correlation: Interval  # Spearman's, of the attribute and the share of seeds that are wrong
    p: float  # of no correlation


def associate(
    attribute: Attribute, evaluations: Sequence[Evaluation], rules: statistics.Settings
) -> Association:
    """One network's errors with one attribute."""
    wrong = ~correct_by_seed(evaluations)  # [seeds, images]
    fifths = np.array_split(np.argsort(attribute.values, kind="stable"), 5)
    middle = []
    error = []
    for fifth in fifths:
        middle.append(np.median(attribute.values[fifth]))
        error.append(statistics.share_interval(wrong[:, fifth].sum(1), len(fifth), rules))
    correlation, p = rank_correlate(attribute.values, wrong.mean(0), rules.level)
    return Association(
        network=evaluations[0].trained.network,
        attribute=attribute.name,
        middle=np.array(middle),
        error=tuple(error),
        correlation=correlation,
        p=p,
    )


def rank_correlate(values: np.ndarray, others: np.ndarray, level: float) -> tuple[Interval, float]:
    """Spearman's rank correlation with its interval, and p of the null hypothesis of none.

    The interval is Fisher's, with Bonett and Wright's variance (Psychometrika 2000).
    """
    if np.ptp(values) == 0 or np.ptp(others) == 0:
        return Interval(0.0, 0.0, 0.0), 1.0
    spearman = scipy.stats.spearmanr(values, others)
    r = float(spearman.statistic)
    half = scipy.stats.norm.ppf(1 - level / 2) * math.sqrt((1 + r**2 / 2) / max(1, len(values) - 3))
    centre = math.atanh(np.clip(r, -1 + 1e-9, 1 - 1e-9))
    interval = Interval(r, math.tanh(centre - half), math.tanh(centre + half))
    return interval, float(spearman.pvalue)


def by_attribute(associations: Sequence[Association]) -> dict[str, list[Association]]:
    """The networks' associations under each attribute's name."""
    grouped: dict[str, list[Association]] = {}
    for association in associations:
        grouped.setdefault(association.attribute, []).append(association)
    return grouped


def common_to_all(associations: Sequence[Association], level: float) -> list[list[Association]]:
    """By attribute the associations of all networks, where all fail with it; strongest first.

    An attribute's p is the largest of the networks'; Holm's method corrects it over attributes.
    """
    groups = list(by_attribute(associations).values())
    largest_p = []
    for group in groups:
        largest_p.append(max(one.p for one in group))
    corrected = statistics.holm(largest_p)
    common = []
    for group, p in zip(groups, corrected, strict=True):
        signs = {np.sign(one.correlation.value) for one in group}
        if p < level and len(signs) == 1:
            common.append(group)
    return sorted(common, key=weakest_correlation, reverse=True)


def weakest_correlation(group: Sequence[Association]) -> float:
    """The smallest of the networks' correlations, whatever its sign."""
    return min(abs(one.correlation.value) for one in group)
