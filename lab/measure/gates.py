"""What the gates of channel attention learnt.

In come models with a `Gated` block after each stage, and images; out come the gates' means by
class, how much of their variance that explains, and accuracy with all gates held at their means.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from lab.data.images import Images
from lab.machine.device import Hardware
from lab.measure import statistics
from lab.measure.estimates import PERCENT, Estimate, estimate_mean
from lab.measure.evaluation import logits_of
from lab.measure.models import Gated, Model, mean_over_pixels
from lab.measure.statistics import Difference


class FixedGates(nn.Module):
    """Attention that gives every image the same gates."""

    def __init__(self, gates: Tensor) -> None:
        super().__init__()
        self.gates = gates  # [C]

    def forward(self, activations: Tensor) -> Tensor:
        return activations * self.gates.type_as(activations)[:, None, None]


@dataclass(frozen=True)
class StageGates:
    """The gates of one stage and seed."""

    mean_by_class: np.ndarray  # float32 [classes, channels]
    spread: np.ndarray  # float64 [N, 2]: each image's squared distance from its class's mean, and
    # from the mean over all images, as far as they estimate variances


@dataclass(frozen=True)
class SeedGates:
    """The gates of one seed's network, and what it answers with and without them."""

    stages: tuple[StageGates, ...]
    correct: np.ndarray  # bool [N]
    correct_at_means: np.ndarray  # bool [N], with all gates held at their means over the images


@dataclass(frozen=True)
class Scores:
    """What the attention of a network learnt (Hu et al., TPAMI 2020, section 7)."""

    mean_by_class: tuple[np.ndarray, ...]  # of the first seed: each stage's [classes, channels]
    share_between_classes: tuple[Estimate, ...]  # of the gates' variance, for each stage
    accuracy_as_learnt: Estimate  # percent
    accuracy_at_means: Estimate  # percent, with all gates held at their means over the images
    change: (
        Difference  # from these to those, in points: what the gates' answer to an image is worth
    )


def study(
    models: Sequence[Model],
    images: Images,
    classes: int,
    rules: statistics.Settings,
    seed: int,
    hardware: Hardware,
) -> Scores | None:
    """The gates of each seed's network on some images; None where some stage has none."""
    if not all(isinstance(block, Gated) for block in models[0].attention):
        return None
    by_seed = [look_into(model, images, classes, hardware) for model in models]
    shares = []
    for k in range(len(by_seed[0].stages)):
        spread = [of_seed.stages[k].spread for of_seed in by_seed]
        shares.append(estimate_mean(spread, rules, seed, of_means=share_between))
    correct = np.stack([of_seed.correct for of_seed in by_seed])
    at_means = np.stack([of_seed.correct_at_means for of_seed in by_seed])
    return Scores(
        mean_by_class=tuple(stage.mean_by_class for stage in by_seed[0].stages),
        share_between_classes=tuple(shares),
        accuracy_as_learnt=estimate_mean(100.0 * correct, rules, seed, 100, between=PERCENT),
        accuracy_at_means=estimate_mean(100.0 * at_means, rules, seed, 100, between=PERCENT),
        change=statistics.judge_answers(correct.astype(int) - at_means, rules),
    )


def look_into(model: Model, images: Images, classes: int, hardware: Hardware) -> SeedGates:
    """The gates of one trained network on some images."""
    gates_by_stage, logits = gates_and_logits(model, images, hardware)
    frozen = copy.deepcopy(model)
    stages = []
    for k, gates in enumerate(gates_by_stage):
        means = torch.stack([gates[images.labels == label].mean(0) for label in range(classes)])
        stages.append(StageGates(means.numpy(), spread_of(gates, means, images.labels)))
        frozen.attention[k] = FixedGates(gates.mean(0).to(hardware.device))
    logits_at_means = logits_of(frozen, images.pixels, hardware)
    return SeedGates(
        stages=tuple(stages),
        correct=(logits.argmax(1) == images.labels).numpy(),
        correct_at_means=(logits_at_means.argmax(1) == images.labels).numpy(),
    )


def spread_of(gates: Tensor, means: Tensor, labels: Tensor) -> np.ndarray:
    """Within the class and in all, [N, 2] of gates [N, C] and the classes' means [classes, C].

    The sum of squares over N minus the means that were taken from them, so that gates which know
    nothing of classes have no variance between these.
    """
    precise = gates.double()
    images = len(gates)
    within = (precise - means.double()[labels]).square().sum(1)
    total = (precise - precise.mean(0)).square().sum(1)
    of_classes = len(labels.unique())
    return torch.stack(
        [within * images / max(1, images - of_classes), total * images / max(1, images - 1)], dim=1
    ).numpy()


def share_between(mean_spread: np.ndarray) -> float:
    """The share of the variance that lies between the classes, of means [2] of `spread_of`."""
    within, total = mean_spread
    return float(1 - within / max(total, 1e-12))


def gates_and_logits(
    model: Model, images: Images, hardware: Hardware
) -> tuple[list[Tensor], Tensor]:
    """The gates of each stage, float32 [N, C] on the CPU, and the logits of the images."""
    recorded: list[list[Tensor]] = []
    hooks = []
    for block in model.attention:
        assert isinstance(block, Gated)
        of_stage: list[Tensor] = []
        recorded.append(of_stage)
        hooks.append(block.register_forward_pre_hook(partial(record, of_stage)))
    logits = logits_of(model, images.pixels, hardware)
    for hook in hooks:
        hook.remove()
    return [torch.cat(of_stage).cpu() for of_stage in recorded], logits


def record(of_stage: list[Tensor], block: Gated, inputs: tuple[Tensor]) -> None:
    """Append a block's gates for one batch."""
    gate_logits = block.gate_logits(mean_over_pixels(inputs[0]))
    of_stage.append(gate_logits.float().sigmoid())
