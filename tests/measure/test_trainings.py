"""Trainings and their files: the room alone, with a recipe and a training of its own."""

import dataclasses

import pytest
import torch
from torch import nn

from lab.machine.device import Hardware
from lab.machine.options import UserError
from lab.measure import trainings
from lab.measure.models import Checkpoint, Network, build_network, save_checkpoint
from lab.measure.trainings import Job

HARDWARE = Hardware(torch.device("cpu"), "fp32", "a machine", at_once=2)
LINEAR = Network(
    "linear", "Linear", "black", "o", lambda recipe, classes: nn.Linear(2, classes), ""
)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All that shapes the weights here."""

    seed: int
    width: int = 1

    def differences(self, recorded):
        return [f"width {recorded['width']}"] if recorded["width"] != self.width else []


def job(folder, seed=1, **changes):
    return Job(LINEAR, Recipe(seed, **changes), folder / f"{seed}.pth")


def train(one, precision="fp32", **changes):
    """The weights that the seed gives, as they are."""
    model = build_network(one.network, one.recipe, classes=3)
    settings = dataclasses.asdict(one.recipe)
    content = Checkpoint("linear", settings, precision, "here", {}, [], model.state_dict())
    save_checkpoint(one.path, dataclasses.replace(content, **changes))


def test_each_job_is_done_once_and_read_from_its_file(tmp_path):
    jobs = [job(tmp_path, seed) for seed in (1, 2, 3)]
    train(jobs[1])
    done = []

    def do(one):
        done.append(one.recipe.seed)
        train(one)

    trained = trainings.do_all(jobs, do, 3, HARDWARE)
    assert sorted(done) == [1, 3] and [one.seed for one in trained] == [1, 2, 3]
    for one in trained:
        fresh = build_network(LINEAR, Recipe(one.seed), 3)
        assert torch.equal(one.model.weight, fresh.weight) and not one.model.training
    assert len(trainings.do_all(jobs, do, 3, HARDWARE)) == 3 and len(done) == 2
    trainings.delete(jobs)
    assert not list(tmp_path.glob("*.pth"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"network": "conv"}, "trained otherwise, network conv (now linear)"),
        ({"precision": "bf16"}, "trained otherwise, precision bf16 (now fp32)"),
        ({"settings": {"width": 2}}, "trained otherwise, width 2:"),
        ({"state_dict": {}}, "does not hold this network's weights"),
        ({"optimizers": []}, "holds a training half done"),
    ],
)
def test_a_file_that_the_job_would_not_make_is_refused(tmp_path, changes, said):
    one = job(tmp_path)
    train(one, **changes)
    with pytest.raises(UserError) as refused:
        trainings.load(one.path, one, 3, "fp32")
    assert said in str(refused.value) and str(one.path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_arithmetic_is_that_of_the_files(tmp_path, capsys):
    first, second = jobs = [job(tmp_path, 1), job(tmp_path, 2)]
    assert trainings.agree_on_precision(jobs, "auto", 3, False, HARDWARE) is HARDWARE
    train(first, precision="bf16")
    agreed = trainings.agree_on_precision(jobs, "auto", 3, False, HARDWARE)
    assert agreed.precision == "bf16" and agreed.reason and "here, bf16" in capsys.readouterr().out
    train(second)
    with pytest.raises(UserError, match="different arithmetic"):
        trainings.agree_on_precision(jobs, "auto", 3, False, HARDWARE)
    retrained = trainings.agree_on_precision(jobs, "auto", 3, True, HARDWARE)
    assert retrained is HARDWARE and not first.path.exists()
