"""Drawn shapes: ten classes of labelled images that need no download.

In come a number of images and a seed; out come `Images` with the objects' true masks, and with
what is known of each image (size and contrast of the object, strength of the distractors).
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import torch

from lab.data.images import IMAGE_SIZE, Images


@dataclass(frozen=True)
class Shape:
    """A shape drawn through corners at equal angles.

    `distances` are the corners' distances from the centre, in turn; `hole` is the size of what is
    cut out of the middle. Both are shares of the radius.
    """

    corners: int
    distances: tuple[float, ...] = (1.0,)
    hole: float = 0.0


SHAPES = {
    "disc": Shape(48),
    "ring": Shape(48, hole=0.58),
    "square": Shape(4),
    "frame": Shape(4, hole=0.58),
    "triangle": Shape(3),
    "star": Shape(10, (1, 0.42)),
    "sparkle": Shape(8, (1, 0.35)),
    "propeller": Shape(6, (1, 0.25)),
    "lozenge": Shape(4, (1, 0.35)),
    "gear": Shape(24, (1, 1, 0.7, 0.7), hole=0.4),
}

CANVAS_SIZE = 4 * IMAGE_SIZE  # shapes are drawn large, then made small: so edges are smooth


def draw(count: int, seed: int, difficulty: float = 0.0) -> Images:
    """`count` images of single shapes on textured grounds with distractors, and their masks.

    Classes take turns. Colour, place, size and rotation are random; before clouds and noise, the
    colours of shape and ground differ by at least 80 of 255 in every channel. With `difficulty`, up
    to 1, shapes are smaller, their colours nearer the ground's, and noise is stronger.
    """
    rng = np.random.default_rng(seed)
    shapes = list(SHAPES.values())
    drawn = [draw_one(shapes[i % len(shapes)], rng, difficulty) for i in range(count)]
    return Images(
        pixels=torch.from_numpy(np.stack([one.pixels for one in drawn])),
        labels=torch.arange(count) % len(shapes),
        masks=torch.from_numpy(np.stack([one.mask for one in drawn])),
        known={
            "object size": torch.tensor([one.size for one in drawn]),
            "object contrast": torch.tensor([one.contrast for one in drawn]),
            "distractors": torch.tensor([one.distractors for one in drawn]),
        },
    )


@dataclass(frozen=True)
class DrawnImage:
    """An image of one shape, and what is known of it."""

    pixels: np.ndarray  # uint8 [32, 32, 3]
    mask: np.ndarray  # bool [32, 32]
    size: float  # share of the image that the object covers
    contrast: float  # mean difference of object and ground over the channels, of 1
    distractors: float  # mean change of the image by the bars beside the object, of 1


def draw_one(shape: Shape, rng: np.random.Generator, difficulty: float) -> DrawnImage:
    small = (IMAGE_SIZE, IMAGE_SIZE)
    ground_colour = rng.integers(0, 256, 3)
    clouds = draw_clouds_of_colour(ground_colour, rng)
    canvas = clouds.copy()
    draw_bars(canvas, rng)
    cover = draw_cover(shape, rng, difficulty)
    alpha = (cover / np.float32(255))[..., None]
    colour = ((ground_colour + rng.integers(80, 177, 3)) % 256).astype(np.float32)
    colour -= np.float32(0.46 * difficulty) * (colour - ground_colour)
    bars = np.abs(canvas - clouds) * (1 - alpha)
    canvas = canvas * (1 - alpha) + colour * alpha
    image = cv2.resize(canvas, small, interpolation=cv2.INTER_AREA)
    noise = rng.normal(0, 6 + 19 * difficulty, image.shape)
    return DrawnImage(
        pixels=(image + noise).clip(0, 255).astype(np.uint8),
        mask=cv2.resize(cover, small, interpolation=cv2.INTER_AREA) > 127,
        size=float(alpha.mean()),
        contrast=float(np.abs(colour - ground_colour).mean()) / 255,
        distractors=float(bars.mean()) / 255,
    )


def draw_clouds_of_colour(colour: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Clouds around `colour` [3]: float32 [128, 128, 3]."""
    coarse = (colour + rng.normal(0, 24, (6, 6, 3))).clip(0, 255).astype(np.float32)
    return cv2.resize(coarse, (CANVAS_SIZE, CANVAS_SIZE), interpolation=cv2.INTER_CUBIC)


def draw_bars(canvas: np.ndarray, rng: np.random.Generator) -> None:
    """Four bars of any colour, onto a canvas float32 [128, 128, 3]."""
    starts = rng.integers(0, CANVAS_SIZE, (4, 2))
    towards = rng.integers(0, CANVAS_SIZE, (4, 2))
    for start, toward, width in zip(starts, towards, (2, 3, 5, 7), strict=True):
        end = start + (toward - start) // 3
        bar_colour = rng.integers(0, 256, 3).tolist()
        cv2.line(canvas, start.tolist(), end.tolist(), bar_colour, width, cv2.LINE_AA)


def draw_cover(shape: Shape, rng: np.random.Generator, difficulty: float) -> np.ndarray:
    """Where the shape lies, at a random place, size and turn: uint8 [128, 128], 255 inside."""
    smaller = 0.07 * difficulty
    radius = CANVAS_SIZE * rng.uniform(0.22 - smaller, 0.42 - smaller)
    centre = rng.uniform(radius, CANVAS_SIZE - radius, 2)
    turn = rng.uniform(0, 2 * np.pi)
    angles = turn + np.arange(shape.corners) * 2 * np.pi / shape.corners
    directions = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    outline = radius * directions * np.resize(shape.distances, (shape.corners, 1))
    cover = np.zeros((CANVAS_SIZE, CANVAS_SIZE), np.uint8)
    fill_polygon(cover, outline + centre, 255)
    if shape.hole:
        fill_polygon(cover, shape.hole * outline + centre, 0)
    return cover


def fill_polygon(canvas: np.ndarray, corners: np.ndarray, value: int) -> None:
    """OpenCV takes corners as whole numbers, here of 1/16 pixel."""
    fraction_bits = 4
    whole = np.rint(corners * 2**fraction_bits).astype(np.int32)
    cv2.fillPoly(canvas, [whole], value, cv2.LINE_8, fraction_bits)
