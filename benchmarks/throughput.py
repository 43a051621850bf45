"""How fast main.py trains, beside the usual pipeline, on this machine; one table.

    python benchmarks/throughput.py --data-dir ../shared/data
    python benchmarks/throughput.py --device cpu --precision fp32 --dataset shapes

Takes the options of main.py. The usual pipeline is the one published for this comparison: three
conv-BN-ReLU-maxpool blocks of 32/64/128 channels and a layer of 256 units (SE with reduction 4
after each block), Adam 1e-3, batch 64, float32, crop, flip, ToTensor and Normalize per image by
torchvision in a DataLoader with two workers.
"""

from __future__ import annotations

import dataclasses
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from lab.data.images import IMAGE_SIZE, Dataset, Images, to_input
from lab.machine.device import Hardware, prepare_machine
from lab.machine.parallel import in_parallel
from lab.measure.evaluation import logits_of
from lab.measure.models import Network, TrainedModel

IMAGES = 6_400  # images in a measured epoch of ours, and in the measured part of a usual one


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
    """Images a second."""

    training: float
    evaluation: float

    def minutes(self) -> float:
        """Of fifteen epochs of 45,000 + 5,000 images."""
        return 15 * (45_000 / self.training + 5_000 / self.evaluation) / 60


def usual_speed(network: Network, data: Dataset, device: torch.device) -> Speed:
    """The usual pipeline's; what its first ten batches take, while workers start, is left out."""
    model = network.build(main.Recipe(), len(data.classes)).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    speeds = []
    for training in (True, False):
        index = torch.arange(len(data.train)).repeat(4)[: IMAGES + 640]
        images = UsualImages(data.train.select(index), training)
        loader = torch_data.DataLoader(images, batch_size=64, shuffle=training, num_workers=2)
        model.train(training)
        for batch, (pixels, labels) in enumerate(loader):
            if batch == 10:
                start = time.perf_counter()
            with torch.set_grad_enabled(training):
                loss = F.cross_entropy(model(pixels.to(device)), labels.to(device))
            if training:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            loss.item()
        speeds.append((len(images) - 640) / (time.perf_counter() - start))
    return Speed(*speeds)


def share_of_crops(recipe: main.Recipe) -> dict[int, float]:
    """What share of the training images has which side."""
    sides = [main.plan_epoch(epoch, 1, recipe).crop_size for epoch in range(recipe.epochs)]
    return {side: sides.count(side) / len(sides) for side in sorted(set(sides))}


def with_one_side(recipe: main.Recipe, side: int, epochs: int) -> main.Recipe:
    """A recipe whose epochs all see images of one side."""
    crop_epochs = 0.0 if side == IMAGE_SIZE else 1.0
    return dataclasses.replace(recipe, epochs=epochs, crop_epochs=crop_epochs)


def our_speeds(
    networks: Sequence[Network], data: Dataset, recipe: main.Recipe, hardware: Hardware
) -> list[Speed]:
    """main.py's own loop over its schedule of crops: two epochs of each side, the second counts.

    Several networks are trained as main.py does it, perhaps side by side.
    """
    seconds = np.zeros(len(networks))
    for side, share in share_of_crops(recipe).items():
        of_side = with_one_side(recipe, side, epochs=2)
        with tempfile.TemporaryDirectory() as folder:
            jobs = [main.TrainingJob(n, of_side, Path(folder) / f"{n.key}.pth") for n in networks]
            trained = main.train_all(jobs, data, hardware)
        seconds += [share * one.checkpoint.history[-1].seconds for one in trained]

    def evaluation_speed(one: TrainedModel) -> float:
        start = time.perf_counter()
        logits_of(one.model, data.train.pixels, hardware)
        return len(data.train) / (time.perf_counter() - start)

    training_speeds = len(data.splits[recipe.seed].training) / seconds
    evaluation_speeds = in_parallel(evaluation_speed, trained, hardware)
    return [Speed(*pair) for pair in zip(training_speeds, evaluation_speeds, strict=True)]


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
    size = 4096 if hardware.device.type == "cpu" else 8192
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
    model = main.build_network(network, recipe, len(data.classes))
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
        plan = main.plan_epoch(0, len(pixels), with_one_side(recipe, side, epochs=1))
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


