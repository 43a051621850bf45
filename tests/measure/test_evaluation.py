"""Evaluations counted by hand, what was learnt, and the temperature."""

import pytest
import torch
from helpers import SE, evaluation_of

from lab.measure import comparison, evaluation, statistics
from lab.measure.models import TrainedModel


def test_evaluation_counts():
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
    called = torch.tensor([0, 0, 0, 1, 1, 1, 0, 2])
    sure = torch.full((8,), 0.9)
    found = evaluation_of(called, sure, labels, classes=3)
    assert found.accuracy == 75 and found.class_accuracy.tolist() == [75, 100, 50]
    assert found.confusion.tolist() == [[3, 1, 0], [0, 2, 0], [1, 0, 1]]
    assert found.correct.tolist() == [True, True, True, False, True, True, False, True]
    perfect = evaluation_of(labels, sure, labels, classes=3, network=SE)
    by_network = {"baseline": [found], "se_attention": [perfect]}
    rules = statistics.Settings()
    (compared,) = comparison.compare_with_first(by_network, labels.numpy(), 3, rules)
    assert compared.overall.difference.interval.value == 25
    assert [group.difference.interval.value for group in compared.by_class] == [25, 0, 50]


def test_shapes_are_learnt(trained):
    _, hardware, data, networks = trained
    for one in networks.values():
        logits = evaluation.logits_of(one.model, data.test.pixels, hardware)
        assert (logits.argmax(1) == data.test.labels).double().mean() > 0.9


def test_temperature_undoes_a_scaling_of_calibrated_logits():
    """Labels drawn from the logits' own probabilities are calibrated; three times those need 3."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(20000, 10, generator=generator)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    assert evaluation.fit_temperature(logits, labels) == pytest.approx(1, abs=0.03)
    assert evaluation.fit_temperature(3 * logits, labels) == pytest.approx(3, abs=0.1)


def test_a_temperature_that_nothing_stops_is_known_to_be_none():
    """Where all labels are answered correctly, surer is always better."""
    labels = torch.arange(40) % 4
    logits = 5.0 * torch.nn.functional.one_hot(labels, 4)
    outputs = evaluation.Outputs(torch.zeros(40, 2), logits)
    assert evaluation.HeldOut(outputs, labels).all_correct()
    assert not evaluation.HeldOut(outputs, labels.roll(1)).all_correct()


def test_a_temperature_of_logits_that_say_nothing_is_known_to_be_the_largest():
    """Where surer is always worse: at chance, and always wrong."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 4
    informed = torch.nn.functional.one_hot(labels, 4) + torch.randn(400, 4, generator=generator)
    for logits, is_largest in ((informed, False), (informed.roll(1, 0), True)):
        outputs = evaluation.Outputs(torch.zeros(400, 2), 5 * logits)
        trained = TrainedModel(SE, 42, None, None)
        held_out = evaluation.HeldOut(outputs, labels)
        found = evaluation.evaluate(trained, outputs, labels, held_out)
        assert found.is_temperature_largest() == is_largest
        assert (found.temperature > 20) == is_largest
