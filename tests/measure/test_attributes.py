"""What mistakes go with: attributes of images, planted weaknesses, and none where there is none."""

import dataclasses

import numpy as np
import pytest
import scipy.stats
import torch
from helpers import BASELINE, SE, evaluation_of, tiny

import main
from lab.data import shapes
from lab.data.images import Images, Split
from lab.machine.device import prepare_machine
from lab.measure import attributes, failures, statistics
from lab.measure.evaluation import evaluate_all
from lab.report import sentences

RULES = statistics.Settings()


def test_attributes_are_what_they_are_called():
    grey = torch.full((1, 32, 32, 3), 100, dtype=torch.uint8)
    noisy = torch.randint(0, 256, (1, 32, 32, 3), dtype=torch.uint8)
    half = grey.clone()
    half[:, :16] = 200
    red = grey.clone()
    red[..., 1:] = 0
    pixels = torch.cat([grey, half, red, noisy])
    found = {a.name: a.values for a in attributes.image_attributes(Images(pixels, torch.arange(4)))}
    assert found["brightness"][:2] == pytest.approx([100, 150])
    assert found["contrast"][:2] == pytest.approx([0, 50])
    # M(3) of a plain colour: 0.3 times the length of its opponent colours
    assert found["colourfulness"][:3] == pytest.approx([0, 0, 0.3 * np.hypot(100, 50)])
    assert found["sharpness"][0] == 0 and found["sharpness"].argmax() == 3


def right_where(right, labels, network=BASELINE):
    called = torch.where(right, labels, (labels + 1) % 4)
    return evaluation_of(called, torch.full((len(labels),), 0.9), labels, network=network)


def associations(images, rights):
    """Of networks that are right where `rights` say so."""
    found = []
    for network, right in zip((BASELINE, SE), rights, strict=True):
        runs = [right_where(right, images.labels, network)]
        for attribute in attributes.image_attributes(images):
            found.append(attributes.associate(attribute, runs, RULES))
    return found


def test_what_makes_networks_fail_is_found():
    images = shapes.draw(600, 5)
    images = dataclasses.replace(images, labels=images.labels % 4)
    rng = np.random.default_rng(0)
    size = images.known["object size"].numpy()
    chance = np.interp(scipy.stats.rankdata(size) / 600, [0, 1], [0.5, 0.95])
    rights = [torch.from_numpy(rng.random(600) < chance) for _ in range(2)]
    found = associations(images, rights)
    common = attributes.common_to_all(found, 0.05)
    assert common[0][0].attribute == "object size" and common[0][0].correlation.value < 0
    assert {one.network.key for one in common[0]} == {"baseline", "se_attention"}
    said = sentences.say_common(common[:1])
    assert said.startswith("Mistakes of all networks go with less object size (-0.")
    error = [interval.value for interval in common[0][0].error]
    assert error[0] > error[-1] + 15
    fifth = np.argsort(size)[:120]
    wrong = ~rights[0].numpy()[fifth]
    assert error[0] == pytest.approx(100 * wrong.mean())
    reference = scipy.stats.spearmanr(size, ~rights[0].numpy())
    assert common[0][0].correlation.value == pytest.approx(reference.statistic)
    # only one network's weakness is not common to all
    mixed = associations(images, [rights[0], torch.from_numpy(rng.random(600) < 0.7)])
    assert "object size" not in [
        group[0].attribute for group in attributes.common_to_all(mixed, 0.05)
    ]
    assert sentences.say_common([]).startswith("None of the attributes")


def test_where_nothing_makes_them_fail_nothing_is_claimed(trained, evaluated):
    """Errors shuffled, of both networks alike: in 95 of 100 runs at least nothing is found."""
    _, _, data, _ = trained
    rng = np.random.default_rng(0)
    measured = attributes.image_attributes(data.test)
    wrong = [~evaluated[network.key][0].correct for network in (BASELINE, SE)]
    claims = 0
    for _ in range(100):
        order = rng.permutation(len(data.test))
        found = []
        for network, of_network in zip((BASELINE, SE), wrong, strict=True):
            runs = [
                right_where(torch.from_numpy(~of_network[order]), data.test.labels % 4, network)
            ]
            for attribute in measured:
                found.append(attributes.associate(attribute, runs, RULES))
        claims += len(attributes.common_to_all(found, 0.05)) > 0
    assert claims <= 5


@pytest.mark.slow
def test_a_planted_weakness_is_found(tmp_path):
    """Networks that have never seen a dark ground fail on dark images, and that is said."""
    arguments = tiny(tmp_path, "--shapes-train", "3000", "--shapes-test", "1000", "--epochs", "6")
    settings = main.parse_settings([*arguments, "--widths", "16", "32", "64"])
    hardware = prepare_machine(settings.machine, len(main.NETWORKS))
    data = main.load_data(settings)
    ground = data.train.pixels.double().numpy()[:, [0, 0, -1, -1], [0, -1, 0, -1]].mean((1, 2))
    bright = torch.from_numpy(ground > 140)
    split = data.splits[42]
    kept = Split(*(part[bright[part]] for part in (split.training, split.validation)))
    data = dataclasses.replace(data, splits={42: kept})
    trained = main.train_all(main.training_jobs(settings), data, hardware)
    evaluations = evaluate_all(trained, data, hardware)
    dossier = failures.study(evaluations, data, settings.rules, 42)
    by_attribute = {group[0].attribute: group for group in dossier.common}
    assert by_attribute["brightness"][0].correlation.high < -0.2
    assert "less brightness" in sentences.say_common(dossier.common)
