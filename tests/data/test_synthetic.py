"""Images that can be made anywhere: the same ones again, and each kind as it is called."""

import pytest
import torch

from lab.data import synthetic

KINDS = (synthetic.noise, synthetic.smooth_noise, synthetic.single_colours)


@pytest.mark.parametrize("make", KINDS)
def test_the_same_images_are_made_again(make):
    images = make(5, 3)
    assert images.shape == (5, 32, 32, 3) and images.dtype == torch.uint8
    assert torch.equal(images, make(5, 3)) and not torch.equal(images, make(5, 4))
    assert make(0, 3).shape == (0, 32, 32, 3)


def test_each_kind_is_what_it_is_called():
    rough, smooth, plain = (make(50, 1).double() for make in KINDS)
    steps = [images.diff(dim=2).abs().mean() for images in (rough, smooth, plain)]
    assert steps[0] > 5 * steps[1] > steps[2] == 0
    assert (smooth.amin((1, 2)) == 0).all() and (smooth.amax((1, 2)) == 255).all()
    assert plain[:, 0, 0].unique(dim=0).shape[0] == 50
