"""Drawn shapes: the same from the same seed, with true masks, and what is known of them."""

import pytest
import torch

from lab.data import shapes


def test_what_is_known_of_drawn_shapes_is_true():
    images = shapes.draw(60, 3)
    areas = images.masks.float().mean((1, 2))
    assert torch.allclose(images.known["object size"], areas, atol=0.015)
    x = images.pixels.float() / 255
    for n in range(60):
        inside = x[n][images.masks[n]].mean(0)
        outside = x[n][~images.masks[n]].mean(0)
        contrast = (inside - outside).abs().mean().item()
        assert contrast == pytest.approx(images.known["object contrast"][n].item(), abs=0.15)
    assert images.select(torch.tensor([5])).known["distractors"] == images.known["distractors"][5]


def test_shapes_are_drawn_from_their_seed_with_true_masks():
    images, again, other = shapes.draw(200, 5), shapes.draw(200, 5), shapes.draw(200, 6)
    assert torch.equal(images.pixels, again.pixels) and not torch.equal(images.pixels, other.pixels)
    assert images.labels.bincount().tolist() == [20] * 10
    area = images.masks.float().mean((1, 2))
    assert area.min() > 0.01 and area.max() < 0.6
    # Inside has one colour, outside another.
    for pixels, mask in zip(images.pixels.float(), images.masks, strict=True):
        inside, outside = pixels[mask].median(0).values, pixels[~mask].median(0).values
        assert (inside - outside).abs().max() > 50
    assert len(set(shapes.SHAPES.values())) == len(shapes.SHAPES) == 10
