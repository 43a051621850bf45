"""What trained networks know of the images that they learnt, so that of any picture it can be said
whether it is unlike those.

In come evaluations; out come, for each network, its temperature and how its stages usually answer,
and for all together how far from that a picture may be. Tried beside other rules by
benchmarks/unfamiliar.py: early stages tell pictures of another make, late ones and the energy those
of other things.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lab.machine.device import Hardware
from lab.measure.evaluation import Evaluation, Outputs, energy, outputs_of
from lab.measure.models import fingerprint


@dataclass(frozen=True)
class Usual:
    """How the means over an image of a stage's channels are distributed: as a normal."""

    mean: Tensor  # float32 [C]
    whitening: Tensor  # float32 [C, C], after which all directions have deviation 1

    def distance(self, channels: Tensor) -> Tensor:
        """Of channels [N, C], in deviations (Mahalanobis; Lee et al., NeurIPS 2018): [N]."""
        return ((channels - self.mean) @ self.whitening).norm(dim=1)


@dataclass(frozen=True)
class Familiar:
    """What the first seed's network needs, beside its weights, to speak of any picture."""

    fingerprint: str  # of these weights
    temperature: float
    stages: tuple[Usual, ...]  # of the validation images
    scale_mean: Tensor  # float32 [stages + 1]: of each part of the strangeness, of test images
    scale_deviation: Tensor

    def strangeness(self, outputs: Outputs) -> Tensor:
        """How unlike the learnt images N others are: 0 is usual, 1 a deviation more: [N].

        The mean of the distances of all stages, and of the negative energy (Liu et al., NeurIPS
        2020).
        """
        parts = parts_of_strangeness(self.stages, outputs)
        return ((parts - self.scale_mean) / self.scale_deviation).mean(1)


IMAGES_OF_A_KIND = 200  # on which it is measured how many of another kind are told


@dataclass(frozen=True)
class Familiarity:
    """What all networks of the first seed know together."""

    networks: dict[str, Familiar]  # by key
    limit: float  # of the networks' mean strangeness, which a share of the test images stays below
    share: float
    told: dict[str, float]  # percent of the images of other kinds that lie above it, by kind

    def is_unlike(self, outputs: Mapping[str, Outputs]) -> Tensor:
        """Whether images are unlike what was learnt, from each network's outputs: bool [N]."""
        return mean_strangeness(self.networks, outputs) > self.limit


def find(
    first_seed: Sequence[Evaluation], others: Mapping[str, Tensor], share: float, hardware: Hardware
) -> Familiarity:
    """From each network's evaluation, and images of other kinds, uint8 [N, 32, 32, 3], by name."""
    by_key = {evaluation.trained.network.key: evaluation for evaluation in first_seed}
    networks = {key: know(evaluation) for key, evaluation in by_key.items()}
    of_test_images = {key: evaluation.outputs for key, evaluation in by_key.items()}
    limit = float(mean_strangeness(networks, of_test_images).quantile(share))
    told = {}
    for kind, pixels in others.items():
        outputs = {}
        for key, evaluation in by_key.items():
            outputs[key] = outputs_of(evaluation.trained.model, pixels, hardware, True)
        above = mean_strangeness(networks, outputs) > limit
        told[kind] = 100 * float(above.double().mean())
    return Familiarity(networks, limit, share, told)


def know(evaluation: Evaluation) -> Familiar:
    """One network's usual answers: to the validation images, their scale from the test images."""
    stages = tuple(usual(channels) for channels in evaluation.held_out.outputs.stages)
    parts = parts_of_strangeness(stages, evaluation.outputs)
    return Familiar(
        fingerprint=fingerprint(evaluation.trained.checkpoint.state_dict),
        temperature=evaluation.temperature,
        stages=stages,
        scale_mean=parts.mean(0),
        scale_deviation=parts.std(0).clamp_min(1e-6),
    )


def usual(channels: Tensor) -> Usual:
    """From the channels' means over N images, float32 [N, C]."""
    centred = (channels - channels.mean(0)).double()
    covariance = centred.T @ centred / len(channels)
    # so that directions in which few images never differ do not count without bounds
    covariance += 1e-3 * covariance.diagonal().mean().clamp_min(1e-12) * torch.eye(len(covariance))
    whitening = torch.linalg.cholesky(torch.linalg.inv(covariance))
    return Usual(channels.mean(0), whitening.float())


def parts_of_strangeness(stages: Sequence[Usual], outputs: Outputs) -> Tensor:
    """Each stage's distance, and the negative energy: float32 [N, stages + 1]."""
    parts = []
    for of_stage, channels in zip(stages, outputs.stages, strict=True):
        parts.append(of_stage.distance(channels))
    parts.append(-energy(outputs.logits))
    return torch.stack(parts, dim=1)


def mean_strangeness(networks: Mapping[str, Familiar], outputs: Mapping[str, Outputs]) -> Tensor:
    """The mean over the networks of each image's strangeness: [N]."""
    return torch.stack([known.strangeness(outputs[key]) for key, known in networks.items()]).mean(0)
