"""What was learnt is told from what was not: of test images, and of other kinds."""

import numpy as np
import pytest
import scipy.spatial
import torch

from lab.data import synthetic
from lab.measure import familiar
from lab.measure.evaluation import outputs_of


@pytest.fixture(scope="module")
def known(trained, evaluated):
    """What the networks that were trained on shapes know, and how they answer to other kinds."""
    _, hardware, _, _ = trained
    first_seed = [evaluations[0] for evaluations in evaluated.values()]
    others = synthetic.all_kinds(100, 1)
    return first_seed, others, familiar.find(first_seed, others, 0.95, hardware)


def outputs_by_key(first_seed, pixels, hardware):
    outputs = {}
    for one in first_seed:
        outputs[one.trained.network.key] = outputs_of(one.trained.model, pixels, hardware, True)
    return outputs


def test_distances_are_scipys():
    rng = np.random.default_rng(0)
    own = rng.normal(3, 2, (500, 4)) @ rng.normal(0, 1, (4, 4))
    other = rng.normal(0, 5, (20, 4))
    found = familiar.usual(torch.from_numpy(own).float()).distance(torch.from_numpy(other).float())
    inverse = np.linalg.inv(np.cov(own.T, bias=True))
    expected = [scipy.spatial.distance.mahalanobis(one, own.mean(0), inverse) for one in other]
    np.testing.assert_allclose(found, expected, rtol=0.02)  # of a thousandth of the variance


def test_a_channel_that_never_changes_does_not_count_without_bounds():
    own = torch.zeros(100, 3)
    own[:, 0] = torch.arange(100) / 100
    distance = familiar.usual(own).distance(own + torch.tensor([0.0, 0.01, 0.0]))
    assert distance.isfinite().all() and distance.max() < 10


def test_so_many_test_images_are_warned_of(trained, known):
    """Those that the limit is made of; and asked again, of the same ones."""
    _, hardware, data, _ = trained
    first_seed, _, found = known
    own = {one.trained.network.key: one.outputs for one in first_seed}
    assert found.share == 0.95
    assert found.is_unlike(own).double().mean() == pytest.approx(0.05, abs=0.003)
    again = outputs_by_key(first_seed, data.test.pixels[:50], hardware)
    assert torch.equal(found.is_unlike(again), found.is_unlike(own)[:50])


def test_other_kinds_are_told_and_counted(trained, known):
    _, hardware, _, _ = trained
    first_seed, others, found = known
    for kind, pixels in others.items():
        outputs = outputs_by_key(first_seed, pixels, hardware)
        told = 100 * found.is_unlike(outputs).double().mean().item()
        assert found.told[kind] == pytest.approx(told)
        assert told > 60, kind


def test_what_stages_give_is_heard_without_a_trace(trained):
    """Batch by batch, before the attention; and nothing listens afterwards."""
    _, hardware, data, networks = trained
    model = networks["se_attention"].model
    pixels = data.test.pixels[:30]
    found = outputs_of(model, pixels, hardware, with_stages=True)
    assert [tuple(stage.shape) for stage in found.stages] == [(30, 16), (30, 32), (30, 64)]
    with torch.no_grad():
        x = torch.relu(model.stem(model.normalise(pixels.permute(0, 3, 1, 2) / 255)))
        first = model.stages[0](x).mean((2, 3))
    torch.testing.assert_close(found.stages[0], first, rtol=1e-3, atol=1e-4)
    assert not any(stage._forward_hooks for stage in model.stages)
    plain = outputs_of(model, pixels, hardware)
    assert plain.stages == () and torch.equal(plain.logits, found.logits)
