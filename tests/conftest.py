"""Fixtures: small runs on drawn shapes, made once per session, and the place of real CIFAR-10."""

import hashlib
import json
import os
import time

import pytest
import torch

import main

TINY = (
    "--dataset shapes --shapes-train 300 --shapes-test 100 --epochs 2 --batch-size 64 "
    "--stem 4 --widths 16 16 32 --reduction 4 --stress off"
).split()
STRESS = (
    "--stress full --stress-images 50 --attack-images 20 --attack-steps 3 "
    "--curve-images 10 --curve-steps 4"
).split()


def tiny(output, *more):
    """Arguments of a run of a few seconds that writes to `output`."""
    return [*TINY, "--output-dir", str(output), *more]


def comparison(output):
    """comparison.json of a finished run."""
    return json.loads((output / "results" / "comparison.json").read_text())


def without_times(value):
    """Results without seconds, and without --retrain, which changes none."""
    if isinstance(value, dict):
        return {
            key: without_times(inner)
            for key, inner in value.items()
            if key not in ("seconds", "retrain")
        }
    if isinstance(value, list):
        return [without_times(inner) for inner in value]
    return value


def weights(output, network):
    return torch.load(output / "models" / f"{network}_model.pth", weights_only=True)["state_dict"]


def fingerprint(output):
    """All weights of a run, hashed to the bit, and its numbers."""
    found = {}
    for path in sorted((output / "models").glob("*.pth")):
        state = torch.load(path, weights_only=True)["state_dict"]
        found[path.name] = hashlib.sha256(
            b"".join(value.numpy().tobytes() for value in state.values())
        ).hexdigest()
    assert found
    return found, without_times(comparison(output))


def wait_until(condition, process, seconds=120):
    """Wait while the program under test lives; fail when it has died, with what it said, or when
    the time is up."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, f"waited {seconds} s"
        time.sleep(0.05)


def refused(capsys, *arguments):
    """The one line in which main.py ends."""
    with pytest.raises(SystemExit) as ended:
        main.main(list(arguments))
    assert "\n" not in str(ended.value) and "Traceback" not in capsys.readouterr().err
    return str(ended.value)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """The output folder of a finished tiny run, stress tests and all."""
    output = tmp_path_factory.mktemp("tiny")
    main.main(tiny(output, *STRESS))
    return output


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Settings, hardware, data and both networks by key, trained on shapes until they know them."""
    output = tmp_path_factory.mktemp("trained")
    arguments = (
        "--dataset shapes --shapes-train 2500 --shapes-test 400 --epochs 10 --batch-size 64 "
        "--stem 8 --widths 32 64 64 --stress-images 200 --curve-images 60 --precision fp32"
    ).split()
    settings = main.parse_settings([*arguments, "--output-dir", str(output)])
    hardware = main.prepare_machine(settings)
    data = main.load_data(settings)
    networks = main.train_all(main.training_jobs(settings), data, hardware)
    return settings, hardware, data, {one.network.key: one for one in networks}


@pytest.fixture
def cifar10_dir():
    if "CIFAR10_DIR" not in os.environ:
        pytest.skip("CIFAR10_DIR does not name a folder with CIFAR-10")
    return os.environ["CIFAR10_DIR"]
