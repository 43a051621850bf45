"""What the gates of channel attention learnt.

In come models with a `Gated` block after stages, images, and what the models give for them; out
come the gates' means by class, how much of their variance that explains, and accuracy with all
gates held at their means. Stages count from 1, and those without gates are left out.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from lab.data.images import Images
from lab.machine.device import Hardware
from lab.machine.pieces import Pieces
from lab.measure import statistics
from lab.measure.estimates import PERCENT, Estimate, estimate_mean, estimate_of_means
from lab.measure.evaluation import Evaluation, Outputs, logits_of
from lab.measure.models import Gated, Model, fingerprint
from lab.measure.statistics import Difference


class FixedGates(nn.Module):
    """Attention that gives every image the same gates."""

    def __init__(self, gates: Tensor) -> None:
        super().__init__()
        self.gates = gates  # [C]

    def forward(self, activations: Tensor) -> Tensor:
        return activations * self.gates.type_as(activations)[:, None, None]


@dataclass(frozen=True)
class SeedGates:
    """The gates of one seed's network, and what it answers with and without them."""

    mean_by_class: dict[int, np.ndarray]  # by stage: float32 [classes, channels]
    # By stage float64 [N, 2]: each image's squared distance from its class's mean, and from the
    # mean over all images, as far as they estimate variances
    spread: dict[int, np.ndarray]
    correct: np.ndarray  # bool [N]
    correct_at_means: np.ndarray  # bool [N], with all gates held at their means over the images


@dataclass(frozen=True)
class Scores:
    """What the attention of a network learnt (Hu et al., TPAMI 2020, section 7)."""

    mean_by_class: dict[int, np.ndarray]  # of the first seed, by stage: [classes, channels]
    share_between_classes: dict[int, Estimate]  # of the gates' variance, by stage
    accuracy_as_learnt: Estimate  # percent
    accuracy_at_means: Estimate  # percent, with all gates held at their means over the images
    # From these to those, in points: what the gates' answer to an image is worth. Once all networks
    # are known, p is corrected over them.
    change: Difference


def study(
    evaluations: Sequence[Evaluation],
    images: Images,
    classes: int,
    rules: statistics.Settings,
    seed: int,
    hardware: Hardware,
    pieces: Pieces,
) -> Scores:
    """The gates of each seed's network on the test images."""
    depends_on = {"images": fingerprint(images.tensors()), "classes": classes}
    by_seed = []
    for one in evaluations:
        look = partial(look_into, one.trained.model, one.outputs, images, classes, hardware)
        by_seed.append(one.measured_once(pieces, "gates", depends_on, look, SeedGates))
    return score(by_seed, rules, seed)


def score(by_seed: Sequence[SeedGates], rules: statistics.Settings, seed: int) -> Scores:
    """Scores from each seed's gates."""
    shares = {}
    for stage in by_seed[0].spread:
        spread = [of_seed.spread[stage] for of_seed in by_seed]
        shares[stage] = estimate_of_means(share_between, spread, rules, seed)
    correct = np.stack([of_seed.correct for of_seed in by_seed])
    at_means = np.stack([of_seed.correct_at_means for of_seed in by_seed])
    return Scores(
        mean_by_class=by_seed[0].mean_by_class,
        share_between_classes=shares,
        accuracy_as_learnt=estimate_mean(100.0 * correct, rules, 100, between=PERCENT),
        accuracy_at_means=estimate_mean(100.0 * at_means, rules, 100, between=PERCENT),
        change=statistics.judge_answers(correct.astype(int) - at_means, rules),
    )


def correct_over_networks(scores: Mapping[str, Scores], level: float) -> dict[str, Scores]:
    """The networks' scores by key, with the p of their changes corrected over them."""
    changes = {key: one.change for key, one in scores.items()}
    corrected = statistics.correct_by_key(changes, level)
    return {key: dataclasses.replace(one, change=corrected[key]) for key, one in scores.items()}


def has_gates(model: Model) -> bool:
    """Whether any stage of it has."""
    return any(isinstance(block, Gated) for block in model.attention)


def look_into(
    model: Model, outputs: Outputs, images: Images, classes: int, hardware: Hardware
) -> SeedGates:
    """The gates of one trained network on some images, for which it gives `outputs` with stages."""
    fixed = copy.deepcopy(model)
    mean_by_class = {}
    spread = {}
    for stage, gates in gates_of(model, outputs, hardware).items():
        means = torch.stack([gates[images.labels == label].mean(0) for label in range(classes)])
        mean_by_class[stage] = means.numpy()
        spread[stage] = spread_of(gates, means, images.labels)
        fixed.attention[stage - 1] = FixedGates(gates.mean(0).to(hardware.device))
    logits_at_means = logits_of(fixed, images.pixels, hardware)
    return SeedGates(
        mean_by_class=mean_by_class,
        spread=spread,
        correct=(outputs.logits.argmax(1) == images.labels).numpy(),
        correct_at_means=(logits_at_means.argmax(1) == images.labels).numpy(),
    )


@torch.no_grad()
def gates_of(model: Model, outputs: Outputs, hardware: Hardware) -> dict[int, Tensor]:
    """The gates by stage, float32 [N, C] on the CPU, which follow from its channels' means."""
    gates = {}
    of_stages = zip(model.attention, outputs.stages, strict=True)
    for stage, (block, channel_means) in enumerate(of_stages, start=1):
        if isinstance(block, Gated):
            with hardware.autocast():
                gate_logits = block.gate_logits(channel_means.to(hardware.device))
            gates[stage] = gate_logits.float().sigmoid().cpu()
    return gates


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
    """The share of the variance that lies between the classes, of means [2] of `spread_of`.

    Gates that no image changes, but by rounding, know nothing of classes.
    """
    within, total = mean_spread
    if total < 1e-12:
        return 0.0
    return float(1 - within / total)
