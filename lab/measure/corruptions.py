"""Images under corruption, as in CIFAR-10-C (Hendrycks & Dietterich, ICLR 2019).

In come images uint8 [N, 32, 32, 3], a corruption's name, a severity and a seed; out come the same
images, corrupted. Every corruption but frost, which needs photographs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import scipy
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lab.data.images import IMAGE_SIZE, Dataset
from lab.measure.models import fingerprint

# Each corruption takes images float64 [N, 32, 32, 3] in [0, 1] and its strength, and draws what is
# random from `rng`. Values beyond [0, 1] are cut off by `corrupt`.


def gaussian_noise(x: np.ndarray, deviation: float, rng: np.random.Generator) -> np.ndarray:
    """Independent noise in every value."""
    return x + rng.normal(0, deviation, x.shape)


def shot_noise(x: np.ndarray, photons: float, rng: np.random.Generator) -> np.ndarray:
    """The fewer photons, the more their number varies: Poisson noise."""
    return rng.poisson(x * photons) / photons


def impulse_noise(x: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Half of the values hit become 0, the others 1."""
    drawn = rng.random(x.shape)
    return np.where(drawn < share, drawn < share / 2, x)


def speckle_noise(x: np.ndarray, deviation: float, rng: np.random.Generator) -> np.ndarray:
    """Independent noise in every value, in proportion to it."""
    return x + x * rng.normal(0, deviation, x.shape)


def gaussian_blur(x: np.ndarray, deviation: float, rng: np.random.Generator) -> np.ndarray:
    """A Gaussian of some deviation in pixels; the edge's pixels are repeated beyond it."""
    return scipy.ndimage.gaussian_filter(x, (0, deviation, deviation, 0), mode="nearest")


def defocus_blur(
    x: np.ndarray, strength: tuple[float, float], rng: np.random.Generator
) -> np.ndarray:
    """A disk of some radius, its edge smoothed."""
    radius, smoothing = strength
    squares = np.arange(-2, 3) ** 2
    disk = (np.add.outer(squares, squares) <= radius**2).astype(float)
    kernel = scipy.ndimage.gaussian_filter(disk / disk.sum(), smoothing, radius=1, mode="constant")
    return scipy.ndimage.correlate(x, kernel[None, :, :, None], mode="mirror")


def glass_blur(x: np.ndarray, strength: tuple[float, int], rng: np.random.Generator) -> np.ndarray:
    """Pixels are taken at random from themselves, above or the left, between two slight blurs.

    A quirk of the benchmark's code is copied on purpose. Its loop means to swap two pixels, but
    both names are views of the same array, so that one is copied over the other. It goes from the
    last pixel to the first, and so copies from places that it has not changed yet: all can be
    taken at once. The first two rows and columns are left out, as there.
    """
    deviation, rounds = strength
    x = round_down(gaussian_blur(x, deviation, rng)) / 255
    images = np.arange(len(x))[:, None, None]
    rows, columns = np.indices((IMAGE_SIZE, IMAGE_SIZE))
    inside = (rows >= 2) & (columns >= 2)
    for _ in range(rounds):
        up, left = rng.integers(0, 2, (2, *x.shape[:3])) * inside
        x = x[images, rows - up, columns - left]
    return gaussian_blur(x, deviation, rng)


def motion_blur(x: np.ndarray, strength: tuple[int, float], rng: np.random.Generator) -> np.ndarray:
    """At an angle drawn for each image."""
    radius, deviation = strength
    angles = rng.uniform(-45, 45, len(x))
    return blur_along(x, angles, radius, deviation)


def blur_along(x: np.ndarray, angles: np.ndarray, radius: int, deviation: float) -> np.ndarray:
    """Half a Gaussian trails at an angle in degrees: ImageMagick's motion blur.

    The edge's pixels are repeated beyond it.
    """
    distances = np.arange(2 * radius + 1)
    weights = np.exp(-(distances**2) / (2 * deviation**2 + 1e-12))
    weights = weights[weights > 1e-4] / weights[weights > 1e-4].sum()
    radians = np.radians(angles)[:, None]
    places = np.arange(IMAGE_SIZE)
    images = np.arange(len(x))[:, None, None]
    blurred = np.zeros_like(x)
    for distance, weight in enumerate(weights):
        down = np.ceil(distance * np.sin(radians) - 0.5).astype(int)
        right = np.ceil(distance * np.cos(radians) - 0.5).astype(int)
        rows = (places + down).clip(0, IMAGE_SIZE - 1)
        columns = (places + right).clip(0, IMAGE_SIZE - 1)
        blurred += weight * x[images, rows[:, :, None], columns[:, None, :]]
    return blurred


