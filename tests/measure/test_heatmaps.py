"""What heatmaps are worth: random ones as coarse, shuffled networks, curves."""

import copy
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT

import main
from lab.data import shapes
from lab.machine.device import Hardware
from lab.measure import gradcam, heatmaps
from lab.measure.models import build_network


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_random_maps_are_as_coarse_as_grad_cams(monkeypatch, stages):
    recipe = main.Recipe(dataset="shapes", widths=(8,) * stages, stem=4)
    model = build_network(main.NETWORKS[0], recipe, 10).eval()
    images = shapes.draw(10, seed=3)
    model.measure_input(images.pixels)
    sizes = []
    real = F.interpolate

    def interpolate(maps, *arguments, **more):
        sizes.append(tuple(maps.shape[2:]))
        return real(maps, *arguments, **more)

    monkeypatch.setattr(F, "interpolate", interpolate)
    hardware = Hardware(torch.device("cpu"), "fp32", "")
    heatmaps.try_maps(model, images, 2, 42, hardware)
    side = 32 // 2**stages
    assert len(sizes) > 2 and set(sizes) == {(side, side)}


def test_a_stage_is_shuffled_with_its_attention(monkeypatch):
    recipe = main.Recipe(dataset="shapes", widths=(8, 8), stem=4)
    model = build_network(main.NETWORKS[1], recipe, 10).eval()
    before = copy.deepcopy(model.state_dict())
    seen = []
    real = gradcam.heatmaps_of

    def look(model, pixels, classes):
        seen.append(copy.deepcopy(model.state_dict()))
        return real(model, pixels, classes)

    monkeypatch.setattr(gradcam, "heatmaps_of", look)
    hardware = Hardware(torch.device("cpu"), "fp32", "")
    heatmaps.try_maps(model, shapes.draw(10, seed=3), 2, 42, hardware)
    shuffled = []  # the layers whose matrices have changed, step by step
    for found in seen[1:]:
        changed = {name for name in before if not torch.equal(found[name], before[name])}
        matrices = {name for name in changed if before[name].ndim > 1}
        shuffled.append({".".join(name.split(".")[:2]) for name in matrices})
    from_the_top = [{"classifier.weight"}, {"attention.1", "stages.1"}, {"attention.0", "stages.0"}]
    assert len(shuffled) == len(from_the_top)
    for k, found in enumerate(shuffled):
        assert found == set().union(*from_the_top[: k + 1])
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)


def test_grad_cam_beats_random_maps(stressed):
    for one in stressed.values():
        maps, noise = one.heatmaps.grad_cam, one.heatmaps.random
        assert maps.deletion.mean() < noise.deletion.mean()
        assert maps.insertion.mean() > noise.insertion.mean()
        assert maps.pointing.mean() > noise.pointing.mean() + 0.2
        assert maps.overlap.mean() > noise.overlap.mean()
        assert one.heatmaps.deletion_gain.interval.low > 0
        assert one.heatmaps.insertion_gain.interval.low > 0
        assert one.heatmaps.likeness_without_stage[0].mean() < 0.5


def test_curves_start_and_end_at_whole_images(stressed):
    """Nothing deleted, all inserted: the image itself, whatever the map."""
    for one in stressed.values():
        maps, noise = one.heatmaps.grad_cam, one.heatmaps.random
        whole = [maps.deletion[0], noise.deletion[0], maps.insertion[-1], noise.insertion[-1]]
        assert whole == pytest.approx([whole[0]] * 4)
        assert whole[0] > 0.5
        assert maps.deletion[-1] == pytest.approx(noise.deletion[-1])  # all grey
        assert len(maps.deletion) == heatmaps.Settings().curve_steps + 1


def test_a_map_is_like_itself_whatever_scipy_is_told_of_arrays():
    """With SCIPY_ARRAY_API=1, which other packages tell people to set, SciPy answers tensors with
    tensors, whose deviations are another kind."""
    script = (
        "import torch\n"
        "from lab.measure import heatmaps\n"
        "maps = torch.rand(3, 32, 32)\n"
        "assert abs(heatmaps.rank_correlations(maps, maps) - 1).max() < 1e-9\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "SCIPY_ARRAY_API": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
