"""What Grad-CAM's heatmaps are worth.

In come a model and images; out come deletion and insertion curves beside those of random maps, how
like itself Grad-CAM stays as the network's weights are shuffled, and, where the objects' masks are
known, how well it points at them.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import scipy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lab.data.images import IMAGE_SIZE, Images, to_input
from lab.machine.device import Hardware
from lab.machine.options import Between
from lab.measure import gradcam
from lab.measure.evaluation import at_labels, logits_of
from lab.measure.models import Model


@dataclass(frozen=True)
class Settings:
    """How heatmaps are tried."""

    curve_images: Annotated[int, Between(10)] = 200
    """test images behind deletion and insertion curves"""
    curve_steps: Annotated[int, Between(2, 1024)] = 16
    """steps of a deletion or insertion curve"""


@dataclass(frozen=True)
class MapScores:
    """What one kind of heatmap is worth.

    Curves are the mean probability of the predicted class as the hottest pixels are greyed, or put
    back into the blurred image (Petsiuk et al., BMVC 2018, section 3.3). With masks: how often the
    hottest pixel lies on the object, and how far the hot half of the range overlaps it.
    """

    deletion: np.ndarray  # float64 [steps + 1]
    insertion: np.ndarray  # float64 [steps + 1]
    pointing: float | None
    overlap: float | None  # intersection over union


@dataclass(frozen=True)
class Scores:
    """Grad-CAM beside random maps as coarse, and beside itself when the network is shuffled.

    Likeness is the mean rank correlation with the maps of the trained network, after the weights
    have been shuffled from the classifier down to a stage (Adebayo et al., NeurIPS 2018).
    """

    grad_cam: MapScores
    random: MapScores
    likeness_without_classifier: float
    likeness_without_stage: tuple[float, ...]  # [k]: down to stage k and its attention


def study(
    model: Model, images: Images, settings: Settings, seed: int, hardware: Hardware
) -> Scores:
    """Does Grad-CAM mean anything? Asked of a trained network on a few images."""
    generator = torch.Generator().manual_seed(seed)
    steps = settings.curve_steps
    classes = logits_of(model, images.pixels, hardware).argmax(1)
    heat = gradcam.heatmaps_of(model, images.pixels, classes)
    with torch.no_grad():
        cells = model.features(to_input(images.pixels[:1].to(hardware.device))).shape[2:]
    coarse = torch.rand(len(images), 1, *cells, generator=generator)
    noise = F.interpolate(coarse, IMAGE_SIZE, mode="bilinear")[:, 0]
    of_grad_cam = score_maps(heat, model, images, classes, steps, generator, hardware)
    of_noise = score_maps(noise, model, images, classes, steps, generator, hardware)

    shuffled = copy.deepcopy(model)
    layers_from_the_top = [[shuffled.classifier]]
    for stage, attention in zip(
        reversed(shuffled.stages), reversed(shuffled.attention), strict=True
    ):
        layers_from_the_top.append([attention, stage])
    likeness = []
    for layers in layers_from_the_top:
        for layer in layers:
            shuffle_weights(layer, generator)
        likeness.append(
            rank_correlation(heat, gradcam.heatmaps_of(shuffled, images.pixels, classes))
        )
    without_classifier, *without_stage = likeness
    return Scores(of_grad_cam, of_noise, without_classifier, tuple(reversed(without_stage)))


def score_maps(
    maps: Tensor,
    model: Model,
    images: Images,
    classes: Tensor,
    steps: int,
    generator: torch.Generator,
    hardware: Hardware,
) -> MapScores:
    """Scores of `maps` float32 [N, 32, 32]; pixels of equal heat take turns at random."""
    ties = 1e-6 * torch.rand(maps.shape, generator=generator)
    order = (maps + ties).flatten(1).argsort(1, descending=True)  # [N, pixels], hottest first
    rank = order.argsort(1).view(*maps.shape, 1)
    pixels = images.pixels
    grey = pixels.float().mean((0, 1, 2)).byte()
    blurred = torch.from_numpy(scipy.ndimage.gaussian_filter(pixels.numpy(), (0, 5, 5, 0)))
    deletion = []
    insertion = []
    for step in range(steps + 1):
        touched = rank < IMAGE_SIZE**2 * step / steps
        greyed = torch.where(touched, grey, pixels)
        shown = torch.where(touched, pixels, blurred)
        deletion.append(mean_probability(model, greyed, classes, hardware))
        insertion.append(mean_probability(model, shown, classes, hardware))
    pointing = None
    overlap = None
    if images.masks is not None:
        inside = images.masks.flatten(1)
        hot = maps.flatten(1) > 0.5
        pointing = float(inside.gather(1, order[:, :1]).double().mean())
        overlap = float(((inside & hot).sum(1) / (inside | hot).sum(1)).mean())
    return MapScores(np.array(deletion), np.array(insertion), pointing, overlap)


def mean_probability(model: Model, pixels: Tensor, classes: Tensor, hardware: Hardware) -> float:
    """The mean probability of `classes` int64 [N] on images [N, 32, 32, 3]."""
    probabilities = logits_of(model, pixels, hardware).softmax(1)
    return float(at_labels(probabilities, classes).mean())


@torch.no_grad()
def shuffle_weights(layer: nn.Module, generator: torch.Generator) -> None:
    """Put the values of each tensor of weights in another order."""
    for weight in layer.parameters():
        order = torch.randperm(weight.numel(), generator=generator).to(weight.device)
        weight.data = weight.flatten()[order].view(weight.shape)


def rank_correlation(maps: Tensor, others: Tensor) -> float:
    """Mean over images of Spearman's correlation of two heatmaps, [N, 32, 32] each."""
    standardised = []
    for part in (maps, others):
        ranks = scipy.stats.rankdata(part.flatten(1).numpy(), axis=1)
        centred = ranks - ranks.mean(1, keepdims=True)
        standardised.append(centred / ranks.std(1, keepdims=True).clip(1e-9))
    return float((standardised[0] * standardised[1]).mean())
