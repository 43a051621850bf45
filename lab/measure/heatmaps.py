"""What Grad-CAM's heatmaps are worth.

In come trained models and images; out come deletion and insertion curves beside those of random
maps, how like itself Grad-CAM stays as the network's weights are shuffled, and, where the objects'
masks are known, how well it points at them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import numpy as np
import scipy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lab.data.images import IMAGE_SIZE, Images, to_input
from lab.machine.device import Hardware
from lab.machine.options import Between
from lab.machine.pieces import Pieces
from lab.measure import gradcam, statistics
from lab.measure.estimates import Estimate, estimate_mean
from lab.measure.evaluation import Evaluation, at_labels, logits_of
from lab.measure.models import Model, fingerprint


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
    back into the blurred image (Petsiuk et al., BMVC 2018, section 3.3); an area is below a curve.
    With masks: how often the hottest pixel lies on the object, and how far the hot half of the
    range overlaps it.
    """

    deletion: np.ndarray  # float64 [steps + 1]: mean over seeds and images
    insertion: np.ndarray  # float64 [steps + 1]
    deletion_area: Estimate
    insertion_area: Estimate
    pointing: Estimate | None
    overlap: Estimate | None  # intersection over union


@dataclass(frozen=True)
class Scores:
    """Grad-CAM beside random maps as coarse, and beside itself when the network is shuffled.

    Likeness is the mean rank correlation with the maps of the trained network, after the weights
    have been shuffled from the classifier down to a stage (Adebayo et al., NeurIPS 2018).
    """

    grad_cam: MapScores
    random: MapScores
    # How much better Grad-CAM is than random maps on the same images
    deletion_gain: Estimate
    insertion_gain: Estimate
    likeness_without_classifier: Estimate
    likeness_without_stage: tuple[Estimate, ...]  # [k]: down to stage k and its attention


@dataclass(frozen=True)
class TriedMaps:
    """What became of each image under one kind of heatmap."""

    deletion: np.ndarray  # float64 [N, steps + 1]
    insertion: np.ndarray  # float64 [N, steps + 1]
    pointing: np.ndarray | None  # float64 [N]
    overlap: np.ndarray | None  # float64 [N]

    def deletion_area(self) -> np.ndarray:
        """Of each image: float64 [N]."""
        return area_below(self.deletion)

    def insertion_area(self) -> np.ndarray:
        """Of each image: float64 [N]."""
        return area_below(self.insertion)


@dataclass(frozen=True)
class SeedMaps:
    """The heatmaps of one seed's network."""

    grad_cam: TriedMaps
    random: TriedMaps
    likeness: list[np.ndarray]  # float64 [N], after the classifier was shuffled, the last stage, …

    @classmethod
    def from_fields(cls, grad_cam: dict, random: dict, likeness: list[np.ndarray]) -> SeedMaps:
        """As `dataclasses.asdict` gives them."""
        return cls(TriedMaps(**grad_cam), TriedMaps(**random), likeness)


def study(
    evaluations: Sequence[Evaluation],
    images: Images,
    settings: Settings,
    rules: statistics.Settings,
    seed: int,
    hardware: Hardware,
    pieces: Pieces,
) -> Scores:
    """Does Grad-CAM mean anything? Asked of each seed's trained network on a few images."""
    steps = settings.curve_steps
    depends_on = {"images": fingerprint(images.tensors()), "steps": steps, "seed": seed}
    by_seed = []
    for one in evaluations:
        make = partial(try_maps, one.trained.model, images, steps, seed, hardware)
        maps = one.measured_once(pieces, "heatmaps", depends_on, make, SeedMaps.from_fields)
        by_seed.append(maps)
    return score(by_seed, rules)


def score(by_seed: Sequence[SeedMaps], rules: statistics.Settings) -> Scores:
    """Scores from each seed's heatmaps."""

    def estimated(part: Callable[[SeedMaps], np.ndarray]) -> Estimate:
        return estimate_mean([part(of_seed) for of_seed in by_seed], rules)

    layers = len(by_seed[0].likeness)
    likeness = []
    for k in range(layers):
        likeness.append(estimate_mean([of_seed.likeness[k] for of_seed in by_seed], rules))
    without_classifier, *without_stage = likeness
    return Scores(
        grad_cam=score_maps([of_seed.grad_cam for of_seed in by_seed], rules),
        random=score_maps([of_seed.random for of_seed in by_seed], rules),
        deletion_gain=estimated(
            lambda maps: maps.random.deletion_area() - maps.grad_cam.deletion_area()
        ),
        insertion_gain=estimated(
            lambda maps: maps.grad_cam.insertion_area() - maps.random.insertion_area()
        ),
        likeness_without_classifier=without_classifier,
        likeness_without_stage=tuple(reversed(without_stage)),
    )


