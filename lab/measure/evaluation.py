"""What trained models answer, held against the labels.

In come models and images; out come logits, features, and evaluations: what is predicted, how sure
that is, accuracy by class and confusion.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import scipy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lab.data.images import Dataset, to_input
from lab.machine.device import Hardware
from lab.machine.parallel import in_parallel
from lab.machine.pieces import Piece, Pieces
from lab.measure.models import Model, Network, TrainedModel, fingerprint, mean_over_pixels

LARGEST_TEMPERATURE = math.exp(3)


@dataclass(frozen=True)
class Outputs:
    """What a network gives for N images, on the CPU."""

    features: Tensor  # float32 [N, C]: the last stage's channels, averaged over the image
    logits: Tensor  # float32 [N, classes]
    # If asked for, each stage's channels before its attention, averaged over the image: [N, C]
    stages: tuple[Tensor, ...] = ()


@torch.no_grad()
def outputs_of(
    model: Model, pixels: Tensor, hardware: Hardware, with_stages: bool = False
) -> Outputs:
    """What a model gives for images uint8 [N, 32, 32, 3], or float32 [N, 3, 32, 32] in [0, 1].

    `with_stages` listens to the model's stages: not while another thread asks the same model.
    """
    model.eval()
    features = []
    logits = []
    listening: AbstractContextManager[list[list[Tensor]]] = nullcontext([])
    if with_stages:
        listening = means_of_stages(model)
    with listening as stages:
        for part in pixels.split(hardware.eval_batch):
            hardware.raise_if_cancelled()
            with hardware.autocast():
                activations = model.features(to_input(part.to(hardware.device)))
                logits.append(model.classify(activations).float())
            features.append(mean_over_pixels(activations.float()))
    of_stages = tuple(torch.cat(means).cpu() for means in stages)
    return Outputs(torch.cat(features).cpu(), torch.cat(logits).cpu(), of_stages)


@contextmanager
def means_of_stages(model: Model) -> Iterator[list[list[Tensor]]]:
    """For each stage, the means over the pixels that it gives while this lasts, batch by batch."""
    means: list[list[Tensor]] = []
    hooks = []
    for stage in model.stages:
        of_stage: list[Tensor] = []
        means.append(of_stage)

        def listen(
            _: nn.Module, __: object, output: Tensor, heard: list[Tensor] = of_stage
        ) -> None:
            heard.append(mean_over_pixels(output.float()))

        hooks.append(stage.register_forward_hook(listen))
    try:
        yield means
    finally:
        for hook in hooks:
            hook.remove()


def logits_of(model: Model, pixels: Tensor, hardware: Hardware) -> Tensor:
    """float32 [N, classes]; see `outputs_of`."""
    return outputs_of(model, pixels, hardware).logits


def at_labels(values: Tensor, labels: Tensor) -> Tensor:
    """Each row's value at its label: of values [N, classes] and labels int64 [N], [N]."""
    return values.gather(1, labels[:, None])[:, 0]


@dataclass(frozen=True)
class HeldOut:
    """What a network gives for its seed's validation images, and their labels int64 [N]."""

    outputs: Outputs
    labels: Tensor

    @cached_property
    def class_means(self) -> Tensor:
        """The mean features of each class: float32 [classes, C]."""
        means = []
        for label in range(self.outputs.logits.shape[1]):
            means.append(self.outputs.features[self.labels == label].mean(0))
        return torch.stack(means).nan_to_num()  # a class may have no validation image

    def all_correct(self) -> bool:
        """Whether no image is answered wrongly, so that nothing says how unsure to be."""
        return bool((self.outputs.logits.argmax(1) == self.labels).all())


