"""Images of other kinds than any dataset's, that can be made anywhere.

In come a count and a seed; out come noise, smooth noise and single colours by name, uint8
[N, 32, 32, 3] each.
"""

from __future__ import annotations

import numpy as np
import scipy
import torch
from torch import Tensor

from lab.data.images import IMAGE_SIZE


def noise(count: int, seed: int) -> Tensor:
    """`count` images without any object: uint8 [N, 32, 32, 3]."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 256, (count, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8))


def smooth_noise(count: int, seed: int) -> Tensor:
    """Soft blots of all colours, each image from its darkest to its brightest value: as `noise`."""
    rng = np.random.default_rng(seed)
    rough = rng.normal(0, 1, (count, IMAGE_SIZE, IMAGE_SIZE, 3))
    smooth = scipy.ndimage.gaussian_filter(rough, (0, 4, 4, 0))
    low = smooth.min((1, 2), keepdims=True)
    high = smooth.max((1, 2), keepdims=True)
    return torch.from_numpy((255 * (smooth - low) / (high - low)).round().astype(np.uint8))


def single_colours(count: int, seed: int) -> Tensor:
    """One colour all over each image: as `noise`."""
    rng = np.random.default_rng(seed)
    colours = rng.integers(0, 256, (count, 1, 1, 3), np.uint8)
    return torch.from_numpy(np.repeat(np.repeat(colours, IMAGE_SIZE, 1), IMAGE_SIZE, 2))


def all_kinds(count: int, seed: int) -> dict[str, Tensor]:
    """`count` images of each kind, by its name."""
    return {
        "noise": noise(count, seed),
        "smooth noise": smooth_noise(count, seed),
        "single colours": single_colours(count, seed),
    }
