"""What several files of tests share: small networks, made evaluations, the program as a process."""

import functools
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import main
from lab.measure.evaluation import HeldOut, Outputs, evaluate
from lab.measure.models import TrainedModel, build_network

MAIN = Path(main.__file__)
ROOT = MAIN.parent
SKETCHING = ROOT / "tests" / "sketching_main.py"  # main.py whose figures are empty
BASELINE, SE = main.NETWORKS[:2]
KEYS = [network.key for network in main.NETWORKS]
TINY = (
    "--dataset shapes --shapes-difficulty 0 --shapes-train 300 --shapes-test 100 "
    "--epochs 2 --batch-size 64 "
    "--stem 4 --widths 16 16 32 --reduction 4 --stress off"
).split()
STRESS = (
    "--stress full --stress-images 50 --attack-images 20 --attack-steps 3 "
    "--curve-images 10 --curve-steps 4 --score-resamples 50"
).split()
TRAINED = (
    "--dataset shapes --shapes-difficulty 0 --shapes-train 1500 --shapes-test 400 "
    "--epochs 12 --batch-size 64 "
    "--stem 8 --widths 16 32 64 --stress-images 200 --attack-images 50 --attack-steps 10 "
    "--curve-images 60 --foreign-images 400 --score-resamples 100 --precision fp32"
).split()


def tiny(output, *more):
    """Arguments of a run of a few seconds that writes to `output`."""
    return [*TINY, "--output-dir", str(output), *more]


def run_main(*arguments, program=MAIN, **environment):
    """main.py in a process of its own, with more in the environment."""
    return subprocess.run(
        [sys.executable, str(program), *arguments],
        env={**os.environ, **environment}, capture_output=True, text=True, encoding="utf-8",
    )  # fmt: skip


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


def weights(output, network, seed=""):
    path = output / "models" / f"{network}_model{seed}.pth"
    return torch.load(path, weights_only=True)["state_dict"]


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


def small_recipe(**changes):
    return main.Recipe(**{"stem": 4, "widths": (16, 16, 32), "reduction": 4, **changes})


def small_network(network, **changes):
    return build_network(network, small_recipe(**changes), classes=10)


def evaluation_of(called, confidence, labels, classes=4, model=None, network=BASELINE):
    """Of a network that calls images what `called` says, with given confidences."""
    rest = ((1 - confidence) / (classes - 1))[:, None].expand(-1, classes)
    chances = rest.scatter(1, called[:, None], confidence[:, None])
    outputs = Outputs(torch.zeros(len(labels), 2), chances.log())
    trained = TrainedModel(network, 42, model, None)
    return evaluate(trained, outputs, labels, HeldOut(outputs, labels))


def bounds(interval):
    return interval.low, interval.high


def look_up(record, path):
    """What nested dictionaries and lists hold at "a/0/b"."""
    for part in path.split("/"):
        record = record[int(part)] if isinstance(record, list) else record[part]
    return record


@functools.cache
def run_record(run):
    """What docs/runs/ holds of a run."""
    return json.loads((ROOT / "docs" / "runs" / f"{run}.json").read_text())
