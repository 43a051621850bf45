"""Grad-CAM against the reference package, and against the objects' masks."""

import numpy as np
import pytest
import torch
from helpers import KEYS
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

from lab.data.images import to_input
from lab.measure import evaluation, gradcam


@pytest.mark.parametrize("network", KEYS)
def test_grad_cam_is_the_reference_packages(trained, network):
    _, _, data, networks = trained
    model, pixels = networks[network].model, data.test.pixels[:40]
    classes = data.test.labels[:40].roll(1)  # not always the class that it sees
    ours = gradcam.heatmaps_of(model, pixels, classes).numpy()
    with GradCAM(model=model, target_layers=[model.attention[-1]]) as reference:
        theirs = reference(to_input(pixels), [ClassifierOutputTarget(c) for c in classes.tolist()])
    assert np.abs(ours - theirs).max() < 1e-4
    assert (ours.max((1, 2)) > 0.99).mean() > 0.7  # not a comparison of empty maps


@pytest.mark.parametrize("network", KEYS)
def test_grad_cam_points_at_the_object(trained, network):
    """The hottest pixel, and the share of the heat, lie in the mask far above chance: its area."""
    _, hardware, data, networks = trained
    model = networks[network].model
    logits = evaluation.logits_of(model, data.test.pixels, hardware)
    right = logits.argmax(1) == data.test.labels
    assert right.float().mean() > 0.9
    images = data.test.select(right)
    heat = gradcam.heatmaps_of(model, images.pixels, images.labels).flatten(1)
    mask = images.masks.flatten(1)
    chance = mask.float().mean()
    hits = mask[torch.arange(len(heat)), heat.argmax(1)].float().mean()
    share = ((heat * mask).sum(1) / heat.sum(1).clamp_min(1e-7)).mean()
    assert hits > chance + 0.3 and share > 1.4 * chance


def test_images_are_taken_in_parts_and_without_gradients_but_one(trained, monkeypatch):
    """All at once, with the whole network's gradients, 10,000 images took 18 GB."""
    _, _, data, networks = trained
    model = networks["se_attention"].model
    pixels = data.test.pixels[:17]
    classes = data.test.labels[:17]
    whole = gradcam.heatmaps_of(model, pixels, classes)
    seen = []
    real = type(model).features

    def note(self, images):
        seen.append((len(images), torch.is_grad_enabled()))
        return real(self, images)

    monkeypatch.setattr(type(model), "features", note)
    monkeypatch.setattr(gradcam, "BATCH", 7)
    parts = gradcam.heatmaps_of(model, pixels, classes)
    assert seen == [(7, False), (7, False), (3, False)]
    assert torch.allclose(parts, whole, atol=1e-5)
