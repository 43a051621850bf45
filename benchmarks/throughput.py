"""How fast main.py trains, beside the usual pipeline, on this machine; one table, in under ten minutes.

    python benchmarks/throughput.py --data-dir ../shared/data
    python benchmarks/throughput.py --device cpu --precision fp32 --dataset shapes

Takes the options of main.py. The usual pipeline is the one published for this comparison: three conv-BN-ReLU-maxpool
blocks of 32/64/128 channels and a layer of 256 units (SE with reduction 4 after each block), Adam 1e-3, batch 64,
float32, crop, flip, ToTensor and Normalize per image by torchvision in a DataLoader with two workers.
"""

from __future__ import annotations

import dataclasses
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import main

IMAGES = 6_400  # images in a measured epoch of ours, and in the measured part of a usual one


class UsualCNN(nn.Module):
    """The network of the usual pipeline; takes normalised images there, and images in [0, 1] from main.train."""

    title = "usual network"
    reduction = 0

    def __init__(self, settings: main.Settings, classes: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("std", torch.ones(3))
        layers: list[nn.Module] = []
        for before, width in ((3, 32), (32, 64), (64, 128)):
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
            if self.reduction:
                layers.append(main.SEBlock(width, self.reduction))
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(2048, 256), nn.ReLU(), nn.Linear(256, classes))

    def fit_input(self, pixels: torch.Tensor, settings: main.Settings) -> None:
        x = main.to_input(pixels[: settings.measured_images])
        self.mean, self.std = x.mean((0, 2, 3)), x.std((0, 2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers((x - self.mean[:, None, None]) / self.std[:, None, None])


class UsualSECNN(UsualCNN):
    title = "usual network with SE"
    reduction = 4


class UsualImages(Dataset):
    """Images one by one as PIL pictures through torchvision's transforms, as its CIFAR10 class gives them."""

    def __init__(self, images: main.Images, training: bool) -> None:
        self.pixels, self.labels = images.pixels.numpy(), images.labels.tolist()
        augment = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()] if training else []
        normalise = transforms.Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
        self.transform = transforms.Compose([*augment, transforms.ToTensor(), normalise])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


def usual_speed(network: type[UsualCNN], data: main.Dataset, device: torch.device) -> tuple[float, float]:
    """Training and evaluation speed of the usual pipeline, in images/s."""
    model = network(main.Settings(), len(data.classes)).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    speeds = []
    for training in (True, False):
        images = data.train.select(torch.arange(len(data.train.labels)).repeat(4)[: IMAGES + 640])
        loader = DataLoader(UsualImages(images, training), batch_size=64, shuffle=training, num_workers=2)
        model.train(training)
        for i, (x, labels) in enumerate(loader):
            if i == 10:  # the workers have started
                start = time.perf_counter()
            x, labels = x.to(device), labels.to(device)
            with torch.set_grad_enabled(training):
                loss = F.cross_entropy(model(x), labels)
            if training:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            loss.item()
        speeds.append((len(images.labels) - 640) / (time.perf_counter() - start))
    return speeds[0], speeds[1]


def share_of_crops(settings: main.Settings) -> dict[int, float]:
    """What share of the training images has which side."""
    sides = [main.plan_epoch(epoch, 1, settings)[0] for epoch in range(settings.epochs)]
    return {side: sides.count(side) / len(sides) for side in sorted(set(sides))}


def our_speed(
    network: str, data: main.Dataset, settings: main.Settings, hardware: main.Hardware
) -> tuple[float, float]:
    """Training and evaluation speed of main.py's own loop, in images/s, over its schedule of crops.

    Two epochs of each side, the second of which counts.
    """
    sides, seconds = share_of_crops(settings), 0.0
    for side, share in sides.items():
        of_side = dataclasses.replace(settings, epochs=2, crop_epochs=float(side != main.IMAGE_SIZE))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.pth"
            main.train(network, data, of_side, hardware, path)
            trained = main.load_trained(path, network, len(data.classes), of_side, hardware.precision)
        seconds += share * trained.content["history"][-1]["seconds"]
    count = len(main.split_train(data.train.labels, settings)[0])
    model = trained.model.to(hardware.device)
    start = time.perf_counter()
    main.predict(model, data.train.pixels, hardware)
    return count / seconds, len(data.train.labels) / (time.perf_counter() - start)


def timed(work, device: torch.device, repeats: int) -> float:
    """Seconds of one call, the median of several."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[1:]))


def matrix_peak(hardware: main.Hardware) -> float:
    """TFLOP/s of the best of several large matrix products."""
    size = 4096 if hardware.device.type == "cpu" else 8192
    kind = torch.bfloat16 if hardware.precision == "bf16" else torch.float32
    a, b = (torch.randn(size, size, device=hardware.device, dtype=kind) for _ in range(2))
    return max(2 * size**3 / timed(lambda: a @ b, hardware.device, 1) / 1e12 for _ in range(8))


def step_flops(network: str, data: main.Dataset, settings: main.Settings) -> float:
    """Floating-point operations of a training step for one image, forward and backward, mean over the schedule."""
    model, flops = main.build(network, settings, len(data.classes)), 0.0
    for side, share in share_of_crops(settings).items():
        with FlopCounterMode(display=False) as counter:
            model(torch.rand(2, 3, side, side)).sum().backward()
        flops += share * counter.get_total_flops() / 2
    return flops


def data_seconds(data: main.Dataset, settings: main.Settings, hardware: main.Hardware) -> float:
    """Seconds that one image's crop, flip and conversion take, mean over the schedule."""
    pixels, batch, seconds = data.train.pixels.to(hardware.device), settings.batch_size, 0.0
    for side, share in share_of_crops(settings).items():
        of_side = dataclasses.replace(settings, epochs=1, crop_epochs=float(side != main.IMAGE_SIZE))
        order, offsets, flips = (t[:batch].to(hardware.device) for t in main.plan_epoch(0, len(pixels), of_side)[1:])

        def prepare(order=order, offsets=offsets, flips=flips, side=side) -> None:
            main.to_input(main.crop_and_flip(pixels, order, offsets, flips, side))

        seconds += share * timed(prepare, hardware.device, 50) / len(order)
    return seconds


def run(settings: main.Settings) -> None:
    main.prepare_process()
    hardware = main.choose_hardware(settings)
    data = main.load_data(settings)
    data = dataclasses.replace(data, train=data.train.select(torch.arange(min(IMAGES, len(data.train.labels)))))
    fixed = dataclasses.replace(settings, crop_epochs=0.0)  # all that the usual network can take
    schedule = {"usual": fixed, "usual_se": fixed, "baseline": settings, "se_attention": settings}
    main.NETWORKS.update(usual=UsualCNN, usual_se=UsualSECNN)
    print(f"{hardware.description}, {hardware.precision}, PyTorch {torch.__version__}; takes some minutes", flush=True)

    peak = matrix_peak(hardware)
    ours = {n: our_speed(n, data, schedule[n], hardware) for n in schedule}
    peak = max(peak, matrix_peak(hardware))
    if hardware.device.type == "cuda":
        memory = torch.cuda.max_memory_allocated() / 2**30
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    usual = {
        n: usual_speed(network, data, hardware.device) for n, network in (("usual", UsualCNN), ("usual_se", UsualSECNN))
    }

    def minutes(train: float, evaluate: float) -> float:
        """Fifteen epochs of 45,000 + 5,000 images."""
        return 15 * (45_000 / train + 5_000 / evaluate) / 60

    preparation = {n: data_seconds(data, schedule[n], hardware) for n in schedule}
    print("\n| pipeline, network | images/s | 15 epochs, min | data | TFLOP/s | of peak |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    rows = [(f"usual, {main.NETWORKS[n].title}", n, usual[n], False) for n in usual]
    rows += [
        (f"ours, {main.NETWORKS[n].title}", n, ours[n], True) for n in ("usual", "usual_se", "baseline", "se_attention")
    ]
    for title, network, speed, own in rows:
        tflops = step_flops(network, data, schedule[network]) * speed[0] / 1e12
        share = f"{preparation[network] * speed[0]:.1%}" if own else ""
        of_peak = f"{tflops / peak:.0%}" if own else ""
        print(f"| {title} | {speed[0]:,.0f} | {minutes(*speed):.2f} | {share} | {tflops:.3f} | {of_peak} |")
    both = {name: sum(minutes(*part[n]) for n in names) for name, part, names in (
        ("usual", usual, ("usual", "usual_se")), ("ours", ours, ("baseline", "se_attention")),
    )}  # fmt: skip
    print(f"\nboth trainings, ours over the usual pipeline's: {both['ours'] / both['usual']:.2f}")
    for n in usual:
        print(f"{main.NETWORKS[n].title}, our loop over its own: {ours[n][0] / usual[n][0]:.1f} x")
    print(f"peak of a large matrix product in {hardware.precision}: {peak:.2f} TFLOP/s")
    print(f"peak {'GPU' if hardware.device.type == 'cuda' else 'resident'} memory, ours: {memory:.2f} GiB")


if __name__ == "__main__":
    run(main.parse_settings())
