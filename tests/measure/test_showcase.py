"""One image under everything: it is the image, and the answers are the networks'."""

import numpy as np
import torch
from helpers import KEYS

from lab.measure import corruptions, showcase
from lab.measure.attacks import Settings
from lab.measure.evaluation import logits_of


def test_pixels_and_answers(trained, evaluated):
    _, hardware, data, networks = trained
    evaluations = [evaluated[key][0] for key in KEYS]
    candidates = torch.arange(30, 60)
    attack = Settings(epsilons=(8.0, 0.5), attack_steps=10)
    found = showcase.make(evaluations, data, candidates, attack, 42, hardware)
    right = np.all([one.correct for one in evaluations], axis=0)
    assert found.index == next(i for i in range(30, 60) if right[i])
    clean = data.test.pixels[found.index].numpy()
    assert np.array_equal(found.original.pixels, clean)
    assert found.label == data.test.labels[found.index]
    assert all(said.predicted == found.label for said in found.original.said.values())
    assert list(found.corrupted) == corruptions.names_of(data)
    index = torch.tensor([found.index])
    foggy = corruptions.images_under("fog", data, index, 42)[:, 0]
    for severity, shown in enumerate(found.corrupted["fog"]):
        assert np.array_equal(shown.pixels, foggy[severity].numpy())
    assert_answers_are_the_networks(found, evaluations, networks, foggy, hardware)


def assert_answers_are_the_networks(found, evaluations, networks, foggy, hardware):
    clean = found.original.pixels
    for one in evaluations:
        key = one.trained.network.key
        chances = (logits_of(networks[key].model, foggy, hardware) / one.temperature).softmax(1)
        said = [shown.said[key] for shown in found.corrupted["fog"]]
        assert [answer.predicted for answer in said] == chances.argmax(1).tolist()
        np.testing.assert_allclose([one.confidence for one in said], chances.amax(1), rtol=1e-5)
        attacked = found.attacked[key]
        assert [made.epsilon for made in attacked] == [0.5, 8.0]
        for made in attacked:
            assert np.abs(made.change).max() <= 1 + 1e-4
            moved = made.shown.pixels.astype(int) - clean
            assert np.abs(moved).max() <= made.epsilon + 0.5
        assert np.abs(attacked[1].change).max() > 0.5
        assert attacked[1].shown.said[key].predicted != found.label  # 8 of 255 fool these


def test_where_no_image_is_known_to_all_the_first_is_shown(trained, evaluated):
    _, hardware, data, _ = trained
    evaluations = [evaluated[key][0] for key in KEYS]
    wrong = torch.from_numpy(np.flatnonzero(~evaluations[0].correct))[:2]
    few = Settings(epsilons=(1.0,), attack_steps=2)
    assert showcase.make(evaluations, data, wrong, few, 42, hardware).index == wrong[0]
