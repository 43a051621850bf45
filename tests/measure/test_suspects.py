"""TODO measure/test_suspects.py"""

import dataclasses

import numpy as np
import pytest
import torch
from helpers import BASELINE, SE

import main
from lab.data.images import Images
from lab.measure import evaluation, statistics, suspects
from lab.measure.evaluation import HeldOut, Outputs
from lab.measure.models import TrainedModel
from lab.report import sentences


def evaluation(called, confidence, labels, classes=4, model=None, network=BASELINE):
    """Of networks that call images what `called` says, with given confidences."""
    rest = ((1 - confidence) / (classes - 1))[:, None].expand(-1, classes)
    chances = rest.scatter(1, called[:, None], confidence[:, None])
    outputs = Outputs(torch.zeros(len(labels), 2), chances.log())
    trained = TrainedModel(network, 42, model, None)
    return evaluation.evaluate(trained, outputs, labels, HeldOut(outputs, labels))


def test_exchanged_labels_are_found(dossier):
    """Of the test images' labels one in a hundred is exchanged: most are found, and little else."""
    _, data, evaluations, _ = dossier
    rng = np.random.default_rng(0)
    hits = found = exchanged = 0
    for _ in range(5):
        labels = data.test.labels.clone()
        index = rng.choice(len(labels), len(labels) // 100, replace=False)
        labels[index] = (labels[index] + torch.from_numpy(rng.integers(1, 10, len(index)))) % 10
        test = dataclasses.replace(data.test, labels=labels)
        again = {}
        for key, (run,) in evaluations.items():
            outputs = Outputs(run.features, run.logits)
            again[key] = [evaluation.evaluate(run.trained, outputs, labels, run.held_out)]
        suspects = {one.index for one in suspects.find(again, test)}
        hits += len(suspects & set(index.tolist()))
        found += len(suspects)
        exchanged += len(index)
    print(f"label suspects: precision {hits / found:.2f}, recall {hits / exchanged:.2f}")
    assert hits / exchanged >= 0.6 and hits / found >= 0.5


def test_suspects_are_those_on_which_all_agree_surely():
    labels = torch.tensor([0] * 5 + [1] * 5)
    called = labels.clone()
    called[0] = called[1] = called[2] = 1
    confidence = torch.tensor([0.97, 0.97, 0.5] + [0.9] * 7)
    first = evaluation(called, confidence, labels)
    other_called = called.clone()
    other_called[1] = 2  # here they disagree
    other = evaluation(other_called, confidence, labels)
    test = Images(torch.zeros(10, 32, 32, 3, dtype=torch.uint8), labels)
    (suspect,) = suspects.find({"baseline": [first], "se_attention": [other]}, test)
    assert (suspect.index, suspect.label, suspect.called) == (0, 0, 1)
    settings = main.Settings(statistics=statistics.Settings(resamples=100))
    found = suspects.study({"baseline": [first], "se_attention": [other]}, test, settings)
    assert found.accuracy["baseline"].value == pytest.approx(100 * 7 / 9)
    assert found.differences["se_attention"].interval.value == 0
    compared = statistics.compare(SE, [other], [first], labels, 2, settings)
    said = sentences.say_suspects(found, [compared], 10, 0.5)
    assert "Of 10 test labels, 1 is suspected" in said and "The verdict stands" in said
    assert "Without it accuracy is" in said
