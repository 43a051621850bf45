"""Other people's images: CIFAR-10-C's arrays, and data sets that a network should not know."""

import numpy as np
import PIL.Image
import pytest
import scipy.stats
import torch
from helpers import STRESS, comparison

import main
from lab.data import benchmarks, shapes
from lab.data.images import Dataset
from lab.machine.options import UserError
from lab.measure import corruptions, doubt, stress


@pytest.fixture
def official(tmp_path):
    """A data folder with CIFAR-10-C of 20 test images, unpacked one level too deep."""
    folder = tmp_path / "CIFAR-10-C" / "CIFAR-10-C"
    folder.mkdir(parents=True)
    shape = (100, 32, 32, 3)
    values = np.arange(100, dtype=np.uint8)[:, None, None, None]
    np.save(folder / "fog.npy", np.broadcast_to(values, shape))
    np.save(folder / "glass_blur.npy", np.zeros(shape, np.uint8))
    np.save(folder / "labels.npy", np.tile(np.arange(20) % 10, 5))
    (folder / "._fog.npy").write_bytes(b"Mac OS X notes")
    (tmp_path / "CIFAR-10-C" / "__MACOSX").mkdir()
    (tmp_path / "CIFAR-10-C" / "__MACOSX" / "._fog.npy").write_bytes(b"Mac OS X notes")
    return folder


LABELS = torch.arange(20) % 10


def find_official(folder):
    return benchmarks.find_official(folder, LABELS, corruptions.EXTRA)


def test_official_arrays_are_found_and_named(official, tmp_path, capsys):
    found = find_official(tmp_path)
    assert list(found) == ["fog", "glass_blur"]
    assert found["fog"].shape == (5, 20, 32, 32, 3) and found["fog"][2, 3, 0, 0, 0] == 43
    assert "2 arrays of CIFAR-10-C" in capsys.readouterr().out
    images = shapes.draw(20, 0)
    data = Dataset("CIFAR-10", tuple("abcdefghij"), ("a",), images, images, {}, found)
    assert corruptions.names_of(data) == ["fog", "glass_blur"]
    shown = corruptions.images_under("fog", data, torch.tensor([3, 7]), 42)
    assert shown[:, :, 0, 0, 0].tolist() == [[20 * k + 3, 20 * k + 7] for k in range(5)]


WRONG = {
    "fog.npy": np.zeros((100, 32, 32), np.uint8),
    "glass_blur.npy": np.zeros((100, 32, 32, 3), np.float32),
    "labels.npy": np.zeros(100),
    "object.npy": np.array([{"a": 1}], dtype=object),
    "short.npy": None,
}


def test_several_arrays_in_one_file_are_refused(official, tmp_path):
    with (official / "fog.npy").open("wb") as file:
        np.savez(file, WRONG["fog.npy"], WRONG["fog.npy"])
    with pytest.raises(UserError, match="fog.npy holds several arrays: delete it"):
        find_official(tmp_path)


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arrays_are_refused_before_training(official, tmp_path, name):
    if WRONG[name] is None:
        (official / name).write_bytes((official / "fog.npy").read_bytes()[:1000])
    else:
        np.save(official / name, WRONG[name], allow_pickle=True)
    with pytest.raises(UserError, match=f"{name} .*delete it, or fetch CIFAR-10-C again"):
        find_official(tmp_path)


def test_a_folder_without_arrays_is_mentioned(tmp_path, capsys):
    (tmp_path / "CIFAR-10-C").mkdir()
    assert find_official(tmp_path) == {}
    assert "holds no arrays" in capsys.readouterr().out


def test_extra_corruptions_alone_are_not_taken(official, tmp_path, capsys):
    """No mean is over them, which table, figures and paper tell of."""
    for name in ("fog", "glass_blur"):
        (official / f"{name}.npy").rename(official / f"{name}.not")
    (official / "fog.not").rename(official / "spatter.npy")
    assert find_official(tmp_path) == {}
    assert "its extra ones alone: corruptions are made here" in capsys.readouterr().out
    (official / "glass_blur.not").rename(official / "glass_blur.npy")
    assert set(find_official(tmp_path)) == {"spatter", "glass_blur"}


def test_foreign_images_are_read_where_they_lie(tmp_path, monkeypatch):
    def read(folder):
        if not (folder / "there").exists():
            raise RuntimeError("Dataset not found or corrupted")
        return np.full((30, 32, 32, 3), 7, np.uint8)

    def find(how_much):
        doubts = doubt.Settings(foreign_images=20)
        stress_tests = stress.Settings(how_much, doubt=doubts)
        recipe = main.Recipe(dataset="shapes", shapes_train=200)
        settings = main.Settings(tmp_path, recipe=recipe, stress_tests=stress_tests, shapes_test=20)
        return main.load_data(settings).foreign

    monkeypatch.setattr(benchmarks, "FOREIGN", {"SVHN": benchmarks.ForeignImages(read, ("there",))})
    assert list(find("full")) == ["noise"] and benchmarks.find_foreign(tmp_path, 20) == {}
    (tmp_path / "there").touch()
    found = find("full")
    assert list(found) == ["noise", "SVHN"]
    assert all(pixels.shape == (20, 32, 32, 3) for pixels in found.values())
    assert torch.equal(benchmarks.find_foreign(tmp_path, 20)["SVHN"], found["SVHN"])
    assert find("off") == {}


