"""The stress tests together: which images they try, and that each of the five is run and said."""

import contextlib
import io
import re

import numpy as np
import pytest
import torch
from helpers import BASELINE, SE, small_network

from lab.data import shapes
from lab.data.images import Dataset, Images, Split
from lab.machine.device import Hardware
from lab.machine.pieces import Pieces
from lab.measure import attacks, doubt, heatmaps, statistics, stress
from lab.measure.evaluation import evaluate_all
from lab.measure.models import TrainedModel

SETTINGS = stress.Settings(
    attacks=attacks.Settings(epsilons=(4, 1), attack_steps=2),
    doubt=doubt.Settings(conformal_misses=(0.2, 0.1)),
    heatmaps=heatmaps.Settings(curve_steps=2),
)
RULES = statistics.Settings(level=0.1, score_resamples=10)


@pytest.mark.parametrize(
    ("count", "share", "of_each"),
    [(12, 1, 4), (13, 1, 5), (12, 0.5, 2), (12, 1 / 8, 1), (12, 0, 0)],
)
def test_as_many_images_of_each_class_are_tried(count, share, of_each):
    """The first of each, however many there are."""
    labels = torch.tensor([0] * 5 + [1] * 20 + [2] * 30)
    labels = labels[torch.randperm(55, generator=torch.Generator().manual_seed(0))]
    test = Images(torch.zeros(55, 32, 32, 3, dtype=torch.uint8), labels)
    data = Dataset("made", ("a", "b", "c"), ("a",), test, test, {})
    found = stress.first_images(data, count, share)
    assert found.dtype == torch.int64
    expected = []
    for label in range(3):
        expected += [i for i in range(55) if labels[i] == label][:of_each]
    assert found.tolist() == expected
    assert labels[found].bincount(minlength=3).tolist() == [of_each] * 3


@pytest.mark.parametrize(("mode", "share"), [("full", 1), ("quick", 1 / 8), ("off", 0)])
def test_a_share_of_the_images_is_tried(mode, share):
    assert stress.Settings(stress=mode).share() == share


def drawn_data():
    split = Split(torch.arange(40), torch.arange(40, 60))
    train, test = shapes.draw(60, 0), shapes.draw(60, 1)
    foreign = {"grey": torch.full((10, 32, 32, 3), 128, dtype=torch.uint8)}
    return Dataset("made", tuple(shapes.SHAPES), ("disc",), train, test, {42: split}, {}, foreign)


@pytest.fixture(scope="module")
def tried():
    """The data, which images of it were tried, the outcome of two untrained networks, and what was
    said."""
    data = drawn_data()
    hardware = Hardware(torch.device("cpu"), "fp32", "")
    networks = []
    for network in (BASELINE, SE):
        networks.append(TrainedModel(network, 42, small_network(network), None))
    by_network = evaluate_all(networks, data, hardware)
    chosen = stress.Chosen(
        corrupted=torch.arange(20, 40),
        attacked=torch.arange(30, 40),
        explained=torch.arange(50, 60),
    )
    with contextlib.redirect_stdout(io.StringIO()) as said:
        outcome = stress.run(by_network, data, chosen, SETTINGS, RULES, 42, hardware, Pieces())
    return data, chosen, outcome, said.getvalue()


def test_each_of_the_five_phases_is_said(tried):
    *_, said = tried
    expected = []
    for k, phase in enumerate(["corruptions", "attacks", "doubt", "heatmaps", "gates"], 1):
        expected += [f"stress {k}/5: {phase} begins", f"stress {k}/5: {phase} took"]
    lines = [re.sub(r" \d+\.\d s$", "", line) for line in said.splitlines()]
    assert lines == expected


def test_a_network_without_attention_has_no_gates(tried):
    _, _, outcome, _ = tried
    baseline, se = outcome.networks
    assert (baseline.network, se.network) == (BASELINE, SE)
    assert baseline.gates is None
    shapes = {stage: means.shape for stage, means in se.gates.mean_by_class.items()}
    assert shapes == {1: (10, 16), 2: (10, 16), 3: (10, 32)}


def test_all_that_was_measured_is_in_the_outcome(tried):
    data, chosen, outcome, _ = tried
    assert outcome.classes == data.classes
    assert np.array_equal(outcome.original, data.test.pixels[20].numpy())
    assert (outcome.official, outcome.level) == (False, 0.1)
    assert [sets.miss for sets in outcome.networks[0].doubt.conformal] == [0.2, 0.1]
    assert len(outcome.corrupted) == 18 and len(outcome.benchmark_corruptions()) == 14
    for one in outcome.networks:
        images = {  # of each part, how many make its share
            "corrupted": (one.corruptions.accuracy, len(chosen.corrupted)),
            "attacked": (one.attacks.clean.by_seed, len(chosen.attacked)),
            "tested": (one.doubt.conformal[0].coverage.by_seed, len(data.test)),
        }
        for part, (percent, count) in images.items():
            counts = percent * count / 100
            np.testing.assert_allclose(counts, counts.round(), atol=1e-9, err_msg=part)
        assert one.attacks.epsilons == (1, 4)  # sorted
        assert one.attacks.robust[0].mean() >= one.attacks.robust[1].mean()
        assert sum(one.calibration.as_trained.by_seed[0].bin_images) == len(data.test)
        assert set(one.doubt.foreign) == {"grey"}
        assert len(one.heatmaps.grad_cam.deletion) == 3
        assert len(one.heatmaps.likeness_without_stage) == 3
    baseline, se = outcome.networks
    assert baseline.corruptions.change is None and se.corruptions.change is not None
    assert baseline.attacks.change is None and len(se.attacks.change) == 2
