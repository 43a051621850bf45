"""Fixtures: small runs on drawn shapes, made once per session, and the place of real CIFAR-10 where it is given."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

import main

TINY = ("--dataset", "shapes", "--shapes-train", "300", "--shapes-test", "100", "--epochs", "2", "--batch-size", "64")
TINY += ("--stem", "4", "--widths", "16", "16", "32", "--reduction", "4", "--stress", "off")
STRESS = ("--stress", "full", "--stress-images", "50", "--curve-images", "10", "--curve-steps", "4", "--pgd-steps", "3")


def tiny(output: Path, *more: str) -> list[str]:
    """Arguments of a run of a few seconds that writes to `output`."""
    return [*TINY, "--output-dir", str(output), *more]


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """The output folder of a finished tiny run, stress tests and all."""
    output = tmp_path_factory.mktemp("tiny")
    main.main(tiny(output, *STRESS))
    return output


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Settings, data and both networks, trained on shapes until they know them."""
    output = tmp_path_factory.mktemp("trained")
    arguments = ["--dataset", "shapes", "--shapes-train", "2500", "--shapes-test", "400", "--epochs", "10"]
    arguments += ["--batch-size", "64", "--stem", "8", "--widths", "32", "64", "64", "--output-dir", str(output)]
    settings = main.parse_settings(arguments)
    main.prepare_process()
    hardware, data = main.choose_hardware(settings), main.load_data(settings)
    models = {t.network: t.model for t in main.train_all(data, settings, hardware)}
    return settings, hardware, data, models


@pytest.fixture
def cifar10_dir():
    if "CIFAR10_DIR" not in os.environ:
        pytest.skip("CIFAR10_DIR does not name a folder with CIFAR-10")
    return os.environ["CIFAR10_DIR"]
