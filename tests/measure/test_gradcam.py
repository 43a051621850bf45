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
