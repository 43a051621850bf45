"""Grad-CAM: which pixels speak for a class.

In come a model and images; out come heatmaps [N, 32, 32] in [0, 1], and test images with what each
network answers and why.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lab.data.images import Dataset, Images, first_of_class, to_input
from lab.measure.evaluation import ByNetwork, Evaluation, at_labels
from lab.measure.models import Model, Network

BATCH = 500  # images at a time: their activations and gradients take about 1 GB


def heatmaps_of(model: Model, pixels: Tensor, classes: Tensor) -> Tensor:
    """Grad-CAM (Selvaraju et al., ICCV 2017) of `classes` int64 [N] on the network's features.

    Takes images uint8 [N, 32, 32, 3], computes in float32. Returns heatmaps float32 [N, 32, 32]
    on the CPU, each scaled to [0, 1]; zero where no activation speaks for the class.
    """
    heatmaps = [torch.empty(0, *pixels.shape[1:3])]
    for heat in heat_by_batch(model, pixels, classes):
        large = F.interpolate(heat, pixels.shape[1:3], mode="bilinear", align_corners=False)
        heatmaps.append(scaled(large[:, 0]).cpu())
    return torch.cat(heatmaps)


def coarse_heatmaps_of(model: Model, pixels: Tensor, classes: Tensor) -> Tensor:
    """The same as the features lie, before they are enlarged: float32 [N, H, W]."""
    heatmaps = [scaled(heat[:, 0]).cpu() for heat in heat_by_batch(model, pixels, classes)]
    return torch.cat(heatmaps) if heatmaps else torch.empty(0, 1, 1)


def scaled(heat: Tensor) -> Tensor:
    """Each map of [N, H, W] from 0 to 1."""
    low = heat.amin((1, 2), keepdim=True)
    high = heat.amax((1, 2), keepdim=True)
    return (heat - low) / (high - low).clamp_min(1e-7)


def heat_by_batch(model: Model, pixels: Tensor, classes: Tensor) -> Iterator[Tensor]:
    """Some images at a time, what speaks for their classes [N, 1, H, W]; the model evaluates."""
    model.eval()
    for start in range(0, len(pixels), BATCH):
        part = slice(start, start + BATCH)
        yield heat_of_batch(model, pixels[part], classes[part])


def heat_of_batch(model: Model, pixels: Tensor, classes: Tensor) -> Tensor:
    """The same of images that are computed at once; `model` is in evaluation mode."""
    device = next(model.parameters()).device
    with torch.no_grad():
        features = model.features(to_input(pixels.to(device)))  # [N, C, H, W]
    features = features.detach().requires_grad_()
    scores = at_labels(model.classify(features), classes.to(device))
    (gradients,) = torch.autograd.grad(scores.sum(), features)
    weights = gradients.mean((2, 3), keepdim=True)  # equation 1
    return F.relu((weights * features).sum(1, keepdim=True)).detach()  # equation 2


@dataclass(frozen=True)
class Answer:
    """What a network says of an image, and which pixels speak for it."""

    network: Network
    predicted: int
    confidence: float
    heatmap: np.ndarray  # float32 [32, 32] in [0, 1]


@dataclass(frozen=True)
class ExplainedImage:
    """A test image with the answers of one network or more."""

    index: int  # in the test set
    pixels: np.ndarray  # uint8 [32, 32, 3] RGB
    label: int
    answers: tuple[Answer, ...]


def explain(by_network: ByNetwork, data: Dataset, count: int) -> tuple[ExplainedImage, ...]:
    """The first `count` test images of some classes, with the first seed's networks.

    So they were chosen before any result was known. Each with Grad-CAM for the class that is
    predicted.
    """
    first_seed = [evaluations[0] for evaluations in by_network.values()]
    labels = [data.classes.index(name) for name in data.explained]
    index = first_of_class(data.test.labels, labels, count)
    return explain_images(index, first_seed, data.test)


def explain_images(
    index: Tensor, evaluations: Sequence[Evaluation], test: Images
) -> tuple[ExplainedImage, ...]:
    """Test images `index` int64 [K], each with the answers of the networks evaluated."""
    images = test.select(index)
    heatmaps = []
    for evaluation in evaluations:
        called = evaluation.predicted[index]
        heatmaps.append(heatmaps_of(evaluation.trained.model, images.pixels, called).numpy())
    explained = []
    for k, i in enumerate(index.tolist()):
        answers = []
        for evaluation, maps in zip(evaluations, heatmaps, strict=True):
            answers.append(
                Answer(
                    network=evaluation.trained.network,
                    predicted=int(evaluation.predicted[i]),
                    confidence=float(evaluation.confidence[i]),
                    heatmap=maps[k],
                )
            )
        pixels = images.pixels[k].numpy()
        explained.append(ExplainedImage(i, pixels, int(images.labels[k]), tuple(answers)))
    return tuple(explained)
