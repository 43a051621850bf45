"""Does Squeeze-and-Excitation attention help a small CNN on CIFAR-10?

One script trains a Baseline CNN and the same network with Squeeze-and-Excitation blocks (Hu, Shen
& Sun, CVPR 2018), stress-tests both, and leaves weights, numbers, figures and the values of a paper
in output/. It is read from top to bottom:

    1. Settings    everything a run depends on, which is the command line
    2. Data        CIFAR-10 or drawn shapes, and what an epoch sees of them
    3. Networks    one small CNN, whose attention is a parameter
    4. Training    optimisers, an epoch, and files from which a training goes on
    5. The run     the README's list of steps

What it measures, draws and writes with lies in lab/, whose rooms know nothing of this script. A
third network is a class and a line in NETWORKS; it goes through all of this to the paper.
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 11):  # noqa: UP036 - so that an older one is told so
    sys.exit(f"main.py needs Python 3.11 or newer, and this is {sys.version.split()[0]}")

import atexit
import datetime
import math
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

from lab.machine import packages

try:
    packages.refuse_missing()
    import numpy as np
    import torch
    import torch.nn.functional as F
    import tyro
    from torch import Tensor, nn
    from tqdm import tqdm

    from lab.data import cifar10, datasets, download, shapes
    from lab.data.images import IMAGE_SIZE, Dataset, Images, Split, to_input
    from lab.machine import abreast, console
    from lab.machine.checkout import commit_of
    from lab.machine.device import Hardware, MachineSettings, has_amx, prepare_machine, versions
    from lab.machine.files import ResultFiles, hold_folder, move
    from lab.machine.options import (
        Between,
        Count,
        ImageCount,
        Momentum,
        Rate,
        Seed,
        Share,
        UserError,
        check_ranges,
        command_line,
        expand_home,
        refuse,
        refuse_unknown,
        settings_by_flag,
        without_it,
    )
    from lab.machine.pieces import Pieces, digest_of_files
    from lab.machine.recorder import Recorder, Step
    from lab.measure import (
        comparison,
        corruptions,
        failures,
        familiar,
        gradcam,
        looks,
        retest,
        statistics,
        stress,
        trainings,
    )
    from lab.measure.evaluation import evaluate_all, logits_of
    from lab.measure.looks import Look
    from lab.measure.models import (
        RANDOMNESS,
        Checkpoint,
        EpochLog,
        Model,
        Network,
        TrainedModel,
        build_network,
        draws_in_training,
        mean_over_pixels,
        path_of_weights,
        save_checkpoint,
    )
    from lab.report import history, records
    from lab.report.results import Results, Setup, count_images, network_results

    if TYPE_CHECKING:
        from lab.measure.familiar import Familiarity
        from lab.report.pictures import Classifier
except ImportError as error:
    packages.end_unless_ours(error)
except KeyboardInterrupt:
    sys.exit("main.py: interrupted")

# ---- 1. Settings -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """All that shapes the weights; files of weights of another recipe are not reused."""

    dataset: Literal["cifar10", "shapes"] = "cifar10"
    """images to learn"""
    seed: Seed = 42
    """seed of all randomness"""

    # The networks
    stem: Annotated[int, Between(1, 27)] = 16
    """filters of the fixed whitening convolution, each with its negative"""
    measured_images: ImageCount = 5000
    """training images whose mean, deviation and patches make that convolution"""
    whitening_epsilon: Annotated[float, Between(1e-9, 1)] = 0.01
    """added to the patches' eigenvalues, so that noise is not blown up"""
    widths: Annotated[tuple[int, ...], Between(1, 4096)] = (64, 192, 256)
    """channels of each stage"""
    reduction: Count = 8
    """SE bottleneck: a stage's channels are divided by this"""
    head: Literal["mean", "max", "both"] = "mean"
    """what the classifier gets of each channel of the last stage: its mean over the pixels, its
    maximum, or the mean of those two"""

    # Their training. Rates are the first ones; they fall linearly to zero.
    epochs: Count = 15
    """passes over the training images"""
    batch_size: ImageCount = 500
    """images in a training step"""
    muon_rate: Rate = 0.06
    """first learning rate of Muon, which trains the convolutions"""
    muon_momentum: Momentum = 0.8
    """Nesterov momentum of Muon"""
    learning_rate: Rate = 0.2
    """first learning rate of SGD, which trains all else"""
    momentum: Momentum = 0.9
    """Nesterov momentum of SGD; 0 is plain SGD"""
    weight_decay: Share = 1e-3
    """L2 penalty on the weights of linear layers; other weights have none"""
    label_smoothing: Annotated[float, Between(0, 0.99)] = 0.1
    """share of the target that is spread over all classes"""
    crop_padding: Annotated[int, Between(0, 31)] = 2
    """pixels that whole images are shifted by at most, reflected beyond the edge"""
    crop_size: Annotated[int, Between(8, 32)] = 24
    """side of the crops in the first epochs; the last ones see whole images"""
    crop_epochs: Share = 0.8
    """share of the epochs that see crops"""
    validation: Annotated[float, Between(0.01, 0.9)] = 0.1
    """share of the training images that is held out for validation"""

    # The drawn dataset
    shapes_train: Annotated[int, Between(200, 1e6)] = 2500
    """drawn images to train and validate on"""
    shapes_seed: Seed = 0
    """seed of the drawing, apart from --seed"""
    shapes_difficulty: Share = 0.72
    """how small, faint and noisy the drawn shapes are, from 0 to 1"""

    def image_size(self, epoch: int) -> int:
        """Side of the images that epoch 0, 1, … sees: small crops first, whole images last."""
        sees_crops = epoch + 1 <= self.crop_epochs * self.epochs
        return self.crop_size if sees_crops else IMAGE_SIZE

    def last_side(self, image_size: int) -> int:
        """Side of the last stage's activations: each stage halves it."""
        return image_size // 2 ** len(self.widths)

    def with_seed(self, seed: int) -> Recipe:
        """This recipe with another seed."""
        return replace(self, seed=seed)

    def record(self) -> dict[str, object]:
        """The recipe as plain values; what belongs to the other dataset is left out.

        So is the usual head, which files from before there was a choice do not name.
        """
        values = settings_by_flag(self)
        if self.head == Recipe.head:
            del values["head"]
        if self.dataset != "shapes":
            del values["shapes_train"]
            del values["shapes_seed"]
            del values["shapes_difficulty"]
        return values

    def differences(self, recorded: Mapping[str, object]) -> list[str]:
        """In what it differs from the `record` in a file of weights, for people."""
        then = {"head": Recipe.head, **recorded}
        now = {"head": Recipe.head, **self.record()}
        differing = []
        for name in now | then:
            if then.get(name) != now.get(name):
                differing.append(f"{name} {then.get(name)} (now {now.get(name)})")
        return differing


