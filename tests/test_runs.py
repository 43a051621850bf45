"""Whole runs of main.py: what they leave, that they repeat, and when they refuse."""

import dataclasses
import hashlib
import json
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from helpers import (
    KEYS,
    ROOT,
    SKETCHING,
    STRESS,
    comparison,
    fingerprint,
    refused,
    run_main,
    tiny,
    weights,
    without_times,
)
from sketches import sketch, sketched

import main
from lab.data import shapes
from lab.machine import device, files, pieces
from lab.measure import comparison as comparing
from lab.measure import failures, gradcam, stress
from lab.measure.models import Checkpoint, load_checkpoint, path_of_weights, save_checkpoint
from lab.report import drawing, figures


def promised_files(output):
    """Every file of the table in docs/output.md, its patterns filled in."""
    text = (ROOT / "docs" / "output.md").read_text()
    table = text[text.index("| file in `output/`") : text.index("Each figure in `plots/`")]
    found = comparison(output)
    explained = found["explained_images"]
    absent = []
    if found["settings"]["seeds"] == 1:
        absent.append("plots/seeds.png")
    if found["failures"]["suspect_count"] == 0:
        absent.append("plots/label_suspects.png")
    if not found["failures"]["people"]:
        absent.append("results/people.csv")
    if found["retest"]["said"] == "":
        absent.append("results/retest.csv")
    for name in re.findall(r"`((?:models|measured|results|plots|gradcam)/[^`]+)`", table):
        if name in absent:
            continue
        for network in main.NETWORKS if "<network>" in name else (None,):
            of_network = name.replace("<network>", network.key) if network else name
            for image in explained if "<class>_<i>" in name else ("",):
                yield of_network.replace("<class>_<i>", image)


def assert_promised_files(output, *, drawn):
    """That they are there and no others, and, where figures are drawn, that they show something."""
    explained = comparison(output)["explained_images"]
    assert len(explained) == 10 and len({name.split("_")[0] for name in explained}) == 5
    expected = set(promised_files(output))
    expected |= {name.replace(".png", ".pdf") for name in expected if name.startswith("plots/")}
    there = [path for path in output.rglob("[!.]*") if path.is_file()]
    assert {str(path.relative_to(output)) for path in there} == expected
    for name in expected:
        if drawn and name.endswith(".png"):
            picture = cv2.imread(str(output / name))
            assert picture is not None and picture.shape[0] >= 256 and picture.std() > 5, name


def test_a_run_leaves_what_is_promised(made_tiny_run):
    assert_promised_files(made_tiny_run, drawn=False)
    by_class = made_tiny_run / "results" / "baseline_classwise_accuracy.json"
    accuracy = json.loads(by_class.read_text())
    assert list(accuracy) == list(shapes.SHAPES)
    assert all(0 <= value <= 100 for value in accuracy.values())
    for network in comparison(made_tiny_run)["networks"].values():
        (run,) = network["runs"]
        assert run["seed"] == 42 and sum(map(sum, run["confusion"])) == 100
        assert len(run["history"]) == 2
        assert run["seconds"] == sum(epoch["seconds"] for epoch in run["history"])
        mean = sum(interval["value"] for interval in network["accuracy"]["by_class"].values()) / 10
        assert network["accuracy"]["overall"]["value"] == pytest.approx(mean)


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_two_runs_give_the_same_bits(tmp_path, undrawn, precision):
    for name in ("a", "b"):
        main.main(tiny(tmp_path / name, "--precision", precision))
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")


def test_another_seed_gives_other_weights(made_tiny_run, tmp_path, undrawn):
    main.main(tiny(tmp_path, "--seed", "43"))
    before = weights(made_tiny_run, "baseline")
    found = weights(tmp_path, "baseline", "_seed43")
    assert not torch.equal(before["stages.0.0.weight"], found["stages.0.0.weight"])


def test_a_rerun_trains_nothing(tiny_run, undrawn, monkeypatch):
    before, _ = fingerprint(tiny_run)
    monkeypatch.setattr(main, "train_network", None)  # calling it would fail
    main.main(tiny(tiny_run))
    assert fingerprint(tiny_run)[0] == before


@pytest.fixture
def drawing_curves(monkeypatch):
    """A run's figures are empty, but for the curves."""
    render = drawing.rendered
    sketch(monkeypatch.setattr)
    plot = figures.NETWORK_FIGURES["{}_curves"]
    curves = []

    def plot_and_note(*results):
        curves.append(plot(*results))
        return curves[-1]

    def render_curves(figure, *more):
        return render(figure, *more) if figure in curves else sketched(figure, *more)

    monkeypatch.setitem(figures.NETWORK_FIGURES, "{}_curves", plot_and_note)
    monkeypatch.setattr(drawing, "rendered", render_curves)


