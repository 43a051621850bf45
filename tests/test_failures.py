"""The dossier of failures, and pictures of one's own."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from conftest import comparison, refused, tiny
from PIL import Image
from sklearn.metrics import classification_report

import main

BASELINE, SE = main.NETWORKS[:2]
STATISTICS = main.StatisticsSettings()


def evaluation(called, confidence, labels, classes=4, model=None, network=BASELINE):
    """Of networks that call images what `called` says, with given confidences."""
    rest = ((1 - confidence) / (classes - 1))[:, None].expand(-1, classes)
    chances = rest.scatter(1, called[:, None], confidence[:, None])
    outputs = main.Outputs(torch.zeros(len(labels), 2), chances.log())
    trained = main.TrainedNetwork(network, 42, model, None)
    return main.evaluate(trained, outputs, labels, main.HeldOut(outputs, labels))


@pytest.fixture(scope="module")
def dossier(trained):
    """Settings, data, evaluations and failures of the networks that know shapes."""
    settings, hardware, data, networks = trained
    evaluations = main.evaluate_all(list(networks.values()), data, hardware)
    return settings, data, evaluations, main.study_failures(evaluations, data, settings)


# From one network to another


def test_transitions_are_counted_by_hand():
    labels = torch.tensor([0, 0, 0, 0, 0, 0])
    sure = torch.full((6,), 0.9)
    first = evaluation(torch.tensor([0, 1, 0, 1, 1, 2]), sure, labels)
    other = evaluation(torch.tensor([0, 0, 1, 1, 2, 2]), sure, labels)
    counts = main.count_transitions(SE, [first, first], [first, other]).counts
    assert {way.name: found.tolist() for way, found in counts.items()} == {
        "RIGHT": [2, 1],
        "CORRECTED": [0, 1],
        "BROKEN": [0, 1],
        "SAME_CLASS": [4, 2],
        "OTHER_CLASS": [0, 1],
    }
    said = main.say_transitions(main.count_transitions(SE, [other], [first]))
    assert "Baseline's 4 mistakes, SE-Attention corrects 1 and makes 1 new ones; 3 stay" in said
    of_seeds = main.count_transitions(SE, [other, other, first], [first, first, first])
    assert main.say_transitions(of_seeds) == (
        "Of Baseline's 4.0 mistakes, SE-Attention corrects 0.7 and makes 0.7 new ones; 3.3 stay, "
        "2.7 of them with the same class (means over 3 seeds)."
    )


def test_table_csv_figure_and_text_count_the_same(tiny_run, tmp_path):
    """Each from its own file."""
    shutil.copytree(tiny_run / "models", tmp_path / "models")
    figures, real = [], main.plot_transitions
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            main.FIGURES, "transitions", lambda results: figures.append(real(results)) or figures[0]
        )
        main.main(tiny(tmp_path))
    predictions = pd.read_csv(tmp_path / "results" / "predictions.csv")
    failures = pd.read_csv(tmp_path / "results" / "failures.csv")
    table = pd.read_csv(tmp_path / "results" / "transitions.csv", index_col=0)["to SE-Attention"]
    wrong = ~predictions.baseline_correct | ~predictions.se_attention_correct
    assert len(predictions) == table.sum() == 100 and len(failures) == wrong.sum()
    by_way = failures.se_attention_transition.value_counts().reindex(table.index[1:], fill_value=0)
    assert by_way.tolist() == table.iloc[1:].tolist()
    drawn = [bar.get_width() for bar in figures[0].axes[0].patches]
    assert drawn == table.iloc[1:].tolist()
    recorded = comparison(tmp_path)["failures"]
    assert list(recorded["transitions"]["se_attention"].values()) == table.tolist()
    summary = (tmp_path / "results" / "summary.md").read_text()
    assert recorded["said"]["transitions"] in summary
    for way, count in table.astype(int).items():
        assert re.search(rf"\| {way} +\| +{count:,} \|", summary)
    # what is said of single images is what the networks' accuracies are made of
    for key in ("baseline", "se_attention"):
        accuracy = comparison(tmp_path)["networks"][key]["accuracy"]["overall"]["value"]
        assert 100 * predictions[f"{key}_correct"].mean() == pytest.approx(accuracy)
        called = predictions[f"{key}_predicted"] == predictions.true_class
        assert (called == predictions[f"{key}_correct"]).all()
    sure = pd.read_csv(tmp_path / "results" / "sure_mistakes.csv", index_col=0)
    for level in (50, 99):
        found = failures[~failures.baseline_correct].baseline_confidence >= level / 100
        assert sure.loc[f"{level} % confidence", "Baseline: as trained"] == found.sum()
    surest = np.maximum(
        failures.baseline_confidence * ~failures.baseline_correct,
        failures.se_attention_confidence * ~failures.se_attention_correct,
    )
    assert (np.diff(surest) <= 0).all()


def test_a_network_that_is_less_sure_is_not_called_better():
    def mistakes(network, as_trained, scaled, p_as_trained=1.0, p_scaled=1.0):
        return main.SureMistakes(
            network, (90.0,), np.array([[as_trained]]), np.array([[scaled]]),
            (p_as_trained,), (p_scaled,),
        )  # fmt: skip

    (said,) = main.say_sureness([mistakes(BASELINE, 30, 20), mistakes(SE, 10, 22, 0.001)], 0.05)
    assert said == (
        "At 90 % confidence SE-Attention makes fewer mistakes than Baseline as trained (10 and 30,"
        " p = 0.001), and no difference is found once the temperature is scaled (22 and 20, p = 1):"
        " as far as this tells, it is less sure, not better."
    )
    better = mistakes(SE, 10, 12, 0.001, 0.01)
    assert main.say_sureness([mistakes(BASELINE, 30, 20), better], 0.05) == []
    assert main.say_sureness([mistakes(BASELINE, 30, 20), mistakes(SE, 29, 22, 0.7)], 0.05) == []
    (said,) = main.say_sureness([mistakes(BASELINE, 10, 22), mistakes(SE, 30, 20, 0.001)], 0.05)
    assert said.endswith("it is surer, not worse.")


def test_dividing_the_logits_makes_a_network_less_sure_and_no_better(dossier):
    settings, _, evaluations, _ = dossier
    (run,) = evaluations["baseline"]
    outputs = main.Outputs(run.features, run.logits / 2)
    held_out = run.held_out.outputs
    halved = main.HeldOut(main.Outputs(held_out.features, held_out.logits / 2), run.held_out.labels)
    # one that errs more often, so that there is something to count
    labels = torch.where(torch.arange(400) % 3 == 0, (run.predicted + 1) % 10, run.predicted)
    first = main.evaluate(run.trained, main.Outputs(run.features, run.logits), labels, run.held_out)
    other = main.evaluate(run.trained, outputs, labels, halved)
    found = [
        main.count_sure_mistakes(network, [one], [first], settings)
        for network, one in ((BASELINE, first), (SE, other))
    ]
    (said,) = main.say_sureness(found, 0.05)
    assert said.endswith("it is less sure, not better.")


def test_sure_mistakes_are_counted_before_and_after_scaling(dossier):
    _, _, evaluations, failures = dossier
    for found in failures.mistakes:
        (run,) = evaluations[found.network.key]
        wrong = torch.from_numpy(~run.correct)
        for by_level, temperature in ((found.as_trained, 1), (found.scaled, run.temperature)):
            sure = (run.logits / temperature).softmax(1).amax(1)[wrong]
            expected = [int((100 * sure >= level).sum()) for level in found.levels]
            assert by_level.tolist() == [expected]


# What they have in common


def test_attributes_are_what_they_are_called():
    grey = torch.full((1, 32, 32, 3), 100, dtype=torch.uint8)
    noisy = torch.randint(0, 256, (1, 32, 32, 3), dtype=torch.uint8)
    half = grey.clone()
    half[:, :16] = 200
    red = grey.clone()
    red[..., 1:] = 0
    pixels = torch.cat([grey, half, red, noisy])
    found = {a.name: a.values for a in main.image_attributes(main.Images(pixels, torch.arange(4)))}
    assert found["brightness"][:2] == pytest.approx([100, 150])
    assert found["contrast"][:2] == pytest.approx([0, 50])
    # M(3) of a plain colour: 0.3 times the length of its opponent colours
    assert found["colourfulness"][:3] == pytest.approx([0, 0, 0.3 * np.hypot(100, 50)])
    assert found["sharpness"][0] == 0 and found["sharpness"].argmax() == 3


def test_what_is_known_of_drawn_shapes_is_true():
    images = main.draw_shapes(60, 3)
    areas = images.masks.float().mean((1, 2))
    assert torch.allclose(images.known["object size"], areas, atol=0.015)
    x = images.pixels.float() / 255
    for n in range(60):
        inside = x[n][images.masks[n]].mean(0)
        outside = x[n][~images.masks[n]].mean(0)
        contrast = (inside - outside).abs().mean().item()
        assert contrast == pytest.approx(images.known["object contrast"][n].item(), abs=0.15)
    assert images.select(torch.tensor([5])).known["distractors"] == images.known["distractors"][5]


def right_where(right, labels, network=BASELINE):
    called = torch.where(right, labels, (labels + 1) % 4)
    return evaluation(called, torch.full((len(labels),), 0.9), labels, network=network)


def associations(images, rights):
    """Of networks that are right where `rights` say so."""
    found = []
    for network, right in zip((BASELINE, SE), rights, strict=True):
        runs = [right_where(right, images.labels, network)]
        for attribute in main.image_attributes(images):
            found.append(main.associate(network, attribute, runs, STATISTICS))
    return found


def test_what_makes_networks_fail_is_found():
    images = main.draw_shapes(600, 5)
    images = dataclasses.replace(images, labels=images.labels % 4)
    rng = np.random.default_rng(0)
    size = images.known["object size"].numpy()
    chance = np.interp(scipy.stats.rankdata(size) / 600, [0, 1], [0.5, 0.95])
    rights = [torch.from_numpy(rng.random(600) < chance) for _ in range(2)]
    found = associations(images, rights)
    common = main.common_to_all(found, 0.05)
    assert common[0][0].attribute == "object size" and common[0][0].correlation.value < 0
    assert {one.network.key for one in common[0]} == {"baseline", "se_attention"}
    said = main.say_common(common[:1])
    assert said.startswith("Mistakes of all networks go with less object size (-0.")
    error = [interval.value for interval in common[0][0].error]
    assert error[0] > error[-1] + 15
    fifth = np.argsort(size)[:120]
    wrong = ~rights[0].numpy()[fifth]
    assert error[0] == pytest.approx(100 * wrong.mean())
    reference = scipy.stats.spearmanr(size, ~rights[0].numpy())
    assert common[0][0].correlation.value == pytest.approx(reference.statistic)
    # only one network's weakness is not common to all
    mixed = associations(images, [rights[0], torch.from_numpy(rng.random(600) < 0.7)])
    assert "object size" not in [group[0].attribute for group in main.common_to_all(mixed, 0.05)]
    assert main.say_common([]).startswith("None of the attributes")


def test_where_nothing_makes_them_fail_nothing_is_claimed(dossier):
    """Errors shuffled, of both networks alike: in 95 of 100 runs at least nothing is found."""
    _, data, evaluations, _ = dossier
    rng = np.random.default_rng(0)
    attributes = main.image_attributes(data.test)
    wrong = [~evaluations[network.key][0].correct for network in (BASELINE, SE)]
    claims = 0
    for _ in range(100):
        order = rng.permutation(len(data.test))
        found = []
        for network, of_network in zip((BASELINE, SE), wrong, strict=True):
            runs = [
                right_where(torch.from_numpy(~of_network[order]), data.test.labels % 4, network)
            ]
            for attribute in attributes:
                found.append(main.associate(network, attribute, runs, STATISTICS))
        claims += len(main.common_to_all(found, 0.05)) > 0
    assert claims <= 5


def test_a_planted_weakness_is_found(tmp_path):
    """Networks that have never seen a dark ground fail on dark images, and that is said."""
    arguments = tiny(tmp_path, "--shapes-train", "4000", "--shapes-test", "1000", "--epochs", "8")
    settings = main.parse_settings([*arguments, "--widths", "32", "64", "64"])
    hardware = main.prepare_machine(settings)
    data = main.load_data(settings)
    ground = data.train.pixels.double().numpy()[:, [0, 0, -1, -1], [0, -1, 0, -1]].mean((1, 2))
    bright = torch.from_numpy(ground > 140)
    split = data.splits[42]
    kept = main.Split(*(part[bright[part]] for part in (split.training, split.validation)))
    data = dataclasses.replace(data, splits={42: kept})
    trained = main.train_all(main.training_jobs(settings), data, hardware)
    evaluations = main.evaluate_all(trained, data, hardware)
    failures = main.study_failures(evaluations, data, settings)
    by_attribute = {group[0].attribute: group for group in failures.common}
    assert by_attribute["brightness"][0].correlation.high < -0.2
    assert "less brightness" in main.say_common(failures.common)


# Labels


def test_exchanged_labels_are_found(dossier):
    """Of the test images' labels one in a hundred is exchanged: most are found, and little else."""
    _, data, evaluations, _ = dossier
    rng = np.random.default_rng(0)
    hits = found = exchanged = 0
    for _ in range(5):
        labels = data.test.labels.clone()
        index = rng.choice(len(labels), len(labels) // 100, replace=False)
        labels[index] = (labels[index] + torch.from_numpy(rng.integers(1, 10, len(index)))) % 10
        test = dataclasses.replace(data.test, labels=labels)
        again = {}
        for key, (run,) in evaluations.items():
            outputs = main.Outputs(run.features, run.logits)
            again[key] = [main.evaluate(run.trained, outputs, labels, run.held_out)]
        suspects = {one.index for one in main.find_suspects(again, test)}
        hits += len(suspects & set(index.tolist()))
        found += len(suspects)
        exchanged += len(index)
    print(f"label suspects: precision {hits / found:.2f}, recall {hits / exchanged:.2f}")
    assert hits / exchanged >= 0.6 and hits / found >= 0.5


def test_suspects_are_those_on_which_all_agree_surely():
    labels = torch.tensor([0] * 5 + [1] * 5)
    called = labels.clone()
    called[0] = called[1] = called[2] = 1
    confidence = torch.tensor([0.97, 0.97, 0.5] + [0.9] * 7)
    first = evaluation(called, confidence, labels)
    other_called = called.clone()
    other_called[1] = 2  # here they disagree
    other = evaluation(other_called, confidence, labels)
    test = main.Images(torch.zeros(10, 32, 32, 3, dtype=torch.uint8), labels)
    (suspect,) = main.find_suspects({"baseline": [first], "se_attention": [other]}, test)
    assert (suspect.index, suspect.label, suspect.called) == (0, 0, 1)
    settings = main.Settings(statistics=main.StatisticsSettings(resamples=100))
    found = main.study_labels({"baseline": [first], "se_attention": [other]}, test, settings)
    assert found.accuracy["baseline"].value == pytest.approx(100 * 7 / 9)
    assert found.differences["se_attention"].interval.value == 0
    compared = main.compare(SE, [other], [first], labels, 2, settings)
    said = main.say_suspects(found, [compared], 10, 0.5)
    assert "Of 10 test labels, 1 is suspected" in said and "The verdict stands" in said
    assert "Without it accuracy is" in said


# By class


def test_precision_recall_and_f1_are_scikit_learns(dossier):
    _, data, evaluations, failures = dossier
    for found in failures.scores:
        (run,) = evaluations[found.network.key]
        report = classification_report(data.test.labels, run.predicted, output_dict=True)
        for label in range(10):
            expected = report[str(label)]
            assert found.precision[0, label] == pytest.approx(100 * expected["precision"])
            assert found.recall[0, label] == pytest.approx(run.class_accuracy[label], abs=1e-3)
            assert found.f1[0, label] == pytest.approx(100 * expected["f1-score"])
        assert found.f1.mean() == pytest.approx(100 * report["macro avg"]["f1-score"])


def test_confused_pairs_are_counted_by_hand():
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    sure = torch.full((8,), 0.9)
    first = evaluation(torch.tensor([1, 0, 0, 1, 2, 3, 3, 3]), sure, labels)
    other = evaluation(torch.tensor([0, 0, 0, 1, 2, 3, 3, 0]), sure, labels)
    settings = main.Settings(statistics=main.StatisticsSettings(resamples=100))
    pairs = main.find_confused_pairs(
        {"baseline": [first], "se_attention": [other]}, labels, settings
    )
    assert [(pair.first_class, pair.second_class) for pair in pairs] == [(0, 1), (2, 3)]
    assert pairs[0].error == {"baseline": 50, "se_attention": 25}
    assert pairs[0].change["se_attention"].value == -25
    assert pairs[1].error == {"baseline": 25, "se_attention": 25}


# The images


def test_failures_are_of_distinct_kinds_with_all_networks_answers():
    labels = torch.zeros(6, dtype=torch.long)
    test = main.Images(main.draw_shapes(6, 0).pixels, labels)
    recipe = main.Recipe(widths=(8, 8), stem=4)
    confidence = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.95, 0.9])
    called = torch.tensor([1, 1, 2, 0, 3, 0])
    first = evaluation(called, confidence, labels, model=main.build_network(BASELINE, recipe, 4))
    model = main.build_network(SE, recipe, 4)
    called = torch.tensor([1, 0, 0, 2, 0, 0])
    second = evaluation(called, confidence, labels, model=model, network=SE)
    groups = main.group_failures([first, second], test, suspected=[4], count=5)
    # of the two that the first calls 1, the surer; and not the one whose label is suspected
    assert [[image.index for image in group.images] for group in groups] == [
        [0, 2],
        [0, 3],
        [1, 2],
        [3],
    ]
    assert [(group.network, group.alone) for group in groups] == [
        (BASELINE, False),
        (SE, False),
        (BASELINE, True),
        (SE, True),
    ]
    for group in groups:
        for image in group.images:
            assert [answer.network for answer in image.answers] == [BASELINE, SE]
    assert [len(group.images) for group in main.group_failures([first, second], test, [], 1)] == [
        1
    ] * 4


