"""Whole runs of main.py: what they leave, that they repeat, and when they refuse."""

import hashlib
import json

import cv2
import pytest
import torch
from conftest import STRESS, tiny

import main

EXPLAINED = {"cifar10": ("cat", "dog", "bird", "airplane", "ship"), "shapes": tuple(main.SHAPES)[:5]}


def tree(dataset):
    """Every file that a run promises."""
    names = [f"{name}_{i}" for name in EXPLAINED[dataset] for i in (1, 2)]
    yield from ("models/baseline_model.pth", "models/se_attention_model.pth")
    yield from ("results/baseline_classwise_accuracy.json", "results/se_attention_classwise_accuracy.json")
    yield from ("results/comparison.json", "results/summary.md", "results/report_values.tex", "results/robustness.json")
    charts = ["baseline_curves", "se_attention_curves", "accuracy_comparison", "seeds", "robustness", "attacks"]
    charts += ["confusion_matrix_baseline", "confusion_matrix_se_attention", "reliability", "deletion_insertion"]
    yield from (f"plots/{chart}.{kind}" for chart in [*charts, "excitation"] for kind in ("png", "pdf"))
    yield from (
        f"plots/{name}.png" for name in ("failure_cases", "corruptions", *(f"gradcam_{name}" for name in names))
    )
    yield from (f"gradcam/{n}/{name}.png" for n in main.NETWORKS for name in names)


def assert_tree(output, dataset):
    expected = set(tree(dataset))
    assert {str(path.relative_to(output)) for path in output.rglob("[!.]*") if path.is_file()} == expected
    for name in expected:
        if name.endswith(".png"):
            picture = cv2.imread(str(output / name))
            assert picture is not None and picture.shape[0] >= 256 and picture.std() > 5, name


def numbers(output):
    """comparison.json without the timings."""

    def strip(value):
        if isinstance(value, dict):
            return {k: strip(v) for k, v in value.items() if k not in ("seconds", "retrain")}
        return [strip(v) for v in value] if isinstance(value, list) else value

    return strip(json.loads((output / "results" / "comparison.json").read_text()))


def weights(output, network):
    return torch.load(output / "models" / f"{network}_model.pth", weights_only=True)["state_dict"]


def test_a_run_leaves_the_whole_tree(tiny_run):
    assert_tree(tiny_run, "shapes")
    accuracy = json.loads((tiny_run / "results" / "baseline_classwise_accuracy.json").read_text())
    assert list(accuracy) == list(main.SHAPES) and all(0 <= value <= 100 for value in accuracy.values())
    comparison = json.loads((tiny_run / "results" / "comparison.json").read_text())
    for network in comparison["networks"].values():
        (run,) = network["runs"]
        assert run["seed"] == 42 and sum(map(sum, run["confusion_matrix"])) == 100
        assert len(run["history"]) == 2
        assert run["seconds"] == sum(epoch["seconds"] for epoch in run["history"])
        assert network["accuracy"] == pytest.approx(sum(network["class_accuracy"].values()) / 10)
    summary = (tiny_run / "results" / "summary.md").read_text()
    assert "| Overall" in summary and "| PGD, 8/255: accuracy (%)" in summary


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_runs_give_the_same_bits(tmp_path, precision):
    for name in ("a", "b"):
        main.main(tiny(tmp_path / name, "--precision", precision))
    for network in main.NETWORKS:
        ours, theirs = (weights(tmp_path / name, network) for name in ("a", "b"))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert numbers(tmp_path / "a") == numbers(tmp_path / "b")


def test_another_seed_gives_other_weights(tiny_run, tmp_path):
    main.main(tiny(tmp_path, "--seed", "43"))
    key = "stages.0.0.weight"
    assert not torch.equal(weights(tiny_run, "baseline")[key], weights(tmp_path, "baseline")[key])


def test_a_rerun_trains_nothing_and_redraws(tiny_run, monkeypatch):
    before = numbers(tiny_run)
    curves = tiny_run / "plots" / "baseline_curves.png"
    old = curves.read_bytes()
    curves.unlink()
    monkeypatch.setattr(main, "train", None)  # calling it would fail
    stress = (tiny_run / "results" / "robustness.json").read_bytes()
    main.main(tiny(tiny_run, *STRESS))
    assert (tiny_run / "results" / "robustness.json").read_bytes() == stress
    assert curves.read_bytes() == old
    assert numbers(tiny_run) == before
    assert_tree(tiny_run, "shapes")


