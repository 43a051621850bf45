"""The stress tests of main.py: corruptions against pinned pixels, attacks and calibration against libraries."""

import dataclasses

import foolbox
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torchmetrics.functional.classification import multiclass_calibration_error

import main

SEVERITIES = range(1, 6)


@pytest.fixture(scope="module")
def stressed(trained):
    """Rows of a whole stress test of the networks that know shapes."""
    settings, hardware, data, models = trained
    settings = main.dataclasses.replace(settings, stress="full", stress_images=200, curve_images=60)
    runs = []
    for network, model in models.items():
        logits = main.predict(model, data.test.pixels, hardware)
        runs.append(main.evaluate(main.Trained(network, 42, model, {}), logits, data.test.labels, data.classes))
    return main.stress_test(runs, data, settings, hardware)


def values(rows, name, network="Baseline"):
    return rows[(rows.name == name) & (rows.network == network)].y.to_numpy()


# Corruptions

# Sums of position-weighted pixels, modulo a prime, of `blocks` at severities 1, 3 and 5.
PINNED = {
    "gaussian_noise": [987025, 555307, 493342],
    "shot_noise": [499288, 237297, 204336],
    "impulse_noise": [241908, 671750, 580830],
    "speckle_noise": [293388, 259288, 696834],
    "gaussian_blur": [481129, 585844, 494169],
    "defocus_blur": [793163, 219563, 982268],
    "motion_blur": [321541, 861804, 221767],
    "zoom_blur": [683576, 78554, 182274],
    "fog": [424578, 613598, 979089],
    "brightness": [530435, 527402, 425965],
    "contrast": [124184, 4491, 654542],
    "saturate": [86656, 916072, 54682],
    "elastic_transform": [351429, 591172, 882748],
    "pixelate": [7094, 717544, 380245],
    "jpeg_compression": [708669, 753385, 817986],
}


def blocks(count=20):
    """Images of coloured blocks, made of whole numbers alone: the same on every machine."""
    coarse = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), np.uint8)
    return torch.from_numpy(coarse.repeat(4, 1).repeat(4, 2))


def checksum(pixels):
    flat = pixels.flatten().long()
    return int((flat * (torch.arange(len(flat)) % 1009 + 1)).sum() % 1_000_003)


def test_constants_are_the_benchmarks():
    """The tables of make_cifar_c.py in hendrycks/robustness."""
    assert {name: strengths[1:] for name, (_, strengths) in main.CORRUPTIONS.items()} == {
        "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.10),
        "shot_noise": (500, 250, 100, 75, 50),
        "impulse_noise": (0.01, 0.02, 0.03, 0.05, 0.07),
        "speckle_noise": (0.06, 0.1, 0.12, 0.16, 0.2),
        "gaussian_blur": (0.4, 0.6, 0.7, 0.8, 1),
        "defocus_blur": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        "motion_blur": ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
        "zoom_blur": (1.06, 1.11, 1.16, 1.21, 1.26),
        "fog": ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
        "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),
        "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),
        "saturate": ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
        "elastic_transform": (
            (0, 0, 0.08),
            (0.05, 0.2, 0.07),
            (0.08, 0.06, 0.06),
            (0.1, 0.04, 0.05),
            (0.1, 0.03, 0.03),
        ),
        "pixelate": (0.95, 0.9, 0.85, 0.75, 0.65),
        "jpeg_compression": (80, 65, 58, 50, 40),
    }


@pytest.mark.parametrize("name", main.CORRUPTIONS)
def test_strength_zero_gives_back_the_image(name):
    pixels = torch.cat(
        [main.draw_shapes(30, 1).pixels, torch.arange(256, dtype=torch.uint8).repeat(12).view(1, 32, 32, 3)]
    )
    assert torch.equal(main.corrupt(pixels, name, 0, seed=3), pixels)


@pytest.mark.parametrize("name", main.CORRUPTIONS)
def test_pixels_are_pinned_and_follow_the_seed(name):
    pixels = blocks()
    made = [main.corrupt(pixels, name, severity, seed=0) for severity in (1, 3, 5)]
    assert [checksum(x) for x in made] == PINNED[name]
    assert all(torch.equal(x, main.corrupt(pixels, name, k, 0)) for x, k in zip(made, (1, 3, 5), strict=True))
    drawn = name not in ("gaussian_blur", "defocus_blur", "zoom_blur", "brightness", "contrast", "saturate")
    drawn = drawn and name not in ("pixelate", "jpeg_compression")
    assert torch.equal(made[2], main.corrupt(pixels, name, 5, seed=1)) != drawn