@dataclass(frozen=True)
class Settings:
    """Everything a run depends on. Each field is the command-line option of the same name."""

    data_dir: Path = Path("data")
    """folder that holds, or will hold, CIFAR-10"""
    networks: tuple[str, ...] = field(default_factory=lambda: keys_of(NETWORKS))
    """which networks take part; the others are compared with the first; of baseline,
    se_attention, static_gates, wide, eca, se_last, se_4 and se_16"""
    output_dir: Annotated[Path | None, without_it("PATH", "output, for shapes output/shapes")] = (
        None
    )
    """folder for all results"""
    predict: tuple[Path, ...] = ()
    """pictures for the trained networks to classify, in place of a run"""
    retrain: bool = False
    """train again even where weights exist"""
    seeds: Annotated[int, Between(1, 1000)] = 1
    """train each network with this many seeds, from --seed on"""
    shapes_test: Annotated[int, Between(20, 1e6)] = 2000
    """drawn images to test on"""
    gradcam_images: Annotated[int, Between(1, 1000)] = 2
    """test images explained per chosen class"""
    familiar_share: Share = 0.99
    """share of the test images that a picture must be stranger than, to be warned of"""
    machine: MachineSettings = field(default_factory=MachineSettings)
    recipe: Recipe = field(default_factory=Recipe)
    download: download.Settings = field(default_factory=download.Settings)
    rules: statistics.Settings = field(default_factory=statistics.Settings)
    stress_tests: stress.Settings = field(default_factory=stress.Settings)

    def output(self) -> Path:
        """The folder for all results."""
        if self.output_dir is not None:
            return self.output_dir
        if self.recipe.dataset == "cifar10":
            return Path("output")
        return Path("output", self.recipe.dataset)

    def foreign_count(self) -> int:
        """How many images of each other kind, of which --stress takes a share."""
        return math.ceil(self.stress_tests.share() * self.stress_tests.doubt.foreign_images)

    def all_seeds(self) -> range:
        """The seeds that each network is trained with."""
        return range(self.recipe.seed, self.recipe.seed + self.seeds)

    def taking_part(self) -> list[Network]:
        """The networks, the first first."""
        by_key = {network.key: network for network in [*NETWORKS, *CONTROLS]}
        return [by_key[key] for key in self.networks]


# ---- 2. Data -----------------------------------------------------------------------------------


def load_data(settings: Settings) -> Dataset:
    """Drawn shapes or CIFAR-10, with a split for each seed of the run."""
    recipe = settings.recipe
    if recipe.dataset == "shapes":
        data = datasets.draw_shapes(
            train=recipe.shapes_train,
            test=settings.shapes_test,
            seed=recipe.shapes_seed,
            difficulty=recipe.shapes_difficulty,
            foreign_count=settings.foreign_count(),
            data_dir=settings.data_dir,
        )
    else:
        packages.import_one(packages.WITH_CIFAR10)
        data = datasets.load_cifar10(
            settings.data_dir,
            settings.download,
            foreign_count=settings.foreign_count(),
            shapes_seed=recipe.shapes_seed,
            extra=corruptions.EXTRA,
        )
    splits = {}
    for seed in settings.all_seeds():
        splits[seed] = split_train(data.train.labels, recipe.validation, seed)
    return replace(data, splits=splits)


def split_train(labels: Tensor, validation: float, seed: int) -> Split:
    """Hold out a share `validation` of the images with `labels` [N], stratified by class."""
    from sklearn.model_selection import train_test_split

    every_index = np.arange(len(labels))
    training, held_out = train_test_split(
        every_index, test_size=validation, stratify=labels.numpy(), random_state=seed
    )
    return Split(torch.from_numpy(np.sort(training)), torch.from_numpy(np.sort(held_out)))


@dataclass(frozen=True)
class EpochPlan:
    """What an epoch sees of N images.

    `order` int64 [N], `offsets` of the crops int64 [N, 2], `flips` bool [N].
    """

    crop_size: int
    order: Tensor
    offsets: Tensor
    flips: Tensor

    def to(self, device: torch.device) -> EpochPlan:
        tensors = (self.order.to(device), self.offsets.to(device), self.flips.to(device))
        return EpochPlan(self.crop_size, *tensors)


def plan_epoch(epoch: int, count: int, recipe: Recipe) -> EpochPlan:
    """The plan of epoch 0, 1, … over `count` images.

    It is a function of seed and epoch alone, so that all networks, every device, and a resumed run
    see the same. Early epochs see small crops, which cost less and hide parts of objects. Images
    are mirrored in every other epoch, so that two epochs show both sides (Jordan,
    arXiv 2404.00498).
    """
    crop_size = recipe.image_size(epoch)
    beyond = recipe.crop_padding if crop_size == IMAGE_SIZE else 0

    run_seed = recipe.seed * 1_000_003  # so that no seed's epochs are another seed's
    generator = torch.Generator().manual_seed(run_seed)
    flips_first = torch.rand(count, generator=generator) < 0.5
    flips = flips_first ^ (epoch % 2 == 1)
    generator.manual_seed(run_seed + epoch + 1)
    order = torch.randperm(count, generator=generator)
    last = IMAGE_SIZE - crop_size + beyond
    offsets = torch.randint(-beyond, last + 1, (count, 2), generator=generator)
    return EpochPlan(crop_size, order, offsets, flips)