@dataclass(frozen=True)
class Evaluation:
    """What one trained network does on the test images; accuracies in percent."""

    trained: TrainedModel
    outputs: Outputs
    predicted: Tensor  # int64 [N]
    correct: np.ndarray  # bool [N]
    accuracy: float
    class_accuracy: np.ndarray  # float64 [classes]
    confusion: np.ndarray  # int64 [classes, classes]: true class by predicted class
    held_out: HeldOut

    @property
    def features(self) -> Tensor:
        """As of `Outputs`: float32 [N, C]."""
        return self.outputs.features

    @property
    def logits(self) -> Tensor:
        """float32 [N, classes]."""
        return self.outputs.logits

    @property
    def owner(self) -> str:
        """Whose measurements are kept, as files name it."""
        return f"{self.trained.network.key}_seed{self.trained.seed}"

    @cached_property
    def identity(self) -> str:
        """SHA-256 of the weights and of their answers to the test images.

        The answers are others where the same weights lie in another network, arithmetic or machine.
        """
        weights = {name: value.cpu() for name, value in self.trained.model.state_dict().items()}
        return fingerprint({**weights, "answers": self.logits})

    def measured_once(
        self,
        pieces: Pieces,
        kind: str,
        depends_on: Mapping[str, object],
        measure: Callable[[], Piece],
        restore: Callable[..., Piece],
    ) -> Piece:
        """A measurement of this network, as `Pieces.get`; it depends on the network too."""
        depends_on = {**depends_on, "network": self.identity}
        return pieces.get(self.owner, kind, depends_on, measure, restore)

    @cached_property
    def temperature(self) -> float:
        """What the logits are to be divided by; fitted on the validation images."""
        return fit_temperature(self.held_out.outputs.logits, self.held_out.labels)

    def is_temperature_largest(self) -> bool:
        """Whether the search for the temperature ended where it may go no farther.

        The likelihood is concave in the temperature's inverse: the best one is as large or larger,
        and the logits say next to nothing of the validation images' classes.
        """
        return self.temperature > 0.999 * LARGEST_TEMPERATURE

    @cached_property
    def probabilities(self) -> Tensor:
        """Of each class, temperature scaled, as all that is told of single images: [N, classes]."""
        return self.scaled_logits().softmax(1)

    @cached_property
    def confidence(self) -> Tensor:
        """The probability of the predicted class: float32 [N]."""
        return self.probabilities.amax(1)

    def scaled_logits(self) -> Tensor:
        return self.logits / self.temperature


# Each network's evaluations by seed, under the network's key; the first is compared with.
ByNetwork = Mapping[str, Sequence[Evaluation]]


def evaluate_all(
    trained: Sequence[TrainedModel], data: Dataset, hardware: Hardware
) -> dict[str, list[Evaluation]]:
    """Each network's evaluations by seed, under the network's key."""

    def evaluate_one(one: TrainedModel) -> Evaluation:
        outputs = outputs_of(one.model, data.test.pixels, hardware, with_stages=True)
        validation = data.train.select(data.splits[one.seed].validation)
        held_out = outputs_of(one.model, validation.pixels, hardware, with_stages=True)
        return evaluate(one, outputs, data.test.labels, HeldOut(held_out, validation.labels))

    by_network: dict[str, list[Evaluation]] = {}
    for evaluation in in_parallel(evaluate_one, trained, hardware):
        by_network.setdefault(evaluation.trained.network.key, []).append(evaluation)
    return by_network


def first_key(by_network: Mapping[str, Any]) -> str:
    """The key of the network that the others are compared with."""
    return next(iter(by_network))


def networks_of(by_network: ByNetwork) -> list[Network]:
    """The networks that were evaluated, the first first."""
    return [evaluations[0].trained.network for evaluations in by_network.values()]


def evaluate(
    trained: TrainedModel, outputs: Outputs, labels: Tensor, held_out: HeldOut
) -> Evaluation:
    """The outputs for the test images held against their `labels` int64 [N]."""
    from sklearn.metrics import confusion_matrix

    logits = outputs.logits
    predicted = logits.argmax(1)
    classes = range(logits.shape[1])
    confusion = confusion_matrix(labels.numpy(), predicted.numpy(), labels=classes)
    images_by_class = confusion.sum(1)
    class_accuracy = 100 * confusion.diagonal() / images_by_class.clip(1)
    accuracy = 100 * confusion.trace() / confusion.sum()
    return Evaluation(
        trained=trained,
        outputs=outputs,
        predicted=predicted,
        correct=(predicted == labels).numpy(),
        accuracy=round(float(accuracy), 4),
        class_accuracy=class_accuracy.round(4),
        confusion=confusion,
        held_out=held_out,
    )


def correct_by_seed(evaluations: Sequence[Evaluation]) -> np.ndarray:
    """Which test images one network classifies correctly: bool [seeds, images]."""
    return np.stack([evaluation.correct for evaluation in evaluations])


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """What logits [N, classes] are to be divided by (Guo et al., ICML 2017, section 4.2).

    Up to `LARGEST_TEMPERATURE`, and down to its inverse. Where all labels are answered correctly
    nothing says how unsure a network should be, and the search ends anywhere; see
    `HeldOut.all_correct`.
    """
    logits = logits.double()

    def loss(log_temperature: float) -> float:
        return float(F.cross_entropy(logits / math.exp(log_temperature), labels))

    most = math.log(LARGEST_TEMPERATURE)
    return math.exp(scipy.optimize.minimize_scalar(loss, bounds=(-most, most)).x)


def distance_from_any_class(features: Tensor, means: Tensor) -> Tensor:
    """From features [N, C] to the nearest of the classes' means [classes, C]: float32 [N]."""
    return torch.cdist(features, means).amin(1)


def energy(logits: Tensor) -> Tensor:
    """What all logits say together: high on familiar images (Liu et al., NeurIPS 2020): [N]."""
    return logits.logsumexp(1)
