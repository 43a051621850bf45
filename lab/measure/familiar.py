"""What a trained network knows: what it takes to say of any picture that it is unlike that.

In comes the evaluation of a model; out come the temperature, the classes' means in its features,
and how far from them the test images lie.
"""

from __future__ import annotations

from dataclasses import dataclass

from lab.measure.evaluation import Evaluation, distance_from_any_class
from lab.measure.models import fingerprint


@dataclass(frozen=True)
class Familiar:
    """What the first seed's network needs, beside its weights, to speak of any picture."""

    fingerprint: str  # of these weights
    temperature: float
    class_means: list[list[float]]  # [classes][C]: of the validation images
    limit: float  # within which that share of the test images lie from the nearest mean
    share: float = 0.99


def find(evaluation: Evaluation, share: float) -> Familiar:
    """From the validation images, and the limit from the test images."""
    means = evaluation.held_out.class_means
    distances = distance_from_any_class(evaluation.features, means)
    return Familiar(
        fingerprint=fingerprint(evaluation.trained.checkpoint.state_dict),
        temperature=evaluation.temperature,
        class_means=means.tolist(),
        limit=float(distances.quantile(share)),
        share=share,
    )