def zoom_blur(x: np.ndarray, most: float, rng: np.random.Generator) -> np.ndarray:
    """The mean of the image and of its enlargements by factors from 1 to `most`."""
    factors = np.arange(1, most, 0.01)
    total = x.copy()
    for factor in factors:
        total += zoom_in(x, factor)
    return total / (len(factors) + 1)


def zoom_in(x: np.ndarray, factor: float) -> np.ndarray:
    """The middle of images [N, 32, 32, C], made as large as the whole."""
    planes = torch.from_numpy(x).permute(0, 3, 1, 2).contiguous()
    size = math.ceil(IMAGE_SIZE / factor)
    top = (IMAGE_SIZE - size) // 2
    inner = planes[:, :, top : top + size, top : top + size]
    side = round(size * factor)
    large = F.interpolate(inner, (side, side), mode="bilinear", align_corners=True)
    start = (side - IMAGE_SIZE) // 2
    middle = slice(start, start + IMAGE_SIZE)
    return large[:, :, middle, middle].permute(0, 2, 3, 1).numpy()


@dataclass(frozen=True)
class Snow:
    """How thick the flakes are, how they fall, and how much of the image's colour is kept."""

    mean: float  # of the noise that flakes are made of
    deviation: float
    zoom: float
    least: float  # noise below this is no flake
    radius: int  # of the motion blur
    length: float
    kept: float


def snow(x: np.ndarray, strength: Snow, rng: np.random.Generator) -> np.ndarray:
    """Flakes fall, and once more turned by 180 degrees, on an image that turns pale."""
    noise = rng.normal(strength.mean, strength.deviation, (*x.shape[:3], 1))
    flakes = zoom_in(noise, strength.zoom)
    flakes = np.where(flakes < strength.least, 0, flakes).clip(0, 1)
    angles = rng.uniform(-135, -45, len(x))
    flakes = blur_along(round_down(flakes) / 255, angles, strength.radius, strength.length)
    flakes = round_down(flakes) / 255
    grey = x @ np.array([0.299, 0.587, 0.114])
    pale = np.maximum(x, 1.5 * grey[..., None] + 0.5)
    mixed = strength.kept * x + (1 - strength.kept) * pale
    return mixed + flakes + np.rot90(flakes, 2, axes=(1, 2))


@dataclass(frozen=True)
class Spatter:
    """How much liquid there is, of what kind, and how far it hides the image."""

    mean: float  # of the noise that drops are made of
    deviation: float
    smoothing: float  # pixels
    least: float  # noise below this is no drop
    opacity: float  # of water; of mud the smoothing of its edges in pixels
    is_mud: bool = False


def spatter(x: np.ndarray, strength: Spatter, rng: np.random.Generator) -> np.ndarray:
    """Drops of water, lit from one side, or of mud."""
    noise = rng.normal(strength.mean, strength.deviation, x.shape[:3])
    liquid = scipy.ndimage.gaussian_filter(
        noise, (0, strength.smoothing, strength.smoothing), mode="nearest"
    )
    liquid[liquid < strength.least] = 0
    if strength.is_mud:
        mud = np.array([63, 42, 20]) / 255
        drops = (liquid > strength.least).astype(float)
        cover = scipy.ndimage.gaussian_filter(
            drops, (0, strength.opacity, strength.opacity), mode="nearest"
        )
        cover[cover < 0.8] = 0
        return x * (1 - cover[..., None]) + mud * cover[..., None]
    water = np.array([175, 238, 238]) / 255
    # Liquid above 1 begins again at 0, as the benchmark's cast to 8 bits makes it.
    in_bytes = (liquid * 255).astype(int) % 256
    light = np.stack([light_on_drops(one) for one in in_bytes.astype(np.uint8)])
    return x + strength.opacity * light[..., None] * water


