"""The data sets that a study can be made of: CIFAR-10, and drawn shapes.

In come folders, counts and seeds; out comes a `Dataset`, with images of other kinds and whatever
lies beside it in its folder.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lab.data import benchmarks, cifar10, cifar10h, download, shapes, synthetic
from lab.data.images import Dataset, Images


def load_cifar10(
    data_dir: Path,
    settings: download.Settings,
    foreign_count: int,
    shapes_seed: int,
    extra: Collection[str],
) -> Dataset:
    """CIFAR-10 (Krizhevsky, 2009), with all that lies beside it in its folder.

    For stress tests `foreign_count` images of each other kind, and CIFAR-10-C's corruptions unless
    all there are have names in `extra`; with 0 there is neither.
    """
    train, test = cifar10.load(data_dir, settings)
    classes = tuple(train.classes)
    test_labels = torch.tensor(test.targets)
    folder = cifar10.home_of(data_dir)
    official: dict[str, np.ndarray] = {}
    foreign: dict[str, Tensor] = {}
    if foreign_count > 0:
        official = benchmarks.find_official(folder, test_labels, extra)
        foreign["drawn shapes"] = shapes.draw(foreign_count, shapes_seed).pixels
        foreign.update(benchmarks.find_foreign(folder, foreign_count))
    return Dataset(
        title="CIFAR-10",
        classes=classes,
        explained=("cat", "dog", "bird", "airplane", "ship"),
        usually_corrupted=1000,
        usually_attacked=400,
        train=Images(torch.from_numpy(train.data), torch.tensor(train.targets)),
        test=Images(torch.from_numpy(test.data), test_labels),
        official=official,
        foreign=foreign,
        new_test=benchmarks.find_new_test(folder, len(classes)),
        people=cifar10h.find(folder, test_labels),
    )


def draw_shapes(
    train: int, test: int, seed: int, difficulty: float, foreign_count: int, data_dir: Path
) -> Dataset:
    """So many drawn images; of other kinds noise, and what lies in the data folder."""
    classes = tuple(shapes.SHAPES)
    foreign = {}
    if foreign_count > 0:
        foreign["noise"] = synthetic.noise(foreign_count, seed)
        foreign.update(benchmarks.find_foreign(cifar10.home_of(data_dir), foreign_count))
    return Dataset(
        title="Shapes",
        classes=classes,
        explained=classes[:5],
        usually_corrupted=250,
        usually_attacked=60,  # they withstand attacks for longer, which takes more time
        train=shapes.draw(train, 2 * seed, difficulty),
        test=shapes.draw(test, 2 * seed + 1, difficulty),
        foreign=foreign,
    )


def other_kinds(data: Dataset, count: int, seed: int) -> dict[str, Tensor]:
    """Images that are like none of the data set's, uint8 [N, 32, 32, 3], by kind."""
    kinds = synthetic.all_kinds(count, seed)
    if data.test.masks is None:  # it is not drawn shapes itself
        kinds["drawn shapes"] = shapes.draw(count, seed).pixels
    return kinds