@pytest.mark.slow
def test_a_rerun_trains_nothing_and_redraws(tiny_run, monkeypatch, drawing_curves):
    before = fingerprint(tiny_run)
    curves = tiny_run / "plots" / "baseline_curves.png"
    sketch_of_curves = curves.read_bytes()
    monkeypatch.setattr(main, "train_network", None)  # calling it would fail
    stress = (tiny_run / "results" / "robustness.json").read_bytes()
    main.main(tiny(tiny_run, *STRESS))
    drawn = curves.read_bytes()
    assert len(drawn) > 10 * len(sketch_of_curves)
    curves.unlink()
    shutil.rmtree(tiny_run / "measured")  # so that all is measured anew
    main.main(tiny(tiny_run, *STRESS))
    assert curves.read_bytes() == drawn
    assert (tiny_run / "results" / "robustness.json").read_bytes() == stress
    assert fingerprint(tiny_run) == before
    assert_promised_files(tiny_run, drawn=False)


def test_image_counts_are_those_of_the_split(tmp_path, undrawn):
    # A tenth of 305 is no whole number
    main.main(tiny(tmp_path, "--shapes-train", "305", "--epochs", "1"))
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


def test_retrain_trains_again(tiny_run, undrawn, monkeypatch):
    trained = []
    real = main.train_network

    def note(job, *more):
        trained.append(job.network.key)
        real(job, *more)

    monkeypatch.setattr(main, "train_network", note)
    before, found = fingerprint(tiny_run)
    main.main(tiny(tiny_run, "--retrain", "--precision", found["precision"]))
    assert sorted(trained) == sorted(KEYS)
    assert fingerprint(tiny_run)[0] == before


