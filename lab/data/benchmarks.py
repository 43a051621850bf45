"""Other people's images beside the data set: CIFAR-10-C, CIFAR-10.1, and foreign kinds.

In comes the folder where the data lies. Out come arrays by name; what is absent is left out, and
what is there and wrong is a `UserError` before any training.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import ImageOps
from torch import Tensor

from lab.data.images import IMAGE_SIZE, Images
from lab.machine.files import read_array
from lab.machine.options import UserError

CURE_OFFICIAL = "delete it, or fetch CIFAR-10-C again"


def find_official(
    folder: Path, labels: Tensor, extra: Collection[str]
) -> dict[str, np.ndarray]:
    """The arrays in `folder`/CIFAR-10-C, perhaps unpacked one level too deep, by corruption.

    They are uint8 [5, N, 32, 32, 3] by severity, of the test images with `labels` [N], and stay on
    the disk until they are used. There are none where all are `extra` ones, which no mean is over.
    """
    place = folder / "CIFAR-10-C"
    arrays = {}
    for path in sorted(place.rglob("[!.]*.npy")):  # macOS leaves notes that begin with a dot
        if path.stem == "labels":
            refuse_other_labels(path, labels)
        else:
            arrays[path.stem] = read_official(path, len(labels))
    if arrays.keys() - set(extra):
        print(f"Corruptions are the {len(arrays)} arrays of CIFAR-10-C in {place}")
        return arrays
    packed = folder / "CIFAR-10-C.tar"
    if packed.exists() and not place.exists():
        print(f"{packed} is not unpacked (tar -xf does that): corruptions are made here")
    if place.exists():
        print(
            f"{place} holds no arrays (*.npy) of CIFAR-10-C, or its extra ones alone: corruptions "
            "are made here"
        )
    return {}


def read_official(path: Path, count: int) -> np.ndarray:
    """A file of CIFAR-10-C, which has all test images at severity 1, then at 2, and so on."""
    array = read_array(path, CURE_OFFICIAL)
    shape = (5 * count, IMAGE_SIZE, IMAGE_SIZE, 3)
    if array.shape != shape or array.dtype != np.uint8:
        kind = f"{array.dtype} {list(array.shape)}, not uint8 {list(shape)}"
        raise UserError(f"{path} holds {kind}: {CURE_OFFICIAL}")
    return array.reshape(5, count, *shape[1:])


def refuse_other_labels(path: Path, labels: Tensor) -> None:
    """UserError where CIFAR-10-C's own labels are not those of the test images."""
    if not np.array_equal(read_array(path, CURE_OFFICIAL), np.tile(labels.numpy(), 5)):
        raise UserError(f"{path} holds other labels than CIFAR-10's: {CURE_OFFICIAL}")


CURE_NEW_TEST = "delete both of its files, or fetch CIFAR-10.1 again"


def find_new_test(folder: Path, classes: int) -> Images | None:
    """CIFAR-10.1 (Recht et al., ICML 2019), version 6: 2,000 new images of CIFAR-10's classes.

    Its two arrays lie in `folder`, or in a folder of its name there; None where they don't.
    """
    for place in (folder, folder / "CIFAR-10.1"):
        pixels_path = place / "cifar10.1_v6_data.npy"
        labels_path = place / "cifar10.1_v6_labels.npy"
        there = [path for path in (pixels_path, labels_path) if path.exists()]
        if len(there) == 1:
            print(f"{there[0]} is one of CIFAR-10.1's two files: without the other it is not used")
        elif there:
            return read_new_test(pixels_path, labels_path, classes)
    return None


def read_new_test(pixels_path: Path, labels_path: Path, classes: int) -> Images:
    """The two arrays; UserError where they are not images and their labels."""
    pixels = read_array(pixels_path, CURE_NEW_TEST)
    labels = read_array(labels_path, CURE_NEW_TEST)
    if pixels.dtype != np.uint8 or pixels.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE, 3):
        kind = f"{pixels.dtype} {list(pixels.shape)}, not uint8 [N, {IMAGE_SIZE}, {IMAGE_SIZE}, 3]"
        raise UserError(f"{pixels_path} holds {kind}: {CURE_NEW_TEST}")
    if labels.dtype.kind not in "iu" or labels.shape != pixels.shape[:1] or len(labels) == 0:
        kind = f"{labels.dtype} {list(labels.shape)}, not whole numbers [{len(pixels)}]"
        raise UserError(f"{labels_path} holds {kind}: {CURE_NEW_TEST}")
    if labels.min() < 0 or labels.max() >= classes:
        problem = f"labels from {labels.min()} to {labels.max()}, of {classes} classes"
        raise UserError(f"{labels_path} holds {problem}: {CURE_NEW_TEST}")
    return Images(torch.tensor(pixels), torch.tensor(labels.astype(np.int64)))


def find_foreign(folder: Path, count: int) -> dict[str, Tensor]:
    """At most `count` images uint8 [N, 32, 32, 3] of each other data set in `folder`, by name."""
    pixels = {}
    for name, source in FOREIGN.items():
        there = [folder / part for part in source.parts if (folder / part).exists()]
        if not there:
            continue  # torchvision, which would say so, takes seconds to import
        try:
            pixels[name] = torch.from_numpy(source.read(folder)[:count])
        except RuntimeError:  # not whole
            for part in there:
                print(f"{part} is there, but {name} is not unpacked or not whole")
    return pixels


def read_svhn(folder: Path) -> np.ndarray:
    from torchvision.datasets import SVHN

    return SVHN(folder, split="test").data.transpose(0, 2, 3, 1)


def read_cifar100(folder: Path) -> np.ndarray:
    from torchvision.datasets import CIFAR100

    return CIFAR100(folder, train=False).data


def read_textures(folder: Path) -> np.ndarray:
    """The middle of each picture, made small."""
    from torchvision.datasets import DTD

    made = []
    for picture, _ in DTD(folder, split="test"):
        small = ImageOps.fit(picture.convert("RGB"), (IMAGE_SIZE, IMAGE_SIZE))
        made.append(np.asarray(small))
    return np.stack(made)


@dataclass(frozen=True)
class ForeignImages:
    """Test images of another data set, in the files that torchvision downloads."""

    read: Callable[[Path], np.ndarray]  # from the folder: uint8 [N, 32, 32, 3]
    parts: tuple[str, ...]  # what may lie there of it, packed or unpacked


FOREIGN = {
    "SVHN": ForeignImages(read_svhn, ("test_32x32.mat",)),
    "CIFAR-100": ForeignImages(read_cifar100, ("cifar-100-python.tar.gz", "cifar-100-python")),
    "Textures": ForeignImages(read_textures, ("dtd-r1.0.1.tar.gz", "dtd")),
}
