"""How fast main.py trains, beside the usual pipeline, on this machine; one table, in four minutes.

    python benchmarks/throughput.py --data-dir ../shared/data
    python benchmarks/throughput.py --device cpu --precision fp32 --dataset shapes

Takes the options of main.py. The usual pipeline is the one published for this comparison: three
conv-BN-ReLU-maxpool blocks of 32/64/128 channels and a layer of 256 units (SE with reduction 4
after each block), Adam 1e-3, batch 64, float32, crop, flip, ToTensor and Normalize per image by
torchvision in a DataLoader with two workers.

Everything is measured in short rounds, in turn, so that a slow stretch of the machine meets all of
them: the table has the median over the rounds and their range, and says where that is so wide that
nothing should be quoted.
"""

from __future__ import annotations

import dataclasses
import math
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils import data as torch_data
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import main
from lab.data.images import IMAGE_SIZE, Dataset, Images, Split, to_input
from lab.machine.device import Hardware, prepare_machine
from lab.machine.parallel import in_parallel
from lab.machine.recorder import Recorder, Step
from lab.measure.evaluation import logits_of
from lab.measure.models import Network, build_network

STEPS = {"cpu": 1, "cuda": 12}  # of a measured round of ours
USUAL_STEPS = 20  # of the usual pipeline's, after ten during which its workers start
LEAST_ROUNDS = 3
MOST_ROUNDS = 9
SECONDS = 180  # for all rounds
QUIET = 0.2  # range of the rounds, of their median


class UsualCNN(nn.Module):
    """The usual network, with or without SE blocks.

    Takes normalised images in the usual pipeline, and images in [0, 1] from main.py's loop.
    """

    def __init__(self, classes: int, attention: bool) -> None:
        super().__init__()
        self.mean = nn.Buffer(torch.zeros(3))
        self.std = nn.Buffer(torch.ones(3))
        self.stem = nn.Identity()
        self.stages = nn.ModuleList()
        self.attention = nn.ModuleList()
        for before, width in ((3, 32), (32, 64), (64, 128)):
            convolution = nn.Conv2d(before, width, 3, padding=1)
            self.stages.append(
                nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2))
            )
            block = main.SEBlock(width, main.Recipe(reduction=4)) if attention else nn.Identity()
            self.attention.append(block)
        self.classifier = nn.Sequential(
            nn.Flatten(), nn.Linear(2048, 256), nn.ReLU(), nn.Linear(256, classes)
        )

    def measure_input(self, pixels: torch.Tensor) -> None:
        images = to_input(pixels[: main.Recipe().measured_images])
        self.mean.copy_(images.mean((0, 2, 3)))
        self.std.copy_(images.std((0, 2, 3)))

    def features(self, images: torch.Tensor) -> torch.Tensor:
        x = (images - self.mean[:, None, None]) / self.std[:, None, None]
        for stage, attention in zip(self.stages, self.attention, strict=True):
            x = attention(stage(x))
        return x

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        return self.classifier(features)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classify(self.features(images))


def build_usual(recipe: main.Recipe, classes: int) -> UsualCNN:
    return UsualCNN(classes, attention=False)


def build_usual_with_se(recipe: main.Recipe, classes: int) -> UsualCNN:
    return UsualCNN(classes, attention=True)


USUAL_NETWORKS = [
    Network("usual", "usual network", "", "", build_usual, ""),
    Network("usual_se", "usual network with SE", "", "", build_usual_with_se, ""),
]


class UsualImages(torch_data.Dataset):
    """Images one by one as PIL pictures through torchvision's transforms, as its CIFAR10 does."""

    def __init__(self, images: Images, training: bool) -> None:
        self.pixels = images.pixels.numpy()
        self.labels = images.labels.tolist()
        steps: list[Callable] = []
        if training:
            steps += [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
        steps.append(transforms.ToTensor())
        steps.append(transforms.Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)))
        self.transform = transforms.Compose(steps)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


@dataclass(frozen=True)
class Speed:
    """Images a second, in one round."""

    training: float
    evaluation: float

    def minutes(self) -> float:
        """Of fifteen epochs of 45,000 + 5,000 images."""
        return 15 * (45_000 / self.training + 5_000 / self.evaluation) / 60


