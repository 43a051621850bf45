"""People's answers: found, fetched, and refused where they are not of these images."""

import dataclasses
import hashlib
import http.server
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import refused
from torchvision.datasets import CIFAR10

import main
from lab.data import cifar10h, download
from lab.machine.options import UserError

RNG = np.random.default_rng(0)
LABELS = torch.from_numpy(np.arange(200) % 10)
COUNTS = RNG.multinomial(3, np.full(10, 0.1), 200).astype(float)
COUNTS[np.arange(200), LABELS] += 47


def put(folder, answers, name=cifar10h.COUNTS, within=cifar10h.FOLDER):
    (folder / within).mkdir(parents=True, exist_ok=True)
    np.save(folder / within / name, answers)
    return folder


@pytest.mark.parametrize("within", [cifar10h.FOLDER, ""])
@pytest.mark.parametrize(
    ("name", "answers"), [(cifar10h.COUNTS, COUNTS), (cifar10h.SHARES, COUNTS / 50)]
)
def test_counts_and_shares_are_read_where_they_lie(tmp_path, name, answers, within):
    shares = cifar10h.find(put(tmp_path, answers, name, within), LABELS)
    assert (shares.dtype, shares.shape) == (torch.float64, (200, 10))
    assert np.allclose(shares.numpy(), COUNTS / 50)


def test_where_they_are_absent_one_line_says_where_they_come_from(tmp_path, capsys):
    assert cifar10h.find(tmp_path, LABELS) is None
    (line,) = capsys.readouterr().out.splitlines()
    assert str(tmp_path / "cifar10h") in line and cifar10h.ARCHIVE.mirrors[0] in line


def spoilt(index, value):
    answers = COUNTS.copy()
    answers[index] = value
    return answers


@pytest.mark.parametrize(
    ("answers", "problem"),
    [
        (COUNTS[:100], r"float64 \[100, 10\], not numbers \[200, 10\]"),
        (COUNTS[:, :9], r"float64 \[200, 9\]"),
        (COUNTS.ravel(), r"float64 \[2000\]"),
        (COUNTS.astype(str), r"<U"),
        (spoilt(3, np.nan), "no counts of answers"),
        (spoilt((0, 0), -1), "no counts of answers"),
        (spoilt(5, 0), "no counts of answers"),
        (COUNTS[::-1], "another order: most people's answer is the label on 0 %"),
        (np.roll(COUNTS, 1, 1), "another order"),
    ],
)
def test_answers_to_other_images_are_refused(tmp_path, answers, problem):
    with pytest.raises(UserError, match=problem) as error:
        cifar10h.find(put(tmp_path, answers), LABELS)
    assert cifar10h.COUNTS in str(error.value) and "delete it" in str(error.value)


@pytest.mark.parametrize("content", [b"", b"no array", b"\x93NUMPY\x01\x00"])
def test_what_is_no_array_is_refused(tmp_path, content):
    folder = put(tmp_path, COUNTS)
    (folder / cifar10h.FOLDER / cifar10h.COUNTS).write_bytes(content)
    with pytest.raises(UserError, match="is no array"):
        cifar10h.find(folder, LABELS)


def test_several_arrays_are_refused(tmp_path):
    folder = put(tmp_path, COUNTS)
    with (folder / cifar10h.FOLDER / cifar10h.COUNTS).open("wb") as file:
        np.savez(file, COUNTS, COUNTS)
    with pytest.raises(UserError, match="holds several arrays"):
        cifar10h.find(folder, LABELS)


def test_wrong_answers_end_the_run_before_training(cifar10_dir, tmp_path, monkeypatch, capsys):
    (tmp_path / "cifar-10-batches-py").symlink_to(f"{cifar10_dir}/cifar-10-batches-py")
    put(tmp_path, COUNTS)
    monkeypatch.setattr(main, "train_all", None)  # calling it would fail
    places = ["--data-dir", str(tmp_path), "--output-dir", str(tmp_path / "out")]
    message = refused(capsys, *places, "--precision", "fp32")
    assert "cifar10h-counts.npy holds float64 [200, 10], not numbers [10000, 10]" in message


def test_real_answers_are_the_test_images(cifar10_dir, tmp_path):
    labels = torch.tensor(CIFAR10(cifar10_dir, train=False).targets)
    if not (Path(cifar10_dir) / cifar10h.FOLDER).exists():
        pytest.skip("CIFAR-10H is not there")
    shares = cifar10h.find(Path(cifar10_dir), labels)
    assert (shares.argmax(1) == labels).double().mean() > 0.99
    path = Path(cifar10_dir) / cifar10h.FOLDER / cifar10h.COUNTS
    assert cifar10h.ARCHIVE.is_at(path) and path.stat().st_size == cifar10h.ARCHIVE.size


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A folder that is served, as the only place that people's answers come from."""
    served = tmp_path / "served"
    served.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *more):
            super().__init__(*more, directory=served)

        def log_message(self, *_):
            pass

    started = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=started.serve_forever, args=[0.02], daemon=True).start()
    np.save(served / cifar10h.COUNTS, COUNTS)
    content = (served / cifar10h.COUNTS).read_bytes()
    archive = dataclasses.replace(
        cifar10h.ARCHIVE,
        size=len(content),
        hash=hashlib.sha256(content).hexdigest(),
        mirrors=(f"http://127.0.0.1:{started.server_port}/{cifar10h.COUNTS}",),
    )
    monkeypatch.setattr(cifar10h, "ARCHIVE", archive)
    yield served
    started.shutdown()


PATIENCE = download.Settings(mirror="http://127.0.0.1:1/", connect_seconds=1, slow_seconds=1)


def test_they_are_fetched_beside_cifar10(server, tmp_path):
    """Not from the mirror that was named for CIFAR-10."""
    cifar10h.fetch(tmp_path / "data", PATIENCE)
    assert torch.equal(cifar10h.find(tmp_path / "data", LABELS), torch.from_numpy(COUNTS / 50))
    for path in server.iterdir():
        path.unlink()
    cifar10h.fetch(tmp_path / "data", PATIENCE)  # what is there is not fetched again


@pytest.mark.parametrize("content", [None, b"<html>", b"\0" * 16128])
def test_what_cannot_be_had_costs_a_line(server, tmp_path, capsys, content):
    path = server / cifar10h.COUNTS
    assert path.stat().st_size == 16128
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    cifar10h.fetch(tmp_path / "data", PATIENCE)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("CIFAR-10H could not be downloaded") and "SHA256 " in line
    assert not list((tmp_path / "data").rglob("*"))
