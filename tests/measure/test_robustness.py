"""Accuracy under corruption: by severity, in summary, and as a ratio of errors."""

import dataclasses

import numpy as np
import pytest
from helpers import KEYS

from lab.measure import corruptions, robustness, statistics

RULES = statistics.Settings()


def test_severity_5_is_never_easier_than_1(stressed):
    """But for saturate, whose severities are no ladder: 1 and 2 take colour away, 3 to 5 add it."""
    for one in stressed.values():
        ladder = [k for k, name in enumerate(one.corruptions.names) if name != "saturate"]
        (accuracy,) = one.corruptions.accuracy[:, ladder]
        assert accuracy.shape == (len(corruptions.ALL) - 1, 5)
        assert (accuracy[:, 4] <= accuracy[:, 0] + 1).all()  # 2 of 200 images
        assert (accuracy[:, 4] < accuracy[:, 0] - 5).any()


def test_the_corruptions_summary_is_that_of_their_images():
    """Two seeds, two corruptions, five severities, four images, counted by hand."""
    rng = np.random.default_rng(0)
    correct = {key: rng.random((2, 2, 5, 4)) < 0.6 for key in KEYS}
    scores = robustness.score(("a", "b"), correct, RULES, 42)
    baseline, se = scores["baseline"], scores["se_attention"]
    assert baseline.change is None
    gains = 100 * (correct["se_attention"].mean((1, 2)) - correct["baseline"].mean((1, 2)))
    assert se.change.interval.value == pytest.approx(gains.mean())
    expected = statistics.over_seeds_and_images(gains).interval(0.95)
    assert dataclasses.astuple(se.change.interval) == pytest.approx(dataclasses.astuple(expected))
    for k in (0, 1):
        errors = [1 - correct[key][k].mean((1, 2)) for key in ("se_attention", "baseline")]
        expected = 100 * np.mean(errors[0] / errors[1])
        assert se.mean_corruption_error.by_seed[k] == pytest.approx(expected)
    assert se.accuracy[1, 0, 3] == 100 * correct["se_attention"][1, 0, 3].mean()


def test_corruptions_under_which_the_first_network_never_errs_have_no_ratio():
    perfect = np.ones((1, 2, 5, 4), bool)
    half = perfect.copy()
    half[:, 0, :, :2] = False
    scores = robustness.score(("a", "b"), {"baseline": half, "se_attention": half}, RULES, 42)
    assert scores["se_attention"].mean_corruption_error.by_seed.tolist() == [100]
    scores = robustness.score(("a", "b"), {"baseline": perfect, "se_attention": half}, RULES, 42)
    assert scores["se_attention"].mean_corruption_error is None
