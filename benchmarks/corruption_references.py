"""Makes the images that tests hold the corruptions against, by the benchmark authors' own code.

    git clone https://github.com/hendrycks/robustness && git -C robustness checkout 8190fe3
    python -m venv old && old/bin/pip install "numpy<2" "scikit-image==0.22.*" \\
        "opencv-python-headless==4.9.*" scipy pillow wand
    old/bin/python benchmarks/corruption_references.py \\
        robustness/ImageNet-C/create_c/make_cifar_c.py

Their code needs those versions and ImageMagick, and stays where it is. To images uint8 [N, 32, 32,
3] it applies each corruption at each severity; what it draws comes from NumPy's old generator,
whose seed is written beside each image, so that a test can draw the same. Writes
tests/measure/cifar10c_reference.npz: `images`, `seeds` int [5, N], and uint8 [5, N, 32, 32, 3] for
each corruption but two: frost needs photographs, and impulse noise draws from a generator of its
own.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from skimage import data

PLACE = Path(__file__).resolve().parents[1] / "tests" / "measure" / "cifar10c_reference.npz"

NAMES = (
    "gaussian_noise", "shot_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur",
    "snow", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression",
    "speckle_noise", "gaussian_blur", "spatter", "saturate",
)  # fmt: skip

# Names that its libraries have changed since; the calls mean the same.
RENAMED = {
    "scipy.ndimage.interpolation import": "scipy.ndimage import",
    "multichannel=True": "channel_axis=-1",
}


def load_functions(path: Path) -> dict:
    """The corruptions of make_cifar_c.py, without its end, which corrupts all of CIFAR-10."""
    source, end, _ = path.read_text().partition("print('Using CIFAR-10 data')")
    if not end:
        sys.exit(f"{path} is not make_cifar_c.py")
    for old, new in RENAMED.items():
        source = source.replace(old, new)
    needed = [line for line in source.splitlines() if not line.startswith("import torch")]
    functions: dict = {}
    exec("\n".join(needed), functions)
    return functions


def choose_images() -> np.ndarray:
    """Photographs that scikit-image comes with and that belong to no one: uint8 [3, 32, 32, 3]."""
    chosen = []
    for photograph in (data.astronaut(), data.chelsea(), data.coffee()):
        small = Image.fromarray(photograph).resize((32, 32), Image.Resampling.BOX)
        chosen.append(np.asarray(small))
    return np.stack(chosen)


def main() -> None:
    functions = load_functions(Path(sys.argv[1]))
    images = choose_images()
    seeds = 100 * np.arange(1, 6)[:, None] + np.arange(len(images))
    made: dict[str, Any] = {"images": images, "seeds": seeds}
    warnings.simplefilter("ignore")
    for name in NAMES:
        made[name] = np.zeros((5, *images.shape), np.uint8)
        for severity, of_severity in enumerate(seeds, start=1):
            for k, seed in enumerate(of_severity):
                np.random.seed(seed)
                corrupted = functions[name](Image.fromarray(images[k]), severity)
                made[name][severity - 1, k] = np.uint8(corrupted)
    np.savez_compressed(PLACE, **made)


if __name__ == "__main__":
    main()