class UsualPipeline:
    """A usual network's training, of which each call is a round."""

    def __init__(self, network: Network, data: Dataset, device: torch.device) -> None:
        self.data = data
        self.device = device
        self.model = network.build(main.Recipe(), len(data.classes)).to(device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)

    def __call__(self) -> list[Speed]:
        return [Speed(self.images_a_second(training=True), self.images_a_second(training=False))]

    def images_a_second(self, training: bool) -> float:
        count = 64 * (10 + USUAL_STEPS)
        index = torch.arange(len(self.data.train)).repeat(math.ceil(count / len(self.data.train)))
        images = UsualImages(self.data.train.select(index[:count]), training)
        loader = torch_data.DataLoader(images, batch_size=64, shuffle=training, num_workers=2)
        self.model.train(training)
        for batch, (pixels, labels) in enumerate(loader):
            if batch == 10:
                start = time.perf_counter()
            with torch.set_grad_enabled(training):
                logits = self.model(pixels.to(self.device))
                loss = F.cross_entropy(logits, labels.to(self.device))
            if training:
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
            loss.item()
        return 64 * USUAL_STEPS / (time.perf_counter() - start)


def share_of_crops(recipe: main.Recipe) -> dict[int, float]:
    """What share of the training images has which side."""
    sides = [main.plan_epoch(epoch, 1, recipe).crop_size for epoch in range(recipe.epochs)]
    return {side: sides.count(side) / len(sides) for side in sorted(set(sides))}


def with_one_side(recipe: main.Recipe, side: int) -> main.Recipe:
    """A recipe whose epochs, of which there are more than rounds, all see images of one side."""
    crop_epochs = 0.0 if side == IMAGE_SIZE else 1.0
    return dataclasses.replace(recipe, epochs=1000, crop_epochs=crop_epochs)


@dataclass
class OneSide:
    """A network's training by main.py's own loop on images of one side."""

    training: main.Training
    step: Step

    def seconds(self, hardware: Hardware) -> float:
        """Of the next epoch, for one image."""
        epoch = len(self.training.history)
        log = main.train_epoch(self.training, self.step, epoch, hardware)
        self.training.history.append(log)
        return log.seconds / len(self.training.images)


class OurPipeline:
    """main.py's loop over its schedule of crops; each call is a round.

    Several networks are trained as main.py does it, perhaps side by side.
    """

    def __init__(
        self, networks: Sequence[Network], data: Dataset, recipe: main.Recipe, hardware: Hardware
    ) -> None:
        self.hardware = hardware
        self.shares = share_of_crops(recipe)
        self.by_side: dict[int, list[OneSide]] = {}
        for side in self.shares:
            self.by_side[side] = []
            for network in networks:
                job = main.TrainingJob(network, with_one_side(recipe, side), Path("unused"))
                training = main.start_training(job, data, hardware)
                step: Step = partial(main.train_step, training=training, hardware=hardware)
                if hardware.device.type == "cuda":
                    step = Recorder(step)
                self.by_side[side].append(OneSide(training, step))

    def __call__(self) -> list[Speed]:
        seconds = np.zeros(len(self.by_side[max(self.by_side)]))
        for side, share in self.shares.items():
            of_side = self.by_side[side]
            seconds += share * np.array(in_parallel(self.train, of_side, self.hardware))
        evaluated = in_parallel(self.evaluate, self.by_side[max(self.by_side)], self.hardware)
        return [Speed(*pair) for pair in zip(1 / seconds, evaluated, strict=True)]

    def train(self, one: OneSide) -> float:
        return one.seconds(self.hardware)

    def evaluate(self, one: OneSide) -> float:
        """Images a second."""
        pixels = one.training.images.pixels
        start = time.perf_counter()
        logits_of(one.training.model, pixels, self.hardware)
        return len(pixels) / (time.perf_counter() - start)


def median_seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Seconds of one call; the first is left out."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[1:]))


def peak_tflops(hardware: Hardware) -> float:
    """TFLOP/s of the fastest of several large matrix products and convolutions.

    Of both, since on some processors PyTorch's products are the slower ones by far.
    """
    size = 2048 if hardware.device.type == "cpu" else 8192
    dtype = torch.bfloat16 if hardware.precision == "bf16" else torch.float32
    a = torch.randn(size, size, device=hardware.device, dtype=dtype)
    b = torch.randn(size, size, device=hardware.device, dtype=dtype)
    channels = size // 16
    images = torch.randn(64, channels, 32, 32, device=hardware.device, dtype=dtype)
    images = images.to(memory_format=torch.channels_last)
    filters = torch.randn(channels, channels, 3, 3, device=hardware.device, dtype=dtype)
    filters = filters.to(memory_format=torch.channels_last)

    def multiply() -> None:
        torch.mm(a, b)

    def convolve() -> None:
        F.conv2d(images, filters, padding=1)

    works: dict[Callable[[], None], float] = {
        multiply: 2 * size**3,
        convolve: 2 * filters.numel() * 64 * 32 * 32,
    }
    speeds = []
    for work, flops in works.items():
        seconds = min(median_seconds(work, hardware.device, 1) for _ in range(8))
        speeds.append(flops / seconds / 1e12)
    return max(speeds)


