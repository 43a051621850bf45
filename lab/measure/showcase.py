"""One test image under every corruption and attack, with what the networks say of each.

In come the first seed's evaluations and the images that the stress tests try; out comes a
`Showcase`, to be looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lab.data.images import Dataset, Images, to_input
from lab.machine.device import Hardware
from lab.measure import attacks, corruptions
from lab.measure.evaluation import Evaluation, logits_of


@dataclass(frozen=True)
class Said:
    """A network's answer."""

    predicted: int
    confidence: float  # temperature scaled


@dataclass(frozen=True)
class Shown:
    """A changed image with the answers to it, by the network's key."""

    pixels: np.ndarray  # uint8 [32, 32, 3] RGB
    said: dict[str, Said]


@dataclass(frozen=True)
class AttackShown:
    """What an attack on one network made of the image."""

    epsilon: float  # of 255
    change: np.ndarray  # float32 [32, 32, 3]: what was added, in units of epsilon: -1 to 1
    shown: Shown


@dataclass(frozen=True)
class Showcase:
    """An image that all networks classify correctly, if there is one among those attacked."""

    index: int  # in the test set
    label: int
    original: Shown
    corrupted: dict[str, tuple[Shown, ...]]  # by corruption, from severity 1 to 5
    attacked: dict[str, tuple[AttackShown, ...]]  # by the network attacked, smallest epsilon first


def make(
    evaluations: Sequence[Evaluation],
    data: Dataset,
    candidates: Tensor,
    settings: attacks.Settings,
    seed: int,
    hardware: Hardware,
) -> Showcase:
    """Of the first of the `candidates`, int64 indices, that all networks know."""
    all_right = np.all([one.correct for one in evaluations], axis=0)
    known = candidates[torch.from_numpy(all_right)[candidates]]
    index = known[:1] if len(known) > 0 else candidates[:1]
    image = data.test.select(index)
    corrupted = {}
    for name in corruptions.names_of(data):
        pixels = corruptions.images_under(name, data, index, seed)[:, 0]
        corrupted[name] = ask_all(evaluations, pixels, hardware)
    attacked = {}
    for one in evaluations:
        attacked[one.trained.network.key] = attack(one, evaluations, image, settings, hardware)
    return Showcase(
        index=int(index[0]),
        label=int(image.labels[0]),
        original=ask_all(evaluations, image.pixels, hardware)[0],
        corrupted=corrupted,
        attacked=attacked,
    )


def ask_all(
    evaluations: Sequence[Evaluation], pixels: Tensor, hardware: Hardware
) -> tuple[Shown, ...]:
    """What all networks say of images uint8 [N, 32, 32, 3] or float32 [N, 3, 32, 32]."""
    said: list[dict[str, Said]] = [{} for _ in range(len(pixels))]
    for one in evaluations:
        logits = logits_of(one.trained.model, pixels, hardware)
        confidence, predicted = (logits / one.temperature).softmax(1).max(1)
        for k in range(len(pixels)):
            answer = Said(int(predicted[k]), float(confidence[k]))
            said[k][one.trained.network.key] = answer
    if pixels.is_floating_point():
        pixels = (255 * pixels).round().to(torch.uint8).permute(0, 2, 3, 1)
    images = pixels.cpu().numpy()
    return tuple(Shown(images[k], said[k]) for k in range(len(images)))


def attack(
    attacked: Evaluation,
    evaluations: Sequence[Evaluation],
    image: Images,
    settings: attacks.Settings,
    hardware: Hardware,
) -> tuple[AttackShown, ...]:
    """One network's image, attacked with each epsilon."""
    classify = attacked.trained.model
    clean = to_input(image.pixels.to(hardware.device))
    victims = attacks.find_victims(classify, clean, image.labels.to(hardware.device), hardware)
    made = []
    for epsilon in sorted(settings.epsilons):
        limit = epsilon / 255
        tried = attacks.race(classify, victims, limit, settings.rounds(), hardware)
        change = (tried.images - clean)[0].permute(1, 2, 0) / limit
        (shown,) = ask_all(evaluations, tried.images, hardware)
        made.append(AttackShown(epsilon, change.cpu().numpy(), shown))
    return tuple(made)