def light_on_drops(liquid: np.ndarray) -> np.ndarray:
    """The light that drops uint8 [32, 32] throw back, by their edges' relief: at most 1."""
    distance = cv2.distanceTransform(255 - cv2.Canny(liquid, 50, 150), cv2.DIST_L2, 5)
    heights = cv2.equalizeHist(cv2.blur(distance.clip(max=20), (3, 3)).astype(np.uint8))
    lit_from_one_side = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]])
    relief = cv2.blur(cv2.filter2D(heights, cv2.CV_8U, lit_from_one_side), (3, 3))
    light = liquid * relief.astype(float)
    return light / max(light.max(), 1e-9)


def fog(x: np.ndarray, strength: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    """Clouds are added, one sky an image, and the sum is scaled back to the image's brightest."""
    density, decay = strength
    sky = draw_clouds(len(x), decay, rng)
    brightest = x.max((1, 2, 3), keepdims=True)
    return (x + density * sky[..., None]) * brightest / (brightest + density)


def draw_clouds(count: int, decay: float, rng: np.random.Generator) -> np.ndarray:
    """Clouds float64 [count, 32, 32] in [0, 1], by the diamond-square algorithm.

    Each round halves the grid's step: the middle of four corners becomes their mean plus noise,
    then the middle of each edge. The edges' means take the corner pairs as the benchmark does.
    """
    sky = np.zeros((count, IMAGE_SIZE, IMAGE_SIZE))
    step = IMAGE_SIZE
    wibble = 100.0
    while step > 1:
        half = step // 2
        corners = sky[:, ::step, ::step]
        centres = sky[:, half::step, half::step]
        down = corners + np.roll(corners, -1, 1)
        across = corners + np.roll(corners, -1, 2)
        noise = wibble * rng.uniform(-wibble, wibble, (3, *centres.shape))
        centres[:] = (down + np.roll(down, -1, 2)) / 4 + noise[0]
        sky[:, ::step, half::step] = (centres + np.roll(centres, 1, 1) + across) / 4 + noise[1]
        sky[:, half::step, ::step] = (centres + np.roll(centres, 1, 2) + down) / 4 + noise[2]
        step = half
        wibble /= decay
    sky -= sky.min((1, 2), keepdims=True)
    return sky / sky.max((1, 2), keepdims=True)


def brightness(x: np.ndarray, shift: float, rng: np.random.Generator) -> np.ndarray:
    """The value of hue, saturation and value, shifted."""
    return change_hsv(x, channel=2, factor=1, shift=shift)


def saturate(x: np.ndarray, strength: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    """The saturation of hue, saturation and value, scaled and shifted."""
    factor, shift = strength
    return change_hsv(x, channel=1, factor=factor, shift=shift)


def change_hsv(x: np.ndarray, channel: int, factor: float, shift: float) -> np.ndarray:
    """One channel of hue, saturation and value, scaled and shifted."""
    from matplotlib.colors import hsv_to_rgb, rgb_to_hsv

    hsv = rgb_to_hsv(x)
    hsv[..., channel] = (hsv[..., channel] * factor + shift).clip(0, 1)
    return hsv_to_rgb(hsv)


def contrast(x: np.ndarray, factor: float, rng: np.random.Generator) -> np.ndarray:
    """The distance from the image's mean colour, scaled."""
    mean = x.mean((1, 2), keepdims=True)
    return (x - mean) * factor + mean


def elastic_transform(
    x: np.ndarray, strength: tuple[float, float, float], rng: np.random.Generator
) -> np.ndarray:
    """A random affine map of each image, then a smooth random displacement.

    Strengths are shares of the side: how far pixels move, how smoothly, how far corners move.
    """
    amplitude, smoothness, shift = IMAGE_SIZE * np.array(strength)
    corners = np.array([[26.0, 26], [26, 6], [6, 6]])  # of a square around the middle
    shifts = rng.uniform(-shift, shift, (len(x), 3, 2)).astype(np.float32)
    moved = np.pad(corners + shifts, ((0, 0), (0, 0), (0, 1)), constant_values=1)
    affine = np.linalg.solve(moved, np.broadcast_to(corners, (len(x), 3, 2)))  # new to old places
    mapped = map_in_fixed_point(affine)
    noise = rng.uniform(-1, 1, (len(x), IMAGE_SIZE, IMAGE_SIZE, 2))
    wave = scipy.ndimage.gaussian_filter(noise, (0, smoothness, smoothness, 0), truncate=3)
    places = np.stack(np.meshgrid(np.arange(IMAGE_SIZE), np.arange(IMAGE_SIZE)), axis=-1)
    waved = places + amplitude * wave
    # The map mirrors beyond the centres of the outermost pixels and the wave beyond their edges,
    # as the benchmark's two libraries do; grid_sample's places run from -1 to 1.
    centres = torch.from_numpy(mapped * 2 / (IMAGE_SIZE - 1) - 1)
    edges = torch.from_numpy((2 * waved + 1) / IMAGE_SIZE - 1)
    planes = torch.from_numpy(x).permute(0, 3, 1, 2)
    planes = F.grid_sample(planes, centres, padding_mode="reflection", align_corners=True)
    planes = F.grid_sample(planes, edges, padding_mode="reflection", align_corners=False)
    return planes.permute(0, 2, 3, 1).numpy()


def map_in_fixed_point(affine: np.ndarray) -> np.ndarray:
    """Where each pixel comes from, by affine maps [N, 3, 2] of (column, row, 1): [N, 32, 32, 2].

    In whole 32nds of a pixel, rounded as OpenCV's warpAffine did before its version 5.
    """
    columns = np.arange(IMAGE_SIZE)[None, None, :, None]
    rows = np.arange(IMAGE_SIZE)[None, :, None, None]
    of_column, of_row, offset = np.moveaxis(affine, 1, 0)[:, :, None, None, :]
    along = np.rint(of_column * columns * 1024)
    down = np.rint((of_row * rows + offset) * 1024)
    return np.floor((along + down + 16) / 32) / 32


def pixelate(x: np.ndarray, scale: float, rng: np.random.Generator) -> np.ndarray:
    """Made small and large again."""
    side = int(IMAGE_SIZE * scale)
    box = Image.Resampling.BOX
    made = []
    for image in np.rint(x * 255).astype(np.uint8):
        small = Image.fromarray(image).resize((side, side), box)
        made.append(np.asarray(small.resize((IMAGE_SIZE, IMAGE_SIZE), box)))
    return np.stack(made) / 255


def jpeg_compression(x: np.ndarray, quality: int, rng: np.random.Generator) -> np.ndarray:
    """Quality 0 stands for no compression."""
    if quality == 0:
        return x
    decoded = []
    for image in np.rint(x * 255).astype(np.uint8)[..., ::-1]:  # OpenCV's BGR
        _, file = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])
        decoded.append(np.asarray(cv2.imdecode(file, cv2.IMREAD_COLOR)))
    return np.stack(decoded)[..., ::-1] / 255


