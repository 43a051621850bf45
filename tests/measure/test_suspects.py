"""Images that are hard or mislabelled: exchanged labels are found, and what people say of them."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers import SE, evaluation_of

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
    compared = comparison.compare_with_first(by_network, labels.numpy(), 2, rules)
    found = suspects.study(by_network, test, None, rules)
    said = sentences.say_suspects(found, compared, 10, 0.5)
    assert "On 1 of 10 test images all networks agree with confidence against the label" in said
    assert "hard or mislabelled" in said and "ccuracy" not in said and "eople" not in said

    # People reject the label of the suspect, of one on which the networks disagree, and of one more
    shares = torch.nn.functional.one_hot(labels, 4).double()
    for index in (0, 1, 9):
        shares[index] = torch.tensor([0.3, 0.3, 0, 0.4], dtype=torch.float64)
    found = suspects.study(by_network, test, shares, rules)
    assert (found.rejected.images, found.rejected.suspected) == (3, 1)
    assert (found.suspects[0].people_for_label, found.suspects[0].people_for_called) == (30, 30)
    assert found.rejected.accuracy["baseline"].value == pytest.approx(100 * 6 / 7)
    assert found.rejected.differences["se_attention"].interval.value == 0
    said = sentences.say_suspects(found, compared, 10, 0.5)
    assert (
        "Of 3 test images on which more people choose another class than the label, 1 are" in said
    )
    assert "Without what people reject accuracy is 85.71 % (Baseline)" in said
    assert "The verdict stands" in said
