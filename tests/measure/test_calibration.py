"""TODO measure/test_calibration.py"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchmetrics.functional.classification import multiclass_calibration_error

from lab.measure import calibration


def test_calibration_agrees_with_torchmetrics():
    torch.manual_seed(0)
    labels = torch.arange(3000) % 10
    logits = F.one_hot(labels, 10) * 2.0 + torch.randn(3000, 10) * 2
    found = calibration.calibrate(logits, labels, 15)
    chance = logits.double().softmax(1)
    reference = multiclass_calibration_error(chance, labels, num_classes=10, n_bins=15, norm="l1")
    assert found.error == pytest.approx(100 * float(reference), abs=1e-4)
    assert found.negative_log_likelihood == pytest.approx(
        -float(chance.gather(1, labels[:, None]).log().mean())
    )
    truth = np.eye(10)[labels.numpy()]
    assert found.brier_score == pytest.approx(float(((chance.numpy() - truth) ** 2).sum(1).mean()))
    confidence, called = chance.max(1)
    sixth = (confidence > 0.4) & (confidence <= 7 / 15)  # the seventh bin
    k = int(np.searchsorted(found.bin_confidence, 0.4))
    assert found.bin_confidence[k] == pytest.approx(float(confidence[sixth].mean()))
    assert found.bin_correct[k] == int((called == labels)[sixth].sum())


def test_temperature_is_fitted_on_validation_images_and_helps(stressed):
    for one in stressed.values():
        scores = one.calibration
        assert (
            scores.scaled[0].negative_log_likelihood < scores.as_trained[0].negative_log_likelihood
        )
        assert scores.temperature[0] < 1  # smoothed labels leave the networks too unsure