def test_corruptions_are_what_their_names_say():
    x = main.draw_shapes(50, 2).pixels
    made = {name: main.corrupt(x, name, 3, 0).float() / 255 for name in main.CORRUPTIONS}
    x = x.float() / 255
    assert (made["gaussian_noise"] - x).std() == pytest.approx(0.08, abs=0.012)  # clipped at the ends
    assert ((made["impulse_noise"] == 0) | (made["impulse_noise"] == 1)).float().mean() > 0.03
    assert (made["brightness"].amax(3) - x.amax(3))[x.amax(3) < 0.8].mean() == pytest.approx(0.15, abs=0.01)
    assert (made["contrast"].std((1, 2)) / x.std((1, 2)).clamp_min(1e-6)).mean() == pytest.approx(0.4, abs=0.03)

    def roughness(images):
        return images.diff(dim=1).abs().mean() + images.diff(dim=2).abs().mean()

    for name in ("gaussian_blur", "defocus_blur", "motion_blur", "zoom_blur"):
        assert roughness(made[name]) < 0.8 * roughness(x)
        assert (made[name].mean((1, 2, 3)) - x.mean((1, 2, 3))).abs().max() < 0.04
    for name in ("elastic_transform", "pixelate", "jpeg_compression", "fog", "saturate"):
        assert 0.005 < (made[name] - x).abs().mean() < 0.2
    assert (made["saturate"].amax(3) - x.amax(3)).abs().max() < 0.01  # value stays


def test_severity_5_is_never_easier_than_1(stressed):
    rows = stressed[stressed.figure == "robustness"]
    table = rows.pivot_table(index=["network", "panel"], columns="x", values="y")
    ladder = table[table.index.get_level_values("panel") != "saturate"]
    assert len(ladder) == 28 and (ladder[5] <= ladder[1] + 1).all()  # 2 of 200 images
    assert (ladder[5] < ladder[1] - 5).any()
    assert np.allclose(values(stressed, "Corrupted images: mCE"), 100)
    mean = table.groupby("network").mean().mean(axis=1)
    change = values(stressed, "Corrupted images: change (points)", "SE-Attention")
    assert change == pytest.approx(mean["SE-Attention"] - mean["Baseline"])
    low, high = (values(stressed, f"Corrupted images: change, {end}", "SE-Attention") for end in ("lowest", "highest"))
    assert low < change < high
    changes = stressed[stressed.name.str.startswith("Corrupted images: change")]
    assert set(changes.network) == {"SE-Attention"}  # the first network has none from itself


def test_official_arrays_are_used_where_they_lie(tmp_path):
    folder = tmp_path / "CIFAR-10-C"
    folder.mkdir()
    images = main.draw_shapes(20, 0)
    data = main.Dataset("CIFAR-10", tuple("abcdefghij"), ("a",), images, images)
    settings, index = main.Settings(data_dir=tmp_path), torch.tensor([3, 7])
    assert len(list(main.corrupted_sets(data, index, settings))) == 15
    made = np.arange(5 * 20, dtype=np.uint8)[:, None, None, None] * np.ones((1, 32, 32, 3), np.uint8)
    np.save(folder / "glass_blur.npy", made)
    np.save(folder / "labels.npy", np.zeros(100))
    ((name, found),) = main.corrupted_sets(data, index, settings)
    assert name == "glass blur" and found[:, :, 0, 0, 0].tolist() == [[20 * k + 3, 20 * k + 7] for k in range(5)]
    for content in (np.zeros(7), np.array([{"a": 1}], dtype=object)):
        np.save(folder / "glass_blur.npy", content, allow_pickle=True)
        with pytest.raises(main.UserError, match="glass_blur"):
            list(main.corrupted_sets(data, index, settings))


# Attacks


@pytest.mark.parametrize("steps", [1, 20])
@pytest.mark.parametrize("epsilon", [2 / 255, 8 / 255])
def test_attacks_stay_in_the_ball_and_in_the_image(trained, steps, epsilon):
    _, hardware, data, models = trained
    pixels, labels = data.test.pixels[:60].clone(), data.test.labels[:60]
    pixels[:20] = pixels[:20].where(pixels[:20] > 128, 0).where(pixels[:20] < 128, 255)  # at the range's ends
    x = main.to_input(pixels)
    adversarial = main.attack(models["baseline"], pixels, labels, epsilon, steps, hardware)
    assert (adversarial - x).abs().max() <= epsilon + 1e-6 and (adversarial - x).abs().max() > 0.9 * epsilon
    assert adversarial.min() >= 0 and adversarial.max() <= 1


@pytest.mark.parametrize("network", main.NETWORKS)
def test_attacks_are_as_strong_as_foolboxs(trained, network):
    _, hardware, data, models = trained
    model = models[network].eval()
    theirs = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    x = main.to_input(data.test.pixels)
    linf = foolbox.attacks
    for steps, attack in ((1, linf.FGSM()), (20, linf.LinfPGD(rel_stepsize=2.5 / 20, steps=20))):
        for epsilon in (0.5 / 255, 1 / 255, 4 / 255):
            torch.manual_seed(0)
            _, _, success = attack(theirs, x, data.test.labels, epsilons=epsilon)
            adversarial = main.attack(model, data.test.pixels, data.test.labels, epsilon, steps, hardware)
            ours = (main.predict(model, adversarial, hardware).argmax(1) == data.test.labels).float().mean()
            assert 100 * ours == pytest.approx(100 * (~success).float().mean(), abs=1.0), (steps, epsilon)


