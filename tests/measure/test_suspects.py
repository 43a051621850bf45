"""Labels that may be wrong: exchanged ones are found, and what is said without them."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers import BASELINE, SE, evaluation_of

from lab.data.images import Images
from lab.measure import comparison, statistics, suspects
from lab.measure.evaluation import Outputs, evaluate
from lab.report import sentences


def test_exchanged_labels_are_found(trained, evaluated):
    """Of the test images' labels one in a hundred is exchanged: most are found, and little else."""
    _, _, data, _ = trained
    rng = np.random.default_rng(0)
    hits = found = exchanged = 0
    for _ in range(5):
        labels = data.test.labels.clone()
        index = rng.choice(len(labels), len(labels) // 100, replace=False)
        labels[index] = (labels[index] + torch.from_numpy(rng.integers(1, 10, len(index)))) % 10
        test = dataclasses.replace(data.test, labels=labels)
        again = {}
        for key, (run,) in evaluated.items():
            outputs = Outputs(run.features, run.logits)
            again[key] = [evaluate(run.trained, outputs, labels, run.held_out)]
        suspected = {one.index for one in suspects.find(again, test)}
        hits += len(suspected & set(index.tolist()))
        found += len(suspected)
        exchanged += len(index)
    print(f"label suspects: precision {hits / found:.2f}, recall {hits / exchanged:.2f}")
    assert hits / exchanged >= 0.6 and hits / found >= 0.5


def test_suspects_are_those_on_which_all_agree_surely():
    labels = torch.tensor([0] * 5 + [1] * 5)
    called = labels.clone()
    called[0] = called[1] = called[2] = 1
    confidence = torch.tensor([0.97, 0.97, 0.5] + [0.9] * 7)
    first = evaluation_of(called, confidence, labels)
    other_called = called.clone()
    other_called[1] = 2  # here they disagree
    other = evaluation_of(other_called, confidence, labels, network=SE)
    test = Images(torch.zeros(10, 32, 32, 3, dtype=torch.uint8), labels)
    by_network = {"baseline": [first], "se_attention": [other]}
    (suspect,) = suspects.find(by_network, test)
    assert (suspect.index, suspect.label, suspect.called) == (0, 0, 1)
    rules = statistics.Settings()
    found = suspects.study(by_network, test, rules)
    assert found.accuracy["baseline"].value == pytest.approx(100 * 7 / 9)
    assert found.differences["se_attention"].interval.value == 0
    compared = comparison.compare_with_first(by_network, labels.numpy(), 2, rules)
    said = sentences.say_suspects(found, [BASELINE, SE], compared, 10, 0.5)
    assert "Of 10 test labels, 1 is suspected" in said and "The verdict stands" in said
    assert "Without it accuracy is" in said
