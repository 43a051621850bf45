"""What needs a CUDA device: recorded steps, the same bits again, networks beside the CPU's."""

import pytest
import torch
from helpers import fingerprint, tiny

import main
from lab.machine.recorder import Recorder

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


LONGER = ["--shapes-train", "600", "--epochs", "5"]  # enough steps of each size to record them


def run(output, precision, *more):
    main.main(tiny(output, "--device", "cuda", "--precision", precision, *LONGER, *more))
    return fingerprint(output)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recorded_steps_give_the_bits_of_single_ones(tmp_path, monkeypatch, precision):
    recorded = run(tmp_path / "recorded", precision)
    assert recorded == run(tmp_path / "again", precision)
    monkeypatch.setattr(main, "Recorder", lambda step: step)
    assert recorded == run(tmp_path / "single", precision)


def test_steps_are_recorded_once_for_each_shape(tmp_path, monkeypatch):
    shapes, real = [], Recorder.record

    def note(self, pixels, labels):
        shapes.append(tuple(pixels.shape))
        return real(self, pixels, labels)

    monkeypatch.setattr(Recorder, "record", note)
    run(tmp_path, "bf16")
    assert sorted(shapes) == 2 * [(60, 24, 24, 3)] + 2 * [(60, 32, 32, 3)]


def test_a_resumed_training_gives_the_same_bits(tmp_path, monkeypatch):
    whole = run(tmp_path / "whole", "bf16")
    real = main.train_epoch

    def fail_late(training, step, epoch, hardware):
        if epoch == 3:
            raise KeyboardInterrupt
        return real(training, step, epoch, hardware)

    monkeypatch.setattr(main, "train_epoch", fail_late)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run(tmp_path / "resumed", "bf16")
    monkeypatch.setattr(main, "train_epoch", real)
    assert whole == run(tmp_path / "resumed", "bf16")


def test_the_gpu_learns_what_the_cpu_learns(tmp_path):
    def losses(device):
        settings = main.parse_settings(
            tiny(tmp_path / device, "--device", device, "--precision", "fp32")
        )
        hardware = main.prepare_machine(settings.machine, len(main.NETWORKS))
        data = main.load_data(settings)
        trained = main.train_all(main.training_jobs(settings), data, hardware)
        return [one.checkpoint.history[0].train_loss for one in trained]

    assert losses("cuda") == pytest.approx(losses("cpu"), rel=1e-3)
