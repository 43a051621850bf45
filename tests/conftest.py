"""Fixtures: small runs on drawn shapes, made once for all test processes, and real CIFAR-10."""

import dataclasses
import os
import pickle
import shutil
import subprocess
from pathlib import Path

# Before anything imports torch: of several test processes, each has one core.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from filelock import FileLock
from helpers import STRESS, TRAINED, tiny
from sketches import sketch

import main
from lab.machine.device import prepare_machine
from lab.machine.pieces import Pieces
from lab.measure import failures, stress
from lab.measure.evaluation import evaluate_all
from lab.report import drawing, figures, writer


@pytest.fixture
def undrawn(monkeypatch):
    """A run draws no figures, which takes most of a small one's time."""
    monkeypatch.setattr(figures, "save", lambda *_: None)


@pytest.fixture
def sketching(monkeypatch):
    """A run's figures are there, and empty."""
    sketch(monkeypatch.setattr)


def make_once(tmp_path_factory, name, make):
    """A folder that all processes of pytest-xdist share, filled by the first that wants it.

    Continuous integration names one for all its calls of pytest in one environment.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    if "SHARED_BY_TESTS" in os.environ:
        folder = Path(os.environ["SHARED_BY_TESTS"])
        folder.mkdir(parents=True, exist_ok=True)
    shared = folder / f"shared_{name}"
    with FileLock(f"{shared}.lock"):
        if not shared.exists():
            make(folder / f"making_{name}")
            (folder / f"making_{name}").rename(shared)
    return shared


@pytest.fixture(scope="session")
def made_tiny_run(tmp_path_factory):
    """The output folder of a finished tiny run, stress tests and all, its figures empty; not to be
    changed."""

    def run_and_keep_results(folder):
        """The run; beside its files, what it found, caught on its way to them."""

        def write_and_keep(results, files):
            finish(results, files)
            hardware = dataclasses.replace(results.hardware, cancelled=None)  # has a lock
            picklable = dataclasses.replace(results, hardware=hardware)
            (folder / "results.pickle").write_bytes(pickle.dumps(picklable))

        finish = writer.finish
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(writer, "finish", write_and_keep)
            sketch(patch.setattr)
            main.main(tiny(folder / "output", *STRESS))

    return make_once(tmp_path_factory, "tiny", run_and_keep_results) / "output"


@pytest.fixture
def tiny_run(made_tiny_run, tmp_path):
    """A copy of a finished tiny run, stress tests and all."""
    return shutil.copytree(made_tiny_run, tmp_path / "tiny_run")


def train_on_shapes(output):
    """Settings, hardware, data and both networks, trained until they know shapes."""
    settings = main.parse_settings([*TRAINED, "--output-dir", str(output)])
    hardware = prepare_machine(settings.machine, len(main.NETWORKS))
    data = main.load_data(settings)
    return settings, hardware, data, main.train_all(main.training_jobs(settings), data, hardware)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Settings, hardware, data and both networks by key, trained on shapes until they know them."""
    output = make_once(tmp_path_factory, "trained", train_on_shapes)
    settings, hardware, data, networks = train_on_shapes(output)  # reads the weights
    return settings, hardware, data, {one.network.key: one for one in networks}


@pytest.fixture(scope="session")
def evaluated(trained):
    """The evaluations of these networks, by network."""
    _, hardware, data, networks = trained
    return evaluate_all(list(networks.values()), data, hardware)


@pytest.fixture(scope="session")
def outcome(trained, evaluated, tmp_path_factory):
    """The stress tests of these networks."""
    settings, hardware, data, _ = trained

    def test_under_stress(path):
        found = stress.run(
            evaluated,
            data,
            stress.choose(data, settings.stress_tests),
            settings.stress_tests,
            settings.rules,
            settings.recipe.seed,
            hardware,
            Pieces(),
        )
        path.write_bytes(pickle.dumps(found))

    return pickle.loads(make_once(tmp_path_factory, "outcome", test_under_stress).read_bytes())


@pytest.fixture(scope="session")
def stressed(outcome):
    """The same by network."""
    return {one.network.key: one for one in outcome.networks}


@pytest.fixture(scope="session")
def dossier(trained, evaluated):
    """The failures of these networks."""
    settings, _, data, _ = trained
    return failures.study(evaluated, data, settings.rules, 42)


@pytest.fixture(scope="session")
def results(made_tiny_run):
    """What a tiny run found, caught on its way to the files."""
    return pickle.loads((made_tiny_run.parent / "results.pickle").read_bytes())


@pytest.fixture
def style():
    with drawing.style():
        yield


@pytest.fixture
def cifar10_dir():
    if "CIFAR10_DIR" not in os.environ:
        pytest.skip("CIFAR10_DIR does not name a folder with CIFAR-10")
    return os.environ["CIFAR10_DIR"]


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 300 kB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