def crop_and_flip(pixels: Tensor, index: Tensor, plan: EpochPlan) -> Tensor:
    """Images `index` int64 [B] of `pixels` uint8 [N, 32, 32, 3], cropped and perhaps mirrored.

    Returns uint8 [B, size, size, 3], made by one gather; what lies outside an image is reflected.
    """
    size = plan.crop_size
    steps = torch.arange(size, device=pixels.device)
    mirrored = plan.flips[index][:, None]
    rows = plan.offsets[index, :1] + steps  # [B, size]
    columns = plan.offsets[index, 1:] + torch.where(mirrored, size - 1 - steps, steps)
    rows = reflect(rows, pixels.shape[1] - 1)
    columns = reflect(columns, pixels.shape[2] - 1)
    return pixels[index[:, None, None], rows[:, :, None], columns[:, None, :]]


def reflect(position: Tensor, last: int) -> Tensor:
    """Positions outside 0 to `last`, mirrored at the ends back inside."""
    return last - (last - position.abs()).abs()


# ---- 3. Networks -------------------------------------------------------------------------------


class ChannelAttention(nn.Module, ABC):
    """Multiplies each channel by a gate in (0, 1), which is computed from the whole image."""

    @abstractmethod
    def gate_logits(self, channel_means: Tensor) -> Tensor:
        """The channels' means [B, C] to what the sigmoid is taken of [B, C].

        Kinds of attention differ in this alone.
        """

    def gate(self, activations: Tensor) -> Tensor:
        """[B, C, H, W] to the gates [B, C]."""
        return torch.sigmoid(self.gate_logits(mean_over_pixels(activations)))

    def forward(self, activations: Tensor) -> Tensor:
        return activations * self.gate(activations)[:, :, None, None]


class SEBlock(ChannelAttention):
    """Squeeze-and-Excitation (Hu, Shen & Sun, CVPR 2018, section 3): gates from a bottleneck.

    A stage's channels are divided by `reduction`, which is the recipe's where none is given.
    """

    def __init__(self, channels: int, recipe: Recipe, reduction: int | None = None) -> None:
        super().__init__()
        if reduction is None:
            reduction = recipe.reduction
        bottleneck = max(1, channels // reduction)
        self.reduce = nn.Linear(channels, bottleneck)
        self.expand = nn.Linear(bottleneck, channels)

    def gate_logits(self, channel_means: Tensor) -> Tensor:
        squeezed = F.relu(self.reduce(channel_means))
        return self.expand(squeezed)


class StaticGates(nn.Module):
    """Multiplies each channel by a learnt number in (0, 1), the same for every image.

    It is SE without its attention: what is left is that channels are scaled.
    """

    def __init__(self, channels: int, recipe: Recipe) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(channels))

    def forward(self, activations: Tensor) -> Tensor:
        return activations * torch.sigmoid(self.logits)[:, None, None]


class ECABlock(ChannelAttention):
    """Efficient Channel Attention (Wang et al., CVPR 2020): a convolution over the channels.

    Its kernel is wider where there are more channels, by the paper's equation 12.
    """

    def __init__(self, channels: int, recipe: Recipe) -> None:
        super().__init__()
        size = int((math.log2(channels) + 1) / 2)
        if size % 2 == 0:
            size += 1
        self.mix = nn.Conv1d(1, 1, kernel_size=size, padding=size // 2, bias=False)

    def gate_logits(self, channel_means: Tensor) -> Tensor:
        return self.mix(channel_means[:, None])[:, 0]


class Convolution(nn.Conv2d):
    """3x3, without bias, since batch norm has one.

    Its first outputs start as copies of its inputs (as in airbench94), the others as PyTorch's do.
    """

    narrow = 8  # pixels: images up to this width are convolved abreast where that pays

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(channels_in, channels_out, kernel_size=3, padding=1, bias=False)
        nn.init.dirac_(self.weight.data[:channels_in])

    def forward(self, images: Tensor) -> Tensor:
        """[B, channels_in, H, W] to [B, channels_out, H, W]."""
        in_bfloat16 = images.device.type == "cpu" and torch.is_autocast_enabled("cpu")
        is_narrow = images.shape[3] <= self.narrow
        if self.training and is_narrow and in_bfloat16 and has_amx():
            return abreast.convolve(images, super().forward)
        return super().forward(images)


Attention = Callable[[int, Recipe], nn.Module]  # from a stage's channels and the recipe


class SmallCNN(nn.Module):
    """A plain network: fixed stem, stages of two 3x3 convolutions, global pooling, a linear layer.

    `attention` makes what follows a stage, from the stage `attention_from` on, which counts from 0,
    or backwards from -1; nn.Identity makes the Baseline. It is a `Model`.
    Its normalisation and its stem are measured on training images, not trained, and travel with
    the weights.
    """

    def __init__(
        self, recipe: Recipe, classes: int, attention: Attention, attention_from: int = 0
    ) -> None:
        super().__init__()
        self.recipe = recipe
        self.mean = nn.Buffer(torch.zeros(3))
        self.std = nn.Buffer(torch.ones(3))
        self.stem = Convolution(3, 2 * recipe.stem).requires_grad_(False)
        self.stages = nn.ModuleList()
        channels = 2 * recipe.stem
        for width in recipe.widths:
            self.stages.append(make_stage(channels, width))
            channels = width
        self.classifier = nn.Linear(channels, classes)
        # Made last: with the same seed, all that networks share starts from the same bits.
        self.attention = nn.ModuleList()
        attended = range(len(recipe.widths))[attention_from:]
        for stage, width in enumerate(recipe.widths):
            is_attended = stage in attended
            self.attention.append(attention(width, recipe) if is_attended else nn.Identity())

    @torch.no_grad()
    def measure_input(self, pixels: Tensor) -> None:
        """Measure the normalisation and make the stem's filters, on images uint8 [N, 32, 32, 3].

        The filters' answers to 3x3 patches are uncorrelated and of equal power: they are the
        leading eigenvectors of the patches' covariance, each over its eigenvalue's root, and their
        negatives, for ReLU (Page, "How to train your ResNet", 2019; Jordan, arXiv 2404.00498).
        """
        images = to_input(pixels[: self.recipe.measured_images])
        self.mean.copy_(images.mean((0, 2, 3)))
        self.std.copy_(images.std((0, 2, 3)))
        patches = self.normalise(images).unfold(2, 3, 3).unfold(3, 3, 3)  # [N, 3, 10, 10, 3, 3]
        patches = patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, 27)
        powers, vectors = torch.linalg.eigh(patches.double().T.cov())  # smallest first
        scaled = vectors / (powers + self.recipe.whitening_epsilon).sqrt()
        filters = scaled.T.flip(0)[: self.recipe.stem]
        self.stem.weight.copy_(torch.cat([filters, -filters]).view(-1, 3, 3, 3))

    def normalise(self, images: Tensor) -> Tensor:
        """Images of mean 0 and deviation 1, as measured."""
        return (images - self.mean[:, None, None]) / self.std[:, None, None]

    def features(self, images: Tensor) -> Tensor:
        """[B, 3, 32, 32] to the last stage's activations [B, C, 4, 4], with three stages."""
        x = F.relu(self.stem(self.normalise(images)))
        for stage, attention in zip(self.stages, self.attention, strict=True):
            x = stage(x)
            x = attention(x)
        return x

    def classify(self, features: Tensor) -> Tensor:
        """[B, C, 4, 4] to logits [B, classes]."""
        if self.recipe.head == "mean":
            pooled = mean_over_pixels(features)
        elif self.recipe.head == "max":
            pooled = features.amax((2, 3))
        else:
            pooled = (mean_over_pixels(features) + features.amax((2, 3))) / 2
        return self.classifier(pooled)

    def forward(self, images: Tensor) -> Tensor:
        return self.classify(self.features(images))