def test_textures_svhn_and_cifar100_are_read_as_torchvision_leaves_them(tmp_path, monkeypatch):
    """Their files made small, with checksums to match."""
    monkeypatch.setattr("torchvision.datasets.svhn.check_integrity", lambda *_: True)
    pictures = np.arange(32 * 32 * 3 * 4).reshape(32, 32, 3, 4) % 251
    labels = np.arange(4)[:, None] + 1
    scipy.io.savemat(tmp_path / "test_32x32.mat", {"X": pictures.astype(np.uint8), "y": labels})
    found = benchmarks.read_svhn(tmp_path)
    assert np.array_equal(found, np.moveaxis(pictures, 3, 0))

    folder = tmp_path / "dtd" / "dtd"
    (folder / "images" / "dots").mkdir(parents=True)
    (folder / "labels").mkdir()
    wide = np.zeros((64, 96, 3), np.uint8)
    wide[:, 16:80] = (10, 200, 30)  # the middle
    PIL.Image.fromarray(wide).save(folder / "images" / "dots" / "dots_1.jpg", quality=100)
    (folder / "labels" / "test1.txt").write_text("dots/dots_1.jpg\n")
    (found,) = benchmarks.read_textures(tmp_path)
    assert found.shape == (32, 32, 3)
    assert np.abs(found[:, 2:-2].astype(int) - (10, 200, 30)).max() <= 2  # but for the edges

    with pytest.raises(RuntimeError):
        benchmarks.read_cifar100(tmp_path)


def test_what_lies_there_packed_is_said(tmp_path, capsys):
    """As it is downloaded: else one would think that it is used."""
    labels = torch.zeros(10_000, dtype=torch.int64)
    (tmp_path / "CIFAR-10-C.tar").touch()
    assert benchmarks.find_official(tmp_path, labels, corruptions.EXTRA) == {}
    for name in ("cifar-100-python.tar.gz", "dtd-r1.0.1.tar.gz", "test_32x32.mat"):
        (tmp_path / name).write_bytes(b"not whole")
    assert benchmarks.find_foreign(tmp_path, 20) == {}
    said = capsys.readouterr().out
    for name in ("CIFAR-10-C.tar is not unpacked (tar -xf does that)",
                 "cifar-100-python.tar.gz is there, but CIFAR-100 is not unpacked",
                 "dtd-r1.0.1.tar.gz is there, but Textures", "test_32x32.mat is there, but SVHN"):
        assert name in said


@pytest.fixture
def new_test(tmp_path):
    """A data folder with CIFAR-10.1 of 30 images: its two files."""
    rng = np.random.default_rng(0)
    pixels = tmp_path / "CIFAR-10.1" / "cifar10.1_v6_data.npy"
    pixels.parent.mkdir()
    np.save(pixels, rng.integers(0, 256, (30, 32, 32, 3), np.uint8))
    labels = pixels.with_name("cifar10.1_v6_labels.npy")
    np.save(labels, (np.arange(30) % 10).astype(np.int32))
    return pixels, labels


def test_new_test_images_are_found_where_they_lie(new_test, tmp_path, capsys):
    pixels, labels = new_test
    found = benchmarks.find_new_test(tmp_path, 10)
    assert np.array_equal(found.pixels.numpy(), np.load(pixels))
    assert found.labels.dtype == torch.int64 and found.labels.tolist() == list(range(10)) * 3
    for path in new_test:
        path.rename(tmp_path / path.name)
    assert len(benchmarks.find_new_test(tmp_path, 10)) == 30
    (tmp_path / labels.name).unlink()
    assert benchmarks.find_new_test(tmp_path, 10) is None
    assert f"{tmp_path / pixels.name} is one of CIFAR-10.1's two files" in capsys.readouterr().out
    (tmp_path / pixels.name).unlink()
    assert benchmarks.find_new_test(tmp_path, 10) is None
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("which", "content", "problem"),
    [
        (0, np.zeros((30, 32, 32), np.uint8), "holds uint8 [30, 32, 32], not uint8"),
        (0, np.zeros((30, 32, 32, 3), np.float32), "holds float32"),
        (0, np.zeros((29, 32, 32, 3), np.uint8), "not whole numbers [29]"),
        (1, np.zeros(30), "holds float64 [30], not whole numbers [30]"),
        (1, np.full(30, 10), "labels from 10 to 10, of 10 classes"),
        (1, np.full(30, -1), "labels from -1 to -1, of 10 classes"),
    ],
)
def test_new_test_images_that_are_none_are_refused(new_test, tmp_path, which, content, problem):
    np.save(new_test[which], content)
    with pytest.raises(UserError) as refused:
        benchmarks.find_new_test(tmp_path, 10)
    assert problem in str(refused.value) and "fetch CIFAR-10.1 again" in str(refused.value)
