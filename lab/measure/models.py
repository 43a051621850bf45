"""What a network must offer to be measured, who takes part, and files of weights.

A *network* is an architecture that takes part, with its name and colour; a *model* is one module of
it. In come models and files; out come checkpoints, fingerprints of weights, and costs by layer.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn

from lab.data.images import IMAGE_SIZE
from lab.machine.device import Precision
from lab.machine.files import CURE, read_tensors, write_tensors
from lab.machine.options import UserError


class Model(Protocol):
    """What the program asks of a network's module.

    The first group is the network's own, the second comes with torch.nn.Module. Images are float
    [B, 3, H, W] in [0, 1], channels last, 32 by 32 pixels or the smaller crops of early epochs.
    """

    @property
    def stem(self) -> nn.Module:
        """What the images meet first; it is not trained."""

    @property
    def stages(self) -> nn.ModuleList:
        """The trained layers, in order."""

    @property
    def attention(self) -> nn.ModuleList:
        """What follows each stage: something `Gated`, or nn.Identity."""

    @property
    def classifier(self) -> nn.Module:
        """The last layer."""

    def measure_input(self, pixels: Tensor) -> None:
        """Learn what is measured, not trained, from training images uint8 [N, 32, 32, 3]."""

    def features(self, images: Tensor) -> Tensor:
        """Images to the activations [B, C, H, W] that Grad-CAM explains."""

    def classify(self, features: Tensor) -> Tensor:
        """Those activations to logits [B, classes]."""

    def __call__(self, images: Tensor) -> Tensor:
        """Images to logits: `classify(features(images))`."""

    def train(self, mode: bool = True) -> Self: ...
    def eval(self) -> Self: ...
    def to(self, *args: Any, **kwargs: Any) -> Self: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def state_dict(self) -> dict[str, Tensor]: ...
    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> Any: ...
    def zero_grad(self) -> None: ...
    def get_submodule(self, target: str) -> nn.Module: ...


def mean_over_pixels(activations: Tensor) -> Tensor:
    """[B, C, H, W] to the channels' means [B, C].

    Permuted first, so that the gradient lies channels last as the activations do: faster on CPUs.
    """
    return activations.permute(0, 2, 3, 1).mean((1, 2))


@runtime_checkable
class Gated(Protocol):
    """Attention that multiplies each channel by a gate."""

    def gate_logits(self, channel_means: Tensor) -> Tensor:
        """The channels' means [B, C] to what the sigmoid is taken of [B, C]."""


@dataclass(frozen=True)
class Network:
    """A network that takes part: how files and people call it, how it is drawn, how it is made."""

    key: str  # in file names and JSON
    title: str
    colour: str
    marker: str
    build: Callable[[Any, int], Model]  # from the recipe and the number of classes
    # For the paper; "" leaves it out
    about: str  # "SE-Attention has …"
    subject: str = ""  # "Does … help?"; the title where there is none
    description: str = ""  # sentences on how it works
    citation: str = ""  # authors, title, place and year


RANDOMNESS = threading.Lock()  # PyTorch's own generator, of which there is one for all threads


def build_network(network: Network, recipe: Any, classes: int) -> Model:
    """A fresh network with weights drawn from the recipe's seed, the same on every device."""
    with RANDOMNESS:
        torch.manual_seed(recipe.seed)
        model = network.build(recipe, classes)
    return model.to(memory_format=torch.channels_last)


@dataclass(frozen=True)
class EpochLog:
    """Mean loss and accuracy (percent) of an epoch, and the seconds that its training took.

    Training values are means over the epoch, on augmented images and with batch statistics.
    """

    train_loss: float
    train_accuracy: float
    validation_loss: float
    validation_accuracy: float
    seconds: float

    def losses(self) -> tuple[float, float]:
        return self.train_loss, self.validation_loss

    def accuracies(self) -> tuple[float, float]:
        return self.train_accuracy, self.validation_accuracy


@dataclass(frozen=True)
class Checkpoint:
    """What a file of weights holds: the weights, and all that was done to get them."""

    network: str
    settings: dict[str, object]  # the recipe's
    precision: Precision
    device: str
    versions: dict[str, str]
    history: list[EpochLog]
    state_dict: dict[str, Tensor]
    optimizers: list[dict] | None = None  # their states; None when training has finished


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write it whole, with its digest."""
    history = [dataclasses.asdict(log) for log in checkpoint.history]
    write_tensors(path, {**vars(checkpoint), "history": history})


def load_checkpoint(path: Path) -> Checkpoint:
    """What `save_checkpoint` wrote; UserError for anything else."""
    content = read_tensors(path)
    try:
        settings = dict(content["settings"])
        history = [EpochLog(**log) for log in content["history"]]
        return Checkpoint(**{**content, "settings": settings, "history": history})
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} does not hold this network's weights: {CURE}") from error


@dataclass(frozen=True)
class TrainedModel:
    """A network's module with its weights, and the file's account of how it got them."""

    network: Network
    seed: int
    model: Model
    checkpoint: Checkpoint


def path_of_weights(folder: Path, network: Network, seed: int, plain_seed: int) -> Path:
    """Where a network's weights of a seed lie, or will lie.

    The files of `plain_seed` have plain names. Those of other seeds end in the seed, but that
    earlier versions gave the plain name to whichever seed came first.
    """
    plain = folder / f"{network.key}_model.pth"
    with_seed = folder / f"{network.key}_model_seed{seed}.pth"
    if with_seed.exists() or resume_path_of(with_seed).exists():
        return with_seed
    for path in (resume_path_of(plain), plain):
        plain_seed = seed_of_file(path, plain_seed)
    return plain if seed == plain_seed else with_seed


def seed_of_file(path: Path, default: int) -> int:
    """Whose weights a file holds; `default` where there is none, or it can't be read."""
    if not path.exists():
        return default
    try:
        seed = load_checkpoint(path).settings.get("seed")
    except UserError:
        return default
    return seed if isinstance(seed, int) else default


def resume_path_of(path: Path) -> Path:
    """Where the state of an unfinished training is kept whose weights will lie at `path`."""
    return path.with_name(f"{path.stem}_resume.pth")


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of all bits of the weights, and of their names."""
    digest = hashlib.sha256()
    for name, tensor in weights.items():
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def draws_in_training(model: Model, images: Tensor) -> bool:
    """Whether a forward pass in training moves PyTorch's generator; tried on a copy."""
    tried = copy.deepcopy(model).train()
    with RANDOMNESS, torch.no_grad():
        before = torch.get_rng_state()
        tried(images)
        return not torch.equal(before, torch.get_rng_state())


@dataclass(frozen=True)
class LayerCost:
    """What a part of a network costs for one image."""

    name: str
    parameters: int
    multiply_adds: int


def layer_costs(model: Model) -> tuple[LayerCost, ...]:
    """The cost of each part that has parameters, in the order in which they compute."""
    from torch.utils.flop_counter import FlopCounterMode

    parts = {"stem": "stem"}
    for k in range(len(model.stages)):
        parts[f"stage {k + 1}"] = f"stages.{k}"
        parts[f"attention {k + 1}"] = f"attention.{k}"
    parts["classifier"] = "classifier"
    device = next(model.parameters()).device
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE, device=device))
    flops = counter.get_flop_counts()
    costs = []
    for name, part in parts.items():
        parameters = sum(p.numel() for p in model.get_submodule(part).parameters())
        if parameters > 0:
            of_part = flops.get(f"{type(model).__name__}.{part}", {})
            costs.append(LayerCost(name, parameters, sum(of_part.values()) // 2))
    return tuple(costs)
