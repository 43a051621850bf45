"""Every test image that a network gets wrong, with all that is known of it: to be looked through.

In come the first seed's evaluations and the test images; out comes a `Gallery`, the surest mistake
first.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lab.data.images import Images
from lab.measure import gradcam
from lab.measure.evaluation import Evaluation


@dataclass(frozen=True)
class Gallery:
    """K test images; what is known by network stands under the network's key."""

    index: np.ndarray  # int64 [K], in the test set
    pixels: np.ndarray  # uint8 [K, 32, 32, 3] RGB
    labels: np.ndarray  # int64 [K]
    probabilities: dict[str, np.ndarray]  # float32 [K, classes], temperature scaled
    heatmaps: dict[str, np.ndarray]  # float32 [K, h, w] in [0, 1]: Grad-CAM as the features lie
    people: np.ndarray | None  # float64 [K, classes]: shares of people who choose each class
    is_suspect: np.ndarray  # bool [K]: all networks surely agree against the label


def collect(
    evaluations: Sequence[Evaluation],
    test: Images,
    people: Tensor | None,
    suspected: Collection[int],
) -> Gallery:
    """What one seed's networks get wrong; `people` are shares float64 [N, classes]."""
    surest = np.zeros(len(test))
    for one in evaluations:
        surest = np.maximum(surest, ~one.correct * one.confidence.numpy())
    order = np.argsort(-surest, kind="stable")
    index = torch.from_numpy(order[surest[order] > 0])
    images = test.select(index)
    probabilities = {}
    heatmaps = {}
    for one in evaluations:
        key = one.trained.network.key
        probabilities[key] = one.probabilities[index].numpy()
        called = one.predicted[index]
        heatmaps[key] = gradcam.coarse_heatmaps_of(one.trained.model, images.pixels, called).numpy()
    return Gallery(
        index=index.numpy(),
        pixels=images.pixels.numpy(),
        labels=images.labels.numpy(),
        probabilities=probabilities,
        heatmaps=heatmaps,
        people=None if people is None else people[index].numpy(),
        is_suspect=np.isin(index.numpy(), list(suspected)),
    )