def step_flops(network: Network, data: Dataset, recipe: main.Recipe) -> float:
    """Floating-point operations of a training step for one image, mean over the schedule."""
    model = build_network(network, recipe, len(data.classes))
    flops = 0.0
    for side, share in share_of_crops(recipe).items():
        with FlopCounterMode(display=False) as counter:
            model(torch.rand(2, 3, side, side)).sum().backward()
        flops += share * counter.get_total_flops() / 2
    return flops


def data_seconds(data: Dataset, recipe: main.Recipe, hardware: Hardware) -> float:
    """Seconds that one image's crop, flip and conversion take, mean over the schedule."""
    pixels = data.train.pixels.to(hardware.device)
    seconds = 0.0
    for side, share in share_of_crops(recipe).items():
        plan = main.plan_epoch(0, len(pixels), with_one_side(recipe, side))
        plan = plan.to(hardware.device)
        index = plan.order[: recipe.batch_size]

        def prepare(index: torch.Tensor = index, plan: main.EpochPlan = plan) -> None:
            to_input(main.crop_and_flip(pixels, index, plan))

        seconds += share * median_seconds(prepare, hardware.device, 50) / len(index)
    return seconds


def peak_memory(device: torch.device) -> float:
    """GiB, of the GPU or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def few_images(data: Dataset, recipe: main.Recipe, device: torch.device) -> Dataset:
    """The dataset with as many training images as a round takes, and few to validate on."""
    count = STEPS[device.type] * recipe.batch_size
    index = torch.arange(count + 100) % len(data.train)
    split = Split(torch.arange(count), torch.arange(count, count + 100))
    return dataclasses.replace(data, train=data.train.select(index), splits={recipe.seed: split})


@dataclass
class Row:
    """A network in a pipeline, and how fast it was in each round."""

    title: str
    flops: float  # of a training step, for one image
    data_seconds: float | None = None  # only of ours
    rounds: list[Speed] = field(default_factory=list)

    def minutes(self) -> np.ndarray:
        """By round."""
        return np.array([speed.minutes() for speed in self.rounds])

    def cells(self, peak: float) -> list[str]:
        speeds = np.array([speed.training for speed in self.rounds])
        speed = float(np.median(speeds))
        tflops = self.flops * speed / 1e12
        between = f"{speeds.min():,.0f} to {speeds.max():,.0f}"
        minutes = f"{np.median(self.minutes()):.2f}"
        cells = [self.title, f"{speed:,.0f}", between, minutes]
        data_share = "" if self.data_seconds is None else f"{self.data_seconds * speed:.1%}"
        of_peak = "" if self.data_seconds is None else f"{tflops / peak:.0%}"
        quiet = "" if spread(self.minutes()) <= QUIET else "not quiet"
        return [*cells, data_share, f"{tflops:.3f}", of_peak, quiet]


def spread(values: np.ndarray) -> float:
    """The range of some rounds, of their median."""
    return float(np.ptp(values) / np.median(values))


@dataclass(frozen=True)
class Entrant:
    """A pipeline, each round of which gives a speed to each of its rows."""

    rows: Sequence[Row]
    measure: Callable[[], Sequence[Speed]]


def usual_entrant(network: Network, data: Dataset, device: torch.device, flops: float) -> Entrant:
    return Entrant([Row(f"usual, {network.title}", flops)], UsualPipeline(network, data, device))


def our_entrant(
    networks: Sequence[Network], data: Dataset, recipe: main.Recipe, hardware: Hardware, how: str
) -> Entrant:
    rows = []
    for network in networks:
        flops = step_flops(network, data, recipe)
        rows.append(Row(f"ours, {network.title}{how}", flops, data_seconds(data, recipe, hardware)))
    return Entrant(rows, OurPipeline(networks, data, recipe, hardware))


def measure_in_turn(entrants: Sequence[Entrant]) -> None:
    """Rounds of all, one after the other, as long as there is time for one more.

    A first one, in which much is made, is not counted.
    """
    start = time.perf_counter()
    for entrant in entrants:
        entrant.measure()
    for k in range(MOST_ROUNDS):
        one_round = (time.perf_counter() - start) / (k + 1)
        if k >= LEAST_ROUNDS and time.perf_counter() - start + one_round > SECONDS:
            break
        for entrant in entrants:
            for row, speed in zip(entrant.rows, entrant.measure(), strict=True):
                row.rounds.append(speed)


def total_minutes(entrants: Sequence[Entrant], side_by_side: bool) -> np.ndarray:
    """By round, of the trainings of all; those side by side take as long as the slowest."""
    minutes = np.stack([row.minutes() for entrant in entrants for row in entrant.rows])
    return minutes.max(0) if side_by_side else minutes.sum(0)


def say_ratio(what: str, ratios: np.ndarray) -> str:
    """A ratio's median over the rounds, and its range."""
    said = f"{what}: {np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f})"
    return said if spread(ratios) <= QUIET else f"{said}: not quiet, not to be quoted"


