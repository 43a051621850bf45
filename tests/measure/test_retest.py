"""A second test set: each network's accuracy there, and its change from the first."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers import BASELINE, KEYS, SE

from lab.data import shapes
from lab.measure import comparison, retest, statistics
from lab.measure.evaluation import logits_of

RULES = statistics.Settings()


def test_networks_are_compared_on_the_new_images_alone(trained, evaluated):
    _, hardware, _, networks = trained
    images = shapes.draw(300, seed=7)
    found = retest.run(evaluated, images, RULES, hardware)
    correct = []
    for key in KEYS:
        logits = logits_of(networks[key].model, images.pixels, hardware)
        correct.append((logits.argmax(1) == images.labels).numpy())
    for key, of_network in zip(KEYS, correct, strict=True):
        assert found.accuracy[key].value == pytest.approx(100 * of_network.mean())
    assert found.images == 300 and list(found.compared) == [SE.key]
    gains = correct[1].astype(int) - correct[0]
    expected = comparison.compare_group(gains[None], RULES)
    assert found.compared[SE.key] == expected


def test_there_need_be_no_new_images(trained, evaluated):
    assert retest.run(evaluated, None, RULES, trained[1]) is None


def test_seeds_and_networks_are_not_mixed_up(trained, evaluated):
    """Two seeds of three networks, each of which always answers a class of its own."""
    _, hardware, _, networks = trained
    images = shapes.draw(100, seed=7)

    class Always(torch.nn.Module):
        def __init__(self, label):
            super().__init__()
            self.label = label
            self.stages = torch.nn.ModuleList()

        def features(self, x):
            return torch.zeros(len(x), 1, 1, 1)

        def classify(self, x):
            return torch.eye(10)[self.label].expand(len(x), -1)

    third = dataclasses.replace(SE, key="third")
    by_network = {}
    for k, network in enumerate((BASELINE, SE, third)):
        by_network[network.key] = []
        for s in range(2):
            one = dataclasses.replace(
                networks[BASELINE.key], network=network, model=Always(2 * k + s)
            )
            evaluation = dataclasses.replace(evaluated[BASELINE.key][0], trained=one)
            by_network[network.key].append(evaluation)
    found = retest.run(by_network, images, RULES, hardware)
    share = np.bincount(images.labels.numpy(), minlength=10) / len(images) * 100
    for k, key in enumerate(by_network):
        assert found.accuracy[key].value == pytest.approx(share[2 * k : 2 * k + 2].mean())
    for key in (SE.key, "third"):
        assert found.compared[key].difference.p_holm >= found.compared[key].difference.p
    rights = np.zeros((3, 2, len(images)), int)
    for k in range(3):
        for s in range(2):
            rights[k, s] = images.labels.numpy() == 2 * k + s
    tests = [statistics.test_of_answers(of_network - rights[0]) for of_network in rights[1:]]
    margins = [one.difference.smallest_margin for one in found.compared.values()]
    assert margins == statistics.smallest_margins(tests, RULES.level)