def make_stage(channels_in: int, channels: int) -> nn.Sequential:
    """[B, channels_in, H, W] to [B, channels, H/2, W/2]."""
    return nn.Sequential(
        Convolution(channels_in, channels),
        nn.MaxPool2d(2),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        Convolution(channels, channels),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
    )


def make_wide(recipe: Recipe, classes: int) -> SmallCNN:
    """The Baseline whose widths all grow by one factor, until SE blocks would not add more.

    The smallest factor, in thousandths, that gives at least the parameters of SE blocks.
    """
    with torch.device("meta"):  # which makes no weights
        wanted = count_parameters(SmallCNN(recipe, classes, SEBlock))
        thousandths = 1000
        wide = recipe
        while count_parameters(SmallCNN(wide, classes, nn.Identity)) < wanted:
            thousandths += 1
            widths = [round(width * thousandths / 1000) for width in recipe.widths]
            wide = replace(recipe, widths=tuple(widths))
    return SmallCNN(wide, classes, nn.Identity)


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# Those that take part unless --networks names others. The first is the one that the others are
# compared with. The colours are Tol's: they can be told apart by colour-blind readers and in grey
# print.
NETWORKS: list[Network] = [
    Network(
        "baseline", "Baseline", "#004488", "o",
        build=partial(SmallCNN, attention=nn.Identity),
        about="nothing between its stages",
    ),
    Network(
        "se_attention", "SE-Attention", "#BB5566", "s",
        build=partial(SmallCNN, attention=SEBlock),
        about="an SE block after each stage",
        subject="Squeeze-and-Excitation Attention",
        description="An SE block averages each channel over the image, passes the averages through "
        "a small bottleneck, and multiplies each channel by the gate that comes out.",
        citation="J. Hu, L. Shen, G. Sun. Squeeze-and-Excitation Networks. CVPR, 2018; journal "
        "version with S. Albanie and E. Wu, TPAMI, 2020.",
    ),
]  # fmt: skip

# Those that --networks may name besides: what else could be at work where SE helps, or does not.
CONTROLS: list[Network] = [
    Network(
        "static_gates", "Static-Gates", "#DDAA33", "^",
        build=partial(SmallCNN, attention=StaticGates),
        about="gates after each stage that are learnt and see no image",
        subject="Gates That See No Image",
        description="Static gates multiply each channel by a learnt number between 0 and 1, the "
        "same for every image.",
    ),
    Network(
        "wide", "Wide", "#009988", "D",
        build=make_wide,
        about="nothing between its stages, which are wider by as many parameters as SE blocks have",
        subject="Width",
        description="The wide network spends the parameters of SE blocks on channels.",
    ),
    Network(
        "eca", "ECA", "#AA4499", "v",
        build=partial(SmallCNN, attention=ECABlock),
        about="ECA after each stage",
        subject="Efficient Channel Attention",
        description="ECA makes each channel's gate from the averages of the channels beside it, by "
        "one small convolution.",
        citation="Q. Wang, B. Wu, P. Zhu, P. Li, W. Zuo, Q. Hu. ECA-Net: Efficient Channel "
        "Attention for Deep Convolutional Neural Networks. CVPR, 2020.",
    ),
    Network(
        "se_last", "SE-Last", "#66CCEE", "P",
        build=partial(SmallCNN, attention=SEBlock, attention_from=-1),
        about="an SE block after its last stage alone",
        subject="Squeeze-and-Excitation in the Last Stage",
        description="The network with one SE block has it where channels are most specific.",
    ),
    Network(
        "se_4", "SE-4", "#228833", "X",
        build=partial(SmallCNN, attention=partial(SEBlock, reduction=4)),
        about="an SE block of reduction 4 after each stage",
        subject="Squeeze-and-Excitation of Reduction 4",
        description="SE-4 divides the channels by 4 in its bottleneck.",
    ),
    Network(
        "se_16", "SE-16", "#EE7733", "p",
        build=partial(SmallCNN, attention=partial(SEBlock, reduction=16)),
        about="an SE block of reduction 16 after each stage",
        subject="Squeeze-and-Excitation of Reduction 16",
        description="SE-16 divides the channels by 16 in its bottleneck.",
    ),
]  # fmt: skip


def keys_of(networks: Sequence[Network]) -> tuple[str, ...]:
    """How --networks calls them."""
    return tuple(network.key for network in networks)


# ---- 4. Training -------------------------------------------------------------------------------

