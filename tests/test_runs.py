"""TODO test_runs.py"""

import hashlib
import json
import re
from pathlib import Path

import cv2
import pytest
import torch
from helpers import STRESS, comparison, fingerprint, tiny, weights

import main
from lab.data import shapes
from lab.machine import device, files


def promised_files(output):
    """Every file of the README's table, its patterns filled in."""
    text = (Path(main.__file__).parent / "README.md").read_text()
    table = text[text.index("| file in `output/`") : text.index("Each figure in `plots/`")]
    found = comparison(output)
    explained = found["explained_images"]
    absent = []
    if found["settings"]["seeds"] == 1:
        absent.append("plots/seeds.png")
    if found["failures"]["suspect_count"] == 0:
        absent.append("plots/label_suspects.png")
    for name in re.findall(r"`((?:models|results|plots|gradcam)/[^`]+)`", table):
        if name in absent:
            continue
        for network in main.NETWORKS if "<network>" in name else (None,):
            of_network = name.replace("<network>", network.key) if network else name
            for image in explained if "<class>_<i>" in name else ("",):
                yield of_network.replace("<class>_<i>", image)


def assert_promised_files(output):
    explained = comparison(output)["explained_images"]
    assert len(explained) == 10 and len({name.split("_")[0] for name in explained}) == 5
    expected = set(promised_files(output))
    expected |= {name.replace(".png", ".pdf") for name in expected if name.startswith("plots/")}
    files = [path for path in output.rglob("[!.]*") if path.is_file()]
    assert {str(path.relative_to(output)) for path in files} == expected
    for name in expected:
        if name.endswith(".png"):
            picture = cv2.imread(str(output / name))
            assert picture is not None and picture.shape[0] >= 256 and picture.std() > 5, name


def test_a_run_leaves_what_the_readme_promises(tiny_run):
    assert_promised_files(tiny_run)
    accuracy = json.loads((tiny_run / "results" / "baseline_classwise_accuracy.json").read_text())
    assert list(accuracy) == list(shapes.SHAPES) and all(
        0 <= value <= 100 for value in accuracy.values()
    )
    for network in comparison(tiny_run)["networks"].values():
        (run,) = network["runs"]
        assert run["seed"] == 42 and sum(map(sum, run["confusion"])) == 100
        assert len(run["history"]) == 2
        assert run["seconds"] == sum(epoch["seconds"] for epoch in run["history"])
        mean = sum(interval["value"] for interval in network["accuracy"]["by_class"].values()) / 10
        assert network["accuracy"]["overall"]["value"] == pytest.approx(mean)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_runs_give_the_same_bits(tmp_path, precision):
    for name in ("a", "b"):
        main.main(tiny(tmp_path / name, "--precision", precision))
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")


def test_another_seed_gives_other_weights(tiny_run, tmp_path):
    main.main(tiny(tmp_path, "--seed", "43"))
    key = "stages.0.0.weight"
    assert not torch.equal(weights(tiny_run, "baseline")[key], weights(tmp_path, "baseline")[key])


def test_a_rerun_trains_nothing_and_redraws(tiny_run, monkeypatch):
    before = fingerprint(tiny_run)
    curves = tiny_run / "plots" / "baseline_curves.png"
    old = curves.read_bytes()
    curves.unlink()
    monkeypatch.setattr(main, "train_network", None)  # calling it would fail
    stress = (tiny_run / "results" / "robustness.json").read_bytes()
    main.main(tiny(tiny_run, *STRESS))
    assert (tiny_run / "results" / "robustness.json").read_bytes() == stress
    assert curves.read_bytes() == old
    assert fingerprint(tiny_run) == before
    assert_promised_files(tiny_run)


def test_image_counts_are_those_of_the_split(tmp_path):
    main.main(
        tiny(tmp_path, "--shapes-train", "305", "--epochs", "1")
    )  # a tenth of 305 is no whole number
    settings = main.parse_settings(tiny(tmp_path, "--shapes-train", "305"))
    split = main.load_data(settings).splits[42]
    found = {
        "train": len(split.training),
        "validation": len(split.validation),
        "test": 100,
        "corrupted": 0,
        "attacked": 0,
    }
    assert comparison(tmp_path)["images"] == found


