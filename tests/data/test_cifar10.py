"""CIFAR-10: where it is found, that it is whole and right, and how it is unpacked."""

import dataclasses
import subprocess
from pathlib import Path

import pytest
import torch
from helpers import refused, tiny

import main
from lab.data import cifar10, download
from lab.measure import stress

FP32 = ("--precision", "fp32")  # else it is measured, which takes seconds


def load(folder):
    return cifar10.load(folder, download.Settings())


@pytest.fixture
def batches(cifar10_dir):
    return Path(cifar10_dir) / "cifar-10-batches-py"


def test_the_folder_of_batches_itself_may_be_named(batches, tmp_path, monkeypatch):
    monkeypatch.setattr(cifar10, "fetch", None)  # calling it would fail
    (tmp_path / "my_copy").symlink_to(batches)
    for folder in (batches, tmp_path / "my_copy"):
        train, test = load(folder)
        assert len(train) == 50_000 and len(test) == 10_000
    monkeypatch.chdir(batches)
    assert len(load(Path())[0]) == 50_000


def test_batches_below_serve_where_those_in_the_folder_are_not_whole(
    batches, tmp_path, monkeypatch
):
    """As a download puts them there, when it finds a folder with but some of the batches."""
    monkeypatch.setattr(cifar10, "fetch", None)  # calling it would fail
    (tmp_path / "data_batch_1").symlink_to(batches / "data_batch_1")
    (tmp_path / "cifar-10-batches-py").symlink_to(batches)
    train, test = load(tmp_path)
    assert len(train) == 50_000 and len(test) == 10_000


def test_the_archive_itself_may_be_named(batches, tmp_path, monkeypatch):
    monkeypatch.setattr(cifar10, "fetch", None)  # calling it would fail
    (tmp_path / batches.name).symlink_to(batches)
    archive = tmp_path / "cifar-10-python.tar.gz"
    archive.write_bytes(b"")
    assert len(load(archive)[0]) == 50_000


@pytest.mark.parametrize(
    ("named", "home"),
    [
        ("data/cifar-10-batches-py", "data"),
        ("data/cifar-10-python.tar.gz", "data"),
        ("cifar-10-batches-py", "."),
        ("data", "data"),
    ],
)
def test_the_home_of_data(named, home):
    """There the archive is put and unpacked, and there CIFAR-10-C is looked for."""
    assert cifar10.home_of(Path(named)) == Path(home)


def test_a_damaged_folder_of_batches_is_mended_in_its_place(tmp_path, monkeypatch):
    fetched = []
    monkeypatch.setattr(cifar10, "fetch", lambda folder, _: fetched.append(folder))
    with pytest.raises(RuntimeError):
        load(tmp_path / "cifar-10-batches-py")
    assert fetched == [tmp_path]


def test_another_process_may_unpack_while_this_one_waits(tmp_path, monkeypatch):
    def open_cifar10(folder):
        if not (folder / "unpacked").exists():
            raise RuntimeError("Dataset not found or corrupted")
        return "train", "test"

    class Lock:
        def __init__(self, *_, **__):
            pass

        def __enter__(self):
            (tmp_path / "unpacked").touch()

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(cifar10, "open_parts", open_cifar10)
    monkeypatch.setattr(cifar10, "hold_lock", Lock)
    monkeypatch.setattr(cifar10, "fetch", None)  # calling it would fail
    assert load(tmp_path) == ("train", "test")


def test_a_read_only_folder_with_the_archive_alone_names_the_cure(tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", "ro,size=100k", "tmpfs", str(folder)]
    if subprocess.run(mounted, capture_output=True).returncode:
        pytest.skip("no right to mount a file system")
    try:
        arguments = ["--data-dir", str(folder), "--output-dir", str(tmp_path / "out"), *FP32]
        message = refused(capsys, *arguments)
    finally:
        subprocess.run(["umount", str(folder)], check=True)
    assert f"{folder} has no CIFAR-10 unpacked and can't be written to" in message
    assert "unpack cifar-10-python.tar.gz elsewhere" in message and "--data-dir" in message


def test_real_cifar10_is_read_right(cifar10_dir):
    unstressed = stress.Settings(stress="off")  # no other images are drawn beside it
    data = main.load_data(main.Settings(Path(cifar10_dir), stress_tests=unstressed))
    assert data.train.pixels.shape == (50000, 32, 32, 3)
    assert data.test.pixels.shape == (10000, 32, 32, 3)
    assert data.classes[0] == "airplane" and data.classes[9] == "truck"
    assert data.train.labels.bincount().tolist() == [5000] * 10
    split = data.splits[42]
    assert (len(split.training), len(split.validation)) == (45000, 5000)
    mean = data.train.select(split.training).pixels.double().mean((0, 1, 2)) / 255
    expected = torch.tensor([0.4914, 0.4822, 0.4465], dtype=torch.double)
    assert torch.allclose(mean, expected, atol=2e-3)


def test_damaged_cifar10_is_not_unpickled(cifar10_dir, tmp_path, monkeypatch):
    source = Path(cifar10_dir) / "cifar-10-batches-py"
    (tmp_path / source.name).mkdir()
    for file in source.iterdir():
        target = tmp_path / source.name / file.name
        if file.name == "data_batch_3":
            touch = f"cos\nsystem\n(S'touch {tmp_path / 'pwned'}'\ntR."
            target.write_bytes(touch.encode())
        else:
            target.symlink_to(file)
    nowhere = dataclasses.replace(cifar10.ARCHIVE, mirrors=("http://127.0.0.1:1/nobody-here",))
    monkeypatch.setattr(cifar10, "ARCHIVE", nowhere)
    arguments = ["--dataset", "cifar10", "--data-dir", str(tmp_path), *FP32]
    with pytest.raises(SystemExit) as ended:
        main.main(tiny(tmp_path / "out", *arguments))
    assert "could not be downloaded" in str(ended.value) and not (tmp_path / "pwned").exists()
