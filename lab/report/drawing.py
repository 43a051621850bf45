"""How figures look, and pictures in rows with captions.

In come arrays of pixels and what stands above them; out come matplotlib's figures, and the bytes of
their files, which a rerun makes again.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import cv2
import matplotlib
import numpy as np
import seaborn as sns
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure, SubFigure
from PIL import Image

PAGE = 6.3  # inches: figures are as wide as the paper's text, so that 8 points are 8 in print
HEAT_COLOURS = matplotlib.colormaps["turbo"]
PLAIN_COLOUR = "black"


@contextmanager
def style() -> Iterator[None]:
    """Draw in this program's style, and leave the settings of whoever called it as they were."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        eight_points = 0.83
        embed_fonts = {"pdf.fonttype": 42}
        sns.set_theme(
            "paper", "whitegrid", font="DejaVu Sans", font_scale=eight_points, rc=embed_fonts
        )
        yield


def new_figure(height: float, width: float = PAGE) -> Figure:
    """An empty figure, in inches."""
    return Figure(figsize=(width, height), layout="constrained")


def rendered(figure: Figure, file_type: str, without: dict[str, None]) -> bytes:
    """The figure's file: PNG, PDF or SVG.

    `without` a date or version, so that a rerun gives the same bytes. Not by `savefig`, which lays
    out and draws twice.
    """
    buffer = io.BytesIO()
    if file_type == "png":
        figure.set_dpi(200)
        FigureCanvasAgg(figure).print_png(buffer, metadata=without)
    elif file_type == "svg":
        with matplotlib.rc_context({"svg.hashsalt": "the same names in each run"}):
            FigureCanvasSVG(figure).print_svg(buffer, metadata=without)
    else:
        FigureCanvasPdf(figure).print_pdf(buffer, metadata=without)
    return buffer.getvalue()


def in_file(picture: Image.Image, kind: str, **how: Any) -> bytes:
    """A picture's file, PNG or JPEG."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, **how)
    return buffer.getvalue()


@dataclass(frozen=True)
class Picture:
    """An image with what stands above it."""

    pixels: np.ndarray  # uint8 [H, W, 3] RGB
    caption: str
    colour: str = PLAIN_COLOUR


@dataclass(frozen=True)
class PictureBlock:
    """Rows of pictures under a heading, which may be empty."""

    heading: str
    rows: Sequence[Sequence[Picture]]

    def columns(self) -> int:
        return max((len(row) for row in self.rows), default=0)


def overlay(
    image: np.ndarray, heatmap: np.ndarray, size: int = 256, strength: float = 0.45
) -> np.ndarray:
    """An image uint8 [32, 32, 3] enlarged, its heatmap blended in: uint8 [size, size, 3] RGB."""
    large = cv2.resize(image, (size, size), interpolation=cv2.INTER_NEAREST)
    heat = cv2.resize(heatmap, (size, size), interpolation=cv2.INTER_LINEAR)
    colours = HEAT_COLOURS(heat)[..., :3] * 255
    return ((1 - strength) * large + strength * colours).round().astype(np.uint8)


def plot_pictures(lines: Sequence[Sequence[PictureBlock]], heat_scale: bool) -> Figure:
    """Lines of blocks side by side; at the end of full lines Grad-CAM's colours if `heat_scale`."""
    abreast = max(len(line) for line in lines)
    columns = 3  # at least
    for line in lines:
        columns = max(columns, *(block.columns() for block in line))
    bar_width = 0.6 if heat_scale else 0.0
    side = min(1.4, (PAGE - bar_width) / columns / abreast)
    widths = [side * columns] * abreast
    widths[-1] += bar_width
    heights = [line_height(line, side) for line in lines]
    figure = new_figure(sum(heights), sum(widths))
    parts = figure.subfigures(
        len(lines), abreast, height_ratios=heights, width_ratios=widths, squeeze=False
    )
    for line_parts, line in zip(parts, lines, strict=True):
        drawn = []
        for part, block in zip(line_parts, line, strict=False):
            drawn.append(plot_block(part, block, columns, side))
        if heat_scale and len(line) == abreast and any(block.rows for block in line):
            scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, 1), HEAT_COLOURS)
            line_parts[-1].colorbar(scale, ax=drawn[-1], label="Grad-CAM, per image", shrink=0.9)
    return figure


def line_height(line: Sequence[PictureBlock], side: float) -> float:
    """Inches that blocks side by side need, with captions and headings."""
    rows = max(len(block.rows) for block in line)
    heading = 0.25 if any(block.heading for block in line) else 0
    breaks = []
    for block in line:
        for row in block.rows:
            breaks += [picture.caption.count("\n") for picture in row]
    lines_of_text = 1 + max(breaks, default=1)
    return (side + 0.11 + 0.135 * lines_of_text) * max(0.2, rows) + heading


def plot_block(part: SubFigure, block: PictureBlock, columns: int, side: float) -> np.ndarray:
    """Draw a block, and return its axes."""
    heading = block.heading if block.rows else f"{block.heading}:\nno such image"
    part.suptitle(heading, fontsize=8, weight="bold")
    panels = part.subplots(max(1, len(block.rows)), columns, squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    for axes_row, row in zip(panels, block.rows, strict=False):
        for axes, picture in zip(axes_row, row, strict=False):
            axes.imshow(picture.pixels, interpolation="nearest")
            axes.set_title(picture.caption, color=picture.colour, fontsize=max(6, min(7, 8 * side)))
    return panels