# Optimisers


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose step is made orthogonal (Jordan et al., 2024).

    So all directions of a layer's weights learn at the same pace. Takes weights of convolutions
    [out, in, 3, 3], which torch.optim.Muon does not, and scales them to a norm of sqrt(out) before
    each step, since batch norm makes their scale irrelevant (as airbench94_muon.py does).
    """

    def __init__(self, weights: Sequence[nn.Parameter], lr: float, momentum: float) -> None:
        super().__init__(weights, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(weight)
                velocity = state["momentum"]
                velocity.mul_(group["momentum"]).add_(weight.grad)
                nesterov = weight.grad.add(velocity, alpha=group["momentum"])
                in_memory = nesterov.movedim(1, 3)  # [out, 3, 3, in], as it lies there
                matrix = in_memory.reshape(len(weight), -1)
                direction = orthogonalise(matrix).view_as(in_memory).movedim(3, 1)
                weight.mul_(len(weight) ** 0.5 / weight.norm())
                weight.sub_(direction.type_as(weight) * group["lr"])


def orthogonalise(matrix: Tensor) -> Tensor:
    """Nearly the orthogonal matrix nearest to `matrix` [M, N], by Newton-Schulz iteration.

    Each round applies x -> a x + b x^3 + c x^5 to all singular values, which are at most 1 after
    the division by the norm. The coefficients are Jordan's: steep at zero, so that small ones grow
    fast: after three rounds all that were 0.02 or more lie between 0.68 and 1.21.
    """
    a = 3.4445
    b = -4.7750
    c = 2.0315
    x = F.normalize(matrix.flatten(), dim=0).view_as(matrix)
    for _ in range(3):
        gram = x @ x.mT
        x = x.type_as(gram)  # bfloat16 under autocast
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)  # b x x' + c (x x')^2
        x = torch.addmm(x, polynomial, x, beta=a)  # a x + polynomial x
    return x


def make_optimizers(model: Model, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for convolutions, SGD for the rest.

    Of the rest, weights of linear layers decay, and biases and batch norm's do not (Goyal et al.,
    2017, section 5.3).
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    convolutions = [p for p in trained if p.ndim == 4]
    matrices = [p for p in trained if p.ndim == 2]
    others = [p for p in trained if p.ndim not in (2, 4)]
    muon = Muon(convolutions, lr=recipe.muon_rate, momentum=recipe.muon_momentum)
    sgd = torch.optim.SGD(
        [
            {"params": matrices, "weight_decay": recipe.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        nesterov=recipe.momentum > 0,
        fused=True,
    )
    return [muon, sgd]


def learning_rate_share(progress: float) -> float:
    """The share of the first learning rate at `progress` 0 to 1 of a training: linearly to zero."""
    return 1 - progress


def keep_rates_on(device: torch.device, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Make the learning rates tensors, which a recorded step reads anew each time."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = torch.zeros((), device=device)


def set_rates(optimizers: Sequence[torch.optim.Optimizer], progress: float) -> None:
    """The learning rates at `progress` 0 to 1 of a training."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"].fill_(optimizer.defaults["lr"] * learning_rate_share(progress))


# An epoch


@dataclass
class Training:
    """A training under way: all that an epoch needs, and what the epochs so far have given."""

    job: TrainingJob
    name: str  # as progress shows it
    model: Model
    optimizers: list[torch.optim.Optimizer]
    images: Images  # on the device
    validation: Images
    history: list[EpochLog]
    draws: bool  # whether its layers draw random numbers in training, as Dropout does

    def smoothed_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of logits [B, classes] with smoothed labels [B].

        The targets are one-hot and not class indices, whose losses PyTorch sums in another order:
        so weights that were trained with earlier versions are made again to the bit.
        """
        targets = F.one_hot(labels, logits.shape[1]).float()
        return F.cross_entropy(logits, targets, label_smoothing=self.job.recipe.label_smoothing)


def train_epoch(training: Training, step: Step, epoch: int, hardware: Hardware) -> EpochLog:
    """Pass once over the training images, then validate."""
    recipe = training.job.recipe
    count = len(training.images)
    plan = plan_epoch(epoch, count, recipe).to(hardware.device)
    steps = math.ceil(count / recipe.batch_size)
    losses = torch.zeros(steps, device=hardware.device)
    correct = torch.zeros(steps, device=hardware.device)
    title = f"{training.name} epoch {epoch + 1}/{recipe.epochs}"
    start = time.perf_counter()
    training.model.train()
    for k, index in enumerate(show_steps(plan.order.tensor_split(steps), title, hardware)):
        hardware.raise_if_cancelled()
        set_rates(training.optimizers, progress=(epoch + k / steps) / recipe.epochs)
        pixels = crop_and_flip(training.images.pixels, index, plan)
        with own_randomness(training, epoch, k):
            losses[k], correct[k] = step(pixels, training.images.labels[index])
    train_loss = losses.mean().item()  # until here, nothing has waited for the device
    seconds = time.perf_counter() - start
    validation_loss, validation_accuracy = validate(training, hardware)
    if not math.isfinite(train_loss + validation_loss):
        refuse_divergence(title, losses, epoch, recipe)
    train_accuracy = 100 * correct.sum().item() / count
    log = EpochLog(train_loss, train_accuracy, validation_loss, validation_accuracy, seconds)
    print_epoch(title, log, count / seconds)
    return log


@contextmanager
def own_randomness(training: Training, epoch: int, step: int) -> Iterator[None]:
    """What a step's layers draw follows from seed, epoch and step; others that draw wait for it."""
    if not training.draws:
        yield
        return
    with RANDOMNESS:
        epoch_seed = training.job.recipe.seed * 1_000_003 + epoch
        torch.manual_seed((epoch_seed * 1_000_003 + step) % 2**63)
        yield


def train_step(
    pixels: Tensor, labels: Tensor, training: Training, hardware: Hardware
) -> tuple[Tensor, Tensor]:
    """Learn from images uint8 [B, size, size, 3] and labels int64 [B].

    Returns the loss, and how many were classified correctly.
    """
    # 1. Forward.
    with hardware.autocast():
        logits = training.model(to_input(pixels)).float()  # [B, classes]
    loss = training.smoothed_loss(logits, labels)
    # 2. Backward.
    training.model.zero_grad()
    loss.backward()
    # 3. Step; under autocast for Muon's matrix products.
    with hardware.autocast():
        for optimizer in training.optimizers:
            optimizer.step()
    return loss.detach(), (logits.argmax(1) == labels).sum()


