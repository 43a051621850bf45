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
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
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
        in_files = {
            "pdf.fonttype": 42,  # embedded
            "image.composite_image": False,  # a PDF's pictures side by side are not made one
        }
        sns.set_theme(
            "paper", "whitegrid", font="DejaVu Sans", font_scale=eight_points, rc=in_files
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
    """Lines of blocks side by side; at the end of full lines Grad-CAM's colours if `heat_scale`.

    All is placed by inches from the top left corner, so that nothing has to be laid out, and
    neighbours are level.
    """
    abreast = max(len(line) for line in lines)
    columns = 3  # at least
    for line in lines:
        columns = max(columns, *(block.columns() for block in line))
    scale_width = 0.7 if heat_scale else 0.0
    pitch = min(1.4, (PAGE - scale_width) / columns / abreast)  # from one picture to the next
    block_width = pitch * columns
    width = block_width * abreast + scale_width
    places = [place_rows(line, pitch) for line in lines]
    height = sum(of_line.height for of_line in places)
    figure = Figure(figsize=(width, height))
    sheet = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    sheet.set_axis_off()
    line_top = 0.0
    for line, of_line in zip(lines, places, strict=True):
        for k, block in enumerate(line):
            draw_block(sheet, block, k * block_width, line_top, block_width, pitch, of_line)
        if heat_scale and len(line) == abreast and of_line.tops:
            top = line_top + of_line.tops[0]
            bottom = line_top + of_line.tops[-1] + pitch - GAP
            draw_heat_scale(figure, width - scale_width + 0.1, top, bottom)
        line_top += of_line.height
    return figure


GAP = 0.07  # inches between pictures
CAPTION_LINE = 0.11  # inches


@dataclass(frozen=True)
class RowPlaces:
    """Where the rows of blocks that stand side by side lie, in inches below the line's top."""

    tops: tuple[float, ...]  # of each row's pictures
    height: float  # of the line


def place_rows(line: Sequence[PictureBlock], pitch: float) -> RowPlaces:
    """Room for headings, if there are any, and above each row for its longest caption."""
    bottom = 0.28 if any(block.heading for block in line) else 0.0
    tops = []
    for k in range(max(len(block.rows) for block in line)):
        breaks = []
        for block in line:
            if k < len(block.rows):
                breaks += [picture.caption.count("\n") for picture in block.rows[k]]
        top = bottom + 0.09 + CAPTION_LINE * (1 + max(breaks))
        tops.append(top)
        bottom = top + pitch - GAP
    if not tops:
        bottom += 0.2  # for the second line of a heading
    return RowPlaces(tuple(tops), bottom + 0.1)


def draw_block(
    sheet: Axes,
    block: PictureBlock,
    left: float,
    line_top: float,
    width: float,
    pitch: float,
    places: RowPlaces,
) -> None:
    """Draw a block on axes in inches, its pictures from its left on."""
    heading = block.heading if block.rows else f"{block.heading}:\nno such image"
    middle = left + width / 2
    sheet.text(middle, line_top + 0.06, heading, ha="center", va="top", fontsize=8, weight="bold")
    size = max(6, min(7, 8 * pitch))
    for row, row_top in zip(block.rows, places.tops, strict=False):
        top = line_top + row_top
        for k, picture in enumerate(row):
            start = left + k * pitch + GAP / 2
            end = start + pitch - GAP
            extent = (start, end, top + pitch - GAP, top)
            sheet.imshow(picture.pixels, interpolation="nearest", extent=extent, aspect="auto")
            sheet.text(
                (start + end) / 2,
                top - 0.03,
                picture.caption,
                color=picture.colour,
                fontsize=size,
                ha="center",
                va="bottom",
            )


def draw_heat_scale(figure: Figure, left: float, top: float, bottom: float) -> None:
    """Grad-CAM's colours, in inches from the figure's top left corner."""
    width, height = figure.get_size_inches()
    place = (left / width, 1 - bottom / height, 0.12 / width, (bottom - top) / height)
    scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, 1), HEAT_COLOURS)
    bar = figure.colorbar(scale, cax=figure.add_axes(place), ticks=(0, 0.5, 1))
    bar.set_label("Grad-CAM, per image", fontsize=7)  # may be longer than the bar
