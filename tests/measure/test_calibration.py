"""Calibration against torchmetrics and by hand, and the temperature."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lab.measure import calibration, statistics

RULES = statistics.Settings()


def test_calibration_agrees_with_torchmetrics():
    from torchmetrics.functional.classification import multiclass_calibration_error

    torch.manual_seed(0)
    labels = torch.arange(3000) % 10
    logits = F.one_hot(labels, 10) * 2.0 + torch.randn(3000, 10) * 2
    found = calibration.calibrate(logits, labels, 15)
    scores = calibration.score([logits], labels, 15, RULES, 42)
    chance = logits.double().softmax(1)
    reference = multiclass_calibration_error(chance, labels, num_classes=10, n_bins=15, norm="l1")
    assert scores.error.by_seed[0] == pytest.approx(100 * float(reference), abs=1e-4)
    assert scores.negative_log_likelihood.by_seed[0] == pytest.approx(
        -float(chance.gather(1, labels[:, None]).log().mean())
    )
    truth = np.eye(10)[labels.numpy()]
    brier_score = ((chance.numpy() - truth) ** 2).sum(1).mean()
    assert scores.brier_score.by_seed[0] == pytest.approx(brier_score)
    for one in (scores.error, scores.negative_log_likelihood, scores.brier_score):
        assert one.interval.low < one.interval.value < one.interval.high
    confidence, called = chance.max(1)
    sixth = (confidence > 0.4) & (confidence <= 7 / 15)  # the seventh bin
    k = int(np.searchsorted(found.bin_confidence, 0.4))
    assert found.bin_confidence[k] == pytest.approx(float(confidence[sixth].mean()))
    assert found.bin_correct[k] == int((called == labels)[sixth].sum())


def test_calibration_of_plain_tensors_is_counted_by_hand():
    """Of four images, of any classifier: two bins hold them."""
    chances = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.3, 0.7]])
    labels = torch.tensor([0, 0, 0, 1])  # the second is called 1
    found = calibration.calibrate(chances.log(), labels, 4)
    assert found.bin_images.tolist() == [2, 2] and found.bin_correct.tolist() == [2, 1]
    assert found.bin_confidence.tolist() == pytest.approx([0.65, 0.85])
    scores = calibration.score([chances.log()], labels, 4, RULES, 42)
    assert scores.error.mean() == pytest.approx(100 * (0.7 + 0.7) / 4)
    likelihood = -np.log([0.9, 0.2, 0.6, 0.7]).mean()
    assert scores.negative_log_likelihood.mean() == pytest.approx(likelihood)
    assert scores.brier_score.mean() == pytest.approx(2 * np.mean([0.01, 0.64, 0.16, 0.09]))


def test_temperature_is_fitted_on_validation_images_and_helps(stressed):
    for one in stressed.values():
        scores = one.calibration
        scaled = scores.scaled.negative_log_likelihood
        assert scaled.mean() < scores.as_trained.negative_log_likelihood.mean()
        assert scores.temperature.mean() < 1  # smoothed labels leave the networks too unsure


def test_bins_are_pooled_until_each_holds_enough():
    made = calibration.Calibration(
        np.array([0.1, 0.3, 0.5, 0.9]), np.array([0, 2, 25, 4]),
        np.array([1, 19, 30, 5]),
    )  # fmt: skip
    first, last = made.pooled(20)
    assert (first.correct, first.images) == (2, 20)
    assert first.confidence == pytest.approx((0.1 + 19 * 0.3) / 20)
    assert (last.correct, last.images) == (29, 35)  # too few at the end join the last
    assert [one.images for one in made.pooled(1)] == [1, 19, 30, 5]
    (only,) = made.pooled(1000)
    assert (only.correct, only.images) == (31, 55)
