"""Pictures of one's own: read from any format, classified by a run's networks, never in vain."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from helpers import refused, tiny
from PIL import Image

import main
from lab.machine import device
from lab.report import drawing, pictures, records


@pytest.fixture(autouse=True)
def unmeasured(monkeypatch):
    """Whether bfloat16 pays is not measured, which takes seconds where it does not."""
    monkeypatch.setattr(device, "bfloat16_speedup", lambda: 1.0)


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
    found = {path.name: pictures.read_picture(path) for path in write_pictures(tmp_path)}
    for picture in found.values():
        assert picture.square.shape[0] == picture.square.shape[1] <= pictures.LARGEST_SIDE
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


@pytest.mark.slow
def test_ones_own_pictures_are_classified(tiny_run, tmp_path, capsys):
    folder = tmp_path / "pictures"
    folder.mkdir()
    paths = write_pictures(folder)
    main.main(tiny(tiny_run, "--predict", *map(str, paths)))
    lines = capsys.readouterr().out.splitlines()
    for path, line in zip(paths, lines, strict=False):
        assert line.startswith(f"{path}: Baseline ") and line.count("%") >= 6
    assert len(lines) == len(paths) + 1
    drawn = {path.name for path in (tiny_run / "predictions").iterdir()}
    assert len(drawn) == len(paths) and "plain_2.png" in drawn


def test_a_test_image_is_called_what_the_run_called_it(tiny_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(drawing, "rendered", lambda *_: b"")  # only what is said is looked at
    settings = main.parse_settings(tiny(tiny_run))
    test = main.load_data(settings).test
    predictions = pd.read_csv(tiny_run / "results" / "predictions.csv")
    paths = []
    for n in range(8):
        paths.append(tmp_path / f"{n}.png")
        Image.fromarray(test.pixels[n].numpy()).save(paths[-1])
    main.main(tiny(tiny_run, "--predict", *map(str, paths)))
    lines = capsys.readouterr().out.splitlines()
    unlike = 0
    for n, line in enumerate(lines[:8]):
        found = re.search(r"Baseline (\w+) (\d+)%.*SE-Attention (\w+) (\d+)%", line)
        assert found[1] == predictions.baseline_predicted[n]
        assert found[3] == predictions.se_attention_predicted[n]
        unlike += "unlike" in line
    assert unlike <= 2


def test_what_is_no_picture_costs_a_line(tiny_run, tmp_path, capsys):
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
        main.main(tiny(tiny_run, "--predict", *paths))
    assert ended.value.code == 1
    said = capsys.readouterr()
    lines = said.err.splitlines()
    for name, line in zip(bad, lines, strict=True):
        assert line.startswith("main.py: ") and str(tmp_path / name) in line
    assert "good.png: Baseline" in said.out
    drawn = sorted(path.name for path in (tiny_run / "predictions").iterdir())
    assert drawn == ["good.png", "predictions.csv"]


def test_no_figure_is_written_over_another(tiny_run, tmp_path, capsys):
    paths = []
    for name in ("a.png", "a.bmp", "a_2.png", "a.tif"):
        paths.append(str(tmp_path / name))
        Image.fromarray(gradient(40, 40)).save(paths[-1])
    main.main(tiny(tiny_run, "--predict", *paths))
    drawn = {path.name for path in (tiny_run / "predictions").glob("*.png")}
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
    said = refused(capsys, *tiny(tiny_run, *picture, "--epochs", "3"))
    assert "was trained otherwise" in said
    weights = tiny_run / "models" / "se_attention_model.pth"
    weights.rename(tmp_path / "weights")
    assert "se_attention_model.pth is missing" in refused(capsys, *tiny(tiny_run, *picture))
    (tmp_path / "weights").rename(weights)
    known = tiny_run / records.FAMILIAR_FILE
    familiar = json.loads(known.read_text())
    familiar["networks"]["baseline"]["fingerprint"] = "another"
    known.write_text(json.dumps(familiar))
    assert "is not what" in refused(capsys, *tiny(tiny_run, *picture))
    known.write_text("{")
    assert "is damaged" in refused(capsys, *tiny(tiny_run, *picture))
