"""Recorded steps: where none can be recorded, training goes on in single ones."""

import torch

from lab.machine.recorder import Recorder


def test_where_none_can_be_recorded_training_goes_on(monkeypatch, capsys):
    """Some drivers, and some cards of AMD's, end a recording with an error."""
    steps = []

    def step(pixels, labels):
        steps.append(len(pixels))
        return pixels.float().mean(), labels.sum()

    def fail(*_):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    recorder = Recorder(step)
    monkeypatch.setattr(recorder, "record", fail)
    pixels = torch.arange(12).view(3, 4)
    for _ in range(recorder.first_calls + 3):
        mean, total = recorder(pixels, torch.tensor([1, 2]))
        assert mean == 5.5 and total == 3
    assert len(steps) == recorder.first_calls + 3
    line = " ".join(capsys.readouterr().out.split())
    assert line.count("single steps") == 1 and "not permitted when stream is capturing" in line
