"""Every mistake, to be looked through: which images, and what is known of each."""

import numpy as np
import torch
from helpers import KEYS

from lab.measure import gallery, gradcam


def test_it_holds_every_mistake_of_any_network_the_surest_first(trained, evaluated, dossier):
    _, _, data, networks = trained
    found = dossier.gallery
    evaluations = [evaluated[key][0] for key in KEYS]
    wrong = np.stack([~one.correct for one in evaluations])
    assert sorted(found.index) == np.flatnonzero(wrong.any(0)).tolist()
    assert found.index.tolist() == dossier.rows["index"].tolist()  # as failures.csv has them
    index = torch.from_numpy(found.index)
    assert np.array_equal(found.pixels, data.test.pixels[index].numpy())
    assert np.array_equal(found.labels, data.test.labels[index].numpy())
    for one in evaluations:
        key = one.trained.network.key
        np.testing.assert_array_equal(found.probabilities[key], one.probabilities[index].numpy())
        called = one.predicted[index]
        large = gradcam.heatmaps_of(networks[key].model, data.test.pixels[index], called)
        small = torch.from_numpy(found.heatmaps[key])
        assert small.amin() >= 0 and small.amax() <= 1 and small.shape[1:] == (4, 4)
        again = torch.nn.functional.interpolate(
            small[:, None], (32, 32), mode="bilinear", align_corners=False
        )
        assert torch.allclose(gradcam.scaled(again[:, 0]), large, atol=1e-4)


def test_people_and_suspects_come_with_their_image(trained, evaluated):
    _, _, data, _ = trained
    evaluations = [evaluated[key][0] for key in KEYS]
    people = torch.rand(len(data.test), 10, dtype=torch.float64)
    wrong = int(np.flatnonzero(~evaluations[0].correct)[0])
    found = gallery.collect(evaluations, data.test, people, [wrong])
    assert np.array_equal(found.people, people[torch.from_numpy(found.index)].numpy())
    assert found.index[found.is_suspect].tolist() == [wrong]


def test_there_may_be_none(trained, evaluated):
    import dataclasses

    _, _, data, _ = trained
    right = []
    for key in KEYS:
        all_right = np.ones(len(data.test), bool)
        right.append(dataclasses.replace(evaluated[key][0], correct=all_right))
    found = gallery.collect(right, data.test, None, [])
    assert len(found.index) == 0 and found.people is None
    assert all(len(heat) == 0 for heat in found.heatmaps.values())