def show_steps(batches: Sequence[Tensor], title: str, hardware: Hardware) -> tqdm:
    """The batches, with a progress bar on a terminal; those of several ranks would overlap."""
    quiet = hardware.ranks.count > 1 or not console.on_terminal()
    return tqdm(
        batches, title, leave=False, unit="images", unit_scale=len(batches[0]), disable=quiet
    )


def validate(training: Training, hardware: Hardware) -> tuple[float, float]:
    """Loss, and accuracy in percent, on the validation images."""
    logits = logits_of(training.model, training.validation.pixels, hardware)
    labels = training.validation.labels
    loss = training.smoothed_loss(logits, labels).item()
    correct = logits.argmax(1) == labels
    return loss, 100 * correct.double().mean().item()


def refuse_divergence(title: str, losses: Tensor, epoch: int, recipe: Recipe) -> NoReturn:
    """Say at which step of the epoch the loss was no longer finite."""
    broken = losses.isfinite().logical_not().nonzero()[:, 0].tolist()
    step = broken[0] if broken else len(losses) - 1
    progress = (epoch + step / len(losses)) / recipe.epochs
    rate = recipe.learning_rate * learning_rate_share(progress)
    where = f"{title}, step {step + 1}, at learning rate {rate:.3g}"
    cure = "lower --learning-rate and --muon-rate, and pass --retrain"
    raise UserError(f"the loss is not finite in {where}: {cure}")


def print_epoch(title: str, log: EpochLog, speed: float) -> None:
    """One line of progress, which stays on the screen and in a log file; history.csv has all."""
    validated = f"validation {log.validation_accuracy:.2f} %"
    console.say(f"{title}: loss {log.train_loss:.2f}, {validated}, {speed:,.0f} images/s")


# Jobs

TrainingJob = trainings.Job[Recipe]


def training_jobs(settings: Settings) -> list[TrainingJob]:
    """Each network with each seed."""
    folder = settings.output() / "models"
    jobs = []
    for seed in settings.all_seeds():
        recipe = settings.recipe.with_seed(seed)
        for network in settings.taking_part():
            path = path_of_weights(folder, network, seed, plain_seed=Recipe.seed)
            log = settings.output() / history.FILE
            jobs.append(TrainingJob(network, recipe, path, log))
    return jobs


def train_network(job: TrainingJob, data: Dataset, hardware: Hardware) -> None:
    """Do a job and write its file; the last epoch's weights are the result.

    After each epoch the whole state goes to a file beside it, from which training goes on: all
    that is random follows from seed and epoch.
    """
    training = start_training(job, data, hardware)
    step: Step = partial(train_step, training=training, hardware=hardware)
    if hardware.device.type == "cuda":
        step = Recorder(step)
    for epoch in range(len(training.history), job.recipe.epochs):
        log = train_epoch(training, step, epoch, hardware)
        training.history.append(log)
        if job.log is not None:
            history.add(job.log, job.network.key, job.recipe.seed, epoch + 1, log)
        if epoch + 1 < job.recipe.epochs:
            states = [optimizer.state_dict() for optimizer in training.optimizers]
            save_checkpoint(job.resume_path, make_checkpoint(training, hardware, states))
    # By way of the state's file, so that there are never both: weights that someone deletes are
    # trained anew.
    save_checkpoint(job.resume_path, make_checkpoint(training, hardware, None))
    move(job.resume_path, job.path)


def start_training(job: TrainingJob, data: Dataset, hardware: Hardware) -> Training:
    """A fresh network, or the state in which an interrupted training was left."""
    split = data.splits[job.recipe.seed]
    images = data.train.select(split.training)
    states: list[dict] = []
    history: list[EpochLog] = []
    if job.resume_path.exists():
        half_trained = trainings.load(job.resume_path, job, len(data.classes), hardware.precision)
        model = half_trained.model
        history = half_trained.checkpoint.history
        states = half_trained.checkpoint.optimizers or []
    else:
        model = build_network(job.network, job.recipe, len(data.classes))
        model.measure_input(images.pixels)
    draws = draws_in_training(model, to_input(images.pixels[:2]))
    model.to(hardware.device)
    optimizers = make_optimizers(model, job.recipe)
    for optimizer, state in zip(optimizers, states, strict=False):
        optimizer.load_state_dict(state)
    keep_rates_on(hardware.device, optimizers)
    rank = f"rank {hardware.ranks.rank}: " if hardware.ranks.count > 1 else ""
    name = f"{rank}{job.network.title} seed {job.recipe.seed}"
    if history:
        console.say(f"{name} goes on at epoch {len(history) + 1}")
    return Training(
        job=job,
        name=name,
        model=model,
        optimizers=optimizers,
        images=images.to(hardware.device),
        validation=data.train.select(split.validation),
        history=history,
        draws=draws,
    )


def make_checkpoint(
    training: Training, hardware: Hardware, optimizers: list[dict] | None
) -> Checkpoint:
    """The state of a training; `optimizers` are the states to go on with, None at its end."""
    weights = {name: tensor.cpu() for name, tensor in training.model.state_dict().items()}
    return Checkpoint(
        network=training.job.network.key,
        settings=training.job.recipe.record(),
        precision=hardware.precision,
        device=hardware.description,
        versions=versions(),
        history=training.history,
        state_dict=weights,
        optimizers=optimizers,
    )


def train_all(jobs: Sequence[TrainingJob], data: Dataset, hardware: Hardware) -> list[TrainedModel]:
    """The jobs' networks, from their files or by training; on torchrun's ranks but 0 none."""

    def train(job: TrainingJob) -> None:
        train_network(job, data, hardware)

    return trainings.do_all(jobs, train, len(data.classes), hardware)