def few_images(data: Dataset, recipe: main.Recipe) -> Dataset:
    """The dataset with few training images, split anew."""
    train = data.train.select(torch.arange(min(IMAGES, len(data.train))))
    split = main.split_train(train.labels, recipe.validation, recipe.seed)
    return dataclasses.replace(data, train=train, splits={recipe.seed: split})


@dataclass(frozen=True)
class Row:
    """What was measured of a network in a pipeline."""

    title: str
    speed: Speed
    flops: float
    data_seconds: float | None = None  # only of ours

    def cells(self, peak: float) -> list[str]:
        tflops = self.flops * self.speed.training / 1e12
        cells = [self.title, f"{self.speed.training:,.0f}", f"{self.speed.minutes():.2f}"]
        if self.data_seconds is None:
            return [*cells, "", f"{tflops:.3f}", ""]
        data_share = self.data_seconds * self.speed.training
        return [*cells, f"{data_share:.1%}", f"{tflops:.3f}", f"{tflops / peak:.0%}"]


def measure_ours(network: Network, data: Dataset, recipe: main.Recipe, hardware: Hardware) -> Row:
    """Alone on all cores."""
    alone = dataclasses.replace(hardware, at_once=1)
    (speed,) = our_speeds([network], data, recipe, alone)
    flops = step_flops(network, data, recipe)
    return Row(f"ours, {network.title}", speed, flops, data_seconds(data, recipe, hardware))


def measure_side_by_side(data: Dataset, recipe: main.Recipe, hardware: Hardware) -> list[Row]:
    """Both networks at once, each on its share of the cores, as `python main.py` trains them."""
    rows = []
    speeds = our_speeds(main.NETWORKS, data, recipe, hardware)
    for network, speed in zip(main.NETWORKS, speeds, strict=True):
        flops = step_flops(network, data, recipe)
        rows.append(Row(f"ours, {network.title}, side by side", speed, flops))
    return rows


def measure_usual(
    network: Network, data: Dataset, recipe: main.Recipe, device: torch.device
) -> Row:
    speed = usual_speed(network, data, device)
    return Row(f"usual, {network.title}", speed, step_flops(network, data, recipe))


def run(settings: main.Settings) -> None:
    hardware = prepare_machine(settings.machine, len(main.NETWORKS))
    data = few_images(main.load_data(settings), settings.recipe)
    whole_images = dataclasses.replace(settings.recipe, crop_epochs=0.0)  # as the usual network's
    print(f"{hardware.description}, PyTorch {torch.__version__}; takes some minutes")
    print(f"precision: {hardware.precision}, since {hardware.reason}", flush=True)

    peak = peak_tflops(hardware)
    same = [measure_ours(n, data, whole_images, hardware) for n in USUAL_NETWORKS]
    ours = [measure_ours(n, data, settings.recipe, hardware) for n in main.NETWORKS]
    together = []
    if hardware.at_once > 1:
        together = measure_side_by_side(data, settings.recipe, hardware)
    peak = max(peak, peak_tflops(hardware))
    memory = peak_memory(hardware.device)
    usual = [measure_usual(n, data, whole_images, hardware.device) for n in USUAL_NETWORKS]

    print("\n| pipeline, network | images/s | 15 epochs, min | data | TFLOP/s | of peak |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for row in (*usual, *same, *ours, *together):
        print("|", " | ".join(row.cells(peak)), "|")

    our_minutes = sum(row.speed.minutes() for row in ours)
    if together:
        one_by_one = our_minutes
        our_minutes = max(row.speed.minutes() for row in together)
        faster = one_by_one / our_minutes
        print(f"\nboth networks side by side: {faster:.2f} times as fast as one by one")
    ratio = our_minutes / sum(row.speed.minutes() for row in usual)
    print(f"both trainings, ours over the usual pipeline's: {ratio:.2f}")
    for network, row, usual_row in zip(USUAL_NETWORKS, same, usual, strict=True):
        faster = row.speed.training / usual_row.speed.training
        print(f"{network.title}, our loop over its own: {faster:.1f} x")
    print(f"peak of a large product or convolution in {hardware.precision}: {peak:.2f} TFLOP/s")
    kind = "GPU" if hardware.device.type == "cuda" else "resident"
    print(f"peak {kind} memory, ours: {memory:.2f} GiB")


if __name__ == "__main__":
    run(main.parse_settings())
