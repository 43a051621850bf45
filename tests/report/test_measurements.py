"""The numbers of the stress tests: each is named once, and is in the summary and in the files."""

import dataclasses
import json
import re

import numpy as np
import pytest
from helpers import comparison

import main
from lab.report import measurements, paper, records, tables


def test_a_label_can_be_reworded_without_another_change(results, monkeypatch):
    """Files keep their keys; only what people read is new."""
    before = json.dumps(records.comparison_record(results), default=np.ndarray.tolist)
    reworded = dataclasses.replace(
        measurements.CORRUPTED_ACCURACY, label="Accuracy 100 % free of fog & snow_"
    )
    monkeypatch.setattr(measurements, "CORRUPTED_ACCURACY", reworded)
    assert json.dumps(records.comparison_record(results), default=np.ndarray.tolist) == before
    assert reworded.title() in tables.in_markdown(tables.stress_table(results.stress))
    values = paper.latex_values(results)
    assert r"Accuracy 100\,\% free of fog \& snow\_ (\%)" in values
    assert r"\csname val:stress/baseline/corrupted_accuracy\endcsname" in values


def test_every_measurement_is_in_the_summary_and_in_the_numbers(made_tiny_run):
    """A row of the summary for each, its label and digits those of the metric."""
    summary = (made_tiny_run / "results" / "summary.md").read_text()
    found = comparison(made_tiny_run)["stress"]
    rows = [line for line in summary.splitlines() if line.startswith("|")]
    assert set(found) == {network.key for network in main.NETWORKS}
    assert sum(line.startswith("| Attack, 8/255: accuracy (%) ") for line in rows) == 1
    of_network = found["se_attention"]
    numbers = {f"{value:.2f}" for value in of_network.values()}
    numbers |= {f"{value:.3f}" for value in of_network.values()}
    table = summary[summary.index("| Stress test") :].split("\n\n")[0].splitlines()[2:]
    bounds = [key for key in of_network if key.endswith(("_low", "_high"))]
    assert len(table) == len(of_network) - len(bounds) > 30 and len(bounds) > 30
    for line, key in zip(table, [key for key in of_network if key not in bounds], strict=True):
        shown = re.findall(r"[-+]?\d+\.\d+", line.split("|")[4])  # after name, way, Baseline
        has_interval = of_network[f"{key}_low"] < of_network[f"{key}_high"]
        assert len(shown) == (3 if has_interval else 1) and set(shown) <= numbers


def test_areas_are_those_below_the_curves(results):
    one = results.stress.networks[0]
    measured = {m.metric.key: m.estimate.mean() for m in measurements.measurements(one)}
    for key, curve in (
        ("deletion_auc_grad_cam", one.heatmaps.grad_cam.deletion),
        ("insertion_auc_random", one.heatmaps.random.insertion),
    ):
        steps = len(curve) - 1
        assert measured[key] == pytest.approx((curve[1:] + curve[:-1]).sum() / 2 / steps)


def test_numbers_of_unknown_value_are_left_out(results):
    """No corruption error to divide by, heatmaps without masks, a network without gates."""
    one = results.stress.networks[0]
    keys = {m.metric.key for m in measurements.measurements(one)}
    assert "mean_corruption_error" in keys and "pointing_game_grad_cam" in keys
    corruptions = dataclasses.replace(one.corruptions, mean_corruption_error=None)
    maps = dataclasses.replace(one.heatmaps.grad_cam, pointing=None, overlap=None)
    heatmaps = dataclasses.replace(one.heatmaps, grad_cam=maps)
    less = dataclasses.replace(one, corruptions=corruptions, heatmaps=heatmaps)
    gone = keys - {m.metric.key for m in measurements.measurements(less)}
    assert gone == {
        "mean_corruption_error",
        "pointing_game_grad_cam",
        "intersection_over_union_grad_cam",
    }


def test_metrics_have_keys_of_their_own(results):
    for one in results.stress.networks:
        keys = [m.metric.key for m in measurements.measurements(one)]
        assert len(keys) == len(set(keys))
        assert all(key.isidentifier() for key in keys), keys