@dataclass(frozen=True)
class Field:
    """All that take part."""

    usual: Sequence[Entrant]
    usual_on_our_loop: Sequence[Entrant]
    ours: Sequence[Entrant]
    side_by_side: Sequence[Entrant]  # ours too; none where networks are trained one by one

    def all(self) -> list[Entrant]:
        return [*self.usual, *self.usual_on_our_loop, *self.ours, *self.side_by_side]


def gather(data: Dataset, recipe: main.Recipe, hardware: Hardware) -> Field:
    """Each network alone on all cores, and ours as main.py trains them."""
    alone = dataclasses.replace(hardware, at_once=1)
    whole_images = dataclasses.replace(recipe, crop_epochs=0.0)  # as the usual network's
    usual = []
    on_our_loop = []
    for network in USUAL_NETWORKS:
        flops = step_flops(network, data, whole_images)
        usual.append(usual_entrant(network, data, hardware.device, flops))
        on_our_loop.append(our_entrant([network], data, whole_images, alone, ""))
    ours = [our_entrant([network], data, recipe, alone, "") for network in main.NETWORKS]
    together = []
    if hardware.at_once > 1:
        together.append(our_entrant(main.NETWORKS, data, recipe, hardware, ", side by side"))
    return Field(usual, on_our_loop, ours, together)


def print_ratios(field: Field) -> None:
    """What the rounds say of pipelines beside each other."""
    one_by_one = total_minutes(field.ours, side_by_side=False)
    our_minutes = one_by_one
    if field.side_by_side:
        our_minutes = total_minutes(field.side_by_side, side_by_side=True)
        print(say_ratio("both networks one by one over side by side", one_by_one / our_minutes))
    usual_minutes = total_minutes(field.usual, side_by_side=False)
    print(say_ratio("both trainings, ours over the usual pipeline's", our_minutes / usual_minutes))
    for its_own, our_loop in zip(field.usual, field.usual_on_our_loop, strict=True):
        ratios = its_own.rows[0].minutes() / our_loop.rows[0].minutes()
        print(say_ratio(f"{its_own.rows[0].title}: its own loop over ours", ratios))


def no_line(title: str, log: main.EpochLog, speed: float) -> None:
    """In place of main.py's line for each epoch."""


def run(settings: main.Settings) -> None:
    hardware = prepare_machine(settings.machine, len(main.NETWORKS))
    data = few_images(main.load_data(settings), settings.recipe, hardware.device)
    print(f"{hardware.description}, PyTorch {torch.__version__}; takes four minutes")
    print(f"precision: {hardware.precision}, since {hardware.reason}", flush=True)
    main.print_epoch = no_line

    field = gather(data, settings.recipe, hardware)
    peak = peak_tflops(hardware)
    measure_in_turn(field.all())
    peak = max(peak, peak_tflops(hardware))

    print(f"\nMedians of {len(field.usual[0].rows[0].rounds)} rounds, and their range\n")
    print("| pipeline, network | images/s | range | 15 epochs, min | data | TFLOP/s | of peak | |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |")
    for entrant in field.all():
        for row in entrant.rows:
            print("|", " | ".join(row.cells(peak)), "|")
    print()
    print_ratios(field)
    print(f"peak of a large product or convolution in {hardware.precision}: {peak:.2f} TFLOP/s")
    kind = "GPU" if hardware.device.type == "cuda" else "resident"
    print(f"peak {kind} memory, ours: {peak_memory(hardware.device):.2f} GiB")


if __name__ == "__main__":
    run(main.parse_settings())