def test_attacks_hurt_more_the_farther_they_may_go(stressed):
    for network in ("Baseline", "SE-Attention"):
        found = {
            k: values(stressed, f"{k}: accuracy (%)", network)[0] for k in ("PGD, 1/255", "PGD, 8/255", "FGSM, 8/255")
        }
        clean = values(stressed, "Clean images: accuracy (%)", network)[0]
        assert clean >= found["PGD, 1/255"] > found["PGD, 8/255"] and found["PGD, 8/255"] <= found["FGSM, 8/255"]


# Calibration


def test_calibration_agrees_with_torchmetrics():
    torch.manual_seed(0)
    labels = torch.arange(3000) % 10
    logits = F.one_hot(labels, 10) * 2.0 + torch.randn(3000, 10) * 2
    scores, bins = main.calibration(logits, labels, 15)
    chance = logits.double().softmax(1)
    reference = multiclass_calibration_error(chance, labels, num_classes=10, n_bins=15, norm="l1")
    assert scores["Calibration error (%)"] == pytest.approx(100 * float(reference), abs=1e-4)
    assert scores["Negative log-likelihood"] == pytest.approx(-float(chance.gather(1, labels[:, None]).log().mean()))
    truth = np.eye(10)[labels.numpy()]
    assert scores["Brier score"] == pytest.approx(float(((chance.numpy() - truth) ** 2).sum(1).mean()))
    assert all(0 <= sure <= 1 and 0 <= right <= 1 for sure, right in bins) and 10 <= len(bins) <= 15


def test_temperature_is_fitted_on_validation_images_and_helps(stressed):
    for network in ("Baseline", "SE-Attention"):
        before, after = (
            values(stressed, f"Negative log-likelihood, {when}", network)[0]
            for when in ("as trained", "temperature scaled")
        )
        assert after < before  # smoothed labels leave the networks too unsure
        assert values(stressed, "Temperature", network)[0] < 1


# Heatmaps and gates


def test_grad_cam_beats_random_maps(stressed):
    for network in ("Baseline", "SE-Attention"):

        def mean(name, network=network):
            return values(stressed, name, network).mean()

        assert mean("Deletion, Grad-CAM: probability") < mean("Deletion, random maps: probability")
        assert mean("Insertion, Grad-CAM: probability") > mean("Insertion, random maps: probability")
        assert mean("Pointing game, Grad-CAM") > mean("Pointing game, random maps") + 0.2
        assert mean("Intersection over union, Grad-CAM") > mean("Intersection over union, random maps")
        assert mean("Likeness of Grad-CAM, shuffled down to stage 1") < 0.5


def test_curves_start_and_end_at_whole_images(stressed):
    rows = stressed[stressed.figure == "deletion_insertion"]
    for (_, panel), part in rows.groupby(["network", "panel"]):
        ends = part[part.x == (0 if panel.endswith("deletion") else 100)].y.to_numpy()
        assert ends == pytest.approx(ends[0])  # nothing deleted, all inserted: the image itself, whatever the map
        assert ends[0] > 0.5 and part.groupby("line").x.max().tolist() == [100, 100]


def test_gates_are_those_of_the_blocks(trained, stressed):
    _, hardware, data, models = trained
    hardware = dataclasses.replace(hardware, precision="fp32")
    model = models["se_attention"]
    rows = list(main.study_gates(model, data.test, data.classes, hardware))
    x = F.relu(model.stem(model.normalise(main.to_input(data.test.pixels))))
    with torch.no_grad():
        gates = model.attention[0].gate(model.stages[0](x))
    found = [r["y"] for r in rows if r["panel"] == "stage 1" and r["line"] == "ring"]
    assert found == pytest.approx(gates[data.test.labels == 1].mean(0).tolist(), abs=1e-4)
    shares = [r["y"] for r in rows if "share of variance" in r["name"]]
    assert len(shares) == 3 and all(0 <= share <= 1 for share in shares)
    assert list(main.study_gates(models["baseline"], data.test, data.classes, hardware)) == []
    for block in model.attention:  # frozen copies leave the network as it was
        assert "gate" not in vars(block)
    assert len(values(stressed, "Gates at their means: accuracy (%)", "SE-Attention")) == 1


def test_the_table_has_two_digits_in_percent_and_points_and_three_else():
    rows = {"FGSM: accuracy (%)": [70.0, 0.5], "Corrupted images: change (points)": [np.nan, -0.25], "Loss": [1.5, 0.5]}
    table = main.stress_table(pd.DataFrame.from_dict(rows, "index", columns=["Baseline", "SE-Attention"]))
    assert [row[1:] for row in table] == [
        ["Baseline", "SE-Attention"],
        ["70.00", "0.50"],
        ["", "-0.25"],
        ["1.500", "0.500"],
    ]