def test_image_counts_are_those_of_the_split(tmp_path):
    main.main(tiny(tmp_path, "--shapes-train", "305", "--epochs", "1"))  # a tenth of 305 is no whole number
    settings = main.parse_settings(tiny(tmp_path, "--shapes-train", "305"))
    train, validation = main.split_train(main.load_data(settings).train.labels, settings)
    found = {"train": len(train), "validation": len(validation), "test": 100, "stressed": 0}
    assert numbers(tmp_path)["images"] == found


def test_retrain_trains_again(tiny_run, tmp_path, monkeypatch):
    calls = []
    real = main.train
    monkeypatch.setattr(main, "train", lambda *a: calls.append(a[0]) or real(*a))
    before = weights(tiny_run, "baseline")
    main.main(tiny(tiny_run, "--retrain"))
    assert sorted(calls) == sorted(main.NETWORKS)
    assert all(torch.equal(value, before[key]) for key, value in weights(tiny_run, "baseline").items())


@pytest.mark.parametrize(
    "change",
    [
        ["--epochs", "3"],
        ["--seed", "7"],
        ["--widths", "16", "16", "16"],
        ["--shapes-train", "400"],
        ["--reduction", "2"],
    ],
)
def test_weights_of_other_settings_are_refused(tiny_run, change):
    before = (tiny_run / "models" / "baseline_model.pth").read_bytes()
    with pytest.raises(SystemExit) as ended:
        main.main(tiny(tiny_run, *change))
    message = str(ended.value)
    for part in (change[0].strip("-").replace("-", "_"), "_model.pth", "--retrain", "--output-dir"):
        assert part in message
    assert "\n" not in message
    assert (tiny_run / "models" / "baseline_model.pth").read_bytes() == before


def test_an_asked_precision_is_not_answered_with_anothers_weights(tmp_path):
    main.main(tiny(tmp_path, "--precision", "fp32"))
    with pytest.raises(SystemExit, match="precision fp32"):
        main.main(tiny(tmp_path, "--precision", "bf16"))
    main.main(tiny(tmp_path))  # auto takes what is there


@pytest.mark.parametrize("content", [b"", b"not a model", None])
def test_foreign_weights_end_in_one_line(tiny_run, tmp_path, content):
    models = tmp_path / "models"
    models.mkdir()
    if content is None:
        torch.save({"some": "thing"}, models / "baseline_model.pth")
    else:
        (models / "baseline_model.pth").write_bytes(content)
    with pytest.raises(SystemExit) as ended:
        main.main(tiny(tmp_path))
    assert "baseline_model.pth" in str(ended.value) and "\n" not in str(ended.value)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (main.Path.touch, (self.path,))


@pytest.mark.parametrize("sealed", [False, True])
def test_malicious_weights_execute_nothing(tmp_path, sealed):
    path = tmp_path / "models" / "baseline_model.pth"
    path.parent.mkdir()
    torch.save({"state_dict": Malicious(tmp_path / "pwned")}, path)
    if sealed:
        path.write_bytes(path.read_bytes() + hashlib.sha256(path.read_bytes()).digest())
    with pytest.raises(SystemExit, match=r"baseline_model\.pth"):
        main.main(tiny(tmp_path))
    assert not (tmp_path / "pwned").exists()


def test_swapped_weights_are_refused(tiny_run, tmp_path):
    (tmp_path / "models").mkdir()
    content = (tiny_run / "models" / "se_attention_model.pth").read_bytes()
    (tmp_path / "models" / "baseline_model.pth").write_bytes(content)
    with pytest.raises(SystemExit, match=r"network se_attention \(now baseline\)"):
        main.main(tiny(tmp_path))


def test_shapes_are_learnt(trained):
    _, hardware, data, models = trained
    for model in models.values():
        assert main.accuracy_of(model, data.test, hardware) > 90


def test_a_run_on_real_cifar10(cifar10_dir, tmp_path):
    small = ["--data-dir", cifar10_dir, "--output-dir", str(tmp_path), "--epochs", "1", *STRESS]
    main.main([*small, "--stem", "4", "--widths", "16", "32", "32"])
    assert_tree(tmp_path, "cifar10")
    found = numbers(tmp_path)
    assert found["images"] == {"train": 45000, "validation": 5000, "test": 10000, "stressed": 50}
    assert all(35 < network["accuracy"] < 80 for network in found["networks"].values())