# ---- 5. The run --------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    """The README's list of steps."""
    console.prepare()
    settings = parse_settings(arguments)
    hardware = prepare_machine(settings.machine, len(settings.networks))
    if settings.predict:
        with one_line_errors(settings, hardware):
            look_at_pictures(settings, hardware)
        return
    packages.import_all()
    watch = console.Stopwatch(silent=hardware.ranks.rank > 0)
    with one_line_errors(settings, hardware), hold_output(settings, hardware):
        announce(settings, hardware)
        with watch.phase("data"):
            data = load_data(settings)

        with watch.phase("training"):
            jobs = training_jobs(settings)
            hardware = trainings.agree_on_precision(
                jobs, settings.machine.precision, len(data.classes), settings.retrain, hardware
            )
            trained = train_all(jobs, data, hardware)
        if hardware.ranks.rank > 0:
            return  # rank 0 goes on

        measure(trained, data, settings, hardware, watch)


def measure(
    trained: Sequence[TrainedModel],
    data: Dataset,
    settings: Settings,
    hardware: Hardware,
    watch: console.Stopwatch,
) -> None:
    """Try the trained networks in every way, and write what is known when it is known.

    A part that fails takes nothing of the others with it; its error ends the run after them.
    """
    from lab.report import figures, writer  # pandas and seaborn, for which --help need not wait

    seed = settings.recipe.seed
    taken, rules = count_looks(settings)
    files = ResultFiles(settings.output())
    pieces = open_pieces(settings, hardware)
    with watch.phase("evaluation"):
        by_network = evaluate_all(trained, data, hardware)
        chosen = stress.choose(data, settings.stress_tests)
        evaluations = [of_network[0] for of_network in by_network.values()]  # the first seed's
        strange = datasets.other_kinds(data, familiar.IMAGES_OF_A_KIND, seed)
        results = Results(
            setup=describe_setup(settings, rules),
            hardware=hardware,
            dataset=data.title,
            classes=data.classes,
            images=count_images(data, chosen, seed),
            networks=network_results(by_network, data, rules),
            seconds=watch.seconds,
            looks=taken,
            familiarity=familiar.find(evaluations, strange, settings.familiar_share, hardware),
        )
    writer.write_numbers(results, files)

    parts = console.Parts(watch)
    with parts.part("comparison"):
        results = replace(
            results,
            comparisons=comparison.compare_with_first(
                by_network, data.test.labels.numpy(), len(data.classes), rules
            ),
            retest=retest.run(by_network, data.new_test, rules, hardware),
        )
    writer.write_numbers(results, files)

    with parts.part("explanation"):
        explained = gradcam.explain(by_network, data, settings.gradcam_images)
        results = replace(results, explained=explained)

    with parts.part("failures"):
        dossier = failures.study(by_network, data, rules, seed)
        results = replace(results, failures=dossier)
        writer.write_predictions(dossier, files)
    writer.write_numbers(results, files)

    if settings.stress_tests.share() > 0:
        with parts.part("stress"):
            outcome = stress.run(
                by_network, data, chosen, settings.stress_tests, rules, seed, hardware, pieces
            )
            results = replace(results, stress=outcome)
            watch.say(pieces.say())
        writer.write_numbers(results, files)

    with parts.part("figures"):
        figures.save(results, files)
    writer.finish(replace(results, failed=parts.failed()), files)
    parts.raise_first()
    pieces.join()


def announce(settings: Settings, hardware: Hardware) -> None:
    """Say where it runs, what of an earlier run it replaces, and what several seeds can show."""
    folder = settings.output()
    console.say(f"Running on {hardware.description}, {hardware.precision}; results go to {folder}/")
    if hardware.ranks.rank > 0:
        return  # rank 0 says the rest
    for line in records.say_what_is_replaced(folder, settings_by_flag(settings)):
        console.say(line)
    if settings.seeds > 1:
        recipe = comparable_recipe(settings)
        for sentence in records.plan_from_earlier(
            folder, recipe, settings.taking_part(), settings.seeds, settings.rules
        ):
            console.say(sentence)


def count_looks(settings: Settings) -> tuple[tuple[Look, ...], statistics.Settings]:
    """This look at the networks after the earlier ones, and the rules at the level it is left."""
    seeds = settings.all_seeds()
    recipe = comparable_recipe(settings)
    earlier = records.earlier_looks(settings.output(), recipe, settings.taking_part())
    taken = looks.take(earlier, seeds, settings.rules.level)
    level = looks.level_of(taken, seeds, settings.rules.level)
    return tuple(taken), replace(settings.rules, level=level)


def open_pieces(settings: Settings, hardware: Hardware) -> Pieces:
    """What the stress tests of a killed run, or of one with fewer seeds, have measured.

    On the same machine, by the same code.
    """
    source = [Path(__file__), *sorted(Path(__file__).with_name("lab").rglob("*.py"))]
    common = {
        "machine": [hardware.description, hardware.precision, hardware.eval_batch],
        "versions": versions(),
        "source": digest_of_files(source),
    }
    return Pieces(settings.output() / "measured", common)


def comparable_recipe(settings: Settings) -> dict[str, object]:
    """What trainings have in common whose seeds can be looked at together."""
    recipe = settings.recipe.record()
    del recipe["seed"]
    return recipe


def describe_setup(settings: Settings, rules: statistics.Settings) -> Setup:
    """The settings, as far as the report tells of them, with the rules of this look."""
    options = settings_by_flag(settings)
    for place in PLACES:
        del options[place]
    return Setup(
        command=command_line(settings, Settings(), PLACES),
        date=datetime.date.today().isoformat(),
        commit=commit_of(Path(__file__).parent),
        options=options,
        seeds=settings.all_seeds(),
        epochs=settings.recipe.epochs,
        stages=len(settings.recipe.widths),
        rules=rules,
    )


# Pictures of one's own


def look_at_pictures(settings: Settings, hardware: Hardware) -> None:
    """What the first seed's networks say of the pictures of --predict."""
    from lab.report import pictures

    networks, familiarity = load_for_pictures(settings, hardware)
    paths = pictures.find_pictures(settings.predict)
    folder = settings.output() / "predictions"
    failures_of_pictures = pictures.look_at(paths, networks, familiarity, folder, hardware)
    if failures_of_pictures > 0:
        sys.exit(1)


