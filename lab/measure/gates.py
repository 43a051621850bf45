"""What the gates of channel attention learnt.

In come a model with a `Gated` block after each stage, and images; out come the gates' means by
class, how much of their variance that explains, and accuracy with all gates held at their means.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from lab.data.images import Images
from lab.machine.device import Hardware
from lab.measure.evaluation import accuracy_of, logits_of
from lab.measure.models import Gated, Model, mean_over_pixels


class FixedGates(nn.Module):
    """Attention that gives every image the same gates."""

    def __init__(self, gates: Tensor) -> None:
        super().__init__()
        self.gates = gates  # [C]

    def forward(self, activations: Tensor) -> Tensor:
        return activations * self.gates.type_as(activations)[:, None, None]


@dataclass(frozen=True)
class Scores:
    """What the attention of a network learnt (Hu et al., TPAMI 2020, section 7)."""

    mean_by_class: tuple[np.ndarray, ...]  # for each stage float32 [classes, channels]
    share_between_classes: tuple[float, ...]  # of the gates' variance, for each stage
    accuracy_as_learnt: float  # percent
    accuracy_at_means: float  # percent, with all gates held at their means over the images


def study(model: Model, images: Images, classes: int, hardware: Hardware) -> Scores | None:
    """The gates of a trained network on some images; None where it has none in some stage."""
    frozen = copy.deepcopy(model)
    mean_by_class = []
    shares = []
    for k, block in enumerate(model.attention):
        if not isinstance(block, Gated):
            return None
        gates = gates_of(model, block, images, hardware)  # [N, C]
        means = torch.stack([gates[images.labels == label].mean(0) for label in range(classes)])
        between = means[images.labels].var(0).sum()
        mean_by_class.append(means.numpy())
        shares.append(float(between / gates.var(0).sum().clamp_min(1e-12)))
        frozen.attention[k] = FixedGates(gates.mean(0).to(hardware.device))
    return Scores(
        mean_by_class=tuple(mean_by_class),
        share_between_classes=tuple(shares),
        accuracy_as_learnt=accuracy_of(model, images, hardware),
        accuracy_at_means=accuracy_of(frozen, images, hardware),
    )


def gates_of(model: Model, block: Gated, images: Images, hardware: Hardware) -> Tensor:
    """The gates of one block of `model` on images: float32 [N, C] on the CPU."""
    recorded: list[Tensor] = []

    def record(_: nn.Module, inputs: tuple[Tensor]) -> None:
        gate_logits = block.gate_logits(mean_over_pixels(inputs[0]))
        recorded.append(gate_logits.float().sigmoid())

    hook = block.register_forward_pre_hook(record)
    logits_of(model, images.pixels, hardware)
    hook.remove()
    return torch.cat(recorded).cpu()