def test_retrain_trains_again(tiny_run, monkeypatch):
    trained = []
    real = main.train_network
    monkeypatch.setattr(
        main, "train_network", lambda job, *more: trained.append(job.network) or real(job, *more)
    )
    before = weights(tiny_run, "baseline")
    main.main(tiny(tiny_run, "--retrain", *STRESS))
    assert trained == main.NETWORKS
    assert all(
        torch.equal(value, before[key]) for key, value in weights(tiny_run, "baseline").items()
    )


@pytest.mark.parametrize(
    "change", ["--epochs 3", "--seed 7", "--widths 16 16 16", "--shapes-train 400", "--reduction 2"]
)
def test_weights_of_other_settings_are_refused(tiny_run, change):
    before = (tiny_run / "models" / "baseline_model.pth").read_bytes()
    with pytest.raises(SystemExit) as ended:
        main.main(tiny(tiny_run, *change.split()))
    message = str(ended.value)
    for part in (
        change.split()[0].strip("-").replace("-", "_"),
        "_model.pth",
        "--retrain",
        "--output-dir",
    ):
        assert part in message
    assert "\n" not in message
    assert (tiny_run / "models" / "baseline_model.pth").read_bytes() == before


def test_an_asked_precision_is_not_answered_with_anothers_weights(tmp_path):
    main.main(tiny(tmp_path, "--precision", "fp32"))
    with pytest.raises(SystemExit, match="precision fp32"):
        main.main(tiny(tmp_path, "--precision", "bf16"))


@pytest.mark.parametrize("speedup", [0.5, 2.0])
def test_weights_keep_the_precision_that_they_were_trained_in(tmp_path, monkeypatch, speedup):
    """Whatever is measured this time: what is left of it is trained, and all is tried, in that."""
    main.main(tiny(tmp_path, "--precision", "bf16"))
    before = fingerprint(tmp_path)
    monkeypatch.setattr(device, "bfloat16_speedup", lambda: speedup)
    main.main(tiny(tmp_path))
    found = comparison(tmp_path)
    assert found["precision"] == "bf16"
    (tmp_path / "models" / "se_attention_model.pth").unlink()
    main.main(tiny(tmp_path))
    assert fingerprint(tmp_path)[0] == before[0]


def test_networks_of_different_arithmetic_are_not_compared(tmp_path):
    for precision in ("fp32", "bf16"):
        main.main(tiny(tmp_path / precision, "--precision", precision))
    mixed = tmp_path / "bf16" / "models" / "baseline_model.pth"
    mixed.write_bytes((tmp_path / "fp32" / "models" / "baseline_model.pth").read_bytes())
    with pytest.raises(SystemExit, match="different arithmetic"):
        main.main(tiny(tmp_path / "bf16"))


@pytest.mark.parametrize("content", [b"", b"not a model", None])
def test_foreign_weights_end_in_one_line(tmp_path, content):
    models = tmp_path / "models"
    models.mkdir()
    if content is None:
        torch.save({"some": "thing"}, models / "baseline_model.pth")
    else:
        (models / "baseline_model.pth").write_bytes(content)
    with pytest.raises(SystemExit) as ended:
        main.main(tiny(tmp_path))
    assert "baseline_model.pth" in str(ended.value) and "\n" not in str(ended.value)


@pytest.mark.parametrize(
    "content", [{}, {"settings": 3, "history": []}, {"settings": {}, "history": [7]}, [1, 2]]
)
def test_sealed_files_of_another_kind_end_in_one_line(tmp_path, content):
    """Whole and with the right digest, but not what this program writes."""
    files.write_tensors(tmp_path / "models" / "baseline_model.pth", content)
    with pytest.raises(
        SystemExit, match=r"baseline_model\.pth does not hold this network's weights"
    ):
        main.main(tiny(tmp_path))


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


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


def test_a_run_on_real_cifar10(cifar10_dir, tmp_path):
    small = ["--data-dir", cifar10_dir, "--output-dir", str(tmp_path), "--epochs", "1", *STRESS]
    main.main([*small, "--stem", "4", "--widths", "16", "32", "32"])
    assert_promised_files(tmp_path)
    found = comparison(tmp_path)
    assert found["images"] == {
        "train": 45000,
        "validation": 5000,
        "test": 10000,
        "corrupted": 50,
        "attacked": 20,
    }
    assert all(
        35 < network["accuracy"]["overall"]["value"] < 80 for network in found["networks"].values()
    )
