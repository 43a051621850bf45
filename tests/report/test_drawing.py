"""How figures look: headings that stay in their part, heatmaps blended with their picture."""

import io
import itertools

import numpy as np
import pytest
from PIL import Image

from lab.report import drawing
from lab.report.drawing import Picture, PictureBlock


@pytest.mark.parametrize("count", [0, 1, 4])
@pytest.mark.parametrize("networks", [2, 3])
def test_headings_of_pictures_stay_in_their_part(style, count, networks):
    picture = Picture(np.zeros((32, 32, 3), np.uint8), "true class:\nautomobile")
    block = PictureBlock(
        "SE-Attention: most confident mistakes", [[picture] * count] * min(2, count)
    )
    lines = [[block, block], [block][: networks - 2], [block, block]]
    figure = drawing.plot_pictures([line for line in lines if line], heat_scale=True)
    figure.draw_without_rendering()
    for part in figure.subfigs:
        scales = [axes for axes in part.axes if axes.get_ylabel()]
        if part._suptitle is None:  # beside the odd block
            assert networks == 3 and not part.axes
            continue
        box = part._suptitle.get_window_extent()
        assert part.bbox.x0 <= box.x0 and box.x1 <= part.bbox.x1
        at_the_right = part.bbox.x1 > figure.bbox.x1 - 1
        assert len(scales) == (count > 0 and at_the_right)  # none without heatmaps


@pytest.mark.parametrize(("abreast", "columns"), [(2, 4), (3, 3)])
def test_captions_of_neighbours_do_not_collide(style, abreast, columns):
    """With the longest name of a class and of a network, as the figure of failures has them."""
    caption = "SE-Attention:\nautomobile\n100%"
    picture = Picture(np.zeros((32, 32, 3), np.uint8), caption)
    block = PictureBlock("Only SE-Attention is wrong", [[picture] * columns] * 3)
    figure = drawing.plot_pictures([[block] * abreast], heat_scale=True)
    figure.draw_without_rendering()
    boxes = []
    for part in figure.subfigs:
        boxes += [axes.title.get_window_extent() for axes in part.axes if axes.get_title()]
    assert len(boxes) == 3 * columns * abreast
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)


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
