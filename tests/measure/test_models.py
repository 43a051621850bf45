"""What the parts of a network cost, counted by hand."""

from helpers import BASELINE, SE, small_network

from lab.measure import models


def test_costs_are_counted():
    convolutions = [
        (3, 8, 32),
        (8, 16, 32),
        (16, 16, 16),
        (16, 16, 16),
        (16, 16, 8),
        (16, 32, 8),
        (32, 32, 4),
    ]
    linear = [(16, 4), (4, 16)] * 2 + [(32, 8), (8, 32), (32, 10)]
    multiply_adds = sum(9 * i * o * s * s for i, o, s in convolutions) + sum(
        i * o for i, o in linear
    )
    parameters = sum(9 * i * o + 2 * o for i, o, _ in convolutions[1:]) + sum(
        i * o + o for i, o in linear
    )
    parameters += 9 * 3 * 8  # the stem has no batch norm
    layers = models.layer_costs(small_network(SE))
    assert sum(layer.parameters for layer in layers) == parameters
    assert sum(layer.multiply_adds for layer in layers) == multiply_adds
    assert [layer.name for layer in layers][:3] == ["stem", "stage 1", "attention 1"]
    assert "attention 1" not in [
        layer.name for layer in models.layer_costs(small_network(BASELINE))
    ]
