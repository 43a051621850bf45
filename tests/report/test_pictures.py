"""Pictures of one's own: read from any format, classified by a run's networks, never in vain."""

import re
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import refused, tiny
from PIL import Image

import main
from lab.machine import device, files
from lab.machine.options import UserError
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
    assert len(lines) == len(paths) + 2
    assert lines[-2].startswith("Such a warning is given of 1 % of the test images, ")
    drawn = {path.name for path in (tiny_run / "predictions").glob("*.png")}
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
        # on one scale, temperature scaled, which the table of predictions names
        assert int(found[2]) == pytest.approx(100 * predictions.baseline_confidence[n], abs=0.51)
        assert int(found[4]) == pytest.approx(
            100 * predictions.se_attention_confidence[n], abs=0.51
        )
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
    assert drawn == ["good.png", "predictions.csv", "report.html"]


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
    familiar = files.read_tensors(known)
    familiar["networks"]["baseline"]["fingerprint"] = "another"
    files.write_tensors(known, familiar)
    assert "is not what" in refused(capsys, *tiny(tiny_run, *picture))
    known.write_bytes(b"{")
    assert "is damaged" in refused(capsys, *tiny(tiny_run, *picture))
    known.rename(known.with_suffix(".json"))
    said = refused(capsys, *tiny(tiny_run, *picture))
    assert "an earlier version: run main.py first, with the same options" in said


def test_a_picture_with_damaged_exif_is_read_unturned(tmp_path):
    """Some phones write such; only how it is to be turned is lost."""
    path = tmp_path / "phone.jpg"
    Image.fromarray(gradient(40, 40)).save(path, exif=b"Exif\x00\x00" + b"no TIFF header")
    picture = pictures.read_picture(path)
    assert picture.square.shape == (40, 40, 3)


@pytest.mark.parametrize("name", ["x" * 245, "猫" * 80])
def test_a_long_name_costs_no_figure(tiny_run, tmp_path, name):
    """A file's name and its figure's may be as long, but not those of what is written beside it."""
    path = tmp_path / f"{name}.png"
    Image.fromarray(gradient(40, 40)).save(path)
    main.main(tiny(tiny_run, "--predict", str(path)))
    (figure,) = (tiny_run / "predictions").glob("*.png")
    assert name.startswith(figure.stem) and len(figure.stem.encode()) > 100


def test_a_figure_that_cannot_be_written_costs_a_line(tiny_run, tmp_path, capsys, sketching):
    for name in ("a.png", "b.png"):
        Image.fromarray(gradient(40, 40)).save(tmp_path / name)
    (tiny_run / "predictions" / "a.png").mkdir(parents=True)
    paths = [str(tmp_path / name) for name in ("a.png", "b.png")]
    with pytest.raises(SystemExit) as ended:
        main.main(tiny(tiny_run, "--predict", *paths))
    assert ended.value.code == 1
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert line.startswith(f"main.py: {paths[0]}: its figure can't be written")
    assert (tiny_run / "predictions" / "b.png").exists()
    table = pd.read_csv(tiny_run / "predictions" / "predictions.csv")
    assert table.file.tolist() == [paths[0]] * 2 + [paths[1]] * 2  # what is known is kept


def test_names_that_differ_in_case_alone_have_figures_of_their_own():
    """Some disks take them for the same."""
    taken = set()
    names = []
    for stem in ("Cat", "cat", "CAT", "straße", "STRASSE"):
        names.append(pictures.free_name(stem, taken))
        taken.add(names[-1].casefold())
    assert names == ["Cat", "cat_2", "CAT_3", "straße", "STRASSE_2"]


def test_names_in_other_scripts_are_drawn_without_a_warning(tiny_run, tmp_path, capsys):
    path = tmp_path / "猫の写真.jpg"
    Image.fromarray(gradient(40, 40)).save(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=PendingDeprecationWarning)
        main.main(tiny(tiny_run, "--predict", str(path)))
    assert capsys.readouterr().err == ""
    assert (tiny_run / "predictions" / "猫の写真.png").exists()


def test_an_iphones_picture_says_what_reads_it(tmp_path):
    path = tmp_path / "IMG_1.HEIC"
    path.write_bytes(b"\0\0\0\x24ftypheic" + bytes(60))
    with pytest.raises(UserError, match="pip install pillow-heif reads those of iPhones"):
        pictures.read_picture(path)


def test_a_folder_means_its_pictures(tmp_path):
    for name in ("b.png", "a.JPG"):
        Image.fromarray(gradient(40, 40)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("none")
    (tmp_path / ".hidden.png").write_bytes(b"")
    found = pictures.find_pictures([tmp_path, tmp_path / "other.png"])
    assert [path.name for path in found] == ["a.JPG", "b.png", "other.png"]


def test_an_address_is_named_as_what_it_is():
    for address in ("https://example.org/cat.jpg", "http://x/y.png"):
        with pytest.raises(UserError) as raised:
            pictures.read_picture(Path(address))
        assert str(raised.value).startswith(f"{address} is an address: download the picture")
    with pytest.raises(UserError, match="there is no such file"):
        pictures.read_picture(Path("nothing_here/cat.jpg"))


def test_answers_are_in_a_table(tiny_run, tmp_path, sketching):
    path = tmp_path / "a, b.png"
    Image.fromarray(gradient(40, 40)).save(path)
    main.main(tiny(tiny_run, "--predict", str(path)))
    table = pd.read_csv(tiny_run / "predictions" / "predictions.csv")
    assert list(table.columns) == ["file", "network", "class", "confidence", "warned"]
    assert table.file.tolist() == [str(path)] * 2
    assert table.network.tolist() == ["baseline", "se_attention"]
    answers = main.classify(path, *tiny(tiny_run))
    for row in table.itertuples():
        likeliest, confidence = next(iter(answers[row.network].items()))
        assert (row[3], row.confidence) == (likeliest, pytest.approx(confidence, abs=1e-4))


def test_the_share_that_is_said_is_the_one_that_was_used(tiny_run, tmp_path, capsys, sketching):
    """The limit is of the run; what is asked for today does not change it."""
    path = tiny_run / records.FAMILIAR_FILE
    familiar = files.read_tensors(path)
    assert familiar["share"] == 0.99
    familiar["limit"] = -100.0
    files.write_tensors(path, familiar)
    picture = tmp_path / "a.png"
    Image.fromarray(gradient(40, 40)).save(picture)
    main.main(tiny(tiny_run, "--predict", str(picture), "--familiar-share", "0.5"))
    said = capsys.readouterr().out
    assert "(unlike what the networks learnt: stranger than 99% of the test images)" in said
    assert "Such a warning is given of 1 % of the test images, " in said
    for kind, told in familiar["told"].items():
        assert f"{told:.0f} % of {kind}" in said