# Pictures of one's own


def gradient(width, height):
    ramp = np.linspace(0, 255, width)[None, :, None] * np.ones((height, 1, 3))
    ramp[: height // 2, :, 1] = 255
    return ramp.astype(np.uint8)


def write_pictures(folder):
    """Pictures of every kind that can be read, by name."""
    picture = Image.fromarray(gradient(90, 60))
    picture.save(folder / "plain.png")
    picture.save(folder / "plain.jpg")
    picture.convert("CMYK").save(folder / "cmyk.jpg")
    picture.convert("L").save(folder / "grey.png")
    picture.convert("1").save(folder / "black and white.png")
    picture.convert("P").save(folder / "palette.gif")
    Image.fromarray(np.full((40, 50), 40_000, np.uint16)).save(folder / "deep.png")
    layer = picture.convert("RGBA")
    layer.putalpha(0)
    layer.save(folder / "clear.png")
    turned = Image.Exif()
    turned[0x0112] = 6  # taken with the camera on its side
    picture.save(folder / "turned.jpg", exif=turned)
    frames = [picture.convert("P"), picture.rotate(90).convert("P")]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    picture.save(folder / "webp $x_1$.webp")
    Image.new("L", (1, 1)).save(folder / "dot.png")
    Image.new("L", (10_000, 10_000), 90).save(folder / "huge.png")
    return sorted(path for path in folder.iterdir())


def test_pictures_of_all_kinds_are_read(tmp_path):
    found = {path.name: main.read_picture(path) for path in write_pictures(tmp_path)}
    for picture in found.values():
        assert picture.square.shape[0] == picture.square.shape[1] <= main.LARGEST_SIDE
        assert picture.small.shape == (32, 32, 3) and picture.small.dtype == np.uint8
    plain = found["plain.png"].square
    assert np.array_equal(plain, gradient(90, 60)[:, 15:75])
    assert np.abs(found["cmyk.jpg"].square.astype(int) - plain).mean() < 25
    assert abs(int(found["deep.png"].small.mean()) - 40_000 // 256) <= 1
    assert found["clear.png"].small.min() == 255  # all transparent: white
    assert found["moving.gif"].frames == 2
    upright = np.rot90(gradient(90, 60), -1)[15:75]
    assert np.abs(found["turned.jpg"].square.astype(int) - upright).mean() < 5
    assert found["huge.png"].square.shape == (1024, 1024, 3)


def test_ones_own_pictures_are_classified(tiny_run, tmp_path, capsys):
    shutil.copytree(tiny_run, tmp_path / "run")
    folder = tmp_path / "pictures"
    folder.mkdir()
    paths = write_pictures(folder)
    main.main(tiny(tmp_path / "run", "--predict", *map(str, paths)))
    lines = capsys.readouterr().out.splitlines()
    for path, line in zip(paths, lines, strict=False):
        assert line.startswith(f"{path}: Baseline ") and line.count("%") >= 6
    assert len(lines) == len(paths) + 1
    drawn = {path.name for path in (tmp_path / "run" / "predictions").iterdir()}
    assert len(drawn) == len(paths) and "plain_2.png" in drawn


def test_a_test_image_is_called_what_the_run_called_it(tiny_run, tmp_path, capsys):
    settings = main.parse_settings(tiny(tiny_run))
    test = main.load_data(settings).test
    shutil.copytree(tiny_run, tmp_path / "run")
    predictions = pd.read_csv(tiny_run / "results" / "predictions.csv")
    paths = []
    for n in range(8):
        paths.append(tmp_path / f"{n}.png")
        Image.fromarray(test.pixels[n].numpy()).save(paths[-1])
    main.main(tiny(tmp_path / "run", "--predict", *map(str, paths)))
    lines = capsys.readouterr().out.splitlines()
    unlike = 0
    for n, line in enumerate(lines[:8]):
        found = re.search(r"Baseline (\w+) (\d+)%.*SE-Attention (\w+) (\d+)%", line)
        assert found[1] == predictions.baseline_predicted[n]
        assert found[3] == predictions.se_attention_predicted[n]
        unlike += "unlike" in line
    assert unlike <= 2


def test_what_is_no_picture_costs_a_line(tiny_run, tmp_path, capsys):
    shutil.copytree(tiny_run, tmp_path / "run")
    Image.fromarray(gradient(40, 40)).save(tmp_path / "good.png")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:60])
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    (tmp_path / "folder.png").mkdir()
    Image.fromarray(np.zeros((9, 9), np.float32)).save(tmp_path / "float.tiff")
    bad = ["empty.png", "text.png", "cut.png", "bomb.png", "folder.png", "float.tiff", "absent.png"]
    names = [*bad[:3], "good.png", *bad[3:]]
    paths = [str(tmp_path / name) for name in names]
    with pytest.raises(SystemExit) as ended:
        main.main(tiny(tmp_path / "run", "--predict", *paths))
    assert ended.value.code == 1
    said = capsys.readouterr()
    lines = said.err.splitlines()
    for name, line in zip(bad, lines, strict=True):
        assert line.startswith("main.py: ") and str(tmp_path / name) in line
    assert "good.png: Baseline" in said.out
    assert [path.name for path in (tmp_path / "run" / "predictions").iterdir()] == ["good.png"]


