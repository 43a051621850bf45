"""How figures look: headings that stay in their part, heatmaps blended with their picture."""

import io
import itertools
import re

import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image

from lab.report import drawing
from lab.report.drawing import Picture, PictureBlock

HEADING = "SE-Attention: most confident mistakes"


@pytest.mark.parametrize("count", [0, 1, 4])
@pytest.mark.parametrize("networks", [2, 3])
def test_headings_of_pictures_stay_in_their_part(style, count, networks):
    picture = Picture(np.zeros((32, 32, 3), np.uint8), "true class:\nautomobile")
    block = PictureBlock(HEADING, [[picture] * count] * min(2, count))
    lines = [[block, block], [block][: networks - 2], [block, block]]
    figure = drawing.plot_pictures([line for line in lines if line], heat_scale=True)
    figure.draw_without_rendering()
    sheet, *scales = figure.axes
    assert len(scales) == (2 if count > 0 else 0)  # one for each full line with heatmaps
    headings = [text for text in sheet.texts if text.get_text().startswith(HEADING)]
    assert len(headings) == sum(len(line) for line in lines)
    half = (figure.bbox.width - 0.7 * figure.dpi) / 2
    for k, heading in enumerate(headings):
        is_right = k in (1, len(headings) - 1)
        box = heading.get_window_extent()
        assert is_right * half <= box.x0 and box.x1 <= (1 + is_right) * half
    not_drawn = [*sheet.xaxis.findobj(Text), *sheet.yaxis.findobj(Text)]  # the axis is off
    for one in figure.findobj(Text):
        if one.get_text() and one not in not_drawn:
            box = one.get_window_extent()
            assert figure.bbox.x0 - 1 <= box.x0 and box.x1 <= figure.bbox.x1 + 1
            assert figure.bbox.y0 - 1 <= box.y0 and box.y1 <= figure.bbox.y1 + 1


@pytest.mark.parametrize(("abreast", "columns"), [(2, 4), (3, 3)])
@pytest.mark.parametrize("heading", ["", "Only SE-Attention is wrong"])
def test_captions_are_above_their_picture_and_touch_no_other(style, abreast, columns, heading):
    """With the longest name of a class and of a network, as the figure of failures has them."""
    caption = "SE-Attention:\nautomobile\n100%"
    picture = Picture(np.zeros((32, 32, 3), np.uint8), caption)
    block = PictureBlock(heading, [[picture] * columns] * 3)
    figure = drawing.plot_pictures([[block] * abreast] * 2, heat_scale=True)
    figure.draw_without_rendering()
    sheet = figure.axes[0]
    captions = [text for text in sheet.texts if text.get_text() == caption]
    assert len(captions) == len(sheet.images) == 2 * 3 * columns * abreast
    boxes = []
    for text, image in zip(captions, sheet.images, strict=True):
        below = image.get_window_extent()
        box = text.get_window_extent()
        assert 0 < box.y0 - below.y1 < 0.1 * figure.dpi
        assert abs(box.x0 + box.x1 - below.x0 - below.x1) < 2
        assert abs(below.width - below.height) < 0.1
        boxes += [box, below]
    boxes += [text.get_window_extent() for text in sheet.texts if text.get_text() == heading != ""]
    boxes += [axes.get_tightbbox() for axes in figure.axes[1:]]  # the scales
    assert len(boxes) == 2 * len(captions) + 2 + 2 * abreast * (heading != "")
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)


def test_pictures_keep_their_pixels_in_a_file(style):
    """And in a PDF they stay two, in place of one with a transparent gap."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    row = [Picture(pixels, ""), Picture(pixels[::-1], "")]
    figure = drawing.plot_pictures([[PictureBlock("", [row])]], heat_scale=False)
    content = drawing.rendered(figure, "pdf", {"CreationDate": None})
    assert len(re.findall(rb"/Subtype /Image", content)) == 2
    assert b"/SMask" not in content
    drawn = np.asarray(Image.open(io.BytesIO(drawing.rendered(figure, "png", {}))).convert("RGB"))
    box = figure.axes[0].images[0].get_window_extent()
    middles = (np.arange(32) + 0.5) / 32
    rows = (drawn.shape[0] - box.y1 + box.height * middles).astype(int)
    columns = (box.x0 + box.width * middles).astype(int)
    np.testing.assert_array_equal(drawn[np.ix_(rows, columns)], pixels)


@pytest.mark.parametrize("file_type", ["png", "pdf"])
def test_a_figure_gives_the_same_bytes_again(style, file_type):
    """Neither a date nor a version is in its file; and the file shows something."""
    files = []
    for _ in range(2):
        figure = drawing.new_figure(2)
        figure.subplots().plot([1, 3, 2])
        without = {"png": {"Software": None}, "pdf": {"CreationDate": None}}[file_type]
        files.append(drawing.rendered(figure, file_type, without))
    assert files[0] == files[1]
    assert files[0].startswith({"png": b"\x89PNG", "pdf": b"%PDF"}[file_type])
    if file_type == "png":
        assert np.asarray(Image.open(io.BytesIO(files[0])).convert("L")).std() > 5
    else:
        assert b"DejaVuSans" in files[0]


def test_overlay_is_rgb_upright_and_lets_the_picture_show():
    image, heat = np.zeros((32, 32, 3), np.uint8), np.zeros((32, 32), np.float32)
    image[..., 0] = 255  # red
    heat[:8] = 1.0  # hot at the top
    picture = drawing.overlay(image, heat, size=64).astype(int)
    assert picture.shape == (64, 64, 3)
    assert picture[-5, :, 0].min() > picture[-5, :, 2].max()  # still red where it is cold
    hot, cold = drawing.HEAT_COLOURS(1.0), drawing.HEAT_COLOURS(0.0)
    assert np.allclose(picture[2, 30], 0.55 * image[0, 0] + 0.45 * 255 * np.array(hot[:3]), atol=2)
    assert np.allclose(
        picture[60, 30], 0.55 * image[0, 0] + 0.45 * 255 * np.array(cold[:3]), atol=2
    )