@dataclass(frozen=True)
class Corruption:
    """A corruption by name, and its strength at severities 0 (none at all) to 5."""

    name: str
    apply: Callable[[np.ndarray, Any, np.random.Generator], np.ndarray]
    strengths: tuple
    is_extra: bool = False  # not one of the fifteen that the benchmark's mean is over


# Of CIFAR-10-C (Hendrycks & Dietterich, ICLR 2019), with the constants of its make_cifar_c.py: all
# but frost, which needs photographs. They may stand in any order: what is random is drawn from a
# corruption's name.
ALL = [
    Corruption("gaussian_noise", gaussian_noise, (0, 0.04, 0.06, 0.08, 0.09, 0.1)),
    Corruption("shot_noise", shot_noise, (1e16, 500, 250, 100, 75, 50)),
    Corruption("impulse_noise", impulse_noise, (0, 0.01, 0.02, 0.03, 0.05, 0.07)),
    Corruption(
        "defocus_blur",
        defocus_blur,
        ((0, 0), (0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    ),
    Corruption(
        "glass_blur", glass_blur, ((0, 0), (0.05, 1), (0.25, 1), (0.4, 1), (0.25, 2), (0.4, 2))
    ),
    Corruption("motion_blur", motion_blur, ((6, 0), (6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))),
    Corruption("zoom_blur", zoom_blur, (1, 1.06, 1.11, 1.16, 1.21, 1.26)),
    Corruption(
        "snow",
        snow,
        (
            Snow(0, 0, 1, 0, radius=8, length=3, kept=1),
            Snow(0.1, 0.2, 1, 0.6, radius=8, length=3, kept=0.95),
            Snow(0.1, 0.2, 1, 0.5, radius=10, length=4, kept=0.9),
            Snow(0.15, 0.3, 1.75, 0.55, radius=10, length=4, kept=0.9),
            Snow(0.25, 0.3, 2.25, 0.6, radius=12, length=6, kept=0.85),
            Snow(0.3, 0.3, 1.25, 0.65, radius=14, length=12, kept=0.8),
        ),
    ),
    Corruption("fog", fog, ((0, 3), (0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))),
    Corruption("brightness", brightness, (0, 0.05, 0.1, 0.15, 0.2, 0.3)),
    Corruption("contrast", contrast, (1, 0.75, 0.5, 0.4, 0.3, 0.15)),
    Corruption(
        "elastic_transform",
        elastic_transform,
        (
            (0, 0, 0),
            (0, 0, 0.08),
            (0.05, 0.2, 0.07),
            (0.08, 0.06, 0.06),
            (0.1, 0.04, 0.05),
            (0.1, 0.03, 0.03),
        ),
    ),
    Corruption("pixelate", pixelate, (1, 0.95, 0.9, 0.85, 0.75, 0.65)),
    Corruption("jpeg_compression", jpeg_compression, (0, 80, 65, 58, 50, 40)),
    Corruption("speckle_noise", speckle_noise, (0, 0.06, 0.1, 0.12, 0.16, 0.2), is_extra=True),
    Corruption("gaussian_blur", gaussian_blur, (0, 0.4, 0.6, 0.7, 0.8, 1), is_extra=True),
    Corruption(
        "spatter",
        spatter,
        (
            Spatter(0, 0, 1, 1, opacity=0),
            Spatter(0.62, 0.1, 0.7, 0.7, opacity=0.5),
            Spatter(0.65, 0.1, 0.8, 0.7, opacity=0.5),
            Spatter(0.65, 0.3, 1, 0.69, opacity=0.5),
            Spatter(0.65, 0.1, 0.7, 0.69, opacity=0.6, is_mud=True),
            Spatter(0.65, 0.1, 0.5, 0.68, opacity=0.6, is_mud=True),
        ),
        is_extra=True,
    ),
    Corruption(
        "saturate",
        saturate,
        ((1, 0), (0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
        is_extra=True,
    ),
]

SEVERITIES = (1, 2, 3, 4, 5)

BENCHMARK_SIZE = 15  # corruptions that its mean is over, frost among them

PUBLISHED_ACCURACY = 73.46  # of RobustBench's standard WRN-28-10 on CIFAR-10-C, in percent

EXTRA = {corruption.name for corruption in ALL if corruption.is_extra}


def corrupt(pixels: Tensor, corruption: Corruption, severity: int, seed: int) -> Tensor:
    """Images uint8 [N, 32, 32, 3] under a corruption, as the same, on the CPU.

    What is random follows from seed, name and severity alone.
    """
    name = int.from_bytes(corruption.name.encode())
    rng = np.random.default_rng([seed, name, severity])
    x = corruption.apply(pixels.numpy() / 255, corruption.strengths[severity], rng)
    return torch.from_numpy(round_down(x))


def round_down(x: np.ndarray) -> np.ndarray:
    """Numbers as uint8, 1 as 255; what lies between two is rounded down, as in the benchmark."""
    return (x.clip(0, 1) * 255).astype(np.uint8)


def names_of(data: Dataset) -> list[str]:
    """The official ones if there are any."""
    return list(data.official) or [corruption.name for corruption in ALL]


def identity(name: str, data: Dataset, index: Tensor) -> str:
    """SHA-256 of what test images `index` under a corruption are made of, but for the seed."""
    made_of = {"clean": data.test.pixels[index]}
    if data.official:
        made_of["corrupted"] = torch.from_numpy(data.official[name][:, index.numpy()])
    return fingerprint(made_of)


def images_under(name: str, data: Dataset, index: Tensor, seed: int) -> Tensor:
    """Test images `index` int64 [N] under the corruption named: uint8 [5, N, 32, 32, 3]."""
    if data.official:
        return torch.from_numpy(data.official[name][:, index.numpy()])
    clean = data.test.pixels[index]
    (corruption,) = [one for one in ALL if one.name == name]
    made = [corrupt(clean, corruption, severity, seed) for severity in SEVERITIES]
    return torch.stack(made)