def score_maps(by_seed: Sequence[TriedMaps], rules: statistics.Settings) -> MapScores:
    """Scores of one kind of heatmap."""
    pointing = [one.pointing for one in by_seed if one.pointing is not None]
    overlap = [one.overlap for one in by_seed if one.overlap is not None]
    return MapScores(
        deletion=np.mean([one.deletion.mean(0) for one in by_seed], axis=0),
        insertion=np.mean([one.insertion.mean(0) for one in by_seed], axis=0),
        deletion_area=estimate_mean([one.deletion_area() for one in by_seed], rules),
        insertion_area=estimate_mean([one.insertion_area() for one in by_seed], rules),
        pointing=estimate_mean(pointing, rules, 1, between=(0, 1)) if pointing else None,
        overlap=estimate_mean(overlap, rules, between=(0, 1)) if overlap else None,
    )


def area_below(curves: np.ndarray) -> np.ndarray:
    """Of curves [N, points] over 0 to 1: by trapezoids, float64 [N]."""
    return scipy.integrate.trapezoid(curves, dx=1 / (curves.shape[1] - 1), axis=1)


def try_maps(model: Model, images: Images, steps: int, seed: int, hardware: Hardware) -> SeedMaps:
    """One trained network's Grad-CAM, random maps, and Grad-CAM as the network is shuffled.

    Random maps, ties and shuffles are the same for every network and seed.
    """
    generator = torch.Generator().manual_seed(seed)
    classes = logits_of(model, images.pixels, hardware).argmax(1)
    heat = gradcam.heatmaps_of(model, images.pixels, classes)
    with torch.no_grad():
        cells = model.features(to_input(images.pixels[:1].to(hardware.device))).shape[2:]
    coarse = torch.rand(len(images), 1, *cells, generator=generator)
    noise = F.interpolate(coarse, IMAGE_SIZE, mode="bilinear")[:, 0]
    of_grad_cam = try_on_images(heat, model, images, classes, steps, generator, hardware)
    of_noise = try_on_images(noise, model, images, classes, steps, generator, hardware)

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
        maps = gradcam.heatmaps_of(shuffled, images.pixels, classes)
        likeness.append(rank_correlations(heat, maps))
    return SeedMaps(of_grad_cam, of_noise, likeness)


def try_on_images(
    maps: Tensor,
    model: Model,
    images: Images,
    classes: Tensor,
    steps: int,
    generator: torch.Generator,
    hardware: Hardware,
) -> TriedMaps:
    """Curves of `maps` float32 [N, 32, 32]; pixels of equal heat take turns at random."""
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
        deletion.append(probabilities_of(model, greyed, classes, hardware))
        insertion.append(probabilities_of(model, shown, classes, hardware))
    pointing = None
    overlap = None
    if images.masks is not None:
        inside = images.masks.flatten(1)
        hot = maps.flatten(1) > 0.5
        pointing = inside.gather(1, order[:, :1])[:, 0].double().numpy()
        overlap = ((inside & hot).sum(1) / (inside | hot).sum(1)).double().numpy()
    return TriedMaps(np.stack(deletion, axis=1), np.stack(insertion, axis=1), pointing, overlap)


def probabilities_of(
    model: Model, pixels: Tensor, classes: Tensor, hardware: Hardware
) -> np.ndarray:
    """The probability of each image's class int64 [N], on images [N, 32, 32, 3]: float64 [N]."""
    probabilities = logits_of(model, pixels, hardware).double().softmax(1)
    return at_labels(probabilities, classes).numpy()


@torch.no_grad()
def shuffle_weights(layer: nn.Module, generator: torch.Generator) -> None:
    """Put the values of each tensor of weights in another order."""
    for weight in layer.parameters():
        order = torch.randperm(weight.numel(), generator=generator).to(weight.device)
        weight.data = weight.flatten()[order].view(weight.shape)


def rank_correlations(maps: Tensor, others: Tensor) -> np.ndarray:
    """Spearman's correlation of each image's two heatmaps, [N, 32, 32] each: float64 [N]."""
    standardised = []
    for part in (maps, others):
        ranks = scipy.stats.rankdata(part.flatten(1).numpy(), axis=1)
        centred = ranks - ranks.mean(1, keepdims=True)
        standardised.append(centred / ranks.std(1, keepdims=True).clip(1e-9))
    return (standardised[0] * standardised[1]).mean(1)
