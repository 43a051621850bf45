"""Images with labels, their split, and how they become what a network takes.

In come uint8 pixels and int64 labels; out come the same, selected, moved or as float.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

IMAGE_SIZE = 32  # pixels, in height and width, of every image here


@dataclass(frozen=True)
class Images:
    """Labelled images.

    `pixels` uint8 [N, 32, 32, 3] RGB, `labels` int64 [N]; of drawn images also `masks` of the
    object, bool [N, 32, 32], and what is `known` of them, float32 [N] by name.
    """

    pixels: Tensor
    labels: Tensor
    masks: Tensor | None = None
    known: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    def tensors(self) -> dict[str, Tensor]:
        """All that is known of them, by name."""
        tensors = {"pixels": self.pixels, "labels": self.labels, **self.known}
        if self.masks is not None:
            tensors["masks"] = self.masks
        return tensors

    def select(self, index: Tensor) -> Images:
        masks = None if self.masks is None else self.masks[index]
        known = {name: values[index] for name, values in self.known.items()}
        return Images(self.pixels[index], self.labels[index], masks, known)

    def to(self, device: torch.device) -> Images:
        masks = None if self.masks is None else self.masks.to(device)
        known = {name: values.to(device) for name, values in self.known.items()}
        return Images(self.pixels.to(device), self.labels.to(device), masks, known)


@dataclass(frozen=True)
class Split:
    """Which of the training images are trained on, and which validate: sorted int64 indices."""

    training: Tensor
    validation: Tensor


@dataclass(frozen=True)
class Dataset:
    """Images to learn from and to test on, and for each seed the split of the former."""

    title: str
    classes: tuple[str, ...]
    explained: tuple[str, ...]  # the classes whose Grad-CAM is drawn
    train: Images
    test: Images
    splits: Mapping[int, Split] = field(default_factory=dict)
    # CIFAR-10-C's arrays if they lie in the data folder, uint8 [5, N, 32, 32, 3] by corruption
    official: Mapping[str, np.ndarray] = field(default_factory=dict)
    # Images of other kinds, uint8 [N, 32, 32, 3], by what they are
    foreign: Mapping[str, Tensor] = field(default_factory=dict)
    new_test: Images | None = None  # a second test set, to which no one has tuned anything
    people: Tensor | None = None  # shares of people who chose each class, float64 [N, classes]
    # How many test images are corrupted and attacked, where no one asks for more or fewer
    usually_corrupted: int = 1000
    usually_attacked: int = 400


def to_input(pixels: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] to what a network takes: float32 [B, 3, H, W] in [0, 1], channels last.

    What has floating point already (images under attack) stays as it is.
    """
    if pixels.is_floating_point():
        return pixels
    return pixels.permute(0, 3, 1, 2).to(torch.float32).div_(255)


def first_of_class(labels: Tensor, classes: Sequence[int], count: int) -> Tensor:
    """Indices of the first `count` images of each class, class by class."""
    return torch.cat([torch.nonzero(labels == label)[:count, 0] for label in classes])