def test_no_figure_is_written_over_another(tiny_run, tmp_path, capsys):
    shutil.copytree(tiny_run, tmp_path / "run")
    paths = []
    for name in ("a.png", "a.bmp", "a_2.png", "a.tif"):
        paths.append(str(tmp_path / name))
        Image.fromarray(gradient(40, 40)).save(paths[-1])
    main.main(tiny(tmp_path / "run", "--predict", *paths))
    drawn = {path.name for path in (tmp_path / "run" / "predictions").iterdir()}
    assert drawn == {"a.png", "a_2.png", "a_2_2.png", "a_3.png"}


def test_pictures_train_nothing(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main.main(tiny(tmp_path, "--retrain", "--predict", "a.png"))
    assert ended.value.code == 2
    assert "argument --retrain: can't go with --predict" in capsys.readouterr().err


def test_no_picture_at_all_is_a_usage_error(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main.main(tiny(tmp_path, "--predict"))
    assert ended.value.code == 2 and not list(tmp_path.iterdir())
    assert "argument --predict: names no picture" in capsys.readouterr().err


def test_pictures_without_trained_networks_say_what_to_run(tiny_run, tmp_path, capsys):
    Image.fromarray(gradient(40, 40)).save(tmp_path / "good.png")
    picture = ["--predict", str(tmp_path / "good.png")]
    said = refused(capsys, *tiny(tmp_path / "nothing", *picture))
    assert "run main.py first" in said
    run = shutil.copytree(tiny_run, tmp_path / "run")
    (run / "models" / "se_attention_model.pth").unlink()
    assert "se_attention_model.pth is missing" in refused(capsys, *tiny(run, *picture))
    shutil.copy(tiny_run / "models" / "se_attention_model.pth", run / "models")
    familiar = json.loads((run / main.FAMILIAR_FILE).read_text())
    familiar["networks"]["baseline"]["fingerprint"] = "another"
    (run / main.FAMILIAR_FILE).write_text(json.dumps(familiar))
    assert "is not what" in refused(capsys, *tiny(run, *picture))
    (run / main.FAMILIAR_FILE).write_text("{")
    assert "is damaged" in refused(capsys, *tiny(run, *picture))
    said = refused(capsys, *tiny(tiny_run, *picture, "--epochs", "3"))
    assert "was trained otherwise" in said