@pytest.mark.parametrize(
    "change", ["--epochs 3", "--widths 16 16 16", "--shapes-train 400", "--reduction 2"]
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


OTHER = {"fp32": "bf16", "bf16": "fp32"}


def test_an_asked_precision_is_not_answered_with_anothers_weights(tiny_run):
    own = comparison(tiny_run)["precision"]
    with pytest.raises(SystemExit, match=rf"precision {own} \(now {OTHER[own]}\)"):
        main.main(tiny(tiny_run, "--precision", OTHER[own]))


@pytest.mark.parametrize(
    ("precision", "speedup"),
    [
        ("fp32", 2.0),
        pytest.param("bf16", 0.5, marks=pytest.mark.slow),
        pytest.param("bf16", 2.0, marks=pytest.mark.slow),
    ],
)
def test_weights_keep_the_precision_that_they_were_trained_in(
    tmp_path, undrawn, monkeypatch, precision, speedup
):
    """Whatever is measured this time: what is left of it is trained, and all is tried, in that."""
    main.main(tiny(tmp_path, "--precision", precision))
    before = fingerprint(tmp_path)
    monkeypatch.setattr(device, "bfloat16_speedup", lambda: speedup)
    main.main(tiny(tmp_path))
    found = comparison(tmp_path)
    assert found["precision"] == precision
    (tmp_path / "models" / "se_attention_model.pth").unlink()
    main.main(tiny(tmp_path))
    assert fingerprint(tmp_path)[0] == before[0]


def test_networks_of_different_arithmetic_are_not_compared(tiny_run):
    mixed = tiny_run / "models" / "baseline_model.pth"
    trained = load_checkpoint(mixed)
    other = dataclasses.replace(trained, precision=OTHER[trained.precision])
    save_checkpoint(mixed, other)
    with pytest.raises(SystemExit, match="different arithmetic"):
        main.main(tiny(tiny_run))


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


def test_swapped_weights_are_refused(made_tiny_run, tmp_path):
    (tmp_path / "models").mkdir()
    content = (made_tiny_run / "models" / "se_attention_model.pth").read_bytes()
    (tmp_path / "models" / "baseline_model.pth").write_bytes(content)
    with pytest.raises(SystemExit, match=r"network se_attention \(now baseline\)"):
        main.main(tiny(tmp_path))


@pytest.mark.slow
def test_a_run_on_real_cifar10(cifar10_dir, tmp_path):
    small = ["--data-dir", cifar10_dir, "--output-dir", str(tmp_path), "--epochs", "1", *STRESS]
    small += ["--stem", "4", "--widths", "8", "16", "32"]
    main.main(small)
    assert_promised_files(tmp_path, drawn=True)
    found = comparison(tmp_path)
    assert found["images"] == {
        "train": 45000,
        "validation": 5000,
        "test": 10000,
        "corrupted": 50,
        "attacked": 20,
    }
    accuracies = [one["accuracy"]["overall"]["value"] for one in found["networks"].values()]
    assert all(30 < accuracy < 80 for accuracy in accuracies)
    assert found["corruptions"]["source"] == "made by main.py"
    with_people = (Path(cifar10_dir) / "cifar10h").exists()
    assert bool(found["failures"]["people"]) == with_people
    assert ("peoples_doubt_scaled" in found["stress"]["baseline"]) == with_people


def test_a_run_on_corruptions_that_someone_else_has_made(tiny_run, undrawn, monkeypatch):
    load = main.load_data
    arrays = {"fog": np.zeros((5, 100, 32, 32, 3), np.uint8)}

    def load_with_official(settings):
        return dataclasses.replace(load(settings), official=arrays)

    monkeypatch.setattr(main, "load_data", load_with_official)
    main.main(tiny(tiny_run, *STRESS))
    found = comparison(tiny_run)["corruptions"]
    assert (found["count"], found["extra_count"], found["names"]) == (1, 0, ["fog"])
    assert found["source"] == "the published arrays"
    assert found["mean_is_over"] == "1 of the benchmark's 15 corruptions"


def lie_in(folder, *, seed, name="baseline_model.pth"):
    """A file of weights of a seed, as it was saved."""
    folder.mkdir(exist_ok=True)
    recipe = main.Recipe(seed=seed)
    checkpoint = Checkpoint("baseline", recipe.record(), "fp32", "", {}, [], {})
    save_checkpoint(folder / name, checkpoint)


def test_a_seeds_weights_are_found_whichever_seed_came_first(tmp_path):
    def name_of(seed):
        return path_of_weights(tmp_path, main.NETWORKS[0], seed, 42).name

    assert [name_of(seed) for seed in (42, 43)] == [
        "baseline_model.pth",
        "baseline_model_seed43.pth",
    ]
    lie_in(tmp_path, seed=42)
    lie_in(tmp_path, seed=43, name="baseline_model_seed43.pth")
    assert name_of(42) == "baseline_model.pth"
    assert [name_of(seed) for seed in (43, 7)] == [
        "baseline_model_seed43.pth",
        "baseline_model_seed7.pth",
    ]
    # earlier versions gave the plain name to whichever seed came first
    lie_in(tmp_path / "old", seed=7)
    lie_in(tmp_path / "old", seed=8, name="baseline_model_seed8.pth")
    for seed, name in ((7, ""), (8, "_seed8"), (42, "_seed42")):
        found = path_of_weights(tmp_path / "old", main.NETWORKS[0], seed, 42)
        assert found.name == f"baseline_model{name}.pth"
    # nor does an unfinished one give its name up
    lie_in(tmp_path / "half", seed=9, name="baseline_model_resume.pth")
    found = path_of_weights(tmp_path / "half", main.NETWORKS[0], 9, 42)
    assert found.name == "baseline_model.pth"


def test_another_seed_is_trained_beside_and_nothing_is_deleted(tiny_run, undrawn):
    before, _ = fingerprint(tiny_run)
    main.main(tiny(tiny_run, "--seed", "43", "--retrain"))
    after, _ = fingerprint(tiny_run)
    assert set(after) - set(before) == {f"{key}_model_seed43.pth" for key in KEYS}
    assert all(after[name] == before[name] for name in before)


PARTS = {
    "comparison": (comparing, "compare_with_first"),
    "explanation": (gradcam, "explain"),
    "failures": (failures, "study"),
    "stress": (stress, "run"),
    "figures": (figures, "save"),
}


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_fails_takes_nothing_with_it(tiny_run, tmp_path, monkeypatch, capsys, part):
    """What is known is written, the summary names what is missing, and the run ends in the
    error."""
    shutil.copytree(tiny_run / "models", tmp_path / "run" / "models")
    monkeypatch.setattr(figures, "save", lambda *_: None)

    def fail(*_, **__):
        raise TypeError("this is planted")

    module, name = PARTS[part]
    monkeypatch.setattr(module, name, fail)
    quick = ["--stress", "quick"]
    with pytest.raises(TypeError, match="this is planted"):
        main.main(tiny(tmp_path / "run", *STRESS, *quick))
    found = comparison(tmp_path / "run")
    assert found["failed"] == {part: "TypeError: this is planted"}
    assert found["networks"]["baseline"]["accuracy"]["overall"]["value"] > 0
    assert bool(found["verdicts"]) == (part != "comparison")
    assert bool(found["failures"]) == (part != "failures")
    assert bool(found["stress"]) == (part != "stress")
    results = tmp_path / "run" / "results"
    assert (results / "robustness.json").exists() == (part != "stress")
    assert (results / "predictions.csv").exists() == (part != "failures")
    summary = (results / "summary.md").read_text()
    assert f"- {part}: TypeError: this is planted" in summary
    assert not (results / "report_values.tex").exists()  # a paper tells of a whole run
    assert f"{part} failed, and the rest goes on" in capsys.readouterr().out


@pytest.mark.parametrize("part", ["failures", "stress"])
def test_a_kill_loses_none_of_the_parts_before(tiny_run, tmp_path, monkeypatch, part):
    shutil.copytree(tiny_run / "models", tmp_path / "run" / "models")

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(*PARTS[part], killed)
    with pytest.raises(SystemExit):
        main.main(tiny(tmp_path / "run", *STRESS))
    found = comparison(tmp_path / "run")
    assert found["verdicts"] and bool(found["failures"]) == (part == "stress")


PIECES = 43  # of two networks: 18 corruptions, a batch under attack, noise, heatmaps; SE's gates


def numbers_of(run):
    return (run / "results" / "robustness.json").read_bytes()


def test_a_kill_in_the_stress_tests_loses_no_finished_piece(
    made_tiny_run, tmp_path, undrawn, monkeypatch, capsys
):
    """Killed twice, the third run measures what is missing, to the bits of one never killed."""
    shutil.copytree(made_tiny_run / "models", tmp_path / "models")
    written = []
    write = pieces.write_tensors

    def write_or_die(path, content):
        if len(written) % 15 == 14:
            raise KeyboardInterrupt
        written.append(path)
        write(path, content)

    monkeypatch.setattr(pieces, "write_tensors", write_or_die)
    for _ in range(2):
        assert "what was trained and measured is kept" in refused(capsys, *tiny(tmp_path, *STRESS))
        written.append("")
    kept = len(list((tmp_path / "measured" / "unfinished").iterdir()))
    assert kept >= 28
    monkeypatch.setattr(pieces, "write_tensors", write)
    main.main(tiny(tmp_path, *STRESS))
    assert f"{kept} of {PIECES} measurements were there already" in capsys.readouterr().out
    assert numbers_of(tmp_path) == numbers_of(made_tiny_run)
    found, expected = (comparison(run) for run in (tmp_path, made_tiny_run))
    assert without_times(found) == without_times(expected)
    left = sorted(path.name for path in (tmp_path / "measured").iterdir())
    assert left == ["baseline_seed42.pth", "se_attention_seed42.pth"]


@pytest.mark.slow
def test_more_seeds_measure_theirs_alone(made_tiny_run, tmp_path, undrawn, capsys):
    for folder in ("models", "measured"):
        shutil.copytree(made_tiny_run / folder, tmp_path / folder)
    main.main(tiny(tmp_path, *STRESS, "--seeds", "2"))
    found = f"{PIECES} of {2 * PIECES} measurements were there already"
    assert found in capsys.readouterr().out
    together = numbers_of(tmp_path)
    shutil.rmtree(tmp_path / "measured")
    main.main(tiny(tmp_path, *STRESS, "--seeds", "2"))
    assert f"0 of {2 * PIECES} measurements" in capsys.readouterr().out
    assert numbers_of(tmp_path) == together


@pytest.mark.slow
def test_other_settings_are_measured_anew(tiny_run, undrawn, capsys):
    """But for what does not depend on them."""
    changed = ["--attack-steps", "4", "--stress-images", "60"]
    main.main(tiny(tiny_run, *STRESS, *changed))
    said = capsys.readouterr().out
    assert f"{PIECES - 2 - 36} of {PIECES} measurements were there already" in said
    found = numbers_of(tiny_run)
    shutil.rmtree(tiny_run / "measured")
    main.main(tiny(tiny_run, *STRESS, *changed))
    assert numbers_of(tiny_run) == found


@pytest.mark.slow
def test_scipys_array_switch_changes_nothing(made_tiny_run, tmp_path):
    """SCIPY_ARRAY_API=1, which other packages tell people to set: SciPy answers tensors with
    tensors."""
    shutil.copytree(made_tiny_run / "models", tmp_path / "models")
    done = run_main(*tiny(tmp_path, *STRESS), program=SKETCHING, SCIPY_ARRAY_API="1")
    assert done.returncode == 0, done.stderr
    assert fingerprint(tmp_path) == fingerprint(made_tiny_run)
    robustness = "results/robustness.json"
    assert (tmp_path / robustness).read_bytes() == (made_tiny_run / robustness).read_bytes()