def classify(picture: str | Path, *options: str) -> dict[str, dict[str, float]]:
    """What the networks that a run with these options has trained say of a picture's middle square.

    Each class's probability, temperature scaled, the likeliest first, by the network's key.
    UserError where there is no such run or the file is no picture.
    """
    from lab.report import pictures

    settings = parse_settings(options)
    hardware = prepare_machine(settings.machine, len(settings.networks))
    seen = pictures.read_picture(Path(picture))
    answers = {}
    networks, _ = load_for_pictures(settings, hardware)
    for one in networks:
        answers[one.trained.network.key] = one.probabilities(seen, hardware)
    return answers


def load_for_pictures(
    settings: Settings, hardware: Hardware
) -> tuple[list[Classifier], Familiarity]:
    """The first seed's networks, with what they know of the images that they learnt."""
    from lab.report import pictures

    jobs = training_jobs(replace(settings, seeds=1))
    return pictures.load(jobs, settings.output(), settings.machine.precision, hardware)


# The command line, and how a run ends

# What --help shows first
EXAMPLES = """\
- python main.py                             the whole study on CIFAR-10
- python main.py --seeds 5 --stress quick    more seeds, an eighth of the stress
- python main.py --predict cat.jpg           what its networks say of a picture

Those that are needed most, and further below all of them by what they govern:

--data-dir DIR        where CIFAR-10 lies, or will lie
--output-dir DIR      where results go
--dataset shapes      drawn images, which need no network
--networks A B ...    which networks take part; all others are compared with A
--seed N, --seeds N   the first seed, and how many
--epochs N            how long to train
--stress off          full, quick (an eighth of the images) or off
--device cpu          cuda, or cpu where there is a GPU
--precision fp32      the arithmetic: bf16 or fp32
--retrain             train again even where weights exist
"""

# Where files lie, and what is asked beside a run: these change no number.
PLACES = ("data_dir", "output_dir", "mirror", "predict")


def parse_settings(arguments: Sequence[str] | None = None) -> Settings:
    """The command line as `Settings`. What cannot be is said on stderr, with exit status 2."""
    given = sys.argv[1:] if arguments is None else arguments
    refuse_unknown(given, Settings())
    style = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
    about = (__doc__ or "").split("\n\n")[0] + "\n\n" + EXAMPLES
    settings = tyro.cli(Settings, prog="main.py", description=about, args=arguments, config=style)
    check_ranges(settings)
    check_combinations(settings)
    if "--predict" in given and not settings.predict:
        refuse("predict", "names no picture")
    if settings.predict and settings.retrain:
        refuse("retrain", "can't go with --predict, which trains nothing")
    data_dir = expand_home("data_dir", settings.data_dir)
    output_dir = settings.output_dir
    if output_dir is not None:
        output_dir = expand_home("output_dir", output_dir)
    return replace(settings, data_dir=data_dir, output_dir=output_dir)


def check_combinations(settings: Settings) -> None:
    """Ends the program where settings are possible one by one, and not together."""
    recipe = settings.recipe
    if recipe.dataset == "cifar10":
        images = cifar10.TRAINING_IMAGES
        classes = cifar10.CLASSES
    else:
        images = recipe.shapes_train
        classes = len(shapes.SHAPES)
    held_out = math.ceil(images * recipe.validation)
    training_images = images - held_out
    if min(held_out, training_images) < classes:
        problem = f"leaves a class without images: {images} images are too few"
        refuse("validation", problem)
    if recipe.batch_size > training_images:
        refuse("batch_size", f"is larger than the {training_images} training images")
    smallest_image = recipe.image_size(epoch=0)
    last_side = recipe.last_side(smallest_image)
    if last_side == 0:
        most = int(math.log2(smallest_image))
        problem = f"has more than {most} stages, which halve {smallest_image} pixels to nothing"
        refuse("widths", problem)
    smallest_batch = training_images // math.ceil(training_images / recipe.batch_size)
    if smallest_batch * last_side**2 == 1:
        problem = "leaves batch norm a single value a channel, which has no variance"
        refuse("batch_size", problem)
    check_networks(settings.networks)
    if settings.rules.power <= settings.rules.level:
        refuse("power", "must be above --level, which chance alone reaches")


def check_networks(keys: Sequence[str]) -> None:
    """Ends the program where --networks names what there is not, or too few to compare."""
    known = keys_of([*NETWORKS, *CONTROLS])
    for key in keys:
        if key not in known:
            refuse("networks", f"there is no {key}: there are {', '.join(known)}")
    if len(set(keys)) < len(keys):
        refuse("networks", "names a network twice")
    if len(keys) < 2:
        refuse("networks", "names fewer than two networks: there is nothing to compare")


@contextmanager
def one_line_errors(settings: Settings, hardware: Hardware) -> Iterator[None]:
    """End in one line, with exit status 1, where a person can mend what went wrong."""
    folders = {"output_dir": settings.output(), "data_dir": cifar10.home_of(settings.data_dir)}
    with console.one_line_errors(hardware, folders, say_interrupted(settings, hardware)):
        yield


def hold_output(settings: Settings, hardware: Hardware) -> AbstractContextManager[None]:
    """Hold the output folder, so that no second run writes to it; rank 0 does it for all ranks."""
    return hold_folder(settings.output()) if hardware.ranks.rank == 0 else nullcontext()


def say_interrupted(settings: Settings, hardware: Hardware) -> str:
    """What an interrupted run keeps, and how to go on."""
    if settings.predict:
        return "interrupted"
    another_rank = ""
    if hardware.ranks.count > 1:
        another_rank = f", or another of the {hardware.ranks.count} ranks died"
    same_command = "the same command"
    if settings.retrain:
        same_command += " without --retrain"
    kept = f"what was trained and measured is kept in {settings.output()}/"
    return f"interrupted{another_rank}; {kept}, and {same_command} goes on from there"


if __name__ == "__main__":
    try:
        main()
        # All is done: as Python ends, Ctrl-C can stop nothing more.
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    except KeyboardInterrupt:  # before the run has anything to keep
        sys.exit("main.py: interrupted")
    except BrokenPipeError:  # whoever reads, as `--help | head` does, has read enough
        console.end_unread()
    except ImportError as error:  # of what is imported where it is used
        packages.end_unless_ours(error)
